"""Secrets are refused in the settings of rewards, and nothing that a run writes shows them."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import rewards
from diffalign import TrainConfig, report
from diffalign.drawing import grids
from diffalign.record import metrics
from rewards.redaction import redact

SECRET = "hunter2-Ab1"


def mean(images, prompts, **options):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"token": SECRET},
        {"api_key": SECRET},
        {"openai_key": SECRET},
        {"apiKey": SECRET},
        {"password": 12345},
        {"headers": {"Authorization": f"Bearer {SECRET}"}},
        {"headers": {"X-Api-Key": SECRET}},
        {"server.token": SECRET},
        {"endpoints": [f"https://me:{SECRET}@host/"]},
        {"endpoint": f"https://host/score?api_key={SECRET}&n=3"},
        {"token_env": "hf_" + "abcDEF123" * 3},
        {"token": "***"},  # out of a config that was written by a run
    ],
)
def test_a_secret_in_a_spec_is_refused(options):
    nested = {"ensemble": {"of": {"a": {"type": mean, **options}, "jpeg": 1.0}}}
    for spec in ({mean: options}, {"x": {"type": "jpeg", **options}}, nested):
        with pytest.raises(ValueError, match="environment variable") as found:
            rewards.check(spec)
        assert SECRET not in str(found.value)
        assert next(iter(options)) in str(found.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 5, "monkey": "A1"},
        {"key": "caption", "sort_keys": ["a"]},
        {"token_env": "REWARD_KEY", "api_key_env": "REWARD_KEY"},
        {"url": "http://127.0.0.1:8000", "text": "a@b: see ://"},
        {"token": None, "tokenizer": "openai/clip"},
    ],
)
def test_what_is_no_secret_is_left_alone(options):
    assert redact(options) == options
    rewards.check({mean: options})


def test_nothing_that_is_written_shows_a_secret(tmp_path):
    """A second net below the refusal: settings that got past it, or come from an older version."""
    spec = {"r": {"type": "remote", "url": f"http://me:{SECRET}@host", "token": SECRET}}
    config = TrainConfig.from_dict({"rewards": spec, "eval": {"rewards": spec}})
    config.save(tmp_path / "config.yaml")
    grids.save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", config.to_dict())
    grids.save_png(Image.new("RGB", (4, 4)), tmp_path / "grid.png", {"rewards": spec, "n": 1})
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    report.write([tmp_path])
    for path in tmp_path.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path
    assert json.loads(Image.open(tmp_path / "grid.png").info["diffalign"])["n"] == 1
    assert "token: '***'" in (tmp_path / "config.yaml").read_text()
    assert config.rewards["r"]["token"] == SECRET  # what is in memory is as it was given
    # a report on a folder of a version that wrote secrets
    text = (tmp_path / "config.yaml").read_text().replace("***", SECRET)
    (tmp_path / "config.yaml").write_text(text)
    assert SECRET not in report.write([tmp_path]).read_text()


def test_trackers_are_given_no_secret(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(metrics, "check_trackers", lambda names: None)
    accelerator = SimpleNamespace(
        is_main_process=True, init_trackers=lambda name, config: seen.update(config)
    )
    metrics.Tracker(tmp_path, ["any"], {"rewards": {"r": {"token": SECRET}}}, accelerator)
    assert seen == {"rewards.r.token": "***"}
