"""Argument parsers of commands that import torch, kept apart so that `--help` need not wait."""

from __future__ import annotations

import argparse
from typing import get_args

from ..config import Dtype
from ..emoji_world import SPLITS


def device_of(parser: argparse.ArgumentParser) -> None:
    """The option --device of all commands that load a model, see `rewards.device`."""
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the first there is")


def scoring() -> argparse.ArgumentParser:
    """`diffalign score`."""
    parser = argparse.ArgumentParser(
        prog="diffalign score", description="Score finished pictures with rewards."
    )
    parser.add_argument("images", help="folder of pictures, searched at any depth")
    parser.add_argument(
        "--reward", action="append", required=True, metavar="NAME[=JSON]",
        help='a reward and its options: clip=\'{"model": "openai/clip-vit-base-patch32"}\'',
    )  # fmt: skip
    parser.add_argument("--prompts", help=".txt or .jsonl: one a picture, in the order of names")
    parser.add_argument("--out", default="scores.csv", help="CSV to write, or to go on with")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time")
    device_of(parser)
    return parser


def bench() -> argparse.ArgumentParser:
    """`diffalign bench`."""
    parser = argparse.ArgumentParser(
        prog="diffalign bench",
        usage="diffalign bench CONFIG.yaml [--rounds N] [--section.key VALUE ...]",
        description="Where the time of a run goes on this machine: a few epochs are trained, in a "
        "folder that is then removed, and after each epoch its calls of denoiser, decoder and "
        "rewards are made again, alone. Any setting of the file can be replaced.",
    )
    parser.add_argument("config", help="as for `diffalign train`")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="epochs; default: 5")
    return parser


def probe() -> argparse.ArgumentParser:
    """`diffalign probe`."""
    parser = argparse.ArgumentParser(
        prog="diffalign probe",
        usage="diffalign probe CONFIG.yaml [--epochs N] [--section.key VALUE ...]",
        description="Whether a run's updates would be signal or noise: the gradient noise scale at "
        "the base weights, the number of pictures at which an update is half signal, with the "
        "price of such an update. Nothing is trained. Any setting of the file can be replaced.",
    )
    parser.add_argument("config", help="as for `diffalign train`")
    parser.add_argument(
        "--epochs", type=int, default=6, metavar="N",
        help="whose gradients are measured, each of its own prompts; default: 6",
    )  # fmt: skip
    return parser


def demo() -> argparse.ArgumentParser:
    """`diffalign demo`."""
    parser = argparse.ArgumentParser(
        prog="diffalign demo",
        description="The embedded model in five minutes on two cores: a search, a training run and "
        "a hacked run, on one self-contained page. Start it in the repository.",
    )
    parser.add_argument(
        "folder", nargs="?", default="runs/demo", metavar="FOLDER",
        help="to write to; an earlier demo there is replaced; default: runs/demo",
    )  # fmt: skip
    return parser


def grid() -> argparse.ArgumentParser:
    """`diffalign grid`."""
    parser = argparse.ArgumentParser(
        prog="diffalign grid",
        description="Set models side by side: a row a prompt, the base model and what is asked for "
        "in columns, the same noise along a row. Several seeds are several rows of a prompt, or, "
        "with nothing to compare, the columns.",
    )
    parser.add_argument("--prompts", nargs="+", required=True, help="texts, or prompt files")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN",
        help="run folders, or any LoRA that diffusers loads",
    )  # fmt: skip
    parser.add_argument(
        "--lora-scales", nargs="+", type=float, metavar="S",
        help="a column for each: 0 = the base model, 1 = as trained; of every run",
    )  # fmt: skip
    parser.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help="from one LoRA to another"
    )
    parser.add_argument("--points", type=int, default=5, help="columns of --interpolate")
    parser.add_argument("--seeds", default="0", help='"0-7", "3" or "1,5,9"')
    parser.add_argument(
        "--reward", action="append", metavar="NAME[=JSON]",
        help="written under the pictures: clip='{\"model\": \"assets/emoji-clip\"}'",
    )  # fmt: skip
    parser.add_argument(
        "--reno", nargs="+", type=int, default=[], metavar="N",
        help="a column for each: the best of N iterations of ReNO on the model, for --reward",
    )  # fmt: skip
    own = "; default: that of the first run's evaluations"
    parser.add_argument("--model", help=f"pipeline folder or hub id{own}")
    parser.add_argument("--merge-lora", help=f"LoRA merged into the model first{own}")
    parser.add_argument("--steps", type=int, help=f"denoising steps{own}, or 20")
    parser.add_argument("--guidance", type=float, help=f"guidance scale{own}, or 3")
    parser.add_argument("--resolution", type=size, help=f"side, or HEIGHTxWIDTH, in pixels{own}")
    parser.add_argument("--dtype", choices=get_args(Dtype), help=f"of the network{own}")
    device_of(parser)
    parser.add_argument("--cell", type=int, help="side of a picture in the grid; default: 192-512")
    parser.add_argument("--out", default="grid.png", help="PNG to write")
    return parser


def evaluation() -> argparse.ArgumentParser:
    """`diffalign eval`."""
    parser = argparse.ArgumentParser(
        prog="diffalign eval",
        description="EmojiEval: GenEval's six categories in EmojiWorld, read by its verifier and "
        "by the referee, which no reward knows; ± a standard error, clustered by prompt.",
    )
    parser.add_argument(
        "models", nargs="*", help="pipeline folders, run folders or hub ids, a column each"
    )
    parser.add_argument("--lora", help="run folder; adds a column of the first model with it")
    parser.add_argument("--merge-lora", help="LoRA merged into every model first")
    parser.add_argument("--split", choices=SPLITS, default="held_out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=1, help="of every prompt")
    device_of(parser)
    parser.add_argument("--out", help="folder for scores.json and a grid of pictures a column")
    return parser


def size(text: str) -> int | list[int]:
    """The size of a picture, as typed: the side of a square, or HEIGHTxWIDTH, in pixels."""
    try:
        pair = [int(side) for side in text.lower().split("x")]
    except ValueError:
        pair = []
    if len(pair) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512 or 512x768")
    return pair[0] if len(pair) == 1 else pair
