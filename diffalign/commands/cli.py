"""Command line: `diffalign` and its commands; train.py and sample.py."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from .. import __version__
from ..config import Dtype, TrainConfig
from ..config.decoding import ConfigError, suggest
from ..config.text import expand_user
from ..training.stopping import TrainingStopped, exit_status, leave
from . import arguments as parsers
from .help import KINDS, help_text, listing
from .timing import measured

TRAIN_USAGE = """usage: python train.py CONFIG.yaml [--dry-run] [--resume] [--section.key VALUE ...]

Fine-tunes a model on rewards. Any setting of the file can be replaced on the command line.

  --dry-run     print the geometry and the cost; of a local model also the time, by one call
  --resume      go on from the newest whole checkpoint in log.dir, with the settings that the run
                had; --resume latest starts anew where there is none, as schedulers need it, and
                --resume RUN/checkpoint-N goes back to that one
  --force       with --resume: go on although settings differ that should not
  --overwrite   start anew in a log.dir that holds a run, and remove what that wrote
  --help        this text
  --version     the version

Ctrl-C, SIGTERM and SIGHUP save the epochs done. The exit status is 0 when the run is done, 1 when
it was refused or could not go on (the message says why), 130, 143 or 129 after those signals.
"""


Command = Callable[[Sequence[str]], int]


def guarded(command: Command) -> Callable[..., int]:
    """A command with one way to fail: errors that a user can cause end in a message and an exit
    status, not a traceback. The status is 1 for bad input, a failed reward or a file that cannot be
    read or written, and 130 for Ctrl-C, as in shells.

    With DIFFALIGN_DEBUG set the traceback is shown. Any other exception is a bug, and always shows
    its traceback.
    """

    @functools.wraps(command)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            status = command(expand_user(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # that of SIGPIPE, as in shells
        except KeyboardInterrupt as error:
            return exit_status(error)
        except Exception as error:
            text = message(error)
            if text is None or os.environ.get("DIFFALIGN_DEBUG"):
                raise
            # a refusal is alike on all of a machine; later another process may say it for all
            aside = os.environ.get("LOCAL_RANK", "0") != "0"
            if not (getattr(error, "quiet", False) or (aside and isinstance(error, ValueError))):
                print("\n" * aside + f"error: {text}", file=sys.stderr)  # beside a progress bar
            return 1
        return status

    return run


_REMEDIES = {
    errno.ENOSPC: "make room, or choose another disk",
    errno.EDQUOT: "make room, or choose another disk",
    errno.EACCES: "choose a place that you may write to or read, or change its permissions",
    errno.EPERM: "choose a place that you may write to or read, or change its permissions",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "a part of that path is a file; choose another",
    errno.EISDIR: "give the name of a file in it",
    errno.ENOENT: "is it spelt as it is on the disk?",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def message(error: Exception) -> str | None:
    """The message for a user about an exception; None for an exception that no user can cause."""
    rewards = sys.modules.get("rewards.base")  # if it is not imported, it raised nothing
    own = TrainingStopped, getattr(rewards, "RewardError", ())
    if isinstance(error, OSError) and error.strerror and error.filename:
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f"; {tip}" if (tip := _REMEDIES.get(error.errno or 0)) else "")
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        why = str(error).partition(". ")[0] or "out of memory"
        return f"{why}; take fewer pictures at a time, a smaller resolution or a half dtype"
    return str(error) if isinstance(error, (ValueError, OSError, ImportError, *own)) else None


@guarded
def train(arguments: Sequence[str]) -> int:
    """`train.py`: returns the exit status, as `TRAIN_USAGE` describes it."""
    resume, rest = _resumed(arguments)
    flags = {f: f in rest for f in ("--dry-run", "--force", "--overwrite")}
    settings = [a for a in rest if a not in flags]
    if "--version" in arguments:
        print(f"diffalign {__version__}")
        return 0
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(TRAIN_USAGE + "\n" + help_text())
        return 0 if arguments else 1
    if not settings or settings[0].startswith("-"):
        raise ConfigError(
            "there is no config file; give one first, such as configs/emoji_ddpo_jpeg.yaml"
        )
    config = TrainConfig.from_file(settings[0], settings[1:])
    from ..training.engine import asked_for
    from ..training.plan import Plan

    # before the trainer, whose imports take seconds that a refusal need not wait for
    plan, first = Plan.make(config, processes=asked_for()), os.environ.get("RANK", "0") == "0"
    from ..record import folder

    place = Path(os.path.expanduser(config.log.dir)), resume, flags["--overwrite"]
    if flags["--dry-run"] and not first:
        return 0
    if flags["--dry-run"]:
        print(plan.describe(), flush=True)
        try:
            folder.check(*place)
        except (ConfigError, FileNotFoundError) as error:  # the cost is worth knowing anyway
            print(f"note       {error}")
        if os.path.isdir(os.path.expanduser(config.model.name)):  # others would be downloaded
            print(measured(settings))
        return 0
    folder.check(*place)
    from ..training.trainer import Trainer

    try:
        trainer = Trainer(
            config, resume=resume, overwrite=flags["--overwrite"], force=flags["--force"]
        )
        result = trainer.train()
    except KeyboardInterrupt as error:
        if first:
            print(f"\nstopped by {str(error) or 'Ctrl-C'}")
        raise
    if trainer.main:
        print(summary(result, trainer.dir))
    return 0


def _resumed(arguments: Sequence[str]) -> tuple[bool | str, list[str]]:
    """What --resume says, True where it is alone, and the other arguments. It may stand before the
    config file."""
    rest = list(arguments)
    if "--resume" not in rest:
        return False, rest
    at = rest.index("--resume")
    del rest[at]
    value = rest[at] if at < len(rest) else "-"
    if value.startswith("-") or value.endswith((".yaml", ".yml")):
        return True, rest
    return rest.pop(at), rest


def summary(result: dict[str, dict[str, float]], run_dir: Path) -> str:
    """Held-out means before and after, where the files are, and last what the guard found."""
    from ..report.run import read
    from ..report.sections import guard

    before, after = result["before"], result["after"]
    try:
        run = read([run_dir])[0]
    except (OSError, ValueError):  # a report that cannot be written says why
        run = None
    head = f"{'held-out prompts':<28}{'before':>10}{'after':>10}{'change ± s.e.':>21}"
    lines = ["", head] if after else []
    for name in after:
        word = name.removeprefix("eval/")
        change = run.change(word) if run else None
        ends = f" {before.get(name, math.nan):>9.4f} {after[name]:>9.4f}"
        gain = f" {change.gain:>+11.4f}" if change and change.gain is not None else ""
        error = f" ± {change.error:.4f}" if change and change.error else ""
        lines.append(f"{word:<28}{ends}{gain}{error}")
    lines.append("")
    files = {"curve": "curve.png", "grid": "grid.png", "report": "report.html", "weights": ""}
    for label, name in files.items():
        if (run_dir / name).exists():  # without held-out prompts there is no grid
            lines.append(f"{label:<9}{run_dir / name}")
    if after and run:
        lines += ["", *textwrap.wrap(f"The guard: {guard(run)}", 100)]
    return "\n".join(lines)


@guarded
def sample(arguments: Sequence[str]) -> int:
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
    parser.add_argument("--resolution", type=parsers.size, help="pixels: SIDE or HEIGHTxWIDTH")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="default: float32")
    parsers.device_of(parser)
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
    if "-h" in arguments or "--help" in arguments:
        parser.parse_args(["--help"])
    from ..optimize_noise.options import split

    method, wanted, rest = split(arguments)
    args = vars(parser.parse_args(rest))
    device = args.pop("device")
    if not args["noise"] and not args["prompts"]:
        raise ConfigError("--prompts is missing; give texts, or a prompt file")
    from rewards.device import choose_device

    choose_device(device)
    print(_redrawn(method, args) if args["noise"] else _drawn(method, wanted, args))
    return 0


def _drawn(method: str | None, wanted: Any, args: dict[str, Any]) -> Path:
    """Pictures of prompts × seeds, plain or by a search."""
    from ..sampling import pipeline
    from . import search

    how = pipeline.settings([args["lora"], args["model"]], args)
    how |= {k: args[k] for k in ("prompts", "lora", "compare", "grid", "out")}
    how["seeds"] = "0-3" if args["seeds"] is None else args["seeds"]
    how["lora_scale"] = 1.0 if args["lora_scale"] is None else args["lora_scale"]
    drawing = pipeline.Drawing(**how)
    return search.run(method, wanted, drawing) if method else pipeline.draw(drawing)


def _redrawn(method: str | None, args: dict[str, Any]) -> Path:
    """Pictures of a noise.safetensors."""
    from .redraw import redraw

    odd = [k for k in ("seeds", "compare") if args.pop(k)]
    if method or odd:
        option = (method or odd[0]).replace("_", "-")
        raise ConfigError(f"--noise draws what its file says; leave --{option} out")
    return redraw(**args)


@guarded
def score(arguments: Sequence[str]) -> int:
    """`diffalign score`: finished pictures; returns the exit status."""
    try:
        return _run(".score", arguments, parsers.scoring())
    except KeyboardInterrupt:
        print("\nstopped; what was scored is kept, and the same command goes on")
        raise


@guarded
def serve_rewards(arguments: Sequence[str]) -> int:
    """`diffalign serve-rewards`: until interrupted; returns the exit status."""
    from rewards.serve import serve

    return serve(arguments)


def _run(
    module: str, arguments: Sequence[str], parser: argparse.ArgumentParser | None = None
) -> int:
    """Run the `main` of a module of this package, which is imported once `parser` has accepted the
    arguments."""
    if parser is not None:
        parser.parse_args(arguments)
    return importlib.import_module(module, __package__).main(arguments)


def _listing(kind: str) -> Callable[..., int]:
    """The command that lists algorithms, rewards or searches, or describes one."""

    def run(arguments: Sequence[str]) -> int:
        one = KINDS[kind].one
        parser = argparse.ArgumentParser(
            prog=f"diffalign {kind}",
            description=f"The {kind} that there are, a line each, or all about one: its options "
            "with types, ranges and defaults, what it needs, its source, an example.",
        )
        parser.add_argument("name", nargs="?", help=f"the {one} to describe")
        print(listing(kind, parser.parse_args(arguments).name))
        return 0

    return guarded(run)


evaluate = guarded(lambda a: _run(".evaluate", a, parsers.evaluation()))


@guarded
def bench(arguments: Sequence[str]) -> int:
    """`diffalign bench`: where the time of a run goes; returns the exit status."""
    args, settings = parsers.bench().parse_known_args(arguments)
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} measures nothing; use 1 or more")
    config = TrainConfig.from_file(args.config, settings)
    from ..training.plan import Plan

    Plan.make(config)  # refuses what a run would refuse, before the slow imports
    from .bench import run

    print(run(config, args.rounds))
    return 0


@guarded
def probe(arguments: Sequence[str]) -> int:
    """`diffalign probe`: the gradient noise scale before a run; returns the exit status."""
    args, settings = parsers.probe().parse_known_args(arguments)
    if args.epochs < 2:
        raise ConfigError(f"--epochs {args.epochs} leaves nothing to compare; use 2 or more")
    config = TrainConfig.from_file(args.config, settings)
    from ..training.plan import Plan

    Plan.make(config)  # refuses what a run would refuse, before the slow imports
    from .probe import run

    print(run(config, args.epochs))
    return 0


demo = guarded(lambda a: _run(".demo", a, parsers.demo()))
grid = guarded(lambda a: _run(".grid", a, parsers.grid()))
report = guarded(lambda a: _run("..report", a))
film = guarded(lambda a: _run("..report.film", a))
blind = guarded(lambda a: _run("..report.blind", a))

COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "demo": (demo, "a search, a training run and a hacked run, on one page, in five minutes"),
    "train": (train, "fine-tune a model on rewards; CONFIG.yaml --dry-run says what it costs"),
    "bench": (bench, "where the time of a run goes: its calls, alone and in the loop"),
    "probe": (probe, "whether updates would be signal or noise, before a run"),
    "sample": (sample, "draw prompts, with or without trained weights; search better pictures"),
    "grid": (grid, "models, runs, LoRA scales or seeds side by side in one picture"),
    "report": (report, "one HTML file on a run, or comparing several"),
    "film": (film, "the evaluations of a run as a strip and an animation"),
    "blind": (blind, "a blind test of two runs or folders of pictures, as a page"),
    "score": (score, "score finished pictures with rewards"),
    "eval": (evaluate, "EmojiEval's table of pipelines"),
    "serve-rewards": (serve_rewards, "serve rewards over HTTP"),
    "algorithms": (_listing("algorithms"), "list the algorithms, or describe one"),
    "rewards": (_listing("rewards"), "list the rewards, or describe one"),
    "searches": (_listing("searches"), "list the searches of sample, or describe one"),
}
"""The commands, in the order in which they are used, and what each does."""


def main() -> None:
    """The `diffalign` command."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        leave(COMMANDS[name][0](arguments))
    if name == "--version":
        print(f"diffalign {__version__}")
    elif name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: diffalign COMMAND ...\n\nAlign text-to-image models with rewards.\n")
        for command, (_, what) in COMMANDS.items():
            print(f"  {command:<{width}}  {what}")
        print("\ndiffalign COMMAND --help: all about one; diffalign --version")
    else:
        tip = suggest(name, COMMANDS)
        print(f"error: there is no command {name!r}{tip}", file=sys.stderr)
        raise SystemExit(2)
