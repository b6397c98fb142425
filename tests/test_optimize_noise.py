"""Noise optimisation and search: plain samples, exact gradients, budgets, and that they help."""

import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, peak_saved
from safetensors.torch import load_file
from test_toy import ToyPolicy, closeness

import rewards
from diffalign.config.prompts import Prompt
from diffalign.dynamics import Levels
from diffalign.optimize_noise import METHODS, Budget, Task, build, draw
from diffalign.optimize_noise import gradient_free as searches
from diffalign.optimize_noise.base import search
from diffalign.optimize_noise.dno import dno, implausibility
from diffalign.optimize_noise.gradient_free import forward_noising, itinerary, neighbor
from diffalign.optimize_noise.gradients import noise_gradient, pulled_back
from diffalign.optimize_noise.reno import chi_regularizer, reno
from diffalign.sampling.rollout import Noise, Sampling, rollout

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "rewards.safetensors"
TEXTS = ["a red dog", "a cat on a blue background", "a rocket"]
KINDS = {  # pipeline, steps, kernel, eta, guidance
    "one step": ("sd-turbo", 1, "ode", 0.0, 1.0),
    "ancestral": ("sd-v", 3, "ddim", 1.0, 2.0),
    "flow": ("flux-schnell", 3, "ode", 0.0, 1.0),
    "flow sde": ("sd3", 3, "flow_sde", 0.7, 1.0),
}
SMALL = {
    "best_of_n": {"n": 3},
    "random_search": {"rounds": 1},
    "zero_order": {"rounds": 2, "neighbors": 2},
    "paths": {"children": 2},
    "reno": {"iterations": 3},
    "dno": {"iterations": 3, "permutations": 2},
}
ONE_STEP = "turns round inside the schedule"  # what a search over paths says of it


def pattern(images, prompts):
    ramp = torch.linspace(0, 1, images[0].numel()).view_as(images[0])
    return -(images - ramp).square().flatten(1).sum(1)


pattern.differentiable = True


def contrast(images, prompts):
    return 1e3 * images.flatten(1).var(1)


contrast.differentiable = True


@pytest.fixture
def task(pipelines):
    def task(kind, texts=TEXTS, batch=2):
        name, steps, kernel, eta, guidance = KINDS[kind]
        policy = load(pipelines[name])
        sampling = Sampling(policy.levels(steps), kernel, eta, guidance)
        prompts = [Prompt(text) for text in texts]
        seeds = [7 + TEXTS.index(text) for text in texts]
        return Task(policy, rewards.build({pattern: 1.0}), prompts, sampling, seeds, batch)

    return task


def toy(kernel="ode", eta=0.0, reward=closeness, steps=8):
    policy = ToyPolicy()
    sampling = Sampling(policy.levels(steps), kernel, eta, 1.0)
    prompts = [Prompt(text) for text in "0123"]
    return Task(policy, rewards.build({reward: 1.0}), prompts, sampling, range(4))


def made(name, task, **options) -> list[Any]:
    return list(build(name, options)(task))


def through(task, rows, noise):
    """R and its gradient by plain autograd through sampler, decoder and reward."""
    z, cond = noise.clone().requires_grad_(), task.cond(rows)
    x, drawn = z[:, 0], 1
    for i, stochastic in enumerate(task.sampling.stochastic):
        step = task.sampling.transition(task.policy, x, i, cond)
        x = step.sample(z[:, drawn]) if stochastic else step.mean
        drawn += stochastic
    total = task.score(task.policy.decode(x, differentiable=True), rows)[0]
    return total, torch.autograd.grad(total.sum(), z)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_budget_gives_the_plain_samples_exactly(task, kind):
    task = task(kind)
    policy, rows = task.policy, range(len(task))
    cond = policy.encode(TEXTS)
    final = rollout(policy, cond, task.sampling, task.seeds, batch=task.batch).final
    plain = draw(task, rows, task.noise(rows))
    images = torch.cat([policy.decode(final[part]) for part in task.batches(len(rows))])
    assert torch.equal(plain.images, images)
    for name in SMALL:
        if (name, kind) == ("paths", "one step"):
            with pytest.raises(ValueError, match=ONE_STEP):
                build(name, SMALL[name])(task)
            continue
        found = search(task, build(name, SMALL[name])(task), Budget(denoiser_calls=0))
        assert [r.prompt for r in found] == TEXTS
        assert torch.equal(torch.stack([r.image for r in found]), plain.images)
        assert torch.equal(torch.stack([r.noise for r in found]), plain.noise)
        assert [r.reward for r in found] == plain.total.tolist()
        assert all(len(r.trace) == 1 and r.trace[0]["best"] == r.reward for r in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_noise_gradient_equals_autograd_through_everything(task, kind, checkpoint):
    task = task(kind)
    rows = [2, 0, 1, 0]
    noise = task.noise(rows, [0, 1, 2, 3])
    weights = [p for part in task.policy.pipe.components.values() for p in parameters(part)]
    for p in task.policy.network.parameters():
        p.requires_grad_()  # as a policy in training has it
    before = [p.clone() for p in weights]
    expected, expected_grad = through(task, rows, noise)
    calls = task.policy.calls
    step, grad = noise_gradient(task, rows, noise, checkpoint)
    each = task.sampling.steps * (2 if task.sampling.guidance > 1 else 1)
    twice = 2 if checkpoint or task.sampling.steps > 1 else 1
    assert task.policy.calls - calls == len(rows) * each * twice
    assert torch.equal(step.images, draw(task, rows, noise).images)
    torch.testing.assert_close(step.total, expected, atol=1e-4, rtol=1e-4)
    assert expected_grad.flatten(1).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(weights, before, strict=True))
    assert not step.images.requires_grad


@pytest.mark.parametrize("kind", ["one step", "flow sde"])
def test_several_rewards_add_their_weighted_gradients(task, kind):
    def blind(images, prompts):
        return (7 * images.flatten(1).mean(1)).round()

    task = task(kind)
    several = rewards.build({pattern: 2.0, contrast: -0.5, blind: 0.0})
    whole, rows = replace(task, reward=several), range(len(task))
    noise = task.noise(rows)
    step, *_ = reno(whole, iterations=1)  # which allows `blind`, as it does not count
    assert torch.equal(step.parts["blind"], blind(step.images, TEXTS))
    step, grad = noise_gradient(whole, rows, noise)
    assert torch.equal(step.parts["blind"], blind(step.images, TEXTS))
    alone = [
        through(replace(task, reward=rewards.build({reward: 1.0})), rows, noise)
        for reward in (pattern, contrast)
    ]
    for (value, _), name in zip(alone, ("pattern", "contrast"), strict=True):
        torch.testing.assert_close(step.parts[name], value.detach(), atol=1e-4, rtol=1e-4)
    (first, of_first), (second, of_second) = alone
    total = (2 * first - 0.5 * second).detach()
    torch.testing.assert_close(step.total, total, atol=1e-4, rtol=1e-4)
    assert (0.5 * of_second).norm() > 0.05 * grad.norm()  # both matter
    torch.testing.assert_close(grad, 2 * of_first - 0.5 * of_second, atol=1e-4, rtol=1e-3)


def test_gradient_holds_the_graph_of_one_step_at_a_time():
    """The most tensors kept for a backward pass do not grow with the number of steps."""

    peaks = []
    for steps in (2, 8):
        task = toy("flow_sde", 0.7, steps=steps)
        peaks.append(peak_saved(partial(noise_gradient, task, range(4), task.noise(range(4)))))
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("kind", ["ancestral", "flow"])
def test_searches_run_on_real_pipelines(task, kind):
    task = task(kind, TEXTS[:2], batch=8)
    for name in ("best_of_n", "random_search", "zero_order", "paths"):
        found = search(task, build(name, SMALL[name])(task), Budget())
        assert all(r.reward > r.trace[0]["reward"] - 1e-6 for r in found)
        assert any(r.reward > r.trace[0]["reward"] for r in found)


def parameters(part):
    return part.parameters() if isinstance(part, torch.nn.Module) else []


def test_regulariser_of_reno_rests_where_normal_noise_is():
    noise = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    noise *= (255**0.5 / noise.flatten(1).norm(dim=1))[:, None, None, None]
    noise.requires_grad_()
    (grad,) = torch.autograd.grad(chi_regularizer(noise).sum(), noise)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the golden numbers")
def test_regulariser_of_reno_is_that_of_its_authors():
    golden = load_file(GOLDEN)
    noise = golden["reno.latents"].requires_grad_()
    log_likelihood = -chi_regularizer(noise)
    torch.testing.assert_close(log_likelihood, golden["reno.log_likelihood"])
    (grad,) = torch.autograd.grad(log_likelihood.sum(), noise)
    torch.testing.assert_close(grad, golden["reno.grad"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["one step", "flow"])
def test_reno_is_sgd_on_each_prompt_alone(task, kind):
    whole = task(kind)
    steps = list(reno(whole, iterations=4))
    assert len(steps) == 4
    for row, text in enumerate(TEXTS):
        alone = task(kind, [text], batch=1)
        noise = alone.noise([0]).requires_grad_()
        rule = torch.optim.SGD([noise], lr=5.0, momentum=0.9, nesterov=True)
        for step, own in zip(steps, reno(alone, iterations=4), strict=True):
            torch.testing.assert_close(step.noise[row], noise[0].detach(), atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(own.noise[0], noise[0].detach(), atol=2e-3, rtol=1e-3)
            norm = noise.norm()
            penalty = 0.01 * (norm**2 / 2 - (noise.numel() - 1) * norm.log())
            (penalty_grad,) = torch.autograd.grad(penalty, noise)
            noise.grad = penalty_grad - through(alone, [0], noise.detach())[1]
            assert noise.grad.norm() > 0.1
            torch.nn.utils.clip_grad_norm_([noise], 0.1)
            rule.step()


@pytest.mark.parametrize("kind", ["one step", "flow"])
def test_noise_is_float32_where_the_model_is_not(task, pipelines, kind):
    half = load(pipelines[KINDS[kind][0]], dtype="bfloat16")
    assert half.network.dtype == torch.bfloat16
    task = replace(task(kind), policy=half)
    steps = list(reno(task, iterations=3))
    assert {step.noise.dtype for step in steps} == {torch.float32}
    noise = steps[-1].noise
    assert not torch.equal(noise, noise.bfloat16().float())  # nor was it rounded on the way
    assert (steps[0].images - steps[-1].images).flatten(1).abs().amax(1).min() > 0.1
    found = search(task, reno(task, iterations=3), Budget())
    assert {result.noise.dtype for result in found} == {torch.float32}
    assert all(result.reward > result.trace[0]["reward"] + 0.1 for result in found)


def test_gradients_too_small_for_float16_survive():
    x = torch.ones(3, 2, requires_grad=True)
    grad = torch.tensor([[1e-9, -2e-9], [1e3, 2e3], [0.0, 0.0]])

    def doubled():
        return (2 * x.half()).float()

    assert not torch.autograd.grad(doubled(), x, grad)[0][0].any()
    torch.testing.assert_close(pulled_back(doubled(), x, grad), 2 * grad, atol=0, rtol=1e-3)


def test_reno_leaves_the_noise_of_later_steps_alone(task):
    task = task("ancestral")
    first, last = islice(reno(task, iterations=2), 2)
    assert torch.equal(first.noise[:, 1:], last.noise[:, 1:])
    assert not torch.equal(first.noise[:, 0], last.noise[:, 0])


def test_dno_moves_every_noise_by_adam(task):
    whole = task("ancestral")
    steps = list(dno(whole, iterations=3, regularization=0.0))
    noise = whole.noise(range(3)).requires_grad_()
    rule = torch.optim.Adam([noise], lr=0.01)
    for step in steps:
        torch.testing.assert_close(step.noise, noise.detach(), atol=1e-3, rtol=1e-3)
        grad = through(whole, range(3), noise.detach())[1]
        noise.grad = -grad / grad.flatten(1).norm(dim=1).clamp(min=1).view(-1, 1, 1, 1, 1)
        rule.step()
    assert ((steps[2].noise - steps[0].noise).flatten(2).norm(dim=2) > 0).all()
    _, fixed = islice(dno(whole, iterations=2, initial_only=True), 2)
    assert torch.equal(fixed.noise[:, 1:], steps[0].noise[:, 1:])
    assert not torch.equal(fixed.noise[:, 0], steps[0].noise[:, 0])


def test_regulariser_of_dno_is_silent_until_noise_is_implausible():
    def measured(noise):
        noise = noise.requires_grad_()
        value = implausibility(noise)
        return value.detach(), torch.autograd.grad(value.sum(), noise)[0]

    value, grad = measured(torch.randn(200, 4096))
    silent = (value - 2 * math.log(2)).abs() < 1e-5
    assert 0.65 < silent.float().mean() < 0.85  # P(χ²_4 < 8 log 2) = 0.76
    assert not grad[silent].any()
    assert value.max() < 4
    z = torch.randn(3, 4096)
    shifted, wide, correlated = z[:1] + 0.2, 1.3 * z[1:2], z[2:].clone()
    correlated[:, 1::4] = correlated[:, ::4]
    value, grad = measured(torch.cat([shifted, wide, correlated]))
    assert (value > 10).all()
    assert (grad.norm(dim=1) > 0).all()
    # the pull is inwards, and back to the centre
    assert grad[0].mean() > 0
    assert (grad[1] * wide[0]).sum() > 0


def test_dno_stays_plausible_with_its_regulariser():
    def push(images, prompts):
        return 100 * images.flatten(1).sum(1)  # has no maximum

    push.differentiable = True
    ends = []
    for weight in (0.0, 10.0):
        task = toy("flow_sde", 0.7, push)
        *_, last = dno(task, 40, lr=0.1, regularization=weight, block=2, permutations=4)
        ends.append(last.noise.square().mean())
    assert ends[1] < 0.5 * ends[0]


def test_neighbors_have_the_norm_and_the_cosine():
    noise, fresh = torch.randn(5, 2, 4, 8, 8), torch.randn(5, 2, 4, 8, 8)
    near = neighbor(noise, fresh, 0.95)
    norm = noise.flatten(1).norm(dim=1)
    torch.testing.assert_close(near.flatten(1).norm(dim=1), norm)
    cosine = torch.cosine_similarity(near.flatten(1), noise.flatten(1))
    torch.testing.assert_close(cosine, torch.full((5,), 0.95))
    assert not torch.allclose(near[0] / norm[0], near[1] / norm[1], atol=1e-2)


def test_what_searches_draw():
    task = toy()
    calls = task.policy.calls
    steps = made("random_search", task, rounds=3)
    assert [len(step.rows) for step in steps] == [4, 8, 16, 16, 16]  # batches of 16
    assert task.policy.calls - calls == 60 * 8
    noises = torch.cat([step.noise for step in steps]).flatten(1)
    assert len(noises.unique(dim=0)) == 60
    every = made("best_of_n", task, n=15)
    again = torch.cat([step.noise for step in every]).flatten(1)
    assert [len(step.rows) for step in every] == [4, 16, 16, 16, 8]
    assert torch.equal(noises.unique(dim=0), again.unique(dim=0))


def test_zero_order_draws_a_base_once():
    def flat(images, prompts):
        return 0 * images.flatten(1).sum(1)

    restarts = made("zero_order", toy(reward=flat), rounds=3, neighbors=2)
    assert [len(step.rows) for step in restarts] == [4, 8, 12, 12]
    stays = made("zero_order", toy(reward=flat), rounds=3, neighbors=2, restart=False)
    assert [len(step.rows) for step in stays] == [4, 8, 8, 8]
    base = stays[0].noise.repeat_interleave(2, 0).flatten(1)
    for step in stays[1:]:
        cosine = torch.cosine_similarity(step.noise.flatten(1), base)
        torch.testing.assert_close(cosine, torch.full((8,), 0.95))
    climbing = made("zero_order", toy(), rounds=6)
    best = climbing[0].noise.flatten(1)
    for step in climbing[1:]:
        sizes = [step.rows.count(i) for i in range(4)]
        for i, (near, totals) in enumerate(
            zip(step.noise.split(sizes), step.total.split(sizes), strict=True)
        ):
            if sizes[i] == 4:  # about the best of the last round
                cosine = torch.cosine_similarity(near.flatten(1), best[i], dim=1)
                torch.testing.assert_close(cosine, torch.full((4,), 0.95))
            best[i] = near[totals.argmax()].flatten()


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_forward_noising_ends_at_the_marginal(path):
    sigma = torch.tensor([0.9, 0.6, 0.2, 0.0])
    alpha = 1 - sigma if path == "flow" else (1 - sigma**2).sqrt()
    levels = Levels(sigma, alpha, sigma)
    x0, n = torch.tensor([1.5, -0.5]), 200_000
    for i in (1, 2, 3):
        x = levels.alpha[i] * x0 + levels.sigma[i] * torch.randn(n, 2)
        x = forward_noising(x, torch.randn(n, 2), levels[i], levels[0])
        torch.testing.assert_close(x.mean(0), levels.alpha[0] * x0, atol=0.01, rtol=0)
        torch.testing.assert_close(x.std(0), levels.sigma[0].expand(2), atol=0.01, rtol=0)


def test_rounds_of_a_search_over_paths():
    def schedule(steps):
        sigma = torch.linspace(1, 0, steps + 1)
        return Levels(sigma, 1 - sigma, sigma)

    # 0.12 -> 0.90 -> 0.09 -> 0.87 -> 0.06 ...
    assert itinerary(schedule(100), 0.12, 0.78, 0.81) == [
        (88, 10, 91), (91, 13, 94), (94, 16, 97), (97, 19, 100),
    ]  # fmt: skip
    assert itinerary(schedule(4), 0.12, 0.78, 0.81) == [(3, 0, 4)]
    assert itinerary(schedule(4), 0.9, 0.0, 0.01) == [(1, 0, 2), (2, 1, 3), (3, 2, 4)]
    assert itinerary(schedule(2), 1.0, 1.0, 1.0) == [(1, 0, 2)]
    with pytest.raises(ValueError, match=ONE_STEP):
        itinerary(schedule(1), 0.5, 0.5, 0.5)


def test_paths_keep_the_best(monkeypatch):
    seen, clean, finish = {}, searches._clean, searches.finish

    def predicted(task, rows, x, i):
        seen["state"] = x
        return clean(task, rows, x, i)

    def finished(*args):
        step = finish(*args)
        seen.setdefault("total", step.total)
        return step

    def noising(x, *rest):
        seen["start"] = x
        return forward_noising(x, *rest)

    monkeypatch.setattr(searches, "_clean", predicted)
    monkeypatch.setattr(searches, "finish", finished)
    monkeypatch.setattr(searches, "forward_noising", noising)
    task = toy()
    steps = made("paths", task, keep=2, children=3, start=0.5, forward=0.25, backward=0.5)
    rounds = itinerary(task.sampling.levels, 0.5, 0.25, 0.5)
    assert rounds == [(4, 2, 6), (6, 4, 8)]
    assert [step and len(step.rows) for step in steps] == [4, None, None, 4 * 2 * 3]
    calls = 4 * 8 + 4 * 2 * 4 + 24 * (4 + 1) + 24 * 4  # plain, to level 4, two rounds
    assert (task.policy.calls, task.reward.images) == (calls, 4 + 24 + 24)
    last, now = seen["state"], seen["start"]
    best = seen["total"].view(4, 6).topk(2).indices + 6 * torch.arange(4)[:, None]
    assert torch.equal(now, last[best.flatten()].repeat_interleave(3, 0))


@pytest.mark.parametrize("name", SMALL)
def test_budgets_end_a_search_with_the_step_that_uses_them_up(name):
    task = toy("flow_sde", 0.7)
    options = SMALL[name] | ({"block": 2} if name == "dno" else {})
    whole = search(task, build(name, options)(task), Budget())
    for result in whole:
        assert result.reward == max(point["reward"] for point in result.trace)
        assert result.reward == result.trace[-1]["best"]
    for limit in ("denoiser_calls", "reward_calls"):
        taken = [point[limit] for point in whole[0].trace]
        assert taken == sorted(set(taken))
        for most, steps in ((taken[0], 1), (taken[0] + 0.1, 2), (taken[1], 2)):
            cut = search(task, build(name, options)(task), Budget(**{limit: most}))
            if (name, limit, most) == ("paths", "denoiser_calls", taken[0] + 0.1):
                steps = 1  # it ends before any path is clean
            assert [len(result.trace) for result in cut] == [steps] * 4
    assert len(search(task, build(name, options)(task), Budget(seconds=1e-9))[0].trace) == 1


ALONE = {  # with budgets that end some of them on the way
    "best_of_n": {"n": 40},
    "random_search": {"rounds": 5},
    "zero_order": {"rounds": 30, "neighbors": 3, "cosine": 0.8},
    "paths": {"start": 0.5, "forward": 0.25, "backward": 0.5},
    "reno": {"lr": 1.0, "iterations": 40},
    "dno": {"lr": 0.1, "iterations": 40, "block": 2, "permutations": 2},
    "smc": {"strength": 2.0},
    "flow_map": {"strength": 2.0},
    "universal_guidance": {"strength": 0.1},
}


@pytest.mark.parametrize("name", ALONE)
def test_each_prompt_finds_what_it_finds_alone_for_what_it_costs_alone(name):
    """Whatever else is searched for at once; and no call is made beyond the budgets."""
    method = build(name, ALONE[name])
    together, budget = toy("flow_sde", 0.7), Budget(denoiser_calls=8 * 25.5)
    found = search(together, method(together), budget)
    calls = 0
    for i, text in enumerate("0123"):
        alone = replace(toy("flow_sde", 0.7), prompts=[Prompt(text)], seeds=[i])
        (own,) = search(alone, method(alone), budget)
        assert found[i].reward == pytest.approx(own.reward, rel=1e-3)
        torch.testing.assert_close(found[i].image, own.image, atol=1e-3, rtol=1e-3)
        assert found[i].trace[-1]["denoiser_calls"] == own.trace[-1]["denoiser_calls"]
        assert own.trace[-1]["denoiser_calls"] == alone.policy.calls
        calls += alone.policy.calls
    assert together.policy.calls == calls
    taken = [result.trace[-1]["denoiser_calls"] for result in found]
    if name in ("best_of_n", "random_search"):
        assert taken == [8 * 26] * 4  # the picture that uses the budget up is the last
    if name == "zero_order":
        assert len(set(taken)) > 1  # who restarts has one more picture to draw


def test_ctrl_c_keeps_the_best():
    def interrupted(task):
        yield from islice(build("best_of_n", {"n": 8})(task), 2)
        raise KeyboardInterrupt

    task = toy()
    found = search(task, interrupted(task), Budget())
    assert [r.reward for r in found] == [
        r.reward for r in search(task, build("best_of_n", {"n": 5})(task), Budget())
    ]

    def at_once(task):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        search(task, at_once(task), Budget())


class Restless:
    """A judge that always asks for something new."""

    def __init__(self):
        self.asked = 0

    def critique(self, image, prompt):
        return "dull"

    def refine(self, image, prompt, critique):
        self.asked += 1
        return f"{prompt} {self.asked}"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_method_keeps_the_best(name, after):
    """Ctrl-C while the reward looks at the pictures, `after` calls after the plain samples."""
    calls = []

    def fragile(images, prompts):
        calls.append(len(prompts))
        if len(calls) == 2 + after:
            raise KeyboardInterrupt
        return closeness(images, prompts)

    fragile.differentiable = True
    task = toy("flow_sde", 0.7, fragile)
    options = {"dno": {"block": 2}}.get(name, {})
    method = build(name, options)
    steps = method(task, judge=Restless()) if name == "critique" else method(task)
    found = search(task, steps, Budget())
    plain = draw(toy("flow_sde", 0.7), range(4), task.noise(range(4)))
    assert len(calls) == 2 + after
    assert calls[0] == 4
    assert [result.prompt for result in found] == [*"0123"]
    assert all(result.stopped for result in found)
    assert all(r.reward >= value for r, value in zip(found, plain.total.tolist(), strict=True))
    assert all(r.reward == max(point["reward"] for point in r.trace) for r in found)
    if after == 0:
        assert torch.equal(torch.stack([r.image for r in found]), plain.images)


TOY = {
    "best_of_n": {"n": 16},
    "random_search": {"rounds": 3},
    "zero_order": {"rounds": 8, "cosine": 0.8},
    "paths": {"start": 0.5, "forward": 0.25, "backward": 0.5},
    "reno": {"lr": 1.0, "iterations": 20},
    "dno": {"lr": 0.1, "iterations": 20, "block": 2, "permutations": 2},
}


@pytest.mark.parametrize("name", TOY)
@pytest.mark.parametrize("kernel", ["ode", "flow_sde"])
def test_the_reward_rises(name, kernel):
    task = toy(kernel, 0.7)
    found = search(task, build(name, TOY[name])(task), Budget())
    gain = [r.reward - r.trace[0]["reward"] for r in found]
    assert min(gain) >= 0
    assert sum(gain) / len(gain) > 0.3
    again = draw(task, range(4), torch.stack([r.noise for r in found]))
    if name != "paths":  # whose pictures have more noise than that they start from
        torch.testing.assert_close(again.total.tolist(), [r.reward for r in found])


def test_reno_finds_the_noise_of_the_goal():
    task = toy()
    found = search(task, build("reno", {"lr": 1.0, "iterations": 60})(task), Budget())
    best = torch.stack([r.image[:2, 0, 0] for r in found])
    points = 8 * (best - 0.5)
    assert (points - torch.tensor([0.8, -0.6])).norm(dim=1).max() < 0.1


def test_noise_is_that_of_the_seed():
    task = toy("flow_sde", 0.7)
    noise = Noise([2], (2, 1, 1), "cpu")
    expected = torch.stack([noise.draw() for _ in range(8)], 1)
    assert torch.equal(task.noise([2]), expected)  # 7 stochastic steps
    assert torch.equal(task.noise([0, 2, 2], [3, 0, 1])[1], expected[0])
    assert torch.equal(task.noise([0, 2, 2], [3, 0, 1])[2], task.noise([2], 1)[0])
    assert not torch.equal(task.noise([2], 1), task.noise([2], 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("renno", {}, "did you mean 'reno'"),
        ("reno", {"learning_rate": 1}, "unknown key 'reno.learning_rate'"),
        ("reno", {"lr": 0}, r"reno.lr=0.* use above 0 \(default 5.0\)"),
        ("reno", {"lr": "inf"}, "reno.lr=inf is out of range"),
        ("reno", {"iterations": "many"}, "reno.iterations='many' is not an int"),
        ("reno", {"momentum": 1.0}, "use 0 or more and below 1"),
        ("dno", {"initial_only": 3}, "dno.initial_only=3"),
        ("zero_order", {"cosine": 1.0}, "use -1 or more and below 1"),
        ("best_of_n", {"n": 0}, "use 1 or more"),
    ],
)
def test_options_are_checked_before_any_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options)
    assert build("reno", {"lr": "2e-1"}).keywords["lr"] == 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "former", "now"),
    [
        ("zero_order", {"neighbours": "2"}, {"neighbors": 2}),
        ("reno", {"regularisation": 0.5}, {"regularization": 0.5}),
        ("dno", {"regularisation": 0.5}, {"regularization": 0.5}),
        ("universal_guidance", {"normalise": "unit"}, {"normalize": "unit"}),
    ],
)
def test_former_spellings_of_options_are_taken(name, former, now):
    known = [build(name, options).keywords for options in (former, now)]  # type: ignore[attr-defined]
    assert known[0] == known[1]
    assert now.items() <= known[0].items()


@pytest.mark.parametrize("name", ["denoiser_calls", "reward_calls", "seconds"])
@pytest.mark.parametrize("value", [-1, -1e-9, math.nan])
def test_what_is_no_budget_is_refused(name, value):
    with pytest.raises(ValueError, match=f"budget.{name}={value} is no budget; use 0 or more"):
        Budget(**{name: value})
    assert Budget(**{name: 0})


def test_what_a_task_refuses():
    def blind(images, prompts):
        return images.flatten(1).sum(1)

    def rivals(images, prompts):
        return images.flatten(1).sum(1)

    rivals.per_group = True
    with pytest.raises(ValueError, match="blind is not differentiable"):
        search(toy(reward=blind), reno(toy(reward=blind)), Budget())
    with pytest.raises(ValueError, match="rivals compares the pictures"):
        toy(reward=rivals)
    floor = {"type": closeness, "at_least": 0.5}
    with pytest.raises(ValueError, match=r"rewards.floor.at_least is a constraint"):
        replace(toy(), reward=rewards.build({closeness: 1.0, "floor": floor}))
    with pytest.raises(ValueError, match=r"dno.block=4 exceeds the 2 numbers"):
        dno(toy())
    good = toy()
    with pytest.raises(ValueError, match="1 seeds for 4 prompts"):
        Task(good.policy, good.reward, good.prompts, good.sampling, [1])
    with pytest.raises(ValueError, match="batch=0 draws no picture"):
        Task(good.policy, good.reward, good.prompts, good.sampling, good.seeds, batch=0)

    def nothing_for_the_last(task):
        yield draw(task, [0, 1, 2], task.noise([0, 1, 2]))

    with pytest.raises(ValueError, match="no picture of '3' was made"):
        search(good, nothing_for_the_last(good), Budget())
