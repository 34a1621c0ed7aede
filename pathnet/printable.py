"""Text that any terminal or file can show. Names of files and classes, and text in files, may hold any bytes."""

from __future__ import annotations

__all__ = ["printable"]

SURROGATE_ESCAPES = range(0xDC80, 0xDD00)
"""Code points that Python decodes the bytes 0x80 to 0xff to, in a name that is not UTF-8."""


def printable(text: object, kept: str = "") -> str:
    r"""Return text with an escape in place of every character that a terminal would obey or nothing can encode.

    Control characters, marks that change the direction of writing, and bytes that are not UTF-8 become ``\x1b``,
    ``\u202e`` and ``\xff``.

    Args:
        text: a string, or anything else that ``str`` converts.
        kept: characters that stay as they are, such as the line feeds of a table's cell.
    """
    return "".join(
        character if character in kept or _is_shown(character) else _escaped(character) for character in str(text)
    )


def _is_shown(character: str) -> bool:
    # isprintable() accepts only the ASCII space, and names in some languages hold others.
    return character.isprintable() or character in "\u00a0\u3000"


def _escaped(character: str) -> str:
    code = ord(character)
    if code in SURROGATE_ESCAPES:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
