"""The format of a soft label: all but k classes share one value e."""

from torch import Tensor

NAMES = {
    (1, False): "hard",
    (1, True): "smoothing",
    (2, False): "mixup",
    (2, True): "smoothed_mixup",
}


def label_format(soft_label: Tensor) -> str:
    """The format of one label (K,), by the value that all but k classes share: `hard`, `mixup`, `k_mix`, ….

    >>> import torch
    >>> label_format(torch.tensor([0.0, 0.7, 0.3, 0.0, 0.0]))
    'mixup'
    >>> label_format(torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    'smoothing'
    """
    return label_formats(soft_label[None])[0]


def label_formats(soft_labels: Tensor) -> list[str]:
    """The format of each label, (M, K)."""
    shared = soft_labels.amin(dim=1, keepdim=True)  # what stands out has more than all share, e = 0 or ε/K
    standing_out = ((soft_labels - shared).abs() > 1e-6).sum(dim=1).tolist()
    smoothed = (shared[:, 0] > 1e-6).tolist()
    return [
        NAMES.get(kind, "smoothed_k_mix" if kind[1] else "k_mix")
        for kind in zip(standing_out, smoothed, strict=True)
    ]
