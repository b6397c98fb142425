"""What a run's prompts take before its first picture: memory, disk and time.

    PYTHONPATH=.:benchmarks python benchmarks/prompts.py      # writes results/prompts.md; minutes

Each count of distinct prompts is encoded by the text encoders of emoji-sd, as a run does at its
start, in a process of its own. `embeddings` is what they come to, `memory` the most that lay in
main memory beyond the loaded model (files that are mapped into it left out, as the system takes
those back at need).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (1_000, 10_000, 100_000)
OUT = Path(__file__).parent / "results" / "prompts.md"


def anonymous(field: str = "RssAnon") -> float:
    """GiB of main memory of this process, without mapped files."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 2**20


def measure(count: int) -> None:
    """Print a row of the table."""
    import torch

    from diffalign import policies
    from diffalign.policies import texts

    policy = policies.load("assets/emoji-sd")
    policy.encode(["warm up"])
    before, most, written = anonymous(), 0.0, 0
    write = texts._write

    def seen(held, path, left):
        nonlocal most, written
        most, written = max(most, anonymous()), written + texts._size(held)
        write(held, path, left)
        most = max(most, anonymous())

    texts._write = seen
    start = time.perf_counter()
    policy.encode_all([f"a red cat number {i}" for i in range(count)])
    took = time.perf_counter() - start
    most = max(most, anonymous()) - before
    total = written or sum(v.nbytes for row in policy._prompts.values() for v in row.values())
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(count, (64,), generator=generator).tolist()
    start = time.perf_counter()
    policy.encode([f"a red cat number {i}" for i in chosen])
    read = time.perf_counter() - start
    where = f"{written / 2**30:.2f} on disk" if written else "in memory"
    figures = f"{total / 2**30:.2f} | {where} | {most:.2f} | {took:.0f} | {1e3 * read:.0f}"
    print(f"| {count:,} | {figures} |")


def main() -> None:
    lines = [
        "| prompts | embeddings, GiB | where | memory, GiB | encoding, s | a batch of 64, ms |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            made = subprocess.run(
                [sys.executable, __file__, str(count)], check=True, capture_output=True, text=True,
                env={**os.environ, "TMPDIR": folder},
            )  # fmt: skip
            lines.append(made.stdout.strip().splitlines()[-1])
            print(lines[-1], flush=True)
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
