"""The loop: invariances of the gradient, resuming, failing rewards, and that rewards rise."""

from pathlib import Path

import accelerate
import pytest
import torch
from conftest import perturb
from diffusers import UNet2DConditionModel
from families import tiny_vae

from diffalign import TrainConfig, Trainer, TrainingStopped
from diffalign.algorithms.ddpo import DDPO
from diffalign.dynamics import Gaussian
from diffalign.policies import lora
from diffalign.policies.unet import UNetPolicy
from diffalign.record.metrics import read_metrics
from diffalign.training import saving
from diffalign.verdict import VERDICTS

OBJECTS = ["dog", "cat", "apple", "car", "bus", "house", "tree", "star"]


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


redness.differentiable = True


@pytest.fixture
def make(pipelines, tmp_path):
    """make(algorithm, run="a", rewards=..., **{"train.lr": ..., "resume": ...}) -> Trainer."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red {o}" for o in OBJECTS))

    def make(algorithm, /, run="a", rewards=None, **overrides):
        options = {k: overrides.pop(k) for k in list(overrides) if "." not in k}
        tree = {
            "model": {"name": pipelines["sd-v"], "lora_rank": 2},
            "algorithm": {"type": algorithm},
            "sampler": {"steps": 4, "guidance": 2.0, "batch": 8},
            "data": {"prompts": str(prompts), "groups": 4, "group_size": 4},
            "train": {"epochs": 1, "lr": 1e-2, "checkpoint_every": 1},
            "eval": {"every": 0, "prompts": str(prompts), "steps": 4, "images_per_prompt": 1},
            "log": {"dir": str(tmp_path / run)},
        }
        for key, value in overrides.items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        config = TrainConfig.from_dict(tree)
        return Trainer(config, rewards=rewards or {redness: 1.0}, **options)

    return make


def rows_of(trainer):
    """Metrics but for timings, the failing stand-in under the name of what it stands in for."""
    return [
        {
            k.replace("FailingWithGradient", "redness"): v
            for k, v in row.items()
            if "seconds" not in k
        }
        for row in read_metrics(trainer.dir)
    ]


def adapter(trainer):
    return torch.cat([v.flatten() for v in lora.state_dict(trainer.policy.network).values()])


def gradients(trainer, monkeypatch) -> list[torch.Tensor]:
    """The accumulated gradient of every optimiser step of one epoch."""
    taken = []
    optimizer = trainer.optimizer
    step = optimizer.step

    def recorded():
        taken.append(torch.cat([p.grad.flatten().clone() for p in optimizer.parameters]))
        return step()

    monkeypatch.setattr(optimizer, "step", recorded)
    trainer.run_epoch(0)
    return taken


@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_gradient_does_not_depend_on_the_micro_batch(make, monkeypatch, algorithm):
    reference = None
    for i, size in enumerate((16, 5, 1)):
        trainer = make(algorithm, run=str(i), **{"train.micro_batch": size})
        (grad,) = gradients(trainer, monkeypatch)
        if reference is None:
            reference = grad
            assert grad.norm() > 0
        assert (grad - reference).norm() < 1e-4 * reference.norm()


def test_score_function_and_importance_sampling_agree_at_ratio_one(make, monkeypatch):
    taken = [
        gradients(make("ddpo", run=e, **{"algorithm.estimator": e}), monkeypatch)[0]
        for e in ("is", "sf")
    ]
    torch.testing.assert_close(taken[0], taken[1], atol=1e-7, rtol=1e-4)


class OneStep:
    """A stand-in for Batch and Policy whose log-probability is a parameter."""

    x_next = torch.zeros(1, 2)
    on_policy = False

    def __init__(self, shift, advantage):
        self.mean = torch.full((1, 2), 0.1, requires_grad=True)
        self.advantage = torch.tensor([advantage])
        here = self.transition(None).log_prob(self.x_next)
        self.log_prob_old = (here - torch.tensor(1.0 + shift).log()).detach()

    def predict(self, policy):
        return None

    def transition(self, seen):
        return Gaussian(self.mean, torch.ones(1, 1))


@pytest.mark.parametrize(
    ("shift", "advantage", "flows"),
    [
        (0.05, 1.0, True),  # inside the band
        (0.2, 1.0, False),  # already much likelier, and good: stop
        (0.2, -1.0, True),  # already likelier, but bad: undo
        (-0.2, -1.0, False),
        (-0.2, 1.0, True),
    ],
)
def test_clipping_stops_the_gradient_on_the_right_side_only(shift, advantage, flows):
    batch = OneStep(shift, advantage)
    loss, metrics = DDPO(clip_range=0.1).loss(None, batch)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, batch.mean, allow_unused=True)
    assert (grad is not None and bool(grad.abs().sum() > 0)) is flows
    assert metrics["ratio_drift"].item() == pytest.approx(abs(shift), rel=1e-4)
    assert metrics["clip_high"].item() == float(shift > 0.1)
    assert metrics["clip_low"].item() == float(shift < -0.1)


def test_kl_to_the_base_model(make):
    trainer = make("ddpo", **{"algorithm.kl_weight": 10.0, "train.epochs": 2})
    trainer.train()
    rows = read_metrics(trainer.dir)
    assert rows[1]["kl"] == 0.0
    assert rows[2]["kl"] > 0.0
    assert rows[2]["grad_norm"] > 0


@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_reward_rises(make, algorithm):
    options = {"train.epochs": 12, "train.lr": 3e-2 if algorithm == "ddpo" else 1e-2}
    if algorithm == "ddpo":
        options |= {"algorithm.clip_range": 1e-2, "data.groups": 8, "data.group_size": 8}
    result = make(algorithm, **options).train()
    gain = result["after"]["eval/reward"] - result["before"]["eval/reward"]
    assert gain > 0.002, gain


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("draft", {"algorithm.last": 2}),
        ("ddpo", {"train.updates_per_epoch": 2, "train.inner_epochs": 2}),
    ],
)
def test_same_seed_same_metrics(make, algorithm, options):
    texts = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = make(algorithm, run=run, **{"train.epochs": 2, "train.seed": seed, **options})
        trainer.train()
        texts.append(rows_of(trainer))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_resume_is_the_same_run(make, algorithm):
    options = {"train.updates_per_epoch": 2, "train.epochs": 4}
    if algorithm == "ddpo":
        options |= {"advantage.baseline": "tracker", "advantage.min_count": 4}
    whole = make(algorithm, run="whole", **options)
    whole.train()
    make(algorithm, run="halves", **options | {"train.epochs": 2}).train()
    resumed = make(algorithm, run="halves", resume=True, **options)
    resumed.train()
    assert torch.equal(adapter(resumed), adapter(whole))

    def trained(trainer):
        return [
            {k: v for k, v in r.items() if not k.startswith("eval/") and k not in VERDICTS}
            for r in rows_of(trainer)
        ]

    assert trained(resumed) == trained(whole)


def test_off_policy_rows_use_the_stored_log_probability(make, monkeypatch):
    seen = []
    loss = DDPO.loss

    def recorded(self, policy, batch):
        seen.append(batch.on_policy)
        return loss(self, policy, batch)

    monkeypatch.setattr(DDPO, "loss", recorded)
    trainer = make(
        "ddpo",
        **{"train.updates_per_epoch": 2, "train.inner_epochs": 2, "train.micro_batch": 64},
    )
    metrics = trainer.run_epoch(0)
    assert seen == [True, False, False, False]
    assert metrics["mismatch_max"] < 1e-6
    assert metrics["ratio_drift"] > 1e-6


class Failing:
    """redness that fails at its `at`-th call."""

    def __init__(self, how, at):
        self.how, self.at, self.calls = how, at, 0

    def __call__(self, images, prompts):
        self.calls += 1
        values = redness(images, prompts)
        if self.calls == self.at:
            if self.how == "nan":
                values[1] = torch.nan
            elif self.how == "shape":
                values = values[:, None]
            else:
                raise self.how
        return values


@pytest.mark.parametrize("how", ["nan", "shape", ZeroDivisionError("by zero")])
def test_failing_reward_stops_and_loses_nothing(make, how):
    # one call evaluates the base (8 prompts), then two an epoch
    failing = Failing(how, at=6)
    trainer = make("ddpo", rewards={failing: 1.0}, **{"train.epochs": 5})
    with pytest.raises(TrainingStopped, match=r"reward 'Failing'.*a red (.|\n)*epochs done: 2"):
        trainer.train()
    assert (trainer.dir / "failed_reward.png").exists()
    assert (trainer.dir / lora.WEIGHTS).exists()
    resumed = make("ddpo", resume=True, force=True, **{"train.epochs": 3})
    assert resumed.epoch == 2
    assert torch.equal(adapter(resumed), adapter(trainer))
    resumed.train()


def test_interrupt_saves_and_propagates(make):
    trainer = make("ddpo", rewards={Failing(KeyboardInterrupt(), at=5): 1.0}, **{"train.epochs": 5})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (trainer.dir / lora.WEIGHTS).exists()
    assert make("ddpo", resume=True, force=True).epoch == trainer.epoch == 1


def test_resuming_a_finished_run_says_that_nothing_is_left(make, capsys):
    make("ddpo", **{"train.epochs": 1}).train()
    assert "nothing left" not in capsys.readouterr().out
    make("ddpo", resume=True, **{"train.epochs": 1}).train()
    assert "nothing left to train: epoch 1 is the last" in capsys.readouterr().out


def test_a_run_is_never_overwritten(make):
    make("ddpo").train()
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        make("ddpo")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        make("ddpo", run="b", resume=True)


def test_python_interface_and_run_folder(make):
    trainer = make("ddpo", rewards={redness: 1.0, "jpeg": 0.5}, **{"eval.rewards": {"jpeg": 1.0}})
    result = trainer.train()
    assert set(result["after"]) == {"eval/reward", "eval/redness", "eval/jpeg", "eval/kl"}
    files = {p.name for p in Path(trainer.dir).iterdir()}
    assert files >= {
        "config.yaml", "metrics.csv", "metrics.jsonl", "curve.png", "grid.png", "grids",
        "checkpoint-1", lora.WEIGHTS,
    }  # fmt: skip


def test_score_function_refuses_several_updates(make):
    with pytest.raises(ValueError, match=r"updates_per_epoch=2 needs importance sampling"):
        make("ddpo", **{"algorithm.estimator": "sf", "train.updates_per_epoch": 2})


def test_deterministic_sampler_is_refused_for_policy_gradients(make):
    with pytest.raises(ValueError, match=r"deterministic.*raise sampler\.eta"):
        make("ddpo", **{"sampler.eta": 0.0})


@pytest.mark.parametrize("kind", ["sd-epsilon", "sd-v"])
@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_split_of_a_trained_adapter(make, monkeypatch, pipelines, algorithm, kind):
    """With B != 0 every weight has a gradient; DDPO with its KL term, DRaFT through all steps."""
    options = {"algorithm.kl_weight": 5.0} if algorithm == "ddpo" else {"algorithm.last": None}
    options["model.name"] = pipelines[kind]
    taken = []
    for size in (48, 3):
        trainer = make(algorithm, run=str(size), **{"train.micro_batch": size}, **options)
        perturb(trainer.policy)
        taken += gradients(trainer, monkeypatch)
    assert taken[0].norm() > 1e-3
    assert (taken[0] - taken[1]).norm() < 1e-5 * taken[0].norm()


class FailingWithGradient(Failing):
    differentiable = True


@pytest.mark.parametrize(
    ("algorithm", "how", "at"),
    [
        ("draft", KeyboardInterrupt(), 6),  # between the two optimiser steps of epoch 2
        ("ddpo", ZeroDivisionError("by zero"), 7),  # in the held-out evaluation after epoch 2
    ],
)
def test_a_run_stopped_within_an_epoch_resumes_as_the_same_run(make, algorithm, how, at):
    # one call evaluates the base, then an epoch has two and its evaluation one
    options = {"train.epochs": 3, "train.updates_per_epoch": 2, "train.micro_batch": 8}
    options["eval.every"] = 1
    whole = make(algorithm, run="whole", **options)
    whole.train()
    stopped = make(algorithm, rewards={FailingWithGradient(how, at): 1.0}, **options)
    with pytest.raises((KeyboardInterrupt, TrainingStopped)):
        stopped.train()
    resumed = make(algorithm, resume=True, force=True, **options)  # with the true reward
    assert resumed.epoch == 1
    resumed.train()
    assert torch.equal(adapter(resumed), adapter(whole))
    assert rows_of(resumed) == rows_of(whole)


def test_a_run_interrupted_in_its_first_epoch_has_one_row_of_the_base(make):
    options = {"train.epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        make("ddpo", rewards={Failing(KeyboardInterrupt(), 2): 1.0}, **options).train()
    resumed = make("ddpo", resume=True, **options)
    resumed.train()
    assert [row["step"] for row in read_metrics(resumed.dir)] == [0, 1, 2]


def test_resuming_a_finished_run_reports_what_was_trained(make):
    first = make("draft", **{"train.epochs": 2}).train()
    assert first["after"] != first["before"]
    assert make("draft", resume=True, **{"train.epochs": 2}).train() == first


def test_a_run_killed_before_its_first_checkpoint_is_no_dead_end(make):
    make("ddpo")
    assert make("ddpo", resume=True).epoch == 0


def weights(trainer):
    return torch.cat([v.flatten() for v in trainer.policy.state_dict().values()])


@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_resume_of_a_whole_denoiser_is_the_same_run(make, pipelines, algorithm):
    options = {"model.lora_rank": 0, "train.updates_per_epoch": 2, "train.epochs": 3}
    options["train.lr"] = 1e-3
    if algorithm == "ddpo":
        options["algorithm.kl_weight"] = 1.0
    whole = make(algorithm, run="whole", **options)
    base = weights(whole)
    result = whole.train()
    make(algorithm, run="halves", **options | {"train.epochs": 2}).train()
    resumed = make(algorithm, run="halves", resume=True, **options)
    again = resumed.train()
    assert not torch.equal(weights(whole), base)
    assert torch.equal(weights(resumed), weights(whole))
    assert again["before"] == result["before"]
    if algorithm == "ddpo":
        rows = read_metrics(whole.dir)
        assert rows[1]["kl"] < rows[2]["kl"]
        assert [r["kl"] for r in read_metrics(resumed.dir)[1:]] == [r["kl"] for r in rows[1:]]
    saved = UNet2DConditionModel.from_pretrained(whole.dir / "unet").state_dict()
    assert torch.equal(torch.cat([v.flatten() for v in saved.values()]), weights(whole))
    assert not (whole.dir / lora.WEIGHTS).exists()


def test_a_whole_denoiser_learns(make):
    options = {"model.lora_rank": 0, "train.epochs": 6, "train.lr": 1e-3}
    result = make("draft", **options).train()
    assert result["after"]["eval/reward"] > result["before"]["eval/reward"] + 0.002


def test_no_second_denoiser_unless_asked(make):
    trainer = make("draft", **{"model.lora_rank": 0, "train.epochs": 1})
    trainer.train()
    resumed = make("draft", resume=True, **{"model.lora_rank": 0, "train.epochs": 2})
    resumed.train()  # read the base for the grid, and dropped it
    assert not trainer.policy._copies
    assert not resumed.policy._copies


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_float16_trains_with_scaled_gradients(make, monkeypatch, algorithm, rank):
    taken = []
    for dtype in ("float32", "float16"):
        options = {"model.dtype": dtype, "model.lora_rank": rank, "train.lr": 1e-3}
        trainer = make(algorithm, run=dtype, **options)
        if rank:
            perturb(trainer.policy)
        before = weights(trainer)
        (grad,) = gradients(trainer, monkeypatch)
        taken.append(grad / (trainer.optimizer.scaler.get_scale() if dtype == "float16" else 1))
        assert {p.dtype for p in trainer.optimizer.parameters} == {torch.float32}
        assert not torch.equal(weights(trainer), before)
    # the reward gradients of a rollout differ as its pictures do
    cosine = torch.nn.functional.cosine_similarity(taken[0], taken[1], dim=0)
    assert cosine > 0.95, cosine
    assert 0.8 < taken[1].norm() / taken[0].norm() < 1.25


def test_an_overflow_in_float16_skips_the_step_and_lowers_the_scale(make):
    trainer = make("draft", **{"model.dtype": "float16", "train.epochs": 2})
    before, scale = weights(trainer), trainer.optimizer.scaler.get_scale()
    for p in trainer.optimizer.parameters:
        p.grad = torch.full_like(p, torch.inf)
    trainer.optimizer.scaler.scale(torch.ones(1))  # as a backward pass does
    trainer.optimizer.step()
    assert torch.equal(weights(trainer), before)
    assert trainer.optimizer.scaler.get_scale() == scale / 2
    trainer.epoch = 1
    trainer.complete = saving.state(trainer)
    trainer.save()
    resumed = make("draft", resume=True, **{"model.dtype": "float16", "train.epochs": 2})
    assert resumed.optimizer.scaler.state_dict() == trainer.optimizer.scaler.state_dict()
    resumed.train()


def test_text_encoders_are_freed_once_the_prompts_are_known(make, monkeypatch):
    seen, encode = [], UNetPolicy.embed

    def embed(policy, texts):
        assert next(policy.network.parameters()).requires_grad is False  # it is not ready yet
        seen.extend(texts)
        return encode(policy, texts)

    with monkeypatch.context() as patch:
        patch.setattr(UNetPolicy, "embed", embed)
        trainer = make("ddpo", **{"train.epochs": 2, "data.groups": 2})
    trainer.train()
    assert trainer.policy.pipe.text_encoder is None
    assert len(seen) == len(set(seen)) == len(OBJECTS) + 1  # held-out texts, and ""
    kept = make("ddpo", run="b", **{"model.free_text_encoders": False})
    kept.train()
    kept.policy.encode(["a new one"])
    with pytest.raises(RuntimeError, match="'a new one' was not encoded"):
        trainer.policy.encode(["a new one"])


def test_rewards_in_training_see_the_tiny_vae(make, tmp_path):
    name = tiny_vae(tmp_path / "tiny")
    for algorithm in ("ddpo", "draft"):
        trainer = make(
            algorithm, run=algorithm, **{"model.tiny_vae": name, "model.decode_batch": 3}
        )
        full, tiny = [], []
        trainer.policy.vae.decoder.register_forward_hook(lambda *_, to=full: to.append(1))
        trainer.policy.tiny_vae.decoder.register_forward_hook(lambda *_, to=tiny: to.append(1))
        trainer.train()
        assert (len(full), len(tiny)) == (2 * 3, 6)  # 2 x 8 held-out pictures, 16 in training


@pytest.mark.parametrize("kind", ["sdxl", "sd-turbo", "sd3", "flux-dev"])
@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_every_family_trains(make, pipelines, kind, algorithm):
    options = {"model.name": pipelines[kind], "model.resolution": 16, "train.epochs": 2}
    options |= {"model.gradient_checkpointing": True}
    if (kind, algorithm) == ("sd-turbo", "draft"):
        options |= {"sampler.steps": 1, "sampler.guidance": 0.0}
    trainer = make(algorithm, **options)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    assert trainer.evaluation.first[0][0].shape == (3, 16, 16)


def test_processes_that_do_not_know_of_each_other_are_refused(make, monkeypatch, tmp_path):
    """Each would train alone and write over the other's files."""
    real = accelerate.Accelerator

    def alone(**options):
        accelerator = real(**options)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
        return accelerator

    monkeypatch.setattr(accelerate, "Accelerator", alone)
    with pytest.raises(ValueError, match=r"2 processes were launched.*ACCELERATE_USE_CPU=true"):
        make("ddpo")
    assert not list(tmp_path.glob("**/config.yaml"))
