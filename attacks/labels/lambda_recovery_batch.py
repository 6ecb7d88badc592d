"""λ-recovery for batches: a vector of λ, once the examples' directions are told apart.

∇W = (1/n) (P - Y)ᵀ X has rank n and leaves an n × n matrix open. Zeros of the features fix its directions,
so that each example has a λ of its own; where there are too few zeros, labels of few numbers fix the examples
one at a time. Every answer is checked by rebuilding ∇W. See attacks/solvers/batch.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attacks.solvers.batch import BatchSolution, recover_soft_labels_of_batch
from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction

OUTCOMES = {
    "ok": Outcome.OK,
    "unidentifiable": Outcome.UNIDENTIFIABLE,
    "step_limit": Outcome.STEP_LIMIT,
}


@registry.attacks.register
@dataclass(frozen=True)
class LambdaRecoveryBatch(Attack):
    """The λ of Wang, Liang, He 2024, one an example: ours; a granted label format is used.

    Attributes:
        walks: towards the directions that zeros tell, at most.
        attempts: searches with fresh starts, at most.
    """

    name: ClassVar[str] = "lambda_recovery_batch"
    title: ClassVar[str] = "λ-recovery of batches"
    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.03124"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "features"})
    reads: ClassVar[str] = "head"
    uses: ClassVar[frozenset[str]] = frozenset({"label_format"})

    walks: int = 16384
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.walks < 0:
            raise ValueError(f"walks={self.walks} is negative; 0 leaves the zeros of features unused")
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts} is not at least 1")

    def skip(self, facts: Facts) -> str | None:
        """A gradient of rank n leaves n examples; rows of P - Y sum to zero: n < K, n <= D."""
        n = facts.batch_size
        if n >= facts.num_classes:
            return f"needs fewer examples than classes, got {n} of {facts.num_classes}"
        if n > facts.feature_width:
            return f"needs no more examples than features, got {n} of {facts.feature_width}"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Soft labels (N, K) and features (N, D), where all examples are found."""
        gradient = observation.head_weight_gradient
        if gradient is None:
            return Reconstruction(
                Outcome.UNIDENTIFIABLE, notes={"reason": "the head's gradient was not sent"}
            )
        bias_gradient = observation.head_bias_gradient
        sent = [gradient] if bias_gradient is None else [gradient, bias_gradient]
        if not all(bool(part.isfinite().all()) for part in sent):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})
        solution = recover_soft_labels_of_batch(
            gradient,
            observation.head_weight,
            observation.facts.batch_size,
            observation.head_bias,
            bias_gradient,
            nonnegative_features=observation.facts.nonnegative_features,
            label_format=observation.knowledge.label_format,
            walks=self.walks,
            attempts=self.attempts,
            rng=rng,
        )
        return _reconstruction(solution)


def _reconstruction(solution: BatchSolution) -> Reconstruction:
    """Rows that were not found are no answer: neither are the others, then, as to labels of the batch."""
    labels, features = solution.soft_labels, solution.features
    notes: dict[str, float | str] = {
        "reason": solution.reason,
        "label_format": "+".join(sorted(set(solution.label_format) - {""})),
        "label_std": float(solution.label_std.max()),
        "residual": solution.residual,
        "found": solution.found,
        "by_zeros": solution.by_zeros,
    }
    return Reconstruction(
        OUTCOMES[solution.outcome],
        soft_labels=labels if bool(labels.isfinite().all()) else None,
        features=features if bool(features.isfinite().all()) else None,
        notes=notes,
    )
