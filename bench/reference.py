"""The reference pages, the same bytes every time: `python -m bench.reference`.

`docs/attacks.md` and `docs/defenses.md` have an entry for each attack and defense of the suite, made of what
its class says (docstrings, class variables, parameters, `skip`) and of what the published boards and
`results/defenses/utility.jsonl` hold. `python -m bench.publish` writes them too, after the boards.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import statistics
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import pandas as pd

from bench import registry
from bench.report import defenses as defense_boards
from bench.report import utility
from bench.report.assumptions import KINDEST, assumptions
from bench.report.leaderboard import NETWORK, Track, rows_of, track_named
from bench.report.page import THREAT_MODELS
from bench.report.tables import MEASURES, Names, parsed, phrase, short
from bench.threat import STAGES, Attack, Defense, Knowledge

ROOT = registry.ROOT
COMMAND = "python -m bench.reference"

KINDS = {
    "labels": ("Label attacks", "They recover labels; some recover the last layer's input with them."),
    "images": ("Image attacks", "They recover images; most recover labels first, or with them."),
}
"""The folders of attacks, and what a person reads above their entries."""

READS = {"head": "the last linear layer's gradient alone", "all": "the whole update"}

STAGE_WORDS = {
    "prepare": "changes the architecture, before training",
    "change_batch": "changes the batch, before the loss sees it",
    "gradient": "replaces the gradient",
    "change_update": "changes the update, before it leaves the client",
}


def pages(results: Path) -> dict[str, str]:
    """File name -> content: what is written into `docs`."""
    boards = published(results)
    return {"attacks.md": _attacks_page(boards), "defenses.md": _defenses_page(boards, results)}


def write(results: Path, docs: Path) -> list[Path]:
    """Writes the pages; returns their files."""
    written = []
    for name, content in pages(results).items():
        path = docs / name
        path.write_text(content, encoding="utf-8")
        written.append(path)
    return written


# --- the boards -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Board:
    """A published leaderboard, as its CSV file has it."""

    grid: str
    track: str
    table: pd.DataFrame

    @property
    def link(self) -> str:
        """To the page that people read."""
        stem = f"{self.grid}-{self.track}"
        return f"[{stem}](../results/leaderboards/{stem}.md)"


def published(results: Path) -> list[Board]:
    """All boards under `results/leaderboards`; none before the first grid is published."""
    boards = []
    for path in sorted((results / "leaderboards").glob("*.csv")):
        grid, _, track = path.stem.rpartition("-")
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        if "knowledge" in table:  # told nothing: an empty text, and no missing number
            table["knowledge"] = table["knowledge"].astype(object).where(table["knowledge"].notna(), "")
        boards.append(Board(grid, track, table))
    return boards


# --- attacks ----------------------------------------------------------------------------------------------


def _attacks_page(boards: Sequence[Board]) -> str:
    parts = [_ATTACKS_HEAD]
    for folder, (heading, words) in KINDS.items():
        names = [name for name in registry.attacks.names() if _file(f"attacks/{folder}", name)]
        index = [[f"[{name}](#{name})", *_attack_in_a_line(name)] for name in names]
        parts += [f"## {heading}", words, _table(("name", "what it does", "recovers", "threat model"), index)]
        parts += [_attack_entry(name, f"attacks/{folder}/{name}.py", boards) for name in names]
    return _page(parts)


_ATTACKS_HEAD = f"""# Attacks

Every attack of the suite, as its class describes itself. `leakbench list attacks --json` has the names,
papers and specs for programs. How to add one: [CONTRIBUTING.md](../CONTRIBUTING.md). How scores and
intervals are made: [statistics.md](statistics.md). What letters mean: [threat_models.md](threat_models.md).

An entry says what the attack *reads* of the update (the rest is masked), which *knowledge* it takes where a
grid grants it, and what it *needs*: where that is missing it is skipped, shown with the reason, and counted
nowhere. A spec is the name with parameters, as in `lambda_recovery(search='paper')`; a parameter that isn't
given has its default.

*Reached* is taken from the published boards, and holds for their scenarios: how many there are, the best and
the worst of them, with 95 % intervals. *First in* counts those in which no other attack is significantly
better: where nobody finds anything, everybody is first.

Written by `{COMMAND}`; don't edit it by hand."""


def _attack_in_a_line(name: str) -> list[str]:
    attack = registry.attacks.make(name)
    letter = attack.threat_model
    return [
        _summary(type(attack)),
        _words(attack.produces),
        f"{letter}, {THREAT_MODELS.get(letter, 'not known')}",
    ]


def _attack_entry(name: str, file: str, boards: Sequence[Board]) -> str:
    attack = registry.attacks.make(name)
    cls, letter = type(attack), attack.threat_model
    facts = [
        f"Recovers: {_words(attack.produces)}.",
        f"Threat model: [{letter}, {THREAT_MODELS.get(letter, 'not known')}](threat_models.md#the-letters). "
        f"Reads {READS[attack.reads]}.",
        f"Takes, where it is granted: {'; '.join(_knowledge(attack)) or 'nothing'}.",
        *_needs_line(name, attack),
        *_builds_on(attack),
        f"{_paper(attack)} Revision {attack.revision}. {_code(file)}",
    ]
    reached = _reached(name, boards)
    parts = [
        f"### {name}",
        _described(cls, attack.title),
        "\n".join(f"- {fact}" for fact in facts),
        *_parameters(attack),
        reached or "Reached: not on a published board yet.",
    ]
    return "\n\n".join(parts)


def _knowledge(attack: Attack) -> list[str]:
    meanings = _attributes(Knowledge)
    return [f"`{name}` ({words.rstrip('.')})" for name, words in meanings.items() if name in attack.uses]


def _needs_line(name: str, attack: Attack) -> list[str]:
    """What it is skipped without: asked of `skip`, and in the words of its docstring."""
    if type(attack).skip is Attack.skip:
        return ["Needs nothing: it applies everywhere."]
    needs = [_under(attack, need) for need in assumptions(name)]
    words = _line(inspect.getdoc(type(attack).skip) or "")
    own = f" Its `skip` says: {_escaped(words)}" if words else ""
    return [f"Needs {'; '.join(needs)}.{own}" if needs else f"Needs little.{own}"]


def _under(attack: Attack, need: str) -> str:
    """A need, and that it is one of FedAvg where what is granted cures it there."""

    def complains(protocol: str, granted: frozenset[str]) -> bool:
        return need in (attack.skip(replace(KINDEST, protocol=protocol, granted=granted)) or "")

    nothing, everything = frozenset[str](), frozenset(attack.uses)
    of_fedavg = complains("fedavg", nothing) and not (
        complains("fedsgd", nothing) or complains("fedavg", everything)
    )
    said = re.sub(r"^(\w+='[^']*'): needs ", r"for `\1` ", need)
    said = re.sub(r"knowledge = \[[^]]*\]", r"`\g<0>`", said)
    return _escaped(f"under FedAvg {said}" if of_fedavg else said)


def _builds_on(attack: Attack) -> list[str]:
    names = [registry.parse(spec).target for spec in attack.builds_on]
    return [f"Runs {', '.join(f'[{name}](#{name})' for name in names)} first."] if names else []


def _reached(name: str, boards: Sequence[Board]) -> str:
    """A table, a row for each board and spec; empty where it is on none."""
    lines = [
        line
        for board in boards
        if board.track in MEASURES
        for line in _on_board(name, board, track_named(board.track))
    ]
    heads = ("board", "as", "scenarios", "skipped in", "first in", "best", "worst")
    return f"Reached:\n\n{_table(heads, lines)}" if lines else ""


def _on_board(name: str, board: Board, track: Track) -> Iterator[list[str]]:
    """A row for each spec of the attack, and for each knowledge that it was given."""
    names, metric = Names(board.table, track), track.ranks_by
    models = _told_apart(board.table["model"].unique())
    title, measure = MEASURES[track.name][0]
    varying = [axis for axis in NETWORK if board.table[axis].nunique() > 1] or ["model"]
    mine = board.table[board.table["attack"].str.partition("(")[0] == name]
    for _, table in mine.groupby(["attack", "knowledge"], sort=False):
        rows = rows_of(table)
        whole = [row for row in rows if row["rank"] is not None and row[metric] is not None]
        ends = sorted(whole, key=lambda row: -row[metric])

        def shown(row: dict[str, Any], alike: int) -> str:
            others = f" (and {alike - 1} more)" if alike > 1 else ""
            network = phrase(row | {"model": models[row["model"]]}, varying)
            where = f"{network}, defense {names.defenses[row['defense']]}"
            return f"{title} {measure(row)}, n = {row['n']}: {where}{others}"

        best = worst = ""
        if ends:
            best = shown(ends[0], sum(row[metric] == ends[0][metric] for row in ends))
            lowest = [row for row in ends if row[metric] == ends[-1][metric]]
            worst = "the same" if len(lowest) == len(ends) else shown(lowest[0], len(lowest))
        counts = (
            len(rows),
            sum(row["skipped"] is not None for row in rows),
            sum(row["rank"] == 1 for row in rows),
        )
        yield [board.link, f"`{names.attack(rows[0])}`", *map(str, counts), best, worst]


def _told_apart(specs: Iterable[str]) -> dict[str, str]:
    """Each spec with those parameters alone in which its namesakes differ."""
    all_parsed = {spec: parsed(spec) for spec in specs}
    short = {}
    for spec, own in all_parsed.items():
        namesakes = [other for other in all_parsed.values() if other.target == own.target]
        kept = {
            name: value
            for name, value in own.parameters.items()
            if any(other.parameters.get(name) != value for other in namesakes)
        }
        short[spec] = str(registry.Spec(own.target, kept))
    return short


# --- defenses ---------------------------------------------------------------------------------------------


def _defenses_page(boards: Sequence[Board], results: Path) -> str:
    names = [name for name in registry.defenses.names() if _file("defenses", name)]
    index = [
        [f"[{name}](#{name})", _summary(type(registry.defenses.make(name))), _stages(name)] for name in names
    ]
    costs = utility.read(results / "defenses")
    entries = [_defense_entry(name, boards, costs) for name in names]
    return _page([_DEFENSES_HEAD, _table(("name", "what it does", "how"), index), *entries])


_DEFENSES_HEAD = f"""# Defenses

Every defense of the suite, as its class describes itself. `leakbench list defenses --json` has the names,
papers and specs for programs. How to add one: [CONTRIBUTING.md](../CONTRIBUTING.md). How the defense board
is made: [statistics.md](statistics.md#the-defense-board).

Defenses compose: `label_smoothing+dp_gaussian` goes through the stages of both, stage by stage, left to
right; at most one of a chain may replace the gradient. A scenario without a defense has `none`.

*Got past it* is what the strongest attacker of each published scenario gets of the private batch. `told`: it
knew the defense's spec; `untold`: the best of those that didn't. *Cost* is measured apart from attacks: a
network is trained with the defense in every step. Accuracies are means over first weights (least to most),
on held-out examples; `cost` is what is lost beside `none`, time that of an update beside one without a
defense, on one core; kB those of an update, compressed without loss; ε that of the whole training at δ.

Written by `{COMMAND}`; don't edit it by hand."""


def _stages(name: str) -> str:
    acts = registry.defenses.make(name).stages()
    return "; ".join(STAGE_WORDS[stage] for stage in STAGES if stage in acts) or "changes nothing"


def _defense_entry(name: str, boards: Sequence[Board], costs: Sequence[dict[str, Any]]) -> str:
    defense = registry.defenses.make(name)
    cls = type(defense)
    proves = "" if cls.privacy is Defense.privacy else " It proves an ε."
    facts = [
        f"At work: it {_stages(name)}.{proves}",
        f"{_paper(defense)} Revision {defense.revision}. {_code(f'defenses/{name}.py')}",
    ]
    parts = [
        f"### {name}",
        _described(cls, defense.title),
        "\n".join(f"- {fact}" for fact in facts),
        *_parameters(defense),
        _past(name, boards) or "Got past it: not on a published board yet.",
        _cost(name, costs) or "Cost: not measured yet.",
    ]
    return "\n\n".join(parts)


def _members(spec: str) -> set[str]:
    """The names in a chain."""
    return {part.partition("(")[0] for part in registry.split_chain(spec)}


def _past(name: str, boards: Sequence[Board]) -> str:
    """Rows of the published defense boards, of the defense alone and of chains with it."""
    texts = []
    dropped = ("rank", "accuracy", "cost", "ε", "time", "kB")
    kept = [at for at, head in enumerate(defense_boards.HEADS) if head not in dropped]
    for board in boards:
        if board.track != "defense":
            continue
        short, models = defense_boards.short_names(board.table), _told_apart(board.table["model"].unique())
        mine = board.table[[name in _members(spec) for spec in board.table["defense"]]]
        lines = []
        for row in rows_of(mine):
            cells = defense_boards.cells_of(row, short)
            network = f"{row['dataset']}, {models[row['model']]}, {row['weights']}"
            lines.append([network, *(cells[at] for at in kept)])
        if lines:
            heads = ("network", *(defense_boards.HEADS[at] for at in kept))
            texts.append(f"Got past it ({board.link}):\n\n{_table(heads, lines)}")
    return "\n\n".join(texts)


def _cost(name: str, costs: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in costs:
        groups.setdefault((row["dataset"], row["model"], row["defense"]), []).append(row)
    lines = []
    for (dataset, model, spec), rows in groups.items():
        if name not in _members(spec):
            continue
        plain = groups.get((dataset, model, "none"), [])
        lines.append(
            [
                f"`{short(registry.defenses, spec)}`",
                f"{dataset}, {model.partition('(')[0]}",
                *_cost_cells(rows, plain),
            ]
        )
    heads = ("as", "trained", "accuracy", "cost", "time", "kB", "ε (δ)")
    return f"Cost:\n\n{_table(heads, lines)}" if lines else ""


def _cost_cells(rows: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> list[str]:
    def mean(of: Sequence[dict[str, Any]], column: str) -> float:
        return statistics.fmean(row[column] for row in of)

    accuracies = [row["accuracy"] for row in rows]
    spread = f" ({100 * min(accuracies):.0f}–{100 * max(accuracies):.0f})"
    cells = [f"{100 * mean(rows, 'accuracy'):.1f} %{spread}", "", ""]
    if plain:
        lost = 100 * (mean(plain, "accuracy") - mean(rows, "accuracy"))
        cells[1:] = [f"{lost:.1f} points", f"×{mean(rows, 'seconds') / mean(plain, 'seconds'):.1f}"]
    epsilon, delta = rows[0]["epsilon"], rows[0]["delta"]
    proven = "–" if epsilon is None else f"{epsilon:.3g} ({delta:g})"
    return [*cells, f"{mean(rows, 'bytes') / 1000:.0f}", proven]


# --- what both share --------------------------------------------------------------------------------------


def _file(folder: str, name: str) -> bool:
    """Whether the suite's own: what is installed besides is documented where it lives."""
    return (ROOT / folder / f"{name}.py").is_file()


def _words(produces: Iterable[str]) -> str:
    words = {"soft_labels": "labels", "features": "the last layer's input", "images": "images"}
    return ", ".join(word for part, word in words.items() if part in produces)


def _paper(member: Attack | Defense) -> str:
    return f"Paper: <{member.paper}>." if member.paper else "No paper."


def _code(file: str) -> str:
    code = f"Code: [{file}](../{file})"
    parent, _, stem = file.rpartition("/")
    test = f"tests/{parent}/test_{stem}"
    return f"{code}, [its test](../{test})." if (ROOT / test).is_file() else f"{code}."


def _opening(cls: type) -> tuple[str, str]:
    """What the module's first paragraph says, and the name before its colon, which may be empty."""
    first = _line(_module_doc(cls).partition("\n\n")[0])
    name, colon, rest = first.partition(": ")
    return (rest, name) if colon and len(name.split()) <= 3 else (first, "")


def _summary(cls: type) -> str:
    """The module's first sentence, without the name before its colon."""
    return _escaped(re.split(r"(?<=[a-z)])\. ", _opening(cls)[0])[0].rstrip("."))


def _described(cls: type, title: str) -> str:
    """What module and class say, but for the parameters."""
    opening, name = _opening(cls)
    said = [*_paragraphs(_module_doc(cls))[1:], *_paragraphs(inspect.getdoc(cls) or "")]
    generated = f"{cls.__name__}("  # what a dataclass says of itself where nobody did
    shown = [_markdown(text) for text in said if not text.startswith(("Attributes:", generated))]
    first = f"**{_escaped(title)}{':' if name else '.'}** {_markdown(opening)}"
    return "\n\n".join([first.rstrip(), *shown])


def _module_doc(cls: type) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def _paragraphs(doc: str) -> list[str]:
    return [text for text in re.split(r"\n\s*\n", doc.strip()) if text]


def _markdown(paragraph: str) -> str:
    """A docstring's paragraph: a list stays one, other lines are joined."""
    if paragraph.startswith("- "):
        return "\n".join(_escaped(_line(item)) for item in re.split(r"\n(?=- )", paragraph))
    return re.sub(r"\b(What it (?:protects|leaves|costs)):", r"**\1:**", _escaped(_line(paragraph)))


def _line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Text in which Markdown finds no emphasis and no tag; files of the suite are linked."""
    return "".join(map(_piece, re.split(r"(`[^`]*`|attacks/solvers(?:/\w+\.py)?)", text)))


def _piece(text: str) -> str:
    file = text.strip("`")
    if "/" in file and " " not in file and (ROOT / file).exists():
        return f"[{file}](../{file})"
    return text if text.startswith("`") else re.sub(r"(\*|<(?=[\w/!])|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _attributes(cls: type) -> dict[str, str]:
    """Field -> meaning, from the `Attributes:` of its docstring, then of its bases'."""
    meanings: dict[str, str] = {}
    for base in cls.__mro__:
        section = (inspect.cleandoc(base.__doc__ or "")).partition("\nAttributes:\n")[2]
        body = re.split(r"\n(?=\S)", section)[0]  # what follows unindented is no attribute
        for entry in re.split(r"\n(?=    \w)", f"\n{body}"):
            name, colon, meaning = _line(entry).partition(": ")
            if colon and name.isidentifier():
                meanings.setdefault(name, meaning)
    return meanings


def _parameters(member: Any) -> list[str]:
    """A table; nothing where there are none."""
    fields = [field for field in dataclasses.fields(member) if field.init]
    if not fields:
        return []
    hints, meanings = typing.get_type_hints(type(member)), _attributes(type(member))
    rows = [
        [
            f"`{field.name}`",
            _type(hints[field.name]),
            f"`{getattr(member, field.name)!r}`",
            _escaped(meanings.get(field.name, "")),
        ]
        for field in fields
    ]
    return [_table(("parameter", "type", "default", "meaning"), rows)]


def _type(hint: Any) -> str:
    """A type as people write it; what may be chosen from is listed."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice!r}`" for choice in arguments)
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(map(_type, arguments))
    if typing.get_origin(hint) is tuple:
        return f"tuple of {', '.join('any number' if one is ... else _type(one) for one in arguments)}"
    return getattr(hint, "__name__", str(hint))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns without an entry are left out."""
    listed = [list(row) for row in rows]
    kept = [at for at in range(len(heads)) if any(row[at] for row in listed)]
    lines = [[heads[at] for at in kept], ["---"] * len(kept), *([row[at] for at in kept] for row in listed)]
    return "\n".join(f"| {' | '.join(re.sub(_BAR, _ESCAPED_BAR, cell) for cell in line)} |" for line in lines)


_BAR, _ESCAPED_BAR = r"(?<!\\)\|", r"\\|"


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Says what was written."""
    for path in write(ROOT / "results", ROOT / "docs"):
        print(path)


if __name__ == "__main__":
    main()
