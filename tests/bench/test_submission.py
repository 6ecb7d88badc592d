"""`leakbench submit`: an attack from a file on a grid; whatever it does ends in a row, or in one line."""

import json
import sys
from pathlib import Path

import pytest

from bench import sandbox, submission
from bench.errors import UserError
from bench.registry import Spec
from bench.report import record

GRID = """
name = "tiny"
seed = 3
time_limit = 5.0
memory_limit = 1.5

[[blocks]]
dataset = "mnist5k"
model = "fcn(depth=2, width=24, bias=False)"
attacks = ["idlg", "random_labels"]
samples = 10
"""

HOSTILE = '''
import os, sys, time
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.threat import Attack, Outcome, Reconstruction


@dataclass(frozen=True)
class Hostile(Attack):
    """Does what `how` says."""

    name: ClassVar[str] = "hostile"
    title: ClassVar[str] = "<script>alert(1)</script>"
    produces: ClassVar[frozenset] = frozenset({"soft_labels"})
    reads: ClassVar[str] = "head"

    mild: bool = False

    def run(self, observation, rng):
        label = torch.eye(10)[:1]
        seen = int(observation.head_weight_gradient.norm(dim=1).argmax())  # one behaviour for each class
        if self.mild or seen == 0:
            return Reconstruction(Outcome.OK, soft_labels=label)
        if seen == 1:
            raise RuntimeError("no idea\\nat all")
        if seen == 2:
            os._exit(1)
        if seen == 3:
            time.sleep(1000)
        if seen == 4:
            label = label * float("nan")
        if seen == 5:
            label = torch.eye(10)
        if seen == 6:
            return {"soft_labels": label}
        if seen == 7:
            label = torch.ones(10 * 2**30 // 4, device="cpu")[:10][None]
        if seen == 8:
            sys.exit(0)
        if seen == 9:
            from bench.cases.data import load

            label = load("mnist5k").soft_labels([0])
        return Reconstruction(Outcome.OK, soft_labels=label)
'''

NOT_AN_ATTACK = """
from dataclasses import dataclass
from typing import ClassVar

from bench.threat import Attack, Defense, Outcome, Reconstruction


@dataclass(frozen=True)
class Honest(Attack):
    name: ClassVar[str] = "honest"
    title: ClassVar[str] = "honest"
    produces: ClassVar[frozenset] = frozenset({"soft_labels"})

    def run(self, observation, rng):
        return Reconstruction(Outcome.UNIDENTIFIABLE)


@dataclass(frozen=True)
class Idlg(Honest):
    name: ClassVar[str] = "idlg"


@dataclass(frozen=True)
class Escapes(Honest):
    name: ClassVar[str] = "../../escapes"


@dataclass(frozen=True)
class Greedy(Honest):
    name: ClassVar[str] = "greedy"
    uses: ClassVar[frozenset] = frozenset({"private_images"})


@dataclass(frozen=True)
class SkipFails(Honest):
    name: ClassVar[str] = "skip_fails"

    def skip(self, facts):
        return facts.truth


@dataclass(frozen=True)
class Defends(Defense):
    name: ClassVar[str] = "defends"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(GRID)
    (tmp_path / "hostile.py").write_text(HOSTILE)
    (tmp_path / "not_an_attack.py").write_text(NOT_AN_ATTACK)
    return tmp_path / "tiny.toml"


@pytest.fixture
def submit(leakbench, tiny):
    def submit(attack: str, *more: object) -> tuple[int, str, str]:
        return leakbench("submit", attack, "--grid", tiny, "--workers", 1, "--quiet", *more)

    return submit


def test_a_new_attack_is_submitted_with_all_that_a_pull_request_needs(leakbench, submit, tmp_path):
    leakbench("new", "attack", "my_own")
    code, out, err = submit("my_own.py:MyOwn(smoothing=0.1)")
    assert (code, err) == (0, "")
    written = Path("results/records/tiny/my_own-smoothing=0.1/r1.jsonl")
    assert f"Records: {written}" in out
    assert "attacks/labels/my_own.py" in out
    assert "random_labels" in out  # chance stands beside it
    ran = record.read(written)
    assert len(ran.rows) == 10
    assert {row["attack"] for row in ran.rows} == {"my_own(smoothing=0.1)"}
    assert {(row["isolated"], row["outcome"], row["attack_revision"]) for row in ran.rows} == {
        (True, "ok", "1")
    }
    manifest = json.loads(written.with_suffix(".json").read_text())
    assert manifest.keys() >= {
        "attack", "revision", "code_sha256", "torch", "leakbench", "device", "seed", "weight_seeds",
        "threat_model", "knowledge", "uses", "grid_hash", "protocol_version",
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(manifest | {"grid_file": ""})

    # Recorded ones of the same grid stand beside the next; a part of a submission says that it is one.
    code, out, _ = submit("my_own.py:MyOwn", "--samples", 2)
    assert code == 0
    assert "my_own(smoothing=0.1)" in out
    assert "at most 2 samples a cell: ranking needs all of them" in out
    part = record.read(Path("results/records/tiny/my_own/r1.jsonl"))
    assert len(part.rows) == 2
    assert set(part.expected.values()) == {10}


def test_a_hostile_attack_ends_in_rows_that_say_so_and_do_not_score(submit):
    code, _, err = submit("hostile.py:Hostile")
    rows = record.read(Path("results/records/tiny/hostile/r1.jsonl")).rows
    assert len(rows) == 10
    assert [(row["outcome"], row["success"]) for row in rows if row["success"]] in ([], [("ok", True)])
    found = {(row["outcome"], row["reason"][:45]) for row in rows}
    assert found - {("ok", "")} == {
        ("crashed", "RuntimeError: no idea at all"),
        ("crashed", "the attack's process died"),
        ("timeout", "stopped after 5 s"),
        ("diverged", "soft_labels is not finite"),
        ("crashed", "ValueError: returned soft_labels of shape (10"),
        ("crashed", "TypeError: run returned dict, not a Reconstru"),
        ("crashed", "SystemExit: 0"),
        ("crashed", "ImportError: mlxtend brings data, which attac"),
        *((one["outcome"], one["reason"][:45]) for one in rows if one["outcome"] == "out_of_memory"),
    }
    assert "out_of_memory" in {row["outcome"] for row in rows}
    assert code == 3
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("nowhere.py:Mine", "nowhere.py is not there; give FILE.py:CLASS"),
        ("idlg", "'idlg' can't be submitted; give FILE.py:CLASS, as in my_attack.py:MyAttack"),
        ("hostile.py:Gone", "has no class 'Gone'"),
        ("not_an_attack.py:Defends", "it lacks the class variable 'produces'"),
        ("not_an_attack.py:Idlg", "the name 'idlg' is taken by another attack"),
        ("not_an_attack.py:Escapes", "name = '../../escapes' is no name"),
        ("not_an_attack.py:Greedy", "uses 'private_images'; known: "),
        ("not_an_attack.py:SkipFails", "AttributeError: 'Facts' object has no attribute 'truth'"),
    ],
)
def test_what_is_no_attack_is_refused_in_one_line(submit, attack, said):
    code, _, err = submit(attack)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert not Path("results").exists()


SAID = {
    "spec": "x.py:Mine", "short": "x.py:Mine", "name": "mine", "title": "Mine", "revision": "2@0123456789ab",
    "paper": "", "threat_model": "A", "produces": ["soft_labels"], "reads": "head", "uses": [], "skips": [],
    "stacks": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Mine"}, {"produces": ["money"]}, {"produces": []}, {"reads": "minds"}, {"uses": ["truth"]},
        {"threat_model": "Z"}, {"revision": "-1"}, {"revision": {}}, {"skips": [None]}, {"skips": None},
        {"produces": None}, {"spec": "(("},
    ],
)  # fmt: skip
def test_a_description_is_believed_as_far_as_an_attack_may_say_it(tmp_path, monkeypatch, change):
    (tmp_path / "x.py").write_text("")
    monkeypatch.setattr(sandbox, "described", lambda *_: SAID | change)
    with pytest.raises(UserError):
        submission.ask(tmp_path / "x.py", Spec("Mine", {}), "x.py", [])


def test_the_codes_digest_is_no_part_of_the_revision(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text("")
    monkeypatch.setattr(sandbox, "described", lambda *_: SAID)
    mine, _ = submission.ask(tmp_path / "x.py", Spec("Mine", {}), "x.py", [])
    assert (mine.spec, mine.revision, mine.grid) == ("mine", "2", "labels-v1")


def test_a_file_that_does_not_end_its_import_is_refused(submit, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("while True: pass")
    monkeypatch.setattr(sandbox, "DESCRIBE_SECONDS", 2.0)
    code, _, err = submit("slow.py:Slow")
    assert code == 1
    assert "slow.py:Slow: takes more than 2 s to be imported" in err


def test_the_code_is_never_imported_where_rows_are_judged(submit, tmp_path):
    marker = tmp_path / "imported_by"
    source = HOSTILE + f"\ntry:\n    open({str(marker)!r}, 'a').write('x')\nexcept OSError:\n    pass\n"
    (tmp_path / "marks.py").write_text(source)
    assert submit("marks.py:Hostile(mild=True)", "--samples", 1)[0] == 0
    assert not marker.exists() or not sandbox.is_tight()
    assert not [name for name in sys.modules if name.endswith("_marks")]


def test_an_edited_file_is_run_anew(submit, tmp_path):
    submit("hostile.py:Hostile(mild=True)", "--samples", 1)
    (tmp_path / "hostile.py").write_text(HOSTILE.replace("eye(10)[:1]", "eye(10)[9:]"))
    submit("hostile.py:Hostile(mild=True)", "--samples", 1)
    assert len(list(Path("runs/submissions").iterdir())) == 2
