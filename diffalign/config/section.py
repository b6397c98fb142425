"""Dataclasses of settings that hold what they are given to its types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .decoding import ConfigError, field_types, fits, wrong_type
from .text import unusable


class Section:
    """A dataclass of settings, held to its types however it is made: what Python passes is checked
    as what a file says is. A text that begins with ~ is a path in the home directory. Raises
    `ConfigError`."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if isinstance(value, str):
                value = os.path.expanduser(value)
            setattr(self, name, value)
            where = f"{type(self).__name__}.{name}"
            if not fits(hint, value, typed=True):
                raise wrong_type(hint, value, where)
            check_text(value, where)


def check_text(value: Any, where: str) -> None:
    """Raises `ConfigError` for a text, at any depth of mappings and lists, that no file can hold in
    UTF-8, or that holds a NUL."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            check_text(item, where)
    if isinstance(value, str) and (problem := unusable(value)):
        raise ConfigError(f"{where}={value!r} {problem}")
