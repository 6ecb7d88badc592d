"""iDLG: the label of one example from the signs of the head's gradient.

Row c of the head's gradient is (p_c - y_c) x. With a hard label and x >= 0 only the true row sums to less
than zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class IDLG(Attack):
    """Zhao, Mopuri, Bilen 2020: argmin over classes of Σ_d ∇W_cd."""

    name: ClassVar[str] = "idlg"
    title: ClassVar[str] = "iDLG"
    paper: ClassVar[str] = "https://arxiv.org/abs/2001.02610"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels"})
    reads: ClassVar[str] = "head"

    def skip(self, facts: Facts) -> str | None:
        """One example, and features that can't be negative."""
        if facts.batch_size != 1:
            return f"needs a batch of one, got {facts.batch_size}"
        if not facts.nonnegative_features:
            return "needs non-negative features, as after a ReLU"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """A hard label (1, K); `UNIDENTIFIABLE` on a tie, as where all rows underflowed."""
        return self.run_many([observation], [rng])[0]

    def run_many(
        self, observations: Sequence[Observation], rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """As `run`, of a stack on one model."""
        answers = [
            Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": "the head's gradient was not sent"})
            for _ in observations
        ]
        sent = {
            at: gradient
            for at, one in enumerate(observations)
            if (gradient := one.head_weight_gradient) is not None
        }
        if sent:
            for at, answer in zip(sent, _of(torch.stack(list(sent.values()))), strict=True):
                answers[at] = answer
        return answers


def _of(gradients: torch.Tensor) -> list[Reconstruction]:
    """(M, K, D) -> an answer each."""
    row_sums = gradients.sum(dim=2)  # (M, K)
    labels = row_sums.argmin(dim=1)
    least = row_sums.gather(1, labels[:, None])
    tied = ((row_sums == least).sum(dim=1) > 1).tolist()
    finite = gradients.isfinite().flatten(1).all(dim=1).tolist()
    soft_labels = one_hot(labels, row_sums.shape[1]).to(gradients.dtype)[:, None]  # (M, 1, K)
    return [_answer(*one) for one in zip(soft_labels, finite, tied, strict=True)]


def _answer(soft_labels: torch.Tensor, finite: bool, tied: bool) -> Reconstruction:
    if not finite:
        return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})
    if tied:
        return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": "several rows have the least sum"})
    return Reconstruction(Outcome.OK, soft_labels=soft_labels, notes={"label_format": "hard"})
