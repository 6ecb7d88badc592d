"""Which module may import which: data flows one way, and an attack can't reach the truth."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("bench", "attacks", "defenses")

# The longest prefix decides; a module may import what is listed, and its own package's `__init__`.
MAY_IMPORT = {
    "bench.errors": (),
    "bench.cache": (),
    "bench.torchvision_ops": (),
    "bench.threat": (),
    "bench.registry": ("bench.errors", "bench.threat", "defenses.chain"),
    "bench.cases": (
        "bench.cases",
        "bench.cache",
        "bench.errors",
        "bench.registry",
        "bench.threat",
        "bench.torchvision_ops",
    ),
    "bench.metrics": (
        "bench.metrics",
        "bench.cache",
        "bench.errors",
        "bench.threat",
        "bench.torchvision_ops",
    ),
    "bench.downloads": ("bench.cache", "bench.cases.data", "bench.errors", "bench.torchvision_ops"),
    "bench.report.record": ("bench.errors",),
    "bench.report.statistics": ("bench.report.record",),
    "bench.report.utility": ("bench.errors",),
    "bench.report": ("bench.report", "bench.errors", "bench.registry", "bench.threat"),
    "bench.isolation": (
        "bench.cases.client",
        "bench.cases.models",
        "bench.errors",
        "bench.registry",
        "bench.threat",
    ),
    "bench.work": (
        "bench.cases",
        "bench.errors",
        "bench.isolation",
        "bench.metrics",
        "bench.registry",
        "bench.report.record",
        "bench.threat",
    ),
    "bench.utility": (
        "bench.cases",
        "bench.cache",
        "bench.registry",
        "bench.report.utility",
        "bench.threat",
    ),
    "bench.run": (
        "bench.cases",
        "bench.errors",
        "bench.isolation",
        "bench.registry",
        "bench.report.record",
        "bench.report.utility",
        "bench.threat",
        "bench.utility",
        "bench.work",
    ),
    "bench.cluster": (
        "bench.cases.models",
        "bench.errors",
        "bench.isolation",
        "bench.report.record",
        "bench.report.utility",
        "bench.threat",
        "bench.utility",
        "bench.work",
    ),
    "bench.speed": ("attacks", "bench"),
    "bench.studies": ("attacks", "bench"),
    "bench": ("bench",),
    "attacks.solvers": ("attacks.solvers",),
    "attacks.images": (
        "attacks.images._after_lambda",  # the base of attacks that go from the head down
        "attacks.images._labels",  # the base of attacks that are given labels
        "attacks.images._matching",  # that of attacks by gradient matching
        "attacks.solvers",
        "bench.registry",
        "bench.threat",
        "bench.torchvision_ops",
    ),
    "attacks": ("attacks.solvers", "bench.registry", "bench.threat", "bench.torchvision_ops"),
    "defenses": ("bench.registry", "bench.threat"),
}
THIRD_PARTIES = {"bench.threat": {"torch"}, "attacks.solvers": {"torch", "numpy", "pyswarms"}}


def modules() -> list[str]:
    paths = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem != "__init__"
    ]


def imported(module: str) -> set[str]:
    """Every module that the file imports, anywhere in it: `from bench import registry` is bench.registry."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            parent = str(node.module)
            for alias in node.names:
                child = ROOT / parent.replace(".", "/") / alias.name
                is_module = child.is_dir() or child.with_suffix(".py").exists()
                found.add(f"{parent}.{alias.name}" if is_module else parent)
    return found


def rule(module: str, table: dict) -> tuple | set | None:
    prefixes = [prefix for prefix in table if module == prefix or module.startswith(prefix + ".")]
    return table[max(prefixes, key=len)] if prefixes else None


@pytest.mark.parametrize("module", modules())
def test_imports_only_what_its_layer_may(module):
    allowed = rule(module, MAY_IMPORT)
    for name in sorted(imported(module)):
        if name.split(".")[0] in OURS:
            inside = any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)
            assert inside, f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in modules() if rule(name, THIRD_PARTIES)])
def test_the_bottom_and_the_solvers_need_no_more_than_torch(module):
    outside = {name.split(".")[0] for name in imported(module)} - set(OURS) - sys.stdlib_module_names
    assert outside <= rule(module, THIRD_PARTIES)


def test_every_folder_of_code_is_a_package():
    for package in OURS:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder


@pytest.mark.parametrize(
    "statement",
    [
        "import bench.__main__",
        "from bench.registry import attacks, defenses; attacks.names(); defenses.names()",
        "import bench.report.leaderboard",
    ],
)
def test_what_must_answer_at_once_imports_no_torch(statement):
    check = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
