"""What the tests of image attacks share: an observation of a given batch, and a watch on factory calls."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bench.threat import Facts, Knowledge, Observation

FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor),
    *(torch.arange, torch.linspace, torch.rand, torch.randn, torch.randint, torch.randperm),
}


class EveryFactoryNamesItsDevice(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in FACTORIES or kwargs.get("device") is not None, f"{func.__name__} without device="
        return func(*args, **kwargs)


@pytest.fixture
def every_factory_names_its_device():
    return EveryFactoryNamesItsDevice()


@pytest.fixture
def observe():
    def observation(model, images, soft_labels, knowledge=None):
        """The gradient of the mean soft cross-entropy on a model whose head is called `head`."""
        loss = -(soft_labels * torch.log_softmax(model(images), dim=1)).sum(dim=1).mean()
        names, parameters = zip(*model.named_parameters(), strict=True)
        update = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        head = model.get_submodule("head")
        facts = Facts(
            batch_size=len(images),
            num_classes=head.out_features,
            image_shape=tuple(images.shape[1:]),
            feature_width=head.in_features,
            head_bias=head.bias is not None,
            nonnegative_features=False,
        )
        return Observation(model, update, "head", facts, knowledge or Knowledge())

    return observation


@pytest.fixture
def is_left_as_it_was():
    """Gives a function that notes a model's state, and returns one that checks it."""

    def note(model):
        modes = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}

        def check():
            assert [module.training for module in model.modules()] == modes
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
            assert all(p.grad is None and p.requires_grad for p in model.parameters())
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            return True

        return check

    return note


@pytest.fixture
def smooth_picture():
    """(1, 3, 8, 8) in [0, 1]: a dark and a bright half, each on a slope."""
    across, down = torch.linspace(0, 1, 8), torch.linspace(0, 1, 8)[:, None]
    picture = 0.3 * across + 0.2 * down + 0.4 * (across > down)
    return torch.stack([picture.roll(2 * channel, 1) for channel in range(3)])[None]


@pytest.fixture
def small_net():
    def net(activation=None, batch_norm=False, seed=0):
        """One convolution and a head of 4 classes, on (3, 8, 8)."""
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, 8, 3, padding=1),
                between=nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
                activation=activation or nn.Sigmoid(),
                flatten=nn.Flatten(),
                head=nn.Linear(8 * 8 * 8, 4, bias=False),
            )
        )

    return net
