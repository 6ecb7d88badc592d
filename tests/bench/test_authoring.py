"""`leakbench new`: what it writes passes as it is, and is what the registry and the style ask for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.registry import attacks, defenses

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_what_is_written_passes_its_test_out_of_the_box(leakbench, tmp_path, kind):
    code, out, _ = leakbench("new", kind, "my_own")
    assert code == 0
    assert "my_own.py and test_my_own.py" in out
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_own.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"\d passed", ended.stdout)


@pytest.mark.parametrize("kind", [attacks, defenses])
def test_what_is_written_can_be_named_with_its_parameters(leakbench, tmp_path, kind):
    leakbench("new", kind.kind, "my_own2")
    spec = kind.canonical("my_own2.py:MyOwn2")
    assert re.fullmatch(r"my_own2\.py:MyOwn2\(\w+=[\d.]+\)", spec)


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_what_is_written_is_in_the_houses_style(leakbench, tmp_path, kind):
    leakbench("new", kind, "my_own")
    for command in (["check"], ["format", "--check"]):
        options = ["--config", str(ROOT / "pyproject.toml")]
        # Tests need no docstrings; out here ruff can't know which imports are the suite's own.
        files = ["my_own.py"] if command == ["check"] else ["my_own.py", "test_my_own.py"]
        options += ["--ignore", "I001"] if command == ["check"] else []
        ruff = subprocess.run([sys.executable, "-m", "ruff", *command, *options, *files], capture_output=True)
        assert ruff.returncode == 0, ruff.stdout.decode()


def test_the_attack_is_on_the_local_board(leakbench, small):
    leakbench("new", "attack", "my_own")
    code, out, _ = leakbench(
        "run", small, "--workers", 0, "--attack", "my_own.py:MyOwn", "--samples", 2, "--quiet"
    )
    assert code == 0
    assert "my_own.py:MyOwn" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("atack my_own", "a new 'atack' can't be made; did you mean attack?"),
        ("attack idlg", "the name 'idlg' is taken by another attack"),
        ("defense mixup", "the name 'mixup' is taken by another defense"),
        ("attack My-Own", "'My-Own' is no name: lower-case letters"),
        ("attack ../my_own", "is no name"),
        ("attack class", "is no name"),
        ("attack attack", "a class can't be named Attack"),
        ("defense client", "a class can't be named Client"),
    ],
)
def test_a_wrong_name_is_one_line(leakbench, tmp_path, arguments, said):
    code, _, err = leakbench("new", *arguments.split())
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_left_as_it_is(leakbench, tmp_path):
    (tmp_path / "test_my_own.py").write_text("mine")
    code, _, err = leakbench("new", "attack", "my_own")
    assert code == 1
    assert "test_my_own.py is there already" in err
    assert [path.name for path in tmp_path.iterdir()] == ["test_my_own.py"]
