"""The run folder: what may change on resume, damaged checkpoints, one run at a time."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import test_trainer
import torch
import yaml
from test_trainer import adapter, redness

from diffalign import ConfigError, TrainConfig, __version__, policies
from diffalign.algorithms.ddpo import DDPO
from diffalign.commands import cli
from diffalign.config.decoding import section_keys
from diffalign.config.files import write_atomic
from diffalign.record import checkpoint, folder
from diffalign.training import identity
from diffalign.training.plan import Plan

make = test_trainer.make  # the fixture
QUICK = {"eval.prompts": None, "data.groups": 2, "train.checkpoint_every": 1}


@pytest.fixture
def planned(pipelines, tmp_path):
    """planned(**{"train.seed": 1, "algorithm": {...}}) -> Plan."""
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na bus\na tree\n")
    tree = {
        "model": {"name": pipelines["sd-v"], "lora_rank": 2},
        "sampler": {"steps": 4},
        "rewards": {"jpeg": 1.0, "remote": {"url": "http://a", "name": "x"}},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "groups": 2, "group_size": 4},
        "eval": {"prompts": str(tmp_path / "prompts.txt"), "rewards": {"jpeg": 1.0}},
        "log": {"dir": str(tmp_path / "run")},
    }

    def planned(rewards=None, **overrides):
        mine = copy.deepcopy(tree)
        for key, value in overrides.items():
            *path, last = key.split("/")
            node = mine
            for name in path:
                node = node.setdefault(name, {})
            node[last] = value
        return Plan.make(TrainConfig.from_dict(mine), rewards)

    return planned


def changes(before, after, run_dir=Path("nowhere")):
    return identity.changes(run_dir, {"run": {"settings": identity.settings(before)}}, after)


MAY = {
    "train/epochs": 99,
    "train/lr": 1e-5,
    "train/lr_schedule": "cosine",
    "train/warmup": 3,
    "train/weight_decay": 0.1,
    "train/max_grad_norm": 9.0,
    "train/micro_batch": 3,
    "train/checkpoint_every": 3,
    "train/max_denoiser_calls": 10**6,
    "model/gradient_checkpointing": True,
    "model/free_text_encoders": False,
    "model/decode_batch": 2,
    "sampler/batch": 3,
    "eval/every": 3,
    "eval/grid_prompts": 3,
    "eval/guard": "stop",
    "log/dir": "elsewhere",
    # what was the default is still the same when it is written out
    "sampler/guidance": 1.0,
    "algorithm/clip_range": 1e-4,
    "rewards/jpeg": {"weight": 1.0},
    # where a reward is served
    "rewards/remote": {"url": "http://b", "name": "x", "timeout": 9.0, "patience": 1.0},
}


def test_what_may_change(planned):
    before = planned()
    assert changes(before, planned(**MAY)) == {}
    assert identity.digest(identity.settings(before)) == identity.digest(
        identity.settings(planned(**MAY))
    )
    known = {*section_keys(TrainConfig)}
    assert known >= identity.MAY_CHANGE


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train/seed", 1, {"train.seed": "0 -> 1"}),
        ("train/ema", 0.9, {"train.ema": "0.0 -> 0.9"}),
        ("train/optimizer", "adamw", {}),
        ("train/inner_epochs", 2, {"train.inner_epochs": "1 -> 2"}),
        ("model/dtype", "bfloat16", {"model.dtype": '"float32" -> "bfloat16"'}),
        ("model/lora_rank", 0, {"model.lora_rank": "2 -> 0"}),
        ("model/lora_alpha", 4.0, {"model.lora_alpha": "null -> 4.0"}),
        ("sampler/steps", 5, {"sampler.steps": "4 -> 5", "eval.steps": "4 -> 5"}),
        ("sampler/window", 2, {"sampler.window": "null -> 2"}),
        ("data/group_size", 2, {"data.group_size": "4 -> 2"}),
        ("eval/images_per_prompt", 1, {"eval.images_per_prompt": "2 -> 1"}),
        ("eval/prompts", None, {"eval.prompts": "other texts"}),
        ("eval/rewards", {}, {"eval.rewards.jpeg.weight": "1.0 -> null"}),
        ("advantage/std", "group", {"advantage.std": '"global" -> "group"'}),
        ("algorithm/clip_range", 0.1, {"algorithm.clip_range": "0.0001 -> 0.1"}),
        ("algorithm/type", "rwr", {"algorithm.type": '"ddpo" -> "rwr"'}),
        ("rewards/jpeg", 0.5, {"rewards.jpeg.weight": "1.0 -> 0.5"}),
        ("rewards/jpeg", {"quality": 50}, {"rewards.jpeg.quality": "null -> 50"}),
    ],
)
def test_what_must_stay(planned, key, value, said):
    assert changes(planned(), planned(**{key: value})) == said


def test_a_guidance_scale_of_evaluations_leaves_the_schedule_behind(planned):
    """So that it is another setting, though the number is that of the rollouts."""
    rollouts = {"algorithm": {"type": "awm"}, "sampler/kernel": "ode", "sampler/guidance": 3.0}
    same = {"eval/guidance": 3.0}
    assert changes(planned(**rollouts), planned(**rollouts, **same)) == {}
    rollouts["sampler/guidance_until"] = 0.5
    found = changes(planned(**rollouts), planned(**rollouts, **same))
    assert found == {"eval.guidance": "null -> 3.0"}


@pytest.mark.parametrize(
    ("key", "now"), [("advantage.combine", "normalized"), ("train.gradients", "normalized")]
)
def test_a_run_of_the_former_spelling_goes_on(planned, tmp_path, key, now):
    plan = planned(**{key.replace(".", "/"): now})
    old = identity.settings(plan) | {key: "normalised"}
    assert identity.changes(Path("nowhere"), {"run": {"settings": old}}, plan) == {}
    found = identity.changes(Path("nowhere"), {"run": {"settings": old}}, planned())
    assert found == {key: '"normalized" -> "sum"'}
    # and of a version whose checkpoints do not say what they are of
    plan.config.save(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("normalized", "normalised"))
    assert identity.changes(tmp_path, {}, plan) == {}


def test_prompt_files_may_move_and_may_not_be_edited(planned, tmp_path):
    before = planned()
    moved = tmp_path / "moved.txt"
    moved.write_text((tmp_path / "prompts.txt").read_text() + "\n# a comment\n")
    assert changes(before, planned(**{"data/prompts": str(moved)})) == {}
    moved.write_text("a dog\na cat\na bus\na three\n")
    found = changes(before, planned(**{"data/prompts": str(moved)}))
    assert found == {"data.prompts": "other texts"}


def test_rewards_passed_in_python_are_known_by_their_names(planned):
    key = "rewards.test_trainer:redness.weight"
    assert changes(planned({redness: 1.0}), planned({redness: 1.0})) == {}
    assert changes(planned({redness: 1.0}), planned({redness: 2.0})) == {key: "1.0 -> 2.0"}


def test_a_checkpoint_of_an_older_version_is_compared_by_its_config(planned, tmp_path):
    before = planned()
    before.config.save(tmp_path / "config.yaml")
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["train"]["ema"]  # that version did not have it
    old["train"]["no_longer"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert identity.changes(tmp_path, {}, planned(**{"train/seed": 1})) == {}  # cannot be read
    del old["train"]["no_longer"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert identity.changes(tmp_path, {}, planned()) == {}
    seed = identity.changes(tmp_path, {}, planned(**{"train/seed": 1}))
    assert seed == {"train.seed": "0 -> 1"}


def test_changed_settings_are_refused_before_a_model_is_loaded(make, monkeypatch):
    first = make("ddpo", **QUICK)
    first.train()
    monkeypatch.setattr(policies, "load", None)
    said = r"train\.seed: 0 -> 1, model\.lora_rank: 2 -> 4|model\.lora_rank: 2 -> 4.*train\.seed"
    with pytest.raises(ConfigError, match=said) as error:
        make("ddpo", resume=True, **QUICK, **{"train.seed": 1, "model.lora_rank": 4})
    assert "--force" in str(error.value)
    assert "--overwrite" in str(error.value)


def test_what_an_algorithm_adapts_is_no_other_setting(make):
    options = {**QUICK, "algorithm.kl_weight": 1.0, "algorithm.kl_target": 1e-12, "train.epochs": 3}
    trainer = make("ddpo", **options)
    trainer.train()
    assert trainer.algorithm.kl_weight > 1
    assert make("ddpo", resume=True, **options).algorithm.kl_weight == trainer.algorithm.kl_weight


def test_force_goes_on_as_far_as_the_weights_fit(make, capsys):
    trainer = make("ddpo", **QUICK)
    trainer.train()
    for rank in (4, 0):
        with pytest.raises(
            ConfigError, match=rf"do not fit this model \(model\.lora_rank: 2 -> {rank}"
        ):
            make("ddpo", resume=True, force=True, **QUICK, **{"model.lora_rank": rank})
    # an average that is new starts from what was trained, and a new algorithm without its state
    options = {**QUICK, "train.epochs": 2, "train.ema": 0.9999, "train.lr": 1e-12}
    forced = make("dpok", resume=True, force=True, **options, **{"algorithm.value_weight": 0.5})
    out = capsys.readouterr().out
    assert "the optimisation starts anew" in out
    assert "the algorithm starts anew" in out
    assert forced.epoch == 1
    assert torch.equal(adapter(forced), adapter(trainer))
    average = forced.policy.state_dict("ema").values()
    assert torch.equal(torch.cat([v.flatten() for v in average]), adapter(trainer))
    forced.train()
    torch.testing.assert_close(adapter(forced), adapter(trainer), atol=1e-6, rtol=0)


def test_force_measures_the_base_again_for_a_new_judge(make, capsys):
    options = {"eval.prompts": None, "data.groups": 2, "eval.images_per_prompt": 1}
    del options["eval.prompts"]
    first = make("draft", **options)
    before = first.train()["before"]
    options |= {"train.epochs": 2, "eval.rewards": {"jpeg": 1.0}}
    with pytest.raises(ConfigError, match=r"eval\.rewards\.jpeg\.weight: null -> 1\.0"):
        make("draft", resume=True, **options)
    forced = make("draft", resume=True, force=True, **options)
    assert "the guard starts anew" in capsys.readouterr().out
    after = forced.train()["before"]
    assert after["eval/redness"] == before["eval/redness"]  # of the base, not of what was trained
    assert "eval/jpeg" in after


STATE = {
    "epoch": 3,
    "adapter": {"a": torch.arange(5.0), "b": torch.ones(2, 3)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}, 1: {}}, "betas": (0.9, 0.999)},
    "words": ["x", None, True, float("inf")],
    "seen": [(1, 2.5), (3, 4.5)],
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    half = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    state = STATE | {
        "adapter": {"x.y": half.T, "x": {"y": half, "part": half[0]}, "u8": half.to(torch.uint8)},
        "empty": [{}, [], (), torch.empty(0, 3)],
        "odd": {"!tensor": 1, (1, "a"): {None: 2}, True: "b"},
    }
    path = checkpoint.save(tmp_path, state)
    assert path == tmp_path / "checkpoint-3"
    assert same(checkpoint.load(tmp_path), state)
    assert same(checkpoint.load(path), state)
    assert {file.name for file in path.iterdir()} == set(checkpoint.FILES)
    sums = ["sha256sum", "--check", "--status", checkpoint.SUMS]
    assert subprocess.run(sums, cwd=path, check=False).returncode == 0
    with pytest.raises(ConfigError, match=r"odd\.0: a set cannot be kept"):
        checkpoint.save(tmp_path, STATE | {"odd": [{1}]})
    checkpoint.save(tmp_path, STATE | {"odd": np.int64(3)})
    assert same(checkpoint.load(tmp_path)["odd"], 3)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.load(tmp_path / "elsewhere")


def test_the_newest_stay(tmp_path):
    for epoch in (9, 10, 11, 12):
        checkpoint.save(tmp_path, STATE | {"epoch": epoch}, keep=3)
    assert [p.name for p in checkpoint.found(tmp_path)] == [
        *("checkpoint-12", "checkpoint-11", "checkpoint-10")
    ]
    checkpoint.drop(tmp_path, after=10)
    assert checkpoint.load(tmp_path)["epoch"] == 10
    checkpoint.save(tmp_path, STATE | {"epoch": 10, "words": []}, keep=3)  # once more
    assert checkpoint.load(tmp_path)["words"] == []
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, STATE)
    said = rf"{path} is damaged: .*--overwrite"
    for name in checkpoint.FILES:
        file, whole = path / name, (path / name).read_bytes()
        for place in [*range(0, len(whole), 37), len(whole) - 1]:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(ConfigError, match=said):
                checkpoint.load(tmp_path)
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 2):
            file.write_bytes(whole[:size])
            with pytest.raises(ConfigError, match=said):
                checkpoint.load(tmp_path)
        file.unlink()
        with pytest.raises(ConfigError, match=said):
            checkpoint.load(tmp_path)
        file.write_bytes(whole)
    assert same(checkpoint.load(tmp_path), STATE)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    for epoch in (3, 4):
        path = checkpoint.save(tmp_path, STATE | {"epoch": epoch})
    (path / checkpoint.TENSORS).write_bytes(b"")
    told: list[str] = []
    assert checkpoint.load(tmp_path, told.append)["epoch"] == 3
    (line,) = told
    assert line.startswith(f"{path} is damaged: {checkpoint.TENSORS} is not as the run wrote it")
    assert line.endswith("going on from checkpoint-3")


@pytest.mark.parametrize("step", ["write", "set aside", "name"])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    """At every step of writing epoch 3 once more, and of writing epoch 4."""
    checkpoint.save(tmp_path, STATE)
    rename, names = Path.rename, {"set aside": ".old-", "name": "checkpoint-"}

    def die(*args, **options):
        raise KeyboardInterrupt

    def renamed(path, to):
        return die() if to.name.startswith(names[step]) else rename(path, to)

    again, later = STATE | {"words": ["again"]}, STATE | {"epoch": 4}
    for state in (again,) if step == "set aside" else (again, later):  # where nothing is, none is
        with monkeypatch.context() as patch:
            if step == "write":
                patch.setattr(checkpoint, "_digest", die)
            else:
                patch.setattr(Path, "rename", renamed)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, state)
        assert same(checkpoint.load(tmp_path), STATE)
    for epoch in (4, 5):
        checkpoint.save(tmp_path, STATE | {"epoch": epoch})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_going_back_and_going_on(make, tmp_path, capsys):
    options = {**QUICK, "train.epochs": 4, "log.keep_checkpoints": 3}
    whole = make("ddpo", resume="latest", **options)  # where nothing is, it starts
    whole.train()
    assert [p.name for p in checkpoint.found(whole.dir)] == [
        *("checkpoint-4", "checkpoint-3", "checkpoint-2")
    ]
    state = json.loads((whole.dir / "checkpoint-4" / checkpoint.PLAIN).read_text())
    assert state["run"]["digest"] == identity.digest(whole.settings)
    assert state["run"]["config"]["train"]["epochs"] == 4
    assert torch.__version__.startswith(state["run"]["versions"]["torch"])
    back = make("ddpo", resume=str(whole.dir / "checkpoint-2"), **options)
    assert back.epoch == 2
    assert [row["step"] for row in back.tracker.rows] == [0, 1, 2]
    assert [p.name for p in checkpoint.found(whole.dir)] == ["checkpoint-2"]
    back.train()
    assert torch.equal(adapter(back), adapter(whole))
    (back.dir / "checkpoint-4" / checkpoint.TENSORS).write_bytes(b"x")
    on = make("ddpo", resume="latest", **options)
    assert on.epoch == 3
    out = capsys.readouterr().out
    assert f"{back.dir / 'checkpoint-4'} is damaged: state.safetensors is not as" in out
    on.train()
    assert torch.equal(adapter(on), adapter(whole))


def test_a_state_that_cannot_be_kept_is_refused_before_training(make, monkeypatch):
    monkeypatch.setattr(DDPO, "state_dict", lambda self: {"seen": {1, 2}})
    with pytest.raises(ConfigError, match=r"algorithm\.seen: a set cannot be kept"):
        make("ddpo", **QUICK)


def test_a_config_with_functions_is_kept_by_their_names(make):
    trainer = make("ddpo", **QUICK)
    trainer.config.rewards = {redness: 1.0}
    trainer.train()
    run = checkpoint.load(trainer.dir)["run"]
    assert run["config"]["rewards"] == {"test_trainer:redness": 1.0}
    assert run["versions"]["diffalign"] == __version__


def test_what_cannot_be_resumed_is_named(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume.*--resume latest"):
        make("ddpo", resume=True, **QUICK)
    trainer = make("ddpo", **QUICK)
    trainer.train()
    with pytest.raises(ConfigError, match=r"--resume 'lastest' is no folder; give latest, or a"):
        make("ddpo", resume="lastest", **QUICK)
    with pytest.raises(ConfigError, match=r"not among the checkpoints in .* \(none\).*--log\.dir"):
        make("ddpo", run="b", resume=trainer.dir / "checkpoint-1", **QUICK)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / checkpoint.OLD).touch()
    with pytest.raises(ConfigError, match=r"checkpoint\.pt of an earlier version"):
        make("ddpo", run="c", resume="latest", **QUICK)


@pytest.mark.parametrize(
    ("given", "resume"),
    [
        (["a.yaml"], False),
        (["a.yaml", "--resume"], True),
        (["--resume", "a.yaml"], True),
        (["a.yaml", "--resume", "--force"], True),
        (["a.yaml", "--resume", "latest"], "latest"),
        (["--resume", "runs/a/checkpoint-4", "a.yaml"], "runs/a/checkpoint-4"),
    ],
)
def test_what_the_command_line_says_of_resuming(given, resume):
    rest = [x for x in given if x not in ("--resume", resume)]
    assert cli._resumed(given) == (resume, rest)


def test_processes_that_save_at_once_leave_one_whole_checkpoint(tmp_path):
    """As when a reward fails on one of them. Threads have locks of their own, like processes."""
    state = STATE | {"adapter": {"a": torch.randn(200, 200)}}
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: checkpoint.save(tmp_path, state), range(40)))
    assert set(paths) == {tmp_path / "checkpoint-3"}
    assert same(checkpoint.load(tmp_path), state)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


HOLD = (
    "import fcntl, os, sys, time\n"
    "file = open(sys.argv[1], 'a+')\n"
    "fcntl.flock(file, fcntl.LOCK_EX)\n"
    "file.write(f'process {os.getpid()} on here')\n"
    "file.flush()\n"
    "print('held', flush=True)\n"
    "time.sleep(60)\n"
)


def test_a_folder_has_one_run_at_a_time(make, tmp_path, monkeypatch):
    run = tmp_path / "a"
    run.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / folder.LOCK)], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"held\n"
        with monkeypatch.context() as patch:
            patch.setattr(policies, "load", None)
            said = rf"log\.dir='{run}' is in use by process {other.pid} on here.*--log\.dir"
            with pytest.raises(ConfigError, match=said):
                make("ddpo", **QUICK)
    finally:
        other.kill()
        other.communicate()
    # the lock of a process that is gone is no lock
    trainer = make("ddpo", **QUICK)
    assert f"process {os.getpid()} on " in (run / folder.LOCK).read_text()
    trainer.train()
    held = subprocess.Popen(  # the run has ended: another may begin
        [sys.executable, "-c", HOLD, str(run / folder.LOCK)], stdout=subprocess.PIPE
    )
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    held.kill()
    held.communicate()


def test_a_folder_that_cannot_be_written_is_refused_first(make, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "load", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run' cannot be written: Not a directory"):
        make("ddpo", run="file/run", **QUICK)
    with pytest.raises(ConfigError, match=r"cannot be written: File name too long"):
        make("ddpo", run="x" * 300, **QUICK)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(make):
    options = {"eval.rewards": {"jpeg": 1.0}, "eval.images_per_prompt": 1, "eval.every": 1}
    first = make("draft", **options)
    first.train()
    written = {p.relative_to(first.dir) for p in first.dir.rglob("*") if p.is_file()}
    mine = [first.dir / "notes.txt", first.dir / "pictures" / "mine.png", first.dir / "x" / "y"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    folder.clear(first.dir)
    left = {p for p in first.dir.rglob("*") if p.is_file()}
    assert left == {*mine, first.dir / folder.LOCK}
    assert {Path("best"), Path("grids")}.isdisjoint(p.relative_to(first.dir) for p in left)
    assert not (first.dir / "grids").exists()
    make("draft", **options).train()
    assert {p.relative_to(first.dir) for p in first.dir.rglob("*") if p.is_file()} >= written


def test_starting_anew(make, tmp_path):
    trainer = make("ddpo", **QUICK)
    trainer.train()
    with pytest.raises(ConfigError, match="overwrite starts anew and resume goes on"):
        make("ddpo", resume=True, overwrite=True, **QUICK)
    with pytest.raises(ConfigError, match="give resume as well"):
        make("ddpo", force=True, **QUICK)
    with pytest.raises(ConfigError, match=r"lr=.* must be more than 0"):
        make("ddpo", overwrite=True, **QUICK, **{"train.lr": 0.0})
    assert checkpoint.found(trainer.dir)  # a refused run removes nothing
    anew = make("ddpo", overwrite=True, **QUICK, **{"train.seed": 1})
    assert anew.epoch == 0
    assert not checkpoint.found(trainer.dir)
    # and it blocks nobody while no epoch is done
    make("ddpo", **QUICK).train()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "pytorch_lora_weights.safetensors").write_text("")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        make("ddpo", run="foreign", overwrite=True, **QUICK)
    (foreign / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a pipeline"):
        make("ddpo", run="foreign", **QUICK)


def test_a_folder_in_the_place_of_a_file_of_the_run_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.mkdir()
    with pytest.raises(ConfigError) as caught, folder.writing(tmp_path):
        write_atomic(file, b"")
    assert f"{str(tmp_path)!r} cannot be written: Is a directory: {file}; " in str(caught.value)
