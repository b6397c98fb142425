"""What is special to the families whose texts a language model encodes; what every family must do
is in test_policies."""

import inspect
import tempfile
from collections import namedtuple

import pytest
import torch
from conftest import load, peak_saved, perturb, side_of
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from families_qwen import QWEN_BUILDERS, ask, build_qwen21

from diffalign import policies
from diffalign.config import ModelConfig
from diffalign.policies import Cond, flux2, texts
from diffalign.policies.flow import flow_levels
from diffalign.sampling.rollout import Sampling, rollout

PROMPTS = ["a cat", "a red dog beside a very large yellow house, in the rain, at night"]
EULER = "FlowMatchEulerDiscreteScheduler"
Room = namedtuple("Room", ["free"])
RAGGED = ["z-image", "qwen", "qwen21"]


@pytest.fixture(params=sorted(QWEN_BUILDERS))
def kind(request) -> str:
    return request.param


def drawn(policy, prompts, seeds, guidance, steps=4, kernel="ode"):
    sampling = Sampling(policy.levels(steps), kernel, 0.7, guidance)
    return rollout(policy, policy.encode(prompts), sampling, seeds, 2)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_a_picture_does_not_depend_on_the_texts_beside_it(pipelines, kind, guidance):
    policy = load(pipelines[kind])
    together = drawn(policy, PROMPTS, [1, 2], guidance).final
    for i in range(2):
        alone = drawn(policy, PROMPTS[i : i + 1], [1 + i], guidance).final
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", RAGGED)
def test_texts_keep_their_length(pipelines, kind):
    policy = load(pipelines[kind])
    cond = policy.encode(PROMPTS)
    short, long = cond.positive["length"].tolist()
    assert short < long == cond.positive["prompt"].shape[1]
    assert not cond.positive["prompt"][0, short:].any()
    assert policy._prompts["a cat"]["prompt"].shape[0] == short
    assert cond.negative["prompt"].shape[1] < short + 1  # "" or " "


def test_the_scale_of_a_model_card_means_the_same(pipelines, kind):
    """Each pipeline at its own default guidance."""
    policy, pipe = load(pipelines[kind]), policies.pipeline(pipelines[kind])
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    name = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    scale, side = known[name].default, side_of(pipelines[kind])
    paths = drawn(policy, PROMPTS, [1, 2], scale)
    how = {"num_inference_steps": 4, "height": side, "width": side}
    expected = ask(pipe, PROMPTS, paths.states[:, 0], scale, **how)
    assert scale == {"z-image": 5.0, "qwen21": 1.0}.get(kind, 4.0)
    assert (policy.decode(paths.final) - expected).abs().max() < 2e-3


def test_guidance_is_off_where_the_pipeline_has_it_off(pipelines):
    """Z-Image's scale 1 is guided, and 0 is not; the others' 1 is not."""
    found = {}
    for kind in QWEN_BUILDERS:
        family = policies.family(pipelines[kind])
        cfg = policies.guided_by(pipelines[kind]) == "cfg"
        levels = policies.peek(pipelines[kind], 4, side_of(pipelines[kind]))[0]
        found[kind] = [
            Sampling(levels, "ode", 0.0, w).branches(family) if cfg else None
            for w in (0.0, 1.0, 2.0)
        ]
    once, twice = [1] * 4, [2] * 4
    assert found.pop("z-image") == [once, twice, twice]
    assert found.pop("klein") == found.pop("flux2-dev") == [None] * 3
    assert list(found.values()) == [[once, once, twice]] * 3


def test_stored_log_probs_hold_in_any_micro_batch(pipelines, kind):
    """The ratio of a stored step is 1 whatever lies beside it."""
    policy = load(pipelines[kind])
    policy.add_lora(2)
    perturb(policy)
    paths = drawn(policy, PROMPTS * 2, [1, 2, 3, 4], 3.0, kernel="flow_sde")
    sampling = Sampling(policy.levels(4), "flow_sde", 0.7, 3.0)
    cond = policy.encode(PROMPTS * 2)
    for rows in ([0], [1], [0, 1, 2], [3, 2]):
        index = torch.tensor(rows)
        step = torch.ones(len(rows), dtype=torch.long)
        seen = sampling.transition(policy, paths.states[index, 1], step, cond[index])
        again = seen.log_prob(paths.states[index, 2])
        assert (again - paths.log_prob[index, 1]).exp().sub(1).abs().max() < 1e-5


def test_qwen_keeps_the_norm_of_every_token(pipelines):
    policy = load(pipelines["qwen"])
    x, level, cond = (
        torch.randn(2, *policy.latent_shape),
        policy.levels(4)[1],
        policy.encode(PROMPTS),
    )
    c, guided = (policy.predict(x, level, cond, w).native for w in (0.0, 4.0))
    u = policy.predict(x, level, Cond(cond.negative, cond.negative), 0.0).native
    n, channels, height, width = x.shape
    blocks = [
        v.view(n, channels, height // 2, 2, width // 2, 2).transpose(2, 3).square().sum((1, 2, 5))
        for v in (c, guided)
    ]
    torch.testing.assert_close(*blocks)
    plain = u + 4 * (c - u)
    direction = torch.nn.functional.cosine_similarity(guided.flatten(1), plain.flatten(1))
    assert (direction > 0.5).all()


@pytest.mark.parametrize("steps", [4, 10, 50, 200])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 4300, 4301, 8192])
def test_the_shift_of_flux2_is_that_of_its_pipelines(tokens, steps):
    assert flux2.empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_schedules_are_those_the_pipelines_set(pipelines, kind):
    folder, side = pipelines[kind], side_of(pipelines[kind])
    pipe = policies.pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    policy = load(folder)
    ask(pipe, PROMPTS[:1], torch.randn(1, *policy.latent_shape), 0.0,
        num_inference_steps=6, height=side, width=side)  # fmt: skip
    assert torch.equal(policy.levels(6).sigma, pipe.scheduler.sigmas)


def test_the_last_level_of_qwen_still_trains(pipelines):
    """Its schedule ends at 0.02 before 0, and only the last step is the ODE's."""
    policy = load(pipelines["qwen"])
    levels = policy.levels(10)
    assert levels.sigma[-2].item() == pytest.approx(0.02, abs=1e-6)
    assert Sampling(levels, "flow_sde", 0.7, 1.0).stochastic == [True] * 9 + [False]


def test_the_own_levels_of_qwen_image_21(tmp_path):
    own = [1.0, 0.7, 0.4]
    build_qwen21(tmp_path / "m", sigmas=own)
    shape = (4, 2, 2)
    config = {"_class_name": EULER, "use_dynamic_shifting": True, "shift_terminal": 0.02}
    found = policies.peek(str(tmp_path / "m"), 3, 32)[0].sigma
    torch.testing.assert_close(found, flow_levels(config, 3, shape, own, patch=1).sigma)
    evenly = policies.peek(str(tmp_path / "m"), 4, 32)[0].sigma
    torch.testing.assert_close(evenly, flow_levels(config, 4, shape, True, patch=1).sigma)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=own, mu=0.5 + 0.65 * (4 - 256) / 3840)
    torch.testing.assert_close(found, scheduler.sigmas)


@pytest.mark.parametrize("kind", ["qwen", "klein-base"])
def test_decoding_is_recomputed_where_the_vae_cannot_do_so(pipelines, kind):
    folder = pipelines[kind]
    made = {}
    for how in (False, True):
        model = ModelConfig(name=folder, resolution=16, gradient_checkpointing=how, decode_batch=1)
        policy = policies.prepared(model, 0)
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        decode = lambda p=policy, x=x: p.decode(x, differentiable=True)  # noqa: E731
        kept = peak_saved(decode)
        decode().square().sum().backward()
        made[how] = kept, x.grad
    torch.testing.assert_close(made[True][1], made[False][1], atol=1e-5, rtol=1e-4)
    assert made[True][0] < made[False][0]


def test_default_targets(pipelines, kind):
    """Every family reaches its attention, and none what its docstring leaves out."""
    policy = load(pipelines[kind])
    policy.add_lora(2)
    found = {n.split(".lora_A")[0] for n, _ in policy.network.named_parameters() if "lora_A" in n}
    assert found
    for name in found:
        assert "refiner" not in name
        assert "modulation" not in name
    if kind.startswith("klein"):
        assert {n for n in found if n.startswith("single")} == {
            f"single_transformer_blocks.0.attn.{n}" for n in ("to_qkv_mlp_proj", "to_out")
        }
    policy.add_copy("old")  # by the same expression
    before = policy.trainable_parameters()
    assert [a.shape for a in before] == [b.shape for b in policy.weights("old")]


def test_bad_targets_are_named(pipelines):
    policy = load(pipelines["z-image"])
    with pytest.raises(ValueError, match=r"'layers\[': is no regular|is no regular expression"):
        policy.add_lora(2, targets="layers[")
    with pytest.raises(ValueError, match="matches no layer of ZImage"):
        policy.add_lora(2, targets=r"layers\.\d+\.nothing")


@pytest.mark.parametrize("kind", ["sd-v", "flux-dev", "qwen"])
def test_many_texts_lie_in_files(pipelines, kind, monkeypatch, tmp_path):
    many = [f"a {w} {i}" for i in range(100) for w in ("cat", "very large dog")]
    held, filed = load(pipelines[kind]), load(pipelines[kind])
    held.encode_all(many)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(texts, "HELD", 50_000)
    filed.encode_all(many)
    assert not list(tmp_path.iterdir())  # only open
    assert {type(v) for v in filed._prompts.values()} == {texts.Saved}
    assert len({id(v.file) for v in filed._prompts.values()}) > 1
    filed.free_text_encoders()
    chosen = [many[i] for i in (150, 3, 3, 77)]
    ours, theirs = filed.encode(chosen), held.encode(chosen)
    for a, b in ((ours.positive, theirs.positive), (ours.negative, theirs.negative)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_texts_that_do_not_fit_the_disk_are_refused_early(pipelines, monkeypatch, tmp_path):
    policy, written = load(pipelines["sd-v"]), []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(texts, "HELD", 50_000)
    monkeypatch.setattr(
        texts.shutil, "disk_usage", lambda path: written.append(path) or Room(2**20)
    )
    said = r"of 1001 texts take 0\.0 GiB, and .* has 0\.0; let TMPDIR"
    with pytest.raises(ValueError, match=said):
        policy.encode_all([f"a cat {i}" for i in range(1000)])
    assert len(written) == 1
    assert not list(tmp_path.iterdir())
