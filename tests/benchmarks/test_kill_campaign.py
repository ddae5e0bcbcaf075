"""The campaign in short: runs that were killed come to the same end, and a difference is found."""

import json
import sys

import pytest

from benchmarks import kill_campaign
from dynmoe_jax.runs.metrics_file import FILE_NAME, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_killed_runs_end_like_the_one_that_was_not(tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    arguments = ["--kills=2", "--kills-per-run=2", "--steps=36", f"--json={figures}", "--seed=3"]
    monkeypatch.setattr(sys, "argv", ["kill_campaign", *arguments])
    compared, differences = [], kill_campaign.differences

    def compare(workdir, undisturbed):
        compared.append(differences(workdir, undisturbed))
        if len(compared) == 1:  # the comparison itself can fail
            lines = (workdir / FILE_NAME).read_text().splitlines(keepends=True)
            (workdir / FILE_NAME).write_text("".join(lines[:5] + lines[6:]))
            assert differences(workdir, undisturbed) == ["metrics.jsonl has other steps"]
            assert len(read_metrics(workdir)) == 35
        return compared[-1]

    monkeypatch.setattr(kill_campaign, "differences", compare)
    assert kill_campaign.main() == 0
    found = json.loads(figures.read_text())
    assert found["kills"] == 2
    assert found["differences"] == 0
    assert compared
    assert not any(compared)
