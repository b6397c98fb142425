"""Texts that come from files and from the command line."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; removes the mark.
    Raises `ValueError` if the file cannot be read or decoded."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    # UTF-32 first: its little-endian mark begins with that of UTF-16
    marks = [(codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")]
    marks += [(codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
    encoding = next((name for mark, name in marks if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ValueError(
                f"{path} begins as {encoding.upper()} does and is not ({error.reason} at offset "
                f"{error.start}); save it as UTF-8"
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        likely = "utf-16" if b"\0" in data else "latin1"
        raise ValueError(
            f"{path}:{line}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; "
            f"convert the file, e.g. iconv -f {likely} -t utf-8 {Path(path).name}"
        ) from error
    if 4 * text.count("\0") > len(text):  # in UTF-16, every other byte of Latin letters is NUL
        raise ValueError(
            f"{path} looks like UTF-16 without a byte order mark; convert the file, e.g. "
            f"iconv -f utf-16{'be' if data[:1] == b'%c' % 0 else 'le'} -t utf-8 {Path(path).name}"
        )
    return text.replace("\ufeff", "")  # also marks inside a file made by joining files


def expand_user(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command with ~/ or ~user/ at the start of a value expanded, because a shell
    does not expand it inside --out=~/grid.png or in quotes."""
    return [
        option + os.path.expanduser(value) if "/" in value else option + value
        for option, value in (_split_option(a) for a in arguments)
    ]


def _split_option(argument: str) -> tuple[str, str]:
    option, equals, value = argument.partition("=")
    tilde = argument.startswith("--") and value.startswith("~")
    return (option + equals, value) if tilde else ("", argument)


def unusable(text: str) -> str:
    """Why a text cannot be used, in words; empty if it can."""
    halves = [c for c in text if "\ud800" <= c <= "\udfff"]
    if any("\udc80" <= c <= "\udcff" for c in halves):  # how Python keeps undecodable bytes
        return "holds bytes that are not UTF-8; type it in a UTF-8 terminal, or save it as UTF-8"
    if halves:
        return f"holds {halves[0]!a}, half of a surrogate pair; write the character itself"
    return "holds a NUL character; remove it" if "\0" in text else ""
