"""Command line: `diffalign` and its commands; train.py and sample.py."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .config import CHOICES, TrainConfig
from .decoding import ConfigError
from .help import help_text
from .text import expand_user

TRAIN_USAGE = """usage: python train.py CONFIG.yaml [--dry-run] [--resume] [--section.key VALUE ...]

Fine-tunes a model on rewards. Any setting of the file can be replaced on the command line.

  --dry-run     print the geometry and the cost, load no model
  --resume      go on from the checkpoint in log.dir, with the settings that the run had
  --force       with --resume: go on although settings differ that should not
  --overwrite   start anew in a log.dir that holds a run, and remove what that wrote
  --help        this text

Ctrl-C, SIGTERM and SIGHUP save the epochs done. The exit status is 0 when the run is done, 1 when
it was refused or could not go on (the message says why), 130, 143 or 129 after those signals.
"""


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py`: returns the exit status, as `TRAIN_USAGE` has it."""
    arguments = expand_user(sys.argv[1:] if arguments is None else arguments)
    flags = {f: f in arguments for f in ("--dry-run", "--resume", "--force", "--overwrite")}
    settings = [a for a in arguments if a not in flags]
    # imported late: --help and a misspelt key answer at once
    if not arguments or "--help" in arguments or "-h" in arguments:
        from .algorithms import ALGORITHMS

        print(TRAIN_USAGE + "\n" + help_text(ALGORITHMS))
        return 0 if arguments else 1
    try:
        if not settings or settings[0].startswith("-"):
            raise ConfigError(
                "there is no config file; give one first, such as configs/emoji_ddpo_jpeg.yaml"
            )
        config = TrainConfig.from_file(settings[0], settings[1:])
        from .plan import Plan
        from .stopping import exit_status
        from .trainer import Trainer, TrainingStopped
    except ConfigError as error:
        return _fail(error)
    try:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if flags["--dry-run"]:
            print(Plan.make(config, processes=processes).describe())
            return 0
        trainer = Trainer(
            config,
            resume=flags["--resume"],
            overwrite=flags["--overwrite"],
            force=flags["--force"],
        )
        result = trainer.train()
    except (ValueError, FileNotFoundError, TrainingStopped) as error:
        return _fail(error)
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\nstopped by {error or 'Ctrl-C'}")
        return exit_status(error)
    if trainer.main:
        print(summary(result, trainer.dir))
    return 0


def _fail(error: Exception) -> int:
    if isinstance(error, OSError) and error.filename and error.strerror:
        error = OSError(f"{error.filename}: {error.strerror}")
    print(f"error: {error}", file=sys.stderr)
    return 1


def summary(result: dict[str, dict[str, float]], run_dir: Path) -> str:
    """Held-out means before and after, and where the files are."""
    before, after = result["before"], result["after"]
    lines = ["", f"{'held-out prompts':<28}{'before':>10}{'after':>10}"]
    for name in after:
        lines.append(f"{name.removeprefix('eval/'):<28}{before[name]:>10.4f}{after[name]:>10.4f}")
    lines.append("")
    files = {"curve": "curve.png", "grid": "grid.png", "report": "report.html", "weights": ""}
    for label, name in files.items():
        if (run_dir / name).exists():  # without held-out prompts there is no grid
            lines.append(f"{label:<9}{run_dir / name}")
    return "\n".join(lines)


def sample(arguments: Sequence[str] | None = None) -> int:
    """`sample.py`: pictures of prompts × seeds with plain diffusers; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Draw prompts with a pipeline, with or without a LoRA. Of a run, --lora RUN or "
        "--model RUN, it takes the settings of its evaluations unless they are given.",
        epilog="A better picture of each, by a search: --reno, --best-of-n, --zero-order ... with "
        "--rewards.NAME WEIGHT, --METHOD.option VALUE and --budget.denoiser_calls N "
        "(docs/inference.md).",
    )
    parser.add_argument("--model", help="pipeline folder, run or hub id; default: assets/emoji-sd")
    parser.add_argument("--lora", help="run folder, or any LoRA that diffusers loads")
    parser.add_argument("--merge-lora", help="LoRA merged into the model first, e.g. a Turbo one")
    parser.add_argument("--lora-scale", type=float, help="0 = base, 1 = as trained, the default")
    parser.add_argument("--compare", action="store_true", help="also draw the base model")
    parser.add_argument("--prompts", nargs="+", help="texts, or prompt files")
    parser.add_argument("--seeds", help='"0-7", "3" or "1,5,9"; default: 0-3')
    parser.add_argument("--steps", type=int, help="denoising steps; default: 20")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: 3")
    parser.add_argument("--resolution", type=int, help="side in pixels; default: the model's own")
    parser.add_argument("--dtype", choices=CHOICES["model.dtype"], help="default: float32")
    parser.add_argument("--grid", default="grid.png", help="PNG to write: a row a prompt")
    parser.add_argument(
        "--out",
        help="folder for the single pictures as well, prompts.jsonl for `diffalign score`, and "
        "noise.safetensors",
    )  # fmt: skip
    parser.add_argument(
        "--noise", metavar="FILE",
        help="draw the pictures of a noise.safetensors again, of their own prompts and settings "
        "unless others are given",
    )  # fmt: skip
    given = expand_user(sys.argv[1:] if arguments is None else arguments)
    if "-h" in given or "--help" in given:
        parser.parse_args(["--help"])
    from rewards import RewardError

    try:
        from .optimize_noise import command

        method, wanted, rest = command.split(given)
        args = vars(parser.parse_args(rest))
        written = _redrawn(method, args) if args["noise"] else _drawn(method, wanted, args)
    except (ValueError, OSError, RewardError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    print(written)
    return 0


def _drawn(method: str | None, wanted: Any, args: dict[str, Any]) -> Path:
    """Pictures of prompts × seeds, plain or by a search."""
    from . import sampling
    from .optimize_noise import command

    if not args["prompts"]:
        raise ConfigError("--prompts is missing; give texts, or a prompt file")
    how = sampling.settings([args["lora"], args["model"]], args)
    how |= {k: args[k] for k in ("prompts", "lora", "compare", "grid", "out")}
    how["seeds"] = "0-3" if args["seeds"] is None else args["seeds"]
    how["lora_scale"] = 1.0 if args["lora_scale"] is None else args["lora_scale"]
    return command.run(method, wanted, **how) if method else sampling.draw(**how)


def _redrawn(method: str | None, args: dict[str, Any]) -> Path:
    """Pictures of a noise.safetensors."""
    from .redraw import redraw

    odd = [k for k in ("seeds", "compare") if args.pop(k)]
    if method or odd:
        option = (method or odd[0]).replace("_", "-")
        raise ConfigError(f"--noise draws what its file says; leave --{option} out")
    return redraw(**args)


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`diffalign eval`: EmojiEval's table of pipelines; returns the exit status."""
    from .emoji_world import evaluate as emoji_eval

    try:
        return emoji_eval.main(arguments)
    except ValueError as error:
        return _fail(error)


def score(arguments: Sequence[str] | None = None) -> int:
    """`diffalign score`: finished pictures; returns the exit status."""
    from rewards import RewardError

    from .score import main as run

    try:
        return run(arguments)
    except (ValueError, RewardError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("\nstopped; what was scored is kept, and the same command goes on")
        return 130


def serve_rewards(arguments: Sequence[str] | None = None) -> int:
    """`diffalign serve-rewards`: until interrupted; returns the exit status."""
    from rewards.server import serve

    try:
        return serve(arguments)
    except ValueError as error:
        return _fail(error)


def _command(module: str) -> Callable[[Sequence[str] | None], int]:
    """The `main` of a module of this package, which is imported when it is called."""

    def run(arguments: Sequence[str] | None = None) -> int:
        from rewards import RewardError

        try:
            return importlib.import_module(f".{module}", __package__).main(arguments)
        except (ValueError, OSError, RewardError) as error:
            return _fail(error)
        except KeyboardInterrupt:
            return 130

    return run


def main() -> None:
    """The `diffalign` command."""
    commands = {
        "train": train,
        "sample": sample,
        "eval": evaluate,
        "score": score,
        "serve-rewards": serve_rewards,
        "grid": _command("compare"),
        "report": _command("report"),
        "film": _command("film"),
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        print(f"usage: diffalign {{{','.join(commands)}}} ...", file=sys.stderr)
        raise SystemExit(name not in ("-h", "--help"))
    from .stopping import leave

    leave(commands[name](expand_user(sys.argv[2:])))
