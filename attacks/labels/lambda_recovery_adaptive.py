"""λ-recovery by an attacker who is told the defense: its format of labels, its noise, its clipping.

A hard label is known once its class is, which takes far less than λ; so is one smoothed by a known ε, where
λ is not to be had. Other labels are searched for in the one format that the defense leaves, with the noise's
true level; where each example was clipped, the factor is searched for too. DCS' concealed examples are found
along with the private ones, as a batch of twice the size. Rounds on the same batch are averaged first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.solvers import SoftLabelSolution, recover_soft_label
from attacks.solvers.batch import recover_soft_labels_of_batch
from attacks.solvers.hard_label import hard_class, posterior_of_class
from attacks.solvers.head_inputs import head_inputs, noise_images
from bench import registry
from bench.registry import Spec
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction

ROUNDS = 4
"""How often the search for the clipping factor is narrowed."""

TRIED = 5
"""Clipping factors a round."""

LEAST_FACTOR = 0.01

CLEAR = 8.0
"""Standard deviations of noise by which a class must stand out to need no public images."""

PUBLIC_IMAGES = 64
"""Of noise, which need no data."""

TOLERATED = 0.05
"""The chance of another class beyond which none is claimed."""

KNOWN = frozenset(
    {
        "none", "label_smoothing", "mixup", "cutmix", "instahide", "dp_gaussian", "dp_laplace",
        "gradient_noise", "pruning", "quantization", "sign_sgd", "soteria", "precode", "ats", "graddefense",
        "dcs", "censor", "oasis", "outpost",
    }
)  # fmt: skip
"""The defenses of which it is known what they leave of a label, and what they add to a gradient."""

OUTCOMES = {"ok": Outcome.OK, "unidentifiable": Outcome.UNIDENTIFIABLE, "step_limit": Outcome.STEP_LIMIT}


@dataclass(frozen=True)
class Told:
    """What a defense's spec says about one example's gradient.

    Attributes:
        label_format: that is left of a hard label; None where the spec doesn't say.
        epsilon: of the smoothing, where it is one number.
        noise_std: on an entry of one update; None where it isn't known.
        clipped: whether the gradient may be scaled by an unknown factor below one.
        concealed: whether each example has another one beside it, whose label is mixed.
    """

    label_format: str | None
    epsilon: float | None
    noise_std: float | None
    clipped: bool
    concealed: bool


def told(defense: str) -> Told:
    """What a canonical spec (or a chain of them) says."""
    parts = [registry.parse(part) for part in registry.split_chain(defense)]
    smoothed = [part for part in parts if part.target == "label_smoothing"]
    mixed = [part for part in parts if part.target in ("mixup", "cutmix", "instahide")]
    label_format: str | None = "smoothing" if smoothed else "hard"
    if mixed:
        plain = "mixup" if len(mixed) == 1 and mixed[0].target != "instahide" else "k_mix"
        label_format = f"smoothed_{plain}" if smoothed else plain
    names = {part.target for part in parts}
    if names - KNOWN:
        label_format = None
    epsilons = [part.parameters["epsilon"] for part in smoothed]
    epsilon = epsilons[0] if len(epsilons) == 1 and not isinstance(epsilons[0], tuple) else None
    added = [std for part in parts if (std := _noise_std(part))]
    foreign = names & {
        "quantization",
        "pruning",
        "sign_sgd",
        "graddefense",
        "censor",
        "outpost",
        "dcs",
        "soteria",
    }
    return Told(
        label_format,
        epsilon,
        math.hypot(*added) if added and not foreign and names <= KNOWN else None,
        bool(names & {"dp_gaussian", "dp_laplace", "sign_sgd"}),
        "dcs" in names,
    )


def _noise_std(part: Spec) -> float:
    """The standard deviation that a defense adds to every entry of one example's gradient."""
    known = part.parameters
    match part.target:
        case "gradient_noise":
            return float(known["std"])
        case "dp_gaussian":
            return float(known["noise_multiplier"] * known["clip"])
        case "dp_laplace":
            return float(2**0.5 * known["noise_multiplier"] * known["clip"])
    return 0.0


@registry.attacks.register
@dataclass(frozen=True)
class LambdaRecoveryAdaptive(Attack):
    """Ours, on the λ of Wang, Liang, He 2024, told the defense's spec.

    Of batches it averages rounds and takes λ-recovery of batches in the format that is left.
    """

    name: ClassVar[str] = "lambda_recovery_adaptive"
    title: ClassVar[str] = "λ-recovery, told the defense"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.03124"
    threat_model: ClassVar[str] = "C"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "features"})
    reads: ClassVar[str] = "head"
    uses: ClassVar[frozenset[str]] = frozenset({"defense"})

    def skip(self, facts: Facts) -> str | None:
        """Needs the spec; and of a batch what λ-recovery of batches needs."""
        if "defense" not in facts.granted:
            return "needs the defense's spec: grant knowledge = ['defense']"
        if facts.num_classes < 3:
            return f"needs at least three classes, got {facts.num_classes}"
        n = facts.batch_size
        if n >= facts.num_classes:
            return f"needs fewer examples than classes, got {n} of {facts.num_classes}"
        if n > facts.feature_width:
            return f"needs no more examples than features, got {n} of {facts.feature_width}"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Soft labels (N, K), and features (N, D) where the search finds them."""
        gradient, bias_gradient = mean_of_rounds(observation)
        if gradient is None:
            return Reconstruction(
                Outcome.UNIDENTIFIABLE, notes={"reason": "the head's gradient was not sent"}
            )
        sent = [gradient] if bias_gradient is None else [gradient, bias_gradient[:, None]]
        if not all(bool(part.isfinite().all()) for part in sent):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})
        defense = observation.knowledge.defense
        known = told("none" if defense is None else defense)
        n, num_classes = observation.facts.batch_size, observation.facts.num_classes
        if known.concealed and 2 * n < num_classes and 2 * n <= gradient.shape[1]:
            both = _of_batch(observation, gradient, bias_gradient, known, 2 * n, rng)
            if n > 1 or both.soft_labels is not None:
                return _without_concealed(both, n)
        if n > 1:
            return _of_batch(observation, gradient, bias_gradient, known, n, rng)
        rounds = 1 + len(observation.later_updates)
        noise_std = None if known.noise_std is None else known.noise_std / rounds**0.5
        if known.label_format == "hard":
            return self._by_class(observation, torch.cat(sent, dim=1), gradient, known, noise_std, rng)
        if bias_gradient is not None and not known.clipped:
            found = recover_soft_label(
                gradient, observation.head_weight, observation.head_bias, bias_gradient, noise_std=noise_std
            )
            if found.outcome == "ok":
                return _reconstruction(found)
        answer, factor = _over_factors(observation, gradient, known, noise_std)
        if answer.outcome != "ok" and known.label_format == "smoothing" and known.epsilon is not None:
            return self._by_class(observation, torch.cat(sent, dim=1), gradient, known, noise_std, rng)
        return _reconstruction(answer, factor)

    def _by_class(
        self,
        observation: Observation,
        both: Tensor,
        gradient: Tensor,
        known: Told,
        noise_std: float | None,
        rng: torch.Generator,
    ) -> Reconstruction:
        """The class tells the whole label; its features are the leading right singular vector's, by λ."""
        if not bool(both.any()):
            return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": "the gradient is zero"})
        index, chance_of_error = _class_of(observation, both, noise_std, rng)
        epsilon = known.epsilon or 0.0
        label = torch.full_like(gradient[:, 0], epsilon / len(gradient))
        label[index] += 1 - epsilon
        solution, factor = _over_factors(observation, gradient, known, noise_std)
        drowned = chance_of_error > TOLERATED
        features = None if solution.features is None else solution.features / factor
        usable = features is not None and bool(features.isfinite().all())
        notes: dict[str, float | str] = {
            "reason": f"noise: the class is wrong with a chance of {chance_of_error:.2g}" if drowned else "",
            "label_format": str(known.label_format),
        }
        return Reconstruction(
            Outcome.UNIDENTIFIABLE if drowned else Outcome.OK,
            soft_labels=label[None],
            features=features[None] if usable and features is not None else None,
            notes=notes,
        )


def _class_of(
    observation: Observation, both: Tensor, noise_std: float | None, rng: torch.Generator
) -> tuple[int, float]:
    """The class, and the chance that it is another one; `both` (K, D) holds a bias' gradient too."""
    found = hard_class(both[None])
    std = float(found.noise[0]) if noise_std is None else noise_std
    if float(found.lead[0]) > CLEAR * std:
        return int(found.classes[0]), 0.0
    drawn = noise_images(PUBLIC_IMAGES, observation.facts.image_shape, rng).to(both.device)
    public = head_inputs(observation.model, observation.head, drawn)
    features = public.features
    if both.shape[1] > features.shape[1]:
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    noise = torch.full_like(found.lead, std)
    chances = posterior_of_class(both[None], noise, features)[0]
    return int(chances.argmax()), float(1 - chances.max())


def mean_of_rounds(observation: Observation) -> tuple[Tensor | None, Tensor | None]:
    """The head's gradients (K, D) and (K,), averaged over the rounds on the same batch."""
    weights, biases = [], []
    for update in (observation.update, *observation.later_updates):
        one = Observation(
            observation.model, update, observation.head, observation.facts, observation.knowledge
        )
        weights.append(one.head_weight_gradient)
        biases.append(one.head_bias_gradient)
    return _mean(weights), _mean(biases)


def _mean(sent: Sequence[Tensor | None]) -> Tensor | None:
    there = [one for one in sent if one is not None]
    return torch.stack(there).mean(0) if len(there) == len(sent) else None


def _over_factors(
    observation: Observation, gradient: Tensor, known: Told, noise_std: float | None
) -> tuple[SoftLabelSolution, float]:
    """The solution, and the factor by which the example was clipped, as far as it can be told."""
    # What noise alone could be tells no factor.
    clipped = known.clipped and bool(hard_class(gradient[None]).lead[0] > 0)
    low, high = LEAST_FACTOR if clipped else 1.0, 1.0
    for _ in range(ROUNDS if clipped else 1):
        ratio = (low / high) ** (1 / (TRIED - 1))
        factors = [high * ratio**k for k in range(TRIED if clipped else 1)]
        answer, factor = _searched(observation, gradient, known, noise_std, factors)
        low, high = factor * ratio, min(1.0, factor / ratio)
    return answer, factor


def _searched(
    observation: Observation,
    gradient: Tensor,
    known: Told,
    noise_std: float | None,
    factors: Sequence[float],
) -> tuple[SoftLabelSolution, float]:
    """The best fit over clipping factors c: c u xᵀ is u x'ᵀ with x' = c x, so that logits are (W/c) x'."""
    best, chosen = None, 1.0
    for factor in factors:
        found = recover_soft_label(
            gradient,
            observation.head_weight / factor,
            observation.head_bias,
            label_format=known.label_format,
            epsilon=known.epsilon,
            noise_std=noise_std,
        )
        loss = float(found.loss)
        if best is None or (math.isfinite(loss) and not loss >= float(best.loss)):
            best, chosen = found, factor
    assert best is not None
    return best, chosen


def _of_batch(
    observation: Observation,
    gradient: Tensor,
    bias_gradient: Tensor | None,
    known: Told,
    examples: int,
    rng: torch.Generator,
) -> Reconstruction:
    """Soft labels and features of so many examples."""
    found = recover_soft_labels_of_batch(
        gradient,
        observation.head_weight,
        examples,
        observation.head_bias,
        bias_gradient,
        nonnegative_features=observation.facts.nonnegative_features,
        label_format=None if known.concealed else known.label_format,
        rng=rng,
    )
    return Reconstruction(
        OUTCOMES[found.outcome],
        soft_labels=found.soft_labels if bool(found.soft_labels.isfinite().all()) else None,
        features=found.features if bool(found.features.isfinite().all()) else None,
        notes={"reason": found.reason},
    )


def _without_concealed(found: Reconstruction, n: int) -> Reconstruction:
    """The n examples whose labels are the nearest to a single class: the others' are mixed."""
    if found.soft_labels is None:
        return Reconstruction(found.outcome, notes=found.notes)
    own = found.soft_labels.amax(dim=1).topk(n).indices
    features = None if found.features is None else found.features[own]
    return Reconstruction(found.outcome, found.soft_labels[own], features, notes=found.notes)


def _reconstruction(found: SoftLabelSolution, factor: float = 1.0) -> Reconstruction:
    labels, features = found.soft_labels, found.features
    notes: dict[str, float | str] = {
        "reason": str(found.reason),
        "label_format": str(found.label_format),
        "lam": float(found.lam),
        "row": int(found.row),
        "clipping_factor": factor,
    }
    return Reconstruction(
        OUTCOMES[found.outcome],
        soft_labels=None if labels is None else labels[None],
        features=None if features is None else (features / factor)[None],
        notes=notes,
    )
