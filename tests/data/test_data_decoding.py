"""Encoded images are converted by a stated rule, or rejected by name."""

from __future__ import annotations

import io
import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathnet.data import decoding
from pathnet.data.decoding import BrokenImage, decode, read_image, to_rgb

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def header_only(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size that its data does not have."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# Colours


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_the_high_byte_of_a_16_bit_grey_is_kept(kind: str) -> None:
    grey = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    pixels = decode(encoded(Image.fromarray(grey), kind), "grey")
    assert pixels.tolist() == [[[value] * 3 for value in row] for row in (grey >> 8).tolist()]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_all_16_bit_modes_are_converted_in_the_same_way(mode: str) -> None:
    image = Image.new("I" if mode == "I" else mode, (2, 1))
    image.putpixel((0, 0), 0x1234)
    image.putpixel((1, 0), 0xFFFF)
    assert np.asarray(to_rgb(image, "grey")).tolist() == [[[0x12] * 3, [0xFF] * 3]]


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_16_bits_are_rejected(value: int) -> None:
    with pytest.raises(BrokenImage, match="deep has the mode I: expected values from 0 to 65535"):
        to_rgb(Image.new("I", (1, 1), value), "deep")


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_a_mode_without_a_rule_is_rejected(mode: str) -> None:
    with pytest.raises(BrokenImage, match=f"data: odd has the mode {mode}: expected grey"):
        to_rgb(Image.new(mode, (1, 1)), "odd")
    if mode == "F":
        with pytest.raises(BrokenImage, match="data: odd.pfm has the mode F"):
            decode(encoded(Image.new("F", (1, 1), 0.5), "PPM"), "odd.pfm")


@pytest.mark.parametrize("mode", ["L", "P", "PA", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "1"])
def test_8_bit_modes_are_converted_as_by_pillow(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert("P" if mode == "PA" else "RGB").convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image, "image")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 100, 50, 0)), ("LA", (90, 0))])
def test_transparency_is_dropped_and_the_stored_colour_kept(mode: str, colour: tuple[int, ...]) -> None:
    image = Image.new(mode, (1, 1), colour)
    expected = colour[:3] if mode == "RGBA" else colour[:1] * 3
    assert np.asarray(to_rgb(image, "image")).tolist() == [[list(expected)]]


@pytest.mark.parametrize(("mode", "opaque"), [("RGBa", "RGBA"), ("La", "LA")])
def test_a_premultiplied_colour_is_divided_by_its_opacity(mode: str, opaque: str) -> None:
    image = Image.new(opaque, (1, 1), (100, 60, 20, 128)[: 4 if opaque == "RGBA" else 1] + (128,) * (opaque == "LA"))
    pixel = np.asarray(to_rgb(image.convert(mode), "image"))[0, 0].astype(int)
    assert np.abs(pixel - np.asarray(image.convert("RGB"))[0, 0]).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning() -> None:
    image = Image.fromarray(COLOURS).quantize(8)
    content = encoded(image, transparency=bytes([0, 128, 255, 0, 0, 0, 0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(content, "palette"), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_is_inverted_as_adobe_writes_it() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in content and decode(content, "white").min() > 250


def test_an_orientation_is_not_applied() -> None:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6
    assert np.array_equal(decode(encoded(image, exif=exif), "turned"), COLOURS)


# Rejected by name


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_rejected(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    with pytest.raises(BrokenImage, match="data: moving is animated: expected one frame, got 3"):
        decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "moving")


def test_a_jpeg_with_several_pictures_yields_the_first() -> None:
    first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
    assert decode(encoded(first, "MPO", save_all=True, append_images=[second]), "camera").min() > 250


@pytest.mark.parametrize("side", [None, 8])
@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000), (1, 100_000_000)])
def test_a_bomb_is_rejected_from_its_header(size: tuple[int, int], side: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BrokenImage, match=f"bomb.png is too large: expected at most 89,478,485 .* {size[0]} x"):
            decode(header_only(*size), "bomb.png", side)


def test_a_webp_bomb_is_rejected_from_its_header() -> None:
    content = bytearray(encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    assert content[12:16] == b"VP8L"
    content[21:25] = struct.pack("<I", (16_383 - 1) | (16_383 - 1) << 14)
    with pytest.raises(BrokenImage, match=r"bomb.webp is too large: expected at most 89,478,485 pixels"):
        decode(bytes(content), "bomb.webp")


def test_a_very_narrow_image_is_rejected_before_it_is_scaled() -> None:
    line = encoded(Image.new("L", (1, 100_000)))
    assert decode(line, "line").shape == (100_000, 1, 3)
    with pytest.raises(BrokenImage, match="line is too narrow: .* shorter side is 32, got 32 x 3200000"):
        decode(line, "line", 32)


def test_postscript_never_reaches_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("started a program")

    monkeypatch.setattr("subprocess.check_call", run)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BrokenImage, match="drawing.png is not a readable image .expected PNG, JPEG"):
        decode(content, "drawing.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "PPM"])
@pytest.mark.parametrize("kept", [0, 1, 12, 30, 0.5, 0.9])
def test_a_truncated_image_is_rejected_by_name(kind: str, kept: float) -> None:
    content = encoded(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    cut = content[: kept if isinstance(kept, int) else int(kept * len(content))]
    with pytest.raises(BrokenImage, match="^data: cut is not a readable image .*; skip_broken leaves") as raised:
        decode(cut, "cut")
    assert "\n" not in str(raised.value)


def test_flipped_bytes_yield_an_image_or_an_error_of_one_line() -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    refused = 0
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM"):
        content = encoded(image, kind)
        for _ in range(200):
            broken = bytearray(content)
            for position in np.minimum(rng.exponential(30, 3).astype(int), len(broken) - 1):
                broken[position] = rng.integers(256)
            try:
                assert decode(bytes(broken), "broken", 8).shape == (8, 8, 3)
            except BrokenImage:
                refused += 1
    assert refused > 100


def test_an_image_is_not_called_broken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "to_rgb", exhausted)
    with pytest.raises(ValueError, match="data: large: not enough memory to decode it") as raised:
        decode(encoded(Image.fromarray(COLOURS)), "large")
    assert not isinstance(raised.value, BrokenImage)


# Files


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def make_socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        listener.bind(path.name)
    finally:
        os.chdir(before)
        listener.close()


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": make_link_to_nothing,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_only_regular_files_are_read(tmp_path: Path, what: str) -> None:
    SPECIAL[what](tmp_path / "x.png")
    with pytest.raises(BrokenImage, match=f"x.png is not a regular file but {what}"):
        read_image(tmp_path / "x.png")


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as handle:
        handle.truncate(1 << 42)
    with pytest.raises(BrokenImage, match="x.png is too large: expected at most 715,827,880 bytes, got 4,398,046"):
        read_image(tmp_path / "x.png")
