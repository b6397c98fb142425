"""Steered samplers: particles against the tilted Gaussian, guidance against its formula, judges."""

from dataclasses import replace

import pytest
import torch
from conftest import load, perturb
from families import EPSILON
from test_toy import GOAL, ToyPolicy, closeness

import rewards
from diffalign.config.prompts import Prompt
from diffalign.optimize_noise import Budget, Task, build, draw
from diffalign.optimize_noise.base import search
from diffalign.optimize_noise.critique import critique
from diffalign.optimize_noise.flow_map import flow_map, looking
from diffalign.optimize_noise.guidance import corrected, rate, slope, universal_guidance
from diffalign.optimize_noise.smc import (
    Particles,
    _resampled,
    denoised,
    ess,
    measured,
    potential,
    resample,
    smc,
    steer,
)
from diffalign.sampling.rollout import Sampling
from rewards.vlm import UnreadableAnswer

KINDS = ["diff", "max", "add", "rt"]
SLOPE = torch.tensor([1.0, -0.5])
K = 12_000


def points(images):
    return 8 * (images[:, :2, 0, 0] - 0.5)


def linear(images, prompts):
    return points(images) @ SLOPE


linear.differentiable = True


def brightness(images, prompts):
    return images.flatten(1).mean(1)


brightness.differentiable = True


def toy(reward=closeness, texts="0123", kernel="flow_sde", batch=1 << 16, steps=8):
    policy = ToyPolicy()
    policy.decode_batch = 1 << 16
    sampling = Sampling(policy.levels(steps), kernel, 0.7, 1.0)
    prompts = [Prompt(text) for text in texts]
    seeds = [int(text) for text in texts]
    return Task(policy, rewards.build({reward: 1.0}), prompts, sampling, seeds, batch)


def ended(generator):
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def variance(task):
    """Of a coordinate of what the sampler draws: every step is linear in x."""
    value, one = 1.0, torch.ones(1, 2, 1, 1)
    for i in range(task.sampling.steps):
        with torch.no_grad():
            step = task.sampling.transition(task.policy, one, i, task.cond([0]))
        value = value * step.mean[0, 0].item() ** 2 + step.std.item() ** 2
    return value


def tilted(reward, strength, v):
    if reward is linear:
        return strength * v * SLOPE, v
    narrow = 1 / (1 / v + 2 * strength)
    return 2 * strength * narrow * GOAL, narrow


def assert_tilted(task, reward, strength, step, log_w, tolerance=0.03):
    w, x = log_w.softmax(0).float(), points(step.images)
    mean, v = tilted(reward, strength, variance(task))
    found = (w[:, None] * x).sum(0)
    torch.testing.assert_close(found, mean, atol=tolerance, rtol=0)
    spread = (w[:, None] * (x - found).square()).sum(0)
    torch.testing.assert_close(spread, torch.full((2,), v), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [linear, closeness])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.1])  # never, sometimes, always
def test_weighted_particles_are_the_tilted_distribution(kind, reward, threshold, monkeypatch):
    resampled = []

    def counted(*args):
        resampled.append(args)
        return resample(*args)

    monkeypatch.setitem(steer.__globals__, "resample", counted)
    task, strength, at, tolerance = toy(reward, "3"), 1.0, [1, 4], 0.03
    if threshold == 0.5:  # steep enough to resample, but only after weights were carried on
        at, tolerance = [1, 3, 5, 6], 0.05
        strength = 1.0 if kind == "add" else 4.0  # the sum of the rewards is steep by itself
    step, log_w = ended(steer(task, K, strength, kind, at, threshold, denoised(task)))
    assert len(step.rows) == K
    assert_tilted(task, reward, strength, step, log_w, tolerance)
    again = draw(task, step.rows, step.noise)
    torch.testing.assert_close(again.images, step.images)
    if threshold == 0:  # the weights are those of plain samples
        torch.testing.assert_close(log_w, strength * step.total.double(), atol=1e-4, rtol=1e-4)
        assert not resampled
    elif threshold == 0.5:
        assert 0 < len(resampled) < len(at)
    else:
        assert len(resampled) == len(at)


@pytest.mark.parametrize("gradient", [1.0, 2.0])
@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_shifted_proposals_are_corrected(gradient, threshold):
    task, strength = toy(closeness, "3"), 1.0
    look = looking(task, None, True)
    at = range(0, 8, 2)
    step, log_w = ended(steer(task, K, strength, "diff", at, threshold, look, gradient))
    assert_tilted(task, closeness, strength, step, log_w)
    again = draw(task, step.rows, step.noise)
    torch.testing.assert_close(again.images, step.images, atol=1e-5, rtol=1e-5)
    _, plain = ended(steer(task, K, strength, "diff", at, 0.0, denoised(task)))
    assert threshold > 0 or ess(log_w) > 1.05 * ess(plain)  # the shift goes the right way


def test_the_shift_is_half_the_variance_times_the_tilted_slope():
    task, slopes, look = toy(closeness, "3"), [], None

    def recorded(rows, x, i, wanted):
        found = look(rows, x, i, wanted)
        if task.sampling.stochastic[i]:
            slopes.append(found[2])
        return found

    look = looking(task, None, True)
    step, _ = ended(steer(task, 5, 3.0, "diff", [], 0.5, recorded, gradient=0.7))
    shift = step.noise - task.noise([0] * 5, range(1, 6))  # δ/s: no particle has changed its place
    assert not shift[:, 0].any()
    for i, grad in enumerate(slopes):
        expected = 0.5 * 0.7 * 3.0 * task.sampling.stds[i] * grad
        torch.testing.assert_close(shift[:, 1 + i], expected, atol=1e-5, rtol=1e-4)
    assert len(slopes) == 7
    assert slopes[1].abs().min() > 1e-3


def test_look_ahead_is_t_times_the_reward_and_its_gradient():
    task = toy()
    x = torch.randn(4, 2, 1, 1)
    for i in (0, 3, 6):
        seen, r, grad = looking(task, None, True)(range(4), x, i, True)
        z = x.clone().requires_grad_()
        ahead = task.policy.predict(z, task.sampling.levels[i], task.cond(range(4)), 1.0).x0
        expected = i / 8 * task.score(task.policy.decode(ahead, differentiable=True), range(4))[0]
        torch.testing.assert_close(r, expected.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), z)[0])
        torch.testing.assert_close(seen.x0, ahead.detach())


def test_another_policy_looks_ahead_and_its_calls_count():
    task, other = toy(), ToyPolicy()
    other.network.learned[2].bias.data += 1.0
    look = looking(task, other, False)
    x = torch.randn(4, 2, 1, 1)
    seen, r, _ = look(range(4), x, 4, True)
    mine, own, _ = looking(task, None, False)(range(4), x, 4, True)
    assert torch.equal(seen.x0, mine.x0)
    assert not torch.allclose(r, own)
    assert task.policy.calls == 3 * 4
    list(flow_map(task, look_ahead=other))


def test_potentials():
    r, before = torch.tensor([1.0, -2.0]), torch.tensor([3.0, -3.0])
    for kind, value, kept in (
        ("diff", [-2.0, 1.0], [1.0, -2.0]),
        ("max", [3.0, -2.0], [3.0, -2.0]),
        ("add", [4.0, -5.0], [4.0, -5.0]),
        ("rt", [1.0, -2.0], [1.0, -2.0]),
    ):
        found = potential(kind, r, before)
        assert [v.tolist() for v in found] == [value, kept]
        assert [v.tolist() for v in potential(kind, r, None)] == [r.tolist()] * 2


def test_effective_sample_size():
    assert ess(torch.zeros(7)).item() == pytest.approx(7)
    assert ess(torch.tensor([0.0, -1e4, -1e4])).item() == pytest.approx(1)
    w = torch.rand(2, 5, dtype=torch.float64)
    expected = w.sum(1).square() / w.square().sum(1)
    torch.testing.assert_close(ess(w.log() + 1e4), expected, rtol=1e-6, atol=0)


def test_systematic_resampling_is_unbiased():
    log_w = torch.randn(6)
    shares = 6 * log_w.double().softmax(0)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000  # every offset alike
    counts = torch.stack([resample(log_w, v).bincount(minlength=6) for v in u]).double()
    assert (counts.sum(1) == 6).all()
    assert ((counts - shares).abs() < 1).all()
    torch.testing.assert_close(counts.mean(0), shares, atol=2e-3, rtol=0)
    assert resample(torch.zeros(6), 0.3).tolist() == [*range(6)]
    assert resample(torch.tensor([0.0, -torch.inf]), 1 - 1e-12).tolist() == [0, 0]
    assert resample(torch.tensor([-torch.inf, 0.0]), 0.0).tolist() == [1, 1]


def test_all_that_belongs_to_a_particle_moves_with_it():
    def flat():
        return torch.randn(4, dtype=torch.float64)

    def latent():
        return torch.randn(4, 2, 1, 1)

    noise = torch.randn(4, 5, 2, 1, 1)
    p = Particles(latent(), noise, flat(), flat(), flat(), latent(), latent(), latent(), latent())
    index = torch.tensor([2, 2, 0, 3])
    taken = p.take(index, 3)
    for name, value in vars(p).items():
        if name != "noise":
            assert torch.equal(getattr(taken, name), value[index]), name
    assert torch.equal(taken.noise[:, :3], noise[index, :3])
    assert torch.equal(taken.noise[:, 3:], noise[:, 3:])


def test_weights_are_reset_by_resampling_and_carried_where_it_is_skipped():
    log_w = torch.tensor([0.0, 0.1, 0.0, 5.0, 0.0, 0.0], dtype=torch.float64)  # of two prompts
    p = Particles(torch.arange(6.0).view(6, 1), torch.zeros(6, 1, 1), log_w, log_w)
    new = _resampled(p, 2, None, 0, 0.5, [0.5, 0.5], 1)
    assert new.log_w.tolist() == [0.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    assert new.x[:, 0].tolist() == [0, 1, 2, 3, 3, 3]
    assert new.spent.tolist() == [0.0, 0.1, 0.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("name", ["smc", "flow_map"])
def test_a_prompt_is_steered_alike_in_every_batch(name):
    options = {"particles": 6, "threshold": 0.9}
    *_, whole = build(name, options)(toy(batch=5))
    for i, text in enumerate("0123"):
        *_, alone = build(name, options)(toy(texts=text, batch=6))
        mine = [j for j, row in enumerate(whole.rows) if row == i]
        torch.testing.assert_close(whole.images[mine], alone.images)


def test_pruning_keeps_the_best():
    task = toy(texts="3")
    step, _ = ended(steer(task, 6, 1.0, "diff", [4], 0.5, denoised(task), top=2))
    first = step.noise[:, 0].flatten(1).unique(dim=0)
    assert len(first) == 2
    *_, found = flow_map(toy(), particles=4, top=1, end=0.5)
    assert len(found.rows) == 16


def test_guidance_is_gradient_ascent_on_the_clean_estimate():
    task, i, rows = toy(), 3, range(4)
    x, level = torch.randn(4, 2, 1, 1), task.sampling.levels[3]
    seen, total, grad = slope(task, task.policy, rows, x, i, "x0")
    expected = 2 * (GOAL[:, None, None] - seen.x0)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)
    jacobian = task.policy.predict(torch.ones_like(x), level, task.cond(rows)).x0.detach()
    _, _, whole = slope(task, task.policy, rows, x, i, "denoiser")
    torch.testing.assert_close(whole, jacobian * expected, atol=1e-5, rtol=1e-5)
    new = corrected(seen, level.alpha, level.sigma, 0.1 * grad)
    torch.testing.assert_close(level.alpha * new.x0 + level.sigma * new.eps, x)
    assert (task.score(task.policy.decode(new.x0), rows)[0] > total).all()
    assert not any(p.grad is not None for p in task.policy.network.parameters())
    alpha = torch.tensor([0.0, 0.05, 0.1, 0.5, 1.0])
    expected = torch.tensor([16.2, 16.2, 16.2, 1.0, 0.0])
    torch.testing.assert_close(rate(alpha, 1 - alpha, 2.0), expected)


def test_rate_of_guidance_on_a_vp_schedule():
    abar = EPSILON.alphas_cumprod
    alpha, sigma, s = abar.sqrt(), (1 - abar).sqrt(), 3.0
    found = rate(alpha, sigma, s)
    torch.testing.assert_close(found[:896], s * sigma[:896] ** 2 / alpha[:896])
    torch.testing.assert_close(found[896:], torch.full((104,), 8.1 * s))
    assert (found[:896] < 8.1 * s).all()
    assert rate(torch.tensor(0.0), torch.tensor(1.0), s).item() == pytest.approx(8.1 * s)


def test_one_guided_step_is_the_formula():
    task = toy(kernel="ode")
    plain, *_, found = universal_guidance(task, 0.2, "x0", first=7)
    x = [*points(plain.images)]
    level = task.sampling.levels[7]
    eta = rate(level.alpha, level.sigma, 0.2)
    expected = torch.stack([p + eta * 2 * (GOAL - p) for p in x])  # the last step ends in x̂0
    torch.testing.assert_close(points(found.images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("through", ["denoiser", "x0"])
@pytest.mark.parametrize("kernel", ["ode", "flow_sde"])
@pytest.mark.parametrize("options", [{}, {"normalize": "unit"}, {"recurrence": 2, "last": 5}])
def test_guidance_raises_the_reward(through, kernel, options):
    plain, *steps = universal_guidance(toy(kernel=kernel), 0.3, through, **options)
    *_, without = universal_guidance(toy(kernel=kernel), 0.0, through, **options)
    assert all(step is None for step in steps[:-1])
    assert steps[-1].total.mean() > without.total.mean() + 0.1
    assert (steps[-1].total >= without.total).all()
    assert len(steps) == 8 + 1 + (6 if "recurrence" in options else 0)
    if "recurrence" not in options:
        assert torch.equal(without.images, plain.images)


class Colors:
    """A judge that asks for the next of some prompts and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def critique(self, image, prompt):
        return f"not {prompt}"

    def refine(self, image, prompt, critique):
        self.asked.append((image, prompt, critique))
        answer = self.answers.pop(0)
        if answer is None:
            raise UnreadableAnswer("no prompt")
        return answer


@pytest.fixture
def tiny(pipelines):
    def tiny(name, kernel="flow_sde", eta=0.7, reward=brightness, steps=4):
        policy = load(pipelines[name])
        sampling = Sampling(policy.levels(steps), kernel, eta, 2.0)
        prompts = [Prompt("a red dog"), Prompt("a cat")]
        return Task(policy, rewards.build({reward: 1.0}), prompts, sampling, [3, 4], 3)

    return tiny


FAMILIES = {"unet": ("sd-v", "ddim", 1.0), "flow": ("sd3", "flow_sde", 0.7)}
OPTIONS = {
    "smc": {"end": 0.9, "particles": 3},
    "flow_map": {"gradient": 1.0, "particles": 2},
    "universal_guidance": {"recurrence": 2, "strength": 0.1, "normalize": "unit"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_real_pipelines(tiny, name, family):
    task = tiny(*FAMILIES[family])
    plain = draw(task, range(2), task.noise(range(2)))
    none = search(task, build(name, OPTIONS[name])(task), Budget(denoiser_calls=0))
    assert torch.equal(torch.stack([r.image for r in none]), plain.images)
    assert torch.equal(torch.stack([r.noise for r in none]), plain.noise)
    *_, step = build(name, OPTIONS[name])(task)
    assert step.images.isfinite().all()
    assert set(step.rows) == {0, 1}
    if name != "universal_guidance":  # its pictures are of a changed sampler
        again = draw(task, step.rows, step.noise)
        torch.testing.assert_close(again.images, step.images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_another_policy_looks_ahead_on_real_pipelines(tiny, pipelines, family, gradient):
    task, other = tiny(*FAMILIES[family]), load(pipelines[FAMILIES[family][0]])
    other.add_lora(2)
    perturb(other)
    rows, i = range(2), 2
    level, cond = task.sampling.levels[i], task.cond(range(2))
    x = task.noise(rows)[:, 0].requires_grad_()
    ahead = other.predict(x, level, cond, 2.0).x0
    mine = task.policy.predict(x, level, cond, 2.0).x0
    assert (ahead - mine).abs().max() > 1e-3
    time = level.alpha / (level.alpha + level.sigma)
    expected = time * task.score(task.policy.decode(ahead, differentiable=True), rows)[0]
    seen, r, grad = looking(task, other, gradient > 0)(rows, x.detach(), i, True)
    torch.testing.assert_close(seen.x0, mine.detach())
    torch.testing.assert_close(r, expected.detach())
    if gradient:
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])
    assert all(p.grad is None for p in other.trainable_parameters())
    calls = task.policy.calls
    *_, step = flow_map(task, particles=2, gradient=gradient, look_ahead=other)
    each = 2 * 2 * 2  # prompts, particles and branches of CFG, a step
    steps = 3 if gradient else 2  # that are shifted; that are more than noise and scored
    assert task.policy.calls - calls == 4 * 2 * 2 + 4 * each + steps * each
    again = draw(task, step.rows, step.noise)
    torch.testing.assert_close(again.images, step.images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_looking_ahead_with_the_policy_itself_costs_nothing_more(tiny, family, gradient):
    task, found = tiny(*FAMILIES[family]), []
    for ahead in ("denoiser", task.policy):
        calls = task.policy.calls
        *_, step = flow_map(task, particles=2, gradient=gradient, look_ahead=ahead)
        found.append((step.images, task.policy.calls - calls))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 4 * 2 * 2 + 4 * 2 * 2 * 2


@pytest.mark.parametrize(("name", "options"), [("reno", {"iterations": 3}), ("smc", {"end": 0.9})])
def test_texts_are_encoded_once(tiny, name, options):
    task, texts = tiny(*FAMILIES["unet"]), []
    task = replace(task, prompts=[*task.prompts, task.prompts[0]], seeds=[3, 4, 5])
    task.policy.pipe.text_encoder.register_forward_hook(
        lambda module, given, output: texts.extend(map(tuple, given[0].tolist()))
    )
    *_, last = build(name, options)(task)
    assert set(last.rows) == {0, 1, 2}
    assert len(texts) == len(set(texts)) == 3  # two prompts, and the empty one of guidance


@pytest.mark.parametrize("family", FAMILIES)
def test_critique_keeps_what_is_better_under_the_original_prompt(tiny, family):
    seen = []

    def wanted(images, prompts):
        seen.append(list(prompts))
        return brightness(images, prompts)

    task = tiny(*FAMILIES[family], reward=wanted)
    values = {}
    for text in ("a red dog", "a big red dog", "a hat"):
        other = replace(task, prompts=[Prompt(text)] * 2)
        values[text] = draw(other, [0], task.noise([0])).total.item()
    low, high = sorted(("a big red dog", "a hat"), key=values.__getitem__)
    judge = Colors(low, None, high)
    seen[:] = []
    with pytest.warns(UserWarning, match="'a cat' is not refined"):
        plain, *steps = critique(task, 2, judge=judge)
    assert [len(step.rows) for step in steps] == [1, 1]  # nothing new was asked for the cat
    assert {text for texts in seen for text in texts} == {"a red dog", "a cat"}
    best = plain.total[0].item()
    for step, text in zip(steps, (low, high), strict=True):
        assert step.total.item() == pytest.approx(values[text], abs=1e-5)
        assert torch.equal(step.noise, plain.noise[:1])
    chosen = max(("a red dog", low, high), key=values.__getitem__)
    first = "a red dog" if values[low] <= best else low
    assert [asked[1] for asked in judge.asked] == ["a red dog", "a cat", first]
    assert judge.asked[2][2] == "not a red dog"
    again = Colors(low, None, high)
    with pytest.warns(UserWarning, match="is not refined"):
        results = search(task, critique(task, 2, judge=again), Budget())
    assert [result.prompt for result in results] == ["a red dog", "a cat"]
    assert [result.text for result in results] == [chosen, "a cat"]
    results = search(task, critique(task, 1, judge=Colors(low, "a cat")), Budget())
    assert results[0].reward == pytest.approx(max(best, values[low]), abs=1e-5)
    none = search(task, critique(task, 1, judge=Colors()), Budget(reward_calls=0))
    assert torch.equal(torch.stack([r.image for r in none]), plain.images)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_stubborn_judge_asks_for_is_drawn_once(tiny, family):
    task, judge = tiny(*FAMILIES[family]), Colors(*["a hat"] * 8)
    _, step = critique(task, 4, judge=judge)
    each = 2 * 4 * 2  # prompts, steps and branches of CFG
    assert task.policy.calls == 2 * each
    assert step.texts == ["a hat"] * 2
    assert len(judge.asked) == 4  # the second round finds nothing new, and is the last
    list(critique(task, 4, judge=Colors("a red dog", "a cat")))
    assert task.policy.calls == 3 * each  # of the prompts themselves there is a picture


def test_a_budget_of_reward_calls_holds_for_critique():
    for most, steps in ((1, 1), (1.5, 2), (2, 2), (2.5, 3)):
        task = toy()
        judge = Colors(*"abcdefghijkl")
        found = search(task, critique(task, 3, judge=judge), Budget(reward_calls=most))
        assert [len(result.trace) for result in found] == [steps] * 4
        assert task.reward.images == 4 * steps


def test_a_budget_of_reward_calls_holds_for_flow_map():
    # four particles a prompt, scored at steps 1 to 6 of 8 and in the end
    task = toy()
    with pytest.warns(UserWarning, match="the budget ended on the way"):
        found = search(task, flow_map(task), Budget(reward_calls=3))
    assert [len(result.trace) for result in found] == [1] * 4
    assert task.reward.images == 4 * (1 + 4)
    task = toy()
    found = search(task, flow_map(task), Budget(reward_calls=1 + 6 * 4 + 1))
    assert [len(result.trace) for result in found] == [2] * 4
    assert task.reward.images == 4 * (1 + 6 * 4 + 4)


def test_what_cannot_work_is_refused():
    def blind(images, prompts):
        return images.flatten(1).sum(1)

    for name, task, options, message in (
        ("smc", toy(kernel="ode"), {}, "draws nothing on the way"),
        ("smc", toy(), {"start": 0.5}, "lower start, raise end"),
        ("smc", toy(), {"potential": "sum"}, "one of diff, max, add, rt"),
        ("flow_map", toy(), {"top": 9}, "keeps more than particles=4"),
        ("flow_map", toy(), {"look_ahead": "x"}, "unknown key 'flow_map.look_ahead'"),
        ("flow_map", toy(blind), {"gradient": 1}, "not differentiable"),
        ("universal_guidance", toy(blind), {}, "not differentiable"),
        ("universal_guidance", toy(), {"first": 8}, "hold none of the 8 steps"),
        ("critique", toy(), {}, "can criticise a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            list(build(name, options)(task))


@pytest.mark.parametrize(("name", "calls"), [("smc", 4 * 8), ("universal_guidance", 8)])
def test_a_budget_that_just_suffices_does(name, calls):
    task, plain = toy(), 8
    found = search(task, build(name)(task), Budget(denoiser_calls=plain + calls))
    assert [len(result.trace) for result in found] == [2] * 4
    with pytest.warns(UserWarning, match="the budget ended on the way"):
        found = search(task, build(name)(task), Budget(denoiser_calls=plain + 1))
    assert [len(result.trace) for result in found] == [1] * 4


def test_steps_that_are_scored():
    assert measured(toy(steps=100), 0.05, 0.3, 0.05) == [5, 10, 15, 20, 25, 30]
    assert measured(toy(), 0.05, 0.3, 0.05) == [1, 2]
    # at first there is only noise, and no chance after the last
    assert measured(toy(), 0.0, 0.99, 0.05) == [*range(1, 7)]
    task = toy()
    *_, step = smc(task, particles=3)
    assert task.policy.calls == 4 * 8 + 12 * 8
    assert task.reward.images == 4 + 12 * 2 + 12  # steps 1 and 2 of 8
    assert len(step.rows) == 12
