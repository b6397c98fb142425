"""The house stays one: which wing may import which, read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# each may import those after it that it names, and itself; CONTRIBUTING.md shows the same table
MAY_IMPORT = {
    "__main__": {"commands"},
    "commands": {
        *("training", "algorithms", "optimize_noise", "report", "emoji_world"),
        *("sampling", "policies", "record", "drawing", "config", "rewards"),
    },
    "emoji_world": {"sampling", "policies", "drawing", "config", "rewards"},
    "training": {
        *("algorithms", "report", "sampling", "policies", "record", "drawing", "config"),
        *("dynamics", "verdict", "rewards"),
    },
    "algorithms": {"sampling", "policies", "config", "dynamics", "rewards"},
    "optimize_noise": {"sampling", "policies", "config", "dynamics", "rewards"},
    "report": {"record", "drawing", "config", "verdict", "rewards"},
    "sampling": {"policies", "drawing", "config", "dynamics", "rewards"},
    "record": {"policies", "drawing", "config", "rewards"},
    "policies": {"config", "dynamics", "rewards"},
    "drawing": {"config", "verdict", "rewards"},
    "config": {"rewards"},
    "dynamics": set(),
    "verdict": set(),
    "rewards": set(),
}
FILES = sorted(
    p for folder in ("diffalign", "rewards") for p in (ROOT / folder).rglob("*.py")
    if p != ROOT / "diffalign/__init__.py"
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
def test_a_wing_imports_what_it_may(wing):
    files = [p for p in FILES if wing_of(module_of(p)) == wing]
    assert files
    found = {wing_of(m): f"{p.relative_to(ROOT)} imports {m}" for p in files for m in ours(p)}
    assert {k: v for k, v in found.items() if k not in MAY_IMPORT[wing] | {wing}} == {}
    assert MAY_IMPORT[wing] <= found.keys()  # the table says no more than is so


def test_every_file_is_in_a_wing():
    assert {wing_of(module_of(p)) for p in FILES} == MAY_IMPORT.keys()


def test_no_two_wings_import_each_other():
    seen = list(MAY_IMPORT)
    for wing, others in MAY_IMPORT.items():
        assert all(seen.index(other) > seen.index(wing) for other in others), wing


def test_the_world_imports_nothing_of_its_workshop():
    workshop = "diffalign.emoji_world.workshop"
    for path in FILES:
        if not module_of(path).startswith(workshop):
            assert not [m for m in imported(path) if m.startswith(workshop)], path


def test_no_library_file_is_long():
    lengths = {p: len(p.read_text("utf-8").splitlines()) for p in FILES}
    assert {str(p): n for p, n in lengths.items() if n > 400} == {}
