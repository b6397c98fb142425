"""The trainer from Python: an algorithm of one's own, callbacks, pictures, prompts, batches."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import test_trainer
import yaml
from safetensors.torch import load_file
from test_trainer import redness, rows_of

import rewards
from diffalign import ConfigError, TrainConfig, algorithms, policies
from diffalign.algorithms import Algorithm, GradientAlgorithm, Needs
from diffalign.algorithms.ddpo import DDPO
from diffalign.commands import cli
from diffalign.config.prompts import Prompt
from diffalign.policies import lora
from diffalign.record import checkpoint
from diffalign.sampling.pipeline import Sampler

make = test_trainer.make  # the fixture
ROOT = Path(__file__).parents[1]
QUICK = {"eval.prompts": None, "data.groups": 2, "train.checkpoint_every": 1}


@dataclass
class Mine(DDPO):
    """DDPO with an option of its own."""

    boost: float = 1.0

    def loss(self, policy, batch):
        loss, metrics = super().loss(policy, batch)
        return self.boost * loss, metrics


NAME = f"{Mine.__module__}:Mine"


def test_an_algorithm_of_ones_own(make):
    runs = [
        make(NAME, run="named", **QUICK, **{"algorithm.boost": 2.0}),
        make("ddpo", run="instance", algorithm=Mine(boost=2.0), **QUICK),
        make("ddpo", run="options", algorithm={"type": NAME, "boost": 2.0}, **QUICK),
    ]
    for trainer in runs:
        assert type(trainer.algorithm) is Mine
        trainer.train()
        saved = yaml.safe_load((trainer.dir / "config.yaml").read_text())["algorithm"]
        assert (saved["type"], saved["boost"]) == (NAME, 2.0)
        assert rows_of(trainer) == rows_of(runs[0])
    assert make("ddpo", run="plain", algorithm="rwr", **QUICK).algorithm.needs is Needs.FINAL
    resumed = make("ddpo", run="instance", algorithm=Mine(boost=2.0), resume=True, **QUICK)
    assert resumed.epoch == 1
    with pytest.raises(ConfigError, match=r"algorithm\.boost: 2\.0 -> 3\.0"):
        make("ddpo", run="instance", algorithm=Mine(boost=3.0), resume=True, **QUICK)


class NoNeeds(Algorithm):
    pass


class NoLoss(Algorithm):
    needs = Needs.TRAJECTORY


class NoSurrogate(GradientAlgorithm):
    pass


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ppo", r"unknown algorithm 'ppo'.*module:Class"),
        ("nowhere:Mine", "nowhere:Mine cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:Other", r"Other cannot be imported: AttributeError"),
        (f"{__name__}:make", "not a class"),
        ("pathlib:Path", r"pathlib:\w*Path is no Algorithm; derive it from"),
        (f"{__name__}:NoNeeds", "does not say what it needs"),
        (f"{__name__}:NoLoss", "defines no loss"),
        (f"{__name__}:NoSurrogate", "defines no surrogate"),
    ],
)
def test_what_is_no_algorithm_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        algorithms.build({"type": name})


def test_a_class_in_place_of_an_algorithm(make):
    with pytest.raises(ConfigError, match=r"algorithm=Mine is a class; give Mine\(\.\.\.\)"):
        make("ddpo", algorithm=Mine)


def test_a_callback_sees_every_epoch_and_may_end_the_run(make):
    seen = []

    def look(trainer, epoch, metrics):
        seen.append((epoch, metrics["reward_mean"], trainer.epoch, len(trainer.tracker.rows)))
        return epoch == 2

    trainer = make("ddpo", on_epoch_end=look, **QUICK, **{"train.epochs": 5})
    trainer.train()
    assert [s[0] for s in seen] == [s[2] for s in seen] == [1, 2]
    assert [s[1] for s in seen] == [row["reward_mean"] for row in trainer.tracker.rows[1:]]
    assert checkpoint.load(trainer.dir)["epoch"] == 2
    count = []
    every = lambda *a: count.append(a[1])  # noqa: E731
    make("ddpo", resume=True, on_epoch_end=every, **QUICK, **{"train.epochs": 4}).train()
    assert count == [3, 4]  # the last one too


def test_pictures_of_the_current_weights(make, pipelines):
    trainer = make("draft", **QUICK, **{"train.epochs": 2, "train.lr": 3e-2})
    texts, seeds = ["a red dog", "a text that is new"], [0, 3]
    before = trainer.sample(texts, seeds, steps=3)
    trainer.train()
    assert not trainer.policy.has_text_encoders
    after = trainer.sample(texts, seeds, steps=3, guidance=2.5)
    assert not trainer.policy.has_text_encoders  # read for the new text, and freed again
    assert len(before) == len(after) == 4
    plain = Sampler(pipelines["sd-v"])
    for weights, drawn, guidance in (({}, before, 2.0), ({str(trainer.dir): 1.0}, after, 2.5)):
        plain.use(weights)
        wanted = plain.draw([t for t in texts for _ in seeds], seeds * 2, 3, guidance)
        for ours, theirs in zip(drawn, wanted, strict=True):
            difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float))
            assert difference.max() <= 2, difference.max()
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(before, after, strict=True))
    known = trainer.sample(texts[:1], [3], steps=3, guidance=2.5)  # whatever it is drawn with
    assert np.abs(np.asarray(known[0], float) - np.asarray(after[1], float)).max() <= 1
    with pytest.raises(ValueError, match="is one text, not a list"):
        trainer.sample("a red dog")


def test_the_example_of_the_docs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    small = ["--train.epochs", "1", "--sampler.steps", "2", "--algorithm.last", "1"]
    small += ["--eval.prompts", "null", "--log.dir", str(tmp_path / "run")]
    from_file = TrainConfig.from_file
    monkeypatch.setattr(TrainConfig, "from_file", lambda path: from_file(path, small))
    exec(code[0], {})
    assert (tmp_path / "run" / "apple_1.png").exists()


def test_an_average_is_what_is_drawn(make):
    trainer = make("draft", **QUICK, **{"train.ema": 0.999, "train.lr": 3e-2})
    trainer.train()
    averaged = np.asarray(trainer.sample(["a red dog"])[0], float)
    trainer.config.train.ema = 0.0
    assert np.any(np.asarray(trainer.sample(["a red dog"])[0], float) != averaged)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("a red apple", r"prompts='a red apple' is one text, not a list; write \['a red apple'\]"),
        (7, r"prompts\[0\]: 7 is not a text"),
        ([1, 2], r"prompts\[0\]: 1 is not a text"),
        ([{"text": "a"}], r"prompts\[0\]: no \"prompt\" among the keys text"),
        ([], "prompts is empty; give at least one text"),
    ],
)
def test_prompts_from_python_are_texts(make, prompts, said):
    with pytest.raises(ValueError, match=said):
        make("ddpo", prompts=prompts, **QUICK)


def test_prompts_from_python_may_have_metadata(make):
    seen = []

    def known(images, prompts, metadata):
        seen.extend(m["n"] for m in metadata)
        return images.mean((1, 2, 3))

    texts = [Prompt(f"prompt {n}", {"n": n}) for n in range(2)]
    make("ddpo", rewards={known: 1.0}, prompts=texts, **QUICK).train()
    assert set(seen) == {0, 1}


class Ranked(rewards.Reward):
    """Compares the pictures of a prompt: all of them must come in one call."""

    name, per_group = "ranked", True

    def forward(self, images, prompts, metadata=None):
        ranks = images.new_zeros(len(prompts))
        for prompt in set(prompts):
            own = [i for i, p in enumerate(prompts) if p == prompt]
            assert len(own) == 4
            ranks[own] = images[own].mean((1, 2, 3)).argsort().argsort().float() ** 2
        return ranks


@pytest.mark.parametrize(("batch", "same"), [(3, False), (5, True)])
def test_a_batch_need_not_divide_the_pictures_of_an_epoch(make, batch, same):
    options = {**QUICK, "sampler.same_noise": same}
    options |= {"sampler.window": 1, "sampler.window_range": [1, 2]}
    found = []
    for size in (8, batch):
        trainer = make(
            "ddpo", run=str(size), rewards={Ranked: 1.0, redness: 0.0}, **options,
            **{"sampler.batch": size},
        )  # fmt: skip
        trainer.train()
        found.append(rows_of(trainer)[1])
        assert trainer.policy.calls == pytest.approx(trainer.plan.calls_per_epoch)
    for name in ("reward_mean", "reward/redness_mean", "grad_norm", "diversity"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3), name


def test_a_home_folder_is_found(make, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    trainer = make("ddpo", **QUICK, **{"log.dir": "~/runs/a"})
    assert trainer.dir == tmp_path / "home" / "runs" / "a"
    trainer.train()
    assert load_file(trainer.dir / lora.WEIGHTS)


class Sometimes(rewards.Reward):
    """Differentiable, as its instance says."""

    def __init__(self):
        super().__init__()
        self.differentiable = True


class Known:
    differentiable = False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def plain(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("spec", "known"),
    [
        ({"jpeg": 1.0}, False),
        ({"jpeg_incompressibility": 1.0}, False),
        ({"jpeg": {"surrogate": True}}, True),
        ({"clip": 1.0}, True),
        ({"remote": {"url": "http://a", "name": "x"}}, False),
        ({"ensemble": {"of": {"clip": 1.0, "jpeg": 1.0}}}, False),
        ({"ensemble": {"of": {"clip": 1.0, Sometimes: 1.0}}}, None),
        ({"ensemble": {"of": {"clip": 1.0, "aesthetic": 1.0}}}, True),
        ({plain: 1.0}, False),
        ({redness: 1.0}, True),
        ({Sometimes: 1.0}, None),
        ({Known(): 1.0}, False),
        ({Known: 1.0}, None),
    ],
)
def test_what_is_known_of_gradients_before_a_reward_is_loaded(spec, known):
    assert list(rewards.gradients_of(spec).values()) == [known]
    if known is False:
        with pytest.raises(ValueError, match=r"is not differentiable, and reward backprop"):
            rewards.check_gradient(spec)
        rewards.check_gradient({redness: 1.0} | {k: _monitor(v) for k, v in spec.items()})
    else:
        rewards.check_gradient(spec)


def _monitor(value):
    return {**value, "weight": 0.0} if isinstance(value, dict) else 0.0


def test_a_dry_run_refuses_what_the_run_refuses(pipelines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policies, "load", None)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    tree = {
        "model": {"name": pipelines["sd-v"]},
        "algorithm": {"type": "draft", "last": 1},
        "sampler": {"steps": 4},
        "rewards": {f"{__name__}:plain": 1.0},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "groups": 2, "group_size": 1},
        "eval": {"prompts": None},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert cli.train([str(tmp_path / "c.yaml"), "--dry-run"]) == 1
    said = r"^error: rewards\.\S+:plain is not differentiable.*set `differentiable = True`"
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--resume"], ["--train.lr", "1"]])
def test_a_missing_config_is_said_in_one_sentence(arguments, capsys):
    assert cli.train(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no config file; give one first")
    assert error.count("\n") == 1
