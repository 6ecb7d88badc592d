"""No tensor is made on a device that nobody named."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from attacks.solvers import (
    curve,
    exact,
    joint,
    published,
    recover_soft_label,
    recover_soft_labels,
    reduction,
    seeds,
)
from attacks.solvers.closed_form import label_structure
from attacks.solvers.label_models import Granted, Model
from attacks.solvers.verdict import Candidates, judge

FACTORIES = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.logspace,
    torch.normal,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}


class EveryFactoryNamesItsDevice(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            raise AssertionError(f"torch.{func.__name__} without device=")
        return func(*args, **kwargs)


class WithoutDeviceGuards(TorchFunctionMode):
    """x[...] and ~x take a CUDA device guard, which a CPU build of torch refuses even on fake tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        return func(*args, **(kwargs or {}))


def indexed(x, key):
    key = key if isinstance(key, tuple) else (key,)
    if any(k is Ellipsis for k in key):
        at = next(i for i, k in enumerate(key) if k is Ellipsis)
        named = sum(k is not None and k is not Ellipsis for k in key)
        key = (*key[:at], *[slice(None)] * (x.dim() - named), *key[at + 1 :])
    tensors = [k for k in key if isinstance(k, torch.Tensor)]
    if len(tensors) > 1:  # they come first, and go together
        x, key = torch.ops.aten.index.Tensor(x, tensors), (slice(None), *key[len(tensors) :])
    dim = 0
    for k in key:
        if k is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(k, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, k.start, k.stop, k.step or 1), dim + 1
        elif isinstance(k, int):
            x = x.select(dim, k)
        else:
            x, dim = torch.ops.aten.index.Tensor(x, [None] * dim + [k]), dim + k.dim()
    return x


@contextlib.contextmanager
def fake_cuda():
    with FakeTensorMode(), WithoutDeviceGuards():
        yield


def test_fake_cuda_tensors_refuse_to_meet_cpu_tensors():
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        torch.rand(3, device="cuda")[:2] + torch.rand(2, device="cpu")


@pytest.mark.parametrize("search", ["exact", "lbfgs", "paper"])
@pytest.mark.parametrize("label_format", ["hard", "smoothing", "mixup", "smoothed_mixup"])
def test_every_factory_call_names_its_device(case, search, label_format):
    c = case(label_format=label_format)
    gradient, bias_gradient = c.weight_gradient, c.bias_gradient
    with EveryFactoryNamesItsDevice():
        recover_soft_label(gradient, c.weight, search=search, label_format=label_format)
        recover_soft_label(gradient, c.weight, bias_gradient=bias_gradient)
        recover_soft_label(0.4 * gradient, c.weight, mixing=0.3 if "mixup" in label_format else None)


def test_the_swarm_names_its_devices(case):
    c = case(label_format="smoothing", scale=0.12)
    gradient = c.weight_gradient
    with EveryFactoryNamesItsDevice():
        recover_soft_label(gradient, c.weight, search="pso", label_format="smoothing")


def fake_problem(examples=3, num_classes=20):
    def number(*shape):
        return torch.rand(*shape, dtype=torch.float64, device="cuda")

    per_class = [number(examples, 1, num_classes) for _ in range(6)]
    return curve.Problem(*per_class, number(examples, 1), number(examples, 1), floor=0.0, sum_error=1e-7)


@pytest.mark.parametrize("num_classes", [4, 20, 1000])
def test_the_kernels_of_the_search_run_on_fake_cuda_tensors(num_classes):
    models = [Model(1, False), Model(1, True), Model(2, True, True)]
    granted = Granted(mixing=0.3)
    with fake_cuda():
        problem = fake_problem(num_classes=num_classes)
        t = torch.cat(
            [
                seeds.slopes(problem),
                seeds.triples(problem),
                seeds.flat(problem),
                seeds.grid(problem, 8, 50.0),
            ],
            dim=1,
        )
        t = torch.cat([seeds.densest(t, 5), exact.gather_seeds(problem, ("slopes", "fine grid"))], dim=1)
        chosen = exact.choose_seeds(problem, t, models, 2, problem.slack)
        state, frame = exact.start(problem, chosen, models)
        for _ in range(2):
            state = curve.polish_step(problem, state, frame)
        still = exact.settled(state, state.chi2, num_classes, 2)
        verdict = judge(problem, Candidates(state.t, frame), granted)
        many, t_many = exact.unscaled(problem, 2)
        structure = label_structure(verdict.y, verdict.label_std, 8)
        for tensor in (*verdict, *many[:8], t_many, still, *structure):
            assert tensor.device.type == "cuda"
        assert verdict.y.shape == (3, num_classes)


@pytest.mark.parametrize("num_classes", [4, 20])
def test_the_joint_likelihood_runs_on_fake_cuda_tensors(num_classes):
    def number(*shape):
        return torch.rand(*shape, dtype=torch.float64, device="cuda")

    with fake_cuda():
        basis = number(3, 30, 12)
        data = joint.NoisyGradients(
            number(3, num_classes, 12), number(3, num_classes, 12), number(num_classes), basis, number(3)
        )
        spikes, free_floor = torch.ones(3, 2, dtype=torch.long, device="cuda"), number(3, 2)
        at = joint.evaluate(data, data.inwards(number(3, 2, 30)), spikes, free_floor, 1)
        times = joint.normal_matrix(data, at, free_floor, number(3, 2))
        turned = times(joint.descent(data, at))
        assert turned.device.type == "cuda"
        assert data.outwards(turned).shape == (3, 2, 30)


def test_the_reduction_runs_on_fake_cuda_tensors():
    with fake_cuda():
        gradient = torch.rand(3, 20, 50, device="cuda")
        projection = reduction.project_on_largest_row(gradient)
        direction, s = reduction.power_step(gradient, projection.s)
        noise = reduction.rank_one_residual(gradient, projection.row_norms, direction)
        for tensor in (*projection, direction, s, *noise):
            assert tensor.device.type == "cuda"


def test_the_published_loss_runs_on_fake_cuda_tensors():
    with fake_cuda():
        gradient, weight = torch.rand(3, 20, 50, device="cuda"), torch.rand(20, 50, device="cuda")
        loss_curve, scaled = published.make_curve(gradient, weight, None, 1)
        lam = torch.rand(3, 2, dtype=torch.float64, device="cuda")
        loss, slope = published.variance_loss_and_slope(loss_curve, lam)
        state, moved = published.secant_update(published.start_secant(lam), loss, slope, lam > 0)
        for tensor in (scaled, loss, slope, *state, moved):
            assert tensor.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answer(case):
    for label_format in ("hard", "smoothing", "mixup", "smoothed_mixup"):
        c = case(100, 256, label_format, dtype=torch.float32)
        here = recover_soft_labels(c.weight_gradient[None], c.weight)
        there = recover_soft_labels(c.weight_gradient[None].cuda(), c.weight.cuda())
        assert there.soft_labels.device.type == "cuda"
        assert torch.allclose(here.soft_labels, there.soft_labels.cpu(), atol=1e-3)
