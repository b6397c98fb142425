"""Line charts of a run's metrics, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..verdict import WARNINGS, warning
from .fonts import legible
from .grids import GRAY, INK

TRAINED, JUDGED, WARNED = "#2563eb", "#d97706", "#dc2626"
PANEL = (640, 400)  # px
DPI = 100


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """One panel per curve: the training reward (reward_mean) in blue, held-out means (eval/...) in
    orange, and a red line where the guard first found the run over-optimised, collapsed or failed.

    `rows` come from `record.metrics.read_metrics`; a panel is 640 x 400 px.
    """
    flagged = next(((row["step"], found) for row in rows if (found := warning(row))), None)
    names = list(dict.fromkeys(k for row in rows for k in row))
    shown = [n for n in names if n == "reward_mean"] + [n for n in names if n.startswith("eval/")]
    shown = shown or ["reward_mean"]
    across = min(len(shown), 3 if len(shown) % 3 == 0 or len(shown) > 4 else 2)
    figure, axes = panels(len(shown), across, PANEL)
    for name, ax in zip(shown, axes, strict=True):
        label = legible(name, system=False)  # matplotlib draws with DejaVu Sans alone
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            ax.set_title(f"{label}: no values yet", loc="left", color=GRAY, parse_math=False)
            ax.set_axis_off()
            continue
        steps, values = zip(*points, strict=True)
        color = TRAINED if name == "reward_mean" else JUDGED
        dots = None if len(points) <= 30 else [0, len(points) - 1]
        ax.plot(steps, values, color=color, lw=2.5, marker="o", ms=6, mec="white", markevery=dots)
        ax.set_title(label, loc="left", color=INK, parse_math=False)
        ends = values if len(values) == 1 else (values[0], values[-1])
        ax.set_title(" to ".join(f"{v:.4g}" for v in ends), loc="right", color=color, size=11)
        ax.set_xlabel("epoch")
        if flagged is not None:
            epoch, found = flagged
            ax.axvline(epoch, color=WARNED, lw=1.5)
            ax.annotate(
                WARNINGS[found], (epoch, 1), (4, -6), ("data", "axes fraction"),
                "offset points", color=WARNED, va="top",
            )  # fmt: skip
    return picture(figure)


def panels(n: int, across: int, size: tuple[int, int]) -> tuple[Figure, list[Axes]]:
    """A figure of `n` axes in one style, `across` per row, `size` px each."""
    down = math.ceil(n / across)
    figure = Figure((size[0] * across / DPI, size[1] * down / DPI), DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr]
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax in axes[n:]:
        ax.set_axis_off()
    for ax in axes[:n]:
        ax.grid(axis="y", color="#e5e7eb")
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(GRAY)
        ax.tick_params(colors=GRAY, length=3)
        ax.xaxis.label.set_color(GRAY)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.margins(x=0.03, y=0.08)
    return figure, axes[:n]


def picture(figure: Figure) -> Image.Image:
    """A figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
