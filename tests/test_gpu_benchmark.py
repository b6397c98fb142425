"""`benchmarks/gpu.py` at toy size, and that its real sizes are those of the released models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    return gpu


def test_sizes_are_those_published(gpu):
    from architectures import modules

    for model in gpu.MODELS.values():
        network, vae = modules(model)
        size = sum(p.numel() for p in network.parameters()) / 1e9
        assert size == pytest.approx(model.billions, rel=1e-3)
        assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(83.7, rel=2e-3)


def test_runs_and_goes_on_where_it_stopped(gpu, tmp_path, capsys):
    out = tmp_path / "gpu.json"

    def rows(*arguments):
        gpu.main(["--toy", "--out", str(out), *arguments])
        return json.loads(out.read_text()) if out.exists() else []

    assert rows("--minutes", "0") == []
    assert "are over" in capsys.readouterr().out
    (first,) = rows("--models", "flux-dev", "--methods", "draft")
    # what the loop calls: 3 steps of 4 samples, the last again with gradient, and their pictures
    assert first["calls"] == {
        "predict 4 False False": 3,
        "predict 4 True False": 1,
        "decode 4 False True": 1,
    }
    methods = rows("--models", "flux-dev")
    assert [row["method"] for row in methods] == ["draft", "trajectory", "awm", "reno"]
    found = rows("--methods", "draft")
    assert found[:4] == [first, *methods[1:]]
    assert [row["model"] for row in found[4:]] == [m for m in gpu.MODELS if m != "flux-dev"]
    for row in found:
        assert row["images_per_s"] > 0
        assert 0 < row["of_peak"] < 1
        assert row["overhead"] > 0
    capsys.readouterr()
    gpu.main(["--out", str(out), "--report"])
    assert capsys.readouterr().out.count("| flux-dev |") == 4


def test_what_a_device_does_not_have_is_a_row_that_says_so(gpu, tmp_path):
    out = tmp_path / "gpu.json"
    how = ["--toy", "--out", str(out), "--models", "flux-dev", "--methods", "draft"]
    gpu.main([*how, "--variants", "cudnn", "flash"])
    refused, flash = json.loads(out.read_text())
    assert "runs on CUDA devices alone" in refused["error"]
    assert flash["images_per_s"] > 0
