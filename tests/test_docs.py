"""What README, docs and configs name is there, and their examples are accepted."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from diffalign import algorithms
from diffalign.algorithms import Needs
from diffalign.config import TrainConfig
from diffalign.config.decoding import section_keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page: page.read_text("utf-8") for page in PAGES}
TESTS = "\n".join(p.read_text("utf-8") for p in (ROOT / "tests").glob("test_*.py"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def anchors(text):
    """The fragments of a page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"https?:", target):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not fragment or fragment in anchors(file.read_text("utf-8")), target


@pages
def test_named_files_and_modules_are_there(page):
    folders = "configs|assets|docs|diffalign|rewards|tests|benchmarks"
    for name in re.findall(rf"(?<![\w./])((?:{folders})/[\w./-]*\w)", TEXTS[page]):
        assert name == "configs/NAME.yaml" or (ROOT / name).exists(), name
    for module in re.findall(r"python -m (diffalign[\w.]*)", TEXTS[page]):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module


@pages
def test_named_tests_and_targets_are_there(page):
    for name in re.findall(r"\btest_\w+(?!\w*\.py)\b", TEXTS[page]):
        assert f"def {name}(" in TESTS or (ROOT / f"tests/{name}.py").exists(), name
    for file, word in re.findall(r"pytest (tests/\w+\.py) -k (\w+)", TEXTS[page]):
        if word.islower():
            assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text("utf-8")), word
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([\w-]+)", TEXTS[page], re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pages
def test_named_settings_are_there(page):
    known = set(section_keys(TrainConfig)) | {"algorithm.type"}
    for kind in algorithms.ALGORITHMS.values():
        known |= {f"algorithm.{f.name}" for f in dataclasses.fields(kind)}
    sections = "model|algorithm|sampler|data|advantage|train|eval|log"
    found = re.findall(rf"(?<![\w./-])(?:--)?((?:{sections})\.[a-z_0-9]+)(?![\w(])", TEXTS[page])
    files = ("py", "txt", "jsonl", "safetensors", "yaml")
    assert {k for k in found if k.partition(".")[2] not in files} <= known


def papers():
    """(config, arguments) of every row of the table of algorithms in papers.md."""
    for line in TEXTS[ROOT / "docs" / "papers.md"].partition("## Without")[0].splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 5 and "`" in cells[2]:
            commands = [c for c in re.findall(r"`([^`]*)`", cells[3]) if c.startswith("--")]
            for name in re.findall(r"`([^`]*)`", cells[2]):
                yield from ((name, command) for command in ("", *commands))


@pytest.mark.parametrize(("name", "command"), papers())
def test_commands_of_papers_are_accepted(name, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    # an option alone names what it changes, "gaussian" beside "--algorithm.truncation bernoulli"
    config = TrainConfig.from_file(f"configs/{name}.yaml", shlex.split(command))
    algorithm = algorithms.build(config.algorithm)
    config.check(advantages=algorithm.needs is not Needs.GRADIENT)


def test_every_fault_names_tests_that_are_there():
    """docs/reliability.md: at least 30 faults, each with the tests that show it."""
    rows = re.findall(r"^\| \d+ \|.*\|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
    assert len(rows) >= 30
    known = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]))
        assert named, row
        assert named <= known, named - known
