import math
from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from diffalign.dynamics import (
    KERNELS,
    Gaussian,
    Levels,
    Prediction,
    dance_sde,
    ddim,
    flow_sde,
    ode,
    renoise,
    reverse_sde,
    step_std,
)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
LATENT = (4, 8, 8)


def golden(name):
    if not (GOLDEN / name).exists():
        pytest.skip("golden numbers are not here")
    return load_file(GOLDEN / name)


def vp(alphas_cumprod, t):
    a = alphas_cumprod[t]
    return Levels(torch.as_tensor(t).float(), a.sqrt(), (1 - a).sqrt())


def flow(sigmas):
    return Levels(1000 * sigmas, 1 - sigmas, sigmas)


FLOW = flow(torch.linspace(1, 0, 11, dtype=torch.float64))
VP = vp(
    torch.cat([torch.ones(1), torch.cumprod(1 - torch.linspace(1e-2, 0.3, 20), 0)]).double(),
    torch.arange(20, -1, -1),
)
CONSTRUCTORS = [
    (Prediction.from_epsilon, VP),
    (Prediction.from_epsilon, FLOW),
    (Prediction.from_v, VP),
    (Prediction.from_flow, FLOW),
]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(level, seed=0, n=3):
    """A noisy x (n, *latent) and a prediction that is consistent with it, in float64."""
    x, out = randn(n, *LATENT, seed=seed), randn(n, *LATENT, seed=seed + 1)
    make = (
        Prediction.from_v
        if level.alpha.square().add(level.sigma**2).allclose(torch.ones_like(level.sigma))
        else Prediction.from_flow
    )
    return x, make(x, out, level)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, atol=tol, rtol=0, check_dtype=False)


@pytest.mark.parametrize("index", [0, 16, 48])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_reproduces_ddpo(kind, eta, index):
    data = golden("ddim_logprob.safetensors")
    key = f"{kind}.eta{eta}.i{index}."
    t = data[key + "t"]
    level = vp(data["alphas_cumprod"], t)
    next_level = vp(data["alphas_cumprod"], (t - 20).clamp(min=0))
    make = Prediction.from_epsilon if kind == "epsilon" else Prediction.from_v
    x = data[key + "x_t"]
    step = ddim(x, make(x, data[key + "model_output"], level), level, next_level, eta)
    close(step.log_prob(data[key + "x_prev"]), data[key + "log_prob"], 1e-5)
    close(step.log_prob(data[key + "x_other"]), data[key + "log_prob_other"], 1e-5)


@pytest.mark.parametrize("index", [0, 1, 5, 8])
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_flow_sde_reproduces_flow_grpo(eta, index):
    data = golden("flow_sde_logprob.safetensors")
    levels, key = flow(data["sigmas"]), f"flow_sde.a{eta}.i{index}."
    x, level, next_level = data[key + "x_t"], levels[index], levels[index + 1]
    pred = Prediction.from_flow(x, data[key + "velocity"], level)
    step = flow_sde(x, pred, level, next_level, eta)
    close(step.mean, data[key + "mean"], 1e-5)
    close(
        step.std.flatten() / (level.sigma - next_level.sigma).sqrt(),
        data[key + "std_dev_t"][:1],
        1e-5,
    )
    close(step.log_prob(data[key + "x_next"]), data[key + "log_prob"], 1e-5)
    close(step.log_prob(data[key + "x_other"]), data[key + "log_prob_other"], 1e-5)


@pytest.mark.parametrize("index", [1, 5])
@pytest.mark.parametrize("name", ["Flow-SDE", "Dance-SDE", "CPS"])
def test_flow_kernels_reproduce_the_references(name, index):
    data = golden("flow_dynamics.safetensors")
    levels, key = flow(data["sigmas"]), f"{name}.i{index}."
    x, level, next_level = data[key + "x_t"], levels[index], levels[index + 1]
    kernel = KERNELS[name.lower().replace("-", "_")]
    pred = Prediction.from_flow(x, data[key + "velocity"], level)
    step = kernel(x, pred, level, next_level, 0.3)
    close(step.mean, data[key + "mean"], 1e-5)
    log_prob = step.log_prob(data[key + "x_next"])
    if name == "CPS":
        s = step.std.flatten()
        close(s, data[key + "std_dev_t"][:1], 1e-5)
        # The published log-prob is ours without the constants, times 2 s^2.
        log_prob = 2 * s.square() * (log_prob + s.log() + 0.5 * math.log(2 * math.pi))
    close(log_prob, data[key + "log_prob"], 1e-5)


@pytest.mark.parametrize("index", [1, 5])
def test_guard_and_ppo_ratios(index):
    data = golden("flow_dynamics.safetensors")
    levels, key = flow(data["sigmas"]), f"Flow-SDE.i{index}."
    x, x_next = data[key + "x_t"], data[key + "x_next"]
    level, next_level = levels[index], levels[index + 1]
    old, new = (
        flow_sde(x, Prediction.from_flow(x, data[key + name], level), level, next_level, 0.3)
        for name in ("velocity", "guard.velocity_new")
    )
    close(new.log_prob(x_next), data[key + "guard.log_prob_new"], 1e-5)
    difference = new.log_prob(x_next) - old.log_prob(x_next)
    close(difference.exp(), data[key + "ppo.ratio"], 1e-5)
    z, delta = (x_next - old.mean) / old.std, new.mean - old.mean
    guard = (z * delta).flatten(1).mean(1)
    s, bias = old.std.flatten(), delta.square().flatten(1).mean(1)
    close(guard, s * (difference + bias / (2 * s.square())), 1e-6)
    close(guard.exp(), data[key + "guard.ratio"], 1e-5)


@pytest.mark.parametrize(("make", "levels"), CONSTRUCTORS)
def test_predictions_are_consistent_with_x(make, levels):
    x, out = randn(len(levels) - 2, *LATENT), randn(len(levels) - 2, *LATENT, seed=1)
    level = levels[1:-1]  # a batch of levels; without those where epsilon says nothing
    pred = make(x, out, level)
    alpha, sigma = level.alpha.view(-1, 1, 1, 1), level.sigma.view(-1, 1, 1, 1)
    close(alpha * pred.x0 + sigma * pred.eps, x)
    close(pred.native, out)
    expected = {
        "from_epsilon": pred.eps,
        "from_v": alpha * pred.eps - sigma * pred.x0,
        "from_flow": pred.eps - pred.x0,
    }
    close(expected[make.__name__], out)


@pytest.mark.parametrize("make", [Prediction.from_epsilon, Prediction.from_v, Prediction.from_flow])
def test_half_precision_is_cast_up_first(make):
    level = flow(torch.linspace(1, 0, 5))[2]
    x, out = (randn(2, *LATENT, seed=i).bfloat16() for i in (0, 1))
    pred = make(x, out, level)
    step = flow_sde(x, pred, level, flow(torch.linspace(1, 0, 5))[3], 0.7)
    assert pred.x0.dtype == pred.native.dtype == step.mean.dtype == step.std.dtype == torch.float32
    torch.testing.assert_close(pred.x0, make(x.float(), out.float(), level).x0)


def test_log_prob_and_kl_are_those_of_torch():
    a = Gaussian(randn(3, *LATENT), torch.tensor([0.1, 0.5, 2.0]).double().view(3, 1, 1, 1))
    b = Gaussian(randn(3, *LATENT, seed=1), torch.tensor([0.3]).double().view(1, 1, 1, 1))
    x = randn(3, *LATENT, seed=2)
    for g in (a, b):
        expected = Normal(g.mean, g.std.expand_as(g.mean)).log_prob(x).flatten(1)
        close(g.log_prob(x), expected.mean(1))
        close(g.log_prob(x, "sum"), expected.sum(1), 1e-8)
    normals = [Normal(g.mean, g.std.expand_as(g.mean)) for g in (a, b)]
    close(a.kl(b), kl_divergence(*normals).flatten(1).mean(1))
    same = Gaussian(b.mean, a.std)
    delta = (a.mean - b.mean).square().flatten(1).mean(1)
    close(a.kl(same), delta / (2 * a.std.flatten().square()))
    assert not a.kl(a).any()
    close(a.sample(x), a.mean + a.std * x)


def test_deterministic_steps_have_no_log_prob():
    x, pred = state(FLOW[3])
    with pytest.raises(ValueError, match="deterministic"):
        ode(x, pred, FLOW[3], FLOW[4]).log_prob(x)
    with pytest.raises(ValueError, match="median"):
        Gaussian(x, torch.ones(1, 1, 1, 1)).log_prob(x, "median")  # pyright: ignore


def test_euler_score_form_and_constant_g():
    for i in range(1, 9):
        level, next_level = FLOW[i], FLOW[i + 1]
        x, pred = state(level, seed=i)
        dt, sigma = next_level.sigma - level.sigma, level.sigma
        close(ode(x, pred, level, next_level).mean, x + pred.native * dt)
        close(reverse_sde(x, pred, level, next_level, 0.0).mean, x + pred.native * dt)
        # The form of the papers, in x and u only.
        eta = 0.7
        g2 = eta**2 * sigma / (1 - sigma)
        drift = x * (1 + g2 * dt / (2 * sigma))
        expected = drift + pred.native * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
        step = flow_sde(x, pred, level, next_level, eta)
        close(step.mean, expected)
        close(step.std.flatten(), (g2 * -dt).sqrt().view(1))
        dance = dance_sde(x, pred, level, next_level, float(g2.sqrt()))
        close(dance.mean, step.mean)
        close(dance.std, step.std)


@pytest.mark.parametrize("levels", [VP, FLOW])
def test_ddim_std_is_the_ddpm_posterior(levels):
    """Bayes' rule for x' given x and x0, written with precisions, on any Gaussian path."""
    level, next_level = levels[:-2], levels[1:-1]
    r = level.alpha / next_level.alpha
    forward_variance = level.sigma**2 - r**2 * next_level.sigma**2
    posterior = 1 / (1 / next_level.sigma**2 + r**2 / forward_variance)
    close(step_std("ddim", 1.0, levels)[:-1], posterior.sqrt())
    if levels is VP:
        a, next_a = level.alpha**2, next_level.alpha**2
        close((1 - next_a) / (1 - a) * (1 - a / next_a), posterior)


def test_stochastic_kernels_keep_the_noise_coefficient():
    for name in ("ddim", "cps"):
        for levels in (VP, FLOW):
            for i in range(1, len(levels) - 1):
                x, pred = state(levels[i], seed=i)
                step = KERNELS[name](x, pred, levels[i], levels[i + 1], 0.6)
                kept = step.mean - levels.alpha[i + 1] * pred.x0
                total = (kept / pred.eps).square() + step.std.square()
                close(total, levels.sigma[i + 1].square().expand_as(total), 1e-8)


@pytest.mark.parametrize("levels", [VP, FLOW])
@pytest.mark.parametrize("name", ["ddim", "cps"])
def test_eta_zero_is_the_deterministic_step(name, levels):
    for i in range(1, len(levels) - 1):
        x, pred = state(levels[i], seed=i)
        step = KERNELS[name](x, pred, levels[i], levels[i + 1], 0.0)
        assert not step.std.any()
        torch.testing.assert_close(step.mean, ode(x, pred, levels[i], levels[i + 1]).mean)
        torch.testing.assert_close(step.mean, renoise(x, pred, levels[i], levels[i + 1], 0.0).mean)


@pytest.mark.parametrize("name", KERNELS)
def test_batched_levels_equal_a_loop_and_gradient_flows(name):
    index = torch.tensor([1, 4, 8])
    level, next_level = FLOW[index], FLOW[index + 1]
    x, out = randn(3, *LATENT), randn(3, *LATENT, seed=1).requires_grad_()
    step = KERNELS[name](x, Prediction.from_flow(x, out, level), level, next_level, 0.5)
    assert step.std.shape in {(3, 1, 1, 1), (1, 1, 1, 1)}
    for j, i in enumerate(index.tolist()):
        one = x[j : j + 1]
        pred = Prediction.from_flow(one, out[j : j + 1], FLOW[i])
        single = KERNELS[name](one, pred, FLOW[i], FLOW[i + 1], 0.5)
        close(step.mean[j], single.mean[0])
        close(step.std.expand(3, 1, 1, 1)[j], single.std[0])
    score = step.mean.sum() if name == "ode" else step.log_prob(x).sum()
    (gradient,) = torch.autograd.grad(score, out)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


def test_ratio_is_exactly_one_for_the_same_network():
    level, next_level = FLOW[4], FLOW[5]
    x, pred = state(level)
    x, pred = x.float(), Prediction(pred.x0.float(), pred.eps.float(), pred.native.float())
    steps = [flow_sde(x, pred, level, next_level, 0.7) for _ in range(2)]
    stored = steps[0].sample(randn(3, *LATENT, dtype=torch.float32)).bfloat16().float()
    assert torch.equal(steps[0].log_prob(stored), steps[1].log_prob(stored))


def test_finite_from_pure_noise_to_data():
    """Zero terminal SNR (alpha = 0) at the first step and sigma' = 0 at the last."""
    alpha = torch.linspace(0, 1, 6)
    zero_snr = Levels(1000 * (1 - alpha), alpha, (1 - alpha.square()).sqrt())
    for levels, make in ((zero_snr, Prediction.from_v), (flow(1 - alpha), Prediction.from_flow)):
        names = ("ddim", "cps") if levels is zero_snr else KERNELS
        for name in names:
            x = randn(2, *LATENT, dtype=torch.float32)
            for i in range(5):
                pred = make(x, randn(2, *LATENT, seed=i, dtype=torch.float32), levels[i])
                step = KERNELS[name](x, pred, levels[i], levels[i + 1], 1.0)
                x = step.sample(randn(2, *LATENT, seed=i + 9, dtype=torch.float32))
                assert x.isfinite().all()
        assert step_std("ddim", 0.5, levels)[0] == 0.5 * levels.sigma[1]
        assert step_std("ddim", 1.0, levels)[-1] == 0
        assert step_std("cps", 1.0, levels)[-1] == 0


def test_step_std_matches_the_published_table():
    sigmas = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780])
    levels = flow(torch.cat([sigmas, torch.tensor([0.0089, 0])]))
    sde = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006]
    close(step_std("flow_sde", 0.7, levels), torch.tensor(sde), 1e-3)
    cps = [0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.008, 0]
    close(step_std("cps", 0.8, levels), torch.tensor(cps), 1e-3)
    assert not step_std("ode", 0.7, levels).any()
    assert step_std("dance_sde", 0.3, levels).shape == (10,)


def test_errors():
    for name, eta in (("ddim", 1.5), ("cps", -0.1), ("flow_sde", -1.0), ("dance_sde", -1.0)):
        with pytest.raises(ValueError, match=f"{name} needs eta"):
            step_std(name, eta, FLOW)
    with pytest.raises(ValueError, match="ddim, ode"):
        step_std("euler", 0.5, FLOW)
    with pytest.raises(ValueError, match="needs a flow model"):
        step_std("flow_sde", 0.5, VP)
    with pytest.raises(ValueError, match="share a shape"):
        Levels(torch.ones(3), torch.ones(2), torch.ones(3))


def test_levels_index_like_tensors():
    assert len(FLOW) == 11
    assert FLOW[3].sigma.shape == ()
    assert len(FLOW[2:5]) == 3
    picked = FLOW.to("cpu")[torch.tensor([5, 0])]
    assert torch.equal(picked.t, FLOW.t[[5, 0]])
    assert torch.equal(picked.alpha, FLOW.alpha[[5, 0]])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("spacing", "kind"),  # zero terminal SNR (trailing) has no noise prediction
    [("leading", "epsilon"), ("leading", "v_prediction"), ("trailing", "v_prediction")],
)
def test_chain_equals_diffusers(spacing, kind, eta):
    """A whole schedule with a fixed network, against diffusers' own scheduler."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1 if spacing == "leading" else 0,
        prediction_type=kind,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=spacing == "trailing",
    )
    scheduler.set_timesteps(20)
    # float64: at eta 1 the scheduler takes sqrt(1 - a' - s^2), which at alpha 0 is pure rounding.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    table = torch.cat([scheduler.final_alpha_cumprod.view(1), scheduler.alphas_cumprod])
    t = scheduler.timesteps
    # Index 0 of the table stands for every t < 0.
    levels = vp(table, torch.cat([t, t[-1:] - 50]).clamp(min=-1) + 1)
    assert (levels.alpha[0] == 0) == (spacing == "trailing")
    weight = randn(4, 4, seed=3) / 2

    def network(x, t):
        return torch.einsum("ij,njhw->nihw", weight, x).tanh() * (1 + t / 1000)

    make = Prediction.from_epsilon if kind == "epsilon" else Prediction.from_v
    ours = theirs = randn(2, *LATENT)
    for i, step in enumerate(t.tolist()):
        noise = randn(2, *LATENT, seed=100 + i)
        theirs = scheduler.step(
            network(theirs, step), step, theirs, eta=eta, variance_noise=noise, return_dict=False
        )[0]
        level, next_level = levels[i], levels[i + 1]
        gaussian = ddim(ours, make(ours, network(ours, step), level), level, next_level, eta)
        ours = gaussian.sample(noise)
        close(ours, theirs, 1e-6)
