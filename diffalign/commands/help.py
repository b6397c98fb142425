"""Texts of `train --help` and of the commands that list or describe, made from the code itself."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import rewards

from .. import algorithms, optimize_noise
from ..config import TrainConfig
from ..config.decoding import ConfigError, field_types, suggest, type_name
from ..config.source import REQUIRED, Option, Subject

_REWARDS_HELP = [
    ("--rewards.jpeg 1.0", "a built-in reward and its weight"),
    ("--rewards.clip.model PATH", "an option of a reward; its weight: --rewards.clip 0.5"),
    ("--rewards.my_module:redness 0.2", "your function (images, prompts) -> (n,) in my_module"),
]


def help_text(places: Mapping[str, str] = algorithms.ALGORITHMS.places) -> str:
    """Every setting with its type, default and meaning, wrapped to the terminal's width.

    `places` maps the values of `algorithm.type` to "module:Class", which is not imported.
    """
    width, blocks = _width(), []
    for section, hint in field_types(TrainConfig).items():
        if section == "rewards":
            head = "rewards: what is optimised, a weighted sum; --rewards.NAME null removes one"
            blocks.append(_rows(head, _REWARDS_HELP, width))
        elif section == "algorithm":
            names = " | ".join(places)
            head = "algorithm: the method and its own options; --algorithm '{type: NAME}' resets"
            blocks.append(_rows(head, [("--algorithm.type NAME", f"(ddpo)  {names}")], width))
            for name, place in places.items():
                subject = Subject(place)
                rows = _option_rows(subject.options, "--algorithm.")
                blocks.append(_rows(f"algorithm {name}: {subject.title}", rows, width))
        else:
            options = Subject(f"{hint.__module__}:{hint.__name__}").options
            blocks.append(_rows(section, _option_rows(options, f"--{section}."), width))
    return "\n".join(blocks)


def listing(kind: str, name: str | None = None) -> str:
    """A line for each entry of `KINDS[kind]`, or all about the entry `name`. No entry is imported.

    Raises ConfigError for an unknown name.
    """
    of, places = KINDS[kind], KINDS[kind].places()
    if name is not None:
        key = name.removeprefix("--").replace("-", "_")
        if key not in places:
            raise ConfigError(f"there is no {of.one} {name!r}{suggest(key, places)}")
        return _details(key, Subject(places[key]), of)
    rows = [("name", of.column, "source", "")]
    for known, place in places.items():
        try:
            subject = Subject(place)
        except (KeyError, OSError, ImportError):  # installed without source
            rows.append((known, "", "", place))
            continue
        title = re.sub(r" \(arXiv [\d.]+\)", "", subject.title).rstrip(".")
        rows.append((known, of.gives(subject)[0], subject.source, title))
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*map(str.ljust, row, wide), row[3]]).rstrip() for row in rows]
    return "\n".join([*lines, "", f"diffalign {kind} NAME: all about one"])


def _details(name: str, subject: Subject, of: _Kind) -> str:
    width, options = _width(), subject.options
    prefix = of.prefix.format(name=name.replace("_", "-") if of.one == "search" else name)
    lines = [f"{name}: {subject.doc}", "", f"{of.column:<10}{of.gives(subject)[1]}"]
    lines += [f"{'source':<10}{subject.source}"] if subject.source else []
    lines += ["", _rows("options", _option_rows(options, prefix), width)] if options else [""]
    if of.one == "reward":
        common = Subject("rewards:build").doc.partition("that all have:\n\n")[2]
        lines += ["options of every reward", textwrap.indent(textwrap.dedent(common), "  "), ""]
    return "\n".join([*lines, "example", f"  {of.example(name, options)}"])


def _algorithm_needs(subject: Subject) -> tuple[str, str]:
    name = (subject.attribute("needs") or "").rpartition(".")[2]
    words = Subject("diffalign.algorithms.base:Needs").attribute(name) or ""
    return name.lower(), words.strip("'\"")


def _reward_gradient(subject: Subject) -> tuple[str, str]:
    where = subject.assigned("differentiable")
    # the option of a base class's constructor may be none of this class
    if where and (not where.isidentifier() or where in {o.name for o in subject.options}):
        return f"if `{where}`", f"a gradient to the pixels if `{where}`"
    if subject.attribute("differentiable") == "True":
        return "yes", "a gradient to the pixels"
    return "no", "no gradient to the pixels"


def _search_needs(subject: Subject) -> tuple[str, str]:
    where = subject.condition("require_differentiable")
    if where is None:
        return "any reward", "any reward"
    where = f" if `{where}`" if where else ""
    return f"gradient{where}", f"rewards with a gradient to the pixels{where}"


def _train_example(name: str, options: Sequence[Option]) -> str:
    first = f" --algorithm.{options[0].name} {_show(options[0].default)}" if options else ""
    return f"diffalign train CONFIG.yaml --algorithm '{{type: {name}}}'{first}"


def _reward_example(name: str, options: Sequence[Option]) -> str:
    required = [o.name for o in options if o.default is REQUIRED]
    given = "".join(f" --rewards.{name}.{o} {o.upper()}" for o in required)
    return f"diffalign train CONFIG.yaml{given or f' --rewards.{name} 1.0'}"


def _search_example(name: str, options: Sequence[Option]) -> str:
    flag = "--" + name.replace("_", "-")
    first = f" {flag}.{options[0].name} {_show(options[0].default)}" if options else ""
    return f'diffalign sample {flag}{first} --rewards.clip 1.0 --prompts "a red apple"'


def _installed() -> dict[str, str]:
    own = {e.name: e.value for e in entry_points(group="diffalign.rewards")}
    return own | rewards.REGISTRY.places


@dataclass(frozen=True)
class _Kind:
    """What `listing` lists. one: its singular. places: {name: "module:attribute"}. column, gives:
    what an entry needs or gives, as a header, and in one word and in a few. prefix: of an entry's
    options. example: a command that uses an entry."""

    one: str
    places: Callable[[], Mapping[str, str]]
    column: str
    gives: Callable[[Subject], tuple[str, str]]
    prefix: str
    example: Callable[[str, Sequence[Option]], str]


KINDS = {
    "algorithms": _Kind(
        "algorithm", lambda: algorithms.ALGORITHMS.places, "needs", _algorithm_needs,
        "--algorithm.", _train_example,
    ),
    "rewards": _Kind(
        "reward", _installed, "gradient", _reward_gradient, "--rewards.{name}.", _reward_example
    ),
    "searches": _Kind(
        "search", lambda: optimize_noise.METHODS.places, "needs", _search_needs,
        "--{name}.", _search_example,
    ),
}  # fmt: skip


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))


def _option_rows(options: Iterable[Option], prefix: str) -> list[tuple[str, str]]:
    rows = []
    for o in options:
        kind = o.type if isinstance(o.type, str) else type_name(o.type)
        kind = kind.replace(" | ", " or ").replace("None", "null").removesuffix(" or null")
        metavar = "VALUE" if " or " in kind else kind.split()[0].upper()
        if kind.startswith("one of "):
            metavar = kind.removeprefix("one of ").replace(", ", "|")
        shown = "required" if o.default is REQUIRED else _show(o.default)
        shown += f"; {o.range}" if o.range else ""
        rows.append((f"{prefix}{o.name} {metavar}", f"({shown})  {o.doc}".rstrip()))
    return rows


def _show(value: Any) -> str:
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_show, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "empty" if value in ("", {}) else str(value)


def _rows(title: str, rows: list[tuple[str, str]], width: int) -> str:
    left = min(max((len(a) for a, _ in rows), default=0), 38) + 4
    lines = textwrap.wrap(title, width)
    for option, text in rows:
        wrapped = textwrap.wrap(text, width - left, break_on_hyphens=False) or [""]
        start = f"  {option}"
        if len(start) + 2 > left:
            lines.append(start)
            start = ""
        lines.append(f"{start:<{left}}{wrapped[0]}")
        lines += [" " * left + line for line in wrapped[1:]]
    return "\n".join(lines) + "\n"
