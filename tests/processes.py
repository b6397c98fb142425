"""Runs of one and of several processes on CPUs, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def start(processes: int, arguments, cwd=ROOT, **environ) -> subprocess.Popen:
    """`python ARGUMENTS` in so many processes; the output of all is one stream of text."""
    command = [sys.executable, *map(str, arguments)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command[1:1] = [*torchrun, "--master_port", str(port)]
    fixed = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        fixed |= {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **fixed, **environ}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(processes: int, arguments, timeout=240.0, **environ) -> tuple[int, str]:
    """Exit status and output of `start`."""
    process = start(processes, arguments, **environ)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return process.returncode, output
