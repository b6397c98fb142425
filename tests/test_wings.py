"""The house stays one: which wing may import which, read from the sources."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from diffalign.algorithms import Batch, Matches, Transitions
from diffalign.training.learning import Credit, Learner, Rollout, Samples

ROOT = Path(__file__).resolve().parents[1]

TABLE = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## The house")[2]
ROWS = [row.split("|")[1:-1] for row in re.findall(r"^\| `.*$", TABLE, re.M)]
MAY_IMPORT = {
    re.sub(r"[`/ ]|\.py", "", name): {*re.findall(r"`(\w+)`", others), "rewards"}
    for name, _, others in ROWS
}
"""Of each wing, those it may import: the table of CONTRIBUTING.md, from top to bottom."""

FILES = sorted(
    p for p in (ROOT / "diffalign").rglob("*.py")
    if p not in (ROOT / "diffalign/__init__.py", ROOT / "diffalign/__main__.py")
)  # fmt: skip


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing_of(module):
    top, _, rest = module.partition(".")
    return top if top == "rewards" else rest.partition(".")[0]


def imported(path):
    """The modules that a file imports anywhere: at its top, in functions, for types alone."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # of a package the names may be its modules
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(path):
    """Of those, modules of this repository; the version is everybody's."""
    found = [m for m in imported(path) if m.partition(".")[0] in ("diffalign", "rewards")]
    return [m for m in found if m != "diffalign.__version__"]


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_imports_what_its_row_says(wing):
    files = [p for p in FILES if wing_of(module_of(p)) == wing]
    found = {wing_of(m): f"{p.relative_to(ROOT)} imports {m}" for p in files for m in ours(p)}
    assert {k: v for k, v in found.items() if k not in MAY_IMPORT[wing] | {wing}} == {}
    unused = MAY_IMPORT[wing] - {"rewards"} - found.keys()
    assert not unused  # the table says no more than is so


def test_every_file_is_in_a_wing_of_the_table():
    assert {wing_of(module_of(p)) for p in FILES} == MAY_IMPORT.keys()


def test_imports_run_downwards():
    order = list(MAY_IMPORT)
    for wing, others in MAY_IMPORT.items():
        above = order[: order.index(wing)]
        assert not others & set(above), wing


def test_rewards_know_nothing_of_diffalign():
    for path in (ROOT / "rewards").rglob("*.py"):
        assert not [m for m in imported(path) if m.partition(".")[0] == "diffalign"], path


def test_the_world_imports_nothing_of_its_workshop():
    workshop = "diffalign.emoji_world.workshop"
    for path in FILES:
        if not module_of(path).startswith(workshop):
            assert not [m for m in imported(path) if m.startswith(workshop)], path


@pytest.mark.parametrize("cls", [Batch, Transitions, Matches, Samples, Rollout, Credit, Learner])
def test_what_the_loop_hands_on_is_typed(cls):
    hints = get_type_hints(cls)
    assert {f.name for f in fields(cls)} <= hints.keys()
    assert [name for name, hint in hints.items() if hint in (Any, Any | None)] == []


def test_no_library_file_is_long():
    files = [*FILES, *(ROOT / "rewards").rglob("*.py")]
    lengths = {str(p): len(p.read_text("utf-8").splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
