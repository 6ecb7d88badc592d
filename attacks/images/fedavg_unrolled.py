"""FedAvg, unrolled: the client's local steps are simulated inside the matching."""

from dataclasses import dataclass
from typing import ClassVar

from attacks.images._labels import LENGTH
from attacks.images._matching import MatchingAttack, check
from attacks.solvers.gradient_matching import ONE_GRADIENT, DoubleBackward, LocalSteps, Objective
from attacks.solvers.matching_objectives import Cosine, TotalVariation
from attacks.solvers.matching_optimisers import Method, SignedAdam
from bench import registry
from bench.threat import Facts, Observation, Reconstruction, Update


@registry.attacks.register
@dataclass(frozen=True)
class FedAvgUnrolled(MatchingAttack):
    """After Dimitrov et al. 2022: 1 - cos(Δ(x), Δ*) + tv · TV(x) by signed Adam.

    Δ(x) is what the granted number of local steps on x, at the granted rate, would have sent; the derivative
    goes through all of them. The paper also seeks how the client split its data over epochs; here each step
    takes the whole batch, as the suite's client does. A single gradient is one step.

    Attributes:
        labels: where the labels come from: the spec of a label attack; `truth`; or `joint`.
        iterations: steps; nothing else ends the search.
        restarts: how many starts, as one stack; the lowest objective wins.
        lr: the first steps' length, above 0; a tenth of it after 3/8, 5/8 and 7/8 of the iterations.
        tv: the weight of total variation, at least 0.
    """

    name: ClassVar[str] = "fedavg_unrolled"
    title: ClassVar[str] = "FedAvg, unrolled"
    threat_model: ClassVar[str] = "C"
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.12395"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})
    uses: ClassVar[frozenset[str]] = LENGTH

    lr: float = 0.1
    tv: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, {"lr": 0, "tv": 0}, above=("lr",))

    def skip(self, facts: Facts) -> str | None:
        """Of a FedAvg client, the number of steps and the rate have to be granted."""
        if facts.protocol.startswith("fedavg") and not facts.granted >= LENGTH:
            return "needs the client's steps: grant knowledge = ['local_steps', 'local_lr']"
        return super().skip(facts)

    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        if not observation.facts.protocol.startswith("fedavg"):
            return self._matching(observation, gradient, ONE_GRADIENT)
        steps, lr = observation.knowledge.local_steps, observation.knowledge.local_lr
        if steps is None or lr is None:
            raise ValueError("needs the client's steps: grant knowledge = ['local_steps', 'local_lr']")
        return self._matching(observation, gradient, LocalSteps(steps, lr))

    def _matching(self, observation: Observation, gradient: Update, steps: LocalSteps) -> Objective:
        unrolled = DoubleBackward(observation.model, observation.head, gradient, steps)
        return Objective(unrolled, Cosine(), (TotalVariation(self.tv),))

    def _method(self) -> Method:
        return SignedAdam(self.lr)
