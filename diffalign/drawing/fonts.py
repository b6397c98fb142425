"""Text in pictures. DejaVu Sans, which comes with matplotlib, draws Latin, Greek, Cyrillic, Hebrew
and Arabic; fonts of the system draw the rest; characters without a font become readable escapes."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import unicodedata
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# prefixes of font file names in order of preference, in lower case, without spaces and hyphens
FAMILIES = (
    *("notosanscjk", "notosanssc", "sourcehansans", "pingfang", "hiraginosansgb", "msyh", "wqy"),
    *("wenquanyi", "simhei", "simsun", "yugoth", "msgothic", "malgun", "applesdgothicneo", "nanum"),
    *("ipaex", "ipag", "takao", "droidsansfallback", "arialunicode", "arialuni", "notosans"),
    *("segoeui", "applesymbols", "symbola", "lohit", "nirmala", "leelawui", "kohinoor", "thonburi"),
    *("seguiemj", "applecoloremoji", "notocoloremoji", "twemoji", "notoemoji", "unifont", "noto"),
)
STYLES = ("bold", "italic", "oblique", "thin", "light", "black", "condensed", "mono", "serif")
BITMAPS = (109, 160, 136, 128, 96, 64, 32)  # px: sizes of color fonts without outlines


class Font:
    """Draws text at one size in px, in as many fonts as it needs; the text must be `legible`."""

    def __init__(self, size: float):
        self.size = max(1, round(size))
        self.ascent = _face(_dejavu(), self.size)[0].getmetrics()[0]

    def getlength(self, text: str) -> float:
        """The width of a text in px."""
        faces = [(_face(path, self.size), part) for path, part in _runs(text)]
        return sum(font.getlength(part) * factor for (font, factor), part in faces)

    def draw(
        self, canvas: Image.Image, x: float, y: float, text: str, color: str, anchor: str = "left"
    ) -> None:
        """Write on an RGB image below y, with x at the text's "left", "middle" or "right"."""
        x -= {"left": 0.0, "middle": 0.5, "right": 1.0}[anchor] * self.getlength(text)
        base = y + self.ascent
        for path, part in _runs(text):
            font, factor = _face(path, self.size)
            if factor == 1:
                ImageDraw.Draw(canvas).text(
                    (x, base), part, color, font, anchor="ls", embedded_color=True
                )
            else:
                tile = _tile(font, part, color)
                size = [max(1, round(side * factor)) for side in tile.size]
                small = tile.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
                canvas.paste(small, (round(x), round(base - font.getmetrics()[0] * factor)), small)
            x += font.getlength(part) * factor


def legible(text: str, system: bool = True) -> str:
    """The drawable form of a text: composed, and without invisible characters. If no font has a
    character, a symbol becomes its name, [dog face], and any other its code point, \\u4e2d.
    system: use the fonts of the system besides DejaVu Sans."""
    return "".join(_shown(c, system) for c in unicodedata.normalize("NFC", text))


@functools.lru_cache(4096)
def _shown(c: str, system: bool) -> str:
    if c.isspace():
        return " "
    kind = unicodedata.category(c)
    invisible = kind == "Cf" and c != "\u200c"  # keep it: it separates Persian letters
    if invisible or "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef":
        return ""
    if _font_of(c) if system else ord(c) in _letters(_dejavu()):
        return c
    if "\U0001f3fb" <= c <= "\U0001f3ff":  # the skin tone of the emoji before
        return ""
    name = unicodedata.name(c, "").lower().removeprefix("regional indicator symbol letter ")
    if kind[0] == "S" and name:
        return f"[{name}]"
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def _runs(text: str) -> list[tuple[str, str]]:
    """The text in parts of one font each. A mark stays with its letter if one font has both."""
    paths: list[str] = []
    for c in text:
        path = _font_of(c) or _dejavu()
        mark = unicodedata.category(c) == "Mn" and paths
        paths.append(paths[-1] if mark and ord(c) in _letters(paths[-1]) else path)
    pairs = groupby(zip(paths, text, strict=True), lambda pair: pair[0])
    return [(path, "".join(c for _, c in part)) for path, part in pairs]


@functools.lru_cache(4096)
def _font_of(c: str) -> str | None:
    """The first font that draws a character."""
    if ord(c) in _letters(_dejavu()):
        return _dejavu()
    return next((p for p in _system() if ord(c) in _letters(p) and _has_ink(p, c)), None)


def _has_ink(path: str, c: str) -> bool:
    """Whether PIL draws the character: it cannot draw those of some color fonts."""
    try:
        return _tile(_face(path, 32)[0], c, "black").getbbox() is not None
    except OSError:
        return False


def _tile(font: ImageFont.FreeTypeFont, text: str, color: str) -> Image.Image:
    """The text on a transparent image, from its ascender to its descender."""
    tile = Image.new("RGBA", (max(1, math.ceil(font.getlength(text))), sum(font.getmetrics())))
    ImageDraw.Draw(tile).text((0, 0), text, color, font, anchor="la", embedded_color=True)
    return tile


@functools.cache
def _dejavu() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _system() -> list[str]:
    """The paths of the system's fonts that are in FAMILIES, best first."""
    from matplotlib import font_manager

    ranked = []
    for path in font_manager.findSystemFonts():
        name = re.sub(r"[\s_-]", "", Path(path).stem.lower())
        rank = next((i for i, family in enumerate(FAMILIES) if name.startswith(family)), None)
        if rank is not None:
            ranked.append((any(style in name for style in STYLES), rank, len(name), path))
    return [path for *_, path in sorted(ranked)]


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The characters that a font has a glyph for; empty if the font cannot be read."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except Exception:  # a damaged file
        return frozenset()


@functools.lru_cache(256)
def _face(path: str, size: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """A font at a size, or at a size that it has, and the factor to scale it by."""
    for px in (size, *BITMAPS):
        try:
            font = ImageFont.truetype(path, px)
        except OSError:
            continue
        with contextlib.suppress(OSError, ValueError, NotImplementedError):  # not a variable font
            font.set_variation_by_name("Regular")  # many are thin by default
        return font, size / px
    raise OSError(f"font {path} cannot be used at {size} px")
