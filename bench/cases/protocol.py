"""How clients and server talk: which updates of a batch reach the server, hence the attacker.

`fedsgd`, `fedavg(steps=5, lr=0.01)`, `secure_aggregation(clients=8)`, `rounds(count=8)`, `head_withheld`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bench import registry
from bench.cases.client import FedSGDClient
from bench.errors import UserError, nearest
from bench.threat import Batch, Defense, Update


@dataclass(frozen=True)
class Protocol(ABC):
    """What the server sees of the batches that its clients release."""

    name: ClassVar[str]
    clients: ClassVar[int] = 1

    @abstractmethod
    def updates(
        self, client: FedSGDClient, defense: Defense, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Update, ...]:
        """One update a round, the oldest first, from each client's released batch."""


@dataclass(frozen=True)
class FedSGD(Protocol):
    """The gradient of one step."""

    name: ClassVar[str] = "fedsgd"

    def updates(
        self, client: FedSGDClient, defense: Defense, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Update, ...]:
        """The gradient, as the defense lets it out."""
        (batch,) = batches
        return (defense.change_update(client, defense.gradient(client, batch, rng), rng),)


@dataclass(frozen=True)
class FedAvg(Protocol):
    """`after - before` of the weights: `steps` steps of SGD at rate `lr` on the same batch."""

    name: ClassVar[str] = "fedavg"
    steps: int = 5
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is not at least 1")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} is not a number above 0")

    def updates(
        self, client: FedSGDClient, defense: Defense, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Update, ...]:
        """The difference of the weights, as the defense lets it out."""
        (batch,) = batches
        moved = replace(client, model=copy.deepcopy(client.model))
        before = dict(client.model.named_parameters())
        after = dict(moved.model.named_parameters())
        for _ in range(self.steps):
            gradient = defense.gradient(moved, batch, rng)
            with torch.no_grad():
                for name, value in gradient.items():
                    after[name].sub_(self.lr * value)
        delta = {name: (after[name] - before[name]).detach() for name in gradient}
        return (defense.change_update(client, delta, rng),)


@dataclass(frozen=True)
class SecureAggregation(Protocol):
    """The mean of several clients' gradients: the server can't part them."""

    name: ClassVar[str] = "secure_aggregation"
    clients: int = 8  # type: ignore[misc]  # here each has its own number

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ValueError(f"clients={self.clients} is not at least 1")

    def updates(
        self, client: FedSGDClient, defense: Defense, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Update, ...]:
        """The mean over the clients, each behind the defense."""
        sent = [FedSGD().updates(client, defense, [batch], rng)[0] for batch in batches]
        return ({name: torch.stack([one[name] for one in sent]).mean(0) for name in sent[0]},)


@dataclass(frozen=True)
class Rounds(Protocol):
    """The same batch, seen in `count` rounds on the same weights: only what the defense draws differs."""

    name: ClassVar[str] = "rounds"
    count: int = 8

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} is not at least 1")

    def updates(
        self, client: FedSGDClient, defense: Defense, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Update, ...]:
        """One gradient a round."""
        return tuple(FedSGD().updates(client, defense, batches, rng)[0] for _ in range(self.count))


@dataclass(frozen=True)
class HeadWithheld(Protocol):
    """The gradient but for the last linear layer's."""

    name: ClassVar[str] = "head_withheld"

    def updates(
        self, client: FedSGDClient, defense: Defense, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Update, ...]:
        """The gradient without the head's entries."""
        (sent,) = FedSGD().updates(client, defense, batches, rng)
        return ({name: value for name, value in sent.items() if name.rpartition(".")[0] != client.head},)


PROTOCOLS: Mapping[str, type[Protocol]] = {
    cls.name: cls for cls in (FedSGD, FedAvg, SecureAggregation, Rounds, HeadWithheld)
}


def make(text: str) -> Protocol:
    """A spec -> the protocol.

    Raises:
        UserError: an unknown name or parameter, or a value out of range.
    """
    spec = registry.parse(text)
    if spec.target not in PROTOCOLS:
        raise UserError(f"no protocol is named {spec.target!r}{nearest(spec.target, PROTOCOLS)}")
    protocol = PROTOCOLS[spec.target]()
    given = registry.arguments(spec, {name: type(value) for name, value in vars(protocol).items()})
    try:
        return replace(protocol, **given)
    except ValueError as error:
        raise UserError(f"{spec.target}: {error}") from None


def canonical(text: str) -> str:
    """The spec with all defaults filled in: the name that records hold."""
    protocol = make(text)
    return str(registry.Spec(protocol.name, dict(vars(protocol))))
