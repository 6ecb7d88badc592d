"""No defense: the client sends what it computed."""

from dataclasses import dataclass
from typing import ClassVar

from bench import registry
from bench.threat import Defense


@registry.defenses.register
@dataclass(frozen=True)
class NoDefense(Defense):
    """Every stage is the identity."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no defense"
