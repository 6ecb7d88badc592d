"""λ-recovery: the soft label and the last layer's input of one example, from one scalar.

∇W = (p - y) xᵀ, so that x = λ ∇W[r] for λ = 1/(p_r - y_r): one number fixes feature and label. The published
search minimises the variance of the label's small entries over λ; the exact one solves for λ, finds the
label's format too, and says when the gradient does not determine the answer. See attacks/solvers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attacks.solvers import SoftLabelSolution, recover_soft_labels
from attacks.solvers.one_example import has_second_direction
from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction

OUTCOMES = {
    "ok": Outcome.OK,
    "unidentifiable": Outcome.UNIDENTIFIABLE,
    "step_limit": Outcome.STEP_LIMIT,
}

SEVERAL = "beside one example's gradient there is a second direction, which is no noise"


@registry.attacks.register
@dataclass(frozen=True)
class LambdaRecovery(Attack):
    """Wang, Liang, He 2024, with and without a bias; a granted label format is used.

    Attributes:
        search: `exact` (ours), or as published: `lbfgs`, `pso`, or `paper` (one after the other).
    """

    name: ClassVar[str] = "lambda_recovery"
    title: ClassVar[str] = "λ-recovery"
    revision: ClassVar[int] = 3
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.03124"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "features"})
    reads: ClassVar[str] = "head"
    uses: ClassVar[frozenset[str]] = frozenset({"label_format"})

    search: Literal["exact", "lbfgs", "pso", "paper"] = "exact"

    def skip(self, facts: Facts) -> str | None:
        """One example: a batch has a vector of λ."""
        return None if facts.batch_size == 1 else f"needs a batch of one, got {facts.batch_size}"

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Soft labels (1, K) and features (1, D), by the stack of one."""
        return self.run_many([observation], [rng])[0]

    def run_many(
        self, observations: Sequence[Observation], rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Several examples on one model: those of which the same is known, as one stack of tensors."""
        answers = [
            Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": "the head's gradient was not sent"})
            for _ in observations
        ]
        alike: dict[tuple[str | None, bool], list[int]] = {}
        for index, observation in enumerate(observations):
            if observation.head_weight_gradient is None:
                continue
            sent = (observation.head_weight_gradient, observation.head_bias_gradient)
            if not all(bool(part.isfinite().all()) for part in sent if part is not None):
                answers[index] = Reconstruction(
                    Outcome.DIVERGED, notes={"reason": "the gradient is not finite"}
                )
            else:
                known = observation.knowledge.label_format, observation.head_bias_gradient is not None
                alike.setdefault(known, []).append(index)
        for (label_format, with_bias), indices in alike.items():
            of = [observations[index] for index in indices]
            solution = self._solve(of, label_format, with_bias)
            several = _of_several(of, solution)
            for place, index in enumerate(indices):
                answers[index] = _reconstruction(solution, place, several[place])
        return answers

    def _solve(
        self, observations: Sequence[Observation], label_format: str | None, with_bias: bool
    ) -> SoftLabelSolution:
        def stack(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
            return torch.stack([gradient for gradient in gradients if gradient is not None])

        return recover_soft_labels(
            stack(one.head_weight_gradient for one in observations),
            observations[0].head_weight,
            observations[0].head_bias,
            stack(one.head_bias_gradient for one in observations) if with_bias else None,
            label_format=label_format,
            search=self.search,
        )


def _of_several(observations: Sequence[Observation], solution: SoftLabelSolution) -> list[bool]:
    """Which of the gradients are not one example's of one step, whatever was found of them."""
    gradients = [one.head_weight_gradient for one in observations]
    assert solution.features is not None
    stack = torch.stack([gradient for gradient in gradients if gradient is not None])
    with torch.no_grad():
        return has_second_direction(stack, solution.features.nan_to_num(0.0, 0.0, 0.0)).tolist()


def _reconstruction(solution: SoftLabelSolution, index: int, of_several: bool) -> Reconstruction:
    """One example of a stack's solution; nothing is certain where more than one had a part."""
    assert solution.soft_labels is not None
    assert solution.features is not None
    soft_labels, features = solution.soft_labels[index][None], solution.features[index][None]
    outcome, reason = OUTCOMES[solution.outcome[index]], solution.reason[index]
    if of_several and outcome is Outcome.OK:
        outcome, reason = Outcome.UNIDENTIFIABLE, SEVERAL
    notes: dict[str, float | str] = {
        "reason": reason,
        "label_format": solution.label_format[index],
        "format_confidence": float(solution.format_confidence[index]),
        "lam": float(solution.lam[index]),
        "lam_std": float(solution.lam_std[index]),
        "label_std": float(solution.label_std[index]),
        "row": int(solution.row[index]),
    }
    found = bool(soft_labels.isfinite().all()), bool(features.isfinite().all())
    return Reconstruction(
        outcome if all(found) or outcome is not Outcome.OK else Outcome.DIVERGED,
        soft_labels=soft_labels if found[0] else None,
        features=features if found[1] else None,
        notes=notes,
    )
