"""diffalign: align text-to-image diffusion and flow models with rewards."""

from . import algorithms  # noqa: F401  (the config asks it which options a type has)
from .config import TrainConfig
from .config.decoding import ConfigError

__version__ = "0.1.0"
__all__ = ["ConfigError", "TrainConfig", "Trainer", "TrainingStopped"]


def __getattr__(name: str):
    # the trainer brings diffusers along: seconds that `--help` and a misspelt key need not wait for
    if name in ("Trainer", "TrainingStopped"):
        from .training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
