"""The record of a run: metrics.csv, metrics.jsonl, reward curves, and external trackers.

The two files are always written and are enough to draw every curve again; TensorBoard, W&B and
others are added by name through `accelerate`.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rewards.files import open_image
from rewards.redaction import redact

from ..config.decoding import suggest
from ..config.files import write_atomic
from ..config.text import read_text
from ..drawing.grids import save_png

if TYPE_CHECKING:
    from torch import Tensor

EXTRA = ("tensorboard", "wandb", "trackio")
"""The trackers that `pip install diffalign[track]` installs."""

MISMATCH = 1e-3
"""Largest |ratio - 1| of a stored log-probability before any update; above it, rollout and training
disagree."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ValueError` for a tracker that accelerate does not know or that is not installed."""
    if not names:  # accelerate is slow to import
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            tip = suggest(name, LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"log.trackers: '{name}' is not a tracker accelerate knows{tip}")
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(p) for p in packages):
            wanted = "diffalign[track]" if name in EXTRA else name
            raise ValueError(
                f"log.trackers: the package of '{name}' is not installed; pip install {wanted}, "
                "or take it off the list (metrics.csv is written in any case)"
            )


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: {"step": int, name: float or None where it was not finite}.

    A last line cut off by a crash is left out. Raises `FileNotFoundError`, or `ValueError` for any
    other line that is not a row.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"no metrics.jsonl in {run_dir}; is it the folder of a run?")
    rows, lines = [], read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None)
            row["step"] = int(row["step"])
            if not all(x is None or isinstance(x, (int, float)) for x in row.values()):
                raise TypeError
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == len(lines):  # without its newline: cut off
                break
            raise ValueError(
                f"{path}:{number} is not a row of metrics: {line[:60]}; remove that line"
            ) from error
        rows.append(row)
    return rows


def worries(metrics: Mapping[str, float]) -> list[str]:
    """Warnings for the user about the metrics of an epoch."""
    found = []
    if metrics.get("mismatch_max", 0) > MISMATCH:
        found.append(
            "the stored log-probabilities differ from those of training by a ratio of "
            f"{metrics['mismatch_max']:.2g}; is the dtype or the batch to blame?"
        )
    if metrics["skipped_steps"]:
        found.append(
            f"{metrics['skipped_steps']:g} update(s) skipped, as the gradient was not finite"
        )
    return found


class Meter:
    """Means and maxima of diagnostics over the micro-batches of an epoch.

    Values stay on their device until `totals` reads them: to read one right away would stop the CPU
    at every micro-batch until the device has caught up.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor, int]]] = {}  # mean, largest, rows

    def add(self, values: Mapping[str, Tensor | float], rows: int = 1) -> None:
        """Add diagnostics of `rows` rows: each a tensor (rows,), or a scalar that is their mean."""
        import torch

        for name, value in values.items() if rows else ():
            value = torch.as_tensor(value).detach()
            # float64 for sums of many, except on Apple's devices, which have none
            value = value.float() if value.device.type == "mps" else value.double()
            self._parts.setdefault(name, []).append((value.mean(), value.max(), rows))

    def totals(self) -> dict[str, tuple[float, int, float]]:
        """Sum over the rows, their number, and the largest value of every diagnostic."""
        import torch

        found = {}
        for name, parts in self._parts.items():
            means, largest = torch.stack([torch.stack(part[:2]) for part in parts]).T.tolist()
            rows = [part[2] for part in parts]
            total = sum(mean * n for mean, n in zip(means, rows, strict=True))
            found[name] = total, sum(rows), max(largest)
        return found

    @staticmethod
    def means(everyone: Sequence[Mapping[str, tuple[float, int, float]]]) -> dict[str, float]:
        """From the totals of all processes the mean of every diagnostic, and the largest value of
        those named *mismatch*."""
        parts: dict[str, list[tuple[float, int, float]]] = {}
        for totals in everyone:
            for name, part in totals.items():
                parts.setdefault(name, []).append(part)
        found = {name: sum(p[0] for p in ps) / sum(p[1] for p in ps) for name, ps in parts.items()}
        mismatch = {name: ps for name, ps in parts.items() if "mismatch" in name}
        return found | {f"{name}_max": max(p[2] for p in ps) for name, ps in mismatch.items()}


class Tracker:
    """Writes the metrics of a run, one row per `log`. Only the main process writes.

    Args:
        run_dir: folder of the run; made if missing.
        trackers: names of external trackers; they need `accelerator`, made with `log_with=trackers`
            and, for TensorBoard, a `project_dir`.
        config: nested settings, for the external trackers; secrets are left out.
        accelerator: an `accelerate.Accelerator`; None = a single process.
        resume_step: rows of later steps are dropped, so that a resumed run writes them again. None
            starts anew; the metrics of an earlier run are kept as metrics.previous.*.

    Raises `ValueError` for trackers that cannot be used (`check_trackers`).
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        accelerator: Any = None,
        resume_step: int | None = None,
    ) -> None:
        if trackers and accelerator is None:
            raise ValueError(f"log.trackers={list(trackers)} needs an accelerator; pass one")
        check_trackers(trackers)
        self.dir = Path(run_dir)
        self.accelerator = accelerator if trackers else None
        self.main = accelerator is None or accelerator.is_main_process
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        if self.accelerator is not None:
            self.accelerator.init_trackers("diffalign", config=_flat(redact(config or {})))
        if not self.main:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        exists = (self.dir / "metrics.jsonl").exists()
        if resume_step is not None and exists:
            self.rows = [row for row in read_metrics(self.dir) if row["step"] <= resume_step]
            self.columns = list(dict.fromkeys(["step", *(k for row in self.rows for k in row)]))
        elif exists:
            for suffix in ("jsonl", "csv"):
                old = self.dir / f"metrics.{suffix}"
                if old.exists():
                    old.replace(self.dir / f"metrics.previous.{suffix}")
        text = "".join(_json_line(row) for row in self.rows)
        write_atomic(self.dir / "metrics.jsonl", text.encode())
        self._write_csv()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a row: floats (or 0-d tensors) by name. A value that is not finite is empty in the
        CSV and null in the JSONL. Raises `ValueError` for a value that is not a number.
        """
        row: dict[str, Any] = {"step": int(step)}
        for name, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"metric '{name}'={value!r} is not a number") from error
            row[name] = number if math.isfinite(number) else None
        if self.accelerator is not None:
            finite = {k: v for k, v in row.items() if v is not None and k != "step"}
            self.accelerator.log(finite, step=row["step"])
        if not self.main:
            return
        self.rows.append(row)
        with open(self.dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_json_line(row))
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._write_csv()
        else:
            with open(self.dir / "metrics.csv", "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def log_images(
        self, step: int, name: str, image: Image.Image | str | os.PathLike[str]
    ) -> Path | None:
        """Shows an image in TensorBoard, W&B or SwanLab (the other trackers get none).

        A PIL image is saved as grids/<name>_<step>.png as well. Returns the path of the file, or
        None on a process other than the main one.
        """
        if not self.main:
            return None
        if isinstance(image, Image.Image):
            path = self.dir / "grids" / f"{name.replace('/', '_')}_{step:04d}.png"
            save_png(image, path)
        else:
            path = Path(image)
            image = open_image(path)
        picture = image.convert("RGB")
        for tracker in self.accelerator.trackers if self.accelerator is not None else ():
            if tracker.name == "tensorboard":
                batch = np.asarray(picture)[None]
                tracker.log_images({name: batch}, step=step, dataformats="NHWC")
            elif tracker.name in ("wandb", "swanlab"):
                tracker.log_images({name: [picture]}, step=step)
        return path

    def curve(self, path: str | os.PathLike[str]) -> None:
        """Draws reward_mean and every eval/ column over the steps, one panel each, as PNG."""
        if self.main:
            from ..drawing.curves import draw_curves  # imports matplotlib

            save_png(draw_curves(self.rows), path)

    def close(self) -> None:
        """Ends the external trackers (which upload what they hold)."""
        if self.accelerator is not None:
            self.accelerator.end_training()

    def _write_csv(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.dir / "metrics.csv", text.getvalue().encode())


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}; lists and None become text for TensorBoard."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            plain = isinstance(value, (bool, int, float, str))
            flat[f"{prefix}{key}"] = value if plain else json.dumps(value, default=str)
    return flat
