"""Say what a judge is: it replies to a prompt and its completion, and the reply is read as a number or is missing.

Replies are kept by content in a cache of the user's, so that the same judge is never asked the same again. A reply that
cannot be read is kept as well: asking again would not mend it.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from refusalkit.errors import RunError
from refusalkit.metric import Evidence, Metric, Values
from refusalkit.store import content_key, write_json

#: What a judge says: text, or the probabilities that its score is read from.
Reply = str | list[float]
Pair = tuple[str, str]


class Judge(Metric, ABC):
    """Provide a judge of completions."""

    needs = "completions"
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")] | None = None
    """What it is called in tables, where the recipe names several of its kind."""

    @property
    def label(self) -> str:
        return self.name or self.metric

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything beside a prompt and its completion that decides the reply."""

    @abstractmethod
    def ask(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Reply | None]]:
        """Yield the index of a pair and the reply to it, in any order; None where there is none to be had."""

    @abstractmethod
    def read(self, reply: Any) -> float:
        """Return the number that a reply stands for; not-a-number where it cannot be read."""

    def measure(self, evidence: Evidence) -> Values:
        pairs = list(zip(evidence.prompts, evidence.completions, strict=True))
        replies = replies_of(self, pairs)
        return Values(tuple(math.nan if reply is None else self.read(reply) for reply in replies))


def filled(template: str, **values: str) -> str:
    """Fill `{name}`s in a template at once: what stands in one value is not filled again."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found[1]], template)


# -- replies are kept -------------------------------------------------------------------------------------------------

#: Pairs that a judge had no reply to, which is not asked for again by this process.
_WITHOUT: set[str] = set()


def cache_folder() -> Path:
    """Return where replies are kept: `refusalkit/verdicts` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "refusalkit" / "verdicts"


def replies_of(judge: Judge, pairs: Sequence[Pair]) -> list[Reply | None]:
    """Return the reply to every pair: the kept one where there is one, and whatever was just asked, written at once.

    A file holds the reply alone. Its name is a hash of the judge, the prompt and the completion.
    """
    identity = dict(judge.identity)
    keys = [content_key({"judge": identity, "prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    found = {key: _kept(key) for key in keys}
    asked = {key: pair for key, pair in zip(keys, pairs, strict=True) if found[key] is None and key not in _WITHOUT}
    names = list(asked)
    for index, reply in judge.ask(list(asked.values())) if asked else ():
        key = names[index]
        if reply is None:
            _WITHOUT.add(key)
        else:
            _keep(key, reply)
            found[key] = reply
    return [found[key] for key in keys]


def _path(key: str) -> Path:
    return cache_folder() / key[:2] / f"{key}.json"


def _kept(key: str) -> Reply | None:
    try:
        document = json.loads(_path(key).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    reply = document.get("reply") if isinstance(document, dict) else None
    return reply if isinstance(reply, str | list) else None


def _keep(key: str, reply: Reply) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"reply": reply})
    except (OSError, RunError) as error:
        said = error.message if isinstance(error, RunError) else f"cannot be written: {error.strerror}"
        raise RunError(
            said, where=str(path), hint="free some space, or set XDG_CACHE_HOME to a folder of yours"
        ) from None
