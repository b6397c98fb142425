"""Every algorithm on points in the plane: the loop as it is, a flow known in closed form."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from diffalign import TrainConfig, Trainer, policies
from diffalign.algorithms import ALGORITHMS, Needs, Transitions
from diffalign.algorithms.drtune import DRTune
from diffalign.algorithms.flow_grpo import FlowGRPO
from diffalign.dynamics import Levels
from diffalign.policies.flow import FlowPolicy
from diffalign.sampling.rollout import Noise, Sampling, rollout

SPREAD = 0.4  # of the points that the base model draws, around the origin
GOAL = torch.tensor([0.8, -0.6])
STEPS = 8
GAIN = 0.6  # half of what there is to gain
OF_EACH_NEED = ["flow_grpo", "nft", "draft"]


class Field(nn.Module):
    """The exact velocity from N(0, I) to N(0, SPREAD² I), and a small network that starts at 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.learned = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))
        for p in self.learned[2].parameters():
            nn.init.zeros_(p)

    def forward(self, x, sigma):
        alpha, sigma = (1 - sigma)[:, None], sigma[:, None]
        gain = (sigma - alpha * SPREAD**2) / (sigma**2 + alpha**2 * SPREAD**2)
        return gain * x + self.learned(torch.cat([x, sigma], 1))


class ToyPolicy(FlowPolicy):
    """Points as latents (2, 1, 1) and as one-pixel pictures; all of `learnt` trains."""

    uses_cfg = False
    has_text_encoders = True
    sharding = None

    def place(self, team):
        assert not team.divides

    def __init__(self):
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.network, self.vae, self.tiny_vae = Field(), None, None
        self.base = copy.deepcopy(self.network).requires_grad_(False)
        self.schedule_config, self.latent_shape = {"num_train_timesteps": 1000}, (2, 1, 1)
        self.decode_batch, self.calls = 16, 0
        self.made_for = self.resolution = None
        self._prompts, self._copies = {}, {}
        self.accelerated = lambda network: None

    def resize(self, resolution):
        assert resolution is None

    @classmethod
    def shape(cls, network, vae, resolution):
        return 2, 1, 1

    @classmethod
    def schedule(cls, config, steps, shape):
        sigma = torch.linspace(1, 0, steps + 1)
        return Levels(1000 * sigma, 1 - sigma, sigma)

    @classmethod
    def peek(cls, name, steps, resolution=None):
        return cls.schedule({}, steps, ()), (2, 1, 1)

    def embed(self, prompts):
        return {"prompt": torch.zeros(len(prompts), 1)}

    def call(self, x, t, text, guidance):
        return self.network(x.flatten(1), t / 1000)[:, :, None, None]

    def _decode(self, x0, vae):
        # not clamped: a saturated pixel has no gradient
        return torch.cat([x0, torch.zeros_like(x0[:, :1])], 1) / 8 + 0.5

    @contextmanager
    def reference(self):
        with self._instead(self.base):
            yield

    def save(self, folder, name="default", state=None, main=True):
        return folder


def closeness(images, prompts):
    points = 8 * (images[:, :2, 0, 0] - 0.5)
    return -(points - GOAL).square().sum(1)


closeness.differentiable = True


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(algorithm, options, sign) -> mean closeness of ODE samples before and after.

    The reward is `sign` times the closeness.
    """
    monkeypatch.setattr(policies, "check", lambda name: None)
    monkeypatch.setattr(policies, "family", lambda name: ToyPolicy)
    monkeypatch.setattr(policies, "guided_by", lambda name: None)
    monkeypatch.setattr(policies, "load", lambda *_, **__: ToyPolicy())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\nd\n")

    def train(algorithm, options, sign=1.0):
        tree = {
            "model": {"lora_rank": 0, "free_text_encoders": False},
            "algorithm": {"type": algorithm},
            "sampler": {"steps": STEPS, "kernel": "flow_sde", "eta": 0.7, "batch": 64},
            "data": {"prompts": str(prompts), "groups": 4, "group_size": 16},
            "train": {"epochs": 60, "lr": 1e-2, "micro_batch": 512, "checkpoint_every": 0},
            "eval": {"every": 0, "prompts": str(prompts), "images_per_prompt": 16, "steps": STEPS},
            "log": {"dir": str(tmp_path / "run")},
        }
        tree["eval"]["grid_prompts"] = 0  # nothing to see
        for key, value in options.items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        trainer = Trainer(TrainConfig.from_dict(tree), rewards={closeness: sign})
        result = trainer.train()
        assert trainer.optimizer.updates < 200
        return [result[when]["eval/closeness"] for when in ("before", "after")]

    return train


def test_the_base_model_is_the_flow_it_should_be():
    """Between two Gaussians of one centre the ODE scales."""
    policy, seeds = ToyPolicy(), range(64)
    how = Sampling(policy.levels(200), "ode", 0.0, 1.0)
    final = rollout(policy, policy.encode(["a"] * 64), how, seeds, batch=64).final
    start = Noise(seeds, policy.latent_shape, "cpu").draw()
    torch.testing.assert_close(final, SPREAD * start, atol=1e-6, rtol=0.02)


TWICE = {"train.epochs": 30, "train.updates_per_epoch": 2, "train.inner_epochs": 2}
MOVING = {"sampler.window": 2, "sampler.window_schedule": "progressive", "sampler.window_epochs": 2}
BRANCHES = {
    "sampler.window": 1,
    "sampler.window_schedule": "branch",
    "sampler.window_range": [0, 4],
    "sampler.same_noise": True,
}
CPS = {"sampler.kernel": "cps", "sampler.eta": 0.7}

VARIANTS = {
    "ddpo by the score function": ("ddpo", {"algorithm.estimator": "sf"}),
    "ddpo with a tracker": ("ddpo", {"advantage.baseline": "tracker"}),
    "ddpo off policy": ("ddpo", TWICE | {"algorithm.clip_range": 0.2}),
    "dpok with a value network": ("dpok", {"algorithm.value_weight": 1.0}),
    "flow_grpo, random window": ("flow_grpo", {"sampler.window": 2}),
    "flow_grpo, moving window and tail": ("flow_grpo", MOVING | {"sampler.tail": 2}),
    "flow_grpo, branches": ("flow_grpo", BRANCHES | {"algorithm.step_weight": "noise"}),
    "flow_grpo, cps": ("flow_grpo", CPS | {"algorithm.log_prob": "cps"}),
    "flow_grpo, dance": ("flow_grpo", {"sampler.kernel": "dance_sde", "sampler.eta": 0.5}),
    "flow_grpo within a KL": ("flow_grpo", TWICE | {"algorithm.trust": "kl"}),
    "grpo_guard off policy": ("grpo_guard", TWICE | {"algorithm.clip_range": 0.1}),
    "awm off policy": ("awm", TWICE),
    "awm of plain losses": ("awm", {"algorithm.weighting": "uniform"}),
    "fpo off policy": ("fpo", TWICE),
    "nft, no old": ("nft", {"algorithm.old": "none"}),
    "nft, slow old": ("nft", {"algorithm.old": "slow", "sampler.kernel": "ode"}),
    "nft, late old": ("nft", {"algorithm.old": "late", "train.epochs": 120}),
    "rwr at any time": ("rwr", {"algorithm.time": "logit_normal"}),
    "draft through all steps": ("draft", {"algorithm.last": None}),
    "draft, renoised": ("draft", {"algorithm.renoised": 2}),
    **{
        f"alignprop, {truncation}": ("alignprop", {"algorithm.truncation": truncation})
        for truncation in ("uniform", "gaussian", "fixed", "bernoulli")
    },
    "alignprop to a target": ("alignprop", {"algorithm.target": 0.0}),
    "drtune to the end": ("drtune", {"algorithm.stop": 0.0}),
    "an average of the weights": ("draft", {"train.ema": 0.9}),
}
RUNS = {name: (name, {}) for name in ALGORITHMS} | VARIANTS


@pytest.mark.parametrize("run", RUNS)
def test_the_reward_rises(train, run):
    before, after = train(*RUNS[run])
    assert after > before + GAIN


@pytest.mark.parametrize("algorithm", OF_EACH_NEED)
def test_a_reward_of_wrong_sign_falls(train, algorithm):
    """The tests above can fail."""
    before, after = train(algorithm, {}, sign=-1.0)
    assert after < before - GAIN


@pytest.mark.parametrize(
    ("algorithm", "kl"),
    [("ddpo", "g_sqrt_dt"), ("flow_grpo", "g"), ("nft", "velocity"), ("draft", "velocity")],
)
def test_the_anchor_holds_a_policy_back(train, algorithm, kl):
    before, after = train(algorithm, {"algorithm.kl_weight": 100.0, "algorithm.kl": kl})
    assert abs(after - before) < GAIN / 2


def test_step_weights_of_flow_grpo_have_mean_1():
    policy, how = ToyPolicy(), Sampling(ToyPolicy.schedule({}, STEPS, ()), "flow_sde", 0.7, 1.0)
    step = torch.arange(STEPS - 1)  # the last one is deterministic
    x, ones = torch.zeros(len(step), 2, 1, 1), torch.ones(len(step))
    cond = policy.encode(["a"] * len(step))
    rows = {"step": step, "x_next": x, "log_prob_old": 0 * ones}
    batch = Transitions(how, cond, x, how.levels[step], -ones, 0 * ones, on_policy=True, **rows)
    loss, _ = FlowGRPO(step_weight="noise").loss(policy, batch)
    assert loss.item() == pytest.approx(1.0)


def test_what_a_plan_accepts_of_drtune_is_right_for_every_draw():
    generator = torch.Generator().manual_seed(0)
    for steps in range(2, 12):
        for active in range(1, steps + 1):
            algorithm = DRTune(active=active)
            try:
                algorithm.surrogate(steps, torch.Generator())  # as Plan.make does
            except ValueError:
                continue
            for _ in range(50):
                algorithm.surrogate(steps, generator)


def test_one_algorithm_of_each_need_is_tested():
    assert {ALGORITHMS[name].needs for name in OF_EACH_NEED} == set(Needs)
