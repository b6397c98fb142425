"""Read the docstring and the options of a class or a function from its source, not by import.

Algorithms, rewards and searches import torch, which takes a second; their docstrings, fields,
signatures and defaults can be read from the text of their files.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .decoding import Bounds, bounds_of

REQUIRED = object()
"""The default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """An option: its type (as annotated; the annotation's text if it cannot be evaluated), default,
    meaning, and range in words."""

    name: str
    type: Any
    default: Any
    doc: str = ""
    range: str = ""


@dataclass
class Module:
    """The top level of a module's file: definitions by name, and the origins of imported names."""

    name: str
    lines: list[str]
    doc: str
    nodes: dict[str, ast.AST] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)

    def evaluate(self, node: ast.AST) -> Any:
        """The value of an expression of constants, types and names, or its text if evaluation would
        need an import of this package."""
        text = ast.unparse(node)
        try:
            return eval(text, {}, _Names(self))
        except Exception:
            return text


class _Names(Mapping[str, Any]):
    """The names that the annotations and constants of a module may use."""

    def __init__(self, module: Module):
        self.module = module

    def __getitem__(self, name: str) -> Any:
        if name == "Bounds":
            return Bounds
        source, original = self.module.imported.get(name, ("", ""))
        if source.partition(".")[0] in ("typing", "collections", "math"):
            return getattr(importlib.import_module(source), original)
        module, node = find(f"{self.module.name}:{name}")
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            raise KeyError(name)
        return eval(ast.unparse(node.value), {}, _Names(module))

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@cache
def read(name: str) -> Module:
    """A module by its dotted name. Raises ModuleNotFoundError if its package has no file."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # for a submodule it would import the parents
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module named {name!r}", name=name)
    path = Path(spec.origin)
    if rest:
        path = path.parent.joinpath(*rest)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text("utf-8")
    tree, package = ast.parse(text), name
    module = Module(name, text.splitlines(), ast.get_docstring(tree) or "")
    if path.name != "__init__.py":
        package = name.rpartition(".")[0]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (parent, node.module)))
            module.imported |= {a.asname or a.name: (source, a.name) for a in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            module.nodes[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            module.nodes |= {t.id: node for t in targets if isinstance(t, ast.Name)}
    return module


def find(place: str) -> tuple[Module, ast.AST]:
    """The module and the node that define "module:name". Raises KeyError if nothing does."""
    name, _, attribute = place.partition(":")
    module = read(name)
    if attribute in module.nodes:
        return module, module.nodes[attribute]
    source, original = module.imported[attribute]
    return find(f"{source}:{original}")


class Subject:
    """The docstring and the options of the class or function at "module:name"."""

    def __init__(self, place: str):
        self.module, self.node = find(place)
        self.preset: dict[str, Any] = {}
        node = self.node
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):  # functools.partial
            of, call = node.value.args[0], node.value
            self.preset = {str(k.arg): self.module.evaluate(k.value) for k in call.keywords}
            self.module, self.node = find(f"{self.module.name}:{ast.unparse(of)}")
        self.bases = list(self._bases())

    def _bases(self) -> Iterator[tuple[Module, ast.ClassDef]]:
        """The class and its chain of first bases, as far as they are in this project's source."""
        module, node = self.module, self.node
        while isinstance(node, ast.ClassDef):
            yield module, node
            if not node.bases:
                return
            try:
                module, node = find(f"{module.name}:{ast.unparse(node.bases[0])}")
            except (KeyError, OSError):  # of another package
                return

    @property
    def doc(self) -> str:
        """The docstring."""
        assert isinstance(self.node, (ast.ClassDef, ast.FunctionDef))
        return ast.get_docstring(self.node) or ""

    @property
    def title(self) -> str:
        """The first sentence of the docstring."""
        return " ".join(self.doc.partition("\n\n")[0].split())

    @property
    def source(self) -> str:
        """The first paper named in the docstring, or else in the module's docstring."""
        texts = (self.doc, self.module.doc)
        found = (re.search(r"arXiv \d{4}\.\d{5}", " ".join(text.split())) for text in texts)
        return next((m[0] for m in found if m), "")

    def attribute(self, name: str) -> str | None:
        """The text of a class attribute's value, of the class or the nearest base that sets it."""
        for _, node in self.bases:
            for part in node.body:
                target = part.targets[0] if isinstance(part, ast.Assign) else None
                target = part.target if isinstance(part, ast.AnnAssign) else target
                value = getattr(part, "value", None)
                if isinstance(target, ast.Name) and target.id == name and value is not None:
                    return ast.unparse(value)
        return None

    def assigned(self, name: str) -> str | None:
        """The text of the first value assigned to self.NAME, or None."""
        for node in self._walk():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"self.{name}":
                return ast.unparse(node.value).removeprefix("self.")
        return None

    def condition(self, called: str) -> str | None:
        """The text of the condition under which a function calls a method; empty if it always does,
        None if it never does."""
        for part in getattr(self.node, "body", ()):
            if called in (_called(node) for node in ast.walk(part)):
                return ast.unparse(part.test) if isinstance(part, ast.If) else ""
        return None

    def _refusals(self) -> dict[str, str]:
        """{option: what it must be}, from messages "option=... is not WHAT IT MUST BE; remedy"."""
        found = {}
        for node in self._walk():
            if isinstance(node, ast.JoinedStr) and len(node.values) == 3:
                head, _, tail = (getattr(part, "value", "") for part in node.values)
                if str(head).endswith("=") and str(tail).startswith(" is not "):
                    found[str(head)[:-1]] = str(tail).removeprefix(" is not ").partition(";")[0]
        return found

    def _walk(self) -> Iterator[ast.AST]:
        for _, node in self.bases:
            yield from ast.walk(node)

    @property
    def options(self) -> list[Option]:
        """The fields of a dataclass, the arguments of another class or of a function."""
        if not self.bases:
            return self._arguments(self.module, self.node, skip=("task",))
        if any(ast.unparse(d).startswith("dataclass") for d in self.bases[0][1].decorator_list):
            return self._fields()
        for module, node in self.bases:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    return self._arguments(module, part, skip=("self",))
        return []

    def _fields(self) -> list[Option]:
        found: dict[str, Option] = {}
        for module, node in reversed(self.bases):
            for part, after in zip(node.body, [*node.body[1:], None], strict=True):
                if not (isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)):
                    continue
                name, hint = part.target.id, ast.unparse(part.annotation)
                if hint.startswith("ClassVar"):
                    continue
                doc = _comment(module.lines[(part.end_lineno or 1) - 1], part.end_col_offset or 0)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    doc = " ".join(str(after.value.value).split())
                if not doc and name in found:  # a new default for a base's field
                    doc = found[name].doc
                kind, default = module.evaluate(part.annotation), _default(module, part.value)
                found[name] = Option(name, kind, default, doc, str(bounds_of(kind) or ""))
        return list(found.values())

    def _arguments(self, module: Module, node: Any, skip: tuple[str, ...]) -> list[Option]:
        names = node.args.args
        defaults = [None] * (len(names) - len(node.args.defaults)) + node.args.defaults
        found, refusals = [], self._refusals()
        for argument, value in zip(names, defaults, strict=True):
            if argument.arg in (*skip, *self.preset):
                continue
            hint: Any = module.evaluate(argument.annotation) if argument.annotation else Any
            limits = str(bounds_of(hint) or "") or refusals.get(argument.arg, "")
            default = REQUIRED if value is None else module.evaluate(value)
            found.append(Option(argument.arg, hint, default, "", limits))
        return found


def _called(node: ast.AST) -> str | None:
    """The name of the function or method that a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", None))


def _comment(line: str, end: int) -> str:
    """The comment on a line after the statement that ends at the byte column `end`."""
    return line.encode()[end:].decode().strip().lstrip("# ")


def _default(module: Module, value: ast.AST | None) -> Any:
    if value is None:
        return REQUIRED
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        known = {k.arg: k.value for k in value.keywords}
        if "default" in known:
            return module.evaluate(known["default"])
        made = module.evaluate(known["default_factory"]) if "default_factory" in known else REQUIRED
        return made() if isinstance(made, (type, types.FunctionType)) else made
    return module.evaluate(value)
