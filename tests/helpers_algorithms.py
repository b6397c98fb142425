"""What the tests of algorithms share: stub policies, rows, a small run."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import perturb, side_of
from safetensors.torch import load_file
from test_trainer import OBJECTS, redness

from diffalign import TrainConfig, Trainer
from diffalign.algorithms import Matches, Transitions
from diffalign.dynamics import Levels, Prediction, native_target, noised
from diffalign.sampling.rollout import Sampling

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
LATENT = (4, 8, 8)
PROMPTS = [f"a red {o}" for o in OBJECTS[:4]]
FLOWS = ["sd3", "flux-dev", "z-image", "klein-base", "qwen", "qwen21"]
KINDS = ["sd-epsilon", "sd-v", "sdxl", *FLOWS]


def golden(name):
    if not (GOLDEN / name).exists():
        pytest.skip("golden numbers are not here")
    return {k: v.double() for k, v in load_file(GOLDEN / name).items()}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def flow(sigma):
    return Levels(1000 * sigma, 1 - sigma, sigma)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, atol=tol, rtol=0, check_dtype=False)


class Outputs:
    """A flow policy whose networks have fixed outputs: "default", "base" and those of copies."""

    device, parametrize = "cpu", staticmethod(Prediction.from_flow)

    def __init__(self, **outputs):
        self.outputs, self.name = outputs, "default"

    def predict(self, x, level, cond, guidance):
        return self.parametrize(x, self.outputs[self.name], level)

    def target(self, x0, noise, level):
        return native_target("flow", x0, noise, level)

    @contextmanager
    def adapter(self, name):
        before, self.name = self.name, name
        yield
        self.name = before

    def reference(self):
        return self.adapter("base")


def matched(x0, noise, t, advantage, **options):
    """FINAL rows of a flow."""
    level = flow(t)
    how = Sampling(flow(torch.linspace(1, 0, 11).double()), "ode", 0.0, 1.0)
    options = {"on_policy": True} | options
    x = noised(x0, noise, level)
    return Matches(how, None, x, level, advantage, advantage, x0=x0, noise=noise, **options)


def random_rows(advantage):
    n = len(advantage)
    return matched(randn(n, *LATENT), randn(n, *LATENT), torch.rand(n).double(), advantage)


def transitions(levels, eta, step, outputs, on_policy=False, kernel="flow_sde"):
    """Rows of a flow SDE that the output "old" drew, and their policy."""
    n = len(step)
    how = Sampling(levels, kernel, eta, 1.0)
    policy = Outputs(**outputs)
    x, advantage, reward = randn(n, *LATENT), randn(n), randn(n)
    with policy.adapter("old"):
        old = how.step(x, policy.predict(x, levels[step], None, 1.0), step)
    x_next = old.sample(randn(n, *LATENT))
    rows = {"x_next": x_next, "log_prob_old": old.log_prob(x_next), "mean_old": old.mean}
    return policy, Transitions(
        how, None, x, levels[step], advantage, reward, on_policy, step=step, **rows
    )


# SD3.5-medium with ten steps
SIGMAS = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
SD3 = flow(torch.tensor(SIGMAS))


@pytest.fixture
def make(pipelines, tmp_path):
    """make(algorithm, run="a", resume=False, kind="sd-v", **{"train.lr": ...}) -> Trainer."""

    def make(algorithm, run="a", resume=False, kind="sd-v", **overrides):
        tree = {
            "model": {
                "name": pipelines[kind],
                "lora_rank": 2,
                "resolution": max(16, side_of(kind)),
            },
            "algorithm": {"type": algorithm},
            "sampler": {"steps": 4, "guidance": 2.0, "batch": 4},
            "data": {"groups": 2, "group_size": 2},
            # without decay nothing moves but by its gradient
            "train": {"epochs": 1, "lr": 1e-3, "micro_batch": 8, "weight_decay": 0.0},
            "eval": {"prompts": None},
            "log": {"dir": str(tmp_path / run)},
        }
        for key, value in overrides.items():
            section, name = key.split(".")
            tree[section][name] = value
        config = TrainConfig.from_dict(tree)
        return Trainer(config, rewards={redness: 1.0}, prompts=PROMPTS, resume=resume)

    return make


def trained(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.policy.trainable_parameters()])


def move(trainer):
    """Move the adapter off its initialisation, and the copies with it."""
    perturb(trainer.policy)
    for name in trainer.copies:
        trainer.optimizer.follow(name, 0.0)
