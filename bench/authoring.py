"""`leakbench new`: a commented attack or defense to start from, and its test; both pass as they are."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from bench import registry
from bench.errors import UserError, nearest

TEMPLATES = Path(__file__).parent / "templates"
IMPORTED = {"Attack", "Client", "Defense", "Facts", "Observation", "Outcome", "Reconstruction", "Update"}
"""What the templates' files import: a class of that name would hide it."""
KINDS: dict[str, registry.Registry] = {"attack": registry.attacks, "defense": registry.defenses}


def write(kind: str, name: str, folder: Path) -> tuple[Path, Path, str]:
    """Writes NAME.py and test_NAME.py into `folder`; returns them and the class's name.

    Raises:
        UserError: an unknown kind, a name that no file or class can have or that is taken, a file in the way.
    """
    if kind not in KINDS:
        raise UserError(f"a new {kind!r} can't be made{nearest(kind, KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name) or keyword.iskeyword(name):
        raise UserError(f"{name!r} is no name: lower-case letters, digits and _ as in my_{kind}")
    if name in KINDS[kind].names():
        raise UserError(f"the name {name!r} is taken by another {kind}; choose one of your own")
    words = [word for word in name.split("_") if word]
    class_name = "".join(word.capitalize() for word in words)
    if keyword.iskeyword(class_name) or class_name in IMPORTED:
        raise UserError(f"a class can't be named {class_name}; choose another name, as in my_{kind}")
    meant = {"name": name, "Class": class_name, "title": " ".join(words).capitalize()}
    files = {
        folder / f"{name}.py": TEMPLATES / f"{kind}.py.txt",
        folder / f"test_{name}.py": TEMPLATES / f"{kind}_test.py.txt",
    }
    for path in files:
        if path.exists():
            raise UserError(f"{path} is there already, and is left as it is; choose another name")
    for path, template in files.items():
        try:
            path.write_text(
                Template(template.read_text(encoding="utf-8")).substitute(meant), encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error
    source, test = files
    return source, test, meant["Class"]
