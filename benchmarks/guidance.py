"""What guidance that leaves out calls costs in pictures: calls, distance, rewards, judge.

For every schedule, against guidance at all steps from the same noise: denoiser calls of a picture,
|Δpicture| (mean absolute difference of pixels in [0, 1]), the rank correlation of the CLIP rewards
of both sets, and the change of the EmojiWorld judge with its standard error over prompts.

    python benchmarks/guidance.py       # 111 held-out prompts, w = 3, 20 steps: 12 minutes

Writes benchmarks/results/guidance.json and .md; resumes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewards
from diffalign import policies
from diffalign.policies.guidance import Guidance
from diffalign.sampling.rollout import Sampling, rollout

RESULTS = Path(__file__).parent / "results"
STEPS, W, BATCH = 20, 3.0, 16
SCHEDULES: dict[str, dict[str, Any]] = {
    "all steps": {},
    "until 0.75": {"until": 0.75},
    "until 0.5": {"until": 0.5},
    "interval (0.28, 5.42]": {"low": 0.28, "high": 5.42},
    "reuse 2": {"reuse": 2},
    "reuse 4": {"reuse": 4},
    "adaptive 0.08": {"adaptive": 0.08},
    "adaptive 0.15": {"adaptive": 0.15},
    "star": {"star": True},
    "none": {"low": -1.0, "high": 0.0},
}
SCORES = {
    "clip": {"type": "clip", "model": "assets/emoji-clip"},
    "judge": {"type": "clip", "model": "assets/emoji-judge"},
}


def main() -> None:
    texts = Path("assets/emoji-world/prompts/held_out.txt").read_text().splitlines()
    file = RESULTS / "guidance.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    score = rewards.build(SCORES)
    for model in ("emoji-sd", "emoji-sd3"):
        policy = policies.load(f"assets/{model}")
        done, full = found.setdefault(model, {}), None
        for name, options in SCHEDULES.items():
            if name in done or (name == "star" and model == "emoji-sd"):
                continue
            full = full or drawn(policy, score, texts, {})
            images, parts, calls = drawn(policy, score, texts, options) if options else full
            change = parts["judge"] - full[1]["judge"]
            done[name] = {
                "calls": calls,
                "picture": (images - full[0]).abs().mean().item(),
                "rank": correlation(parts["clip"], full[1]["clip"]),
                "clip": (parts["clip"] - full[1]["clip"]).mean().item(),
                "judge": change.mean().item(),
                "error": (change.std() / len(change) ** 0.5).item(),
                "judge_full": full[1]["judge"].mean().item(),
            }
            print(model, name, done[name], flush=True)
            file.write_text(json.dumps(found, indent=1))
    (RESULTS / "guidance.md").write_text(table(found))


@torch.no_grad()
def drawn(
    policy: policies.Policy, score: Any, texts: list[str], options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Pictures of all texts, their scores, and the calls of a picture."""
    options, levels = dict(options), policy.levels(STEPS)
    until = options.pop("until", 1.0)
    how = Sampling(levels, "ode", 0.0, Guidance(W, **options).until(until, levels))
    before, images = policy.calls, []
    for i in range(0, len(texts), BATCH):
        part = texts[i : i + BATCH]
        seeds = range(i, i + len(part))
        paths = rollout(policy, policy.encode(part), how, seeds, BATCH, store=False)
        images.append(policy.decode(paths.final))
    pictures = torch.cat(images)
    parts = score.score(pictures, texts, [{} for _ in texts])[1]
    return pictures, parts, (policy.calls - before) / len(texts)


def correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([v.argsort().argsort().float() for v in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def table(found: dict[str, Any]) -> str:
    lines = [
        "| model | guided | calls | \\|Δpicture\\| | rank correlation of CLIP | ΔCLIP | Δjudge |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, schedules in found.items():
        for name, f in schedules.items():
            lines.append(
                f"| {model} | {name} | {f['calls']:.1f} | {f['picture']:.4f} | {f['rank']:.3f} "
                f"| {f['clip']:+.4f} | {f['judge']:+.4f} ± {f['error']:.4f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
