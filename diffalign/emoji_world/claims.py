"""What an EmojiWorld prompt says, and whether a reading of a picture agrees: pure functions.

`parse` inverts `scenes.caption`; `judge` compares claims with things seen, in the manner of GenEval
(arXiv 2310.11513).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .scenes import BACKGROUNDS, COLORS, NUMBERS, OBJECTS, RELATIONS, STYLES, plural


@dataclass(frozen=True)
class Thing:
    """An object seen in a picture, its centre (`x`, `y`) in pixels of 64. `color` is None for its
    own colours; `shade` is the named colour nearest to them."""

    name: str
    color: str | None
    x: float
    y: float
    shade: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a prompt says. `nouns`: (name, color or None) in order; `number` only of counts."""

    nouns: tuple[tuple[str, str | None], ...]
    number: int | None = None
    relation: str | None = None
    background: str | None = None

    @property
    def category(self) -> str:
        """GenEval's name for it."""
        if self.number:
            return "counting"
        if self.relation:
            return "position"
        if len(self.nouns) == 2:
            return "colour attribution" if any(c for _, c in self.nouns) else "two objects"
        return "colours" if self.nouns and self.nouns[0][1] else "single object"


def _any_of(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_SINGULAR = {("bunch of grapes" if n == "grapes" else n): n for n in OBJECTS}
_PLURAL = {plural(n): n for n in OBJECTS}
_LOOK = rf"(?:(?:{_any_of(STYLES)}) )?(?:({_any_of(list(COLORS))}) )?"
_ONE = rf"an? {_LOOK}({_any_of(list(_SINGULAR))})"
_MANY = rf"({_any_of(NUMBERS[2:])}) {_LOOK}({_any_of(list(_PLURAL))})"
_GROUND = re.compile(rf"\s*on an? ({_any_of(list(BACKGROUNDS))}) background$")


def parse(prompt: str) -> Claim:
    """The claims of a prompt written as `scenes.caption` writes.

    Raises ValueError for any other text: a judge that guesses judges nothing.
    """
    text = prompt.strip().rstrip(".").lower()
    found = _GROUND.search(text)
    background = found[1] if found else None
    text = text[: found.start()] if found else text
    if match := re.fullmatch(_MANY, text):
        number, color, name = match.groups()
        return Claim(((_PLURAL[name], color),), NUMBERS.index(number), None, background)
    if match := re.fullmatch(_ONE, text):
        return Claim(((_SINGULAR[match[2]], match[1]),), None, None, background)
    if match := re.fullmatch(rf"{_ONE} (and|{_any_of(list(RELATIONS))}) {_ONE}", text):
        c1, n1, relation, c2, n2 = match.groups()
        nouns = ((_SINGULAR[n1], c1), (_SINGULAR[n2], c2))
        return Claim(nouns, None, None if relation == "and" else relation, background)
    raise ValueError(
        f'prompt {prompt!r} is not one EmojiWorld can check; write it like "a red dog", "two '
        'cats", "a dog left of a cat" or "a dog and a blue car", and "on a pink background" if you '
        "like"
    )


def judge(claim: Claim, things: Sequence[Thing], background: str) -> dict[str, bool]:
    """Which claims hold of the things seen: "object" always, "colour", "count", "position" and
    "background" where the prompt says so.

    object: every noun is seen. colour: a seen object of that name has the colour, which may be its
    own (a yellow moon). count: exactly that many of the name. position: some two of the named
    objects are apart in the relation's direction by more than 8 pixels, and by more than they are
    apart across it.
    """
    names = [t.name for t in things]
    found = {"object": all(name in names for name, _ in claim.nouns)}
    if any(color for _, color in claim.nouns):
        seen = {(t.name, t.color or t.shade) for t in things}
        found["colour"] = all(noun in seen for noun in claim.nouns if noun[1])
    if claim.number:
        found["count"] = names.count(claim.nouns[0][0]) == claim.number
    if claim.relation:
        dx, dy = RELATIONS[claim.relation]
        first, second = ([t for t in things if t.name == name] for name, _ in claim.nouns)
        found["position"] = False
        for a in first:
            for b in second:
                along = dx * (a.x - b.x) + dy * (a.y - b.y)
                across = abs(dy * (a.x - b.x) + dx * (a.y - b.y))
                found["position"] |= along > max(8, across)
    if claim.background:
        found["background"] = background == claim.background
    return found
