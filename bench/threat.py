"""The threat model: what a client holds, what leaves it, what an attacker sees, knows and returns.

The bottom of the project; it imports torch alone. N = batch size, K = classes, D = width of the last
linear layer's input.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

Update = dict[str, Tensor]
"""What leaves the client: parameter name -> gradient (FedSGD) or `after - before` (FedAvg)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples with soft labels.

    Attributes:
        images: (N, C, H, W), float in [0, 1]; normalisation is the model's first step.
        soft_labels: (N, K), non-negative, rows sum to one.
    """

    images: Tensor
    soft_labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Facts:
    """What may decide whether an attack applies: no tensors, so none can look at a case and decline it.

    Attributes:
        batch_size: N.
        num_classes: K.
        image_shape: (C, H, W).
        feature_width: D.
        head_bias: whether the last linear layer has a bias (whose gradient is then seen).
        nonnegative_features: whether the last layer's input can't be negative, by the public architecture.
        protocol: how client and server talk, by name; its parameters are knowledge.
        granted: the names of `Knowledge` that the threat model grants to this attack.
    """

    batch_size: int
    num_classes: int
    image_shape: tuple[int, int, int]
    feature_width: int
    head_bias: bool
    nonnegative_features: bool
    protocol: str = "fedsgd"
    granted: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What the threat model grants beyond update and model; `Knowledge()` grants nothing.

    Attributes:
        label_format: `hard`, `smoothing`, `mixup`, …; None = unknown.
        soft_labels: (N, K), the truth: for upper bounds only.
        local_steps: how many steps a FedAvg client took.
        local_lr: its learning rate.
        batch_norm: the client's batch statistics, layer name -> (mean, variance).
        auxiliary: public data, disjoint from every private example.
        defense: the defense's spec.
    """

    label_format: str | None = None
    soft_labels: Tensor | None = None
    local_steps: int | None = None
    local_lr: float | None = None
    batch_norm: Mapping[str, tuple[Tensor, Tensor]] | None = None
    auxiliary: Batch | None = None
    defense: str | None = None


@dataclass(frozen=True, eq=False)
class Observation:
    """All that an attacker sees.

    Attributes:
        model: the public weights, in the client's mode (eval or train). Read-only: it is shared.
        update: what the attack reads of the client's update; the rest is masked.
        head: the module name of the last linear layer.
        facts: see `Facts`.
        knowledge: what the threat model grants and the attack uses.
        later_updates: those of the other rounds on the same batch, the oldest first.
    """

    model: nn.Module
    update: Update
    head: str
    facts: Facts
    knowledge: Knowledge
    later_updates: tuple[Update, ...] = ()

    @property
    def head_weight(self) -> Tensor:
        """(K, D), the last linear layer's public weight."""
        return self.model.get_parameter(f"{self.head}.weight").detach()

    @property
    def head_bias(self) -> Tensor | None:
        """(K,), its bias, None where it has none."""
        bias = getattr(self.model.get_submodule(self.head), "bias", None)
        return None if bias is None else bias.detach()

    @property
    def head_weight_gradient(self) -> Tensor | None:
        """(K, D), None where it wasn't sent; for FedAvg, the mean over local steps (see `_as_gradient`)."""
        return self._as_gradient(f"{self.head}.weight")

    @property
    def head_bias_gradient(self) -> Tensor | None:
        """(K,), None where the head has no bias or its gradient wasn't sent."""
        return self._as_gradient(f"{self.head}.bias")

    def _as_gradient(self, parameter: str) -> Tensor | None:
        """The gradient itself for FedSGD; -Δ / (lr · steps) for FedAvg where both are granted, else -Δ."""
        sent = self.update.get(parameter)
        if sent is None or not self.facts.protocol.startswith("fedavg"):
            return sent
        steps, lr = self.knowledge.local_steps, self.knowledge.local_lr
        return -sent / (lr * steps) if steps is not None and lr is not None else -sent


class Outcome(enum.Enum):
    """How a trial ended; the value is the sentence a person reads, records hold the name in lower case."""

    OK = "recovered what the attack recovers, by its own account"
    STEP_LIMIT = "stopped at its limit of steps, with its best answer"
    DIVERGED = "diverged: no finite answer"
    UNIDENTIFIABLE = "says that the observation does not determine the answer"
    SKIPPED = "does not apply here"
    CRASHED = "crashed"
    TIMEOUT = "ran past the time limit"
    OUT_OF_MEMORY = "ran out of memory"


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack returns: whichever of labels, features and images it produces.

    Attributes:
        outcome: how it ended, by the attack's own account.
        soft_labels: (N, K), in any order of the examples, or None.
        features: (N, D), the last layer's inputs in the same order, or None.
        images: (N, C, H, W) in [0, 1], in the same order, or None.
        notes: what a reader of the record may want to know, e.g. `label_format`, `lam`.
    """

    outcome: Outcome
    soft_labels: Tensor | None = None
    features: Tensor | None = None
    images: Tensor | None = None
    notes: dict[str, float | str] = field(default_factory=dict)


class Attack(Protocol):
    """Observation -> reconstruction: a frozen dataclass whose fields are its hyper-parameters.

    Derive from it for the defaults. `run_many(observations, rngs)`, one generator a trial, is optional and
    agrees with `run` within tolerance. `revision` is raised when the same input gives another output.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    revision: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    threat_model: ClassVar[str] = "A"
    produces: ClassVar[frozenset[str]]
    reads: ClassVar[str] = "all"
    uses: ClassVar[frozenset[str]] = frozenset()
    """The names of `Knowledge` that the attack takes; nothing else is handed over."""

    @property
    def builds_on(self) -> tuple[str, ...]:
        """The specs of other attacks that it runs: their revisions are part of its own."""
        return ()

    def skip(self, facts: Facts) -> str | None:
        """Why the attack doesn't apply, in a person's words; None where it does."""
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Recover what `produces` says. `rng` lives on the CPU."""
        ...


class Client(Protocol):
    """What a defense meets of a client."""

    @property
    def model(self) -> nn.Module:
        """The client's model, in its mode."""
        ...

    @property
    def head(self) -> str:
        """The module name of the last linear layer."""
        ...

    @property
    def pool(self) -> Batch | None:
        """What it holds beside its batch, as `change_batch` gets it; None where that is nothing."""
        ...

    def gradient(self, batch: Batch) -> Update:
        """The gradient of the batch's mean soft cross-entropy: parameter name -> tensor of its shape."""
        ...

    def example_gradients(self, batch: Batch) -> Update:
        """One gradient an example: parameter name -> (N, *shape)."""
        ...


STAGES = ("prepare", "change_batch", "gradient", "change_update")
"""A defense's stages, in the order in which a client goes through them."""


class Defense(Protocol):
    """What a client does differently: a frozen dataclass of hyper-parameters.

    Every stage defaults to nothing. `revision` is raised when the same input gives another output.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    revision: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    def prepare(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """Change the architecture, before training: part of the checkpoint's key."""
        return model

    def change_batch(self, batch: Batch, pool: Batch, rng: torch.Generator) -> Batch:
        """Private batch -> released batch; `pool` is the client's other data: mixup needs a partner."""
        return batch

    def released_size(self, private: int, image_shape: tuple[int, int, int]) -> int:
        """How many examples `change_batch` makes of so many: public, as what the update is a mean of."""
        return private

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """Replaces the plain gradient; at most one defense of a chain does."""
        return client.gradient(batch)

    def change_update(self, client: Client, update: Update, rng: torch.Generator) -> Update:
        """Change the update before it leaves the client."""
        return update

    def is_tensorwise(self) -> bool:
        """Whether `change_update` leaves each tensor as it would without the others.

        Then the head's entries alone can be computed where nothing else is read. One that draws random
        numbers takes `with_generators`.
        """
        return "change_update" not in self.stages()

    def privacy(self, steps: int, sample_rate: float, delta: float) -> tuple[float, float] | None:
        """(ε, δ) of `steps` rounds at Poisson rate `sample_rate`, or None where nothing is proven."""
        return None

    def stages(self) -> frozenset[str]:
        """The stages at which it does anything: the others can be computed for whole stacks."""
        return frozenset(
            stage for stage in STAGES if getattr(type(self), stage) is not getattr(Defense, stage)
        )


def with_generators(update: Update, rng: torch.Generator) -> Iterator[tuple[str, Tensor, torch.Generator]]:
    """Each tensor of an update with a generator of its own, whatever other tensors there are."""
    root = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    for name, value in update.items():
        own = int.from_bytes(hashlib.sha256(f"{root} {name}".encode()).digest()[:8]) >> 1
        yield name, value, torch.Generator(device=rng.device).manual_seed(own)


def mask(update: Update, head: str, reads: str) -> Update:
    """What an attack may see of an update: all of it, or the head's entries alone."""
    if reads == "all":
        return update
    return {name: value for name, value in update.items() if name.rpartition(".")[0] == head}


def grant(knowledge: Knowledge, uses: frozenset[str]) -> Knowledge:
    """The intersection of what the threat model grants and what an attack uses."""
    return Knowledge(**{name: getattr(knowledge, name) for name in sorted(uses)})
