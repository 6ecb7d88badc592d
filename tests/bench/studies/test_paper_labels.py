"""The paper's label experiments, on a few digits: both searches find an untrained network's labels."""

import pytest

from bench.cases.data import load
from bench.studies.paper_labels import FORMATS, Cell, cells, row

NET = ("fcn(bias=False, depth=2, width=32)", "untrained")


@pytest.mark.parametrize("label_format", FORMATS)
@pytest.mark.parametrize("search", ["exact", "paper"])
def test_labels_of_an_untrained_network_are_found(search, label_format):
    made = row(Cell("digits", *NET, "none", label_format, search), load("mnist5k"), None, 6)
    assert (made["within"], made["lam_within"], made["wrong_ok"]) == (1, 1, 0)
    assert made["low"] == pytest.approx(6 / (6 + 1.959964**2))  # Wilson's lower end where all succeed


@pytest.mark.parametrize("bias_gradient", ["given", "withheld"])
def test_a_bias_may_be_there(bias_gradient):
    net = ("fcn(depth=2, width=32)", "untrained")
    made = row(Cell("digits", *net, bias_gradient, "smoothing", "exact"), load("mnist5k"), None, 6)
    assert made["within"] == 1


def test_trained_networks_are_not_trained_on_what_is_attacked():
    digits = load("mnist5k")
    for training in (None, digits):
        with pytest.raises(SystemExit, match="another data set than the attacked"):
            row(Cell("digits", NET[0], "epochs=1", "none", "hard", "exact"), digits, training, 2)


def test_cells_of_one_data_set_alone_and_none_twice():
    assert {cell.data for cell in cells("few", None)} == {"few"}
    every = list(cells("few", "many"))
    assert len(every) == len(set(every)) > 40
