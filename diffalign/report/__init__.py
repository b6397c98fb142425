"""The report on a run, or on several: one self-contained HTML file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from ..config.files import check_file, write_atomic
from . import sections
from .run import read

NAME = "report.html"


def write(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report on the run folders `runs` and return its path. out: where to write; None =
    in the folder of a single run, or here for several. Raises as `run.read` does."""
    if not runs:
        raise ValueError("there is no run to report on; give at least one folder")
    path = Path(out if out is not None else NAME if len(runs) > 1 else Path(runs[0]) / NAME)
    check_file(path, "--out")
    found = read(runs)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    write_atomic(path, page(f"{title}: diffalign", sections.build(found)))
    return path


def page(title: str, body: str) -> bytes:
    """The file of a self-contained page. body: finished HTML."""
    template = Template(files(__name__).joinpath("page.html").read_text("utf-8"))
    # a prompt may hold half of a surrogate pair, which UTF-8 cannot encode
    return template.substitute(title=escape(title), body=body).encode("utf-8", "replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign report`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="diffalign report",
        description="One self-contained HTML file on a run, or comparing several.",
    )
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument(
        "--out", help=f"file to write; default: RUN/{NAME}, of several runs {NAME} here"
    )
    args = parser.parse_args(arguments)
    print(write(args.runs, args.out))
    return 0
