"""Read prompts: from the package, from files, from the model hub's datasets.

The addresses, without the scheme: a set's name (`builtin:`, `tiny:`); `PATH[#FIELD]`, relative to the recipe's folder
(`file:`); `NAME@REVISION[?split=…&config=…&field=…]` (`hf:`). A path cannot hold `#`. Where prompts come with answers,
these have a field of their own: `PATH[#FIELD,ANSWER]`, `…&answer=…`.
"""

from __future__ import annotations

import csv
import difflib
import importlib.resources
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusalkit.errors import InputError, nearest
from refusalkit.prompt_source import Passage, PromptSource

Pools = Mapping[str, tuple[str, ...]]
#: Where a row is, and what it holds: a text, or an object with fields.
Rows = Sequence[tuple[str, Any]]

#: Names under which public data sets keep the request, in the order they are looked for.
FIELDS = ("prompt", "instruction", "goal", "behavior", "Goal", "Behavior", "text", "question")
#: The same of the answers to them.
ANSWERS = ("answer", "output", "response", "completion", "target")

_BUILTIN = {
    "harmful": ("harmful.jsonl", None),
    "harmless": ("harmless.jsonl", None),
    "over_refusal_safe": ("over_refusal.jsonl", "safe"),
    "over_refusal_unsafe": ("over_refusal.jsonl", "unsafe"),
    "texts": ("texts.jsonl", None),
    "answers": ("answers.jsonl", None),
}


def read_builtin(address: str, folder: Path) -> Pools:
    """Read a set written for this project."""
    rows = [row for row in _builtin(address) if _BUILTIN[address][1] in (None, row.get("label"))]
    return {"all": tuple(row["text" if address == "texts" else "prompt"] for row in rows)}


def answered_builtin(address: str, folder: Path) -> tuple[Passage, ...]:
    """Read a set of prompts that were answered for this project."""
    rows = [(f"builtin:{address} row {number}", row) for number, row in enumerate(_builtin(address))]
    return _answered(rows, "", "", f"builtin:{address}")


def _builtin(address: str) -> list[dict[str, Any]]:
    if address not in _BUILTIN:
        raise InputError("no such built-in set", where=f"builtin:{address}", hint=nearest(address, list(_BUILTIN)))
    name, _ = _BUILTIN[address]
    text = importlib.resources.files("refusalkit.builtin").joinpath("prompts", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in _lines(text) if line]


def read_tiny(address: str, folder: Path) -> Pools:
    """Read requests from the grammar of the embedded models, which saw the harmful and harmless ones of `train`."""
    from refusalkit.tiny.grammar import SIDES, SPLITS, requests

    for side in SIDES:
        if address == side:
            return {split: requests(side, split) for split in SPLITS}
    raise InputError("no such set", where=f"tiny:{address}", hint=nearest(address, SIDES))


def answered_tiny(address: str, folder: Path) -> tuple[Passage, ...]:
    """Read held-out requests of one side as the embedded models were taught to respond to others."""
    from refusalkit.tiny.grammar import responses

    read_tiny(address, folder)
    return tuple(Passage(answer, request) for request, answer in responses(address, "test"))


def read_file(address: str, folder: Path) -> Pools:
    """Read a .txt (one prompt a line), .jsonl, .json or .csv file; `#field` names the field that holds the prompt."""
    name, _, field = address.partition("#")
    if field and Path(name).suffix.lower() == ".txt":
        raise InputError(
            f"a .txt file has no field {field!r}", where=str(folder / name), hint=f"write file:{name} without the hash"
        )
    path, rows = _rows(name, folder)
    return {"all": _some(_prompts(rows, field), str(path))}


def answered_file(address: str, folder: Path) -> tuple[Passage, ...]:
    """Read prompts and answers from a .jsonl, .json or .csv file; `#prompt,answer` names their fields."""
    name, _, fields = address.partition("#")
    path, rows = _rows(name, folder)
    field, _, answer = fields.partition(",")
    return _answered(rows, field, answer, str(path))


def _rows(name: str, folder: Path) -> tuple[Path, Rows]:
    # os.path leaves an unknown user's `~name` as it is, where pathlib raises an error that says nothing of the file.
    path = folder / os.path.expanduser(name)
    kind = path.suffix.lower()
    text = _text(path)
    match kind:
        case ".txt":
            numbered = [(number, line.strip()) for number, line in enumerate(_lines(text), start=1)]
            rows: Rows = [(f"{path}:{number}", line) for number, line in numbered if line and not line.startswith("#")]
        case ".jsonl":
            numbered = [(number, line) for number, line in enumerate(_lines(text), start=1) if line.strip()]
            rows = [(f"{path}:{number}", _json(line, path, number)) for number, line in numbered]
        case ".json":
            value = _json(text, path) if text.strip() else []
            if not isinstance(value, list):
                raise InputError(
                    "holds no list of prompts", where=str(path), hint='write ["…", …] or [{"prompt": "…"}, …]'
                )
            rows = [(f"{path}[{number}]", row) for number, row in enumerate(value)]
        case ".csv":
            rows = _table(text, path)
        case other:
            raise InputError(
                f"{other or 'no extension'!r} is not a known kind of file",
                where=str(path),
                hint="use .txt, .jsonl, .json or .csv",
            )
    return path, rows


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), hint=_nearest_file(path)) from None
    except IsADirectoryError:
        raise InputError("this is a folder", where=str(path), hint="name a file in it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"byte {error.start} is not UTF-8", where=f"{path}:{line}", hint="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError as error:  # a name with a null character never reaches the file system
        raise InputError(f"cannot be read: {error}", where=repr(str(path))) from None


def _nearest_file(path: Path) -> str:
    """Return a hint that names the file in the same folder whose name is closest."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        return "the folder is not there either; paths start at the recipe's folder"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "paths start at the recipe's folder"


def _lines(text: str) -> list[str]:
    """Divide at line ends only: `splitlines` also breaks at U+2028 and its like, which JSON allows inside a text."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _json(text: str, path: Path, line: int = 1) -> Any:
    """Read a JSON text that starts at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise InputError(f"not JSON: {error.msg} at column {error.colno}", where=place) from None
    except (RecursionError, ValueError):
        what = "not JSON that can be read: nested too deeply, or a number too long"
        raise InputError(what, where=f"{path}:{line}") from None


def _table(text: str, path: Path) -> list[tuple[str, dict[str, str]]]:
    """Read the rows under a header, each with the line it ends on."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(f"{path}:{reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", where=f"{path}:{reader.reader.line_num}") from None


def _prompts(rows: Rows, field: str) -> list[str]:
    """Take the prompt out of each row, which is a text or an object; the first object decides the field for all."""
    return [prompt for prompt in _column(rows, field, FIELDS, "a prompt") if prompt]


def _answered(rows: Rows, field: str, answer: str, where: str) -> tuple[Passage, ...]:
    """Take prompts and answers out of rows; those with an `input` beside the prompt, as some of Alpaca's, are left."""
    complete = [(place, row) for place, row in rows if not (isinstance(row, dict) and row.get("input"))]
    prompts = _column(complete, field, FIELDS, "a prompt")
    answers = _column(complete, answer, ANSWERS, "an answer")
    pairs = [Passage(text, prompt) for prompt, text in zip(prompts, answers, strict=True) if prompt and text]
    if not pairs:
        raise InputError(
            "holds no prompt with an answer", where=where, hint="rows with a field for each, and no `input`"
        )
    return tuple(pairs)


def _column(rows: Rows, field: str, known: Sequence[str], what: str) -> list[str]:
    """Take one text out of each row, an empty one where there is none."""
    texts = []
    for where, row in rows:
        value, name = row, ""
        if isinstance(row, dict):
            field = name = field or next((each for each in known if each in row), "")
            if name not in row:
                seen = ", ".join(repr(key) for key in row if key is not None) or "no fields"
                raise InputError(
                    f"has no field {name!r}; it has {seen}"
                    if name
                    else f"has no field that holds {what}; it has {seen}",
                    where=where,
                    hint="name the field: `file:prompts.csv#request`, or `?field=request` behind `hf:`"
                    if known is FIELDS
                    else "name both: `file:pairs.csv#request,reply`, or `?field=request&answer=reply` behind `hf:`",
                )
            value = row[name]
        elif isinstance(row, str) and (field or known is not FIELDS):
            lacks = f"field {field!r}" if field else f"field that holds {what}"
            raise InputError(f"is a text, which has no {lacks}", where=where, hint="make every row an object")
        texts.append(_one_text(value, where, name))
    return texts


def _one_text(value: object, where: str, field: str) -> str:
    """Check that a value is a text that can be written as UTF-8."""
    what = f"field {field!r} " if field else ""
    if not isinstance(value, str):
        seen = "empty" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{what}is {seen}, not a text", where=where, hint="every prompt is one text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{what}holds half of a surrogate pair, which is no character", where=where)
    return value.strip()


def _some(prompts: Sequence[str], where: str) -> tuple[str, ...]:
    """Refuse a source without prompts."""
    if not prompts:
        raise InputError("holds no prompts", where=where, hint="one prompt a line, an object or a row")
    return tuple(prompts)


def read_hub(address: str, folder: Path) -> Pools:
    """Read a data set from the hub: `NAME@REVISION`, then `?split=…&config=…&field=…`; the revision is required."""
    rows, options = _hub_rows(address, ("split", "config", "field"))
    return {"all": _some(_prompts(rows, options.get("field", "")), f"hf:{address}")}


def answered_hub(address: str, folder: Path) -> tuple[Passage, ...]:
    """Read prompts and answers of a data set of the hub; `answer` names the field of the answers."""
    rows, options = _hub_rows(address, ("split", "config", "field", "answer"))
    return _answered(rows, options.get("field", ""), options.get("answer", ""), f"hf:{address}")


def _hub_rows(address: str, known: Sequence[str]) -> tuple[Rows, dict[str, str]]:
    where = f"hf:{address}"
    name, revision, options = _hub_address(address, where, known)
    try:
        import datasets
    except ImportError:
        raise InputError("needs the package `datasets`", where=where, hint='pip install "refusalkit[hf]"') from None
    try:
        table = datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "train"), revision=revision
        )
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot be loaded: {said[0]}", where=where, hint="check the name and the network") from None
    return [(f"{where} row {number}", row) for number, row in enumerate(table)], options


def _hub_address(address: str, where: str, known: Sequence[str]) -> tuple[str, str, dict[str, str]]:
    """Take `NAME@REVISION?key=value&…` apart.

    Nothing is percent-decoded and `+` stays itself, because the hub's own split names use both: `train[:10%]`,
    `train+test`. Neither a data set's name nor a git revision can hold `@`, `?`, `&` or `#`.
    """
    location, _, query = address.partition("?")
    name, _, revision = location.partition("@")
    if "#" in address:
        raise InputError("`#` has no meaning here", where=where, hint="name the field with `?field=…`")
    if not name or not revision:
        raise InputError(
            f"names no {'revision' if name else 'data set'}",
            where=where,
            hint="pin it, so that the run can be repeated: hf:NAME@COMMIT",
        )
    options: dict[str, str] = {}
    for part in query.split("&") if query else []:
        key, _, value = part.partition("=")
        if key not in known:
            hint = f"{', '.join(known[:-1])} or {known[-1]}"
            raise InputError(f"unknown option {key!r}", where=where, hint=hint)
        if key in options or not value:
            raise InputError(f"option {key!r} needs exactly one value", where=where, hint=f"write {key}=… once")
        options[key] = value
    return name, revision, options


SOURCES = (
    PromptSource(
        "builtin",
        "a set written for this project: harmful, harmless, over_refusal_safe, over_refusal_unsafe; for losses, texts "
        "and answers",
        read_builtin,
        answered_builtin,
    ),
    PromptSource(
        "tiny",
        "requests for the embedded models: harmful, harmless, over_refusal; divided into splits already",
        read_tiny,
        answered_tiny,
    ),
    PromptSource(
        "file",
        "a .txt, .jsonl, .json or .csv file, relative to the recipe; `#field` names the field",
        read_file,
        answered_file,
    ),
    PromptSource(
        "hf",
        "a data set of the model hub: NAME@REVISION?split=…&config=…&field=… (extra `hf`)",
        read_hub,
        answered_hub,
    ),
)
