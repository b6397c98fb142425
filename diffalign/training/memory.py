"""The memory that a run needs, from the configs of its model alone: nothing is read or computed.

The denoiser and the VAE are built and called with fake tensors, which have a shape and a dtype and
no numbers; `Peak` adds up what is alive. What a process holds beside its tensors (the interpreter,
libraries, a GPU's context: some hundred MB) is left out, and so are rewards and judges.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import policies
from ..algorithms.base import Matcher, Needs
from ..config import ModelConfig
from ..dynamics import Levels
from ..policies import Cond, Policy
from ..policies.configs import read_config
from .engine import asked_to_divide

if TYPE_CHECKING:
    from .plan import Plan

MIB = 2**20


class Peak(TorchDispatchMode):
    """The bytes of all tensors that were made inside and are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._known.pop(key, 0)


@dataclass(frozen=True)
class Need:
    """Bytes of a process on one device, by what holds them; a phase has what is always there and
    its own. early: the sum of what is there while texts are encoded."""

    always: dict[str, int]
    phases: dict[str, dict[str, int]]
    early: int

    def total(self, phase: str) -> int:
        held = self.early if phase == "encoding" else sum(self.always.values())
        return held + sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(self.total(phase) for phase in self.phases)

    def describe(self) -> str:
        """Lines of `--dry-run`."""
        worst = max(self.phases, key=self.total)
        lines = [
            f"memory     {words(self.peak)} of tensors at most, in the {worst}; rewards, libraries "
            "and what the allocator cannot reuse left out"
        ]
        for name, parts in {"always": self.always, **self.phases}.items():
            held = ", ".join(f"{what} {words(size)}" for what, size in parts.items() if size)
            lines += [f"           {name}: {held}"] if held else []
        return "\n".join(lines)


def words(size: float) -> str:
    return f"{size / MIB:,.3g} MiB" if size < 1000 * MIB else f"{size / MIB / 1024:,.3g} GiB"


def need(plan: Plan, device: str) -> Need:
    """The memory of one process of a run. Raises ValueError for a model that cannot be built from
    its configs."""
    c, kind = plan.config, plan.algorithm.needs
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    policy, encoders = policies.skeleton(c.model, fake, device)
    sizes = [p.size for p in plan.train_prompts if p.size is not None]
    policy.resize(max(sizes, key=math.prod, default=None))
    made = _Made(policy, plan, policy.levels(2)[0])
    with fake:
        adapters = size(policy.trainable_parameters())
        frozen = size(policy.network.parameters()) - adapters
        copies = [*plan.algorithm.copies(), *(["ema"] if c.train.ema else [])]
        gathered = 0
        if asked_to_divide() and plan.processes > 1:
            adapters, gathered = -(-adapters // plan.processes), 2 * largest(policy.network)
        always = {
            "denoiser": frozen + (0 if c.model.lora_rank else adapters),
            "gathered blocks": gathered,
            "VAE": size(policy.vae.parameters()),
            "text encoders": 0 if c.model.free_text_encoders else encoders,
            "LoRA": adapters * bool(c.model.lora_rank),
            "copies": adapters * len(copies),
            # that the anchor of a wholly trained network is measured from
            "base model": adapters * bool(plan.algorithm.kl_weight and not c.model.lora_rank),
            "gradients and optimizer": adapters * (2 if c.train.optimizer == "adamw8bit" else 3),
            "last epoch's state": adapters * 3 if device == "cpu" else 0,
        }
        n = max(1, plan.samples // plan.processes)
        stored, cond = made.stored(n), made.cond(n)
        batch, rows = min(c.sampler.batch, n), min(c.train.micro_batch, n * made.per_sample)
        if kind is Needs.FINAL:  # whole samples
            rows = max(1, rows // made.per_sample) * made.per_sample
        decoded = min(c.model.decode_batch, batch)
        update = {"stored states": stored, "text": cond}
        learning = update | {"a part's gradient": adapters * bool(c.model.lora_rank)}
        phases: dict[str, dict[str, int]] = {}
        if c.model.free_text_encoders:
            phases["encoding"] = {"text encoders": encoders}
        if kind is Needs.GRADIENT:
            phases["update"] = learning | {
                "one micro-batch": max(
                    made.called(min(c.train.micro_batch, n), learn=True),
                    made.decoded(min(c.train.micro_batch, n), learn=True),
                )
            }
        else:
            phases["update"] = learning | {"one micro-batch": made.called(rows, learn=True)}
        merged = made.merged() if c.model.lora_rank else 0
        phases["rollout"] = update | {
            "merged LoRA": merged,
            "one batch": max(
                made.called(batch, learn=False), made.decoded(decoded, learn=False) - merged
            ),
        }
        if plan.eval_prompts:
            n = min(c.sampler.batch, len(plan.eval_prompts) * c.eval.images_per_prompt)
            if c.eval.resolution:
                policy.resize(c.eval.resolution)
            decoded = made.decoded(min(c.model.decode_batch, n), learn=False, tiny=False)
            scale = c.eval_guidance if max(plan.eval_branches) > 1 else 0.0
            called = made.called(n, learn=False, guided=scale)
            phases["evaluation"] = {
                "merged LoRA": merged,
                "one batch": max(called, decoded - merged),
            }
    # the denoiser is read before, and comes to the device after
    early = always["VAE"] + (always["denoiser"] if device == "cpu" else 0)
    return Need(always, phases, early)


def text_shapes(policy: Policy, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the embeddings of a prompt, by name, as the families' `embed` makes them."""
    base = policies.resolve(model.name).base

    def tokens(part: str, most: int) -> int:
        config = read_config(base, f"{part}/tokenizer_config.json")
        return min(most, int(config.get("model_max_length") or most))

    return policy.text_shapes(tokens)


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


@dataclass
class _Made:
    """What one call of each kind takes beside the weights, for a policy of fake tensors."""

    policy: Policy
    plan: Plan
    level: Levels

    @property
    def per_sample(self) -> int:
        """Rows that an epoch learns from of each sample, at most."""
        algorithm = self.plan.algorithm
        if algorithm.needs is Needs.FINAL:
            return cast(Matcher, algorithm).times
        return self.plan.config.sampler.steps

    def text(self, n: int) -> Cond:
        """Embeddings of n prompts."""
        shapes = text_shapes(self.policy, self.plan.config.model)
        made = {k: torch.zeros(n, *shape, device=self.policy.device) for k, shape in shapes.items()}
        one = {k: v[:1].expand(n, *v.shape[1:]) for k, v in made.items()}
        return Cond(made, one if self.policy.uses_cfg else {})

    def cond(self, n: int) -> int:
        return size(self.text(n).positive.values())

    def stored(self, n: int) -> int:
        """The states that are kept of n samples: of the stored steps, or the final one."""
        c, kind = self.plan.config, self.plan.algorithm.needs
        latent = 4 * n * torch.Size(self.policy.latent_shape).numel()
        if kind is Needs.FINAL:
            return 2 * latent  # the chunks, and all of them together
        steps = c.sampler.window or c.sampler.steps
        if kind is Needs.GRADIENT:
            return latent * (c.sampler.steps + 2) // c.train.updates_per_epoch
        means = steps * self.plan.algorithm.stores_means
        return latent * (steps + 2 + means)

    def called(self, rows: int, learn: bool, guided: float | None = None) -> int:
        """One call of the denoiser, with its backward pass where it learns; guided as rollouts are
        unless given."""
        if guided is None:
            guided = self.plan.config.sampler.guidance if max(self.plan.branches) > 1 else 0.0
        x = torch.zeros(rows, *self.policy.latent_shape, device=self.policy.device)
        cond = self.text(rows)

        def work() -> None:
            x.requires_grad_(learn and self.plan.algorithm.needs is Needs.GRADIENT)
            with torch.set_grad_enabled(learn):
                out = self.policy.predict(x, self.level, cond, guided).x0
                if learn:
                    out.square().mean().backward()

        taken = _peak(work)
        grads = size(self.policy.trainable_parameters()) if learn else 0
        self.policy.network.zero_grad()
        return taken + x.nbytes + size(cond.positive.values()) - grads

    def decoded(self, n: int, learn: bool, tiny: bool = True) -> int:
        """Decoding n latents, with the gradient to them where it learns."""
        z = torch.zeros(n, *self.policy.latent_shape, device=self.policy.device)

        def work() -> None:
            z.requires_grad_(learn)
            images = self.policy.decode(z, differentiable=learn, tiny=tiny)
            if learn:
                images.square().mean().backward()

        return _peak(work)

    def merged(self) -> int:
        """A second copy of the layers with a LoRA, where it is merged."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self.policy.network.dtype != torch.float32:
            return 0
        layers = [m for m in self.policy.network.modules() if isinstance(m, BaseTunerLayer)]
        return size(m.get_base_layer().weight for m in layers)  # type: ignore[union-attr]


def largest(network: Any) -> int:
    """Bytes of the largest block that FSDP2 gathers at once."""
    names = network._no_split_modules or []
    blocks = [m for m in network.modules() if type(m).__name__ in names]
    return max((size(block.parameters()) for block in blocks or [network]), default=0)


def _peak(work: Callable[[], None]) -> int:
    with Peak() as peak:
        work()
    return peak.peak
