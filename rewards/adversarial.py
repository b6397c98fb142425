"""A discriminator that keeps learning to tell the policy's images from references."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Reward
from .files import check_images, image_files, load_image
from .similarity import Dino


class Adversarial(Reward):
    """How much an image looks like the references to a discriminator that is trained alongside.

        R(u) = (1 - p) h(c(u)) + p mean_j h(t_j(u))
        L_D = ½ E[relu(1 - h(c_real)) + relu(1 + h(c_fake))]
            + p ½ E[relu(1 - h(t_real)) + relu(1 + h(t_fake))]

    c and t_j are the class and patch tokens of a frozen DINO (``model``, as in ``Similarity``). h
    is a linear layer to ``hidden`` units, GELU, and a linear layer to a logit; p is ``patches``.
    Values are about -1 (generated) to 1 (real), but unbounded. ``references`` is an image file, a
    folder, or a list of these. After every epoch ``learn`` takes ``steps`` Adam steps (betas 0.5,
    0.999), each on ``batch`` references and as many of the policy's images. The run saves head and
    optimizer. Until the first ``learn`` h is random, and the values mean nothing.

    Differentiable, though the paper treats it as a black box for GRPO. The paper's code trains h on
    raw tokens but scores unit-length ones, and scores 64 random patches. Here training and scoring
    use the same tokens (DINO's last layer norm), and all patches count, so a score is not noisy.
    Source: Adv-GRPO (arXiv 2511.20256). Not reproduced: it needs DINOv2-L and its reference images.
    """

    name = "adversarial"
    differentiable = True
    learns = True

    def __init__(
        self,
        references: str | Sequence[str],
        model: str = "facebook/dinov2-large",
        patches: float = 0.3,
        hidden: int = 512,
        lr: float = 1e-4,
        steps: int = 10,
        batch: int = 16,
        seed: int = 0,
        dtype: str = "float32",
    ):
        self.check_options(references=references, patches=patches, steps=steps, batch=batch, lr=lr)
        super().__init__()
        self.files, self.patches = image_files(references), patches
        self.steps, self.batch, self.lr = steps, batch, lr
        self.tower = Dino(model, dtype)
        config = self.tower.model.config
        self.first_patch = 1 + getattr(config, "num_register_tokens", 0)
        with torch.random.fork_rng():  # the same head on every process
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(config.hidden_size, hidden), nn.GELU(), nn.Linear(hidden, 1)
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer: Any = None  # made in `learn`, where the device is known
        self.freeze()

    @classmethod
    def check_options(cls, references=(), patches=0.3, steps=10, batch=16, lr=1e-4, **options):
        check_images(references)
        if not 0 <= patches <= 1:
            raise ValueError(f"patches={patches!r} is not a share from 0 to 1")
        for name, value in (("steps", steps), ("batch", batch)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number from 1 up")
        if not lr > 0:
            raise ValueError(f"lr={lr!r} is not above 0")

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """h of the class token (n,) and of the patches (n, j)."""
        tokens = self.tower.tokens(images)
        found = self.head(tokens.to(next(self.head.parameters()).dtype)).squeeze(-1)
        return found[:, 0], found[:, self.first_patch :]

    def forward(self, images, prompts, metadata=None):
        whole, parts = self.logits(images)
        return (1 - self.patches) * whole + self.patches * parts.mean(1)

    def learn(self, images, prompts, metadata=None):
        """Returns the mean loss, and the share of images whose logit has the right sign."""
        device = next(self.head.parameters()).device
        self.head.requires_grad_(True)
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(self.head.parameters(), self.lr, (0.5, 0.999))
        losses, right = [], []
        with torch.enable_grad():
            for _ in range(self.steps):
                real = torch.cat([load_image(self.files[i]) for i in self._draw(len(self.files))])
                fake = images[self._draw(len(images))]
                loss = torch.zeros((), device=device)
                for batch, side in ((real, 1), (fake, -1)):
                    whole, parts = self.logits(batch.to(device).detach())
                    margins = (1 - side * whole).relu().mean() / 2
                    loss = loss + margins + self.patches * (1 - side * parts).relu().mean() / 2
                    right.append((side * whole > 0).float().mean().item())
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
        self.head.requires_grad_(False)
        return {"loss": sum(losses) / len(losses), "accuracy": sum(right) / len(right)}

    def _draw(self, n: int) -> Tensor:
        """Indices of ``batch`` random rows of n; rows repeat only if n is smaller."""
        rounds = -(-self.batch // n)
        order = [torch.randperm(n, generator=self.generator) for _ in range(rounds)]
        return torch.cat(order)[: self.batch]

    def memory(self):
        state = {
            "head": self.head.state_dict(),
            "optimiser": self.optimizer.state_dict() if self.optimizer else None,
            "generator": self.generator.get_state(),
        }
        return copy.deepcopy(state)

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.head.load_state_dict(memory["head"])
        self.generator.set_state(memory["generator"])
        self.optimizer = None
        if memory["optimiser"] is not None:
            self.optimizer = torch.optim.Adam(self.head.parameters(), self.lr, (0.5, 0.999))
            self.optimizer.load_state_dict(memory["optimiser"])
