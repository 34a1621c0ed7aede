"""Encoded images to pixels. An image that cannot be read correctly is rejected before it costs memory or time."""

from __future__ import annotations

import functools
import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathnet.extras import require

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

__all__ = ["MOST_PIXELS", "MOST_SIDE", "BrokenImage", "check_regular", "decode", "read_image", "regular", "to_rgb"]

MOST_PIXELS = 89_478_485
"""Maximum number of pixels of an image, before and after scaling: Pillow warns of decompression bombs beyond it."""
MOST_SIDE = math.isqrt(MOST_PIXELS)
MOST_BYTES = 8 * MOST_PIXELS
"""Maximum number of bytes of an encoded image: enough for the largest one at 16 bits per channel, uncompressed."""

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

CONVERTIBLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
BITS_16 = {"I;16", "I;16B", "I;16L", "I;16N"}


class BrokenImage(ValueError):
    """An image whose pixels cannot be read; ``skip_broken`` leaves it out."""

    def __init__(self, origin: str, problem: str) -> None:
        super().__init__(f"data: {origin} {problem}; skip_broken leaves such images out")
        self.problem = problem


def regular(file: Path) -> str:
    """Return why a file is not a regular one, or "" if it is."""
    try:
        mode = file.stat().st_mode
    except OSError:
        if not file.is_symlink():
            raise
        return f"is not a regular file but a link to nothing ({os.readlink(file)})"
    return "" if stat.S_ISREG(mode) else f"is not a regular file but {KINDS.get(stat.S_IFMT(mode), 'another kind')}"


def check_regular(file: Path, most: int) -> None:
    """Check that a file is regular and small enough to read at once; reading a named pipe might never end.

    Raises:
        ValueError: it does not exist, is not a regular file, or has more than ``most`` bytes.
    """
    if not (file.exists() or file.is_symlink()):
        raise ValueError(f"data: {file} does not exist")
    if problem := regular(file):
        raise ValueError(f"data: {file} {problem}")
    if (size := file.stat().st_size) > most:
        raise ValueError(f"data: {file}: expected a file of at most {most:,} bytes, got {size:,}")


def read_image(file: Path) -> bytes:
    """Return the content of an image's file.

    Raises:
        BrokenImage: it is not a regular file, or larger than any accepted image.
        OSError: the system denies access, which says nothing about the image.
    """
    if problem := regular(file):
        raise BrokenImage(str(file), problem)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise BrokenImage(str(file), f"is too large: expected at most {MOST_BYTES:,} bytes, got {size:,}")
    return file.read_bytes()


def decode(encoded: bytes, origin: str, side: int | None = None) -> np.ndarray[Any, Any]:
    """Return the pixels of an encoded image, uint8 [H, W, 3], or [side, side, 3] if ``side`` is given.

    The formats are PNG, JPEG, BMP, WebP and PPM, whatever the file's suffix. The pixels are as stored: an orientation
    in the EXIF data is not applied. For colours see `to_rgb`.

    Args:
        origin: the image's name in errors.
        side: length to scale the shorter side to, before cropping at the centre.

    Raises:
        BrokenImage: the bytes are no such image, or the image is truncated, animated, of an unsupported mode, or has
            more than `MOST_PIXELS` pixels.
        ValueError: memory does not suffice.
        ModuleNotFoundError: pillow is not installed.
    """
    _openers()
    from PIL import Image

    try:
        image = _open(encoded, origin)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise BrokenImage(
                origin, f"is too large: expected at most {MOST_PIXELS:,} pixels, got {width} x {height}"
            )
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise BrokenImage(origin, f"is animated: expected one frame, got {frames}")
        pixels = to_rgb(image, origin)
        if side is not None and pixels.size != (side, side):
            pixels = _scale(pixels, origin, side)
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(origin, f"is too large: expected at most {MOST_PIXELS:,} pixels ({error})") from None
    except MemoryError:
        # The image may be intact, so skip_broken must not leave it out.
        raise ValueError(f"data: {origin}: not enough memory to decode it") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError) as error:
        raise BrokenImage(origin, f"is not a readable image ({_one_line(error)})") from None
    except (struct.error, zlib.error) as error:
        raise BrokenImage(origin, f"is not a readable image ({_one_line(error)})") from None
    return np.asarray(pixels)


@functools.cache
def _openers() -> dict[bytes, Callable[[io.BytesIO], ImageFile]]:
    """Return Pillow's reader for each accepted format, by the first bytes of a file, since suffixes can be wrong.

    The list is closed, because Pillow runs external programs for some of its formats.
    """
    require("PIL", "pathnet.data decodes images with pillow")
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.PpmImagePlugin import PpmImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    return {
        b"\x89PNG": PngImageFile,
        # Pillow's factory would treat further pictures in the file as frames of an animation.
        b"\xff\xd8\xff": JpegImageFile,
        b"BM": BmpImageFile,
        b"RIFF": WebPImageFile,
        b"P": PpmImageFile,
    }


def _open(encoded: bytes, origin: str) -> ImageFile:
    for signature, opener in _openers().items():
        if encoded.startswith(signature):
            return opener(io.BytesIO(encoded))
    start = f"the bytes {encoded[:8]!r}" if encoded else "nothing"
    raise BrokenImage(origin, f"is not a readable image (expected PNG, JPEG, BMP, WebP or PPM, got {start})")


def to_rgb(image: Image.Image, origin: str) -> Image.Image:
    """Return an image in the mode RGB.

    Transparency is dropped: a pixel keeps its stored colour, as in torchvision's folders. 16-bit greys (I;16 and,
    from PGM, I) keep their high byte, as Pillow's 16-bit colours do. CMYK is converted without a colour profile.

    Args:
        origin: the image's name in errors.

    Raises:
        BrokenImage: the mode has no known range (F), or needs a colour profile (LAB); or the mode is I and a value
            exceeds 16 bits.
    """
    from PIL import Image

    mode = image.mode
    if mode in PREMULTIPLIED:
        return image.convert(PREMULTIPLIED[mode]).convert("RGB")
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Pillow would warn about the dropped transparency in a direct conversion.
        return image.convert("RGBA").convert("RGB")
    if mode in CONVERTIBLE:
        return image.convert("RGB")
    if mode == "I" or mode in BITS_16:
        grey = np.asarray(image)
        if mode == "I" and (grey.min() < 0 or grey.max() > 0xFFFF):
            raise BrokenImage(
                origin, f"has the mode I: expected values from 0 to 65535, got {grey.min()} to {grey.max()}"
            )
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    raise BrokenImage(origin, f"has the mode {mode}: expected grey of 1, 8 or 16 bits, a palette, RGB, CMYK or YCbCr")


def _scale(image: Image.Image, origin: str, side: int) -> Image.Image:
    """Return an image scaled to a shorter side of ``side`` and cropped to [side, side] at the centre."""
    from PIL import Image

    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if width * height > MOST_PIXELS:
        raise BrokenImage(
            origin,
            f"is too narrow: expected at most {MOST_PIXELS:,} pixels when its shorter side is {side}, "
            f"got {width} x {height}",
        )
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
