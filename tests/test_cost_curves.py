"""benchmarks/cost_curves.py and benchmarks/against_trl.py run, and count right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import against_trl
import cost_curves


def test_cost_curves_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost_curves.py", "--quick", "--out", str(tmp_path)])
    cost_curves.main()
    found = json.loads((tmp_path / "cost_curves.json").read_text())
    assert found.keys() == {*cost_curves.QUICK, "memory by prompts", "memory by epochs"}
    assert all(s > 0 for name in cost_curves.QUICK for s in found[name]["seconds"])
    rows = found["memory by prompts"]["rows"]
    assert rows[1][1] == pytest.approx(2 * rows[0][1])  # the cache is linear in the prompts
    assert "| images | 4, 8 |" in (tmp_path / "cost_curves.md").read_text()


def test_a_line_is_fitted():
    found = cost_curves.line([1, 2, 3], [3.0, 5.0, 7.0])
    assert found == pytest.approx({"slope": 2, "intercept": 1, "r2": 1})


@pytest.mark.parametrize("name", against_trl.ROWS)
def test_runs_against_trl_are_configs(name, tmp_path):
    what, options = against_trl.ROWS[name]
    job = {"what": what, "options": options, "seed": 3, "folder": str(tmp_path)}
    config = against_trl.config(job)
    assert config.train.seed == 3
    assert config.model.compile == ("compile" in name)
    assert (config.model.dtype == "bfloat16") == ("bfloat16" in name)


def test_ratios_are_those_of_pairs():
    def pair(ours, trl):
        return {"ours": {"seconds": ours}, "trl": {"seconds": trl}}

    done = [pair([1.0, 1.0], [2.0, 2.0]), pair([2.0, 2.0, 9.0], [3.0, 3.0, 3.0])]
    assert against_trl.ratios(done, "trl") == [2.0, 1.5]
    assert against_trl.spread([2.0, 1.5, 1.0]) == "1.50 [1.00, 2.00]"
