"""What the documentation says works: links, anchors, commands, names, code."""

import importlib.util
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer

from bench import reference, registry
from bench.__main__ import app
from bench.cases import data, models
from bench.cases.scenario import Grid, grid_names
from bench.report import leaderboard, statistics
from bench.verification import SAMPLE
from bench.work import AUXILIARY, IDENTIFIED_AMONG

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
"""What tells people what to type."""

PAGES = [
    *GUIDES,
    ROOT / "CHANGELOG.md",
    *(path for folder in ("attacks", "bench", "results") for path in sorted((ROOT / folder).rglob("*.md"))),
]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=named)
every_guide = pytest.mark.parametrize("page", GUIDES, ids=named)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for _, language, code in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def test_the_solvers_readme_names_every_file():
    folder = ROOT / "attacks" / "solvers"
    said = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text().split("## The files")[1]))
    assert said == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


# --- links ------------------------------------------------------------------------------------------------


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces, numbers for namesakes."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeated = (f"{slug}-{count}" for count in range(1, 100))
        found.add(slug if slug not in found else next(one for one in repeated if one not in found))
    return found


@every_page
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "http://", "mailto:")), target
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{named(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{named(page)}: {target}"


# --- commands ---------------------------------------------------------------------------------------------


def typed(page: Path) -> list[list[str]]:
    """The words of each `leakbench …` in the page's shell blocks, and of longer ones in its text."""
    lines = [
        line
        for code in blocks(page, "", "sh", "bash", "console")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    inline = re.findall(r"`(leakbench [^`\n]+)`", prose(page))
    found = []
    for line in [*lines, *(code for code in inline if len(code.split()) > 2)]:
        words = shlex.split(line, comments=True)
        while words:
            end = next((at for at, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words))
            part, words = words[:end], words[end + 1 :]
            if part and part[0].rpartition("/")[2] == "leakbench":
                found.append(part[1:])
    return found


def parsed(words: list[str]) -> tuple[str, dict]:
    """The command and its parameters, by the command line's own parser; a usage error raises."""
    group = typer.main.get_command(app)
    context = group.make_context("leakbench", list(words))
    name, command, rest = group.resolve_command(context, list(words))
    return name, command.make_context(name, rest, parent=context).params


def is_placeholder(text: str) -> bool:
    """`GRID`, `my_attack`, `my_attack.py:MyAttack`, `path/to/mine.py:Mine`, `my_package.nets:make`."""
    return bool(re.fullmatch(r"[A-Z_]+|my_\w+", text) or re.search(r"\.(py|toml)\b|^my_\w+\.", text))


def check_specs(specs, known) -> None:
    for spec in specs:
        if not is_placeholder(registry.parse(spec).target):
            known.canonical(spec)


@every_guide
def test_every_command_line_parses_and_names_what_there_is(page):
    for words in typed(page):
        name, given = parsed(words)
        check_specs(given.get("attack") or () if name == "run" else (), registry.attacks)
        check_specs(given.get("defense") or (), registry.defenses)
        grid = given.get("grid")
        assert grid is None or is_placeholder(grid) or grid in grid_names(), grid
        if name == "data":
            assert is_placeholder(given["name"]) or given["name"] in {"lpips", *data.descriptions()}
        if name == "list":
            assert given["kind"] in ("attacks", "defenses", "datasets", "models", "grids")


@every_guide
def test_every_command_in_the_text_exists(page):
    known = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"`leakbench ([a-z]+)", page.read_text())) <= known


def test_commands_are_found_at_all():
    assert sum(len(typed(page)) for page in GUIDES) > 20
    with pytest.raises(Exception, match="No such option"):
        parsed(["run", "quick", "--fast"])
    with pytest.raises(Exception, match="No such command"):
        parsed(["race"])


@every_page
def test_every_module_that_is_to_be_run_is_there_and_answers(page):
    for module in set(re.findall(r"python3? -m ([\w.]+\w)", page.read_text())) - {"pytest", "venv", "pip"}:
        found = importlib.util.find_spec(module)
        assert found is not None, f"{named(page)}: python -m {module}"
        if found.submodule_search_locations:
            found = importlib.util.find_spec(f"{module}.__main__")
            assert found is not None, f"{named(page)}: python -m {module} is a package"
        assert found.origin
        assert '__name__ == "__main__"' in Path(found.origin).read_text(), f"{named(page)}: {module}"


# --- code -------------------------------------------------------------------------------------------------


@every_page
def test_python_compiles(page):
    for code in blocks(page, "python", "py"):
        compile(code, named(page), "exec")


@every_guide
def test_grids_are_grids_of_what_there_is(page):
    for code in blocks(page, "toml"):
        for block in Grid.model_validate(tomllib.loads(code)).blocks:
            check_specs(block.attacks, registry.attacks)
            for chain in block.defense:
                check_specs(registry.split_chain(chain), registry.defenses)
            for spec in block.model:
                if not is_placeholder(spec):
                    models.canonical(spec)


# --- the reference pages ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return reference.pages(ROOT / "results")


def entries(page: str) -> dict[str, str]:
    """Name -> what stands under its heading."""
    return dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))


BOTH = pytest.mark.parametrize("name", ["attacks.md", "defenses.md"])


@BOTH
def test_an_entry_of_the_committed_page_is_what_the_generator_writes(name, written):
    """A new attack needs no change here: an entry that isn't there yet is none that is wrong."""
    now, committed = entries(written[name]), entries((ROOT / "docs" / name).read_text())
    stale = sorted(entry for entry, text in committed.items() if now.get(entry) != text)
    assert not stale, f"docs/{name} is not up to date at {', '.join(stale)}: run {reference.COMMAND}"


@BOTH
def test_the_lines_around_the_entries_are_what_the_generator_writes(name, written):
    def around(page: str) -> list[str]:
        return [line for line in page.split("\n### ")[0].splitlines() if not line.startswith("| [")]

    assert around((ROOT / "docs" / name).read_text()) == around(written[name]), f"run {reference.COMMAND}"


def test_the_figures_that_the_pages_name_are_the_codes():
    text = " ".join((ROOT / "docs" / "statistics.md").read_text().split())
    assert f"{statistics.RESAMPLES} resamples" in text
    assert f"counts as {leaderboard.EXACT_PSNR:.0f} dB" in text
    assert f"corrected p < {statistics.SIGNIFICANCE})" in text
    assert f"than to {IDENTIFIED_AMONG} others" in text
    for metric, worst in leaderboard.WORST.items():
        if metric not in ("private_mse", "private_ssim", "private_lpips"):
            row = re.search(rf"^\|.*`{metric}`[^|]* \| ([0-9]+) \|", _table_of_worst(), re.MULTILINE)
            assert row is not None, metric
            assert float(row[1]) == worst, metric
    assert f"| {AUXILIARY} public examples" in (ROOT / "docs" / "threat_models.md").read_text()
    assert str(SAMPLE) in (ROOT / "CONTRIBUTING.md").read_text()


def _table_of_worst() -> str:
    """One metric's cell and its value a line."""
    (table,) = re.findall(r"\| metric \| worst .*?\n\n", (ROOT / "docs/statistics.md").read_text(), re.DOTALL)
    rows = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return "\n".join(f"|{row[at]}|{row[at + 1]}|" for row in rows for at in (0, 2))
