"""Runs that are killed again and again end with the weights of one that was not.

    pytest tests/test_kills.py -m slow -s

prints how often each was killed, and in which epochs; 17 minutes on two cores (-n 2).
"""

import os
import random
import re
import signal
import time

import pytest
import torch
from processes import FSDP, ROOT, start
from test_processes import children

from diffalign.policies.sharding import whole
from diffalign.record import checkpoint

pytestmark = pytest.mark.slow

EPOCHS = 400
REWARD = """
import time

def redness(images, prompts):
    time.sleep(0.01)
    return images[:, 0].mean((1, 2)) - images[:, 1:].square().mean((1, 2, 3))
"""
KINDS = {
    "LoRA": (1, 4, {}),
    "all weights": (1, 0, {}),
    "LoRA, two processes": (2, 4, {}),
    "FSDP2, two processes": (2, 0, FSDP),
}


class Runs:
    """A run that can be started, killed and taken up again."""

    def __init__(self, folder, model, rank, processes, environ):
        (folder / "mine.py").write_text(REWARD)
        self.folder, self.processes = folder, processes
        self.environ = {**environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{folder}"}
        self.config = folder / "c.yaml"
        self.config.write_text(
            f"model: {{name: {model}, resolution: 16, lora_rank: {rank}}}\n"
            "algorithm: {type: awm}\nsampler: {steps: 3, kernel: ode, batch: 4}\n"
            "rewards: {mine:redness: 1.0}\ndata: {groups: 2, group_size: 4}\n"
            "train: {checkpoint_every: 1, ema: 0.5, lr: 1.0e-4}\neval: {prompts: null}\n"
        )

    def begin(self, name, epochs):
        arguments = ["train.py", self.config, "--log.dir", self.folder / name]
        arguments += ["--train.epochs", str(epochs), "--resume", "latest"]
        return start(self.processes, arguments, **self.environ)

    def epochs(self, name):
        found = checkpoint.found(self.folder / name)
        return max((int(p.name.rpartition("-")[2]) for p in found), default=0)

    def weights(self, name):
        state = checkpoint.load(self.folder / name)
        parts = {"adapter": state["adapter"], **state["copies"]}
        return {f"{part}.{k}": whole(v) for part, ts in parts.items() for k, v in ts.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "times"), [("SIGKILL", 20), ("SIGTERM", 10)])
def test_kills(kind, name, times, pipelines, tmp_path):
    processes, rank, environ = KINDS[kind]
    runs = Runs(tmp_path, pipelines["sd-v"], rank, processes, environ)
    chance, number, killed = random.Random(f"{kind} {name}"), getattr(signal, name), []
    while len(killed) < times:
        before, process = runs.epochs("killed"), runs.begin("killed", EPOCHS)
        until = time.monotonic() + 120
        while runs.epochs("killed") <= before:  # it has gone on
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.6))
        pids = [process.pid] if processes == 1 else children(process)
        os.kill(chance.choice(pids), number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode, output
        assert "damaged" not in output
        if name == "SIGTERM":
            said = re.findall(r"epochs done: (\d+), saved", output)
            assert said, output
            assert runs.epochs("killed") >= int(said[-1])
        killed.append(runs.epochs("killed"))
    epochs = killed[-1] + 2
    for run in ("killed", "whole"):
        process = runs.begin(run, epochs)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    ours, theirs = runs.weights("killed"), runs.weights("whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    print(f"\n{kind}: {times} x {name} after epochs {killed}; {epochs} epochs, bit for bit")
