"""What answers at once: help, versions, listings, refusals and plans, by what they import."""

import errno
import inspect
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import pytest

import rewards
from diffalign import __version__, algorithms, optimize_noise
from diffalign.algorithms import Needs
from diffalign.commands import cli
from diffalign.commands.help import KINDS, listing
from diffalign.config.decoding import Bounds, field_types
from diffalign.config.source import REQUIRED, Subject
from rewards import RewardError
from rewards.device import choose_device, default_device

ROOT = Path(__file__).parents[1]
SLOW = ("torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "torchvision")
CONFIG = "configs/emoji_draft_clip.yaml"


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> tuple[int, str, str, set[str]]:
    """Exit status, output, errors, and what of SLOW was imported, by a `diffalign` command."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('imported', *(m for m in {SLOW} if m in sys.modules)))\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "from diffalign.commands import cli; cli.measured = lambda settings: ''; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    out, _, imported = done.stdout.rpartition("imported")
    return done.returncode, out, done.stderr, set(imported.split())


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ([], 0, "serve-rewards  serve rewards over HTTP"),
        (["--version"], 0, f"diffalign {__version__}"),
        (["train", "--version"], 0, f"diffalign {__version__}"),
        *((
            [name, "--help"], 0, "usage:") for name in cli.COMMANDS
        ),
        (["algorithms"], 0, "draft       gradient    arXiv 2309.17400  Maximise"),
        (["rewards", "jpeg"], 0, "(95; an integer from 1 to 100)"),
        (["searches", "best-of-n"], 0, "--best-of-n.n INT  (16; 1 or more)"),
        (["trian"], 2, "did you mean 'train'"),
        (["algorithms", "ddop"], 1, "there is no algorithm 'ddop'; did you mean 'ddpo'?"),
        (["sample", "--steps", "x"], 2, "invalid int value"),
        (["sample"], 1, "--prompts is missing"),
        (["sample", "--reno", "--dno"], 1, "one method at a time"),
        (["score"], 2, "required"),
        (["grid"], 2, "required"),
        (["serve-rewards", "--reward", "jpg"], 1, "did you mean 'jpeg'"),
        (["train", "nowhere.yaml"], 1, "cannot read nowhere.yaml"),
        (["train", CONFIG, "--train.lrr", "1"], 1, "did you mean 'train.lr'"),
        (["train", CONFIG, "--train.lr", "fast"], 1, "train.lr='fast'"),
        (["train", CONFIG, "--train.lr", "-1"], 1, "train.lr=-1.0 must be more than 0"),
        (["train", CONFIG, "--algorithm.type", "ppo"], 1, "unknown algorithm 'ppo'"),
        (["train", CONFIG, "--data.prompts", "no.txt"], 1, "prompt file no.txt does not exist"),
    ],
)  # fmt: skip
def test_help_and_refusals_import_nothing_slow(command, status, said):
    found, out, errors, imported = run(*command)
    assert found == status, errors
    assert said in out + errors
    assert "Traceback" not in errors
    charts = command[:1] in (["report"], ["film"], ["blind"])  # of one package, which draws them
    assert imported <= ({"matplotlib"} if charts else set())


def test_modules_that_moved_are_found_by_their_former_names():
    code = """
import sys, warnings
warnings.simplefilter("error")
import diffalign
assert not {"diffalign.commands", "diffalign.drawing", "diffalign.config.prompts"} & {*sys.modules}
from diffalign.prompts import Prompt
import diffalign.cli
from diffalign import prompts
assert not {"torch", "diffalign.drawing"} & {*sys.modules}
warnings.simplefilter("ignore")  # those of torch are not ours
from diffalign.compare import compare
from diffalign.grids import comparison_grid
from diffalign.rollout import Sampling, Surrogate
import diffalign.commands.cli, diffalign.commands.grid, diffalign.config.prompts
import diffalign.drawing.grids, diffalign.sampling.adjoint, diffalign.sampling.rollout
assert prompts is diffalign.config.prompts
assert prompts.__spec__.name == prompts.__name__ == Prompt.__module__ == "diffalign.config.prompts"
assert diffalign.cli is diffalign.commands.cli
assert compare is diffalign.commands.grid.compare
assert comparison_grid is diffalign.drawing.grids.comparison_grid
assert Surrogate is diffalign.sampling.adjoint.Surrogate
assert Sampling is diffalign.sampling.rollout.Sampling
try:
    import diffalign.prompt
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "No module named 'diffalign.prompt'\n", done.stderr


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--dry-run"], 0),
        (["--rewards.jpeg", "1"], 1),  # is not differentiable
        (["--algorithm.last", "99"], 1),
        (["--model.resolution", "33"], 1),
        (["--model.name", "./nowhere"], 1),
        (["--model.name", "assets/emoji-flux", "--sampler.kernel", "flow_sdee"], 1),
        (["--model.name", "assets/emoji-sd3", "--dry-run"], 0),
    ],
)
def test_a_plan_imports_torch_at_most(options, status):
    found, out, errors, imported = run("train", CONFIG, *options)
    assert found == status, errors
    assert ("denoiser calls" in out) == (status == 0)
    assert ("error: " in errors) == (status == 1)
    assert imported <= {"torch"}


def annotated(hint: Any) -> list[Bounds]:
    return list(hint.__metadata__) if get_origin(hint) is Annotated else []


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_the_options_of_an_algorithm_are_read_as_python_has_them(name):
    cls = algorithms.ALGORITHMS[name]
    subject = Subject(algorithms.ALGORITHMS.places[name])
    options = {o.name: o for o in subject.options}
    assert {k: o.type for k, o in options.items()} == field_types(cls)
    for f in fields(cls):
        if f.init:
            assert options[f.name].default == f.default != MISSING
            assert options[f.name].doc
    assert inspect.getdoc(cls) == subject.doc
    assert KINDS["algorithms"].gives(subject) == (cls.needs.name.lower(), cls.needs.value)
    for option, o in options.items():
        if o.range:  # what the range excludes is refused
            with pytest.raises(ValueError, match=option):
                algorithms.build({"type": name, option: -1})


@pytest.mark.parametrize("name", rewards.REGISTRY)
def test_the_options_of_a_reward_are_read_as_python_has_them(name):
    target = rewards.REGISTRY[name]
    subject = Subject(rewards.REGISTRY.places[name])
    given = getattr(target, "keywords", {})  # of a functools.partial
    parameters = {k: p for k, p in inspect.signature(target).parameters.items() if k not in given}
    empty = inspect.Parameter.empty
    defaults = {k: REQUIRED if p.default is empty else p.default for k, p in parameters.items()}
    assert {o.name: o.default for o in subject.options} == defaults
    cls: Any = getattr(target, "func", target)
    assert inspect.getdoc(cls) == subject.doc
    gives = KINDS["rewards"].gives(subject)[0]
    if gives in ("yes", "no"):
        assert cls.differentiable == (gives == "yes")
    assert name in listing("rewards")


@pytest.mark.parametrize("name", optimize_noise.METHODS)
def test_the_options_of_a_search_are_read_as_python_has_them(name):
    method = optimize_noise.METHODS[name]
    hints = get_type_hints(method, include_extras=True)
    subject = Subject(optimize_noise.METHODS.places[name])
    positional = [
        p for p in inspect.signature(method).parameters.values()
        if p.kind is not p.KEYWORD_ONLY and p.name != "task"
    ]  # fmt: skip
    assert [(o.name, o.default) for o in subject.options] == [
        (p.name, p.default) for p in positional
    ]
    for o in subject.options:
        assert o.type == hints[o.name]
        assert o.range == "".join(map(str, annotated(hints[o.name])))
    assert subject.source  # a paper


def test_what_a_listing_says():
    text = listing("searches", "flow-map")
    assert "rewards with a gradient to the pixels if `gradient`" in text
    assert "--flow-map.gradient FLOAT" in text
    assert "diffalign sample --flow-map --flow-map.particles 4" in text
    text = listing("rewards", "remote")
    assert "--rewards.remote.url VALUE" in text
    assert "(required)" in text
    assert "diffalign train CONFIG.yaml --rewards.remote.url URL --rewards.remote.name NAME" in text
    assert "makes it a constraint on its mean" in text
    assert "a gradient to the pixels if `surrogate`" in listing("rewards", "jpeg_incompressibility")
    text = listing("algorithms", "awm")
    assert Needs.FINAL.value in text
    assert "(1.0; above 0)  ε of the ratio" in text


class Stop(KeyboardInterrupt):
    signum = 15


def test_one_way_to_fail(capsys, monkeypatch):
    def status(error: BaseException) -> int:
        def command(arguments):
            raise error

        return cli.guarded(command)([])

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.csv")
    for error, text in (
        (ValueError("a is wrong; use b"), "a is wrong; use b"),
        (full, "runs/x/metrics.csv: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied; ch"),
        (FileNotFoundError("no metrics.jsonl in x"), "no metrics.jsonl in x"),
        (RewardError("clip failed", "clip"), "clip failed"),
        (ImportError("rapidocr: pip install it"), "rapidocr: pip install it"),
        (MemoryError(), "out of memory; take fewer pictures at a time"),
    ):
        assert status(error) == 1
        assert capsys.readouterr().err.startswith(f"error: {text}")
    assert status(KeyboardInterrupt()) == 130
    assert status(Stop()) == 143
    assert capsys.readouterr() == ("", "")
    with pytest.raises(AttributeError):  # a bug keeps its traceback
        status(AttributeError("x"))
    monkeypatch.setenv("DIFFALIGN_DEBUG", "1")
    with pytest.raises(ValueError, match="a is wrong"):
        status(ValueError("a is wrong"))


def test_the_device_of_a_command(capsys, tmp_path):
    choose_device("cpu")
    assert default_device() == "cpu"
    for device in ("nonsense", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=rf"--device {device} cannot be used .*has cpu"):
            choose_device(device)
    assert default_device() == "cpu"
    for command in (
        ["sample", "--prompts", "a cat"],
        ["grid", "--prompts", "a cat"],
        ["eval"],
        ["score", str(tmp_path), "--reward", "jpeg"],
        ["serve-rewards", "--reward", "jpeg"],
    ):
        assert cli.COMMANDS[command[0]][0]([*command[1:], "--device", "nonsense"]) == 1
        assert "--device nonsense cannot be used" in capsys.readouterr().err
    choose_device(None)


def test_a_reader_that_has_seen_enough():
    process = subprocess.Popen(
        [sys.executable, "-m", "diffalign", "rewards"], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
