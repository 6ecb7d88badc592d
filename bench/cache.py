"""Where LeakBench keeps what can be made or fetched again; imports nothing heavy."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`LEAKBENCH_CACHE`, else `$XDG_CACHE_HOME/leakbench`, else `~/.cache/leakbench`; it need not exist."""
    if own := os.environ.get("LEAKBENCH_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "leakbench"


def lpips_trunk_file() -> Path:
    """LPIPS's AlexNet trunk, torchvision's `features.*`; `leakbench data lpips` puts it there."""
    return cache_folder() / "lpips" / "alexnet.safetensors"
