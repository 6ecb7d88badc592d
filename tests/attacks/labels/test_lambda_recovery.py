"""λ-recovery as an attack: what it hands to the solver, and what it makes of the answer."""

from dataclasses import replace

import pytest
import torch

from attacks.labels.lambda_recovery import LambdaRecovery
from bench.threat import Knowledge, Outcome, mask

K, D = 10, 24
FORMATS = ["hard", "smoothing", "mixup", "smoothed_mixup"]
WITHIN = 0.01
"""What counts as recovered (`label_error` of the boards)."""


@pytest.fixture
def example(observe, seeded, label):
    """(label's format, …) -> (observation, y, x); the head is the same for every seed."""

    def make(label_format, *, bias=False, seed=0, granted=None, dtype=torch.float64):
        rng, draw = seeded(99), {"dtype": torch.float64, "device": "cpu"}
        weight = torch.rand(K, D, generator=rng, **draw) - 0.5
        b = torch.rand(K, generator=rng, **draw) - 0.5
        x = torch.randn(D, generator=seeded(seed), **draw).relu()
        y = label(K, label_format).roll(seed)
        u = torch.softmax(weight @ x + (b if bias else 0), 0) - y
        parts = (weight.to(dtype), b.to(dtype) if bias else None, u.to(dtype), x.to(dtype))
        return observe(*parts, knowledge=Knowledge(label_format=granted)), y, x

    return make


def error(found, y):
    return float((found.soft_labels[0].double() - y).abs().max())


@pytest.mark.parametrize("label_format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_every_format_with_none_granted(example, seeded, label_format, bias, dtype):
    seen, y, x = example(label_format, bias=bias, dtype=dtype)
    found = LambdaRecovery().run(seen, seeded())
    assert found.outcome is Outcome.OK
    assert found.soft_labels.shape == (1, K)
    assert found.features.shape == (1, D)
    assert found.soft_labels.dtype == found.features.dtype == dtype
    assert error(found, y) <= WITHIN
    assert float((found.features[0].double() - x).norm() / x.norm()) <= WITHIN
    assert found.notes["label_format"] == label_format


def test_its_notes_say_the_papers_scalar(example, seeded):
    seen, _, _ = example("mixup")
    found = LambdaRecovery().run(seen, seeded())
    gradient = seen.head_weight_gradient
    row = found.notes["row"]
    assert row == int(gradient.norm(dim=1).argmax())
    assert torch.allclose(found.notes["lam"] * gradient[row], found.features[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_a_stack_gives_what_each_gives_alone(example, seeded, bias):
    seen = [example(FORMATS[seed % 4], bias=bias, seed=seed)[0] for seed in range(8)]
    together = LambdaRecovery().run_many(seen, [seeded() for _ in seen])
    for one, found in zip(seen, together, strict=True):
        alone = LambdaRecovery().run(one, seeded())
        assert found.outcome is alone.outcome
        assert torch.allclose(found.soft_labels, alone.soft_labels, rtol=0, atol=1e-8)
        assert torch.allclose(found.features, alone.features, rtol=1e-6, atol=1e-8)
        assert found.notes["label_format"] == alone.notes["label_format"]


@pytest.fixture
def asked(monkeypatch):
    """What the solver is asked: (how many examples, keywords) of each call."""
    module = __import__("attacks.labels.lambda_recovery", fromlist=["x"])
    calls, solve = [], module.recover_soft_labels

    def recording(weight_gradient, weight, bias=None, bias_gradient=None, **keywords):
        calls.append({"examples": len(weight_gradient), "bias_gradient": bias_gradient, **keywords})
        return solve(weight_gradient, weight, bias, bias_gradient, **keywords)

    monkeypatch.setattr(module, "recover_soft_labels", recording)
    return calls


@pytest.mark.parametrize("granted", [None, "smoothing", "mixup"])
def test_a_granted_format_is_handed_to_the_solver(example, seeded, asked, granted):
    LambdaRecovery().run(example("smoothing", granted=granted)[0], seeded())
    assert [call["label_format"] for call in asked] == [granted]


@pytest.mark.parametrize("search", ["exact", "lbfgs"])
def test_the_search_is_handed_to_the_solver(example, seeded, asked, search):
    LambdaRecovery(search=search).run(example("hard", granted="hard")[0], seeded())
    assert [call["search"] for call in asked] == [search]


def test_a_granted_format_holds_for_its_own_example_of_a_stack(example, seeded):
    """One scenario's labels differ in format where mixup's partner happens to be of the same class."""
    cases = [
        example(kind, seed=seed, granted=kind) for seed, kind in enumerate(["hard", "mixup", "smoothing"])
    ]
    together = LambdaRecovery().run_many([seen for seen, _, _ in cases], [seeded() for _ in cases])
    for (seen, y, _), found in zip(cases, together, strict=True):
        assert error(LambdaRecovery().run(seen, seeded()), y) <= WITHIN
        assert found.outcome is Outcome.OK
        assert error(found, y) <= WITHIN


def test_one_that_was_withheld_spoils_no_other(example, seeded):
    cases = [example("hard", seed=seed) for seed in range(3)]
    seen = [observation for observation, _, _ in cases]
    seen[1] = replace(seen[1], update={})
    found = LambdaRecovery().run_many(seen, [seeded() for _ in seen])
    assert [one.outcome for one in found] == [Outcome.OK, Outcome.UNIDENTIFIABLE, Outcome.OK]
    assert found[1].soft_labels is None
    assert "not sent" in found[1].notes["reason"]


def test_a_bias_gradient_that_was_withheld_is_done_without(example, seeded, asked):
    seen, y, _ = example("hard", bias=True)
    without = replace(seen, update={"head.weight": seen.update["head.weight"]})
    found = LambdaRecovery().run(without, seeded())
    assert [call["bias_gradient"] for call in asked] == [None]
    assert found.outcome is Outcome.OK
    assert error(found, y) <= WITHIN


def test_a_gradient_of_zero_is_unidentifiable(example, seeded):
    for bias in (False, True):
        seen, _, _ = example("hard", bias=bias)
        nothing = {name: torch.zeros_like(value) for name, value in seen.update.items()}
        found = LambdaRecovery().run(replace(seen, update=nothing), seeded())
        assert found.outcome is Outcome.UNIDENTIFIABLE
        assert found.notes["reason"]


def test_a_bias_gradient_says_the_label_where_the_feature_is_zero(example, seeded):
    seen, y, x = example("mixup", bias=True)
    p = torch.softmax(seen.head_bias, 0)
    sent = {"head.weight": 0 * seen.update["head.weight"], "head.bias": p - y}
    found = LambdaRecovery().run(replace(seen, update=sent), seeded())
    assert found.outcome is Outcome.OK
    assert error(found, y) <= WITHIN
    assert torch.equal(found.features[0], 0 * x)


def test_it_reads_the_head_alone(example, seeded):
    seen, _, _ = example("mixup")
    more = replace(seen, update=seen.update | {"body.weight": torch.ones(2, device="cpu")})
    masked = replace(more, update=mask(more.update, more.head, LambdaRecovery.reads))
    assert set(masked.update) == {"head.weight"}
    whole, part = (LambdaRecovery().run(one, seeded()).soft_labels for one in (more, masked))
    assert torch.equal(whole, part)


def test_it_uses_the_labels_format_and_nothing_else():
    assert LambdaRecovery.uses == {"label_format"}


def test_it_is_skipped_with_the_reason(facts):
    assert LambdaRecovery().skip(facts(batch_size=4)) == "needs a batch of one, got 4"
    for bias in (False, True):
        for nonnegative in (False, True):
            assert LambdaRecovery().skip(facts(head_bias=bias, nonnegative_features=nonnegative)) is None


@pytest.mark.parametrize("search", ["exact", "lbfgs"])
@pytest.mark.parametrize("bias", [False, True])
def test_factories_name_their_device(example, seeded, strict_devices, search, bias):
    seen, _, _ = example("smoothing", bias=bias, granted="smoothing")
    with strict_devices:
        LambdaRecovery(search=search).run(seen, seeded())


@pytest.mark.parametrize(("bias", "share"), [(False, 0.3), (True, 0.3), (True, 0.01)])
def test_a_second_example_is_not_taken_for_noise(example, seeded, bias, share):
    """DCS conceals one beside the private one, FedAvg takes several steps: λ is neither's."""
    (first, _, _), (second, _, _) = (example("hard", bias=bias, seed=seed) for seed in (0, 1))
    both = {name: value + share * second.update[name] for name, value in first.update.items()}
    found = LambdaRecovery().run(replace(first, update=both), seeded())
    assert found.outcome is Outcome.UNIDENTIFIABLE
    if share == 0.01:  # else no label is sharp to begin with
        assert "second direction" in found.notes["reason"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_has_diverged_and_the_rest_of_its_stack_has_not(
    example, seeded, broken
):
    (whole, y, _), (spoilt, _, _) = example("hard"), example("hard", seed=1)
    update = {name: value.clone() for name, value in spoilt.update.items()}
    next(iter(update.values()))[0] = broken
    found = LambdaRecovery().run_many([whole, replace(spoilt, update=update)], [seeded(), seeded()])
    assert [one.outcome for one in found] == [Outcome.OK, Outcome.DIVERGED]
    assert error(found[0], y) <= WITHIN
    assert found[1].notes["reason"] == "the gradient is not finite"
