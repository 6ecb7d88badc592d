"""The reference pages: made of the registry and of published boards, with or without them."""

import dataclasses
import re

import pytest

from bench import publish, reference
from bench.registry import attacks, defenses
from bench.report import record
from bench.report.record import SCENARIO, Header, Record

AXES = {"dataset": "mnist5k", "model": "fcn()", "weights": "untrained", "weight_seed": 0,
        "batch_norm": "eval", "members": "held_out", "batch_size": 1, "classes": "turns",
        "protocol": "fedsgd", "defense": "none"}  # fmt: skip
SMOOTHING = "label_smoothing(epsilon=0.1)"


def trials(attack, right, defense="none", of=10, **given):
    """So many trials, the first of which find the label."""
    axes = AXES | {"defense": defense}
    found = [{"success": n < right, "top1": float(n < right), "private_top1": float(n < right),
              "label_error": float(n >= right), "label_l1": 0.0, "class_existence": 1.0, "class_counts": 1.0,
              "class_counts_exact": 1.0} for n in range(of)]  # fmt: skip
    shared = {"grid": "tiny", "scenario": defense, "knowledge": "", "defense_revision": "1", "outcome": "ok",
              "attack_revision": "1", "reason": "", "weights_sha256": "w"}  # fmt: skip
    return [
        Record(
            trial=f"{attack} {defense} {n}", **(shared | axes | one | {"attack": attack, "sample": n} | given)
        )
        for n, one in enumerate(found)
    ]


@pytest.fixture
def results(tmp_path):
    """Published: iDLG finds hard labels and no smoothed one, and one of ten by chance; ZLG is skipped."""
    rows = [
        *trials("idlg", 10),
        *trials("idlg", 0, SMOOTHING),
        *trials("random_labels", 1),
        *trials("random_labels", 1, SMOOTHING),
        *(
            dataclasses.replace(row, outcome="skipped", reason="needs a reason", success=None)
            for row in trials("zlg(images='noise', count=128)", 0)
        ),
    ]
    cells = {f"{row.scenario} {row.attack}": 10 for row in rows}
    scenarios = {row.scenario: {name: getattr(row, name) for name in SCENARIO} for row in rows}
    with record.writing(tmp_path / "run") as writer:
        writer.header(Header("tiny", "hash", "a test", cells, scenarios))
        writer.rows(rows)
    folder = tmp_path / "results" / "records" / "tiny" / "all"
    folder.mkdir(parents=True)
    (tmp_path / "run" / record.FILE).rename(folder / "r1.jsonl")
    publish.publish(tmp_path / "results")
    return tmp_path / "results"


def entry(page: str, name: str) -> str:
    (found,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def test_every_attack_and_defense_of_the_suite_has_an_entry_without_any_board(unpublished):
    for name, registry in (("attacks.md", attacks), ("defenses.md", defenses)):
        for member in registry.names():
            text = entry(unpublished[name], member)
            assert f"**{registry.find(member).title}".replace("*", "") in text.replace("*", "").replace(
                "\\", ""
            )
            assert "not on a published board yet" in text


def test_an_attacks_entry_says_what_the_boards_say(results):
    pages = reference.pages(results)
    idlg = entry(pages["attacks.md"], "idlg")
    assert "[tiny-label](../results/leaderboards/tiny-label.md)" in idlg
    assert "success 100% [72–100], n = 10: fcn, defense none (hard labels)" in idlg
    assert "success 0% [0–28], n = 10: fcn, defense label_smoothing" in idlg
    line = next(line for line in idlg.splitlines() if "tiny-label" in line)
    assert line.split(" | ")[1:5] == ["`idlg`", "2", "0", "2"]  # first among equals, too
    zlg = next(line for line in entry(pages["attacks.md"], "zlg").splitlines() if "tiny-label" in line)
    assert zlg.split(" | ")[1:5] == ["`zlg`", "1", "1", "0 |"]  # one scenario, skipped there
    assert "not on a published board yet" in entry(pages["attacks.md"], "llg")
    assert reference.pages(results) == pages


def test_a_defenses_entry_says_what_got_past_it(results):
    page = reference.pages(results)["defenses.md"]
    smoothing = entry(page, "label_smoothing")
    assert "Got past it ([tiny-defense](../results/leaderboards/tiny-defense.md))" in smoothing
    assert (
        "| mnist5k, fcn, untrained | label_smoothing | 10% [2–40] | random_labels | 10% | 10% |" in smoothing
    )
    assert "Cost: not measured yet." in smoothing
    assert "not on a published board yet" in entry(page, "mixup")


@pytest.fixture(scope="module")
def unpublished():
    return reference.pages(reference.ROOT / "nowhere")


def test_what_an_attack_needs_is_asked_of_it(unpublished):
    page = unpublished["attacks.md"]
    assert "Needs a batch of one; non-negative features, as after a ReLU." in entry(page, "idlg")
    assert "under FedAvg the client's number of local steps" in entry(page, "ilrg")
    assert "under FedAvg" not in entry(page, "spear")  # which no grant would help there
    assert "Needs nothing" in entry(page, "random_labels")


def test_what_a_class_inherits_is_explained_by_its_base(unpublished):
    labels = entry(unpublished["attacks.md"], "dlg")
    assert "| `labels` | str | `'joint'` | where the labels come from" in labels
    assert "Runs" not in labels


def test_a_class_that_says_nothing_of_itself_has_an_entry_all_the_same(tmp_path):
    (tmp_path / "bare.py").write_text(
        "from dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Bare:\n"
        "    name = 'bare'\n"
        "    title = 'Bare'\n"
        "    produces = frozenset({'images'})\n"
        "    threat_model = 'Z'\n"
        "    share: float = 0.5\n\n"
        "    def run(self, observation, rng):\n"
        "        pass\n"
    )
    text = reference._attack_entry(f"{tmp_path}/bare.py:Bare", "attacks/images/bare.py", [])
    assert "**Bare.**\n\n- Recovers: images." in text
    assert "Z, not known" in text
    assert "| `share` | float | `0.5` |" in text


def test_text_is_no_markup_by_accident():
    assert reference._escaped("min ‖∇L - ∇*‖² of ∇*, x_i and (x)_i, `a*b`") == (
        r"min ‖∇L - ∇\*‖² of ∇\*, x_i and (x)\_i, `a*b`"
    )
    assert reference._escaped("see attacks/solvers/batch.py.") == (
        "see [attacks/solvers/batch.py](../attacks/solvers/batch.py)."
    )


def test_what_is_installed_besides_is_documented_elsewhere(monkeypatch):
    monkeypatch.setattr(attacks, "names", lambda: ["another", "idlg"])
    page = reference.pages(reference.ROOT / "nowhere")["attacks.md"]
    assert "### idlg" in page
    assert "another" not in re.findall(r"^### (\w+)", page, re.MULTILINE)
