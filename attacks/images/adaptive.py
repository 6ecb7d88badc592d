"""An image attack by an attacker who is told the defense: it undoes what can be undone, before and after.

- Rounds on the same batch are averaged.
- Soteria masks the last layer: it is left out of what is matched (Balunović et al. 2022).
- PRECODE's first layer is linear and has a bias. Of one example it gives its input h exactly, and with it
  ∂L/∂h, all that the network before it sees of label, bottleneck and noise. So the bottleneck and all after
  it are replaced by a linear head with a label of its own that has this very derivative: what is left is an
  undefended network. Of several examples both are left out.
- Of a recovered mix, the private part is sought: CutMix' box has sharp edges, and the label says how large it
  is; the halves of mixup are told apart by what images of their classes look like, where public ones are
  granted.
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.solvers.unmixing import filled, find_box, unmix
from bench import registry
from bench.registry import Spec
from bench.threat import Attack, Facts, Knowledge, Observation, Reconstruction, Update, grant, mask


@registry.attacks.register
@dataclass(frozen=True)
class Adaptive(Attack):
    """Balunović et al. 2022 for Soteria; ours for PRECODE (of one example), CutMix and mixup.

    What it answers is meant to be the private batch, not the released one.

    Attributes:
        attack: the spec of the image attack, which is granted the labels found as if they were true.
        labels: that of the label attack.
    """

    name: ClassVar[str] = "adaptive"
    title: ClassVar[str] = "an image attack, told the defense"
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.04706"
    threat_model: ClassVar[str] = "C"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})
    uses: ClassVar[frozenset[str]] = frozenset({"defense", "auxiliary"})

    attack: str = "inverting_gradients(labels='truth')"
    labels: str = "lambda_recovery_adaptive"

    def __post_init__(self) -> None:
        if "images" not in self._images.produces:
            raise ValueError(f"attack={self.attack!r} is an attack that finds no images")
        if "soft_labels" not in self._labels.produces:
            raise ValueError(f"labels={self.labels!r} is an attack that finds no labels")
        taken = (self._images.uses - {"soft_labels"}) | self._labels.uses
        object.__setattr__(self, "uses", type(self).uses | taken)

    @property
    def _images(self) -> Attack:
        return registry.attacks.make(self.attack)

    @property
    def _labels(self) -> Attack:
        return registry.attacks.make(self.labels)

    @property
    def builds_on(self) -> tuple[str, ...]:
        """Both attacks."""
        return self.attack, self.labels

    def skip(self, facts: Facts) -> str | None:
        """Needs the spec, and what both attacks need."""
        if "defense" not in facts.granted:
            return "needs the defense's spec: grant knowledge = ['defense']"
        if reason := self._labels.skip(replace(facts, granted=facts.granted & self._labels.uses)):
            return f"labels={self.labels!r}: {reason}"
        granted = (facts.granted | {"soft_labels"}) & self._images.uses
        reason = self._images.skip(replace(facts, granted=granted))
        return None if reason is None else f"attack={self.attack!r}: {reason}"

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W) and soft labels (N, K), those of the private batch where they can be told."""
        found = self._labels.run(
            replace(
                observation,
                update=mask(observation.update, observation.head, self._labels.reads),
                later_updates=tuple(
                    mask(update, observation.head, self._labels.reads) for update in observation.later_updates
                ),
                knowledge=grant(observation.knowledge, self._labels.uses),
            ),
            rng,
        )
        if found.soft_labels is None:
            reason = f"labels={self.labels!r}: {found.notes.get('reason') or found.outcome.value}"
            return Reconstruction(found.outcome, notes={**found.notes, "reason": reason})
        spec = observation.knowledge.defense
        parts = [registry.parse(part) for part in registry.split_chain("none" if spec is None else spec)]
        seen = replace(
            observation,
            update=mean_of_rounds(observation),
            later_updates=(),
            knowledge=replace(observation.knowledge, soft_labels=found.soft_labels),
        )
        names = [part.target for part in parts]
        if "precode" in names:
            seen = without_bottleneck(seen)
        answer = Reconstruction(found.outcome)
        if "soteria" in names:
            answer = self._attacked(without(seen, f"{seen.head}.weight"), rng)
        if answer.images is None:  # also where an attack needs the masked layer
            answer = self._attacked(seen, rng)
        notes = {**found.notes, **answer.notes}
        if answer.images is None:
            return Reconstruction(answer.outcome, found.soft_labels, notes=notes)
        images, labels = answer.images, found.soft_labels
        for part in parts[::-1]:
            if part.target in ("cutmix", "mixup"):
                images, labels = private_parts(images, labels, part, observation.knowledge)
        return Reconstruction(answer.outcome, labels, images=images, notes=notes)

    def _attacked(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        """The image attack's answer, given the labels found as if they were true."""
        granted = (seen.facts.granted | {"soft_labels"}) & self._images.uses
        facts, knowledge = replace(seen.facts, granted=granted), grant(seen.knowledge, self._images.uses)
        return self._images.run(replace(seen, facts=facts, knowledge=knowledge), rng)


def mean_of_rounds(observation: Observation) -> Update:
    """The updates of all rounds, averaged: parameter name -> tensor of its shape."""
    updates = (observation.update, *observation.later_updates)
    return {name: torch.stack([one[name] for one in updates]).mean(0) for name in observation.update}


def without(observation: Observation, *left_out: str) -> Observation:
    """The observation without what was sent of these parameters or modules."""
    kept = {
        name: value
        for name, value in observation.update.items()
        if not any(name == one or name.startswith(f"{one}.") for one in left_out)
    }
    return replace(observation, update=kept)


def without_bottleneck(observation: Observation) -> Observation:
    """As if there were no PRECODE: see this module's first lines.

    The new head's weight is rank one, W₀ = e₁ dᵀ with d = ∂L/∂h: for the label e₀ its derivative by h is
    p₁ d, and those of all layers below, and its own, follow from what was sent.
    """
    parent = observation.head.rpartition(".")[0]  # holds the bottleneck and the head
    encoder = f"{parent}.bottleneck.encoder"
    below = without(observation, f"{parent}.bottleneck", observation.head)
    weight, bias = (observation.update.get(f"{encoder}.{kind}") for kind in ("weight", "bias"))
    alone = observation.facts.batch_size == 1 and not observation.facts.protocol.startswith("fedavg")
    if not parent or not alone or weight is None or bias is None or not bool(bias.any()):
        return below
    features = weight.T @ bias / bias.square().sum()  # h (D,): ∇W = δ hᵀ, ∇b = δ
    derivative = observation.model.get_parameter(f"{encoder}.weight").detach().T @ bias  # ∂L/∂h (D,)
    length = torch.linalg.vector_norm(derivative)
    if not bool(length > 0):
        return below
    rows = torch.zeros(observation.facts.num_classes, len(features), dtype=bias.dtype, device=bias.device)
    rows[1] = derivative / length
    label = torch.zeros_like(rows[:, 0])
    label[0] = 1
    # Any length of d will do; one for which head and body weigh alike in the gradient is matched best.
    size = torch.stack([value.square().sum() for value in below.update.values()]).sum().sqrt() / length
    factors = torch.logspace(-2, 4, 61, dtype=bias.dtype, device=bias.device)
    tried = torch.softmax(factors[:, None] * (rows @ features), dim=1)
    weights = factors * tried[:, 1] * size / (tried - label).norm(dim=1) / features.norm()
    factor = factors[weights.log().abs().argmin()]
    classes, width = rows.shape
    head = nn.Linear(width, classes, bias=False, device=bias.device, dtype=bias.dtype)
    head.load_state_dict({"weight": factor * rows})
    p = torch.softmax(factor * (rows @ features), dim=0)
    model = copy.deepcopy(observation.model)
    above, _, leaf = parent.rpartition(".")
    setattr(model.get_submodule(above), leaf, head)
    update = {name: factor * p[1] / length * value for name, value in below.update.items()}
    update[f"{parent}.weight"] = torch.outer(p - label, features)
    facts = replace(observation.facts, feature_width=len(features), head_bias=False)
    knowledge = replace(observation.knowledge, soft_labels=label[None])
    return Observation(model, update, parent, facts, knowledge)


def private_parts(
    images: Tensor, labels: Tensor, defense: Spec, knowledge: Knowledge
) -> tuple[Tensor, Tensor]:
    """What of recovered mixes (N, C, H, W), (N, K) was the client's batch, by its best guess."""
    separate = _without_box if defense.target == "cutmix" else _without_partner
    found = [separate(image, label, defense, knowledge) for image, label in zip(images, labels, strict=True)]
    private = torch.stack([torch.as_tensor(index, device=labels.device) for _, index in found])
    hard = torch.nn.functional.one_hot(private, labels.shape[1]).to(labels)
    return torch.stack([image for image, _ in found]), hard


def _mix(label: Tensor) -> torch.return_types.topk:
    """The two largest shares of a label (K,), what smoothing gave to all taken off."""
    above = label - label.amin() if len(label) > 2 else label
    return (above / above.sum()).topk(2)


def _without_box(image: Tensor, label: Tensor, defense: Spec, knowledge: Knowledge) -> tuple[Tensor, int]:
    """The image outside of the pasted box, and its class: the box has either's share of the label."""
    two = _mix(label)
    inside, pasted = find_box(image, (float(two.values[1]), float(two.values[0])))
    return filled(image, inside), int(two.indices[pasted])


def _without_partner(image: Tensor, label: Tensor, defense: Spec, knowledge: Knowledge) -> tuple[Tensor, int]:
    """One image of a mix of two: that whose weight is in the defense's range, else the heavier one."""
    two = _mix(label)
    shares, classes = (two.values / two.values.sum()).tolist(), two.indices.tolist()
    allowed = [defense.parameters["low"] <= share <= defense.parameters["high"] for share in shares]
    own = 1 if allowed == [False, True] else 0
    public = knowledge.auxiliary
    if public is None or not 0 < shares[own] < 1:
        return image, classes[own]
    of_public = public.soft_labels.argmax(1)
    if not all(bool((of_public == one).any()) for one in classes):
        return image, classes[own]
    return unmix(image, shares[own], classes[own], classes[1 - own], public.images, of_public), classes[own]
