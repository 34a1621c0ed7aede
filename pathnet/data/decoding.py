"""Encoded images to pixels. What cannot be read rightly is refused by name, before it costs memory or time."""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

__all__ = ["MOST_PIXELS", "MOST_SIDE", "BrokenImage", "check_regular", "decode", "read_image", "regular", "to_rgb"]

MOST_PIXELS = 89_478_485
"""Pixels of an image, and of what it is scaled to: where Pillow begins to warn of decompression bombs."""
MOST_SIDE = math.isqrt(MOST_PIXELS)
MOST_BYTES = 8 * MOST_PIXELS
"""Bytes of an encoded image: the largest accepted one, 16 bits a channel and not compressed, fits."""

OPENERS: dict[bytes, Callable[[io.BytesIO], ImageFile]] = {
    b"\x89PNG": PngImageFile,
    # Not Pillow's factory, which takes the pictures behind the first one for frames of an animation.
    b"\xff\xd8\xff": JpegImageFile,
    b"BM": BmpImageFile,
    b"RIFF": WebPImageFile,
    b"P": PpmImageFile,
}
"""Formats by the first bytes of a file, since suffixes err. A closed list: others of Pillow's run other programs."""

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

DIRECT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
BITS_16 = {"I;16", "I;16B", "I;16L", "I;16N"}


class BrokenImage(ValueError):
    """An image that holds something else than pixels that can be read; ``skip_broken`` leaves it out."""

    def __init__(self, origin: str, problem: str) -> None:
        super().__init__(f"data: {origin} {problem}; skip_broken leaves such images out")
        self.problem = problem


def regular(file: Path) -> str:
    """Return why a file cannot be read as a regular one: what it is instead; nothing where it can."""
    try:
        mode = file.stat().st_mode
    except OSError:
        if not file.is_symlink():
            raise
        return f"is not a regular file but a link to nothing ({os.readlink(file)})"
    return "" if stat.S_ISREG(mode) else f"is not a regular file but {KINDS.get(stat.S_IFMT(mode), 'another kind')}"


def check_regular(file: Path, most: int) -> None:
    """Check that a file can be read whole: a named pipe would be waited for without end.

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
        BrokenImage: it is not a regular file, or larger than any image that is accepted.
        OSError: the system does not let it be read, which says nothing of the image.
    """
    if problem := regular(file):
        raise BrokenImage(str(file), problem)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise BrokenImage(str(file), f"is too large: expected at most {MOST_BYTES:,} bytes, got {size:,}")
    return file.read_bytes()


def decode(encoded: bytes, origin: str, side: int | None = None) -> np.ndarray[Any, Any]:
    """Return the pixels of an encoded image, uint8 [H, W, 3]; [side, side, 3] where a side is given.

    PNG, JPEG, BMP, WebP and PPM are read, whatever the file is called, with the pixels as they are stored: an
    orientation in the EXIF data is not applied. For the colours see `to_rgb`.

    Args:
        origin: what an error calls the image.
        side: the image is scaled so that its shorter side is this, and cropped at the centre.

    Raises:
        BrokenImage: the bytes are no such image, or one that is cut off, animated, of a mode without a rule, or of
            more than `MOST_PIXELS` pixels.
        ValueError: there is too little memory for it.
    """
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
        # Not the image's fault, so that nothing is left out for it.
        raise ValueError(f"data: {origin}: not enough memory to decode it") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError) as error:
        raise BrokenImage(origin, f"is not a readable image ({_one_line(error)})") from None
    except (struct.error, zlib.error) as error:
        raise BrokenImage(origin, f"is not a readable image ({_one_line(error)})") from None
    return np.asarray(pixels)


def _open(encoded: bytes, origin: str) -> ImageFile:
    for signature, opener in OPENERS.items():
        if encoded.startswith(signature):
            return opener(io.BytesIO(encoded))
    start = f"the bytes {encoded[:8]!r}" if encoded else "nothing"
    raise BrokenImage(origin, f"is not a readable image (expected PNG, JPEG, BMP, WebP or PPM, got {start})")


def to_rgb(image: Image.Image, origin: str) -> Image.Image:
    """Return an image in the mode RGB.

    Transparency is dropped: a pixel keeps the colour that is stored for it, as in torchvision's folders. Of 16-bit
    greys (I;16 and, from PGM, I) the high byte is kept, as Pillow does with 16-bit colours. CMYK is converted
    without a colour profile.

    Args:
        origin: what an error calls the image.

    Raises:
        BrokenImage: the mode has no range that is known (F), or needs a colour profile (LAB); or the mode is I and
            a value is not within 16 bits.
    """
    mode = image.mode
    if mode in PREMULTIPLIED:
        return image.convert(PREMULTIPLIED[mode]).convert("RGB")
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # By way of RGBA, since Pillow warns of a transparency that it drops otherwise.
        return image.convert("RGBA").convert("RGB")
    if mode in DIRECT:
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
