"""What the README says works: its example of data frames, and the commands that it names."""

import re
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parents[2]


def test_the_readmes_data_frames(leakbench, small, tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "from bench.report import load" in block]
    leakbench("run", small, "--workers", 0, "--quiet", "--out", "runs/quick")
    names: dict = {}
    exec(example, names)
    assert isinstance(names["board"], pd.DataFrame)
    assert len(names["smoothed"]) == 8
    assert "lambda_recovery(search='exact')" in capsys.readouterr().out
    assert set(names["best"]["none"]) >= {"idlg", "lambda_recovery(search='exact')"}
    assert names["results"].tracks == ["label", "feature"]
    assert len(names["results"].trials) == 80


def test_the_pull_requests_workflow_verifies_without_secrets_or_rights():
    text = (ROOT / ".github" / "workflows" / "pull-request.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True] == "pull_request"  # YAML's `on`; never pull_request_target
    assert "secrets." not in text
    steps = [step.get("run", "") for step in workflow["jobs"]["verify"]["steps"]]
    assert any('leakbench verify "$records"' in step for step in steps)
    assert not any("${{" in step for step in steps)  # nothing of a pull request becomes shell text
