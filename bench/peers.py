"""Peers beside us: the same observations through breaching's attacks, and what each suite can do.

Figures come from published boards and bench.speed.images; features were read in each project's code and
documents, whose addresses stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.evidence import Evidence, MissingError, groups, one, rate, table

BREACHING = "https://github.com/JonasGeiping/breaching"
GRADATTACK = "https://github.com/Princeton-SysML/GradAttack"
AUTHORS = "https://github.com/ybwang119/label_recovery"

LABELS = {
    "breaching `bias-corrected`": "breaching_labels",
    "LLG": "llg",
    "ZLG, public images": "zlg(images='auxiliary')",
    "iLRG": "ilrg",
    "bias counts, public images": "bias_counts(images='auxiliary')",
    "chance": "random_labels",
}


def _breaching(preset: str, iterations: int) -> str:
    return f"breaching(preset='{preset}', labels='truth', iterations={iterations})"


SEARCHES = {
    "ours: Inverting Gradients": "inverting_gradients(labels='truth', iterations=300, tv=0.01)",
    "breaching: `invertinggradients`": _breaching("invertinggradients", 300),
    "ours: L-BFGS and total variation": "lbfgs_tv(labels='truth', iterations=300)",
    "ours: GradInversion": "gradinversion(labels='truth', iterations=300)",
    "breaching: `seethroughgradients`": _breaching("seethroughgradients", 300),
    "breaching: `modern`": _breaching("modern", 300),
    "breaching: `beyondinfering`": _breaching("beyondinfering", 30),
    "ours: DLG": "dlg(labels='truth', iterations=300)",
}
NETWORKS = {"LeNet": "lenet(init='uniform', bias=True)", "ConvNet": "convnet(bias=True)"}
STATES = {"untrained": "untrained", "after an epoch": "epochs=1", "trained": "trained"}
SIZES = (4, 8, 32, 128)

FEATURES = (
    (
        "smoothed and mixed labels",
        "in closed form or by search, without being told the kind",
        "`_recover_label_information` returns class numbers; the `deepleakage` and `tag` configurations "
        "search "
        f"for a distribution with the image ([code]({BREACHING}/blob/HEAD/breaching/attacks/base_attack.py))",
        f"`guess_labels` returns class numbers, or labels are searched for with the image "
        f"([code]({GRADATTACK}/blob/HEAD/gradattack/attacks/gradientinversion.py))",
        f"by search, told which of the two ([code]({AUTHORS}/blob/HEAD/recovering.py))",
    ),
    (
        "last feature, images of fully connected nets without a bias",
        "yes, layer by layer",
        f"`analytic` divides by the bias's gradient "
        f"([code]({BREACHING}/blob/HEAD/breaching/attacks/analytic_attack.py))",
        "by matching gradients only",
        f"yes, FCN-4 in a notebook ([notebook]({AUTHORS}/blob/HEAD/reconstruct_demo.ipynb))",
    ),
    (
        "soft labels of a batch",
        "yes, a vector of λ",
        "only as a distribution that is searched for with the images",
        "only with the images",
        "no: one example a gradient",
    ),
    (
        "says that a gradient doesn't determine the answer",
        "yes, with the reason and error bars",
        f"no: an attack returns data and labels "
        f"([interface]({BREACHING}/blob/HEAD/breaching/attacks/README.md))",
        "no",
        "compares λ with the truth instead",
    ),
    (
        "what keeps the truth from an attack",
        "attacks run in a process that holds none; a submission in a sandbox",
        f"convention: an attack consumes what the user shares ([README]({BREACHING}#readme))",
        "nothing: the attack's object holds the true images, for its metrics",
        "nothing: the search stops by it",
    ),
    (
        "label rules for batches",
        "`leakbench list attacks`: iLRG, LLG and its variants, ZLG, RLG, RLU, GDBR, counts from the bias …",
        "iDLG, analytic, yin, wainakh-simple, wainakh-whitebox, bias-corrected, bias-text, random",
        "iDLG's",
        "no",
    ),
    (
        "malicious servers",
        "an interface (`manipulate`), no attack yet",
        f"yes: Robbing the Fed, Decepticons, Fishing ([README]({BREACHING}#readme))",
        "no",
        "no",
    ),
    (
        "text",
        "no",
        f"yes: attacks on transformers, language data ([README]({BREACHING}#readme))",
        f"no: image classification ([README]({GRADATTACK}#readme))",
        "no",
    ),
    (
        "defenses",
        "`leakbench list defenses`, and chains of them; protocols beside them",
        f"noise on gradient or input, clipping per example, aggregation "
        f"([code]({BREACHING}/blob/HEAD/breaching/cases/users.py))",
        f"DP-SGD, pruning, mixup, InstaHide ([list]({GRADATTACK}/blob/HEAD/papers/gradient_inversion.md))",
        "smoothing, mixup; noise on the row that is searched",
    ),
    (
        "attackers who are told the defense",
        "yes, beside those who aren't",
        "no",
        "for InstaHide and mixup: decoding after the attack (`examples/attack_decode.py`)",
        "no",
    ),
    (
        "what a defense costs",
        "accuracy, time, bytes and ε of a training",
        f"no: nothing is trained ([README]({BREACHING}#readme))",
        "a training pipeline with the defense",
        "no",
    ),
    (
        "statistics",
        "Wilson and bootstrapped intervals, paired tests, ties share a rank; a crash counts as lost",
        f"means; a trial that raises is logged and left out "
        f"([code]({BREACHING}/blob/HEAD/benchmark_breaches.py))",
        f"mean, best, standard deviation ([code]({GRADATTACK}/blob/HEAD/examples/calc_metric.py))",
        "counts of successes in notebooks",
    ),
    (
        "grids, resuming, one trial again",
        "a grid resumes where it was killed; every trial has a key and can be run again, digit by digit",
        "one attack and case a run; a benchmark starts from its first user",
        "scripts a setting",
        "notebooks",
    ),
    (
        "published boards anyone can submit to",
        "yes, verified",
        "no",
        "no",
        "no",
    ),
)

HEAD = f"""# Peers beside us

The same observations through [breaching]({BREACHING})'s attacks and label strategies (0.1.2, through the
adapters `breaching` and `breaching_labels`, which say what they mend) and ours. Written by
`python -m bench.paper` from published boards and studies.
"""


def page(evidence: Evidence) -> str:
    """PEERS.md."""
    sections = (
        (
            "Labels of a batch",
            "Overlap of the found with the true multiset of classes (LnAcc), i.i.d. classes, MNIST, a "
            "ConvNet "
            "with a bias. breaching's rule works on the bias's gradient alone; iLRG and those with public "
            "images use more. Chance is high where batches are large.",
            ("weights", "batch", *LABELS, "n"),
            _labels(evidence),
        ),
        (
            "Every label of a batch right",
            "The share of batches in which each example's label is found, the same observations.",
            ("weights", "batch", *LABELS, "n"),
            _labels(evidence, metric="success"),
        ),
        (
            "Images by search, labels given",
            "PSNR with 95 % intervals, colour images of 32 pixels; 300 iterations, 30 where each takes ten "
            "times as long. breaching's steps are in units of natural images' deviation, its total variation "
            "weighs as its configurations say; ours is 0.01.",
            ("attack", *(f"{net}, {state}" for net in NETWORKS for state in list(STATES)[:2])),
            _searches(evidence),
        ),
        (
            "Speed",
            "Inverting Gradients on the same observation with granted labels, same start, schedule, steps "
            "and "
            "weights, taking turns on one thread (`python -m bench.speed.images`).",
            (
                *("network", "restarts", "images", "iterations", "breaching, s", "ours, s", "ours takes"),
                *("PSNR, breaching", "PSNR, ours"),
            ),
            _speed(evidence),
        ),
        (
            "Features",
            "Read in code and documents in November 2026; a dash would be a guess, and there is none.",
            ("", "LeakBench", "breaching", "GradAttack", "Wang et al.'s code"),
            iter(FEATURES),
        ),
    )  # fmt: skip
    parts = [HEAD]
    for title, words, heads, rows in sections:
        try:
            body = table([head or "what" for head in heads], list(rows))
        except MissingError as missing:
            body = (
                f"{str(missing).capitalize()}, then `python -m bench.publish` and `python -m bench.paper`.\n"
            )
        parts.append(f"## {title}\n\n{words}\n\n{body}")
    return "\n".join(parts)


def _labels(evidence: Evidence, metric: str = "class_counts") -> Iterator[tuple[str, ...]]:
    for state, weights in STATES.items():
        for size in SIZES:
            rows = [
                one(
                    evidence.board(
                        "labels-v1-label",
                        attack=attack, weights=weights, batch_size=size, classes="iid", protocol="fedsgd",
                        model="convnet(width=8, bias=True)", defense="none",
                    )
                )
                for attack in LABELS.values()
            ]  # fmt: skip
            shown = (
                [f"{row[metric]:.3f}" for row in rows]
                if metric == "class_counts"
                else [rate(round(row[metric] * row.n), int(row.n)) for row in rows]
            )
            yield state, str(size), *shown, str(int(rows[0].n))


def _searches(evidence: Evidence) -> Iterator[tuple[str, ...]]:
    for name, attack in SEARCHES.items():
        rows = [
            one(
                evidence.board(
                    "images-v1-image",
                    attack=attack, model=model, weights=STATES[state], batch_size=1, defense="none",
                )
            )
            for model in NETWORKS.values()
            for state in list(STATES)[:2]
        ]  # fmt: skip
        yield (
            name,
            *(
                f"{row.psnr:.1f} dB [{row.psnr_low:.1f}, {row.psnr_high:.1f}], n = {int(row.n)}"
                for row in rows
            ),
        )


def _speed(evidence: Evidence) -> Iterator[tuple[str, ...]]:
    runs = evidence.study("images/speed.csv")
    for (model, restarts, iterations), of in groups(runs, ["model", "restarts", "iterations"]):
        seconds: Any = of.pivot(index="image", columns="side", values="seconds")
        psnr: Any = of.groupby("side")["psnr"].mean()
        ratio = (seconds["ours"] / seconds["breaching"]).median()
        yield (
            str(model), str(restarts), str(len(seconds)), str(iterations),
            f"{seconds['breaching'].median():.3g}", f"{seconds['ours'].median():.3g}",
            f"{ratio:.2f} of its time", f"{psnr['breaching']:.2f} dB", f"{psnr['ours']:.2f} dB",
        )  # fmt: skip
