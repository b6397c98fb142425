"""diffalign: align text-to-image diffusion and flow models with rewards."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

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


MOVED = {
    "diffalign.cli": "diffalign.commands.cli",
    "diffalign.compare": "diffalign.commands.grid",
    "diffalign.grids": "diffalign.drawing.grids",
    "diffalign.prompts": "diffalign.config.prompts",
    "diffalign.rollout": "diffalign.sampling.adjoint",  # Surrogate and Sampling, for algorithms
}
"""Modules that are found by the names that they had before, and the names that they have now."""


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_Moved())
