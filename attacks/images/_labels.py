"""Where an image attack's labels come from: another attack, the truth where granted, or the search itself.

So iDLG's label, the λ label and the true label are three rows of one attack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction, grant, mask

TRUTH, JOINT = "truth", "joint"
LENGTH = frozenset({"local_steps", "local_lr"})


class GivenLabels(Attack):
    """The base of attacks with a parameter `labels`; its `__post_init__` calls `_take_labels`."""

    labels: str

    def _take_labels(self, uses: frozenset[str]) -> None:
        """Checks where the labels come from; what is used and produced beside `uses` depends on it.

        Raises:
            ValueError: it is an attack that finds no labels.
        """
        attack = self._label_attack
        if attack is not None and "soft_labels" not in attack.produces:
            raise ValueError(f"labels={self.labels!r} is an attack that finds no labels")
        # What depends on `labels` stands on the instance, before the class's own.
        truth = frozenset({"soft_labels"} if self.labels == TRUTH else ())
        uses = type(self).uses | uses | (truth if attack is None else attack.uses)
        object.__setattr__(self, "uses", uses)
        object.__setattr__(self, "produces", type(self).produces - truth)

    @property
    def _label_attack(self) -> Attack | None:
        """The attack that `labels` names, if it names one."""
        return None if self.labels in (TRUTH, JOINT) else registry.attacks.make(self.labels)

    @property
    def builds_on(self) -> tuple[str, ...]:
        """The label attack."""
        return () if self.labels in (TRUTH, JOINT) else (self.labels,)

    def _lacks_truth(self, facts: Facts) -> bool:
        return self.labels == TRUTH and "soft_labels" not in facts.granted

    def skip(self, facts: Facts) -> str | None:
        """Needs what its labels need."""
        if self._lacks_truth(facts):
            return "needs the true labels: grant knowledge = ['soft_labels']"
        attack = self._label_attack
        reason = None if attack is None else attack.skip(facts)
        return None if reason is None else f"labels={self.labels!r}: {reason}"

    def _known(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """What is known beforehand: labels (N, K), granted or found; the label attack's reason if not."""
        if self.labels == JOINT:
            return Reconstruction(Outcome.OK)
        if self.labels != TRUTH:
            return ask(self.labels, "labels", observation, rng)
        if observation.knowledge.soft_labels is None:
            raise ValueError("labels='truth' needs the true labels: grant knowledge = ['soft_labels']")
        return Reconstruction(Outcome.OK, observation.knowledge.soft_labels)

    def _lacks(self, given: Reconstruction) -> bool:
        """Whether without it there is no image."""
        return self.labels != JOINT and given.soft_labels is None


def ask(spec: str, parameter: str, observation: Observation, rng: torch.Generator) -> Reconstruction:
    """What another attack finds; it sees what it reads and is granted what it uses."""
    attack = registry.attacks.make(spec)
    seen = replace(
        observation,
        update=mask(observation.update, observation.head, attack.reads),
        knowledge=grant(observation.knowledge, attack.uses),
    )
    found = attack.run(seen, rng)
    notes = dict(found.notes)
    if found.outcome is not Outcome.OK:
        notes["reason"] = f"{parameter}={spec!r}: {notes.get('reason') or found.outcome.value}"
    elif found.soft_labels is None and found.features is None:
        raise TypeError(f"{parameter}={spec!r} returned no labels and said that all is well")
    return Reconstruction(found.outcome, found.soft_labels, found.features, notes=notes)


@contextmanager
def drawing_from(rng: torch.Generator, device: torch.device) -> Iterator[None]:
    """Whatever draws from torch's global generator inside (dropout in train mode) follows `rng`."""
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
