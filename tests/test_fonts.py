"""Text in grids: every script is drawn, or written as an escape; long texts are cut."""

from __future__ import annotations

import io

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import Image, ImageChops

from diffalign.drawing import curves, fonts, grids

DOG, PX = "🐶", 109


def bitmap_font(path):
    """A font of an orange square for the dog, of one size and without outlines, as Noto Color Emoji
    is."""
    builder = FontBuilder(2048, isTTF=True)
    builder.setupGlyphOrder([".notdef", "dog"])
    builder.setupCharacterMap({ord(DOG): "dog"})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", "dog"], (2550, 0)))
    builder.setupHorizontalHeader(ascent=1900, descent=-500)
    builder.setupOS2()
    builder.setupPost(keepGlyphNames=False)
    builder.setupNameTable({"familyName": "dog", "styleName": "Regular"})
    data = io.BytesIO()
    Image.new("RGBA", (PX, PX), "orange").save(data, "PNG")
    glyph = cbdt_bitmap_format_17(b"", builder.font)
    glyph.imageData, glyph.metrics = data.getvalue(), SmallGlyphMetrics()
    vars(glyph.metrics).update(height=PX, width=PX, BearingX=0, BearingY=100, Advance=PX)
    builder.font["CBDT"] = bitmaps = newTable("CBDT")
    bitmaps.version, bitmaps.strikeData = 3.0, [{"dog": glyph}]
    strike, index = Strike(), eblc_index_sub_table_1(b"", builder.font)
    one = {"firstGlyphIndex": 1, "lastGlyphIndex": 1}
    vars(index).update(names=["dog"], indexFormat=1, imageFormat=17, **one)
    strike.indexSubTables = [index]
    sizes = {"ppemX": PX, "ppemY": PX, "bitDepth": 32, "flags": 1, "colorRef": 0}
    vars(strike.bitmapSizeTable).update(sizes, startGlyphIndex=1, endGlyphIndex=1)
    for name in ("hori", "vert"):
        line = SbitLineMetrics()
        vars(line).update(dict.fromkeys(("caretSlopeNumerator", "caretSlopeDenominator"), 0))
        vars(line).update(dict.fromkeys(("caretOffset", "minOriginSB", "minAdvanceSB"), 0))
        vars(line).update(dict.fromkeys(("maxBeforeBL", "minAfterBL", "pad1", "pad2"), 0))
        vars(line).update(ascender=100, descender=-27, widthMax=PX)
        setattr(strike.bitmapSizeTable, name, line)
    builder.font["CBLC"] = places = newTable("CBLC")
    places.version, places.strikes = 3.0, [strike]
    builder.save(path)
    return str(path)


@pytest.fixture
def system(monkeypatch):
    """Sets the fonts that the system has; none at first."""

    def use(*paths):
        monkeypatch.setattr(fonts, "_system", lambda: list(paths))
        for cached in (fonts._font_of, fonts._shown):
            cached.cache_clear()

    use()
    yield use
    monkeypatch.undo()
    for cached in (fonts._font_of, fonts._shown):
        cached.cache_clear()


def drawn(text, size=20):
    canvas = Image.new("RGB", (200, 40), "white")
    fonts.Font(size).draw(canvas, 4, 4, text, "black")
    return canvas


def same(a, b):
    return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


PICTURE = Image.new("RGB", (64, 64), "white")


def grid(*texts, **options):
    return grids.comparison_grid({"a": [PICTURE] * len(texts)}, texts, **options)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("naïve café", "naüve cafè"),
        ("привет", "победа"),
        ("Ελλάς", "Ἑλλάς"),
        ("שלום", "עולם"),
        ("مرحبا", "سلام"),
        ("红苹果", "蓝汽车"),
        ("🐶", "🦊"),
        ("안녕", "세요"),
        ("\ud800", "\udc00"),
        ("नमस्ते", "สวัสดี"),
    ],
)
def test_different_texts_look_different_and_nothing_is_a_box(system, one, other):
    assert not same(grid(one), grid(other))
    assert not same(grids.image_grid([PICTURE], 1, [one]), grids.image_grid([PICTURE], 1, [other]))
    box = drawn("\U000f0000")  # of private use: no font has it
    shown = fonts.legible(one)
    for letter in set(shown) - {" "}:
        assert not same(drawn(letter), box), letter
        assert not same(drawn(letter), drawn("")) or letter == "\u093e"


def test_legible():
    assert fonts.legible("e\u0301a\u0308") == "éä"
    assert fonts.legible("a\u200b\u2060b\ufe0f\u00ad") == "ab"
    assert fonts.legible("a\tb\nc") == "a b c"
    assert fonts.legible("\x07\ud800\U000f0000") == "\\u0007\\ud800\\U000f0000"
    assert fonts.legible("中", system=False) == "\\u4e2d"


def test_what_no_font_has_is_written_in_words_or_numbers(system):
    assert fonts.legible("a 🐶, 中") == "a [dog face], \\u4e2d"
    assert fonts.legible("👍🏽 🇫🇷") == "[thumbs up sign] [f][r]"


def test_a_font_of_the_system_is_used_for_what_it_has(system, tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    system(str(tmp_path / "damaged.ttf"), bitmap_font(tmp_path / "dog.ttf"))
    assert fonts.legible("a 🐶 and a 🦊") == "a 🐶 and a [fox face]"
    font = fonts.Font(20)
    # the bitmap is scaled from 109 px to the 20 of the text, and stands on its line
    wide = font.getlength("🐶")
    assert wide == pytest.approx(2550 / 2048 * 20, abs=0.3)
    assert font.getlength("a🐶b") == pytest.approx(font.getlength("ab") + wide, abs=1)
    red, _, blue = np.asarray(drawn("a🐶b")).transpose(2, 0, 1).astype(int)
    rows, columns = np.nonzero(red - blue > 128)  # orange
    assert columns.min() == pytest.approx(4 + font.getlength("a"), abs=1)
    assert np.ptp(columns) == pytest.approx(20, abs=1.5)
    assert np.ptp(rows) == pytest.approx(20, abs=1.5)


def test_the_fonts_of_the_system_are_ranked(monkeypatch):
    from matplotlib import font_manager

    names = ["Arial", "NotoSans-Bold", "LastResort-Regular", "NotoSansCJK-Regular", "unifont"]
    names += ["Noto Color Emoji", "NotoSansThai-Regular", "WenQuanYi Zen Hei"]
    paths = [f"/fonts/{name}.ttf" for name in names]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    fonts._system.cache_clear()
    found = [path.split("/")[-1].split(".")[0] for path in fonts._system()]
    fonts._system.cache_clear()
    assert found == [
        *("NotoSansCJK-Regular", "WenQuanYi Zen Hei", "NotoSansThai-Regular"),
        *("Noto Color Emoji", "unifont", "NotoSans-Bold"),
    ]


@pytest.mark.parametrize("text", ["a very detailed picture of a dog " * 60, "x" * 3000, "红" * 900])
def test_a_long_prompt_makes_no_high_grid(text):
    short, long = grid("a dog"), grid(text)
    assert long.height == short.height
    assert long.width <= short.width + 150
    assert not same(grid(f"{text} [1]"), grid(f"{text} [2]"))  # its end is kept
    font = fonts.Font(14)
    lines = grids.wrap(f"{text} [1]", font, 150, 5)
    assert len(lines) == 5
    assert lines[-1].startswith("… ")
    assert lines[-1].endswith("[1]")
    assert max(map(font.getlength, lines)) <= 150
    labels = [grids.image_grid([PICTURE], 1, [label]).height for label in (text, "a\n b " * 9)]
    assert max(labels) < 64 + 4 * 20 + 3 * 8


def test_an_empty_prompt_is_drawn():
    assert same(grid(""), grid("(empty prompt)"))
    assert grid("", "\u200b", "a").height > grid("a").height


def test_the_names_of_curves_are_legible(recwarn):
    rows = [{"step": i, "reward_mean": 1.0 * i, "eval/红 $x$ _^{": 2.0 * i} for i in range(2)]
    image = curves.draw_curves(rows)
    other = [{k.replace("红", "蓝"): v for k, v in row.items()} for row in rows]
    assert not same(image, curves.draw_curves(other))
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
