"""breaching's optimisation attacks as peers, on the observation that ours get, in the same records.

Nine of its presets, as they are in 0.1.2, each with its own objective, regularisers, start and optimiser;
iterations, restarts and the source of the labels are ours to set. What is known to be wrong with them, and is
left as it is:

- `legacy` and `modern` pull the head's input towards ∇W_c / ∇b_c of the last two gradients, c an example's
  label: they need a head with a bias and hard labels (the argmax is given);
- the candidate that is kept is the one *after* a step, judged by the loss *before* it;
- total variation takes what lies beyond the right and lower borders for black;
- `seethroughgradients` and `legacy` match batch norm's running statistics, which breaching resets for a
  client in train mode; the former is GradInversion without its group consistency;
- after a warm-up the learning rate follows a schedule that is as long as the whole search, and never ends.

What the adapter mends, because nothing would run or be learnt otherwise:

- `deepleakage` and `tag` report, and judge restarts by, the argmax of another draw than the labels that they
  optimised: here these are reported, as distributions, and judged by;
- total variation and patterned starts are made for three channels: a grey image gets one;
- a warm-up of 50 iterations takes a tenth of a short search at most;
- gradients are copied, since some of its steps divide them in place.

Left out: `analytic` (flatten and one linear layer only), `rgap` (minutes for two convolutions; ours is the
attack `rgap`), `multiscale_ghiasi` (broken), `imprint`, `decepticon` and `april_analytic` (an active server).

breaching draws from torch's global generator, which is seeded from the trial's and put back. Importing it
takes seconds, and happens in the first trial.
"""

import importlib
import importlib.util
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attacks.images._labels import JOINT, LENGTH, TRUTH, GivenLabels, drawing_from
from bench import registry
from bench.threat import Facts, Observation, Outcome, Reconstruction
from bench.torchvision_ops import ensure_importable

JOINT_PRESETS = ("deepleakage", "tag")
BIAS_PRESETS = ("legacy", "modern")

UNITS = {1: ((0.1307,), (0.3081,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
"""Channels -> mean and deviation of the units in which breaching works: those of natural images."""


@registry.attacks.register
@dataclass(frozen=True)
class Breaching(GivenLabels):
    """Geiping et al., the breaching library: its configurations, one a spec.

    It works in units of natural images' deviation, as its step lengths and weights are meant.

    Attributes:
        preset: the configuration's name.
        iterations: steps, at least 1; nothing else ends the search. The presets themselves take 24,000
            (`invertinggradients`, `legacy`, `modern`, `clsattack`), 20,000 (`seethroughgradients`), 1,200
            (`deepleakage`), 1,000 (`tag`), 400 (`beyondinfering`) and 300 (`wei`); a step of `deepleakage`,
            `beyondinfering` and `wei` is one of L-BFGS, up to 25 evaluations.
        restarts: how many starts; the one that matches the gradient best wins.
        labels: where the labels come from: the spec of a label attack (`breaching_labels` for its own),
            `truth` (granted: an upper bound), or `joint`, which `deepleakage` and `tag` do and no other.
    """

    name: ClassVar[str] = "breaching"
    title: ClassVar[str] = "breaching"
    paper: ClassVar[str] = "https://github.com/JonasGeiping/breaching"
    threat_model: ClassVar[str] = "B"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})

    preset: Literal[
        "invertinggradients",
        "legacy",
        "modern",
        "clsattack",
        "seethroughgradients",
        "beyondinfering",
        "wei",
        "deepleakage",
        "tag",
    ] = "invertinggradients"
    iterations: int = 1000
    restarts: int = 1
    labels: str = "lambda_recovery"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} is not at least 1; breaching uses up to 24000")
        if self.restarts < 1:
            raise ValueError(f"restarts={self.restarts} is not at least 1")
        if (self.labels == JOINT) != (self.preset in JOINT_PRESETS):
            raise ValueError(
                f"preset={self.preset!r} with labels={self.labels!r}: "
                f"{' and '.join(JOINT_PRESETS)} move labels along with images, labels='joint'; no other does"
            )
        self._take_labels(LENGTH)

    def skip(self, facts: Facts) -> str | None:
        """The packages, every gradient, what the preset reads, and what its labels need."""
        if importlib.util.find_spec("breaching") is None or importlib.util.find_spec("omegaconf") is None:
            return "needs the packages breaching and omegaconf: pip install breaching omegaconf"
        if facts.image_shape[0] not in UNITS:
            return f"needs grey or colour images, got {facts.image_shape[0]} channels"
        if facts.protocol == "head_withheld":
            return "needs the gradient of every parameter: breaching pairs them up in order"
        if self.preset in BIAS_PRESETS and not facts.head_bias:
            return f"preset={self.preset!r} needs a last layer with a bias: it divides by its gradient"
        if facts.protocol.startswith("fedavg"):
            if not facts.granted >= LENGTH:
                return "needs the client's steps and rate: grant knowledge = ['local_steps', 'local_lr']"
            if self.labels == JOINT:
                return "moves its labels in single steps alone"
        return super().skip(facts)

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W), and soft labels (N, K) unless they were granted.

        `STEP_LIMIT`, as the search always takes all its iterations; `DIVERGED` where no start ends in a
        finite match; `UNIDENTIFIABLE` where the update is zero or incomplete; the label attack's own outcome
        where it finds no labels.
        """
        names = [name for name, _ in observation.model.named_parameters()]
        missing = [name for name in names if name not in observation.update]
        if missing:
            return _no_image(f"the gradient of {missing[0]} was not sent")
        if not any(bool(value.any()) for value in observation.update.values()):
            return _no_image("the update is zero")
        given = self._known(observation, rng)
        if self._lacks(given):
            return replace(given, features=None)
        labels = None if given.soft_labels is None else given.soft_labels.to(observation.head_weight)
        with drawing_from(rng, observation.head_weight.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers, which users can't change
            images, moved, loss = self._reconstruct(observation, labels)
        labels = moved if self.labels == JOINT else labels if self.labels != TRUTH else None
        notes = given.notes | {"loss": loss}
        if not loss < float("inf"):
            return Reconstruction(Outcome.DIVERGED, soft_labels=labels, notes=notes)
        return Reconstruction(Outcome.STEP_LIMIT, soft_labels=labels, images=images, notes=notes)

    def _configuration(self, dtype: torch.dtype) -> Any:
        """The preset over breaching's defaults, read as files: its own loader has a global state."""
        from omegaconf import OmegaConf

        folder = Path(str(importlib.import_module("breaching").__file__)).parent / "config" / "attack"
        read = [OmegaConf.load(folder / f"{name}.yaml") for name in (DEFAULTS, self.preset)]
        configuration = OmegaConf.merge(*read)
        optimiser = configuration.optim
        optimiser.max_iterations = self.iterations
        optimiser.warmup = min(optimiser.warmup, self.iterations // 10)
        configuration.restarts.num_trials = self.restarts
        configuration.impl.dtype = "double" if dtype == torch.float64 else "float"
        return configuration

    def _reconstruct(
        self, observation: Observation, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None, float]:
        """Images, the labels that were moved along (if any), and how far from the gradient they end."""
        ensure_importable()  # breaching imports torchvision
        prepare_attack = importlib.import_module("breaching.attacks").prepare_attack  # several seconds
        facts, like = observation.facts, observation.head_weight
        channels = facts.image_shape[0]
        names = [name for name, _ in observation.model.named_parameters()]
        model = InPixels(observation.model, *UNITS[channels]).to(like)
        model.train(observation.model.training)

        if labels is not None and self.preset in BIAS_PRESETS:
            labels = labels.argmax(dim=1)
        local = None
        if facts.protocol.startswith("fedavg"):
            steps, lr = observation.knowledge.local_steps, observation.knowledge.local_lr
            assert steps is not None  # `skip` says that both are granted
            local = {"steps": steps, "lr": lr, "data_per_step": facts.batch_size, "labels": [labels] * steps}
        public = {
            "parameters": [value.detach() for value in model.parameters()],
            # Without buffers breaching takes the client for one in train mode.
            "buffers": None if model.training else [value.detach() for value in model.buffers()],
            "metadata": Metadata(
                shape=facts.image_shape,
                mean=model.mean.flatten().tolist(),
                std=model.std.flatten().tolist(),
                modality="vision",
                task="classification",
                classes=facts.num_classes,
            ),
        }
        sent = {
            "gradients": [observation.update[name].clone() for name in names],
            "buffers": None,
            "metadata": {"num_data_points": facts.batch_size, "labels": labels, "local_hyperparams": local},
        }
        setup = {"device": like.device, "dtype": like.dtype}
        attacker = prepare_attack(model, nn.CrossEntropyLoss(), self._configuration(like.dtype), setup)
        _fit_channels(attacker, channels)
        ends = _watched(attacker) if labels is None else []
        answer, stats = attacker.reconstruct([public], [sent], server_secrets={})
        images = (answer["data"].detach() * model.std + model.mean).clamp(0, 1).to(like)
        moved = min(ends, key=lambda end: end[0])[1].to(like) if ends else None
        return images, moved, float(stats["opt_value"])


DEFAULTS = "_default_optimization_attack"
"""The configuration under every preset."""


class InPixels(nn.Module):
    """A model of pixels, on images in units of `std` around `mean`, (channels,) each."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.register_buffer("mean", torch.tensor(mean, device=device)[:, None, None])
        self.register_buffer("std", torch.tensor(std, device=device)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        logits: Tensor = self.model(images * self.std + self.mean)
        return logits


class Metadata(dict[str, Any]):
    """A dictionary whose entries are attributes, too: breaching asks for them in both ways."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _no_image(reason: str) -> Reconstruction:
    return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": reason})


def _fit_channels(attacker: Any, channels: int) -> None:
    """Lets total variation and starts, made for three channels, have as many as the images."""
    for regularizer in attacker.regularizers:
        if channels != 3 and hasattr(regularizer, "double_opponents"):
            regularizer.double_opponents, regularizer.groups = False, channels
            regularizer.weight = regularizer.weight[: 2 * channels]
    draw = attacker._initialize_data

    def drawn(shape: Any) -> Tensor:
        start: Tensor = draw(shape)
        if start.shape == torch.Size(shape):
            return start
        return start.detach()[:, :channels].clone().requires_grad_()

    attacker._initialize_data = drawn


def _watched(attacker: Any) -> list[tuple[float, Tensor]]:
    """Lets a joint attack judge each start by the labels that it ended with; they come into the list."""
    ends: list[tuple[float, Tensor]] = []
    run_trial, score_trial = attacker._run_trial, attacker._score_trial
    last: list[Tensor] = []

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        images, logits = run_trial(*arguments)
        last[:] = [torch.softmax(logits, dim=-1)]
        return images, logits

    def score(candidate: Tensor, _: Tensor, models: Any, data: Any) -> Any:
        value = score_trial(candidate, last[0], models, data)
        ends.append((float(value), last[0]))
        return value

    attacker._run_trial, attacker._score_trial = run, score
    return ends
