"""A stack's columns are those that its trials have one by one."""

import pytest
import torch

from bench.metrics import score
from bench.metrics.stacks import Truth, scores
from bench.threat import Batch, Outcome, Reconstruction

K, D = 5, 7


def truth(seed: int, n: int = 1) -> Truth:
    rng = torch.Generator().manual_seed(seed)
    soft_labels = torch.rand(n, K, generator=rng).softmax(1)
    released = Batch(torch.rand(n, 1, 6, 6, generator=rng), soft_labels)
    private = Batch(released.images, torch.eye(K)[torch.randint(K, (n,), generator=rng)])
    return Truth(released, private, torch.rand(n, D, generator=rng))


def answers(about: Truth, seed: int) -> list[Reconstruction]:
    """Right, wrong, in another type, broken, of another shape, with more and with less."""
    rng = torch.Generator().manual_seed(seed)
    labels, features = about.released.soft_labels, about.features
    noisy = labels + 0.1 * torch.rand(labels.shape, generator=rng)
    broken = torch.full_like(labels, torch.nan)
    parts = [
        (labels, features, None),
        (noisy, None, None),
        (noisy.double(), features, None),
        (broken, features * torch.inf, None),
        (labels[:, :-1], features, None),
        (noisy, features[:, :-1], None),
        (None, features, None),
        (None, None, None),
        (noisy, features, about.released.images),
    ]
    return [Reconstruction(Outcome.OK, *part) for part in parts]


@pytest.mark.parametrize("produces", [{"soft_labels"}, {"features"}, {"soft_labels", "features"}, {"images"}])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stack_is_scored_as_its_trials_are(n, produces):
    about = [truth(seed, n) for seed in range(4)]
    made = [(one, answer) for seed, one in enumerate(about) for answer in answers(one, seed)]
    together = scores([answer for _, answer in made], [one for one, _ in made], frozenset(produces))
    for (one, answer), columns in zip(made, together, strict=True):
        alone = score(
            answer.soft_labels,
            answer.features,
            answer.images,
            released=one.released,
            private=one.private,
            true_features=one.features,
            produces=frozenset(produces),
        )
        assert columns.keys() == alone.keys()
        for name, value in alone.items():
            assert type(columns[name]) is type(value)
            near = value is not None and columns[name] == pytest.approx(value, rel=1e-12, abs=1e-15)
            assert near or value is None, name
