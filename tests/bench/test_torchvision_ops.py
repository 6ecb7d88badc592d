"""torchvision and lpips can be imported beside any build of torch."""

import subprocess
import sys


def test_torchvision_and_lpips_import_after_the_operators_are_ensured():
    program = (
        "from bench.torchvision_ops import ensure_importable\n"
        "ensure_importable(); ensure_importable()\n"
        "import torchvision, lpips, torch\n"
        "model = torchvision.models.resnet18(weights=None).eval()\n"
        "print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 1000)", done.stderr


def test_an_extension_that_loads_is_left_alone(tmp_path, monkeypatch):
    from bench import torchvision_ops

    loaded, declared = [], []
    for suffix in torchvision_ops.importlib.machinery.EXTENSION_SUFFIXES:
        (tmp_path / f"_C{suffix}").touch()
    (tmp_path / "__init__.py").touch()
    spec = torchvision_ops.importlib.machinery.ModuleSpec(
        "torchvision", None, origin=str(tmp_path / "__init__.py")
    )
    monkeypatch.setattr(torchvision_ops.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torchvision_ops.torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torchvision_ops, "_declare_operators", declared.append)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    torchvision_ops.ensure_importable.__wrapped__()
    assert (len(loaded), declared) == (1, [])
