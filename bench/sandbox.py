"""A sandbox for an attack's process: `python -m bench.sandbox [HIDDEN…] FD`.

Where Linux' namespaces are to be had, the process has no network, sees no other process, writes nowhere but
into memory, and finds data sets (those that packages bring, and HIDDEN) empty. Elsewhere Python's own hooks
refuse network and data sets: enough against a look, not against a burglar; `is_tight` tells which it is.
Nothing here imports torch before the doors are closed: only a process of one thread can enter a namespace.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.abc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

BUNDLED = (
    "mlxtend/data", "foolbox", "skimage/data", "sklearn/datasets/data", "sklearn/datasets/images",
    "matplotlib/mpl-data/sample_data",
)  # fmt: skip
"""What packages bring along: hidden from every attack."""

CACHES = (
    "~/.local/share/leakbench", "~/.cache/huggingface", "~/.cache/torch", "~/.cache/kagglehub", "~/.keras",
    "~/scikit_learn_data", "~/tensorflow_datasets", "~/.cache/pip", "~/.cache/uv", "~/.cache/scikit-image",
)  # fmt: skip
"""Where tools keep data sets of a user: hidden, too."""

UNIMPORTABLE = ("mlxtend", "foolbox", "skimage.data", "sklearn.datasets", "datasets", "tensorflow_datasets")

KEPT_ENVIRONMENT = (
    "PATH", "PYTHONPATH", "PYTHONHASHSEED", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

DESCRIBE_SECONDS = 60.0
"""How long an attack's file may take to be imported and asked what it needs."""

DESCRIBE_BYTES = 4 * 2**30
"""How much memory it may take for that."""

# From Linux' headers.
_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_READ_ONLY, _NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _MOUNT_ATTR_READ_ONLY = 442, 0x8000, 1
_DIE_WITH_PARENT, _DROP_BOUNDING, _SECURE_BITS, _NO_NEW_PRIVILEGES = 1, 24, 28, 38


def places(hidden: Sequence[str]) -> list[str]:
    """All that is to be hidden and is there."""
    found = []
    for entry in BUNDLED:
        package, *inside = entry.split("/")
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            found.append(Path(spec.origin).parent.joinpath(*inside))
    found += [Path(place).expanduser() for place in (*CACHES, *hidden)]
    return [str(place.resolve()) for place in found if place.exists()]


@functools.cache
def is_tight() -> bool:
    """Whether this machine has the namespaces that close a sandbox off; tried once."""
    command = [sys.executable, "-m", "bench.sandbox", "--probe"]
    tried = subprocess.run(command, env=_environment(), capture_output=True, timeout=60, check=False)
    return tried.stdout == b"tight\n"


def described(code: str, facts: Sequence[Any], hidden: Sequence[str]) -> dict[str, Any]:
    """What an attack says of itself and of each of the `facts`, asked in a sandbox; nothing is checked yet.

    Raises:
        ValueError: it can't be imported or made, or takes too long; the text is one line.
    """
    asked = [asdict(one) | {"granted": sorted(one.granted)} for one in facts]
    command = [sys.executable, "-m", "bench.sandbox", *hidden, "--describe"]
    try:
        ended = subprocess.run(
            command,
            input=json.dumps([code, asked]).encode(),
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=DESCRIBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"takes more than {DESCRIBE_SECONDS:g} s to be imported") from None
    try:
        answer = json.loads(ended.stdout)
    except ValueError:
        raise ValueError("ends its process while it is imported or asked what it needs") from None
    if not isinstance(answer, dict) or "error" in answer:
        raise ValueError(str(answer["error"] if isinstance(answer, dict) else answer)[:500])
    return answer


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# --- inside -----------------------------------------------------------------------------------------------


def _enter(hidden: Sequence[str]) -> None:
    """Closes this process off; returns in a child of it, the first in its own process namespace.

    Raises:
        OSError: this machine doesn't allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _checked(libc.unshare(_NAMESPACES))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:  # whoever waits for this process is to see the signal
            os.kill(os.getpid(), -code)
        os._exit(code & 0xFF)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)

    def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        encoded = [None if text is None else text.encode() for text in (source, target, kind)]
        _checked(libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()))

    mount("none", "/", None, _RECURSIVE | _PRIVATE)
    mount("proc", "/proc", "proc", _NO_SUID | _NO_DEVICES)
    for place in hidden:
        if Path(place).is_dir():
            mount("none", place, "tmpfs", _READ_ONLY | _NO_SUID | _NO_DEVICES, "size=4k")
        else:
            mount("/dev/null", place, None, _BIND)
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_READ_ONLY, 0, 0, 0)
    _checked(
        libc.syscall(
            _SYS_MOUNT_SETATTR, -1, b"/", _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
        )
    )
    mount("none", "/dev/shm", "tmpfs", _NO_SUID | _NO_DEVICES, "size=1g,mode=1777")
    for capability in range(64):
        libc.prctl(_DROP_BOUNDING, capability)
    libc.prctl(_SECURE_BITS, 0b1111)  # also whoever is root here has no power after exec
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _close(arguments: list[str]) -> None:
    """Enters a sandbox and starts over in it, with a clean environment."""
    *given, last = arguments
    hidden = places(given)
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    doors = "--loose"
    if _can_enter(hidden):
        _enter(hidden)
        doors, kept["TMPDIR"] = "--tight", "/dev/shm"
    os.execve(sys.executable, [sys.executable, "-P", "-m", "bench.sandbox", doors, *hidden, last], kept)


def _can_enter(hidden: Sequence[str]) -> bool:
    """Whether `_enter` works here: tried in a child, since there is no way back from halfway."""
    child = os.fork()
    if not child:
        try:
            _enter(hidden)
            os._exit(0)
        except Exception:  # no Linux, or one that is locked down
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status == 0


class _NoData(importlib.abc.MetaPathFinder):
    """Refuses to import data packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if any(name == package or name.startswith(package + ".") for package in UNIMPORTABLE):
            raise ImportError(f"{name} brings data, which attacks can't have")


def _refuse(event: str, arguments: tuple[Any, ...], hidden: Sequence[str]) -> None:
    """An audit hook, for machines on which nothing better is to be had."""
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError("attacks have no network")
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if any(path == place or path.startswith(place + os.sep) for place in hidden):
            raise FileNotFoundError(f"{path} is hidden from attacks")


def _describe() -> None:
    """Answers `described`, on the real standard output: what the attack prints goes nowhere."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (DESCRIBE_BYTES, most))
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    code, asked = json.load(sys.stdin)
    try:
        answer = _description(code, asked)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        named = text if type(error).__name__ == "UserError" else f"{type(error).__name__}: {text}"
        answer = {"error": named}
    answers.write(json.dumps(answer).encode())
    answers.flush()
    os._exit(0)


def _description(code: str, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from bench.registry import attacks
    from bench.threat import Facts

    attack = attacks.make(code)
    granted = [frozenset(one["granted"]) & attack.uses for one in asked]
    facts = [
        Facts(**(one | {"image_shape": tuple(one["image_shape"]), "granted": told}))
        for one, told in zip(asked, granted, strict=True)
    ]
    return {
        "spec": attacks.canonical(code),
        "short": attacks.short(attacks.canonical(code)),
        "name": attack.name,
        "title": getattr(attack, "title", ""),
        "revision": attacks.revision(code),
        "paper": attack.paper,
        "threat_model": attack.threat_model,
        "produces": sorted(attack.produces),
        "reads": attack.reads,
        "uses": sorted(attack.uses),
        "stacks": hasattr(attack, "run_many"),
        "skips": [attack.skip(one) for one in facts],
    }


def _main(arguments: list[str]) -> None:
    if arguments[0] not in ("--tight", "--loose"):
        _close(arguments)
    doors, *hidden, last = arguments
    if last == "--probe":
        print(doors.removeprefix("--"))
        return
    sys.meta_path.insert(0, _NoData())
    if doors == "--loose":
        sys.addaudithook(lambda event, given: _refuse(event, given, hidden))
    if last == "--describe":
        _describe()
    sys.argv = ["bench.isolation", last]
    runpy.run_module("bench.isolation", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
