"""What ends a run early: what is not finite, signals, disks; and what is kept."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import test_trainer
import torch
from conftest import perturb
from safetensors.torch import load_file
from test_trainer import adapter, redness

from diffalign import TrainingStopped
from diffalign.policies import lora
from diffalign.record import checkpoint
from diffalign.record.metrics import read_metrics
from diffalign.training import saving, stopping
from diffalign.training.stopping import Interrupted, NotFinite, Signals
from rewards.threads import Worker

ROOT = Path(__file__).parents[1]
make = test_trainer.make  # the fixture
QUICK = {"eval.prompts": None, "data.groups": 2}


def poison(trainer, monkeypatch, *when, value=torch.nan):
    """Make the gradient of the optimizer steps `when` (all where none is named) not finite."""
    optimizer, calls = trainer.optimizer, []
    step = optimizer.step

    def poisoned():
        calls.append(1)
        if not when or len(calls) in when:
            for p in optimizer.parameters:
                p.grad = torch.full_like(p, value)
            optimizer.scaler.scale(torch.ones(1))  # as a backward pass does
        return step()

    monkeypatch.setattr(optimizer, "step", poisoned)


def everything(trainer):
    """Weights, average, optimizer state and the number of updates."""
    state = saving.state(trainer)
    moments = state["optimisation"]["optimiser"]["state"]
    tensors = [*state["adapter"].values(), *state["copies"]["ema"].values()]
    tensors += [v for each in moments.values() for v in each.values()]
    return [*tensors, torch.tensor(state["optimisation"]["updates"])]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_without_a_finite_gradient_changes_nothing(make, monkeypatch, value):
    trainer = make(
        "ddpo", **QUICK, **{"train.epochs": 3, "train.ema": 0.9, "train.weight_decay": 0.1}
    )
    seen = []
    trainer.on_epoch_end = lambda trainer, epoch, metrics: seen.append(everything(trainer))
    poison(trainer, monkeypatch, 2, value=value)
    trainer.train()
    rows = read_metrics(trainer.dir)
    assert [row.get("skipped_steps") for row in rows] == [None, 0, 1, 0]
    assert rows[2]["grad_norm"] is None
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[1][0], seen[2][0])
    assert all(v.isfinite().all() for v in everything(trainer))


def rooted(images, prompts):
    """Finite values, and at 0 no finite gradient."""
    return (images - images.detach()).square().sum((1, 2, 3)).sqrt() + redness(images, prompts)


rooted.differentiable = True


def test_a_reward_without_a_finite_gradient_is_named_and_the_run_ends(make):
    trainer = make("draft", rewards={rooted: 1.0, "jpeg": 0.0}, **QUICK, **{"train.epochs": 9})
    said = r"5 updates in a row.*reward 'rooted'.*prompt 'a red \w+'.*add 1e-8(.|\n)*epochs done: 4"
    with pytest.raises(TrainingStopped, match=said):
        trainer.train()
    assert trainer.epoch == checkpoint.load(trainer.dir)["epoch"] == 4
    saved = load_file(trainer.dir / lora.WEIGHTS)
    assert all(v.isfinite().all() for v in saved.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_that_made_no_update_says_so(make, monkeypatch, dtype):
    trainer = make("draft", **QUICK, **{"train.epochs": 2, "model.dtype": dtype})
    poison(trainer, monkeypatch, value=torch.inf)
    with pytest.raises(TrainingStopped, match=r"all 2 update\(s\) were skipped"):
        trainer.train()
    assert [r["skipped_steps"] for r in read_metrics(trainer.dir)[1:]] == [1, 1]


def test_float16_may_lower_its_scale_first(make, monkeypatch):
    """As many skipped steps as it takes to get to 1 are no reason to stop."""
    optimizer = make("draft", **{"model.dtype": "float16"}).optimizer
    halvings = int(optimizer.scaler.get_scale()).bit_length() - 1

    def overflow():
        for p in optimizer.parameters:
            p.grad = torch.full_like(p, torch.inf)
        optimizer.scaler.scale(torch.ones(1))
        optimizer.step()

    for _ in range(halvings + stopping.IN_A_ROW - 2):
        overflow()
    with pytest.raises(NotFinite, match=r"float16 overflows.*bfloat16 or float32.*train\.lr=0\.01"):
        overflow()


def test_a_learning_rate_that_ruins_the_weights_is_named(make):
    with pytest.raises(ValueError, match=r"train\.lr=1e\+30 is far too large"):
        make("draft", **{"train.lr": 1e30})
    trainer = make("draft", **{"train.epochs": 3})
    trainer.config.train.lr = 1e30
    with pytest.raises(TrainingStopped, match=r"weights are not finite.*train\.lr=1e\+30"):
        trainer.train()
    assert not checkpoint.found(trainer.dir)  # no epoch was done


def test_pictures_that_are_not_finite_blame_the_learning_rate_and_ruin_no_checkpoint(make):
    trainer = make("draft", **QUICK, **{"train.epochs": 3, "train.checkpoint_every": 1})

    def ruin(trainer, epoch, metrics):
        if epoch == 2:
            perturb(trainer.policy, 1e18)  # finite, as too long a step would leave them

    # as between two checkpoints
    save, trainer.save = trainer.save, lambda **wait: save(**wait) if trainer.epoch == 1 else None
    trainer.on_epoch_end = ruin
    with pytest.raises(TrainingStopped) as error:
        trainer.train()
    text = str(error.value)
    assert "after 2 update(s) with train.lr=0.01 (float32) the model draws NaN or inf" in text
    assert "VAE" not in text
    assert "not saved; what was saved before is whole" in text
    assert checkpoint.load(trainer.dir)["epoch"] == 1


def test_a_state_that_is_not_finite_is_never_saved(make, tmp_path):
    trainer = make("draft", **{"train.epochs": 1})
    trainer.policy.trainable_parameters()[0].data[0] = torch.nan
    with pytest.raises(NotFinite, match=r"weights are not finite.*train\.lr=0\.01 \(float32\)"):
        saving.state(trainer)
    assert not checkpoint.found(trainer.dir)


class Kills:
    """redness, which sends this process a signal at its `at`-th call."""

    __name__ = "redness"
    __module__ = "test_trainer"

    def __init__(self, number, at):
        self.number, self.at, self.calls = number, at, 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
            time.sleep(0.2)
        return redness(images, prompts)


@pytest.fixture
def ctrl_c():
    """SIGINT as a terminal has it; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_saves_the_epochs_done(make, monkeypatch, name, capsys, ctrl_c):
    number = getattr(signal, name)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    trainer = make("ddpo", rewards={Kills(number, 3): 1.0}, **QUICK, **{"train.epochs": 5})
    saves = []
    save = checkpoint.save

    def interrupted(*args, **options):
        saves.append(1)
        if len(saves) == 3:  # of the end, after those of two epochs
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **options)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(Interrupted) as error:
        trainer.train()
    assert stopping.exit_status(error.value) == 128 + number
    assert len(saves) == 3
    assert checkpoint.load(trainer.dir)["epoch"] == 2
    assert f"epochs done: 2, saved in {trainer.dir}; --resume goes on" in capsys.readouterr().out
    assert {n: signal.getsignal(n) for n in before} == before


def test_signals_of_others_are_left_alone():
    def mine(number, frame):
        raise AssertionError

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal.signal(signal.SIGTERM, mine)
        with Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    def elsewhere():
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[signal.SIGTERM]]


def test_a_signal_that_was_swallowed_or_held_is_raised():
    for swallow in (True, False):
        with Signals() as signals:
            with signals.held():
                pass
            if swallow:
                with suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGTERM)  # soon after another it is the same request
                time.sleep(0.1)
            reached = []
            with pytest.raises(Interrupted, match="SIGTERM"), signals.held():  # noqa: PT012
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                reached.append(True)
            assert reached


def test_any_other_error_keeps_the_epochs_done_and_is_raised_as_it_is(make):
    def broken(trainer, epoch, metrics):
        if epoch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    options = {"train.epochs": 3, "train.checkpoint_every": 0, **QUICK}
    trainer = make("ddpo", on_epoch_end=broken, **options)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert checkpoint.load(trainer.dir)["epoch"] == 2
    again = make("ddpo", resume=True, **options)
    assert torch.equal(adapter(again), adapter(trainer))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_ends_the_run_in_words(make, monkeypatch, code):
    trainer = make("ddpo", **QUICK, **{"train.epochs": 3})
    write, written = checkpoint._write, []

    def full(path, *args):
        written.append(path)
        if len(written) > 2:  # two files a checkpoint
            raise OSError(code, os.strerror(code), str(path))
        write(path, *args)

    monkeypatch.setattr(checkpoint, "_write", full)
    said = rf"checkpoint-2 cannot be written: {os.strerror(code)}\nepochs done: 2, not saved"
    with pytest.raises(TrainingStopped, match=said):
        trainer.train()
    assert checkpoint.load(trainer.dir)["epoch"] == 1


class Hangs:
    """redness, which does not return from its `at`-th call."""

    __name__, __module__, differentiable = "redness", "test_trainer", True

    def __init__(self, at):
        self.at = at

    def __call__(self, images, prompts):
        self.at -= 1
        if not self.at:
            time.sleep(600)
        return redness(images, prompts)


@pytest.mark.parametrize(("algorithm", "at"), [("ddpo", 3), ("draft", 3)])
def test_a_reward_that_hangs_ends_the_run(make, algorithm, at):
    """In the thread that scores, and in the loop itself."""
    options = {"train.epochs": 9, "train.reward_timeout": 1.0, **QUICK}
    trainer = make(algorithm, rewards={Hangs(at): 1.0}, **options)
    began = time.monotonic()
    said = r"'redness' has not returned for 1 s.*reward_timeout=1(.|\n)*epochs done: [1-9], saved"
    with pytest.raises(TrainingStopped, match=said):
        trainer.train()
    assert time.monotonic() - began < 30
    assert checkpoint.load(trainer.dir)["epoch"] >= 1


def test_workers_keep_their_order_and_hand_over_errors():
    worker, seen = Worker(), []

    def job(i):
        time.sleep(0.01)
        seen.append(i)
        return 1 / (i - 2)

    futures = [worker.submit(job, i) for i in range(5)]
    futures[4].cancel()
    with pytest.raises(ZeroDivisionError):
        futures[2].result(5)
    assert futures[3].result(5) == 1.0
    assert seen == [0, 1, 2, 3]


def test_a_call_that_hangs_does_not_keep_the_process_alive():
    code = (
        "import runpy, time\n"
        "threads = runpy.run_path('rewards/threads.py')\n"
        "worker = threads['Worker']()\n"
        "worker.submit(time.sleep, 600)\n"
        "assert threads['Worker']().submit(int, '3').result() == 3\n"
        "threads['_work'].__globals__['GRACE'] = 0.2\n"
    )
    start = time.time()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert time.time() - start < 30
