"""Models, their weights, and what their architecture makes public.

A model's first step is normalisation, so that pixels stay in [0, 1] and comparable; its last linear
layer is the head. Weights are untrained (drawn from a NumPy seed) or trained once and cached.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cache import cache_folder
from bench.cases.data import Dataset
from bench.errors import UserError, nearest
from bench.registry import Spec, arguments, parse
from bench.threat import Batch, Defense
from bench.torchvision_ops import ensure_importable

Shape = tuple[int, int, int]
Activation = Literal["relu", "leaky_relu", "sigmoid", "tanh"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}

EPOCHS_TRAINED = 20
"""What the state `trained` stands for: a fixed number, so that no one stops where it suits them."""

RECIPE = 1
"""Raised when training changes: part of a checkpoint's key."""

RECIPE_OF_DEFENDED = 2
"""The same, of architectures that a defense changed: 2 trains with the defense's own loss."""


class Normalize(nn.Module):
    """Pixels in [0, 1] -> zero mean and unit variance on natural images: the model's first step."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean, std = (
            ((0.1307,), (0.3081,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        self.register_buffer("mean", torch.tensor(mean, device="cpu")[:, None, None])
        self.register_buffer("std", torch.tensor(std, device="cpu")[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> the same shape, normalised."""
        return (images - self.mean) / self.std


def fcn(
    image_shape: Shape,
    num_classes: int,
    *,
    depth: int = 3,
    width: int = 256,
    activation: Activation = "relu",
    bias: bool = True,
) -> nn.Module:
    """A fully connected net of `depth` linear layers; `bias` is that of every layer."""
    if depth < 1 or width < 1:
        raise ValueError(f"depth={depth}, width={width} are not at least 1")
    layers: list[tuple[str, nn.Module]] = [
        ("normalize", Normalize(image_shape[0])),
        ("flatten", nn.Flatten()),
    ]
    inputs = int(np.prod(image_shape))
    for index in range(1, depth):
        layers += [
            (f"linear{index}", nn.Linear(inputs, width, bias=bias)),
            (f"activation{index}", ACTIVATIONS[activation]()),
        ]
        inputs = width
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(inputs, num_classes, bias=bias))]))


def lenet(
    image_shape: Shape,
    num_classes: int,
    *,
    activation: Activation = "sigmoid",
    bias: bool = True,
    init: Literal["uniform", "default"] = "uniform",
) -> nn.Module:
    """DLG's LeNet (Zhu et al. 2019); `bias` is the head's.

    `init`: every parameter from U(-.5, .5) as that literature draws them, or PyTorch's default.
    """
    channels, height, width = image_shape
    if min(height, width) < 5:
        raise ValueError(f"lenet needs images of at least 5 × 5, got {height} × {width}")
    net = nn.Sequential(
        OrderedDict(
            normalize=Normalize(channels),
            conv1=nn.Conv2d(channels, 12, 5, stride=2, padding=2),
            activation1=ACTIVATIONS[activation](),
            conv2=nn.Conv2d(12, 12, 5, stride=2, padding=2),
            activation2=ACTIVATIONS[activation](),
            conv3=nn.Conv2d(12, 12, 5, stride=1, padding=2),
            activation3=ACTIVATIONS[activation](),
            flatten=nn.Flatten(),
            head=nn.Linear(12 * -(-height // 4) * -(-width // 4), num_classes, bias=bias),
        )
    )
    net.initialisation = init  # type: ignore[assignment]  # read by `draw`
    return net


def convnet(
    image_shape: Shape,
    num_classes: int,
    *,
    width: int = 16,
    activation: Activation = "relu",
    bias: bool = True,
) -> nn.Module:
    """Three 3 × 3 convolutions (strides 1, 2, 2) and a head on the flattened map; `bias` is the head's."""
    if width < 1:
        raise ValueError(f"width={width} is not at least 1")
    channels, height, columns = image_shape
    return nn.Sequential(
        OrderedDict(
            normalize=Normalize(channels),
            conv1=nn.Conv2d(channels, width, 3, stride=1, padding=1),
            activation1=ACTIVATIONS[activation](),
            conv2=nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            activation2=ACTIVATIONS[activation](),
            conv3=nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            activation3=ACTIVATIONS[activation](),
            flatten=nn.Flatten(),
            head=nn.Linear(2 * width * -(-height // 4) * -(-columns // 4), num_classes, bias=bias),
        )
    )


def resnet18(
    image_shape: Shape,
    num_classes: int,
    *,
    bias: bool = True,
    stem: Literal["cifar", "imagenet"] = "cifar",
) -> nn.Module:
    """ResNet-18 as torchvision has it; `bias` is the head's; the CIFAR stem is one 3 × 3 convolution."""
    ensure_importable()
    import torchvision

    channels = image_shape[0]
    net = torchvision.models.resnet18(num_classes=num_classes)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    net.fc = nn.Linear(net.fc.in_features, num_classes, bias=bias)
    whole = nn.Sequential(OrderedDict(normalize=Normalize(channels), net=net))
    whole.initialisation = "fan_out"  # type: ignore[assignment]
    return whole


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (fcn, lenet, convnet, resnet18)
}


def canonical(spec: str) -> str:
    """The spec with all defaults filled in.

    Raises:
        UserError: an unknown model or parameter.
    """
    parsed = parse(spec)
    builder = _builder(parsed.target)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
    return str(Spec(parsed.target, defaults | _arguments(builder, parsed)))


def _builder(target: str) -> Callable[..., nn.Module]:
    if target in BUILDERS:
        return BUILDERS[target]
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise UserError(f"no model is named {target!r}{nearest(target, BUILDERS)} or MODULE:CALLABLE")
    module, _, name = target.partition(":")
    ensure_importable()
    try:
        builder = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module raises while it is imported
        raise UserError(
            f"model {target}: {error}; give MODULE:CALLABLE that can be imported from here"
        ) from None
    try:
        inspect.signature(builder, eval_str=True)
    except Exception as error:
        raise UserError(f"model {target} is no callable whose parameters can be read: {error}") from None
    return builder


def _arguments(builder: Callable[..., nn.Module], spec: Spec) -> dict[str, Any]:
    parameters = inspect.signature(builder, eval_str=True).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return spec.parameters
    known = {
        p.name: Any if p.annotation is p.empty else p.annotation
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return arguments(spec, known)


def build(spec: str, image_shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """A model on the CPU in eval mode, its weights drawn from a NumPy seed.

    `module:callable` is called as `callable(image_shape, num_classes, **parameters)`; it keeps the
    weights it draws itself (under a seeded torch generator).

    Raises:
        UserError: an unknown model, a parameter out of range, or a model without a linear head.
    """
    parsed = parse(spec)
    builder = _builder(parsed.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = builder(image_shape, num_classes, **_arguments(builder, parsed))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model {spec}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {spec} gave {type(model).__name__}, not a torch.nn.Module")
    if parsed.target in BUILDERS:
        draw(model, np.random.default_rng(seed))
    _check_head(model.eval(), spec, image_shape, num_classes)
    return model


@torch.no_grad()
def _check_head(model: nn.Module, spec: str, image_shape: Shape, num_classes: int) -> None:
    """That the head's outputs are the model's: softmax comes right after it."""
    given: list[Tensor] = []
    hook = model.get_submodule(find_head(model)).register_forward_hook(
        lambda *called: given.append(called[2])
    )
    image = torch.rand(1, *image_shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    try:
        logits = model(image)
    except Exception as error:
        raise UserError(
            f"model {spec}, on an image {image_shape}: {type(error).__name__}: {error}"
        ) from error
    finally:
        hook.remove()
    if logits.shape != (1, num_classes) or not given or not torch.equal(given[-1], logits):
        raise UserError(f"model {spec} does not end in its last linear layer; a model needs a linear head")


@torch.no_grad()
def draw(model: nn.Module, rng: np.random.Generator) -> None:
    """Draws the weights of linear and convolutional layers: the same numbers wherever NumPy runs.

    By default U(±1/√fan_in), PyTorch's own distribution; `fan_out`: N(0, 2/fan_out) for convolutions
    (torchvision's ResNets); `uniform`: U(-.5, .5) for every parameter (DLG's LeNet).
    """
    scheme = getattr(model, "initialisation", "default")
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight
        for parameter in module.parameters(recurse=False):
            if scheme == "fan_out" and isinstance(module, nn.Conv2d):
                fan_out = weight.shape[0] * weight[0, 0].numel()
                drawn = rng.normal(0, np.sqrt(2 / fan_out), size=tuple(parameter.shape))
            else:
                bound = 0.5 if scheme == "uniform" else 1 / np.sqrt(weight[0].numel())
                drawn = rng.uniform(-bound, bound, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn))


def find_head(model: nn.Module) -> str:
    """The name of the last linear layer.

    Raises:
        UserError: there is none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layer; a model needs a linear head")
    return linear[-1]


NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus, nn.Hardsigmoid, nn.Softmax)
SIGN_KEEPING = (
    nn.Flatten,
    nn.Dropout,
    nn.Identity,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
)


def nonnegative_features(model: nn.Module, head: str, image_shape: Shape) -> bool:
    """Whether the head's input can't be negative: by the last module before it that can change a sign.

    An activation that is called as a function isn't seen; then the answer is a cautious False.
    """
    called: list[nn.Module] = []
    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_pre_hook(lambda module, _: called.append(module)) for leaf in leaves]
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *image_shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()
    before = called[: called.index(model.get_submodule(head))]
    deciding = [module for module in before if not isinstance(module, SIGN_KEEPING)]
    return bool(deciding) and isinstance(deciding[-1], NONNEGATIVE)


def sha256(model: nn.Module) -> str:
    """Over the names and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def epochs(state: str) -> int:
    """`untrained`, `epochs=N`, `trained` -> how many epochs.

    Raises:
        UserError: another text.
    """
    if state in ("untrained", "trained"):
        return EPOCHS_TRAINED if state == "trained" else 0
    match = re.fullmatch(r"epochs=(\d{1,4})", state)
    if match is None:
        raise UserError(f"weights {state!r} are not known; give untrained, epochs=N or trained")
    return int(match[1])


COMMITTED = Path(__file__).resolve().parents[2] / "results" / "weights"
"""The trained weights of frozen grids."""


@dataclass(frozen=True)
class Network:
    """What identifies a set of weights, and hence its checkpoint."""

    model: str
    dataset: str
    data_sha256: str
    weights: str
    weight_seed: int
    defense: str = "none"

    @property
    def key(self) -> str:
        """The checkpoint's file name."""
        recipe = RECIPE if self.defense == "none" else RECIPE_OF_DEFENDED
        return hashlib.sha256(json.dumps([recipe, asdict(self)]).encode()).hexdigest()[:24]


def network(wanted: Network, dataset: Dataset, defense: Defense) -> nn.Module:
    """The model on the CPU in eval mode, trained if need be (once: it is cached, beside what made it).

    Weights that are committed with the suite come before those: training differs from machine to machine.
    `defense` may change the architecture (`prepare`), before training.
    """
    model = build(wanted.model, dataset.image_shape, dataset.num_classes, wanted.weight_seed)
    model = defense.prepare(model, torch.Generator(device="cpu").manual_seed(wanted.weight_seed))
    count = epochs(wanted.weights)
    if count == 0 or _load(model, COMMITTED / f"{wanted.key}.safetensors"):
        return model.eval()
    path = cache_folder() / "weights" / f"{wanted.key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        if not _load(model, path):
            own = defense if "prepare" in defense.stages() else None
            report = asdict(wanted) | train(model, dataset, count, wanted.weight_seed, own)
            _write(path, safetensors.torch.save(model.state_dict()))
            _write(path.with_suffix(".json"), json.dumps(report, indent=2).encode())
    return model.eval()


def is_cached(wanted: Network) -> bool:
    """Whether nothing has to be trained."""
    records = (folder / f"{wanted.key}.json" for folder in (COMMITTED, cache_folder() / "weights"))
    return epochs(wanted.weights) == 0 or any(record.exists() for record in records)  # written last


def _load(model: nn.Module, path: Path) -> bool:
    """Whether a whole checkpoint was there, as its record has it; a damaged one is made again."""
    loaded = copy.deepcopy(model)
    try:
        loaded.load_state_dict(safetensors.torch.load_file(path))
        whole = sha256(loaded) == json.loads(path.with_suffix(".json").read_bytes())["sha256"]
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, KeyError):
        return False
    if whole:
        model.load_state_dict(loaded.state_dict())
    return whole


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order: training gives the same weights however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    model: nn.Module, dataset: Dataset, count: int, seed: int, defense: Defense | None = None
) -> dict[str, Any]:
    """Adam on hard labels for `count` epochs, in place; returns what the checkpoint's record says.

    A defense that changed the architecture gives the gradient, since its loss may be another one (PRECODE's
    has a divergence). Deterministic on one machine: the order comes from a NumPy seed, sums from one thread.
    """
    started = time.monotonic()
    training = dataset.training_indices()
    images, labels = dataset.pixels(training, torch.device("cpu")), dataset.labels[training]
    held_out = dataset.held_out
    order = np.random.default_rng(seed)
    soft_labels, rng = F.one_hot(labels, dataset.num_classes).float(), torch.Generator(device="cpu")
    rng.manual_seed(seed)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(count):
            for chosen in torch.from_numpy(order.permutation(len(labels))).split(64):
                optimizer.zero_grad()
                if defense is None:
                    F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                else:
                    _defended_backward(model, defense, Batch(images[chosen], soft_labels[chosen]), rng)
                optimizer.step()
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
        train_accuracy, _ = _accuracy(model, images, labels)
        accuracy, confidence = _accuracy(
            model, dataset.pixels(held_out, torch.device("cpu")), dataset.labels[held_out]
        )
    return {
        "accuracy": accuracy,
        "mean_confidence": confidence,
        "training_accuracy": train_accuracy,
        "training_examples": len(labels),
        "epochs": count,
        "seconds": time.monotonic() - started,
        "torch": torch.__version__,
        "sha256": sha256(model),
    }


def _defended_backward(model: nn.Module, defense: Defense, batch: Batch, rng: torch.Generator) -> None:
    """Leaves the defense's gradient of the batch in the parameters' `grad`."""
    from bench.cases.client import FedSGDClient  # it imports this module

    gradient = defense.gradient(FedSGDClient(model), batch, rng)
    for name, parameter in model.named_parameters():
        parameter.grad = gradient.get(name)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy, mean of the largest probability)."""
    p = torch.cat([model(part).softmax(1) for part in images.split(256)])
    return (p.argmax(1) == labels).double().mean().item(), p.max(1).values.double().mean().item()
