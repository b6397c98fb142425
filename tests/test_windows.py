"""Windows of stochastic steps, shared prefixes, and the solver after them."""

from __future__ import annotations

import math
from contextlib import nullcontext

import helpers_algorithms
import pytest
import torch
from conftest import load, perturb
from diffusers import DPMSolverMultistepScheduler
from helpers_algorithms import (
    LATENT,
    PROMPTS,
    flow,
    randn,
)

from diffalign.config import SamplerConfig
from diffalign.dynamics import Levels, Prediction, dpm_solver_2m, ode
from diffalign.policies import Cond
from diffalign.sampling.rollout import Sampling, Window, rollout
from diffalign.sampling.windows import bounds, window

make = helpers_algorithms.make  # the fixture


CHANCE = [True] * 9 + [False]


def starts(epochs, images=(0, 1, 2), seed=0, **options):
    config = SamplerConfig(steps=10, **options)
    windows = [window(config, CHANCE, epoch, seed, list(images)) for epoch in epochs]
    assert all(w.length == options.get("window", 9) for w in windows)
    return [w.start.tolist() for w in windows]


def test_random_windows():
    options = {"window": 2, "window_range": [2, 7]}
    found = starts(range(100), **options)
    assert all(len(set(row)) == 1 for row in found)
    assert {row[0] for row in found} == {2, 3, 4, 5}
    assert found == starts(range(100), **options)
    assert found != starts(range(100), seed=1, **options)
    assert starts([5]) == [[0, 0, 0]]  # no window: all stochastic steps


def test_progressive_windows_move_and_wrap():
    found = starts(range(48), window=2, window_schedule="progressive", window_epochs=3)
    assert [row[0] for row in found] == [e // 3 % 8 for e in range(48)]


def test_decaying_windows_hurry_towards_the_end():
    stay = [math.ceil(10 * math.exp(-0.1 * max(0, place - 5))) for place in range(8)]
    assert stay == [10] * 7 + [9]
    cycle = [place for place in range(8) for _ in range(stay[place])]
    found = starts(range(158), window=2, window_schedule="decay", window_epochs=10)
    assert [row[0] for row in found] == 2 * cycle


def test_branches_take_turns():
    options = {"window": 1, "window_schedule": "branch", "window_range": [1, 4]}
    assert starts([0, 5], images=range(7), **options) == [[1, 2, 3, 1, 2, 3, 1]] * 2


def test_windows_refuse_steps_without_chance():
    config = SamplerConfig(steps=10, window=2, window_range=[5, 10], kernel="flow_sde")
    with pytest.raises(ValueError, match=r"window_range=\[5, 10\] covers step 9, which is determ"):
        bounds(config, CHANCE)
    assert bounds(SamplerConfig(steps=10), CHANCE) == (0, 9)


@pytest.fixture(params=["sd-v", "sd3"])
def drawn(request, pipelines):
    """A policy off its initialisation, a sampling of six steps and the conditioning."""
    policy = load(pipelines[request.param])
    policy.add_lora(2)
    perturb(policy)
    return policy, Sampling(policy.levels(6), "cps", 0.6, 2.0), policy.encode(PROMPTS)


@pytest.mark.parametrize("start", [[1, 1, 1, 1], [0, 2, 1, 2]])
def test_a_window_stores_what_the_network_saw(drawn, monkeypatch, start):
    policy, how, cond = drawn
    seen, predict = [], policy.predict
    monkeypatch.setattr(policy, "merged", nullcontext)  # else it is the same but for rounding
    monkeypatch.setattr(policy, "predict", lambda x, *a: seen.append(x.clone()) or predict(x, *a))
    paths = rollout(policy, cond, how, [1, 2, 3, 4], 4, Window(torch.tensor(start), 2), means=True)
    monkeypatch.undo()
    seen.append(paths.final)
    assert paths.states.shape[:2] == (4, 3)
    for i in range(6):
        transition = how.transition(policy, seen[i], i, cond)
        prediction = policy.predict(seen[i], how.levels[i], cond, how.guidance)
        plain = ode(seen[i], prediction, how.levels[i], how.levels[i + 1]).mean
        log_prob = transition.log_prob(seen[i + 1]) if how.stochastic[i] else None
        for j, k in enumerate(i - s for s in start):
            if k not in (0, 1):
                assert torch.equal(seen[i + 1][j], plain[j])
                continue
            assert torch.equal(paths.states[j, k], seen[i][j])
            assert torch.equal(paths.states[j, k + 1], seen[i + 1][j])
            assert torch.equal(paths.means[j, k], transition.mean[j])
            assert not torch.equal(seen[i + 1][j], plain[j])
            assert torch.equal(log_prob[j], paths.log_prob[j, k])


def test_a_shared_prefix_is_computed_once(drawn):
    policy, how, cond = drawn
    cond, seeds, initial = cond[torch.tensor([0, 0, 1, 1])], [1, 2, 3, 4], [7, 7, 8, 8]
    windows = Window(torch.tensor([2, 3, 2, 3]), 1)
    before = policy.calls
    paths = rollout(policy, cond, how, seeds, 4, windows, initial)
    # two trunks up to step 2, where the first branch off, then four samples; two calls by guidance
    assert policy.calls - before == 2 * (2 + 2 + 2 + 4 * 3)
    alone = rollout(policy, cond, how, seeds, 1, windows, initial)
    for name in ("states", "log_prob", "final"):
        torch.testing.assert_close(getattr(paths, name), getattr(alone, name), atol=1e-5, rtol=1e-5)
    final = paths.final
    assert min((final[0] - final[1]).norm(), (final[0] - final[2]).norm()) > 1e-2


def test_a_rollout_may_stop_early(drawn):
    policy, how, cond = drawn
    whole = rollout(policy, cond, how, [1, 2, 3, 4], 4)
    for until in (0, 1, 3, 6):
        before = policy.calls
        paths = rollout(policy, cond, how, [1, 2, 3, 4], 4, until=until)
        assert policy.calls - before == 2 * 4 * until
        assert torch.equal(paths.states, whole.states[:, : until + 1])
        assert torch.equal(paths.final, whole.states[:, until])
    assert torch.equal(rollout(policy, cond, how, [1, 2, 3, 4], 4, store=False).final, whole.final)


class NormalData:
    """The perfect flow denoiser of N(m, s²): its ODE takes x to m + s x."""

    device, latent_shape, m, s = "cpu", (4,), 0.5, 0.3
    merged = staticmethod(nullcontext)

    def __init__(self):
        self.calls = 0

    def predict(self, x, level, cond, guidance):
        self.calls += len(x)
        alpha, sigma = level.alpha, level.sigma
        gain = alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2)
        x0 = self.m + gain * (x - alpha * self.m)
        return Prediction.from_flow(x, (x - x0) / sigma, level)


def test_the_tail_solves_the_ode_to_second_order():
    def error(steps, tail):
        policy, cond = NormalData(), Cond({"prompt": torch.zeros(2, 1)}, {})
        how = Sampling(flow(torch.linspace(1, 0, steps + 1)), "ode", 0.0, 1.0)
        windows = Window(torch.zeros(2, dtype=torch.long), 1, tail)
        paths = rollout(policy, cond, how, [1, 2], 2, windows)
        assert policy.calls == 2 * (1 + min(tail or steps, steps - 1))
        exact = policy.m + policy.s * paths.states[:, 0]
        return (paths.final - exact).abs().max().item()

    assert error(128, 127) == error(128, 999) < 0.2 * error(128, None)
    assert error(256, 255) < 0.35 * error(128, 127)
    assert error(256, None) > 0.45 * error(128, None)
    assert error(128, 40) < error(128, None)


def test_tail_of_one_step_is_the_prediction(drawn):
    policy, how, cond = drawn
    paths = rollout(policy, cond, how, [1, 2, 3, 4], 4, Window(torch.ones(4).long(), 2, 1))
    x0 = policy.predict(paths.states[:, -1], how.levels[3], cond, 2.0).x0
    torch.testing.assert_close(paths.final, x0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [4, 2])
def test_branches_with_a_tail_do_not_depend_on_the_batch(drawn, batch):
    policy, how, cond = drawn
    windows = Window(torch.tensor([0, 1, 2, 3]), 1, 2)
    alone = rollout(policy, cond, how, [1, 2, 3, 4], 1, windows).final
    together = rollout(policy, cond, how, [1, 2, 3, 4], batch, windows).final
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_solver_is_that_of_diffusers(path):
    options = {"prediction_type": "epsilon"}
    if path == "flow":
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        **options,
    )
    scheduler.set_timesteps(8)
    sigma = scheduler.sigmas.double()  # of x / alpha where the path is VP
    scale = (1 + sigma.square()).rsqrt()
    levels = flow(sigma) if path == "flow" else Levels(sigma, scale, scale * sigma)
    make = Prediction.from_flow if path == "flow" else Prediction.from_epsilon
    ours = theirs = randn(2, *LATENT)
    before = None
    for i, t in enumerate(scheduler.timesteps):
        out = randn(2, *LATENT)
        pred = make(ours, out, levels[i])
        ours, before = dpm_solver_2m(pred, ours, before, levels, i), pred.x0
        theirs = scheduler.step(out, t, theirs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize("kernel", ["ddim", "cps", "flow_sde", "dance_sde"])
def test_a_step_too_narrow_to_score_is_the_odes(kernel):
    """SD3's own schedule goes to sigma = 0.001 and then to 0: no ratio of that step is trained."""
    sigma = torch.tensor([1.0, 0.8, 0.5, 0.001, 0.0])
    how = Sampling(Levels(1000 * sigma, 1 - sigma, sigma), kernel, 0.7, 1.0)
    narrow = kernel in ("ddim", "cps")
    assert how.stochastic == [True, True, not narrow, False]
