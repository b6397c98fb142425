"""Strict decoding of nested mappings into dataclasses, by the types of their fields."""

from __future__ import annotations

import difflib
import numbers
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .text import unusable

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message can be shown to the user unchanged."""


@dataclass(frozen=True)
class Bounds:
    """The values an option may have: low <= value < high. `above` excludes low itself; high=None
    allows infinity."""

    low: float
    high: float | None = inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (self.high is None or value < self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return low + (f" and below {self.high:g}" if (self.high or inf) < inf else "")


Count = Annotated[int, Bounds(1)]
Natural = Annotated[int, Bounds(0)]
Weight = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]
Limit = Annotated[float, Bounds(0, None, above=True)]  # infinity is no limit
Share = Annotated[float, Bounds(0, 1)]

UNIONS, COLLECTIONS = (Union, types.UnionType), (list, tuple, set)

RENAMED = {
    "normalised": "normalized",
    "normalise": "normalize",
    "regularisation": "regularization",
    "neighbours": "neighbors",
}
"""{former spelling: present spelling} of options and of their choices."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'lr'?", or "; valid: a, b, c"."""
    names = {v.lower(): v for v in valid}
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    if close:
        return f"; did you mean '{names[close[0]]}'?"
    return f"; valid: {', '.join(names.values()) or 'none'}"


def near_divisors(total: int, value: int) -> str:
    """Divisors of `total` around `value`, in words: "8, 16, 32 or 64"; none above a million."""
    divisors = [d for d in range(1, min(total, 10**6) + 1) if total % d == 0]
    below, above = [d for d in divisors if d <= value], [d for d in divisors if d > value]
    near = [str(d) for d in below[-2:] + above[:2]]
    return " or ".join(filter(None, [", ".join(near[:-1]), near[-1]]))


def decode(
    cls: type[T],
    mapping: Mapping[str, Any],
    where: str = "",
    source: str = "",
    known: Iterable[str] = (),
) -> T:
    """Decodes a mapping into a dataclass, strictly.

    where: the dotted name of the mapping ("algorithm"; empty at the top). source: the place that
    messages name (" in configs/x.yaml"). known: the dotted names of all settings; a message points
    to one of them if the key belongs to another section. Values are converted to the types of their
    fields where that is unambiguous (`converted`), because YAML reads 3e-4 as a text. Raises
    `ConfigError` for unknown and missing keys and for wrong types.
    """
    if not isinstance(mapping, Mapping):
        name = f"section '{where}'" if where else "the configuration"
        given = "is empty" if mapping is None else f"is {mapping!r}"
        remedy = "give it keys or leave it out" if mapping is None else "write 'key: value' lines"
        raise ConfigError(f"{name}{source} {given}, not a mapping; {remedy}")
    prefix = f"{where}." if where else ""
    hints = field_types(cls)
    if issubclass(cls, Section):  # `TrainConfig.check` reports all wrong choices at once
        hints = {key: unchosen(hint) for key, hint in hints.items()}
    mapping = _respelt(mapping, hints)
    for key in mapping:
        if key not in hints:
            tip = suggest(key, hints)
            elsewhere = [k for k in known if k.endswith(f".{key}")]
            if tip.startswith("; valid") and elsewhere:  # the right key in the wrong section
                tip = f"; did you mean '{elsewhere[0]}'?"
            else:
                tip = tip.replace("you mean '", f"you mean '{prefix}")
            raise ConfigError(f"unknown key '{prefix}{key}'{source}{tip}")
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        hint = hints[key]
        if isinstance(hint, type) and is_dataclass(hint):
            values[key] = decode(hint, value, prefix + key, source, known)
        else:
            values[key] = decode_value(hint, value, prefix + key, source)
    for f in fields(cls):  # pyright: ignore[reportArgumentType]
        if f.init and f.default is f.default_factory is MISSING and f.name not in values:
            raise ConfigError(f"missing key '{prefix}{f.name}'{source}")
    try:
        return cls(**values)
    except ValueError as error:  # from a __post_init__
        raise ConfigError(f"{where}{source}: {error}".lstrip()) from error


def _respelt(mapping: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with former spellings of keys replaced, except where it has both spellings."""
    new = {key: RENAMED.get(key) for key in mapping if key not in hints}
    taken = {old for old, key in new.items() if key in hints and key not in mapping}
    return {RENAMED[key] if key in taken else key: value for key, value in mapping.items()}


def field_types(cls: Any) -> dict[str, Any]:
    """The annotated type of every field of a dataclass that its constructor takes."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def setting_types(cls: Any) -> dict[str, Any]:
    """The types of all settings of a configuration of sections, by their dotted names."""
    return {
        f"{section}.{key}": kind
        for section, hint in field_types(cls).items()
        if is_dataclass(hint)
        for key, kind in field_types(hint).items()
    }


def section_keys(cls: Any) -> list[str]:
    """The dotted names of all settings of a configuration of sections."""
    return list(setting_types(cls))


def bounds_of(hint: Any) -> Bounds | None:
    """The bounds of a number's type, if it has any."""
    if get_origin(hint) is Annotated:
        return next((a for a in hint.__metadata__ if isinstance(a, Bounds)), None)
    arms = get_args(hint) if get_origin(hint) in UNIONS else ()
    return next(filter(None, map(bounds_of, arms)), None)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal type; none for other types."""
    return get_args(hint) if get_origin(hint) is Literal else ()


def unchosen(hint: Any) -> Any:
    """str for a Literal type, so that any text passes; other types as they are."""
    return str if choices_of(hint) else hint


def decode_value(hint: Any, value: Any, name: str, source: str = "") -> Any:
    """Decodes one value to the type `hint` for the setting `name`, as `decode` does."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    found = converted(hint, value)
    if not fits(hint, found):
        raise wrong_type(hint, value, name, source)
    return found


def converted(hint: Any, value: Any) -> Any:
    """Converts a value from a file or a command line to the type `hint`: a text to its number, a
    list to a tuple, a former spelling to the present one. Returns a value that cannot be converted
    unchanged."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    make: Any = origin
    if origin is Annotated:
        return converted(args[0], value)
    if origin in UNIONS:
        found = ((arm, converted(arm, value)) for arm in args)
        return next((new for arm, new in found if fits(arm, new)), value)
    if origin is Literal:
        new = RENAMED.get(value) if isinstance(value, str) else None
        return new if new in args and value not in args else value
    if origin is dict and isinstance(value, Mapping):
        return {k: converted(args[1] if args else Any, v) for k, v in _numbers(value).items()}
    if origin in COLLECTIONS and isinstance(value, (list, tuple)):
        kinds = _item_types(hint, len(value))
        try:
            return make(map(converted, kinds, value)) if len(kinds) == len(value) else value
        except TypeError:  # a set of lists
            return value
    if origin is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value, value)
    if isinstance(origin, type) and issubclass(origin, Enum):  # of a user's algorithm
        return _member(origin, value)
    own = isinstance(origin, type) and issubclass(origin, Path)
    text = isinstance(value, str) and (own or origin in (int, float))
    if text or (origin is float and isinstance(value, int) and not isinstance(value, bool)):
        try:
            return make(value)
        except (ValueError, OverflowError):
            return value
    return value


def _member(kind: type[Enum], value: Any) -> Any:
    """The member of this value, or else of this name, which is what `plain` writes."""
    try:
        return kind(value)
    except ValueError:
        return kind.__members__.get(value, value) if isinstance(value, str) else value


def wrong_type(hint: Any, value: Any, name: str, source: str = "") -> ConfigError:
    kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
    single = isinstance(value, str)
    if single and kinds & {list, tuple}:
        remedy = f"; write [{value}]"
    elif dict in kinds and name.endswith("rewards") and (single or isinstance(value, list)):
        each = [value] if single else value
        remedy = f"; write {{{', '.join(f'{v}: 1.0' for v in each)}}}"
    elif dict in kinds and single:
        remedy = f"; write {{type: {value}}}"
    elif dict in kinds and isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        kind = get_args(hint)[1:] or (Any,)
        remedy = f" of names; put {odd[0]!r} in quotes" if odd else f" to {type_name(kind[0])}"
    elif dict in kinds and value is None:
        remedy = "; give it keys or leave it out"
    elif hint is str and value is not None and not isinstance(value, (list, tuple, Mapping)):
        remedy = f"; put it in quotes: '{value}'"
    else:
        remedy = ""
    what = type_name(hint)
    article = "" if what.startswith("one of") else "an " if what[0] in "aeiou" else "a "
    return ConfigError(f"{name}={value!r}{source} is not {article}{what}{remedy}")


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return True
    if origin is Annotated:
        return fits(args[0], value)
    if origin in UNIONS:
        return any(fits(arm, value) for arm in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin in (int, float):
        number = numbers.Integral if origin is int else numbers.Real
        if not isinstance(value, number) or isinstance(value, bool):
            return False
        # an integer of hundreds of digits is no float
        return origin is int or not isinstance(value, int) or abs(int(value)) <= sys.float_info.max
    if origin in COLLECTIONS and isinstance(value, (list, tuple, origin)):
        kinds = _item_types(hint, len(value))
        return len(kinds) == len(value) and all(map(fits, kinds, value))
    if origin is dict:
        kind = args[1] if args else Any
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and fits(kind, v) for k, v in value.items()
        )
    return not isinstance(origin, type) or isinstance(value, origin)


def _item_types(hint: Any, size: int) -> tuple[Any, ...]:
    """The types of the items of a collection of `size`; a tuple type may fix another number."""
    args = get_args(hint) or (Any,)
    fixed = get_origin(hint) is tuple and ... not in args
    return args if fixed else args[:1] * size


def _numbers(value: Any) -> Any:
    """Turns numbers that YAML 1.1 leaves as strings, 3e-4 and 1e5, into floats, at any depth."""
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


def type_name(hint: Any) -> str:
    """A type in words: "float", "int or null", "one of is, sf"."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if is_dataclass(origin):
        return getattr(origin, "__name__", "")
    if origin in UNIONS:
        return " or ".join("null" if a is type(None) else type_name(a) for a in args)
    if origin is dict:
        return "mapping"
    if origin in COLLECTIONS:
        return "list" + (f" of {type_name(args[0])}" if args else "")
    return getattr(origin, "__name__", str(origin))


class Section:
    """A dataclass of settings that checks its types even if constructed in Python. A ~ at the start
    of a text becomes the home directory. Raises `ConfigError`."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            if choices_of(hint):
                value = converted(hint, value)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if isinstance(value, str):
                value = os.path.expanduser(value)
            setattr(self, name, value)
            where = f"{type(self).__name__}.{name}"
            if not fits(unchosen(hint), value):
                raise wrong_type(unchosen(hint), value, where)
            check_text(value, where)


def check_text(value: Any, where: str) -> None:
    """Raises `ConfigError` for a text, at any depth of mappings and lists, that UTF-8 cannot encode
    or that holds a NUL."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            check_text(item, where)
    if isinstance(value, str) and (problem := unusable(value)):
        raise ConfigError(f"{where}={value!r} {problem}")


def plain(value: Any) -> Any:
    """A copy in dicts, lists and scalars that YAML and JSON can hold; other objects stay."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(inner) for inner in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # also those of NumPy
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Enum) and not isinstance(value, str):
        return value.name
    return os.fspath(value) if isinstance(value, os.PathLike) else value
