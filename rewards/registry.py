"""Tables of names that import a module only when its name is looked up."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping {name: object} from ``places`` {name: "module:attribute"} in a package.

    Listing the names, or refusing an unknown one, imports nothing.
    """

    def __init__(self, package: str, places: Mapping[str, str]):
        self.places = {name: f"{package}.{place}" for name, place in places.items()}

    def __getitem__(self, name: str) -> T:
        module, _, attribute = self.places[name].partition(":")
        found: Any = getattr(importlib.import_module(module), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
