"""iDLG's image: DLG with the label that the signs of the head's gradient give away."""

from dataclasses import dataclass
from typing import ClassVar

from attacks.images._matching import DeepLeakage
from bench import registry


@registry.attacks.register
@dataclass(frozen=True)
class IDLGImage(DeepLeakage):
    """Zhao et al. 2020: min ‖∇L(x) - ∇*‖² over images, their labels found beforehand."""

    name: ClassVar[str] = "idlg_image"
    title: ClassVar[str] = "iDLG, images"
    paper: ClassVar[str] = "https://arxiv.org/abs/2001.02610"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})

    labels: str = "idlg"
