import math
import os
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from diffalign.commands.help import help_text
from diffalign.config import (
    AdvantageConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    decode,
)
from diffalign.config.decoding import ConfigError, Count, field_types, section_keys, suggest
from diffalign.config.source import Subject


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(call, *words):
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value)
    return str(caught.value)


def test_defaults_are_valid():
    TrainConfig().check()
    assert TrainConfig.from_dict({}) == TrainConfig()


def test_file_with_scientific_floats(write):
    c = TrainConfig.from_file(
        write("train: {lr: 3e-4}\nrewards: {a: 1e-3, b: {weight: 2, k: [1e5, x]}}\n")
    )
    assert c.train.lr == 3e-4
    assert c.rewards == {"a": 1e-3, "b": {"weight": 2, "k": [1e5, "x"]}}
    assert c.log.dir == "runs/run"
    assert c.algorithm == {"type": "ddpo"}


def test_bom_empty_file_and_algorithm_without_type(write):
    assert TrainConfig.from_file(write(b"\xef\xbb\xbftrain: {epochs: 3}")).train.epochs == 3
    assert TrainConfig.from_file(write("")).train == TrainConfig().train
    c = TrainConfig.from_file(write("algorithm: {clip_range: 1e-4}"))
    assert c.algorithm == {"type": "ddpo", "clip_range": 1e-4}


def test_save_and_load_are_inverse(write, tmp_path):
    c = TrainConfig.from_file(
        write("rewards: {é: 1e-5}\nmodel: {lora_alpha: 4}\neval: {prompts: null}")
    )
    c.save(tmp_path / "new" / "config.yaml")
    assert TrainConfig.from_file(tmp_path / "new" / "config.yaml") == c
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.yaml"]


def test_evaluations_are_drawn_as_the_sampler_draws_unless_told_otherwise():
    c = TrainConfig.from_dict({"sampler": {"steps": 7, "guidance": 2.0}})
    assert (c.eval_steps, c.eval_guidance) == (7, 2.0)
    c = TrainConfig.from_dict({"sampler": {"steps": 7}, "eval": {"steps": 30, "guidance": 0.0}})
    assert (c.eval_steps, c.eval_guidance) == (30, 0.0)


def test_to_dict_shares_nothing():
    c = TrainConfig.from_dict({"rewards": {"a": {"weight": 1}}})
    c.to_dict()["rewards"]["a"]["weight"] = 2
    assert c.rewards == {"a": {"weight": 1}}


BASE = "train: {lr: 1.0e-3}\nrewards: {jpeg: 1.0, clip: 0.5}\nalgorithm: {type: awm, beta: 1}\n"


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--train.lr", "5e-4"], "train.lr", 5e-4),
        (["--train.lr=5e-4"], "train.lr", 5e-4),
        (["--train.lr=1", "--train.lr", "2"], "train.lr", 2.0),
        (["--train", "{epochs: 2}"], "train.lr", 1e-3),
        (["--log.trackers", "[tensorboard,wandb]"], "log.trackers", ["tensorboard", "wandb"]),
        (["--log.dir", "2024_01"], "log.dir", "2024_01"),
        (["--log.dir", "null"], "log.dir", "null"),
        (["--eval.prompts", "null"], "eval.prompts", None),
        (["--eval.prompts", "12"], "eval.prompts", "12"),
        (["--model.lora_alpha", "2"], "model.lora_alpha", 2.0),
        (["--model.gradient_checkpointing", "true"], "model.gradient_checkpointing", True),
        (["--algorithm.type", "draft"], "algorithm", {"type": "draft"}),
        (["--algorithm.type", "awm"], "algorithm", {"type": "awm", "beta": 1}),
        (
            ["--algorithm.last", "2", "--algorithm.type", "draft"],
            "algorithm",
            {"type": "draft", "last": 2},
        ),
        (["--rewards", "null", "--rewards.ocr", "1"], "rewards", {"ocr": 1}),
        (
            ["--eval.rewards.jpeg", "1", "--eval.rewards", "null", "--eval.rewards.ocr.k", "2"],
            "eval.rewards",
            {"ocr": {"weight": 1.0, "k": 2}},
        ),
        (["--rewards", "null"], "rewards", {}),
        (["--log.dir", "~/runs"], "log.dir", os.path.expanduser("~/runs")),
        (["--algorithm", "{type: draft}"], "algorithm", {"type": "draft"}),
        (["--algorithm.beta", "1e-2"], "algorithm", {"type": "awm", "beta": 1e-2}),
        (["--rewards.jpeg", "2.0"], "rewards", {"jpeg": 2.0, "clip": 0.5}),
        (["--rewards.jpeg", "null"], "rewards", {"clip": 0.5}),
        (["--rewards", "{ocr: 1}"], "rewards", {"ocr": 1}),
        (
            ["--rewards.clip.model", "a/b.pt", "--rewards.clip", "0.2"],
            "rewards",
            {"jpeg": 1.0, "clip": {"weight": 0.2, "model": "a/b.pt"}},
        ),
        (
            ["--rewards.clip.model", "x", "--rewards.jpeg", "null"],
            "rewards",
            {"clip": {"weight": 0.5, "model": "x"}},
        ),
        (
            ["--rewards.my.module:redness", "0.2"],
            "rewards",
            {"jpeg": 1.0, "clip": 0.5, "my.module:redness": 0.2},
        ),
        (
            ["--rewards.my.module:red.k", "-3", "--rewards.clip=null"],
            "rewards",
            {"jpeg": 1.0, "my.module:red": {"weight": 1.0, "k": -3}},
        ),
        (
            ["--eval.rewards.clip.model", "x"],
            "eval.rewards",
            {"clip": {"weight": 1.0, "model": "x"}},
        ),
    ],
)
def test_overrides(write, arguments, path, value):
    found: Any = TrainConfig.from_file(write(BASE), arguments)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.lrr", "1"], ["'train.lrr' on the command line; did you mean 'train.lr'?"]),
        (["--train.steps", "1"], ["unknown key 'train.steps'", "did you mean 'sampler.steps'?"]),
        (["--lr", "1"], ["unknown key 'lr'", "did you mean 'train.lr'?"]),
        (["--optimiser.x", "1"], ["unknown key 'optimiser'", "valid: model, algorithm"]),
        (["--train.lr.x", "1"], ["unknown key 'train.lr.x'"]),
        (["--train.lr", "fast"], ["train.lr='fast'", "is not a float"]),
        (["--train.lr", ""], ["train.lr=None", "is not a float"]),
        (["--train.lr"], ["--train.lr needs a value"]),
        (["--train.lr", "--train.epochs", "1"], ["--train.lr needs a value"]),
        (["train.lr=1"], ["unexpected argument 'train.lr=1'", "--train.lr 5e-4"]),
        (["--train", "5"], ["section 'train'", "is 5, not a mapping"]),
        (["--rewards", "jpeg"], ["rewards='jpeg'", "is not a mapping; write {jpeg: 1.0}"]),
        (["--rewards.jpg", "null"], ["no reward 'jpg'", "did you mean 'jpeg'"]),
        (["--log.trackers", "wandb"], ["is not a list of str; write [wandb]"]),
        (["--log.trackers", "[wandb"], ["--log.trackers [wandb:1", "expected"]),
    ],
)
def test_refused_overrides(write, arguments, words):
    path = write(BASE)
    refused(lambda: TrainConfig.from_file(path, arguments), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lrr: 1}", ["unknown key 'train.lrr' in ", "run.yaml; did you mean 'train.lr'?"]),
        ("trian: {lr: 1}", ["unknown key 'trian'", "did you mean 'train'?"]),
        ("train: {LR: 1}", ["did you mean 'train.lr'?"]),
        ("train: {zzzzz: 1}", ["valid: epochs, lr"]),
        ("train:\n", ["section 'train' in ", "is empty"]),
        ("train: 5\n", ["section 'train'", "is 5, not a mapping"]),
        ("rewards:\n", ["rewards=None", "is not a mapping"]),
        ("rewards: [a, b]\n", ["rewards=['a', 'b']", "is not a mapping; write {a: 1.0, b: 1.0}"]),
        ("rewards: {on: 1}\n", ["rewards={True: 1}", "put True in quotes"]),
        ("algorithm: awm\n", ["algorithm='awm'", "is not a mapping; write {type: awm}"]),
        ("algorithm:\n", ["is not a mapping; give it keys or leave it out"]),
        ("rewards: &r {a: *r}\n", ["run.yaml:1", "recursive"]),
        ("a: " + "[" * 3000, ["run.yaml is nested too deeply"]),
        ("train: {epochs: " + "9" * 5000 + "}", ["run.yaml", "5000 digits; mend that value"]),
        ("train: {lr: null}", ["train.lr=None", "is not a float"]),
        ("train: {lr: [1]}", ["train.lr=[1]", "is not a float"]),
        ("train: {epochs: 1.5}", ["train.epochs=1.5", "is not an int"]),
        ("train: {epochs: true}", ["train.epochs=True", "is not an int"]),
        ("model: {gradient_checkpointing: 1}", ["gradient_checkpointing=1", "is not a bool"]),
        ("model: {lora_alpha: x}", ["is not a float or null"]),
        ("model: {lora_targets: [1]}", ["is not a list of str"]),
        ("log: {dir: 2024}", ["log.dir=2024", "quotes: '2024'"]),
        ("train: {lr: 1,\n lr: 2}", ["run.yaml:2", "duplicate key 'lr'"]),
        ("train: {lr: 1}\ntrain: {lr: 2}", ["run.yaml:2", "duplicate key 'train'"]),
        ("rewards: {a: {k: 1, k: 2}}", ["duplicate key 'k'"]),
        ("a: b\n  c: [", ["run.yaml:2", "mapping values are not allowed"]),
        ("- a\n", ["run.yaml holds ['a'], not a mapping"]),
        ("a: !!python/object:os.system x", ["run.yaml:1"]),
        ("reward: jpeg", ["unknown key 'reward'", "did you mean 'rewards'?"]),
        ("model: {lora_targets: to_q}", ["is not a list of str or null; write [to_q]"]),
        ('log: {dir: "a\\0b"}', ["dir='a\\x00b' holds a NUL character; remove it"]),
        ('rewards: {a: {k: ["\\ud800"]}}', ["rewards=", "half of a surrogate pair"]),
        (b"train: {lr: 1} # \xe9", ["run.yaml:1", "0xe9 at offset 17 is not UTF-8", "iconv"]),
        (b"train: \x00", ["run.yaml"]),
    ],
)
def test_refused_files(write, text, words):
    path = write(text)
    refused(lambda: TrainConfig.from_file(path), *words)


def test_what_another_algorithm_has_not_is_left_out_with_a_note(write, capsys):
    path = write("algorithm: {type: ddpo, clip_range: 1.0e-3, kl_weight: 0.5, estimator: sf}")
    config = TrainConfig.from_file(path, ["--algorithm.type", "dpok"])
    assert config.algorithm == {"type": "dpok", "clip_range": 1e-3, "kl_weight": 0.5}
    noted = capsys.readouterr().err
    assert noted == (
        f"note: dpok has no estimator: left out of the options that {path} gives ddpo\n"
    )
    own = "diffalign.algorithms.draft:DRaFT"
    config = TrainConfig.from_file(path, ["--algorithm.type", own])
    assert config.algorithm == {"type": own, "kl_weight": 0.5}
    assert "has no clip_range, estimator:" in capsys.readouterr().err
    TrainConfig.from_file(path, ["--algorithm.type", "ddpo", "--algorithm.clip_range", "2"])
    assert capsys.readouterr().err == ""
    refused(lambda: TrainConfig.from_file(path, ["--algorithm.type", "ppo"]), "'ppo'; did you mean")


def test_what_python_passes_is_checked_as_a_file_is(tmp_path):
    for make, words in (
        (lambda: LogConfig(trackers="wandb"), "LogConfig.trackers='wandb' is not a list of str"),  # type: ignore
        (lambda: ModelConfig(lora_targets="to_q"), "write [to_q]"),  # type: ignore
        (lambda: OptimConfig(lr="1e-4"), "OptimConfig.lr='1e-4' is not a float"),  # type: ignore
        (lambda: OptimConfig(epochs=1.5), "is not an int"),  # type: ignore
        (lambda: TrainConfig(rewards="jpeg"), "write {jpeg: 1.0}"),  # type: ignore
        (lambda: TrainConfig(model={"name": "x"}), "is not a ModelConfig"),  # type: ignore
        (lambda: ModelConfig(name="a\udce9"), "bytes that are not UTF-8"),
        (lambda: ModelConfig(dtype=16), "ModelConfig.dtype=16 is not a str"),  # type: ignore
        (lambda: ModelConfig(free_text_encoders=1), "is not a bool"),  # type: ignore
    ):
        refused(make, words)
    config = TrainConfig()
    config.log.trackers = "wandb"  # type: ignore
    refused(config.check, "write [wandb]")
    assert ModelConfig(name=tmp_path).name == str(tmp_path)  # type: ignore
    assert ModelConfig(name="~/m").name == os.path.expanduser("~/m")
    assert TrainConfig.from_dict({"log": {"dir": tmp_path}}).log.dir == str(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings_with_a_mark_are_read(write, encoding):
    path = write("log: {dir: é}".encode(encoding))
    assert TrainConfig.from_file(path).log.dir == "é"


def test_missing_file_and_folder(tmp_path):
    refused(lambda: TrainConfig.from_file(tmp_path / "no.yaml"), "no.yaml", "No such file")
    refused(lambda: TrainConfig.from_file(tmp_path), tmp_path.name, "directory")


def test_yaml_merge_keys_are_not_duplicates(write):
    text = "rewards:\n  a: &a {weight: 1, k: 2}\n  b: {<<: *a, k: 3}\n"
    assert TrainConfig.from_file(write(text)).rewards["b"] == {"weight": 1, "k": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": {"steps": 0}}, ["sampler.steps=0 must be more than 0"]),
        ({"train": {"lr": -1.0}}, ["train.lr=-1.0 must be more than 0"]),
        ({"train": {"lr": math.nan}}, ["train.lr=nan"]),
        ({"train": {"lr": math.inf}}, ["train.lr=inf is not finite"]),
        ({"train": {"seed": -1}}, ["train.seed=-1 must be 0 or more"]),
        ({"model": {"lora_alpha": 0}}, ["model.lora_alpha=0"]),
        ({"model": {"dtype": "fp16"}}, ["model.dtype='fp16'", "bfloat16"]),
        ({"sampler": {"kernel": "dim"}}, ["sampler.kernel='dim'", "did you mean 'ddim'?"]),
        ({"advantage": {"baseline": "x"}}, ["advantage.baseline='x'", "valid: group, tracker"]),
        ({"advantage": {"std": "x"}}, ["advantage.std='x'", "valid: group, global"]),
        ({"algorithm": {"type": 3}}, ["algorithm.type=3"]),
        ({"data": {"group_size": 1}}, ["data.group_size=1", "2 or more", "baseline=tracker"]),
        ({"train": {"lr": 1e9}}, ["train.lr=1000000000.0 is far too large", "3e-4"]),
        (
            {"train": {"updates_per_epoch": 3}},
            ["updates_per_epoch=3 does not divide the 64 images", "use 1, 2, 4 or 8"],
        ),
        ({"train": {"updates_per_epoch": 100}}, ["use 32 or 64"]),
        (
            {"data": {"groups": 1, "group_size": 1}, "train": {"updates_per_epoch": 2}},
            ["updates_per_epoch=2 does not divide the 1 images", "use 1"],
        ),
        (
            {"advantage": {"baseline": "tracker", "min_count": 32}},
            ["min_count=32 is never reached", "buffer_size=16"],
        ),
    ],
)
def test_check(changes, words):
    refused(TrainConfig.from_dict(changes).check, *words)


def test_check_reports_every_problem_and_knows_exceptions():
    changes = {"train": {"epochs": 0}, "sampler": {"kernel": "x"}}
    assert len(refused(TrainConfig.from_dict(changes).check).split("\n")) == 2
    one = TrainConfig.from_dict({"data": {"group_size": 1, "groups": 16}})
    one.check(advantages=False)
    one.advantage.baseline = "tracker"
    one.check()
    TrainConfig.from_dict({"train": {"max_grad_norm": math.inf, "checkpoint_every": 0}}).check()


@dataclass
class Method:
    """The method of a paper.

    More of it.
    """

    clip: float = 1e-4  # ε of the ratio
    mode: Literal["a", "b"] = "a"
    """a or b"""
    window: tuple[int, int] = (0, 1)
    size: int = field(default=3)
    needs = "TRAJECTORY"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size={self.size} is negative")


@dataclass
class Variant(Method):
    extra: float | None = None
    """only here"""


def test_decode_of_other_dataclasses():
    m = decode(Variant, {"clip": "2e-4", "window": [2, 3], "extra": 1}, "algorithm")
    assert m == Variant(clip=2e-4, window=(2, 3), extra=1.0)
    refused(
        lambda: decode(Method, {"clp": 1}, "algorithm"),
        "unknown key 'algorithm.clp'; did you mean 'algorithm.clip'?",
    )
    refused(lambda: decode(Method, {"needs": 1}, "algorithm"), "unknown key 'algorithm.needs'")
    refused(lambda: decode(Method, {"mode": "c"}, "algorithm"), "algorithm.mode='c'", "one of a, b")
    refused(lambda: decode(Method, {"window": "01"}, "algorithm"), "algorithm.window='01'", "list")
    refused(lambda: decode(Method, {"window": [1]}, "algorithm"), "algorithm.window=[1]")
    refused(lambda: decode(Method, {"size": -1}, "algorithm"), "algorithm", "size=-1 is negative")

    @dataclass
    class Required:
        a: int

    refused(lambda: decode(Required, {}, "algorithm"), "missing key 'algorithm.a'")


class Mode(Enum):
    fast = "f"
    two = 2


@dataclass
class Own:
    """What a user's algorithm may ask for."""

    path: Path = Path()
    mode: Mode = Mode.fast
    on: bool = False
    size: int | None = None
    shares: tuple[float, ...] = ()
    names: set[str] = field(default_factory=set)
    scales: dict[str, float] = field(default_factory=dict)
    either: int | str = 0
    bounded: Count | None = None


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"path": "a/b"}, Path("a/b")),
        ({"mode": "f"}, Mode.fast),
        ({"mode": "fast"}, Mode.fast),
        ({"mode": 2}, Mode.two),
        ({"on": "true"}, True),
        ({"size": "12"}, 12),
        ({"size": None}, None),
        ({"shares": ["1e-3", 2]}, (1e-3, 2.0)),
        ({"names": ["a", "a"]}, {"a"}),
        ({"scales": {"a": 1, "b": "2e1"}}, {"a": 1.0, "b": 20.0}),
        ({"either": "7"}, 7),
        ({"either": "x"}, "x"),
        ({"bounded": "3"}, 3),
    ],
)
def test_decode_of_many_types(given, value):
    (name,) = given
    found = getattr(decode(Own, given), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": 3}, "path=3 is not a Path"),
        ({"mode": "g"}, "mode='g' is not a Mode"),
        ({"on": 1}, "on=1 is not a bool"),
        ({"on": "yes"}, "on='yes' is not a bool"),
        ({"size": 2.0}, "size=2.0 is not an int or null"),
        ({"size": True}, "size=True is not an int or null"),
        ({"shares": 1}, "shares=1 is not a list of float"),
        ({"shares": [None]}, "shares=[None] is not a list of float"),
        ({"scales": {"a": "x"}}, "scales={'a': 'x'} is not a mapping"),
        ({"either": 1.5}, "either=1.5 is not an int or str"),
        ({"bounded": [1]}, "bounded=[1] is not an int or null"),
        ({"shares": {1, 2}}, "shares={1, 2} is not a list of float"),
        ({"names": [["a"]]}, "names=[['a']] is not a list of str"),
        ({"shares": [10**400]}, "is not a list of float"),  # a float would overflow
    ],
)
def test_wrong_types_of_many(given, words):
    refused(lambda: decode(Own, given), words)


def test_members_of_an_enum_are_written_by_name(tmp_path):
    TrainConfig(algorithm={"type": "a:B", "mode": Mode.fast}).save(tmp_path / "config.yaml")
    config = TrainConfig.from_file(tmp_path / "config.yaml")
    assert config.algorithm["mode"] == "fast"


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    config = TrainConfig(train=OptimConfig(epochs=np.int64(3), lr=np.float32(0.5)))  # type: ignore
    config.save(tmp_path / "config.yaml")
    train = TrainConfig.from_file(tmp_path / "config.yaml").train
    assert (train.epochs, train.lr) == (3, 0.5)


def test_former_spellings_are_taken(write, capsys):
    path = write("train: {gradients: normalised}")
    config = TrainConfig.from_file(path, ["--advantage.combine", "normalised"])
    python = TrainConfig(advantage=AdvantageConfig(combine="normalised"))  # type: ignore
    python.train.gradients = "normalised"  # type: ignore
    for c in (config, python):
        c.check()
        assert (c.train.gradients, c.advantage.combine) == ("normalized", "normalized")
    assert capsys.readouterr() == ("", "")
    # only where there is such an option or choice, and not beside the new one
    message = refused(TrainConfig.from_dict({"eval": {"guard": "normalised"}}).check)
    assert message == "eval.guard='normalised' is not known; valid: off, warn, stop"
    refused(lambda: decode(Own, {"neighbours": 1}, "own"), "unknown key 'own.neighbours'; valid:")

    @dataclass
    class Near:
        neighbors: int

    assert decode(Near, {"neighbours": "3"}) == Near(3)
    refused(
        lambda: decode(Near, {"neighbours": 3, "neighbors": 4}),
        "unknown key 'neighbours'; did you mean 'neighbors'?",
    )


def test_suggest():
    assert suggest("lrr", ["lr", "epochs"]) == "; did you mean 'lr'?"
    assert suggest("zz", ["lr", "epochs"]) == "; valid: lr, epochs"
    assert suggest("zz", []) == "; valid: none"


def test_every_field_is_documented_and_shown_in_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    text = help_text({"method": f"{__name__}:Method", "variant": f"{__name__}:Variant"})
    assert max(map(len, text.splitlines())) <= 90
    for name in section_keys(TrainConfig):
        assert f"--{name} " in text
    for hint in field_types(TrainConfig).values():
        if is_dataclass(hint):
            assert all(o.doc for o in Subject(f"diffalign.config:{hint.__name__}").options)  # type: ignore[attr-defined]
    assert "--train.lr FLOAT" in text
    assert "(3e-4)" in text
    assert "method | variant" in text
    assert "algorithm method: The method of a paper." in text
    assert "ε of the ratio" in text
    assert "--algorithm.mode a|b" in text
    assert "--algorithm.extra FLOAT" in text
    assert "(null)  only here" in text
    assert text.count("--rewards.") >= 3
    names = [o.name for o in Subject(f"{__name__}:Variant").options]
    assert names == ["clip", "mode", "window", "size", "extra"]


def test_one_picture_an_epoch():
    TrainConfig.from_dict({"data": {"groups": 1, "group_size": 1}}).check(advantages=False)


def test_divisors_of_a_huge_number_are_found_at_once():
    config = TrainConfig(rewards={"jpeg": 1.0})
    config.data.groups, config.train.updates_per_epoch = 10**18, 3  # all of 8e18 would take years
    with pytest.raises(ConfigError, match="use 1, 2, 4 or 5"):
        config.check()


@pytest.mark.parametrize("setting", ["train.seed", "data.groups", "model.lora_rank"])
def test_integers_that_torch_cannot_hold_are_refused(write, setting):
    config = TrainConfig.from_file(write("rewards: {jpeg: 1}"), [f"--{setting}", str(2**63)])
    refused(config.check, f"{setting}={2**63} is too large; use less than 2**63")
