"""Advantages: how much better an image did than its peers.

Statistics are taken in float64 on the CPU (integer rewards included) and returned as float32.
A NaN reward means *missing*: it is left out of every statistic and its advantage is 0. Deciding
whether a NaN may be missing or must stop the run is the caller's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import AdvantageConfig


def _as_rewards(rewards: Tensor | Sequence[float], count: int, name: str) -> Tensor:
    rewards = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    if rewards.ndim != 1 or len(rewards) != count:
        raise ValueError(f"rewards {tuple(rewards.shape)} and {name} ({count},) must match")
    if rewards.isinf().any():
        raise ValueError(f"rewards has {int(rewards.isinf().sum())} infinite values")
    return rewards


def _moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std, from the minimum up: equal rewards give exactly (r, 0)."""
    low = rewards.min()
    return low + (rewards - low).mean(), (rewards - low).std(correction=0)


def _finish(advantages: Tensor, clip: float | None) -> Tensor:
    advantages = advantages.nan_to_num(nan=0.0)
    return (advantages if clip is None else advantages.clamp(-clip, clip)).float()


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    std: Literal["group", "global"] = "group",
    eps: float = 1e-4,
    clip: float | None = None,
) -> Tensor:
    """Rewards relative to their group, the images of one prompt.

        A_j = (r_j - mean_g) / (std + eps),  then clamped to [-clip, clip] if clip is given

    rewards (n,), any real dtype; group_ids (n,) integers, in any order. Returns (n,) float32, CPU.
    `std="group"`: population std of the group; `"global"`: of all rewards given, so pass the whole
    epoch's. Equal rewards in a group give exactly 0, and so does NaN (missing).

    Flow-GRPO, 2505.05470. DanceGRPO and MixGRPO use the unbiased std and eps = 1e-8; we do not
    offer that: it is this times sqrt((G-1)/G) up to eps.

    Raises ValueError if the lengths differ, for infinite rewards and for an unknown std.
    """
    if std not in ("group", "global"):
        raise ValueError(f"std must be 'group' or 'global', got {std!r}")
    rewards = _as_rewards(rewards, len(group_ids), "group_ids")
    group_ids, valid = group_ids.cpu(), ~rewards.isnan()
    advantages = torch.full_like(rewards, torch.nan)
    epoch_std = _moments(rewards[valid])[1] if std == "global" and valid.any() else None
    for group in group_ids[valid].unique():
        members = (group_ids == group) & valid
        mean, group_std = _moments(rewards[members])
        spread = group_std if epoch_std is None else epoch_std
        advantages[members] = (rewards[members] - mean) / (spread + eps)
    return _finish(advantages, clip)


def combined_advantages(
    total: Tensor,
    parts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_ids: Tensor,
    config: AdvantageConfig,
) -> Tensor:
    """Group advantages of several rewards, (n,) float32.

    config.combine: "sum" compares the weighted sum `total`, so that rewards of larger spread count
    more; "normalized" is the weighted mean of each part's own advantages (MixGRPO, 2507.21802);
    "gdpo" divides that by its standard deviation over the epoch (GDPO, 2601.05242), and always has
    the group's std in it, which config.std chooses for the other two. The weights of a mean are
    those of the rewards that score the sample: a missing one does not dilute the others. Clipped to
    config.clip last. Parts of weight 0 are monitors. Raises as `group_advantages`.
    """
    std: Any = "group" if config.combine == "gdpo" else config.std
    used = {k: w for k, w in weights.items() if w}
    if config.combine == "sum" or len(used) < 2:
        return group_advantages(total, group_ids, std, clip=config.clip)
    scale, advantages = torch.zeros(2, len(total), dtype=torch.float64)
    for name, weight in used.items():
        advantages += weight * group_advantages(parts[name], group_ids, std).double()
        scale += abs(weight) * ~parts[name].cpu().isnan()
    advantages /= scale  # NaN where no reward scores the sample
    scored = scale > 0
    if config.combine == "gdpo" and scored.any():
        advantages /= advantages[scored].std(correction=0) + 1e-4
    return _finish(advantages, config.clip)


def zero_variance_share(rewards: Tensor, group_ids: Tensor) -> float:
    """Share of groups that teach nothing because all their rewards are equal, in [0, 1].

    rewards (n,), group_ids (n,) integers. Missing (NaN) rewards are left out; a group with fewer
    than two others teaches nothing either. 0 if there are no groups. Raises as `group_advantages`.
    """
    rewards = _as_rewards(rewards, len(group_ids), "group_ids")
    group_ids = group_ids.cpu()
    groups = group_ids.unique()
    distinct = [rewards[(group_ids == g) & ~rewards.isnan()].unique().numel() for g in groups]
    return sum(count < 2 for count in distinct) / max(len(distinct), 1)


class PromptTracker:
    """Rewards relative to the recent ones of the same prompt, kept across epochs.

        A = (r - mean) / (std + 1e-6)

    over the last `buffer_size` rewards of the prompt, the new ones included, or over the whole
    batch while the prompt has fewer than `min_count`. Population std. DDPO, 2305.13301, whose code
    truncates the advantages of integer rewards to integers; here they are float64 throughout.

    Raises ValueError unless 1 <= min_count <= buffer_size (else no prompt would ever be tracked).
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"needs 1 <= min_count <= buffer_size, got min_count {min_count} "
                f"and buffer_size {buffer_size}"
            )
        self.buffer_size, self.min_count = buffer_size, min_count
        self._history: dict[int | str, deque[float]] = {}

    def update(
        self, keys: Sequence[int | str] | Tensor, rewards: Tensor, clip: float | None = None
    ) -> Tensor:
        """Record rewards (n,) of the prompts `keys` (n,) and return advantages (n,), float32, CPU.

        Pass all processes' rewards: the fallback and the buffers are about the whole batch. NaN
        (missing) is not recorded and gets 0. Raises ValueError if the lengths differ or for
        infinite rewards; nothing is recorded then.
        """
        keys = keys.tolist() if isinstance(keys, Tensor) else list(keys)
        rewards = _as_rewards(rewards, len(keys), "keys")
        advantages = torch.full_like(rewards, torch.nan)
        valid = ~rewards.isnan()
        for key in dict.fromkeys(keys):
            members = torch.tensor([k == key for k in keys]) & valid
            if not members.any():
                continue
            history = self._history.setdefault(key, deque(maxlen=self.buffer_size))
            history.extend(rewards[members].tolist())
            tracked = len(history) >= self.min_count
            pool = torch.tensor(history, dtype=torch.float64) if tracked else rewards[valid]
            mean, std = _moments(pool)
            advantages[members] = (rewards[members] - mean) / (std + 1e-6)
        return _finish(advantages, clip)

    def state_dict(self) -> dict[str, Any]:
        """`{"history": [[key, [reward, ...]], ...]}`: pairs, since JSON keys are strings."""
        return {"history": [[key, list(values)] for key, values in self._history.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the history; a smaller buffer_size than the saved one keeps the newest."""
        self._history = {k: deque(v, maxlen=self.buffer_size) for k, v in state["history"]}
