"""`diffalign bench`: the calls of a run are counted as they are, and made again as they were."""

from collections import Counter
from contextlib import nullcontext

import helpers_algorithms
import pytest
from helpers_algorithms import move

from diffalign.commands import cli
from diffalign.training.bare import Recorder

make = helpers_algorithms.make  # the fixture


@pytest.mark.parametrize("algorithm", ["ddpo", "awm", "draft"])
def test_every_call_is_counted_and_made_again(make, algorithm):
    options = {
        "algorithm.kl_weight": 0.1,
        "sampler.kernel": "ddim" if algorithm == "ddpo" else "ode",
    }
    trainer = make(algorithm, **options)
    move(trainer)
    trainer.policy.merged = nullcontext  # such a call is counted as one without a LoRA
    before, recorder = trainer.policy.calls, Recorder(trainer)
    with recorder.recording():
        trainer.run_epoch(0)
    counted = Counter()
    for kind, n in recorder.counts.items():
        counted[kind.part, kind.gradient, kind.base] += n * kind.rows
    denoiser = {k: n for k, n in counted.items() if k[0] == "denoiser"}
    assert sum(denoiser.values()) == trainer.policy.calls - before
    carried = sum(n for (_, gradient, _), n in denoiser.items() if gradient)
    assert carried > 0
    # the anchor needs the base model's output wherever there is gradient
    assert sum(n for (_, _, base), n in denoiser.items() if base) == carried
    assert recorder.seconds.keys() == {"rollout", "update"}
    assert {kind.phase for kind in recorder.counts} <= {"rollout", "update"}

    weights = [p.detach().clone() for p in trainer.policy.trainable_parameters()]
    calls = trainer.policy.calls
    found = recorder.replay(repeats=1)
    assert found.keys() == recorder.counts.keys()
    assert all(seconds > 0 for seconds in found.values())
    assert trainer.policy.calls == calls  # they are no part of the run
    for p, w in zip(trainer.policy.trainable_parameters(), weights, strict=True):
        assert p.grad is None or not p.grad.any()
        assert p.equal(w)
    assert "call" not in vars(trainer.policy)  # nothing is left in the way
    assert "score" not in vars(trainer.reward)


def test_the_command(pipelines, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na blue car\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{name: {pipelines['sd-v']}, resolution: 16}}\n"
        "sampler: {steps: 3, batch: 4}\nrewards: {jpeg: 1.0}\n"
        f"data: {{prompts: {prompts}, groups: 2, group_size: 2}}\n"
        f"eval: {{prompts: {prompts}}}\n"
    )
    assert cli.bench([str(config), "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    for text in ("ddpo: median of 2 epochs", "rollout    denoiser, forward", "with backward",
                 "evaluation reward, forward", "\nepoch "):  # fmt: skip
        assert text in out
    assert not (tmp_path / "runs").exists()
    assert cli.bench([str(config), "--rounds", "0"]) == 1
    assert "--rounds 0 measures nothing" in capsys.readouterr().err
    assert cli.bench([str(config), "--train.lrr", "1"]) == 1
    assert "did you mean 'train.lr'" in capsys.readouterr().err
