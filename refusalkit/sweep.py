"""Turn the `sweep` section of a recipe into the points of its grid, and name each so that its folder can be read.

The section maps dotted keys to lists of values. Every combination is one run, in the order in which the lists are
written, the last key changing fastest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refusalkit.errors import InputError

#: Keys whose value says what a mapping is; in names it goes without its key.
_NOUNS = ("strategy", "selector", "intervention", "metric")
_LONGEST = 100
_FORM = "a list of values below each dotted key, such as `find: [difference_in_means, pca]`"


@dataclass(frozen=True)
class Point:
    """Hold one run of a sweep: its name, and the value and place in the list of every key that is swept over."""

    name: str
    values: Mapping[str, Any]
    indices: Mapping[str, int]


def points(section: Any, where: Callable[[tuple[str | int, ...]], str]) -> list[Point]:
    """Return the grid of a `sweep` section; `where` says where a key of the recipe stands.

    Raises `InputError` for anything but lists of distinct values below keys that can differ between runs.
    """
    if not isinstance(section, dict):
        raise InputError("should be keys with lists of values", where=where(("sweep",)), hint=_FORM)
    for key, values in section.items():
        _check(key, values, where)
    made: dict[str, Point] = {}
    for combination in itertools.product(*(enumerate(values) for values in section.values())):
        chosen = dict(zip(section, combination, strict=True))
        values = {key: value for key, (_, value) in chosen.items()}
        name = _unused(_name(values), made)
        made[name] = Point(name, values, {key: index for key, (index, _) in chosen.items()})
    return list(made.values())


def _check(key: Any, values: Any, where: Callable[[tuple[str | int, ...]], str]) -> None:
    place = where(("sweep", key))
    if not isinstance(key, str) or not all(key.split(".")):
        raise InputError(f"{key!r} is no key of a recipe", where=place, hint=_FORM)
    if key.partition(".")[0] in ("name", "description", "sweep"):
        raise InputError("cannot differ between the runs of a sweep", where=place, hint="each run is named by itself")
    if not isinstance(values, list):
        raise InputError("should be a list of values", where=place, hint=f"for one value, write `[{values}]`")
    if not values:
        raise InputError("lists no value", where=place, hint="list some, or leave the key out")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InputError(f"lists {_word(value)} twice", where=where(("sweep", key, index)), hint="keep one of them")


def _name(values: Mapping[str, Any]) -> str:
    last = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, value in values.items():
        short = key.rpartition(".")[2]
        words = _word(value)
        # A name or a choice says by itself what it is; a number does not.
        parts.append(words if isinstance(value, str | dict) else f"{short if last.count(short) == 1 else key}={words}")
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(parts)).strip("._=,+-")[:_LONGEST] or "run"


def _word(value: Any) -> str:
    if isinstance(value, dict):
        nouns = [str(word) for key, word in value.items() if key in _NOUNS]
        return ",".join([*nouns, *(f"{key}={_word(word)}" for key, word in value.items() if key not in _NOUNS)])
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _unused(name: str, taken: Mapping[str, Point]) -> str:
    return next(
        candidate
        for number in itertools.count(1)
        if (candidate := name if number == 1 else f"{name}-{number}") not in taken
    )
