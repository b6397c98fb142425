"""Settings in YAML files, and on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_origin

import yaml

from .decoding import ConfigError, field_types, suggest, unchosen
from .text import read_text


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would silently keep the last, and an alias
    inside the node that it refers to, which would make an endless loop."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # if not deep, PyYAML builds such loops

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
    except yaml.YAMLError as error:  # an illegal character: a message of two lines
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    except ValueError as error:  # a date such as 2024-99-99, a number of thousands of digits
        why = str(error).partition(";")[0]  # without Python's own remedy
        raise ConfigError(f"{where}: {why}; mend that value, or put it in quotes") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply; write it with fewer brackets") from error


def pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Keys and values of --key VALUE and --key=VALUE. Raises `ConfigError` for anything else."""
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
    """Sets one dotted key in a complete tree of `cls`. null empties a mapping. `decode` checks the
    value later."""
    node, (name, *rest) = tree, key.split(".")
    while rest and is_dataclass(field_types(cls).get(name)):
        cls, node, name, rest = field_types(cls)[name], node[name], rest[0], rest[1:]
    hint = unchosen(field_types(cls).get(name))
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
