"""The exact search beside the published one, in one process on one thread: `python -m bench.speed.ratios`.

Real gradients of several nets, hard, smoothed and mixed labels, float32. The exact search finds the format
itself; the published one is told it, in two renditions: `search="paper"` (the same iteration in closed form,
all examples in lockstep), and as the authors' code runs it (as_published.py: torch.optim.LBFGS, autograd).
The searches take turns on every example, so that whatever else the machine does meets them alike. Times are
medians over examples of the median over repeats; beside them, how often the label is within .01.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from attacks.solvers import recover_soft_label, recover_soft_labels
from bench.speed import as_published

if TYPE_CHECKING:
    from bench.studies.gradients import Gradients, Net

HEADS = [
    ("fcn(bias=False, depth=2, width=64)", "untrained"),
    ("fcn(bias=False, depth=2, width=64)", "memorised"),
    ("resnet18(bias=False)", "untrained"),
    ("lenet(bias=False)", "untrained"),
    ("fcn(bias=False, depth=2, width=2048)", "untrained"),
    ("fcn(bias=False, depth=2, width=2048)", "memorised"),
]
FORMATS = ("hard", "smoothing", "mixup")
MOST_BYTES = 2**31
ENOUGH_SECONDS = 3.0
WITHIN = 0.01
FEW_PASSES = 2_000_000
"""From K·D on, passes over ∇W are timed too: below, the rest of the search outweighs them."""

Answer = tuple[Tensor, list[bool]]  # labels (M, K), and which of them the search stands for


def exact(weight_gradient: Tensor, weight: Tensor, label_format: str) -> Answer:
    """A stack by the exact search, which is not told the format."""
    found = recover_soft_labels(weight_gradient, weight)
    assert found.soft_labels is not None
    return found.soft_labels, [outcome == "ok" for outcome in found.outcome]


def exact_single(weight_gradient: Tensor, weight: Tensor, label_format: str) -> Answer:
    """One example by the exact search."""
    found = recover_soft_label(weight_gradient[0], weight)
    labels = torch.full_like(weight[:, 0], torch.nan) if found.soft_labels is None else found.soft_labels
    return labels[None], [found.outcome == "ok"]


def paper(weight_gradient: Tensor, weight: Tensor, label_format: str) -> Answer:
    """A stack by the published search in closed form."""
    found = recover_soft_labels(weight_gradient, weight, search="paper", label_format=label_format)
    assert found.soft_labels is not None
    return found.soft_labels, [outcome == "ok" for outcome in found.outcome]


def autograd(weight_gradient: Tensor, weight: Tensor, label_format: str) -> Answer:
    """One example by the published search as published."""
    labels, solved = as_published.recover(weight_gradient[0], weight, label_format)
    return labels[None], [solved]


Search = Callable[[Tensor, Tensor, str], Answer]
SINGLE: dict[str, Search] = {"exact": exact_single, "paper": paper, "as published (autograd)": autograd}
STACK: dict[str, Search] = {"exact": exact, "paper": paper}


def timed(call: Callable[[], Answer]) -> tuple[float, Answer]:
    """Seconds of processor time (on one thread: the wall clock less other processes), and what came back."""
    started = time.process_time()
    answer = call()
    return time.process_time() - started, answer


def compare(
    sent: Gradients, searches: dict[str, Search], parts: dict[str, list[slice]], repeats: int
) -> list[dict[str, object]]:
    """One row for each search and part of a stack, the searches taking turns.

    Args:
        sent: the gradients, with their labels.
        searches: what to time.
        parts: of the stack for each search, as many for each.
        repeats: at most; one part's end once they have taken `ENOUGH_SECONDS`.
    """
    rows: list[dict[str, object]] = []
    for chosen in zip(*(parts[name] for name in searches), strict=True):
        seconds: dict[str, list[float]] = {name: [] for name in searches}
        answers: dict[str, Answer] = {}
        for _ in range(repeats):
            for (name, search), part in zip(searches.items(), chosen, strict=True):
                gradients = sent.weight_gradient[part]
                spent, answers[name] = timed(lambda: search(gradients, sent.weight, sent.label_format))  # noqa: B023
                seconds[name].append(spent)
            if sum(map(sum, seconds.values())) > ENOUGH_SECONDS:
                break
        for name, part in zip(searches, chosen, strict=True):
            labels, stands = answers[name]
            errors = (labels - sent.soft_labels[part]).abs().amax(dim=1).nan_to_num(1.0)
            right = (errors <= WITHIN).tolist()
            rows.append(
                {
                    "net": sent.net.name,
                    "classes": sent.net.num_classes,
                    "width": sent.weight.shape[1],
                    "label_format": sent.label_format,
                    "search": name,
                    "examples": len(right),
                    "milliseconds": 1e3 * statistics.median(seconds[name]) / len(right),
                    "within": sum(right),
                    "wrong": sum(sure and not good for sure, good in zip(stands, right, strict=True)),
                }
            )
    return rows


def passes(sent: Gradients, repeats: int) -> tuple[float, float]:
    """Milliseconds an example of two passes over ∇W and one over W, and of the exact search, taking turns.

    A pass is a product with a vector, one example after another.
    """
    vectors = torch.nn.functional.normalize(sent.features, dim=1)

    def three() -> Answer:
        for gradient, vector in zip(sent.weight_gradient, vectors, strict=True):
            torch.mv(gradient, vector)
            torch.mv(gradient, vector)
            torch.mv(sent.weight, vector)
        return vectors, []

    both = [
        (timed(three)[0], timed(lambda: exact(sent.weight_gradient, sent.weight, ""))[0])
        for _ in range(repeats)
    ]
    bare, whole = (1e3 * statistics.median(times) / len(vectors) for times in zip(*both, strict=True))
    return bare, whole


def table(rows: list[dict[str, object]]) -> pd.DataFrame:
    """A line for each net, and one of all: medians, ratios to the exact search, labels within .01, wrong."""
    frame = pd.DataFrame(rows)
    by = ["classes", "width", "net"]
    groups = list(frame.groupby(by, sort=False))
    groups.append(((frame.classes.iloc[0], "", "all of these"), frame))
    lines = []
    for key, group in groups:
        line: dict[str, object] = dict(zip(by, key, strict=True))
        searches = list(dict.fromkeys(group.search))
        of = {name: group[group.search == name] for name in searches}
        median = {name: float(of[name].milliseconds.median()) for name in searches}
        line |= {f"{name}, ms": f"{median[name]:.3g}" for name in searches}
        line |= {f"{name} / exact": f"{median[name] / median['exact']:.3g}×" for name in searches[1:]}
        for name in searches:
            count = int(of[name].examples.sum())
            line[f"{name}: within .01 (wrong)"] = f"{of[name].within.sum()}/{count} ({of[name].wrong.sum()})"
        lines.append(line)
    return pd.DataFrame(lines)


def markdown(lines: pd.DataFrame) -> str:
    """As a table."""
    head = "| " + " | ".join(map(str, lines.columns)) + " |\n" + "|---" * len(lines.columns) + "|\n"
    return head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in lines.itertuples(index=False))


def on_net(
    net: Net, arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """All rows of one net, of single examples and of stacks."""
    # Here, as asv imports every module of this folder, beside whatever commit it measures.
    from bench.studies.gradients import gradients

    (width,) = {sent.weight.shape[1] for sent in gradients(net, [torch.float32], FORMATS[:1], 1)}
    at_once = max(min(arguments.stack, MOST_BYTES // (4 * net.num_classes * width)), arguments.examples)
    ones = [slice(i, i + 1) for i in range(arguments.examples)]
    single: list[dict[str, object]] = []
    stacked: list[dict[str, object]] = []
    for sent in gradients(net, [torch.float32], FORMATS, at_once):
        compare(sent, SINGLE, dict.fromkeys(SINGLE, ones[:1]), 1)  # not counted: the first calls set up
        single += compare(sent, SINGLE, dict.fromkeys(SINGLE, ones), arguments.repeats)
        parts = {"exact": [slice(0, at_once)], "paper": [slice(0, arguments.published_stack)]}
        stacked += compare(sent, STACK, parts, arguments.repeats)
        if net.num_classes * width >= FEW_PASSES and sent.label_format == "smoothing":
            bare, whole = passes(sent, arguments.repeats)
            say(
                f"\nK = {net.num_classes}, D = {width}, {net.name}, stack of {at_once}: two passes over ∇W "
                f"and one over W take {bare:.3g} ms an example, the exact search {whole:.3g}: "
                f"{whole / bare:.2f}×"
            )
    return single, stacked


def measure(arguments: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, object]]:
    """All rows, single and stacked; says the tables of each K as they come."""
    from bench.studies.gradients import Net

    everything: list[dict[str, object]] = []
    for num_classes in arguments.classes:
        single: list[dict[str, object]] = []
        stacked: list[dict[str, object]] = []
        for model, state in HEADS:
            if arguments.net in f"{model} {state}":
                more = on_net(Net(model, num_classes, state, "mnist5k", seeds=1), arguments, say)
                single += more[0]
                stacked += more[1]
        sizes = sorted({int(str(row["examples"])) for row in stacked if row["search"] == "exact"})
        say(f"\n### One example, K = {num_classes}\n\n{markdown(table(single))}")
        say(
            f"\n### Stacks, K = {num_classes}: milliseconds an example; exact in stacks of "
            f"{' or '.join(map(str, sizes))}, paper in stacks of {arguments.published_stack} at most\n\n"
            f"{markdown(table(stacked))}"
        )
        everything += [{"stacked": False, **row} for row in single]
        everything += [{"stacked": True, **row} for row in stacked]
    return everything


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--net", default="", help="only heads whose name holds this")
    parser.add_argument("--examples", type=int, default=5, help="solved singly, of each net and format")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stack", type=int, default=1000, help="fewer where gradients take over 2 GiB")
    parser.add_argument("--published-stack", type=int, default=100, help="its time grows in proportion")
    parser.add_argument("--csv", type=Path, help="where to write all rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments, lambda text: print(text, flush=True))
    if arguments.csv is not None:
        pd.DataFrame(rows).to_csv(arguments.csv, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
