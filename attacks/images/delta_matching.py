"""δ-matching: a ReLU net's exact input from one gradient, by Gauss-Newton on its last convolution after λ.

λ (Wang, Liang, He 2024) gives the label and the head's input f, hence u = p - y, and where f is the flattened
output of the last convolution's activation, δ = (Wᵀ u) ⊙ σ′(f) there is known without the image. What is left
is to find x with δ ⊛ φ(x) = ∇W and f(x) = f, φ(x) the convolution's input: no derivative of a derivative, and
continuous where gradient matching jumps. See attacks/solvers/known_delta.py.

Where it ends. Below the last convolution anything may lie: ReLU, max and average pooling, shortcuts, batch
norm in eval mode. Above it: batch norm in eval mode, a shortcut, one activation, flattening; not a pooling
(ResNet's global average hides which place gave what), and not a batch norm that takes its statistics from the
batch. One example. The D features and the last convolution's weights have to be more than the pixels.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.images._after_lambda import AfterLambda
from attacks.solvers import known_delta
from attacks.solvers.head import Head
from attacks.solvers.known_delta import Candidate, KnownDelta, Network
from attacks.solvers.layers import NotInvertibleError, activation_of
from bench import registry
from bench.threat import Observation, Outcome, Reconstruction

ELEMENTWISE = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU)
ERRORS = 3
"""How many standard errors above zero a feature counts as alive."""
NOISE, MOST_EXCUSED = 3, 0.1
"""How many times the noise a misfit may be that is put down to it, and how much at most."""
REVISIONS = 10
"""How often an image may change which small features are taken for zero."""
ROUNDING = 2e-6
"""What the residual is at the true image in float32, as a share of its norm."""
SINGLE = 5e-6
"""How far down Gauss-Newton goes in float32, twice as fast, before float64 takes over."""


@registry.attacks.register
@dataclass(frozen=True)
class DeltaMatching(AfterLambda):
    """Ours: signed Adam to the neighbourhood, Gauss-Newton to the image itself, restarts until it fits.

    Attributes:
        iterations: of signed Adam, at least 1.
        lr: its first steps' length, in (0, 1].
        tv: the weight of total variation at the first iteration, above 0.
        tv_end: the same at the last one; no more than `tv`.
        steps: of Gauss-Newton, at least 0.
        restarts: how many starts at most; the lowest misfit wins, and one within `tolerance` ends the search.
        tolerance: the misfit, a share of what was observed, up to which the answer counts as found; under
            noise (seen in the head's gradient) three times that. Rounding leaves 1e-6; a start that got stuck
            1e-3 and more.
    """

    name: ClassVar[str] = "delta_matching"
    title: ClassVar[str] = "δ-matching"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.03124"

    iterations: int = 1000
    lr: float = 0.03
    tv: float = 0.3
    tv_end: float = 0.001
    steps: int = 40
    restarts: int = 4
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} is not at least 1; 1000 is usual")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr={self.lr} is not in (0, 1], the range of pixels; 0.03 is usual")
        if not 0 < self.tv_end <= self.tv < float("inf"):
            raise ValueError(f"tv={self.tv}, tv_end={self.tv_end}: the weight falls, and stays above 0")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} is below 0; 40 is usual")
        if self.restarts < 1:
            raise ValueError(f"restarts={self.restarts} is not at least 1")
        if not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance} is not a number above 0; 1e-4 is usual")

    def _with_image(
        self, found: Reconstruction, head: Head, observation: Observation, rng: torch.Generator
    ) -> Reconstruction:
        """`STEP_LIMIT` where every start ended with a misfit beyond the tolerance, with the best answer."""
        pose = Pose(observation, head, rng)
        best, starts = self._search(pose, head.noise, observation, rng)
        outcome, reason = Outcome.OK, head.doubt
        if not best.misfit <= self._explained(head.noise):
            outcome = Outcome.STEP_LIMIT
            reason = reason or f"{best.misfit:.2g} of what was observed is not explained"
        if head.doubt:
            outcome = Outcome.UNIDENTIFIABLE
        if not bool(best.image.isfinite().all()):
            outcome = Outcome.DIVERGED
        return replace(
            found,
            outcome=outcome,
            images=None
            if outcome is Outcome.DIVERGED
            else best.image.clamp(0, 1)[None].to(observation.head_weight),
            notes=found.notes | {"reason": reason, "misfit": best.misfit, "starts": starts},
        )

    def _explained(self, noise: float) -> float:
        """Up to which misfit an answer counts as found."""
        return max(self.tolerance, min(NOISE * noise, MOST_EXCUSED))

    def _search(
        self, pose: "Pose", noise: float, observation: Observation, rng: torch.Generator
    ) -> tuple[Candidate, int]:
        """The best of all starts, and how many there were."""
        like, best, starts = observation.head_weight, None, 0
        problem, enough = pose.at_first(), max(ROUNDING, 2**0.5 * noise)
        single = problem.single()
        while starts < self.restarts:
            starts += 1
            start = torch.rand(
                observation.facts.image_shape, generator=rng, dtype=torch.float32, device=rng.device
            ).to(like.device)
            near = known_delta.descend(single, start, self.iterations, self.lr, self.tv, self.tv_end)
            with torch.no_grad():
                near = known_delta.polish(single, near, self.steps, max(enough, SINGLE)).image
                found = known_delta.polish(problem, near.double(), self.steps, enough)
                current = problem
                for _ in range(REVISIONS):
                    if found.misfit <= enough:
                        break
                    other = pose.revised(current, found.image)
                    revised = known_delta.polish(other, found.image, self.steps, enough)
                    if not revised.misfit < found.misfit:
                        break
                    found, current = revised, other
            if best is None or found.misfit < best.misfit:
                best = found
            if best.misfit <= self._explained(noise):
                break
        assert best is not None
        return best, starts


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module without children."""

    module: nn.Module
    seen: Tensor
    given: Tensor


class Pose:
    """The problem at the last convolution below the head, in float64.

    Noise on ∇W hides which features of small value are zero, and so whether δ is. Features below a few
    standard errors are zero at first; later an image that nearly fits tells better.
    """

    def __init__(self, observation: Observation, head: Head, rng: torch.Generator) -> None:
        """Finds the convolution by running copies of the model on two random images.

        Raises:
            NotInvertibleError: δ doesn't follow from the features there, or something needed was not sent.
        """
        for name, module in observation.model.named_modules():
            if isinstance(module, nn.Dropout) and module.training and module.p > 0:
                raise NotInvertibleError(f"the model drops units at random, in {name}")
        model = copy.deepcopy(observation.model).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:  # nothing to be kept of an image
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
        shape, device = observation.facts.image_shape, observation.head_weight.device
        images = torch.rand(2, *shape, generator=rng, dtype=torch.float64, device=rng.device).to(device)
        ways = [
            last_calls(calls_of(model, image[None]), model.get_submodule(observation.head))
            for image in images
        ]
        self._features = head.features
        # Each feature is a mean over K rows of ∇W.
        self._std = head.noise * head.features.square().mean().sqrt() / len(head.u) ** 0.5
        if not isinstance(ways[0][1].module, nn.ReLU):
            self._std = torch.zeros_like(self._std)
        self._pulled = observation.head_weight.double().T @ head.u  # by the features
        convolution, self._above = ways[0]
        self._output = convolution.given
        name = next(name for name, module in model.named_modules() if module is convolution.module)
        self._slope = activation_of([self._above.module]).slope
        sent = observation.update.get(f"{name}.weight")
        if sent is None:
            raise NotInvertibleError(f"the gradient of {name}.weight was not sent")
        self._gradient = sent.double()
        pixels, equations = images[0].numel(), head.features.numel() + sent.numel()
        if equations < pixels:
            raise NotInvertibleError(f"{equations} equations for {pixels} pixels")
        probe = torch.linspace(-1, 1, self._above.seen.numel(), dtype=torch.float64, device=device)
        probe = probe.cos().reshape(self._above.seen.shape)
        by_output = [torch.autograd.grad(a.seen, c.given, probe, retain_graph=True)[0] for c, a in ways]
        if not torch.allclose(by_output[0], by_output[1]):
            raise NotInvertibleError(f"what lies between {name} and the activation above it is not linear")
        self._network = Network(model, name, observation.head)
        self._problem = self._posed(head.features.where(head.features.abs() > ERRORS * self._std, 0))
        if not 0 < float(self._problem.delta.norm()) < float("inf"):
            raise NotInvertibleError(f"no gradient at {name}: all of its units are dead for this input")

    def _posed(self, features: Tensor) -> KnownDelta:
        return KnownDelta(self._network, self._pull(self._slope(features)), self._gradient, features)

    def _pull(self, slope: Tensor) -> Tensor:
        """δ (O, H', W') with the activation's slopes (D,)."""
        by_input = (self._pulled * slope).reshape(self._above.seen.shape)
        return torch.autograd.grad(self._above.seen, self._output, by_input, retain_graph=True)[0][0]

    def at_first(self) -> KnownDelta:
        """With small features taken for zero."""
        return self._problem

    def revised(self, problem: KnownDelta, image: Tensor) -> KnownDelta:
        """With other small features taken for zero, where what `problem` leaves at an image says so.

        One unit's δ added to where it is missing, or taken from where it doesn't belong, leaves less of ∇W.
        """
        alive = problem.features > 0
        change = torch.where(alive, -1.0, 1.0) * self._pull(torch.ones_like(self._features)).flatten()
        small = self._features.abs() <= 2 * ERRORS * self._std
        alive = alive ^ problem.switched(image, change.reshape(problem.delta.shape), small).flatten()
        least = torch.finfo(change.dtype).tiny
        return self._posed(torch.where(alive, self._features.clamp_min(least), 0))


def calls_of(model: nn.Module, images: Tensor) -> list[Call]:
    """What the model calls on images, in order; inputs are kept from being overwritten."""
    calls: list[Call] = []
    seen: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen[module] = inputs[0]
        return (inputs[0].clone(), *inputs[1:])

    def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(Call(module, seen.pop(module), output))

    with ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        model(images)
    return calls


def last_calls(calls: list[Call], head: nn.Module) -> tuple[Call, Call]:
    """The convolution from which the features come, and the activation that gives them.

    Raises:
        NotInvertibleError: there is no convolution, or the features are no activation's output.
    """
    last = max((i for i, call in enumerate(calls) if call.module is head), default=0)
    activations = [i for i, call in enumerate(calls[:last]) if isinstance(call.module, ELEMENTWISE)]
    if not activations:
        raise NotInvertibleError("no sigmoid, tanh, ReLU or LeakyReLU is called before the head")
    above, below = activations[-1], activations[-2] if len(activations) > 1 else 0
    if not torch.equal(calls[above].given.flatten(), calls[last].seen.flatten()):
        raise NotInvertibleError("the head's input is not the flattened output of an activation: δ is hidden")
    convolutions = [
        call
        for call in calls[below:above]
        if isinstance(call.module, nn.Conv2d)
        and call.module.groups == 1
        and call.module.padding_mode == "zeros"
    ]
    if not convolutions:
        raise NotInvertibleError("no plain convolution comes right before the last activation")
    # A shortcut has a convolution of its own: the larger one has more to match.
    return max(convolutions, key=lambda call: call.module.weight.numel()), calls[above]  # type: ignore[operator]
