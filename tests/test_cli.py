"""The commands as a user types them: clear errors before any model is loaded, and whole runs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import rewards
from diffalign import TrainConfig, algorithms, policies
from diffalign.algorithms import Needs
from diffalign.commands import cli, search, timing
from diffalign.commands.timing import Measured, words
from diffalign.record import checkpoint
from diffalign.record.metrics import read_metrics
from diffalign.sampling import pipeline
from diffalign.training.cost import Cost
from diffalign.training.plan import Plan

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(pipelines, tmp_path):
    """A small config file on the tiny pipeline."""
    (tmp_path / "prompts.txt").write_text("a red dog\na cat\na blue bus\na tree\n")
    tree = {
        "model": {"name": pipelines["sd-v"], "lora_rank": 2},
        "algorithm": {"type": "ddpo"},
        "sampler": {"steps": 4, "batch": 8},
        "rewards": {"jpeg": 1.0},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "groups": 4, "group_size": 2},
        "train": {"epochs": 2},
        "eval": {"prompts": str(tmp_path / "prompts.txt"), "steps": 4, "images_per_prompt": 1},
        "log": {"dir": str(tmp_path / "run")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def no_models(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(policies, "load", refuse)
    monkeypatch.setattr(cli, "measured", lambda settings: "")  # by a process of its own


def test_help_is_grouped_and_names_everything(capsys):
    assert cli.train(["--help"]) == 0
    text = capsys.readouterr().out
    for piece in ("--train.lr FLOAT", "--rewards.jpeg 1.0", "--dry-run", "--resume"):
        assert piece in text
    assert "algorithm ddpo: Policy gradient" in text
    assert "--algorithm.last" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.lrr", "1"], r"train\.lrr.*did you mean 'train\.lr'"),
        (["--algorithm.type", "ppo"], r"unknown algorithm 'ppo'.*(ddpo.*draft|did you mean)"),
        (["--algorithm.clip_rang", "1"], r"clip_rang.*clip_range"),
        (["--rewards.jpg", "1"], r"jpg.*jpeg, jpeg_incompressibility"),
        (["--rewards.jpeg", "null"], "no reward"),
        (["--data.prompts", "nowhere.txt"], "prompt file nowhere.txt does not exist"),
        (["--train.updates_per_epoch", "3"], r"updates_per_epoch=3 does not divide the 8 images"),
        (["--data.groups", "5"], r"data\.groups=5"),
        (["--model.name", "./nothing"], "is not a folder"),
        (["--model.resolution", "33"], r"resolution=33 is not a multiple of 2.*nearest is 32"),
        (["--model.tiny_vae", "./nothing"], r"tiny_vae='./nothing' is neither the folder"),
        (["--log.trackers", "[tensorbored]"], "tensorboard"),
        (
            ["--model.dtype", "fp16"],
            r"dtype=.fp16. is not known; valid: .*float16",
        ),
        (
            ["--algorithm", "{type: draft}", "--rewards.jpeg", "1"],
            r"rewards\.jpeg is not differentiable.*surrogate",
        ),
        (
            ["--algorithm", "{type: draft, last: 9}", "--rewards", "{jpeg: {surrogate: true}}"],
            r"last=9 exceeds sampler\.steps=4",
        ),
        (["--eval.steps", "2000"], "2000 steps .* more than this model was trained for"),
        (["--sampler.window", "4"], r"window=4 is wider than the 3 stochastic steps .* at most 3"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    config, capsys, no_models, arguments, message
):
    assert cli.train([str(config), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert re.search(message, error), error


def test_prompts_that_are_not_utf8(config, capsys, no_models, tmp_path):
    (tmp_path / "latin.txt").write_bytes("a café\n".encode("latin1"))
    assert cli.train([str(config), "--data.prompts", str(tmp_path / "latin.txt")]) == 1
    assert "is not UTF-8" in capsys.readouterr().err


def test_dry_run_prices_the_run(config, capsys, no_models):
    options = ["--train.micro_batch", "10", "--eval.guidance", "3"]
    assert cli.train([str(config), "--dry-run", *options]) == 0
    text = capsys.readouterr().out
    assert "4 prompts x 2 images = 8 samples" in text
    # three of the four steps are stochastic: 24 pairs in micro-batches of 10
    assert "24 (sample, step) pairs" in text
    assert "3 micro-batch(es) of 10, the last of 4" in text
    # 8 samples x 4 steps sampled + 24 pairs trained an epoch, 4 prompts x 4 steps x CFG evaluated
    # twice, and two calls a picture for the distance to the base model at the end
    assert "2 epochs: 192 denoiser calls" in text


def test_dry_run_measures_a_call(config, capsys):
    assert cli.train([str(config), "--dry-run"]) == 0
    text = capsys.readouterr().out
    found = re.search(
        r"time +about (\S+) (s|min) an epoch and (\S+) s an evaluation, (\S+) (s|min) in all, "
        r"\d+% of it evaluation\n +measured once on \w+: (\S+) ms a denoiser call \(8 pictures at "
        r"a time\), (\S+) ms with gradient, (\S+) ms a picture decoded; rewards and loading left",
        text,
    )
    assert found, text
    assert all(float(found[i]) > 0 for i in (1, 3, 4, 6, 7, 8))
    assert re.search(r"memory +(\S+) MiB of tensors at most, in the update", text), text


def test_dry_run_says_what_cannot_be_measured(config, monkeypatch, capsys):
    def poor(plan):
        raise RuntimeError("not enough memory\nat all")

    monkeypatch.setattr(timing, "measure", poor)
    monkeypatch.setattr(sys, "argv", ["timing", str(config)])
    timing.main()
    memory, _, time = capsys.readouterr().out.partition("time")
    assert memory.startswith("memory     ")
    assert time == "       not measured: not enough memory\n"
    monkeypatch.setattr(timing.sys, "executable", "/bin/false")
    assert timing.measured([str(config)]) == "time       not measured: status 1"


def test_time_of_a_run_from_that_of_a_call():
    cost = Cost(
        sampled=100, learned=60, carried=40, what="", epochs=10, samples=8, evaluations=3,
        pictures=5, evaluated=50, distance=10,
    )  # fmt: skip
    assert (cost.epoch, cost.whole) == (160, 10 * 160 + 3 * 50 + 2 * 10)
    assert cost.share == pytest.approx(170 / (1770 + 10 * 2 * 40))
    # an epoch: 120 calls of 0.1 s, 40 of 0.2 s, 8 pictures decoded with gradient at 3 x 0.5 s;
    # an evaluation: 50 calls and 5 pictures; 20 calls for the distance to the base
    text = Measured(0.1, 0.2, 0.5, 4, "cpu").describe(cost, gradient=True)
    assert "about 32 s an epoch and 7.5 s an evaluation, 5.74 min in all, 7% of it" in text
    assert [words(t) for t in (0.421, 12.3, 119, 210, 7560)] == [
        "0.42 s", "12 s", "119 s", "3.5 min", "2.1 h",
    ]  # fmt: skip


def test_evaluation_is_a_third_of_the_readme_config_and_is_noted_where_it_dominates(monkeypatch):
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])  # type: ignore[index]
    plan = Plan.make(TrainConfig.from_dict(tree))
    assert Cost.of(plan).share < 0.35
    assert "of the run: raise eval.every" not in plan.describe()
    tree["eval"] |= {"every": 2, "guidance": 3.0}
    text = Plan.make(TrainConfig.from_dict(tree)).describe()
    assert re.search(r"note +evaluation takes \d\d% of the run: raise eval\.every, or lower", text)


def test_dry_run_counts_what_the_run_does(config, capsys):
    from diffalign import Trainer

    loaded = TrainConfig.from_file(config)
    priced = int(re.search(r"epochs: ([\d,]+)", Plan.make(loaded).describe())[1].replace(",", ""))  # type: ignore[index]
    trainer = Trainer(loaded)
    trainer.train()
    assert trainer.policy.calls == priced


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = TrainConfig.from_file(path)
    assert config.log.dir == f"runs/{path.stem}"
    algorithm = algorithms.build(config.algorithm)
    config.check(advantages=algorithm.needs is not Needs.GRADIENT)
    rewards.check(config.rewards)
    if Path(config.model.name).exists():  # others are on the hub
        assert "denoiser calls" in Plan.make(config).describe()


README = (ROOT / "README.md").read_text("utf-8")


def readme_commands(program):
    lines = re.findall(rf"^(?:accelerate launch|python) {program}\.py (.*)$", README, re.MULTILINE)
    assert lines
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("arguments", readme_commands("train"), ids=" ".join)
def test_readme_train_commands(arguments, monkeypatch, tmp_path, no_models):
    (tmp_path / "my_rewards.py").write_text(
        "def redness(images, prompts): return images[:, 0, 0, 0]"
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.train([*arguments, "--dry-run"]) == 0


@pytest.mark.parametrize("arguments", readme_commands("sample"), ids=" ".join)
def test_readme_sample_commands(arguments, monkeypatch):
    called = []
    monkeypatch.setattr(pipeline, "draw", called.append)
    monkeypatch.setattr(search, "run", lambda *search: called.append(search[-1]))
    assert cli.sample(arguments) == 0
    assert pipeline.parse_seeds(called[0].seeds)


def test_readme_config_and_python(monkeypatch, tmp_path):
    """The example config is accepted, and the Python example trains the embedded model."""
    monkeypatch.chdir(ROOT)
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])  # type: ignore[index]
    Plan.make(TrainConfig.from_dict(example))
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Trainer" in b)
    small = ["--train.epochs", "1", "--sampler.steps", "4", "--data.groups", "2"]
    small += ["--sampler.batch", "2", "--eval.prompts", "null", "--log.dir", str(tmp_path / "run")]
    from_file = TrainConfig.from_file
    monkeypatch.setattr(TrainConfig, "from_file", lambda path: from_file(path, small))

    def my_function(images, prompts):
        return images.mean((1, 2, 3))

    my_function.differentiable = True  # type: ignore[attr-defined]
    exec(code, {"my_function": my_function})
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["rewards"]["clip"] == {"model": "assets/emoji-clip", "weight": 1.0}
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_train_and_sample(config, tmp_path, capsys):
    assert cli.train([str(config)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"held-out prompts +before +after +change ± s.e.\nreward .* ± \d", text)
    assert "\nThe guard: " in "\n".join(text.rstrip().splitlines()[-4:])
    run = tmp_path / "run"
    for name in ("curve.png", "grid.png"):
        assert str(run / name) in text
        assert Image.open(run / name).size[0] > 100
    assert f"report   {run / 'report.html'}" in text
    model = yaml.safe_load(config.read_text())["model"]["name"]
    out, grid = tmp_path / "pictures", tmp_path / "out.png"
    arguments = ["--lora", str(run), "--prompts", "a red apple", "a cat"]
    arguments += ["--seeds", "0-2", "--compare"]
    assert cli.sample([*arguments, "--grid", str(grid), "--out", str(out)]) == 0
    assert f"as in {run / 'config.yaml'}: model {model}" in capsys.readouterr().out
    assert len(list(out.glob("*.png"))) == 12
    assert json.loads(Image.open(grid).info["diffalign"])["steps"] == 4


def test_train_and_sample_a_whole_denoiser(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measured", lambda settings: "")
    whole = ["--model.lora_rank", "0", "--model.resolution", "16"]
    assert cli.train([str(config), "--dry-run", *whole]) == 0
    assert "all weights of the denoiser" in capsys.readouterr().out
    assert cli.train([str(config), *whole]) == 0
    run, model = tmp_path / "run", yaml.safe_load(config.read_text())["model"]["name"]
    assert str(run) in capsys.readouterr().out
    arguments = ["--model", model, "--prompts", "a cat", "--seeds", "0", "--resolution", "16"]
    arguments += ["--grid", str(tmp_path / "grid.png"), "--out", str(tmp_path / "pictures")]
    assert cli.sample([*arguments, "--lora", str(run), "--compare"]) == 0
    base, tuned = (Image.open(p) for p in sorted((tmp_path / "pictures").glob("*.png")))
    assert base.size == tuned.size == (16, 16)
    assert base.tobytes() != tuned.tobytes()
    assert cli.sample([*arguments, "--lora", str(run), "--lora-scale", "0.5"]) == 1
    assert re.search("holds a whole unet; leave it out", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "a-b"], "--seeds 'a-b' is not understood"),
        (["--compare"], "give --lora"),
        (["--model", "./nothing"], "is not a folder"),
        (["--lora", "."], r"no \.safetensors"),
    ],
)
def test_bad_sampling_input(pipelines, arguments, message, capsys):
    base = ["--model", pipelines["sd-epsilon"], "--prompts", "a cat"]
    assert cli.sample(base + arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def environment():
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


HANGS = """
import threading, time
calls = 0
def reward(images, prompts):
    global calls
    calls += 1
    time.sleep(600 if calls == 9 else 0.01)  # beside the thread that trains
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize(("name", "hangs"), [("SIGINT", False), ("SIGTERM", True)])
def test_a_signal_keeps_what_was_trained(config, tmp_path, monkeypatch, name, hangs):
    number = getattr(signal, name)
    command = [sys.executable, "train.py", str(config), "--train.epochs", "100000"]
    if hangs:  # one call evaluates the base, then one an epoch
        (tmp_path / "hanging.py").write_text(HANGS)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        command += ["--rewards", "{'hanging:reward': 1.0}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # a shell's background job inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > (8 if hangs else 3):
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err.decode()
    assert b"--resume goes on" in out
    assert f"stopped by {name}".encode() in out
    assert checkpoint.found(tmp_path / "run")
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def launch(n, config, run, *overrides):
    """The exit status of train.py on n processes with gloo.

    torch sets here what `accelerate launch` sets on several GPUs; on a CPU the latter needs MPI
    and without it starts a single process, which would compare nothing.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    command += ["--standalone", "train.py", str(config), "--log.dir", str(run), *overrides]
    env = environment() | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=env, timeout=240).returncode


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(config, tmp_path, monkeypatch):
    import torch

    (tmp_path / "ranked.py").write_text(
        "import os, pathlib\n"
        "def reward(images, prompts):\n"
        "    name = f\"{os.environ['RANK']}of{os.environ['WORLD_SIZE']}\"\n"
        "    (pathlib.Path(__file__).parent / name).touch()\n"
        "    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    states = []
    for n in (1, 2):
        run = tmp_path / f"run{n}"
        reward = ["--rewards", "{'ranked:reward': 1.0}", "--train.inner_epochs", "2"]
        assert launch(n, config, run, *reward) == 0
        state = checkpoint.load(run)
        states.append(torch.cat([v.flatten() for v in state["adapter"].values()]))
    assert {p.name for p in tmp_path.glob("?of?")} == {"0of1", "0of2", "1of2"}
    assert (states[0] - states[1]).norm() < 1e-4 * states[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_a_signal_to_two_processes_keeps_what_was_trained(config, tmp_path, how):

    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "train.py", str(config), "--log.dir", str(run)]
    command += ["--train.epochs", "100000", "--train.checkpoint_every", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment() | {"ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 90
    while time.time() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)) > 3:
            break
        time.sleep(0.1)
    done = read_metrics(run)[-1]["step"]
    if how == "SIGTERM":  # the launcher passes it on
        process.terminate()
    else:  # a terminal sends it to all, and then the launcher a SIGTERM
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=25) != 0  # the launcher kills after 30 s
    assert checkpoint.load(run)["epoch"] >= done


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_on_all(
    config, tmp_path, monkeypatch
):

    (tmp_path / "poisoned.py").write_text(
        "import os\n"
        "calls = 0\n"
        "def reward(images, prompts):\n"
        "    global calls\n"
        "    calls += images.requires_grad\n"
        "    value = images.mean((1, 2, 3))\n"
        "    if os.environ.get('RANK') == '1' and calls == 2:\n"
        "        value = value + (images * 0).square().sum((1, 2, 3)).sqrt()\n"
        "    return value\n"
        "reward.differentiable = True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = tmp_path / "run"
    options = ["--rewards", "{'poisoned:reward': 1.0}", "--algorithm", "{type: draft, last: 1}"]
    assert launch(2, config, run, *options, "--train.epochs", "4") == 0
    assert [row.get("skipped_steps") for row in read_metrics(run)] == [None, 0, 1, 0, 0]
    adapter = checkpoint.load(run)["adapter"]
    assert all(v.isfinite().all() for v in adapter.values())


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_all_and_loses_nothing(
    config, tmp_path, monkeypatch
):

    (tmp_path / "failing_rank.py").write_text(
        "import os\n"
        "calls = 0\n"
        "def reward(images, prompts):\n"
        "    global calls\n"
        "    calls += 1\n"
        # one call evaluates the base, one more an epoch
        "    if os.environ['RANK'] == '1' and calls == 4:\n"
        "        raise ValueError('no')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = ["--rewards", "{'failing_rank:reward': 1.0}", "--train.epochs", "50"]
    run = tmp_path / "run"
    assert launch(2, config, run, *reward, "--train.checkpoint_every", "0") != 0
    assert checkpoint.load(run)["epoch"] == 2
    assert (run / "failed_reward.png").exists()
    assert (run / "pytorch_lora_weights.safetensors").exists()


def test_there_are_configs():
    assert list((ROOT / "configs").glob("*.yaml"))  # or the test of every config tests none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "./missing"], r"--lora './missing' does not exist"),
        (["--lora", "missing.safetensors"], r"--lora 'missing.safetensors' does not exist"),
        (["--grid", "grid.jpg"], r"does not end in \.png"),
    ],
)
def test_bad_sampling_files_are_refused_before_the_pipeline_is_loaded(
    pipelines, arguments, message, capsys, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr("diffalign.policies.pipeline", refuse)
    assert cli.sample(["--model", pipelines["sd-epsilon"], "--prompts", "a cat", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_the_summary_of_a_run_whose_report_cannot_be_read(tmp_path):
    """Training is done: means and paths are printed all the same."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/reward": 1.0}\n')
    (tmp_path / "pictures" / "epoch_0000.json").write_text("{")
    (tmp_path / "pictures" / "epoch_0000.webp").touch()
    text = cli.summary({"before": {}, "after": {"eval/reward": 2.0}}, tmp_path)
    assert re.search(r"reward +nan +2.0000\n", text)
    assert text.rstrip().endswith(f"weights  {tmp_path}")
