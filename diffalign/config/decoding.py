"""Strict decoding of nested mappings, YAML files and dotted overrides into dataclasses."""

from __future__ import annotations

import difflib
import json
import math
import numbers
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import draccus
import yaml

from .text import read_text

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is meant for the user as it stands."""


@dataclass(frozen=True)
class Bounds:
    """The values an option may have: low <= value < high, or low < value with `above`."""

    low: float
    high: float = inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return low + (f" and below {self.high:g}" if self.high < inf else "")


Count = Annotated[int, Bounds(1)]
Weight = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]
Share = Annotated[float, Bounds(0, 1)]


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
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    near = [str(d) for d in below[-2:] + above[:2]]
    return " or ".join(filter(None, [", ".join(near[:-1]), near[-1]]))


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Missing parent folders are made. Raises `OSError` of the kind that it met, with `path` in it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def check_file(path: str | os.PathLike[str], option: str) -> None:
    """Refuse, before the work, a file that cannot be written. Raises `ConfigError`."""
    if Path(path).is_dir():
        raise ConfigError(f"{option} {str(path)!r} is a folder; give the name of a file in it")
    check_folder(Path(path).parent, option)


def check_folder(path: str | os.PathLike[str], option: str) -> None:
    """Refuse a folder that cannot be made, or not be written to. Raises `ConfigError`."""
    there = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if not there.is_dir():
        raise ConfigError(f"{option}: {there} is a file, and no folder to write to; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: the folder {there} cannot be written to; choose another")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: they are null. What it does not know is a string."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(
    cls: type[T],
    mapping: Mapping[str, Any],
    where: str = "",
    source: str = "",
    known: Sequence[str] = (),
) -> T:
    """Makes a dataclass of a mapping, strictly.

    `where` is the dotted name of the mapping ("algorithm"; empty at the top), `source` the place
    to name in messages (" in configs/x.yaml"), `known` the dotted names of all settings, for hints
    at one of another section. Strings become numbers where the field is one
    (YAML reads 3e-4 as a string); nothing else is converted. Raises `ConfigError` for unknown and
    missing keys and for wrong types.
    """
    if not isinstance(mapping, Mapping):
        name = f"section '{where}'" if where else "the configuration"
        given = "is empty" if mapping is None else f"is {mapping!r}"
        remedy = "give it keys or leave it out" if mapping is None else "write 'key: value' lines"
        raise ConfigError(f"{name}{source} {given}, not a mapping; {remedy}")
    prefix = f"{where}." if where else ""
    hints = field_types(cls)
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


def field_types(cls: Any) -> dict[str, Any]:
    """The annotated type of every field of a dataclass that its constructor takes."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def section_keys(cls: Any) -> list[str]:
    """The dotted names of all settings of a configuration of sections."""
    return [
        f"{section}.{key}"
        for section, hint in field_types(cls).items()
        if is_dataclass(hint)
        for key in field_types(hint)
    ]


def decode_value(hint: Any, value: Any, name: str, source: str = "") -> Any:
    """A value of the type `hint` for the setting `name`, as `decode` does it."""
    if get_origin(hint) is dict:
        value = _numbers(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        if not fits(hint, value):
            raise TypeError
        return draccus.decode(hint, value)
    except Exception as error:
        raise wrong_type(hint, value, name, source) from error


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
        odd = next((key for key in value if not isinstance(key, str)), None)
        remedy = f" of names; put {odd!r} in quotes"
    elif dict in kinds and value is None:
        remedy = "; give it keys or leave it out"
    elif hint is str and value is not None and not isinstance(value, (list, tuple, Mapping)):
        remedy = f"; put it in quotes: '{value}'"
    else:
        remedy = ""
    what = type_name(hint)
    article = "" if what.startswith("one of") else "an " if what[0] in "aeiou" else "a "
    return ConfigError(f"{name}={value!r}{source} is not {article}{what}{remedy}")


def fits(hint: Any, value: Any, typed: bool = False) -> bool:
    """Whether a value is of a type; a text may stand for a number unless it should be `typed`."""
    # draccus takes None and bools for numbers, and anything at all for a string.
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(a, value, typed) for a in args)
    if origin is type(None) or value is None:
        return origin is type(None) and value is None
    if origin in (int, float):
        number = numbers.Integral if origin is int else numbers.Real
        allowed = number if typed else (int, float, str)
        return isinstance(value, allowed) and not isinstance(value, bool)
    if origin is str:
        return isinstance(value, str)
    if origin in (list, tuple, set):
        item = args[0] if args else Any
        return isinstance(value, (list, tuple)) and all(fits(item, v, typed) for v in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
    return not is_dataclass(origin) or isinstance(value, origin)  # pyright: ignore


def _numbers(value: Any) -> Any:
    """Turns what YAML 1.1 leaves as strings, 3e-4 and 1e5, into floats, at any depth."""
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
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in args)
    if origin is dict:
        return "mapping"
    if origin in (list, tuple, set):
        return "list" + (f" of {type_name(args[0])}" if args else "")
    return getattr(origin, "__name__", str(origin))


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice: PyYAML would keep the last one in silence. And an alias inside of
    what it stands for, which would have no end."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # not deep, PyYAML would make such loops

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key '{key.value}'", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file. Raises `ConfigError`."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {tree!r}, not a mapping; write 'section: {{key: value}}'")
    return tree


def read_sections(path: str | os.PathLike[str]) -> dict[str, Mapping[str, Any]]:
    """The sections of a run's config.yaml, without empty ones. Raises `ConfigError`."""
    tree = {name: values for name, values in read_yaml(path).items() if values is not None}
    for name, values in tree.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: {name} is {values!r}, no section of settings; mend it")
    return tree


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow: two lines
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    except ValueError as error:  # a date such as 2024-99-99, a number of thousands of digits
        why = str(error).partition(";")[0]  # without Python's own remedy
        raise ConfigError(f"{where}: {why}; mend that value, or put it in quotes") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply; write it with fewer brackets") from error


def pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(
                f"unexpected argument {token!r}; settings look like --train.lr 5e-4, and a list is "
                "one value, [a,b]"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE, or --{key}=VALUE")
            text = rest.pop(0)
        yield key, text


def override(cls: Any, tree: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key of a complete tree of `cls`; what it leaves invalid is found by
    `decode`. null empties a mapping."""
    node, (name, *rest) = tree, key.split(".")
    while rest and is_dataclass(field_types(cls).get(name)):
        cls, node, name, rest = field_types(cls)[name], node[name], rest[0], rest[1:]
    hint = field_types(cls).get(name)
    # A string is taken as typed: YAML would read the folder name 2024_01 as the number 202401.
    plain = hint is str or (hint == (str | None) and text != "null")
    value = text if plain else _parse(text, f"--{key} {text}")
    if rest and name == "rewards":
        _override_reward(node[name], ".".join(rest), value)
    elif rest:
        _nest(node, [name, *rest], value, key)
    elif is_dataclass(hint) and isinstance(value, dict):
        node[name] = {**node[name], **value}
    else:
        node[name] = {} if value is None and get_origin(hint) is dict else value


def _override_reward(rewards: dict[str, Any], tail: str, value: Any) -> None:
    # The name of a user's function may hold dots before its colon: pkg.module:function.
    dot = tail.find(".", tail.find(":") + 1)
    name, option = (tail, "") if dot < 0 else (tail[:dot], tail[dot + 1 :])
    current = rewards.get(name)
    if option:
        if not isinstance(current, dict):
            rewards[name] = {"weight": 1.0 if current is None else current}
        _nest(rewards[name], option.split("."), value, tail)
    elif value is None:
        if name not in rewards:
            raise ConfigError(f"there is no reward '{name}' to remove{suggest(name, rewards)}")
        del rewards[name]
    elif isinstance(current, dict) and not isinstance(value, dict):
        current["weight"] = value
    else:
        rewards[name] = value


def _nest(node: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"unknown key '{key}' on the command line; '{part}' is {node!r}")
    node[parts[-1]] = value
