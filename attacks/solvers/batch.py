"""The entry point for batches: soft labels and features of n examples from one mean gradient.

∇W = (1/n) (P - Y)ᵀ X has rank n and leaves an n × n matrix open: where one example has one scalar λ, a batch
has a vector of them once its directions are told apart. Three routes lead there, each tried where the one
before ends: exact zeros of the features (`batch_zeros`), then one λ an example; labels of few numbers, one
example at a time (`batch_search`), along the few directions that zeros told first; and the λ solver for the
last one. All examples are then fitted together (`batch_polish`), and ∇W is rebuilt: what doesn't rebuild it
is no answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.solvers.batch_polish import Structure, fit_batch, label_structure, softmax_rounding
from attacks.solvers.batch_search import Example, Head, deflate, search
from attacks.solvers.batch_zeros import Factors, Rays, directions_from_zeros
from attacks.solvers.recover import recover_soft_label
from attacks.solvers.solution import (
    FORMATS,
    LABEL_TOLERANCE,
    OK,
    STEP_LIMIT,
    UNIDENTIFIABLE,
    SoftLabelSolution,
    format_name,
)
from attacks.solvers.verdict import SENTENCES, Reason

_RANK = 3.0  # how far the least singular value stands out of the noise's largest
_RANK_ROUNDING = 1e-14  # and, as a share of the greatest, out of rounding
_REDUCED_CHI2 = 25.0
_REBUILT = 1e-4  # the relative residual that rounding may leave, at most
_ERRORS = 3.0
_SAME_DIRECTION = 1 - 1e-6
_TOLERANCES = (1e-7, 1e-5, 1e-3)  # what passes for equal in labels that were found to different precision
_AMBIGUOUS = {SENTENCES[Reason.SEVERAL], SENTENCES[Reason.ONE_TELLER]}  # what no fit would show
_SPIKES = {"hard": (1,), "smoothing": (1,), "mixup": (1, 2), "smoothed_mixup": (1, 2)}
_MOST_SEARCHED = {None: (1, 2), "k_mix": (1, 2, 3), "smoothed_k_mix": (1, 2, 3)}


@dataclass(frozen=True, eq=False)
class BatchSolution:
    """The labels and last-layer features of a batch, in no particular order.

    Args:
        outcome: "ok"; "unidentifiable" where the gradient does not determine the answer; "step_limit" where
            the search ended with some examples missing, or with an answer that does not rebuild ∇W.
        reason: why an outcome is not "ok"; else empty.
        soft_labels: (n, K), rows sum to one; rows of NaN for examples that were not found.
        features: (n, D), as above.
        label_format: n names, as in `SoftLabelSolution`.
        label_std: (n,) standard error of the worst entry of each label.
        residual: ‖∇W - rebuilt‖/‖∇W‖; NaN where examples are missing.
        found: how many examples were found.
        by_zeros: how many directions the features' zeros told.
    """

    outcome: str
    reason: str
    soft_labels: Tensor
    features: Tensor
    label_format: tuple[str, ...]
    label_std: Tensor
    residual: float
    found: int
    by_zeros: int


@dataclass(frozen=True, eq=False)
class _Found:
    """An attempt: all examples, or some, with the label's structure where that is certain."""

    coordinates: Tensor  # (found, n)
    soft_labels: Tensor  # (found, K)
    doubt: str = ""  # why the λ solver doesn't vouch for an example


def recover_soft_labels_of_batch(
    weight_gradient: Tensor,
    weight: Tensor,
    batch_size: int,
    bias: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    *,
    nonnegative_features: bool = False,
    label_format: str | None = None,
    walks: int = 16384,
    attempts: int = 3,
    rng: torch.Generator | None = None,
) -> BatchSolution:
    """Recover the soft labels and the last layer's inputs of a batch from the gradient of its mean loss.

    Args:
        weight_gradient: ∇W of the last layer, (K, D), the mean over the batch.
        weight: W, (K, D).
        batch_size: n.
        bias: b, (K,); None where the layer has none.
        bias_gradient: ∇b, (K,): one more equation an example.
        nonnegative_features: whether the layer's inputs can't be negative, as after a ReLU.
        label_format: where it is known, one of FORMATS, for all examples; None finds it.
        walks: for extreme rays, at most.
        attempts: searches with fresh starts, at most.
        rng: on the CPU; None starts one from zero.

    Returns:
        The solution, on the inputs' device and dtype. Only a solution that rebuilds ∇W to its noise, with
        equations left over, is "ok".

    Raises:
        ValueError: an input is mis-shaped, not finite, or out of range.
    """
    _check(weight_gradient, weight, batch_size, bias, bias_gradient, label_format)
    rng = torch.Generator(device="cpu").manual_seed(0) if rng is None else rng
    with torch.no_grad():
        if batch_size == 1:
            one = recover_soft_label(weight_gradient, weight, bias, bias_gradient, label_format=label_format)
            return _of_one(one, weight_gradient, weight)
        gradient, head = _problem(
            weight_gradient, weight, batch_size, bias, bias_gradient, nonnegative_features
        )
        factors = factorise(gradient, batch_size)
        if factors is None:
            return _nothing(
                weight,
                batch_size,
                UNIDENTIFIABLE,
                f"the gradient's rank is less than {batch_size}: examples coincide, are fitted already, or "
                "are more than the classes less one",
            )
        rays = directions_from_zeros(factors, walks if nonnegative_features else 0, rng)
        may_share = _may_share(label_format)
        best: BatchSolution | None = None
        for _ in range(attempts):
            if len(rays.directions) == batch_size:
                found = _by_zeros(factors, head, rays, label_format)
            else:
                found = _by_search(factors, head, rays, label_format, rng)
            best = _better(best, _judge(gradient, factors, head, rays, found, weight, may_share))
            if best.outcome == OK or len(rays.directions) == batch_size:
                break
        assert best is not None, f"attempts={attempts} is not at least 1"
        return best


def factorise(gradient: Tensor, n: int) -> Factors | None:
    """Rank-n factors of ∇W (K, D) in float64, and its noise; None where its rank is less."""
    left, values, _ = torch.linalg.svd(gradient, full_matrices=False)
    if len(values) < n:
        return None
    rows, columns = gradient.shape
    spare = max((rows - n) * (columns - n), 1)
    tail = values[n:].square().sum().sqrt() / spare**0.5
    rounding = torch.finfo(torch.float64).eps * torch.linalg.vector_norm(values) / columns**0.5
    noise = torch.maximum(tail, rounding)
    least = _RANK * tail * (rows**0.5 + columns**0.5) + _RANK_ROUNDING * values[0]
    if not bool(values[n - 1] > least):
        return None
    left, values = left[:, :n], values[:n]
    # Not the SVD's own vectors: here a column of zeros is zero, and a small row as exact as a large one.
    right = (left.T @ gradient) / values[:, None]
    scores = (gradient @ right.T) @ torch.linalg.inv(right @ right.T)  # (K, n): gradient = scores · right
    return Factors(scores / values, values, right, noise)


def _problem(
    weight_gradient: Tensor,
    weight: Tensor,
    batch_size: int,
    bias: Tensor | None,
    bias_gradient: Tensor | None,
    nonnegative: bool,
) -> tuple[Tensor, Head]:
    """In float64; a bias whose gradient is known becomes the weight of a feature that is one."""
    gradient, w = weight_gradient.double(), weight.double()
    b = w.new_zeros(len(w)) if bias is None else bias.double()
    if bias_gradient is None:
        return gradient, Head(w, b, False, nonnegative, batch_size)
    gradient = torch.cat([gradient, bias_gradient.double()[:, None]], dim=1)
    w = torch.cat([w, b[:, None]], dim=1)
    return gradient, Head(w, torch.zeros_like(b), True, nonnegative, batch_size)


def _by_zeros(factors: Factors, head: Head, rays: Rays, label_format: str | None) -> _Found:
    """All directions are known: each example's length is a λ of its own."""
    n = head.batch_size
    s = n * (factors.left * factors.values) @ torch.linalg.inv(rays.directions)  # (K, n): t_b u_b
    if head.has_constant:
        lengths = 1 / (rays.directions @ factors.right[:, -1])
        p = torch.softmax(lengths[:, None] * (rays.directions @ factors.right @ head.weight.T), dim=1)
        return _Found(lengths[:, None] * rays.directions, p - (s / lengths).T)
    blur = n * factors.noise * torch.linalg.vector_norm(torch.linalg.inv(rays.directions), dim=0)
    ts: list[Tensor] = []
    labels: list[Tensor] = []
    doubts: list[str] = []
    for one in range(n):
        t, y, doubt = _lam(
            s[:, one],
            rays.directions[one] @ factors.right,
            head,
            float(blur[one]),
            label_format,
        )
        ts.append(t)
        labels.append(y)
        doubts.append(doubt)
    doubt = next((f"{sum(map(bool, doubts))} of {n} examples: {text}" for text in doubts if text), "")
    return _Found(torch.stack(ts)[:, None] * rays.directions, torch.stack(labels), doubt)


def _may_share(label_format: str | None) -> bool:
    """Whether the classes that a label doesn't hold may share a value that isn't zero."""
    return label_format not in ("hard", "mixup", "k_mix")


def _lam(
    s: Tensor, direction: Tensor, head: Head, noise: float, label_format: str | None
) -> tuple[Tensor, Tensor, str]:
    """One example's t and label from s = t u along its direction, and why they may be wrong.

    The λ solver sees the rank-one gradient s vᵀ, first as exact, then with the noise that the other examples
    left in s.
    """
    gradient = torch.outer(s, direction)
    bias = head.bias if bool((head.bias != 0).any()) else None
    answer: SoftLabelSolution | None = None
    for std in (None, noise):
        answer = recover_soft_label(gradient, head.weight, bias, label_format=label_format, noise_std=std)
        if answer.outcome == OK:
            break
    assert answer is not None
    if answer.soft_labels is None or answer.features is None:
        return s.new_tensor(torch.nan), torch.full_like(s, torch.nan), answer.reason
    t = answer.features @ direction / direction.square().sum()
    return t, answer.soft_labels, answer.reason if answer.reason in _AMBIGUOUS else ""


def _by_search(
    factors: Factors, head: Head, rays: Rays, label_format: str | None, rng: torch.Generator
) -> _Found:
    """Examples one at a time, the last by the λ solver."""
    spikes = _SPIKES.get(label_format or "", _MOST_SEARCHED.get(label_format, (1, 2)))
    floors = (False, True) if _may_share(label_format) else (False,)
    examples = search(factors, head, spikes, floors, rays.directions, rng)
    doubt = ""
    n = head.batch_size
    rest, basis = deflate(factors, examples, n)
    if len(examples) == n - 1 and head.has_constant:  # the constant feature tells its length
        length = 1 / rest.right[0, -1]
        examples.append(Example(length * basis[0], n * rest.left[:, 0] * rest.values[0] / length))
    elif len(examples) == n - 1:
        sign = (
            torch.where(rest.right[0].sum() < 0, -1.0, 1.0) if head.nonnegative else rest.right.new_ones(())
        )
        s = sign * n * rest.left[:, 0] * rest.values[0]
        t, _y, doubt = _lam(s, sign * rest.right[0], head, float(n * rest.noise), label_format)
        if bool(t.isfinite()):
            m = sign * t * basis[0]
            examples.append(Example(m, s / t))
    coordinates = torch.stack([one.coordinates for one in examples]) if examples else factors.right[:0, :0]
    if not examples:
        return _Found(coordinates, factors.left.T[:0])
    p = torch.softmax(coordinates @ (head.weight @ factors.right.T).T + head.bias, dim=1)
    return _Found(coordinates, p - torch.stack([one.u for one in examples]), doubt)


def _judge(
    gradient: Tensor,
    factors: Factors,
    head: Head,
    rays: Rays,
    found: _Found,
    weight: Tensor,
    may_share: bool,
) -> BatchSolution:
    """Fit all together, rebuild ∇W, and say what that shows."""
    n = head.batch_size
    by_zeros = len(rays.directions)
    count = int(found.coordinates.isfinite().all(dim=1).sum()) if len(found.coordinates) else 0
    if count < n:
        reason = f"found {count} of {n} examples"
        reason += f"; {found.doubt}" if found.doubt else ""
        outcome = UNIDENTIFIABLE if found.doubt else STEP_LIMIT
        return _partial(found, factors, weight, n, outcome, reason, by_zeros)
    all_zeros = by_zeros == n
    m, y = found.coordinates, found.soft_labels
    zeros = _zeros_of(m, rays)
    blur = n * factors.noise * torch.linalg.vector_norm(torch.linalg.inv(m), dim=0)  # of an entry of u
    fitted, structure = None, None
    for tolerance in _TOLERANCES:
        structure = label_structure(y, (6 * blur).clamp_min(tolerance))
        if _too_free(structure, head, zeros):
            continue
        fitted = fit_batch(factors, head, m, structure, zeros)
        if fitted.reduced_chi2 < _REDUCED_CHI2:
            break
    if fitted is None or fitted.reduced_chi2 >= _REDUCED_CHI2:
        if all_zeros and head.has_constant:
            return _without_structure(gradient, factors, head, found, blur, weight)
        reason = "the labels found have no structure" if fitted is None else "the fit is worse than the noise"
        return _partial(
            found, factors, weight, n, STEP_LIMIT, f"found {n} of {n} examples, but {reason}", by_zeros
        )
    assert structure is not None
    residual = _rebuilt(gradient, factors, head, fitted.coordinates, fitted.soft_labels)
    size = torch.linalg.vector_norm(gradient)
    lengths = torch.linalg.vector_norm(fitted.coordinates, dim=1)
    rounding = (softmax_rounding(factors, head, fitted.coordinates) * lengths).sum() / (n * size)
    bound = 5 * factors.noise * gradient.numel() ** 0.5 / size + rounding.clamp_max(_REBUILT)
    wrong = float(-fitted.soft_labels.amin()) > 1e-3
    # An answer that holds only because the shared value was taken for zero is none.
    freed = structure._replace(floors=torch.full_like(structure.floors, may_share))
    label_std = fitted.label_std
    if not _too_free(freed, head, zeros):
        label_std = fit_batch(factors, head, fitted.coordinates, freed, zeros).label_std
    if found.doubt and all_zeros:
        outcome, reason = UNIDENTIFIABLE, found.doubt
    elif not residual < float(bound) or wrong:
        outcome, reason = STEP_LIMIT, f"found {n} of {n} examples, but they don't rebuild the gradient"
    elif bool(_ERRORS * label_std.max() >= LABEL_TOLERANCE):
        outcome, reason = UNIDENTIFIABLE, "noise or rounding leaves a label known to its error bar only"
    else:
        outcome, reason = OK, ""
    labels = fitted.soft_labels.clamp(0, 1)
    labels = labels / labels.sum(dim=1, keepdim=True)
    width = weight.shape[1]
    return BatchSolution(
        outcome=outcome,
        reason=reason,
        soft_labels=labels.to(weight.dtype),
        features=(fitted.coordinates @ factors.right)[:, :width].to(weight.dtype),
        label_format=tuple(
            format_name(k, e)
            for k, e in zip(structure.spikes.sum(dim=1).tolist(), structure.floors.tolist(), strict=True)
        ),
        label_std=label_std.to(weight.dtype),
        residual=residual,
        found=n,
        by_zeros=by_zeros,
    )


def _zeros_of(m: Tensor, rays: Rays) -> Tensor:
    """At which features each example (n, n) is zero, (n, D): none where no ray is its direction."""
    unit = m / torch.linalg.vector_norm(m, dim=1, keepdim=True)
    same = unit @ rays.directions.T > _SAME_DIRECTION  # (n, L)
    found: Tensor = (same[..., None] & rays.zeros).any(dim=1)
    return found


def _too_free(structure: Structure, head: Head, zeros: Tensor) -> bool:
    """Whether some label, or all together, would fit whatever they are.

    Where directions are known each example stands alone: all entries of y but its free ones tell t.
    """
    n, num_classes = len(structure.floors), len(head.bias)
    numbers = structure.spikes.sum(dim=1) + structure.floors
    alone = num_classes - numbers - 1 + head.has_constant
    told = zeros.any(dim=1).sum() * (n - 1)
    together = num_classes * n + n * head.has_constant + told - n * n - numbers.sum()
    return bool((alone < 1).any()) or bool(together < 1)


def _without_structure(
    gradient: Tensor,
    factors: Factors,
    head: Head,
    found: _Found,
    blur: Tensor,
    weight: Tensor,
) -> BatchSolution:
    """Zeros and the bias gradient tell all, whatever the labels are: they are what is left, p - u."""
    m, y = found.coordinates, found.soft_labels
    p = y + (head.batch_size * (factors.left * factors.values) @ torch.linalg.inv(m)).T
    spread = factors.noise * torch.linalg.vector_norm(m / factors.values, dim=1)  # of a feature
    of_logits = spread[:, None] * torch.linalg.vector_norm(head.weight, dim=1)
    label_std = torch.sqrt((p * (1 - p) * of_logits).square() + blur[:, None].square()).amax(dim=1)
    residual = _rebuilt(gradient, factors, head, m, y)
    invalid = float(-y.amin()) > float(1e-6 + 6 * label_std.max())
    if invalid:
        outcome, reason = STEP_LIMIT, "the directions found give labels below zero"
    elif bool(_ERRORS * label_std.max() >= LABEL_TOLERANCE):
        outcome, reason = UNIDENTIFIABLE, "noise or rounding leaves a label known to its error bar only"
    else:
        outcome, reason = OK, ""
    labels = y.clamp(0, 1)
    return BatchSolution(
        outcome=outcome,
        reason=reason,
        soft_labels=(labels / labels.sum(dim=1, keepdim=True)).to(weight.dtype),
        features=(m @ factors.right)[:, : weight.shape[1]].to(weight.dtype),
        label_format=("any",) * len(m),
        label_std=label_std.to(weight.dtype),
        residual=residual,
        found=len(m),
        by_zeros=len(m),
    )


def _rebuilt(gradient: Tensor, factors: Factors, head: Head, m: Tensor, y: Tensor) -> float:
    """‖∇W - (1/n) (softmax(X Wᵀ) - Y)ᵀ X‖/‖∇W‖."""
    x = m @ factors.right
    if head.has_constant:
        x = torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], dim=1)
    u = torch.softmax(x @ head.weight.T + head.bias, dim=1) - y
    off = gradient - u.T @ x / len(m)
    return float(torch.linalg.vector_norm(off) / torch.linalg.vector_norm(gradient))


def _better(old: BatchSolution | None, new: BatchSolution) -> BatchSolution:
    if old is None or new.outcome == OK or new.found > old.found:
        return new
    return old


def _partial(
    found: _Found, factors: Factors, weight: Tensor, n: int, outcome: str, reason: str, by_zeros: int
) -> BatchSolution:
    """What was found of a batch, on rows of NaN."""
    solution = _nothing(weight, n, outcome, reason)
    solid = (
        found.coordinates.isfinite().all(dim=1)
        if len(found.coordinates)
        else found.coordinates.new_zeros(0) > 0
    )
    labels, features = solution.soft_labels, solution.features
    count = int(solid.sum())
    if count > 0:
        y = found.soft_labels[solid].clamp(0, 1)
        labels[:count] = (y / y.sum(dim=1, keepdim=True)).to(weight.dtype)
        features[:count] = (found.coordinates[solid] @ factors.right)[:, : weight.shape[1]].to(weight.dtype)
    return replace(solution, found=count, by_zeros=by_zeros)


def _nothing(weight: Tensor, n: int, outcome: str, reason: str) -> BatchSolution:
    num_classes, width = weight.shape
    return BatchSolution(
        outcome=outcome,
        reason=reason,
        soft_labels=weight.new_full((n, num_classes), torch.nan),
        features=weight.new_full((n, width), torch.nan),
        label_format=("",) * n,
        label_std=weight.new_full((n,), torch.nan),
        residual=float("nan"),
        found=0,
        by_zeros=0,
    )


def _of_one(one: SoftLabelSolution, weight_gradient: Tensor, weight: Tensor) -> BatchSolution:
    """A batch of one is the λ solver's."""
    if one.soft_labels is None or one.features is None:
        return _nothing(weight, 1, one.outcome, one.reason)
    return BatchSolution(
        outcome=one.outcome,
        reason=one.reason,
        soft_labels=one.soft_labels[None],
        features=one.features[None],
        label_format=(one.label_format,),
        label_std=one.label_std[None],
        residual=float("nan"),
        found=1,
        by_zeros=0,
    )


def _check(
    weight_gradient: Tensor,
    weight: Tensor,
    batch_size: int,
    bias: Tensor | None,
    bias_gradient: Tensor | None,
    label_format: str | None,
) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    require(batch_size >= 1, f"batch_size={batch_size} is not at least 1")
    require(weight.dim() == 2, f"weight must be (K, D), got {tuple(weight.shape)}")
    require(
        weight_gradient.shape == weight.shape,
        f"weight_gradient must be {tuple(weight.shape)} as weight is, got {tuple(weight_gradient.shape)}",
    )
    for name, vector in (("bias", bias), ("bias_gradient", bias_gradient)):
        require(
            vector is None or vector.shape == weight.shape[:1],
            f"{name} must be ({len(weight)},), got {None if vector is None else tuple(vector.shape)}",
        )
    for name, tensor in (
        ("weight_gradient", weight_gradient),
        ("weight", weight),
        ("bias", bias),
        ("bias_gradient", bias_gradient),
    ):
        if tensor is not None:
            require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, not floating point")
            require(bool(tensor.isfinite().all()), f"{name} has NaN or infinite entries")
    require(
        label_format is None or label_format in FORMATS,
        f"unknown label_format {label_format!r}; the known ones are {', '.join(FORMATS)}",
    )
