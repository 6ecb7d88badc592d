"""What attacks share that take one example's gradient layer by layer, from the head down."""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch

from attacks.solvers.head import Head, recover_head
from attacks.solvers.layers import NotInvertibleError, Row
from attacks.solvers.layerwise import SentGradient
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction


class OneExample(Attack):
    """The base of attacks on one example's whole gradient."""

    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "features", "images"})

    def skip(self, facts: Facts) -> str | None:
        """One example, its gradient rather than the sum of local steps, and all of it."""
        if facts.batch_size != 1:
            return f"needs a batch of one, got {facts.batch_size}"
        if facts.protocol.startswith(("fedavg", "head_withheld")):
            return f"needs the whole gradient of one step, got {facts.protocol}"
        return None


class AfterLambda(OneExample):
    """The base of those that start from λ's label and feature (Wang, Liang, He 2024)."""

    uses: ClassVar[frozenset[str]] = frozenset({"label_format"})

    @property
    def builds_on(self) -> tuple[str, ...]:
        """λ-recovery."""
        return ("lambda_recovery",)

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Soft labels (1, K), features (1, D) and images (1, C, H, W), as far as they are found.

        `DIVERGED` where the gradient is not finite; `UNIDENTIFIABLE`, with the reason in the notes and
        whatever was found, where the architecture can't be undone or the label isn't determined; else what
        the attack says of its image.
        """
        found = Reconstruction(Outcome.UNIDENTIFIABLE)
        for name, sent in observation.update.items():
            if not bool(sent.isfinite().all()):
                reason = f"the gradient of {name} is not finite"
                return replace(found, outcome=Outcome.DIVERGED, notes={"reason": reason})
        try:
            head = recover_head(
                observation.head_weight_gradient,
                observation.head_weight,
                observation.head_bias,
                observation.head_bias_gradient,
                observation.knowledge.label_format,
            )
            found = replace(
                found,
                soft_labels=None if head.soft_labels is None else head.soft_labels[None],
                features=head.features[None].to(observation.head_weight),
                notes=head.notes,
            )
            return self._with_image(found, head, observation, rng)
        except NotInvertibleError as error:
            return replace(found, notes=found.notes | {"reason": str(error)})

    @abstractmethod
    def _with_image(
        self, found: Reconstruction, head: Head, observation: Observation, rng: torch.Generator
    ) -> Reconstruction:
        """`found`, label and feature, with the image and the outcome.

        Raises:
            NotInvertibleError: the architecture can't be undone, or something needed was not sent.
        """


def sent_gradients(observation: Observation, row: Row) -> list[SentGradient]:
    """What was sent of each layer, by its folded weight.

    Raises:
        NotInvertibleError: a weight's gradient was not sent.
    """
    found = []
    for layer in row.layers:
        sent = observation.update.get(f"{layer.name}.weight")
        if sent is None:
            raise NotInvertibleError(f"the gradient of {layer.name}.weight was not sent")
        bias = observation.update.get(f"{layer.name}.bias")
        weight = sent.double() / layer.gain.reshape(-1, *[1] * (sent.ndim - 1))
        found.append(SentGradient(weight, None if bias is None else bias.double()))
    return found
