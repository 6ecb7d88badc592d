"""torchvision where its compiled operators don't fit the installed torch.

A torchvision wheel built for CUDA beside a CPU-only torch cannot load its extension: `import torchvision`
ends in `RuntimeError: operator torchvision::nms does not exist`, although models, transforms and data sets,
all that is used here, need no compiled operator. Declaring the operators that its import names (`nms`, in
newer versions `qnms` too) is enough; where the extension loads, nothing is changed.
"""

import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


@cache
def ensure_importable() -> None:
    """Call before `import torchvision` or `import lpips`: both then work beside a torch of another build."""
    if "torchvision" in sys.modules or os.name == "nt":  # Windows' extension needs its own DLL search path
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    if not _loads_extension(folder):
        _declare_operators(folder)


def _loads_extension(folder: Path) -> bool:
    """Whether torchvision's `_C` can be loaded; that torchvision loads it again then changes nothing."""
    files = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    load: Callable[[str], None] = torch.ops.load_library
    for file in filter(Path.is_file, files):
        try:
            load(str(file))
        except (ImportError, OSError, RuntimeError):
            continue
        return True
    return False


def _declare_operators(folder: Path) -> None:
    """Declares, without a kernel, each operator for which torchvision's import registers a shape rule."""
    file = folder / "_meta_registrations.py"
    registrations = file.read_text(encoding="utf-8") if file.is_file() else ""
    for name in re.findall(r"""register_fake\(\s*["']torchvision::(\w+)["']""", registrations):
        if not hasattr(torch.ops.torchvision, name):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
