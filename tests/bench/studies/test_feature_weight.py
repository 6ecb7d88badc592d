"""The study of the feature's weight: its observations, and how rules are judged."""

import pandas as pd
import pytest
import torch

from bench.studies import feature_weight as study


def frame(psnr, distance):
    rows = pd.DataFrame({"weight": study.WEIGHTS, "psnr": psnr, "distance": distance})
    rows["distance_at_50"], rows["distance_at_100"] = -rows.distance, rows.distance
    return rows.assign(model="m", state="s", label_format="hard", image=0, feature=1.0)


def test_a_rule_is_judged_by_what_it_loses_to_the_best():
    psnr, distance = [10.0, 11, 12, 15, 13, 9], [0.3, 0.2, 0.1, 0.2, 0.3, 0.4]
    (judged,) = study.judged(frame(psnr, distance)).to_dict("records")
    assert judged["best_weight"] == study.WEIGHTS[3]
    assert judged["lowest final distance of gradients"] == 3
    assert judged["lowest distance at iteration 50"] == 6
    assert judged["always 0"] == 5


@pytest.mark.parametrize("label_format", study.FORMATS)
def test_an_observation_is_the_gradient_of_its_example(label_format):
    seen, truth = study.observe(study.Case(study.MODELS[1], "untrained", label_format, 1))
    p = torch.softmax(seen.model(truth.images), dim=1)
    u = (p - truth.soft_labels)[0]
    torch.testing.assert_close(seen.head_weight_gradient, torch.outer(u, seen.model[:-1](truth.images)[0]))


def test_a_run_resumes_where_it_was_cut(tmp_path, monkeypatch, capsys):
    ran = []

    def rows(case):
        ran.append(case)
        common = dict(zip(study.COLUMNS, (*case, 0.0), strict=False))
        rest = dict.fromkeys(study.COLUMNS[6:], 1.0)
        return [common | {"weight": weight} | rest for weight in study.WEIGHTS]

    monkeypatch.setattr(study, "descents", rows)
    monkeypatch.setattr("sys.argv", ["", "--images", "1", "--results", str(tmp_path)])
    study.main()
    first = len(ran)
    study.main()
    assert len(ran) == first == len(study.MODELS) * len(study.STATES) * len(study.FORMATS)
    assert "always 0" in capsys.readouterr().out
