"""Score prompts as they come: a line in, a line out, in order.

Lines are read in a thread of their own, so that those which arrive while the model is busy share the next forward
pass, and one that comes alone is answered alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from queue import Queue
from threading import Thread
from typing import Any

from refusalkit.errors import InputError
from refusalkit.monitor.fit import Monitor
from refusalkit.template import Prompt

_CHUNK = 1 << 16
#: Lines that may wait for the model; a writer that is faster waits, too.
_WAITING = 1024

Record = dict[str, Any]


def lines(descriptor: int) -> Iterator[bytes]:
    """Yield the lines of an open file as soon as each is complete, without its line end."""
    # Not through a buffered file: a thread that waits in one cannot be left behind when the program ends.
    rest = b""
    while chunk := os.read(descriptor, _CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def arriving(source: Iterable[bytes], most: int) -> Iterator[list[tuple[int, bytes]]]:
    """Yield numbered lines: one when it arrives, with those that are waiting behind it, at most `most` together."""
    waiting: Queue[tuple[int, bytes] | OSError | None] = Queue(_WAITING)

    def read() -> None:
        try:
            for numbered in enumerate(source, start=1):
                waiting.put(numbered)
            waiting.put(None)
        except OSError as error:
            waiting.put(error)

    Thread(target=read, daemon=True).start()
    while True:
        taken = [waiting.get()]
        while len(taken) < most and not waiting.empty():
            taken.append(waiting.get())
        group = [item for item in taken if isinstance(item, tuple)]
        if group:
            yield group
        if isinstance(taken[-1], OSError):
            raise InputError(f"cannot be read: {taken[-1].strerror}", where="PROMPTS", hint="name a JSONL file")
        if taken[-1] is None:
            return


def records(source: Iterable[bytes], monitor: Monitor) -> Iterator[list[Record]]:
    """Yield a record for every line that is not empty, in order, in the groups they were scored in.

    `{"line", "score", "flagged", "threshold"}`, with the line's own `id` where it has one. A line that cannot be read
    or scored gives `{"line", "error"}` and stops nothing.
    """
    bench, detector = monitor.reader.bench, monitor.detector
    for group in arriving(source, bench.engine.batch_size):
        made: list[Record] = []
        tokens = []
        for number, line in group:
            if not line.strip():
                continue
            made.append({"line": number})
            try:
                row = _object(line, first=number == 1)
                made[-1] |= {"id": row["id"]} if "id" in row else {}
                tokens.append(_tokens(_prompt(row), monitor))
            except InputError as error:
                made[-1]["error"] = error.message
        scores = iter(detector.rule.scores(tokens, bench.engine))
        for record in made:
            if "error" not in record:
                record |= _judged(next(scores), monitor)
        yield made


def _judged(score: float, monitor: Monitor) -> Record:
    if not math.isfinite(score):
        return {"error": "the score is not a number"}
    detector = monitor.detector
    return {"score": score, "flagged": detector.flags(score), "threshold": detector.threshold}


def _object(line: bytes, *, first: bool) -> dict[str, Any]:
    """Read a line as a JSON object."""
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):
        raise InputError("not JSON that can be read: nested too deeply, or a number too long") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise InputError('not an object with either "prompt" or "messages"')
    return row


def _prompt(row: dict[str, Any]) -> Prompt:
    """Take the prompt or the conversation out of a row."""
    if "prompt" in row:
        return _text(row["prompt"], '"prompt"')
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise InputError('"messages" is not a list of objects with "role" and "content"')
    read = [
        {key: _text(each.get(key), f'"{key}" of message {number}') for key in ("role", "content")}
        for number, each in enumerate(messages, start=1)
    ]
    if read[-1]["role"] != "user":
        raise InputError(f"the last message is the {read[-1]['role']}'s, not the user's")
    return read


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {'missing' if value is None else 'not a text'}")
    if not value.strip():
        raise InputError(f"{what} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{what} holds half of a surrogate pair, which is no character")
    return value


def _tokens(prompt: Prompt, monitor: Monitor) -> tuple[int, ...]:
    """Tokenise a prompt that the model and the detector can read."""
    reader, position = monitor.reader, monitor.detector.position
    tokens = reader.template.tokens(prompt)
    most = getattr(reader.checkpoint.text_config, "max_position_embeddings", None)
    if most is not None and len(tokens) > most:
        raise InputError(f"{len(tokens)} tokens; the model reads at most {most}")
    if len(tokens) < -position:
        raise InputError(f"{len(tokens)} tokens; the detector reads position {position}")
    return tokens
