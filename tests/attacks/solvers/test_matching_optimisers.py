"""Adam and L-BFGS against torch's, the line search on what it must reach, and how descents end."""

import math

import pytest
import torch

from attacks.solvers.matching_optimisers import (
    LBFGS,
    Adam,
    SignedAdam,
    Value,
    constant,
    cosine_decay,
    descend,
    step_decay,
)


def value_of(function):
    """A function of (R, …) -> (R,) as an objective, its slopes by autograd."""

    def evaluate(variables):
        leaves = [value.detach().requires_grad_() for value in variables]
        with torch.enable_grad():
            total = function(*leaves)
            slopes = torch.autograd.grad(total.sum(), leaves)
        return Value(total.detach(), total.detach(), slopes)

    return evaluate


def rosenbrock(x):
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(dim=1)


def start(rows=3):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def points(function, at, method, iterations):
    """Where the method looks."""
    seen = []

    def noted(variables):
        seen.append(variables[0].clone())
        return value_of(function)(variables)

    descend(noted, (at,), method, iterations, boxed=False)
    return seen


def by_torch(function, at, make, steps, change=lambda slope: slope):
    at = at.clone().requires_grad_()
    optimizer = make([at])

    def closure():
        total = function(at).sum()
        at.grad = change(torch.autograd.grad(total, at)[0])
        return total

    for _ in range(steps):
        optimizer.step(closure)
    return at.detach()


def test_adam_is_torchs():
    theirs = by_torch(rosenbrock, start(), lambda x: torch.optim.Adam(x, lr=0.01), 30)
    torch.testing.assert_close(points(rosenbrock, start(), Adam(0.01), 30)[30], theirs)


def test_signed_adam_is_torchs_on_signs():
    theirs = by_torch(rosenbrock, start(), lambda x: torch.optim.Adam(x, lr=0.01), 30, torch.sign)
    found = points(rosenbrock, start(), SignedAdam(0.01, constant), 30)[30]
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-6)  # its ε is 1e-8 of each step


@pytest.mark.parametrize("memory", [3, 50])
def test_lbfgs_without_a_line_search_is_torchs_for_each_of_a_stack(memory):
    at, quiet = 0.1 * start(), {"tolerance_grad": 0, "tolerance_change": 0}
    found = points(rosenbrock, at, LBFGS(memory, "none", lr=0.001), 15)[15]
    for row in range(len(at)):
        theirs = by_torch(
            rosenbrock,
            at[row : row + 1],
            lambda x: torch.optim.LBFGS(x, lr=0.001, max_iter=15, history_size=memory, **quiet),
            1,
        )
        torch.testing.assert_close(found[row], theirs[0], rtol=0, atol=1e-12)


def test_no_step_without_a_line_search_is_longer_than_the_longest():
    free, bound = (
        points(rosenbrock, start(), LBFGS(line_search="none", **limit), 40)
        for limit in ({}, {"longest": 0.05})
    )
    lengths = torch.stack(bound).diff(dim=0).square().mean(dim=2).sqrt()
    assert lengths.max() == pytest.approx(0.05)
    assert torch.stack(free).diff(dim=0).square().mean(dim=2).sqrt().max() > 0.05
    assert (rosenbrock(bound[-1]) < rosenbrock(bound[0])).all()


def test_lbfgs_with_a_line_search_reaches_minima_and_says_so():
    end = descend(value_of(rosenbrock), (start(),), LBFGS(), 400, boxed=False)
    slope = value_of(rosenbrock)(end.variables).slopes[0]
    assert slope.abs().max() < 1e-6
    assert set(end.ends) == {"no lower point"}
    assert end.iterations < 400


def test_each_point_of_the_line_search_meets_armijo_where_it_is_taken():
    end = descend(value_of(rosenbrock), (start(),), LBFGS(), 60, boxed=False)
    assert all(total < first for total, first in zip(end.totals, rosenbrock(start()).tolist(), strict=True))


def test_a_line_search_comes_back_from_where_the_objective_is_not_finite():
    def walled(x):
        return torch.where(x.abs().amax(dim=1) > 1, torch.nan, rosenbrock(x / 3))

    end = descend(value_of(walled), (start().clamp(-0.9, 0.9),), LBFGS(first_step=10), 100, boxed=False)
    assert all(math.isfinite(total) for total in end.totals)
    assert "not finite" not in end.ends


@pytest.mark.parametrize("method", [Adam(0.1), SignedAdam(0.1), LBFGS(), LBFGS(line_search="none")])
def test_of_a_stack_each_goes_its_own_way(method):
    together = descend(value_of(rosenbrock), (start(),), method, 20, boxed=False)
    for row in range(3):
        alone = descend(value_of(rosenbrock), (start()[row : row + 1],), method, 20, boxed=False)
        torch.testing.assert_close(together.variables[0][row], alone.variables[0][0])
        assert together.totals[row] == pytest.approx(alone.totals[0])


def test_one_that_is_never_finite_takes_none_with_it():
    def function(x):
        return rosenbrock(x) + torch.tensor([0, torch.nan, 0])

    end = descend(value_of(function), (start(),), SignedAdam(0.01), 10, boxed=False)
    assert end.ends == ["step limit", "not finite", "step limit"]
    assert torch.equal(end.variables[0][1], start()[1])
    assert end.totals[1] == math.inf


def test_one_that_stops_being_finite_leaves_the_best_so_far():
    calls = iter([1.0, 1.0, torch.nan])
    end = descend(
        value_of(lambda x: x.sum(dim=1) * next(calls)), (torch.ones(1, 1),), SignedAdam(0.1), 3, boxed=True
    )
    assert end.ends == ["not finite"]
    assert end.variables[0].item() == pytest.approx(0.9)
    assert end.totals == pytest.approx([0.9])


def test_one_that_is_close_enough_stops():
    end = descend(
        value_of(lambda x: x.square().sum(dim=1)), (torch.tensor([[1.0], [9.0]]),), SignedAdam(0.1), 30,
        boxed=False, enough=1e-3,
    )  # fmt: skip
    assert end.ends == ["matched", "step limit"]
    assert end.distances[0] <= 1e-3


def test_the_lowest_total_is_kept_with_its_point():
    seen = []

    def rises_again(x):
        seen.append((x.sum(dim=1) - 2.2).square())
        return seen[-1]

    end = descend(value_of(rises_again), (torch.full((1, 4), 0.5),), SignedAdam(0.05), 10, boxed=True)
    assert len(seen) == 11
    assert end.totals[0] == min(total.item() for total in seen)
    assert rises_again(end.variables[0]).item() == end.totals[0]


def test_the_last_step_is_judged_too():
    end = descend(
        value_of(lambda x: x.sum(dim=1)), (torch.full((1, 1), 0.5),), SignedAdam(0.25), 1, boxed=True
    )
    assert end.totals == [0.25]


def test_the_first_variable_stays_between_0_and_1_and_others_need_not():
    def function(x, y):
        return (x - 9).square().sum(dim=1) + (y + 9).square().sum(dim=1)

    at = torch.full((1, 4), 0.5), torch.zeros(1, 3)
    end = descend(value_of(function), at, SignedAdam(0.5), 100, boxed=True)
    assert torch.equal(end.variables[0], torch.ones(1, 4))
    assert (end.variables[1] < -1).all()


def test_a_watch_hears_of_every_iteration():
    heard = []
    descend(
        value_of(rosenbrock), (start(),), Adam(0.01), 5, boxed=False, watch=lambda *told: heard.append(told)
    )
    assert [iteration for iteration, _ in heard] == list(range(6))
    assert all(later <= earlier for earlier, later in zip(heard[0][1], heard[-1][1], strict=True))


def test_schedules():
    assert [step_decay(i / 8) for i in range(8)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert [cosine_decay(share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
