"""Deep Leakage from Gradients: image and label by L-BFGS on the squared distance between gradients."""

from dataclasses import dataclass
from typing import ClassVar

from attacks.images._labels import JOINT
from attacks.images._matching import DeepLeakage
from bench import registry


@registry.attacks.register
@dataclass(frozen=True)
class DLG(DeepLeakage):
    """Zhu et al. 2019: min ‖∇L(x, y) - ∇*‖² over images and the logits of their labels.

    Images start from uniform noise in [0, 1], where the paper's start is Gaussian: that fails more often.
    """

    name: ClassVar[str] = "dlg"
    title: ClassVar[str] = "DLG"
    paper: ClassVar[str] = "https://arxiv.org/abs/1906.08935"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})

    labels: str = JOINT
