"""What makes a call of the denoiser or the VAE cheaper, and how far it moves the results.

Each trick is timed against float32 in torch's own memory order and attention, in alternating calls
of one process: the median of the ratios of neighbours, with the least and the most. Beside it:
|Δlogp|, the largest change of the log-probability of a DDIM or SDE step, per dimension; |Δreward|,
the mean change of the CLIP reward of finished pictures, and of what it is a mean (n pictures); and
the seconds of the first call. Two models are never timed at once.

    OMP_NUM_THREADS=1 python benchmarks/calls.py            # 25 minutes on one core; resumes

Writes benchmarks/results/calls.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import rewards
from diffalign import policies
from diffalign.config import ModelConfig
from diffalign.policies import Policy
from diffalign.sampling.rollout import Sampling, Trajectories, rollout

RESULTS = Path(__file__).parent / "results"
MODELS = ("emoji-sd", "emoji-sd3", "emoji-flux")
CALLS: dict[str, dict[str, Any]] = {
    "channels_last": {},
    "math": {"attention": "math"},
    "compile": {"compile": True},
    "bfloat16, sdpa": {"dtype": "bfloat16", "attention": "sdpa"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, compile": {"dtype": "bfloat16", "compile": True},
    "merged LoRA": {},
}
DECODES: dict[str, dict[str, Any]] = {
    "VAE channels_last": {},
    "VAE bfloat16": {"vae_dtype": "bfloat16"},
}
REWARD = {"clip": {"model": "assets/emoji-clip"}}
W, ROWS, STEPS, PICTURES = 3.0, 8, 10, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args()
    file = RESULTS / "calls.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for model in args.models:
        for trick in (*CALLS, *DECODES):
            if trick not in found.setdefault(model, {}):
                measure = call if trick in CALLS else decode
                torch._dynamo.reset()
                found[model][trick] = measure(model, trick, args.rounds)
                print(model, trick, found[model][trick], flush=True)
                file.write_text(json.dumps(found, indent=1))
    (RESULTS / "calls.md").write_text(table(found))


def prepared(model: str, plain: bool = False, **options: Any) -> Policy:
    """A policy with a LoRA that changes what it says; plain: nothing is made cheaper."""
    kind = {"attention": "sdpa", **options} if plain else options
    policy = policies.prepared(ModelConfig(name=f"assets/{model}", lora_rank=4, **kind), 0)
    if plain:
        for part in (policy.network, policy.vae):
            part.to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    for weight in policy.trainable_parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return policy


def call(model: str, trick: str, rounds: int) -> dict[str, Any]:
    plain, cheap = prepared(model, plain=True), prepared(model, **CALLS[trick])
    inside = cheap.merged if "merged" in trick else nullcontext
    texts = (Path("assets/emoji-world/prompts/held_out.txt").read_text().splitlines())[:PICTURES]
    sampling = Sampling(plain.levels(STEPS), "ddim" if model == "emoji-sd" else "flow_sde", 0.7, W)
    with inside():
        first = time.perf_counter()
        forward(cheap, sampling, texts)
        first = time.perf_counter() - first
        found = {"first_s": first, "forward": ratio(plain, cheap, forward, sampling, texts, rounds)}
        moved = deviation(plain, cheap, sampling, texts)
    if inside is nullcontext:  # a merged LoRA takes no gradient
        found["gradient"] = ratio(plain, cheap, backward, sampling, texts, rounds)
    return found | moved


def forward(policy: Policy, sampling: Sampling, texts: list[str]) -> None:
    with torch.no_grad():
        backward(policy, sampling, texts, learn=False)


def backward(policy: Policy, sampling: Sampling, texts: list[str], learn: bool = True) -> None:
    """The call of an update, of ROWS samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, *policy.latent_shape, generator=generator)
    seen = policy.predict(x, sampling.levels[3], policy.encode(texts[:ROWS]), W)
    if learn:
        seen.native.square().mean().backward()


def ratio(
    plain: Policy,
    cheap: Policy,
    run: Callable[..., None],
    sampling: Sampling,
    texts: list[str],
    rounds: int,
) -> list[float]:
    """Median, least and most of plain's time over cheap's, and cheap's median time in seconds."""
    for policy in (plain, cheap, plain, cheap):
        run(policy, sampling, texts)
    ratios, seconds = [], []
    for _ in range(rounds):
        times = []
        for policy in (plain, cheap):
            start = time.perf_counter()
            run(policy, sampling, texts)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
        seconds.append(times[1])
    return [statistics.median(ratios), min(ratios), max(ratios), statistics.median(seconds)]


def drawn(policy: Policy, sampling: Sampling, texts: list[str]) -> Trajectories:
    return rollout(policy, policy.encode(texts), sampling, range(len(texts)), batch=16)


@torch.no_grad()
def deviation(
    plain: Policy, cheap: Policy, sampling: Sampling, texts: list[str]
) -> dict[str, float]:
    """The log-probabilities that `cheap` gives to the steps of `plain`, and its own pictures."""
    paths, other = drawn(plain, sampling, texts), drawn(cheap, sampling, texts)
    cond, largest = cheap.encode(texts), 0.0
    for i in range(STEPS):
        if sampling.stochastic[i]:
            step = sampling.transition(cheap, paths.states[:, i], i, cond)
            change = step.log_prob(paths.states[:, i + 1]) - paths.log_prob[:, i]
            largest = max(largest, change.abs().max().item())
    a, b = (plain.decode(p.final) for p in (paths, other))
    score = rewards.build(REWARD)
    before, after = (score.score(images, texts, [{} for _ in texts])[0] for images in (a, b))
    return {
        "logp": largest,
        "reward": (after - before).abs().mean().item(),
        "reward_mean": (after - before).mean().item(),
        "reward_std": before.std().item(),
        "picture": (a - b).abs().mean().item(),
    }


def decode(model: str, trick: str, rounds: int) -> dict[str, Any]:
    plain, cheap = prepared(model, plain=True), prepared(model, **DECODES[trick])
    texts = (Path("assets/emoji-world/prompts/held_out.txt").read_text().splitlines())[:PICTURES]
    sampling = Sampling(plain.levels(STEPS), "ode", 0.0, W)
    final = drawn(plain, sampling, texts).final

    def decoded(policy: Policy, sampling: Sampling, texts: list[str], learn: bool = False) -> None:
        latents = final[:ROWS].clone().requires_grad_(learn)
        images = policy.decode(latents, differentiable=learn)
        if learn:
            images.square().mean().backward()

    def learning(policy: Policy, sampling: Sampling, texts: list[str]) -> None:
        decoded(policy, sampling, texts, learn=True)

    found = {
        "forward": ratio(plain, cheap, decoded, sampling, texts, rounds),
        "gradient": ratio(plain, cheap, learning, sampling, texts, rounds),
    }
    a, b = plain.decode(final), cheap.decode(final)
    score = rewards.build(REWARD)
    before, after = (score.score(images, texts, [{} for _ in texts])[0] for images in (a, b))
    return found | {
        "reward": (after - before).abs().mean().item(),
        "reward_mean": (after - before).mean().item(),
        "reward_std": before.std().item(),
        "picture": (a - b).abs().mean().item(),
    }


def table(found: dict[str, Any]) -> str:
    rows = [
        "| model | trick | forward | with gradient | first call | \\|Δlogp\\| | \\|Δpicture\\| "
        "| \\|Δreward\\| (std of rewards) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, tricks in found.items():
        for name, f in tricks.items():
            times = [
                f"{f[k][0]:.2f} × [{f[k][1]:.2f}, {f[k][2]:.2f}]" if k in f else "–"
                for k in ("forward", "gradient")
            ]
            first = f"{f['first_s']:.1f} s" if "first_s" in f else "–"
            logp = f"{f['logp']:.1e}" if "logp" in f else "–"
            moved = f"{f['reward']:.1e} ({f['reward_std']:.2f})"
            cells = (model, name, *times, first, logp, f"{f['picture']:.1e}", moved)
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
