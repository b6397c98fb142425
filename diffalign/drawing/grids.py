"""Pictures of pictures: before/after grids with prompts and scores, drawn with PIL."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffalign.config.files import to_json, write_atomic
from diffalign.drawing.fonts import Font, legible
from rewards.files import flat
from rewards.redaction import redact

if TYPE_CHECKING:
    from torch import Tensor

Picture = Union[Image.Image, "Tensor"]
Score = float | None | Mapping[str, float]

INK, GRAY = "#1f2430", "#6b7280"
GUTTER = 8  # px between pictures
LINES = 4  # most lines of a label or a header, and of a prompt beside low pictures
SMALLEST, LARGEST = 192, 512  # px of a default cell: text stays legible, and the file a few MB


def to_pil(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit RGB image, as round(255 clamp(x)).

    NaN is drawn black, so that a run that went wrong can still save its image. Raises `ValueError`
    for another shape.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"an image is (3, H, W), not {tuple(tensor.shape)}; pass one at a time")
    bytes_ = tensor.detach().float().cpu().nan_to_num(0).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def save_png(
    image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG atomically, making its folders; `metadata` goes into the text chunk "diffalign"
    as JSON (read it with `json.loads(Image.open(path).info["diffalign"])`), without secrets.

    Raises `ValueError` if the path does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png, and that is what is written")
    info = PngInfo()
    if metadata is not None:
        info.add_text("diffalign", to_json(redact(metadata)))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    write_atomic(path, data.getvalue())


def comparison_grid(
    columns: Mapping[str, Sequence[Picture]],
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[Score]] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """One row per prompt, one column per entry of `columns`, on white.

    Args:
        columns: header -> one picture per prompt, PIL or (3, H, W) in [0, 1].
        prompts: written on the left, wrapped, and cut if they are higher than the pictures.
        scores: header -> one score per prompt, written under the picture: a float, {name: float}
            or None. Columns without an entry show no scores.
        cell: longer side of a picture in px. None = that of the first picture, enlarged by a whole
            factor to at least 192, and then limited to 512.

    Raises `ValueError` when lengths do not match or there is nothing to show.
    """
    if not columns or not prompts:
        raise ValueError("a grid needs at least one column and one prompt")
    for what, table in (("pictures", columns), ("scores", scores or {})):
        for name, entries in table.items():
            if name not in columns:
                raise ValueError(f"scores of '{name}', which is not among {list(columns)}")
            if len(entries) != len(prompts):
                raise ValueError(
                    f"column '{name}' has {len(entries)} {what} for {len(prompts)} prompts"
                )
    pictures = fit([p for column in columns.values() for p in column], cell)
    width = max(p.width for p in pictures)
    size = _text_size(width)
    head, body, small = (Font(size * s) for s in (1.15, 1, 0.85))
    most = max(LINES, max(p.height for p in pictures) // _line(body))
    texts = [wrap(text or "(empty prompt)", body, round(width * 0.9), most) for text in prompts]
    widths = [body.getlength(line) for lines in texts for line in lines]
    left = math.ceil(max(widths, default=0)) + 2 * GUTTER
    headers = [wrap(name, head, width, LINES) for name in columns]
    top = max(len(h) for h in headers) * _line(head) + 2 * GUTTER

    rows, heights = [], []
    for i in range(len(prompts)):
        row = [pictures[c * len(prompts) + i] for c in range(len(columns))]
        notes = [_score_lines((scores or {}).get(name), i, small, width) for name in columns]
        under = max(p.height + len(n) * _line(small) for p, n in zip(row, notes, strict=True))
        # A score belongs to the picture above it, so leave more room below the score than above.
        room = 2 * GUTTER if any(notes) else GUTTER
        heights.append(max(under, len(texts[i]) * _line(body)) + room)
        rows.append((row, notes))

    canvas = Image.new(
        "RGB", (left + (width + GUTTER) * len(columns), top + sum(heights) + GUTTER), "white"
    )
    for c, lines in enumerate(headers):
        x = left + c * (width + GUTTER) + width / 2
        start = top - GUTTER - len(lines) * _line(head)
        for n, line in enumerate(lines):
            head.draw(canvas, x, start + n * _line(head), line, INK, "middle")
    y = top
    for lines, (row, notes), height in zip(texts, rows, heights, strict=True):
        for n, line in enumerate(lines):
            body.draw(canvas, GUTTER, y + n * _line(body), line, INK)
        for c, picture in enumerate(row):
            x = left + c * (width + GUTTER)
            canvas.paste(picture, (x + (width - picture.width) // 2, y))
            for n, line in enumerate(notes[c]):
                below = y + picture.height + 2 + n * _line(small)
                small.draw(canvas, x + width / 2, below, line, GRAY, "middle")
        y += height
    return canvas


def image_grid(
    images: Sequence[Picture], columns: int, labels: Sequence[str] | None = None
) -> Image.Image:
    """Pictures, PIL or (3, H, W) in [0, 1], row by row at their own size, above their labels.

    Raises `ValueError` for no images, columns < 1 or a number of labels other than that of images.
    """
    if not images or columns < 1:
        raise ValueError(f"{len(images)} images in columns={columns}: both must be at least 1")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    pictures = [_pil(p) for p in images]
    columns = min(columns, len(pictures))
    width = max(p.width for p in pictures)
    font = Font(_text_size(width) * 0.85)
    texts = [wrap(label, font, width, LINES) for label in labels or [""] * len(pictures)]
    heights = [
        max(
            p.height + len(t) * _line(font)
            for p, t in zip(pictures[i : i + columns], texts[i : i + columns], strict=True)
        )
        for i in range(0, len(pictures), columns)
    ]
    total = sum(heights) + GUTTER * (len(heights) + 1)
    canvas = Image.new("RGB", ((width + GUTTER) * columns + GUTTER, total), "white")
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x = GUTTER + i % columns * (width + GUTTER)
        y = GUTTER * (i // columns + 1) + sum(heights[: i // columns])
        canvas.paste(picture, (x + (width - picture.width) // 2, y))
        for n, line in enumerate(lines):
            below = y + picture.height + 2 + n * _line(font)
            font.draw(canvas, x + width / 2, below, line, GRAY, "middle")
    return canvas


def wrap(text: str, font: Font, width: float, most: int | None = None) -> list[str]:
    """Breaks the `legible` form of a text into lines of at most `width` px, at spaces or inside
    words that are too long. If there are more than `most` >= 2 lines, keeps the first ones and,
    after an ellipsis, the end of the text, which may tell the seed."""
    words, lines = legible(text).split(), [""]
    for word in words:
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
            if most is not None and len(lines) > most + 1:  # the first may be empty
                break
    lines = [line for line in lines if line]
    if most is None or len(lines) <= most:
        return lines
    end = ""
    for letter in reversed(" ".join(words)):
        if font.getlength(f"… {letter}{end}") > width:
            break
        end = letter + end
    return [*lines[: most - 1], f"… {end.partition(' ')[2] or end}"]


def _line(font: Font) -> int:
    return round(font.size * 1.3)


def _text_size(width: int) -> float:
    return max(width / 14, 13)


def _pil(picture: Picture) -> Image.Image:
    return flat(picture) if isinstance(picture, Image.Image) else to_pil(picture)


def fit(pictures: Sequence[Picture], cell: int | None = None) -> list[Image.Image]:
    """Pictures resized to `cell`, as `comparison_grid` shows them."""
    images = [_pil(p) for p in pictures]
    side = max(images[0].size)
    if cell is None:
        cell = min(side * math.ceil(SMALLEST / side), LARGEST)
    fitted = []
    # LANCZOS for enlarging too: blocks of pixels distract from small pictures with soft edges.
    for image in images:
        factor = cell / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        fitted.append(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))
    return fitted


def _score_lines(scores: Sequence[Score] | None, i: int, font: Font, width: int) -> list[str]:
    score = scores[i] if scores else None
    if score is None:
        return []
    parts = score.items() if isinstance(score, Mapping) else [("", score)]
    return [line for name, v in parts for line in wrap(f"{name} {v:.3g}", font, width)]
