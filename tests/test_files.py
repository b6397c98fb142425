"""Pictures of every kind, as rewards and grids read them."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

import rewards
from diffalign.drawing import grids
from rewards import files
from rewards.files import load_image, open_image

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
GRAY = Image.fromarray((RAMP * 255).round().astype("uint8"))


def pixels(path):
    return np.asarray(open_image(path)).astype(int)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        *[("L", "png", 0), ("LA", "png", 0), ("P", "png", 0), ("RGBA", "webp", 0)],
        *[("L", "jpg", 2), ("CMYK", "jpg", 2), ("CMYK", "tif", 0), ("YCbCr", "jpg", 2)],
        *[("PA", "tif", 0), ("L", "bmp", 0)],
    ],
)
def test_every_mode_is_the_same_picture(tmp_path, mode, suffix, tolerance):
    path = tmp_path / f"a.{suffix}"
    image = GRAY.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else GRAY.convert(mode)
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = pixels(path)
    assert found.shape == (48, 64, 3)
    assert np.abs(found - np.asarray(GRAY)[..., None]).max() <= tolerance


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_more_than_eight_bits_are_scaled(tmp_path, kind):
    values = RAMP if kind == "float32" else (RAMP * 65535).round()
    path = tmp_path / ("a.png" if kind == "uint16" else "a.tif")
    Image.fromarray(values.astype(kind)).save(path)
    assert np.abs(pixels(path) - np.asarray(GRAY)[..., None]).max() <= 1
    assert load_image(path).mean().item() == pytest.approx(0.5, abs=2e-3)
    if kind != "uint16":
        Image.fromarray((values * 3).astype(kind)).save(path)
        with pytest.raises(ValueError, match=r"a\.tif cannot be read .*values from 0 to"):
            open_image(path)


def test_sixteen_bit_color(tmp_path):
    """PIL cannot write it: red rises from 0 to 65535, green falls, blue is half."""
    width, rise = 64, np.linspace(0, 65535, 64)
    row = np.stack([rise, rise[::-1], np.full(width, 32768)], 1).astype(">u2").tobytes()

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, 1, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    ramp = np.linspace(0, 255, 64)
    expected = np.stack([ramp, ramp[::-1], np.full(64, 128)], 1)
    assert np.abs(pixels(tmp_path / "a.png")[0] - expected).max() <= 1


def test_transparency_is_white(tmp_path):
    half = np.zeros((4, 8, 4), "uint8")
    half[:, 4:, 3] = 255  # black, the left half transparent
    expected = np.repeat([[255] * 4 + [0] * 4], 4, 0)
    image = Image.fromarray(half)
    palette = Image.fromarray(np.repeat([[0] * 4 + [1] * 4], 4, 0).astype("uint8"), "P")
    palette.putpalette([10, 20, 30, 0, 0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, save in {
            "rgba.png": lambda p: image.save(p),
            "la.png": lambda p: image.convert("LA").save(p),
            "index.png": lambda p: palette.save(p, transparency=0),
            "bytes.png": lambda p: palette.save(p, transparency=b"\0\xff"),
            "colour.png": lambda p: Image.fromarray(
                np.where(half[..., 3:] > 0, 0, 77).repeat(3, 2).astype("uint8")
            ).save(p, transparency=(77, 77, 77)),
            "deep.png": lambda p: Image.fromarray(
                np.where(half[..., 3] > 0, 0, 300).astype("uint16")
            ).save(p, transparency=300),
        }.items():
            save(tmp_path / name)
            assert (pixels(tmp_path / name) == expected[..., None]).all(), name
    (shown,) = grids.fit([image], 8)  # a grid's pictures, too
    assert (np.asarray(shown) == expected[..., None]).all()


def test_a_photograph_is_upright_and_an_animation_its_first_frame(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 8)
    frames = [Image.new("RGB", (8, 8), c) for c in ("blue", "red")]
    for name in ("a.webp", "b.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(tmp_path / name).getpixel((2, 2)) == (0, 0, 255)


def test_a_huge_picture_is_refused_by_name_without_a_warning(tmp_path):
    sides = (8193, 10_000, 14_000)  # beyond our limit, PIL's warning, PIL's error
    for side in sides:
        Image.new("1", (side, side)).save(tmp_path / f"{side}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in sides:
            with pytest.raises(ValueError, match=rf"{side}\.png is too large, the limit is 67,108"):
                load_image(tmp_path / f"{side}.png")
        with pytest.raises(ValueError, match="too large"):
            files.check_images(str(tmp_path / "8193.png"))


def test_what_is_no_picture_is_named(tmp_path):
    GRAY.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    damaged = whole.replace(b"IDAT", b"IDAX")
    for name, data in (
        ("empty.png", b""),
        ("text.png", b"a text"),
        ("cut.png", whole[: len(whole) // 2]),
        ("head.png", whole[:20]),
        ("damaged.png", damaged),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a picture .*; remove it"):
            load_image(tmp_path / name)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("loop.png", "folder.png", "none.png"):
        with pytest.raises(ValueError, match=rf"{name} (is not a file|does not exist)"):
            load_image(tmp_path / name)


def test_references_are_looked_at_before_a_model_is_loaded(tmp_path):
    (tmp_path / "text.png").write_bytes(b"a text")
    spec = {"similarity": {"references": str(tmp_path), "model": "facebook/dinov2-base"}}
    with pytest.raises(ValueError, match=r"rewards\.similarity: .*text\.png cannot be read"):
        rewards.check(spec)
    prompt = [{"reference": str(tmp_path / "text.png")}]
    spec["similarity"].pop("references")
    with pytest.raises(ValueError, match=r"rewards\.similarity: .*text\.png cannot be read"):
        rewards.check(spec, ["a"], prompt)


def test_options_of_rewards_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    GRAY.save(tmp_path / "a.png")
    rewards.check({"similarity": {"references": ["~/a.png"]}})
    with pytest.raises(ValueError, match=rf"{tmp_path}/none"):
        rewards.check({"similarity": {"references": "~/none"}})
