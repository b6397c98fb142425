"""The guard: its statistics, its verdicts, and what training does with them."""

import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import test_trainer
import torch
from safetensors.torch import load_file

from diffalign.policies import lora
from diffalign.record.metrics import read_metrics
from diffalign.training.guard import Guard
from diffalign.verdict import VERDICTS, level, paired_change, t_tail

make = test_trainer.make  # the fixture


@pytest.mark.parametrize(
    ("df", "t", "tail"),  # of the usual tables
    [
        (1, 1.0, 0.25), (1, 63.6567, 0.005), (2, 2.919986, 0.05), (3, 3.182446, 0.025),
        (10, 2.228139, 0.025), (30, 3.385185, 0.001), (120, 1.979930, 0.025), (7, -1.894579, 0.95),
        (4, 0.0, 0.5), (5, math.inf, 0.0),
    ],
)  # fmt: skip
def test_tails_of_students_t(df, t, tail):
    assert t_tail(t, df) == pytest.approx(tail, rel=1e-5)


def test_far_tails_of_students_t():
    for df, t in [(27, 5.0), (111, 5.0), (112, 6.0)]:
        x = np.linspace(t, 200, 2_000_001)
        scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        density = scale * (1 + x * x / df) ** (-(df + 1) / 2)
        expected = (density.sum() - density[0] / 2) * (x[1] - x[0])
        assert t_tail(t, df) == pytest.approx(expected, rel=1e-4)


def test_changes_are_of_prompts_and_of_pictures_that_have_both_scores():
    before = [0.0, 0.0, 5.0, 1.0, math.nan, 2.0]
    after = [1.0, 3.0, 6.0, 1.0, 9.0, math.nan]
    # prompt a changed by 1 and 3, b by 1 and 0; c has no picture with both
    change = paired_change(before, after, ["a", "a", "b", "b", "c", "c"])
    assert change == pytest.approx((1.25, 0.75, 2))
    assert paired_change([math.nan], [1.0], [0]).prompts == 0


def test_more_pictures_of_the_same_prompts_are_not_more_evidence():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 20))
    once = paired_change(before, after, range(20))
    thrice = paired_change(before.repeat(3), after.repeat(3), np.arange(20).repeat(3))
    assert thrice == pytest.approx(once)
    assert once.error == pytest.approx((after - before).std(ddof=1) / 20**0.5)


def test_levels_of_a_run_add_up_to_that_of_one_look():
    for measures in (1, 3):
        every = [measures * k * level(2.0, k, measures * k) for k in range(1, 10_000)]
        assert sum(every) == pytest.approx(NormalDist().cdf(-2.0), rel=1e-3)
        assert sum(every) < NormalDist().cdf(-2.0)


PROMPTS = 24
NOISE = torch.linspace(-1, 1, PROMPTS)  # mean 0


def seen(reward, noise=0.0, **judges):
    """Scores of a picture a prompt with these means. The reward's and the judges' change alike."""
    means, apart = {"reward": reward, **judges}, torch.arange(PROMPTS) / 10
    return {k: (v + apart + noise * NOISE).tolist() for k, v in means.items()}


class Watch(Guard):
    def see(self, scores, spread=None, prompts=range(PROMPTS)):
        return super().see(scores, spread, prompts)


def guard(*judges, drop=2.0, least=0.7):
    return Watch(drop, least, judges or ("clip",))


def test_the_first_evaluation_is_never_flagged():
    watch = guard()
    assert watch.see(seen(1.0, clip=-5.0), 0.0) == []
    assert watch.is_best


def test_a_judge_that_falls_while_the_reward_rises_is_over_optimisation():
    watch = guard()
    watch.see(seen(1.0, clip=5.0), 0.2)
    (wrong,) = watch.see(seen(2.0, noise=0.5, clip=4.5), 0.2)
    assert wrong == f"clip fell by 0.5 ± {0.5 * NOISE.std() / PROMPTS**0.5:.2g} from its best"
    assert watch.verdict == "over_optimised"
    assert not watch.is_best


@pytest.mark.parametrize(
    ("reward", "clip", "spread", "verdict", "words"),
    [
        (2.0, 5.0, 0.2, "improved", []),
        (1.05, 4.95, 0.19, "", []),
        (2.0, 4.0, 0.2, "over_optimised", ["clip fell by 1 ±"]),
        (2.0, 6.0, 0.1, "over_optimised", ["diversity fell to 50% of the base model's"]),
        (0.98, 4.0, 0.2, "collapsed", ["clip fell by 1 ±", "the reward did not rise"]),
        (0.98, 5.0, 0.1, "collapsed", ["diversity fell to 50%", "the reward did not rise"]),
        (0.0, 4.0, 0.2, "collapsed", ["clip fell by 1 ±", "the reward fell by 1 ±"]),
        (math.nan, 4.0, 0.2, "collapsed", ["clip fell by 1 ±", "the reward cannot be compared"]),
        (0.0, 5.0, 0.2, "failed", ["the reward fell by 1 ± 0.063 from the base model's"]),
        (0.0, 6.0, 0.2, "failed", ["the reward fell by 1 ± 0.063 from the base model's"]),
    ],
)
def test_verdicts(reward, clip, spread, verdict, words):
    watch = guard()
    watch.see(seen(1.0, clip=5.0), 0.2)
    wrong = watch.see(seen(reward, noise=0.5, clip=clip), spread)
    assert watch.verdict == verdict
    assert len(wrong) == len(words)
    assert all(w.startswith(start) for w, start in zip(wrong, words, strict=True))


@pytest.mark.parametrize("missing", ["reward", "clip"])
@pytest.mark.parametrize("when", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_picture_without_a_score_is_left_out_of_the_comparison(missing, when):
    watch = guard()
    levels = [(1.0, 5.0), (2.0, 6.0), (3.0, 5.5)]
    for look, (reward, clip) in enumerate(levels):
        scores = seen(reward, noise=0.5 * look, clip=clip)
        if look in when:
            scores[missing][3 + look] = math.nan
        wrong = watch.see(scores)
    assert watch.verdict == "over_optimised"
    assert len(wrong) == 1
    assert wrong[0].startswith("clip fell by 0.")


def test_a_judge_that_scored_few_pictures_at_its_best_is_compared_with_the_base_too():
    watch = guard()
    watch.see(seen(1.0, clip=5.0))
    few = seen(2.0, clip=9.0)
    few["clip"][1:] = [math.nan] * (PROMPTS - 1)
    assert watch.see(few) == []
    (wrong,) = watch.see(seen(2.0, noise=0.5, clip=4.0))
    assert wrong.endswith("from the base model's")


def test_a_fall_within_chance_is_not_flagged():
    error = NOISE.std().item() / PROMPTS**0.5
    for drop in (2.0, 3.0):
        # what Student's t asks for at the first look, at one of two measures
        enough = NormalDist().cdf(-drop) / 4
        needed = next(t / 1000 for t in range(9999) if t_tail(t / 1000, PROMPTS - 1) < enough)
        for share, flagged in [(0.99, False), (1.01, True)]:
            watch = guard(drop=drop)
            watch.see(seen(1.0, clip=5.0))
            fall = share * needed * error
            assert bool(watch.see(seen(2.0, noise=1.0, clip=5.0 - fall))) is flagged


def test_every_judge_is_compared_with_its_own_best():
    watch = guard("clip", "jpeg")
    watch.see(seen(1.0, clip=0.0, jpeg=0.0))
    assert watch.see(seen(2.0, clip=3.0, jpeg=0.0)) == []
    assert watch.see(seen(2.0, clip=3.0, jpeg=9.0)) == []
    assert watch.is_best  # by both together
    (wrong,) = watch.see(seen(2.0, clip=2.0, jpeg=9.5))
    assert wrong.startswith("clip fell by 1 ±")
    assert wrong.endswith("from its best")
    # higher than the base, and than at the best of both before, but for jpeg
    (wrong,) = watch.see(seen(2.0, clip=4.0, jpeg=8.0))
    assert wrong.startswith("jpeg fell by 1.5 ±")


def test_diversity_below_the_share_is_flagged():
    watch = guard()
    watch.see(seen(1.0, clip=5.0), 0.2)
    assert watch.see(seen(2.0, clip=5.0), 0.141) == []
    assert len(watch.see(seen(2.0, clip=5.0), 0.139)) == 1
    assert watch.see(seen(2.0, clip=5.0), None) == []
    without = Watch(2.0, 0.7, [])
    without.see(seen(1.0), 0.2)
    assert len(without.see(seen(2.0), 0.1)) == 1
    assert not without.is_best


def test_best_is_by_the_sum_of_judges_each_over_its_spread_on_the_base():
    watch = Guard(2.0, 0.7, ("clip", "jpeg"))
    base = {"reward": [0.0] * 4, "clip": [0.0, 1.0, 2.0, 3.0], "jpeg": [0.0, 10.0, 20.0, 30.0]}
    watch.see(base, None)

    def best(clip, jpeg):
        now = {"clip": [v + clip for v in base["clip"]], "jpeg": [v + jpeg for v in base["jpeg"]]}
        watch.see({"reward": [1.0] * 4, **now}, None)
        return watch.is_best

    assert not best(-1.0, 9.0)  # of a spread ten times as wide
    assert best(1.0, -9.0)
    assert not best(1.0, -9.0)
    assert best(-1.0, 12.0)


def test_without_prompts_neighbors_are_taken_for_one_prompts_pictures():
    rng = np.random.default_rng(1)
    base, after = rng.normal(size=(2, 64))
    with_ids, without = Guard(2.0, 0.7, ("j",)), Guard(2.0, 0.7, ("j",))
    found = []
    for watch, prompts in [(with_ids, np.arange(64) // 8), (without, None)]:
        watch.see({"reward": [0.0] * 64, "j": base}, None, prompts)
        found.append(watch.see({"reward": [1.0] * 64, "j": after - 9}, None, prompts))
    assert found[0] == found[1] != []


def test_the_guard_goes_on_where_it_stopped(tmp_path):
    watch, resumed = guard(), guard()
    watch.see(seen(1.0, clip=5.0), 0.2)
    watch.see(seen(2.0, clip=7.0), 0.2)
    torch.save(watch.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    now = seen(3.0, noise=1.0, clip=6.0), 0.1
    assert resumed.see(*now) == watch.see(*now)
    assert len(resumed.see(*now)) == 2
    assert resumed.state_dict() == watch.state_dict() | {"looks": 3}


def simulated(rng, looks, fall=0.0, start=5, walk=False):
    """The evaluation at which a run is flagged first, None if never: two judges, two pictures of
    every prompt whose changes (variance 1) have the correlation 0.5. Both fall at `start`."""
    names, prompts = ("a", "b"), np.arange(56).repeat(2)

    def draw():
        return (rng.normal(size=56).repeat(2) + rng.normal(size=112)) / 2**0.5

    watch, base = Guard(2.0, 0.0, names), {name: draw() for name in names}
    watch.see({"reward": [0.0] * 112, **base}, None, prompts)
    moved = dict.fromkeys(names, np.zeros(112))
    for look in range(1, looks + 1):
        moved = {name: walk * moved[name] + draw() for name in names}
        now = {name: base[name] + moved[name] - fall * (look >= start) for name in names}
        if watch.see({"reward": [1.0] * 112, **now}, None, prompts):
            return look
    return None


@pytest.mark.parametrize("walk", [False, True])
def test_false_alarms_of_a_run_are_as_rare_as_stated(walk):
    """At most Φ(-2) = 2.3 % of runs: of 150 the chance of more than 9 is below one in 500."""
    rng = np.random.default_rng(0)
    assert sum(simulated(rng, 10, walk=walk) is not None for _ in range(150)) <= 9


def test_a_large_fall_is_found_at_once():
    """8 standard errors, where the fifth evaluation asks for 4.1."""
    rng = np.random.default_rng(0)
    fall = 8 * (0.75 / 56) ** 0.5
    assert [simulated(rng, 5, fall) for _ in range(10)] == [5] * 10


LEVELS = []  # what `judge` says at its next calls


def judge(images, prompts):
    return LEVELS.pop(0) + torch.linspace(0, 0.1, len(images))


def backwards(images, prompts):
    """Falls as it is trained on: its gradient has the wrong sign."""
    value = test_trainer.redness(images, prompts)
    return value - 2 * value.detach()


backwards.differentiable = True
JUDGED = {"eval.rewards": {"judge": {"type": "test_guard:judge"}}, "eval.every": 1}


@pytest.fixture
def judged(make, monkeypatch):
    """judged(levels, run, **options) -> Trainer whose reward rises, with a judge that goes along
    the levels: the base's first, then one an epoch."""

    def judged(levels, run="a", **options):
        monkeypatch.setattr(sys.modules[__name__], "LEVELS", list(levels))
        return make("draft", run=run, **JUDGED | options)

    return judged


def over_optimised(trainer):
    return [row.get("over_optimised") for row in read_metrics(trainer.dir)]


def verdicts(trainer):
    """The verdict of every evaluation after the first."""
    rows = read_metrics(trainer.dir)[1:]
    return [[name for name in VERDICTS if row[name]] for row in rows]


def test_guard_stops_and_keeps_the_best_weights(judged):
    levels = [0.0, 1.0, 2.0, 1.5, 9.0]
    trainer = judged(levels, **{"train.epochs": 4, "eval.guard": "stop"})
    trainer.train()
    assert over_optimised(trainer) == [None, 0.0, 0.0, 1.0]
    assert (trainer.dir / lora.WEIGHTS).exists()
    judged(levels, run="two", **{"train.epochs": 2}).train()
    best = load_file(trainer.dir / "best" / lora.WEIGHTS)
    expected = load_file(trainer.dir.parent / "two" / lora.WEIGHTS)
    assert best.keys() == expected.keys()
    assert all(torch.equal(best[k], expected[k]) for k in best)
    last = load_file(trainer.dir / lora.WEIGHTS)
    assert any(not torch.equal(best[k], last[k]) for k in best)


def test_guard_stops_a_run_that_collapsed(judged, capfd):
    """Everything got worse, the reward too."""
    options = {"rewards": {backwards: 1.0}, "train.epochs": 3, "eval.guard": "stop"}
    trainer = judged([1.0, 0.5, 0.4, 0.3], **options)
    trainer.train()
    assert verdicts(trainer) == [["collapsed"]]
    shown = "".join(capfd.readouterr())
    assert "epoch 1: collapsed, judge fell by 0.5" in shown
    assert "the reward did not rise; stopped, no epoch was better" in shown
    page = (trainer.dir / "report.html").read_text("utf-8")
    assert "Collapsed from epoch 1 (1 of 1 evaluation)" in page


def test_guard_says_that_training_failed(judged, capfd):
    options = {"rewards": {backwards: 1.0}, "train.lr": 0.1, "train.epochs": 4}
    trainer = judged([1.0, 1.5], **options, **{"eval.every": 4})
    trainer.train()
    assert [row["step"] for row in read_metrics(trainer.dir) if row.get("failed")] == [4]
    assert "epoch 4: failed, the reward fell by" in "".join(capfd.readouterr())


def test_guard_warns_and_goes_on(judged, capfd):
    trainer = judged([0.0, 1.0, 0.5, 2.0], **{"train.epochs": 3})
    trainer.train()
    assert over_optimised(trainer) == [None, 0.0, 1.0, 0.0]
    shown = capfd.readouterr()
    assert "epoch 2: over-optimised, judge fell by 0.5" in shown.out + shown.err


def test_guard_that_is_off_says_and_writes_nothing(judged, capfd):
    trainer = judged([0.0, 1.0, 0.5], **{"train.epochs": 2, "eval.guard": "off"})
    trainer.train()
    shown = capfd.readouterr()
    assert "over-optimised" not in shown.out + shown.err
    assert not (trainer.dir / "best").exists()
    assert over_optimised(trainer) == [None] * 3


def test_guard_names_best_weights_only_where_they_were_written(judged, capfd):
    """Where no epoch was better than the base model there are none."""
    trainer = judged([1.0, 0.5], **{"train.epochs": 1})
    trainer.train()
    assert over_optimised(trainer) == [None, 1.0]
    shown = capfd.readouterr()
    named = str(trainer.dir / "best") in shown.out + shown.err
    assert named == (trainer.dir / "best").exists()


def test_guard_of_a_resumed_run_knows_the_best(judged):
    judged([0.0, 2.0], **{"train.epochs": 1}).train()
    trainer = judged([0.0, 1.0], resume=True, **{"train.epochs": 2})
    trainer.train()
    assert over_optimised(trainer) == [None, 0.0, 1.0]


def test_pictures_of_equal_prompts_are_one_prompts(make, monkeypatch):
    trainer = make("draft", **{"eval.images_per_prompt": 2, "eval.every": 1})
    path = Path(trainer.config.eval.prompts)
    given, see = [], Guard.see
    monkeypatch.setattr(Guard, "see", lambda *a: given.append(a[3]) or see(*a))
    trainer.train()
    lines = path.read_text().split("\n")
    assert given == [[line for line in lines for _ in range(2)]] * 2
