"""The text of `--help`, made from the configuration's own types, defaults and docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from .config import TrainConfig
from .decoding import field_types, type_name


def field_docs(cls: type) -> dict[str, str]:
    """The string (or else the comment) that documents each field of a dataclass, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class made in an interpreter has no source
            continue
        lines = source.splitlines()
        tree = ast.parse(source).body[0]
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            tail = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset or 0 :].decode()
            docs[node.target.id] = tail.strip().lstrip("# ")
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


_REWARDS_HELP = [
    ("--rewards.jpeg 1.0", "a built-in reward and its weight"),
    ("--rewards.clip.model PATH", "an option of a reward; its weight: --rewards.clip 0.5"),
    ("--rewards.my_module:redness 0.2", "your function (images, prompts) -> (n,) in my_module"),
]


def help_text(algorithms: Mapping[str, type] | None = None) -> str:
    """Every setting with its type, default and meaning, wrapped to the terminal's width.

    `algorithms` maps the values of `algorithm.type` to their dataclasses.
    """
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    blocks: list[str] = []
    for section, hint in field_types(TrainConfig).items():
        if section == "rewards":
            head = "rewards: what is optimised, a weighted sum; --rewards.NAME null removes one"
            blocks.append(_rows(head, _REWARDS_HELP, width))
        elif section == "algorithm":
            names = " | ".join(algorithms or ["NAME"])
            head = "algorithm: the method and its own options; --algorithm '{type: NAME}' resets"
            blocks.append(_rows(head, [("--algorithm.type NAME", f"(ddpo)  {names}")], width))
            for name, cls in (algorithms or {}).items():
                title = (inspect.getdoc(cls) or "").partition("\n")[0]
                if title.startswith(f"{cls.__name__}("):  # dataclass's own, for want of a docstring
                    title = ""
                rows = _field_rows(cls, "algorithm")
                blocks.append(_rows(f"algorithm {name}: {title}".rstrip(": "), rows, width))
        else:
            blocks.append(_rows(section, _field_rows(hint, section), width))
    return "\n".join(blocks)


def _field_rows(cls: Any, section: str) -> list[tuple[str, str]]:
    docs, rows = field_docs(cls), []
    for f in fields(cls):
        if f.init:
            kind = type_name(field_types(cls)[f.name]).removesuffix(" or null")
            default = f.default if f.default_factory is MISSING else f.default_factory()
            shown = "required" if default is MISSING else _show(default)
            metavar = "VALUE" if " or " in kind else kind.split()[0].upper()
            if kind.startswith("one of "):
                metavar = kind.removeprefix("one of ").replace(", ", "|")
            rows.append(
                (f"--{section}.{f.name} {metavar}", f"({shown})  {docs.get(f.name, '')}".rstrip())
            )
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
