"""What all tests share: caches of their own, and a mode in which forgetting a device fails."""

import inspect

import pytest
import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace,
    torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


class DeviceDiscipline(TorchFunctionMode):
    """Fails where a factory is called without `device=`: such a tensor would stay behind on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FACTORIES and "device" not in kwargs:
            caller = next(f for f in inspect.stack()[1:] if "/torch/" not in f.filename)
            if "site-packages" not in caller.filename:
                raise AssertionError(
                    f"{caller.filename}:{caller.lineno}: {function.__name__} without device="
                )
        return function(*args, **kwargs)


@pytest.fixture
def device_discipline():
    return DeviceDiscipline()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's caches, but for LPIPS's network, which isn't ours to download."""
    from bench.cache import lpips_trunk_file

    trunk = lpips_trunk_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("LEAKBENCH_DATA", raising=False)
        if trunk.exists():
            lpips_trunk_file().parent.mkdir(parents=True)
            lpips_trunk_file().symlink_to(trunk)
        yield


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
