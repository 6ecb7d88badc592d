"""The paper beside us, from committed files alone: `python -m bench.paper` writes results/PAPER.md, PEERS.md.

What is reported stands in results/reported.csv, what is ours in published boards and in studies' files; why
the two differ is written here, beside each claim. Run it after `python -m bench.publish`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from bench import peers, registry
from bench.evidence import Claim, Evidence, Figures, by_kind, each, groups, one, rate, share, table
from bench.registry import ROOT

PAPER = "https://arxiv.org/abs/2402.03124"
PUBLISHED, EXACT = "lambda_recovery(search='paper')", "lambda_recovery"
NETS = {
    "LeNet": ("lenet(bias=False)", "untrained"),
    "trained LeNet": ("lenet(bias=False, init='default')", "trained"),
    "trained LeNet, ReLU": ("lenet(bias=False, init='default', activation='relu')", "trained"),
    "FCN-4": ("fcn(bias=False, depth=4)", "untrained"),
    "ResNet-18": ("resnet18(bias=False)", "untrained"),
    "trained ResNet-18": ("resnet18(bias=False, stem='imagenet')", "epochs=3"),
    "ResNet-18, 64 px": ("resnet18(bias=False, stem='imagenet')", "untrained"),
}
"""Of bench.studies.paper_labels, whose heads have no bias, as in the paper."""
SOFT = {"smoothed": "smoothing", "mixed": "mixup"}
EVERY = {"hard": "hard", **SOFT}
STATES = {"untrained": "untrained", "after an epoch": "epochs=1", "trained": "trained"}
ONE_EXAMPLE: dict[str, Any] = {"batch_size": 1, "protocol": "fedsgd"}

NO_FIGURE = (
    "not known here: of the paper's figures only its summary and its repository's notebooks could be read"
)
TRUTH_STOPS = "theirs compares λ with the truth before it accepts an answer, ours never sees it"
CLOCKS = "Theirs is a wall clock (of an Intel Xeon), ours processor time on one thread of a shared core"


def searched(net: str, kinds: dict[str, str], classes: int = 10) -> Figures:
    """Labels within .01 by the published search and by ours, of bench.studies.paper_labels."""
    model, weights = NETS[net]

    def figures(evidence: Evidence) -> str:
        parts = []
        for search, said in (("paper", "published search"), ("exact", "ours, told nothing")):
            rows = [
                one(
                    evidence.study(
                        "labels/paper_labels.csv",
                        model=model, weights=weights, classes=classes, bias_gradient="none",
                        label_format=label_format, search=search,
                    )
                )
                for label_format in kinds.values()
            ]  # fmt: skip
            found = [rate(round(row.within * row.examples), int(row.examples)) for row in rows]
            parts.append(f"{said}: {', '.join(map(' '.join, zip(kinds, found, strict=True)))}")
            if search == "paper":
                parts[-1] += (
                    f", λ as their code asks {' and '.join(f'{100 * r.lam_within:.3g} %' for r in rows)}"
                )
        return f"{rows[0].data}, n = {int(rows[0].examples)}: {'; '.join(parts)}"

    return figures


def timed(net: str, label_format: str) -> Figures:
    """Milliseconds an example, of the same study."""
    model, weights = NETS[net]

    def figures(evidence: Evidence) -> str:
        rows = evidence.study(
            "labels/paper_labels.csv",
            model=model, weights=weights, classes=10, bias_gradient="none", label_format=label_format,
        ).set_index("search")  # fmt: skip
        times = rows["milliseconds"]
        return (
            f"published search {times['paper']:.3g} ms, ours {times['exact']:.3g} ms an example in a stack "
            "of "
            f"{int(rows['examples'].iloc[0])}"
        )

    return figures


def by_state(attack: str, batch_size: int = 1) -> Figures:
    """Of labels-v1, a ConvNet without a bias: each kind of label, each state of the weights."""

    def figures(evidence: Evidence) -> str:
        return "; ".join(
            f"{state}: "
            + by_kind(
                evidence, "labels-v1-label", "success", attack=attack, weights=weights,
                model="convnet(width=8, bias=False)", batch_size=batch_size, protocol="fedsgd",
            )
            for state, weights in STATES.items()
        )  # fmt: skip

    return figures


def imaged(attack: str, model: str, states: tuple[str, ...] = ("untrained", "after an epoch")) -> Figures:
    """Of images-v1: PSNR for each kind of label."""

    def figures(evidence: Evidence) -> str:
        return "; ".join(
            f"{state}: "
            + by_kind(
                evidence, "images-v1-image", "psnr",
                attack=attack, model=model, weights=STATES[state], **ONE_EXAMPLE,
            )
            for state in states
        )  # fmt: skip

    return figures


def compared(named: dict[str, str], model: str, weights: str) -> Figures:
    """Of images-v1: PSNR of several attacks on one network."""

    def figures(evidence: Evidence) -> str:
        return "; ".join(
            f"{name}: "
            + by_kind(
                evidence, "images-v1-image", "psnr",
                attack=attack, model=model, weights=weights, **ONE_EXAMPLE,
            )
            for name, attack in named.items()
        )  # fmt: skip

    return figures


def format_unknown(evidence: Evidence) -> str:
    """Of every real gradient that determines its label, the share that is found, format and all."""
    cases = evidence.study("solver/identifiable_cases.csv.gz")
    parts = []
    for dtype, of in groups(cases, "dtype"):
        known = of[of.identifiable]
        right = (known.label_error <= 0.01) & (known.format_found == known.label_format)
        wrong = ((of.outcome == "ok") & (of.label_error > 0.01)).sum()
        parts.append(f"{dtype}: {share(right)} identifiable; {wrong} wrong answers among {len(of)}")
    return "; ".join(parts)


def biased(evidence: Evidence) -> str:
    """The exact search where the head has a bias, its gradient given or withheld."""
    rows = evidence.study("labels/paper_labels.csv", bias_gradient=["given", "withheld"], search="exact")
    return "; ".join(
        f"{said}: {rate(round((of.within * of.examples).sum()), int(of.examples.sum()))}, "
        f"n = {int(of.examples.sum())}"
        for said, of in groups(rows, "bias_gradient")
    )


def reported_condition(evidence: Evidence) -> str:
    """The withheld bias gradient of a label without structure: what the solver answers."""
    cases = evidence.study("solver/identifiable_cases.csv.gz")
    unsure = cases[cases.outcome != "ok"]
    reasons = ", ".join(f"{n} × “{reason}”" for reason, n in unsure.reason.value_counts().items())
    return f"{len(unsure)} of {len(cases)} gradients were refused with a reason: {reasons}"


def fully_connected(evidence: Evidence) -> str:
    """fcn_analytic over depths, activations, kinds of label."""
    cases = evidence.study("images/after_lambda.csv", part="fcn", attack="fcn_analytic")
    deep = cases[cases.model.str.contains("depth=4")]
    exact = cases.identical_8_bit.dropna() == True  # noqa: E712
    kinds = ", ".join(
        f"{kind} {of.psnr.median():.0f} dB (worst {of.psnr.min():.0f})" for kind, of in groups(deep, "label")
    )
    return (
        f"FCN-4, medians of {len(deep)} images before rounding: {kinds}; over depths 2 to 6 and four "
        f"activations the 8-bit image is identical in {share(exact)}"
    )


def milliseconds_of_images(evidence: Evidence) -> str:
    """How long an image takes."""
    cases = evidence.study("images/after_lambda.csv", part="fcn", attack="fcn_analytic")
    return (
        f"{cases.milliseconds.median():.0f} ms, the median of {len(cases)} images of 32 and 64 pixels a side"
    )


def one_row_noised(evidence: Evidence) -> str:
    """The published experiment, noise on the one row that is searched."""
    rows = evidence.study(
        "defenses/noise_curve.csv", attack="published experiment", weights="untrained",
        sigma=[1e-4, 1e-3, 1e-2, 1e-1],
    )  # fmt: skip
    return _by_level(rows, "sigma", "within_0.01", "label")


def whole_gradient_noised(evidence: Evidence) -> str:
    """Noise on every entry: both searches."""
    rows = evidence.study(
        "solver/noise.csv", model="resnet18(bias=False)", classes=10, disturbance="gaussian",
        label_format=list(EVERY.values()), level=[1e-4, 1e-3, 1e-2, 1e-1],
    )  # fmt: skip
    return " ".join(
        f"{said}: {_by_level(rows[rows.search == search], 'level', 'within', 'label_format')}."
        for search, said in (("exact", "Ours"), ("paper", "Published search"))
    )


def _by_level(rows: pd.DataFrame, level: str, column: str, kind: str) -> str:
    parts = []
    for std, of in groups(rows, level):
        kinds = ", ".join(
            f"{getattr(row, kind)} {rate(round(row.within * row.cases), int(row.cases))}"
            for row in each(of.rename(columns={column: "within"}))
        )
        parts.append(f"σ = {std:g}: {kinds}")
    return "; ".join(parts) + f" (n = {int(rows.cases.max())} each)"


def private_noise(evidence: Evidence) -> str:
    """DP with its ε: the first σ of the curve at which the attacker who is told finds no label in ten."""
    rows = evidence.study(
        "defenses/noise_curve.csv", attack="lambda_recovery_adaptive", weights="untrained", label="mixup"
    ).sort_values("sigma")
    picked = rows[rows.sigma.isin([1e-4, 1e-3, 1e-2, 1e-1, 1.0])]
    return (
        "; ".join(
            f"σ = {row.sigma:g} (ε = {row.epsilon:.2g}): "
            f"{rate(round(row.within * row.cases), int(row.cases))}"
            for row in each(picked.rename(columns={"within_0.01": "within"}))
        )
        + f"; n = {int(rows.cases.max())} each"
    )


def ratios(evidence: Evidence) -> str:
    """Ours against the published search as its authors run it, one example at a time."""
    rows = evidence.study("solver/ratios_10.csv", stacked=False)
    times = rows.pivot_table(
        index=["net", "label_format"], columns="search", values="milliseconds", aggfunc="median"
    )
    ratio = times["as published (autograd)"] / times["exact"]
    return (
        f"K = 10, medians of {len(times)} networks and kinds of label: as published "
        f"{times['as published (autograd)'].median():.3g} ms, the same in closed form "
        f"{times['paper'].median():.3g} ms, ours {times['exact'].median():.3g} ms; as published takes "
        f"{ratio.min():.0f} to {ratio.max():.0f} times as long as ours"
    )


def disturbed(evidence: Evidence) -> str:
    """Other disturbances, over networks and kinds of label."""
    rows = evidence.study("solver/noise.csv", search="exact")
    chosen = {
        ("pruning", 0.5): "50 % of the entries kept",
        ("pruning", 0.3): "30 % kept",
        ("pruning", 0.1): "10 % kept",
        ("quantisation", 10.0): "10 bits",
        ("quantisation", 8.0): "8 bits",
        ("quantisation", 6.0): "6 bits",
        ("clipping", 0.01): "clipped to .01 of the norm",
    }
    parts = []
    for (disturbance, level), said in chosen.items():
        of = rows[(rows.disturbance == disturbance) & (rows.level == level)]
        if len(of):
            n = int(of.cases.sum())
            parts.append(f"{said}: {rate(round((of.within * of.cases).sum()), n)} of {n}")
    wrong = rows.groupby(["model", "state"]).wrong_ok.sum().sort_values(ascending=False)
    most: Any = wrong.index[0]
    return (
        f"{'; '.join(parts)}. Wrong answers said to be right: {wrong.sum()} of {rows.cases.sum()} over all "
        f"disturbances, {wrong.iloc[0]} of them of {', '.join(most)}"
    )


def best_losses(evidence: Evidence) -> str:
    """Where each loss has its lowest point, and whether the published procedure gets there."""
    rows = evidence.study("solver/losses.csv")
    parts = []
    for loss, of in groups(rows, "loss"):
        found = [
            100 * (of[column] <= 0.01).mean()
            for column in ("anywhere", "within the published bound", "from λ = ±1")
        ]
        parts.append(f"{loss} {found[0]:.0f} / {found[1]:.0f} / {found[2]:.0f} %")
    return (
        f"{rows.groupby('loss').size().iloc[0]} gradients; labels within .01 at the loss's lowest point "
        f"anywhere / within the published bound / from λ = ±1: {'; '.join(parts)}"
    )


def feature_weights(evidence: Evidence) -> str:
    """The weight of the feature's loss: gains, and the rule that needs no truth."""
    rows = evidence.study("images/feature_weight.csv")
    case = ["model", "state", "label_format", "image"]
    by_weight = rows.set_index([*case, "weight"]).psnr.unstack("weight")
    chosen = rows.loc[rows.groupby(case).distance.idxmin()].set_index(case).psnr
    behind = by_weight.max(axis=1) - chosen
    parts = [
        f"{str(model).partition('(')[0]} {state}: best weight {best:g} ({gain:+.1f} dB over none)"
        for (model, state), of in groups(by_weight, ["model", "state"])
        for best in [of.mean().idxmax()]
        for gain in [float(of.mean().max() - of.mean()[0.0])]
    ]
    return (
        f"{len(by_weight)} cases; {'; '.join(parts)}. The weight whose final distance of gradients is lowest "
        "is "
        f"{behind.mean():.2f} dB behind the best on average, {behind.max():.1f} at worst"
    )


def batches(evidence: Evidence) -> str:
    """Batches of soft labels from one gradient."""
    rows = evidence.study("solver/batch_map.csv", study="acceptance")
    parts = []
    for (n, classes), of in groups(rows, ["n", "classes"]):
        count = int(of.batches.sum())
        parts.append(
            f"n = {n}, K = {classes}: {rate(round((of.recovered * of.batches).sum()), count)} of {count}"
        )
    every = evidence.study("solver/batch_map.csv")
    lost = every[every.recovered < 1]
    return (
        f"every label of the batch within .01, float64, format unknown or not: {'; '.join(parts)}; "
        f"{int(every.wrong_ok.sum())} wrong answers among {int(every.batches.sum())} batches of the map, "
        f"{len(lost)} of whose {len(every)} cells lose some: "
        + ", ".join(sorted({_cell(row) for row in each(lost)}))
    )


def _cell(row: Any) -> str:
    return f"{row.study} n = {row.n} K = {row.classes} {row.dtype}"


def many_classes(evidence: Evidence) -> str:
    """Other data and architectures: the study's cases by network."""
    cases = evidence.study("solver/identifiable_cases.csv.gz", dtype="float32")
    known = cases[cases.identifiable]
    return "; ".join(
        f"{model} {share(of.label_error <= 0.01)}"
        for model, of in groups(known.assign(net=known.model.str.partition("(")[0]), "net")
    )


def stops(evidence: Evidence) -> str:
    """The defense board: what the strongest attacker finds, one example."""
    board = evidence.board(
        "defenses-v1-defense", model="fcn(depth=3, width=64)", weights="untrained", **ONE_EXAMPLE
    )
    board = board[board.private_top1.notna()].sort_values(["private_top1", "defense"], kind="stable")
    lists = {"find the class in at least 90 %": board[board.private_top1 >= 0.9]}
    lists["in 50 to 90 %"] = board[(board.private_top1 >= 0.5) & (board.private_top1 < 0.9)]
    lists["in less than 50 %"] = board[board.private_top1 < 0.5]
    return f"of {len(board)} defenses the strongest attackers " + "; ".join(
        f"{said}: "
        + (
            ", ".join(
                f"{registry.defenses.short(row.defense)} ({100 * row.private_top1:.0f} %)" for row in each(of)
            )
            or "none"
        )
        for said, of in lists.items()
    )


def batch_counts(evidence: Evidence) -> str:
    """The class counts that iLRG finds on untrained networks."""
    rows = evidence.study("labels/ilrg_batches.csv")
    parts = []
    for classes, of in groups(rows, "classes"):
        means = of.groupby("batch_size")[["class_counts_exact", "class_counts"]].mean()
        parts.append(
            f"K = {classes}: LeAcc {100 * of.class_existence.min():.1f} % at least, LnAcc (overlap) at "
            "batches of "
            + ", ".join(
                f"{row.Index} {100 * row.class_counts_exact:.0f} % ({100 * row.class_counts:.1f} %)"
                for row in each(means)
            )
        )
    return f"means of {rows.model.nunique()} networks: {'; '.join(parts)}"


def batch_of_four(attack: str) -> Figures:
    """Of images-v1: batches of four of a fully connected network."""
    return lambda evidence: "; ".join(
        f"{state}: "
        + by_kind(
            evidence, "images-v1-image", "psnr", attack=attack, batch_size=4, weights=STATES[state],
            model="fcn(depth=4, width=64, bias=True)",
        )
        for state in ("untrained", "after an epoch")
    )  # fmt: skip


def defended(defense: str) -> Figures:
    """Of defenses-v1: the strongest attacker's image and class behind it, with none beside."""

    def figures(evidence: Evidence) -> str:
        parts = []
        for name in ("none", defense):
            rows = evidence.board("defenses-v1-defense", defense=name, weights="untrained", **ONE_EXAMPLE)
            parts += [
                f"{name} on {str(row.model).partition('(')[0]}: class {100 * row.private_top1:.0f} %, "
                f"image MSE {row.private_mse:.2g} (by {str(row.image_attack).partition('(')[0]}"
                f"{', told the defense' if row.image_told else ''})"
                for row in each(rows[rows.private_mse.notna() & rows.private_top1.notna()])
            ]
        return "; ".join(parts)

    return figures


def says(attack: str, metric: str, setting: str = "", dataset: str = "") -> Figures:
    """What is reported of it."""
    return lambda evidence: evidence.reported(attack, metric, setting, dataset)


FCN = "fcn(depth=4, width=64, bias=False)"
LENET, CONVNET = "lenet(init='uniform', bias=False)", "convnet(bias=False)"
GUESSES = {
    "iDLG's label": "inverting_gradients(labels='idlg', iterations=300, tv=0.01)",
    "λ's": "inverting_gradients(labels='lambda_recovery', iterations=300, tv=0.01)",
    "the true one": "inverting_gradients(labels='truth', iterations=300, tv=0.01)",
    "sought with the image": "inverting_gradients(labels='joint', iterations=300, tv=0.01)",
}
GUIDED = {
    "λ's label alone": GUESSES["λ's"],
    "λ's label and feature": "feature_guided(labels='lambda_recovery', iterations=300)",
}

THEMES: dict[str, tuple[Claim, ...]] = {
    "Label recovery": (
        Claim(
            "Smoothed and mixed labels come back in more than 95 % of all experiments",
            says(PUBLISHED, "λ within", "one example"),
            searched("ResNet-18, 64 px", EVERY, 1000),
            "We have one ImageNet image a class at 64 pixels, and CIFAR-10 below, in place of CIFAR-100, "
            f"Flowers-17 and ImageNet; {TRUTH_STOPS}. ε is from U(0.01, 0.5) here and a share from U(0.02, "
            "0.98).",
        ),
        Claim(
            "Smoothed labels, untrained LeNet",
            says(PUBLISHED, "λ within", "LeNet, untrained, no bias; one example; smoothed"),
            searched("LeNet", {"smoothed": "smoothing"}),
            f"They agree, though {TRUTH_STOPS}.",
        ),
        Claim(
            "Mixed labels, untrained LeNet",
            says(PUBLISHED, "λ within", "LeNet, untrained, no bias; one example; mixed"),
            searched("LeNet", {"mixed": "mixup"}),
            f"They agree, though {TRUTH_STOPS}.",
        ),
        Claim(
            "Smoothed labels, untrained ResNet-18",
            says(PUBLISHED, "λ within", "ResNet-18, untrained"),
            searched("ResNet-18", SOFT),
            f"They agree, though {TRUTH_STOPS}; mixed labels are ours in addition.",
        ),
        Claim(
            "Mixed labels, trained LeNet",
            says(PUBLISHED, "λ within", "LeNet, trained"),
            lambda e: (
                f"sigmoid, {searched('trained LeNet', SOFT)(e)}. ReLU, "
                f"{searched('trained LeNet, ReLU', SOFT)(e)}"
            ),
            "Their weights can't be had here; ours are trained on 4,660 images. What the published search "
            "loses lies beyond its bound, 50 in scaled units; theirs searched up to 66 for this experiment.",
        ),
        Claim(
            "Other networks: FCN-4, a trained ResNet-18",
            NO_FIGURE,
            lambda e: (
                f"FCN-4: {searched('FCN-4', EVERY)(e)}. ResNet-18 after three epochs: "
                f"{searched('trained ResNet-18', EVERY)(e)}"
            ),
            "Hard labels of trained networks have the largest |λ|: there the published bound costs most.",
        ),
        Claim(
            "Hard labels are a special case",
            says("idlg", "label accuracy"),
            searched("LeNet", {"hard": "hard"}),
            "iDLG reads the class from signs and nothing else; λ yields the last feature, too.",
        ),
        Claim(
            "iDLG's rule fails for soft labels",
            "the reason for the paper; no figure for a soft label within a tolerance",
            by_state("idlg"),
            "A one-hot answer is never within .01 of a smoothed or mixed label: its class may still be "
            "right.",
        ),
        Claim(
            "Recovery by the published search on a grid: MNIST, ConvNet, by training",
            NO_FIGURE,
            by_state(PUBLISHED),
            "Told nothing here (it tries smoothing, then mixup, and keeps the lower loss): confident "
            "networks "
            "have |λ| beyond its bounds, hard labels most of all.",
        ),
        Claim(
            "The same by the exact search",
            "not the paper's",
            by_state(EXACT),
            "What isn't found is refused with a reason: in float32 a saturated softmax leaves only t·ε "
            "known. A "
            "refused guess counts as lost even where it is right; the published search has no such verdict.",
        ),
        Claim(
            "What if the kind of label isn't known? (a reviewer's question)",
            "told in all experiments; [the reviews](https://openreview.net/forum?id=s8cMuxI5gu) ask for more",
            format_unknown,
            "Identifiable: three Cramér–Rao standard errors lie within .01. Unknown format costs nothing.",
        ),
        Claim(
            "Independent of the head's bias",
            "claimed for images of fully connected networks; the experiments' heads have none",
            biased,
            "A given bias gradient is p − y itself, and any label follows in closed form; a withheld one "
            "leaves "
            "the search, whose answer isn't proven unique then.",
        ),
        Claim(
            "A necessary condition: without a property of labels any λ fits",
            "a theorem, without a figure",
            reported_condition,
            "The solver returns the verdict instead of a guess; `attacks/solvers/README.md` lists all of "
            "them.",
        ),
    ),
    "Images from fully connected networks without a bias": (
        Claim(
            "FCN-4, smoothed label: the image comes back",
            says("fcn_analytic", "PSNR"),
            fully_connected,
            "Theirs averages rows that each divide by a small number, and rounds to 8 bits before PSNR; ours "
            "is "
            "one least squares a layer, before rounding. Their data range was 256, which adds 0.03 dB.",
        ),
        Claim(
            "The same on a grid of colour images",
            says("fcn_analytic", "SSIM"),
            imaged("fcn_analytic", FCN),
            "An exact image counts as 200 dB. CIFAR-10 images of 32 pixels instead of Flowers-17's 64.",
        ),
        Claim(
            "Matching the gradient fails there",
            says("dlg", "PSNR"),
            imaged("dlg(iterations=100)", FCN),
            "Theirs ran 300 iterations from normal noise, ours 100 from uniform noise in the box, which "
            "suits pixels better; after an epoch some of ours converge, and raise the mean.",
        ),
    ),
    "Images with λ's label and feature": (
        Claim(
            "λ's label helps the search for an image (LeNet, untrained)",
            NO_FIGURE,
            compared(GUESSES, LENET, "untrained"),
            "No source of labels is ahead here: the search ends far from the image, whatever its label.",
        ),
        Claim(
            "The same on a ConvNet after an epoch",
            NO_FIGURE,
            compared(GUESSES, CONVNET, "epochs=1"),
            "λ's row is within the true label's interval throughout; iDLG's falls behind on mixed labels "
            "alone.",
        ),
        Claim(
            "λ's feature helps the search, too (LeNet, untrained)",
            NO_FIGURE,
            compared(GUIDED, LENET, "untrained"),
            "No difference is seen; why was not looked into.",
        ),
        Claim(
            "The same on a ConvNet after an epoch",
            NO_FIGURE,
            compared(GUIDED, CONVNET, "epochs=1"),
            "The weight is chosen by the final distance of gradients: see the open questions.",
        ),
        Claim(
            "After λ no search is needed where activations can be inverted",
            "not the paper's",
            imaged("layerwise", LENET),
            "One least squares a layer from the head down.",
        ),
        Claim(
            "ReLU convolutions after λ",
            "not the paper's",
            imaged("delta_matching", CONVNET),
            "The last layer's δ is known after λ, so that its gradient is matched to first order.",
        ),
    ),
    "Noise": (
        Claim(
            "Noise on the gradient, the published experiment",
            NO_FIGURE,
            one_row_noised,
            "The published code adds noise to the one row that it searches, and clips nothing: that is no "
            "differential privacy. MNIST, fully connected, no bias.",
        ),
        Claim(
            "Noise on every entry",
            "not tried: the noise is on one row",
            whole_gradient_noised,
            "Ours takes all rows and directions into one likelihood and projects on the label's format; the "
            "published search reads one coordinate.",
        ),
        Claim(
            "DP-SGD's noise with its ε, mixed labels, an attacker who is told",
            "the paper gives no ε: without clipping there is none",
            private_noise,
            "ε is for 1000 rounds at a sampling rate of 0.01, δ = 1e-5; noise that stops the label still has "
            "an "
            "ε that promises nothing.",
        ),
    ),
    "Time": (
        Claim(
            "Seconds an example, smoothed, untrained LeNet",
            says(PUBLISHED, "seconds", "LeNet, untrained, no bias; one example; smoothed"),
            timed("LeNet", "smoothing"),
            f"{CLOCKS}; both searches of ours work on a stack, in closed form.",
        ),
        Claim(
            "Seconds an example, mixed, untrained LeNet",
            says(PUBLISHED, "seconds", "LeNet, untrained, no bias; one example; mixed"),
            timed("LeNet", "mixup"),
            f"{CLOCKS}; their swarm, minutes a call, took over for six of 135.",
        ),
        Claim(
            "Seconds an example, smoothed, untrained ResNet-18",
            says(PUBLISHED, "seconds", "ResNet-18, untrained"),
            timed("ResNet-18", "smoothing"),
            f"{CLOCKS}; theirs includes no forward pass either.",
        ),
        Claim(
            "Seconds an example, mixed, trained LeNet",
            says(PUBLISHED, "seconds", "LeNet, trained"),
            timed("trained LeNet", "mixup"),
            f"{CLOCKS}; their swarm, minutes a call, took over for 28 of 900.",
        ),
        Claim(
            "One example at a time, the published search as its authors run it",
            "as in the rows above",
            ratios,
            "`as published` is L-BFGS by torch.optim with autograd, in the same process as ours, taking "
            "turns.",
        ),
        Claim(
            "Seconds an image, FCN-4",
            says("fcn_analytic", "seconds"),
            milliseconds_of_images,
            "Theirs has layers of 4096, 1024 and 256 units and averages rows in Python; ours are 64 units "
            "wide.",
        ),
    ),
    "What other papers report": (
        Claim(
            "iLRG: classes and counts of a batch, with a bias",
            lambda e: f"{e.reported('ilrg', 'class existence')}; {e.reported('ilrg', 'class counts')}",
            batch_counts,
            "Their LnAcc is the share of classes whose count is exact: with few classes a large batch has "
            "many of each, and one off is wrong. The overlap of the multisets says how few are off. Images "
            "are MNIST's, labels drawn where K > 10; the abstract doesn't say which cases are most.",
        ),
        Claim(
            "SPEAR: exact batches through a ReLU layer",
            says("spear", "largest batch"),
            batch_of_four("spear"),
            "Batches of four, 64 units a layer; larger ones are not in the grid.",
        ),
        Claim(
            "Cocktail party: batches by independence",
            says("cocktail_party", "largest batch"),
            batch_of_four("cocktail_party"),
            "Independence is an approximation: images are recognised, not exact.",
        ),
        Claim(
            "GradInversion: images of a batch",
            says("gradinversion", "largest batch"),
            lambda e: (
                "one image, labels given: "
                + "; ".join(
                    f"{str(row.model).partition('(')[0]} {row.weights} {row.psnr:.1f} dB "
                    f"[{row.psnr_low:.1f}, "
                    f"{row.psnr_high:.1f}], n = {int(row.n)}"
                    for row in each(
                        e.board("images-v1-image", attack="gradinversion(labels='truth', iterations=300)")
                    )
                )
            ),
            "Theirs has batch norm's statistics of a ResNet-50, 20,000 iterations and several seeds; ours "
            "300.",
        ),
        Claim(
            "DLG finds labels while it searches for the image",
            says("dlg", "label accuracy"),
            lambda e: by_kind(
                e,
                "images-v1-label",
                "top1",
                attack="dlg(iterations=100)",
                model=LENET,
                weights="untrained",
                **ONE_EXAMPLE,
            ),
            "100 iterations of L-BFGS on colour images; the share of right classes.",
        ),
        Claim(
            "Soteria raises the error of images",
            says("dlg", "factor", "past soteria"),
            defended("soteria"),
            "The attackers here include one that is told: it leaves out the masked layer.",
        ),
        Claim(
            "PRECODE stops inversion",
            says("inverting_gradients", "attack success", "past precode"),
            defended("precode"),
            "Without search: the last feature is sampled, but a label is still in the head's gradient.",
        ),
    ),
    "Open questions of the paper": (
        Claim(
            "Noise, compression and failure: what survives?",
            "noise alone",
            disturbed,
            "Labels within .01, six networks, four kinds of label, 16 cases each; the disturbance isn't "
            "told. "
            "Rounding to few bits is no independent noise, and a clipped gradient of a saturated network can "
            "imitate another label's: there wrong answers come as right ones.",
        ),
        Claim(
            "Would another loss than the variance do better? Does it have false minima? (a reviewer's "
            "question)",
            "variance, without a proof of its minimum",
            best_losses,
            "Any loss that vanishes where all entries are equal has its lowest point at the truth; the "
            "bounds and "
            "the descent lose it. `results/solver/losses.md` says which loss suits which noise.",
        ),
        Claim(
            "How much should the feature's loss count against the gradient's?",
            "weights f and g are left open",
            feature_weights,
            "Little on LeNets; on trained ConvNets the feature is most of the gain. The lowest final "
            "distance "
            "of gradients picks the weight without the truth.",
        ),
        Claim(
            "A vector of λ: batches",
            "one example a gradient",
            batches,
            "Exact zeros of ReLU features, or agreement between examples, separate the batch. Lost cells: "
            "more "
            "examples than the classes determine, and float32 on trained or large batches.",
        ),
        Claim(
            "Batches of two on a grid: MNIST, ConvNet, by training",
            "one example a gradient",
            by_state("lambda_recovery_batch", 2),
            "float32, where the examples that a trained network already fits drown in rounding. A fit that "
            "is "
            "worse than rounding explains ends at the step limit, and counts as found only where it is "
            "right.",
        ),
        Claim(
            "Batches of four on the same grid",
            "one example a gradient",
            by_state("lambda_recovery_batch", 4),
            "The same; every label of the batch has to be found.",
        ),
        Claim(
            "Other architectures and numbers of classes",
            "LeNet, FCN, ResNet-18",
            many_classes,
            "Labels within .01 of identifiable cases in float32; untrained, trained and memorised networks, "
            "K = 10, 100, 1000, with and without a bias.",
        ),
        Claim(
            "Which defenses stop it?",
            "label smoothing, mixup and noise are looked at; they don't",
            stops,
            "The private example's class, by the strongest attacker, who may be told the defense.",
        ),
    ),
}

HEADS = ("claim", "reported", "ours", "made again by", "where they differ, why")
INTRODUCTION = f"""# The paper beside us

Wang, Liang, He: *Towards Eliminating Hard Label Constraints in Gradient Inversion Attacks*, ICLR 2024
([arXiv 2402.03124]({PAPER})), and what other papers report of methods that are here. Written by
`python -m bench.paper` from [reported.csv](reported.csv), the published boards and the studies' files: no
figure is typed in by hand, but the reasons are. Rates have 95 % Wilson intervals, means on boards
bootstrapped ones. A label is found where all of its entries are within 0.01 of the truth; a failed or refused
trial is not. Data that no package brings are called what they are: CIFAR-10 (846 test images), ImageNet (one
image a class, 64 px).
"""


def page(evidence: Evidence) -> str:
    """PAPER.md."""
    parts = [INTRODUCTION]
    for theme, claims in THEMES.items():
        parts.append(f"## {theme}\n\n{table(HEADS, [claim.cells(evidence) for claim in claims])}")
    return "\n".join(parts)


def write(results: Path) -> list[Path]:
    """Writes both pages into the folder of results; returns them."""
    evidence = Evidence(results)
    written = []
    for name, content in (("PAPER.md", page(evidence)), ("PEERS.md", peers.page(evidence))):
        path = results / name
        path.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def main() -> None:
    """Says what was written."""
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results"):
        print(path)


if __name__ == "__main__":
    main()
