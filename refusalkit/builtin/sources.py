"""Read prompts: from the package, from files, from the model hub's datasets.

The addresses, without the scheme: a set's name (`builtin:`, `tiny:`); `PATH[#FIELD]`, relative to the recipe's folder
(`file:`); `NAME@REVISION[?split=…&config=…&field=…]` (`hf:`). A path cannot hold `#`.
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
from refusalkit.prompt_source import PromptSource

Pools = Mapping[str, tuple[str, ...]]

#: Names under which public data sets keep the request, in the order they are looked for.
FIELDS = ("prompt", "instruction", "goal", "behavior", "Goal", "Behavior", "text", "question")

_BUILTIN = {
    "harmful": ("harmful.jsonl", None),
    "harmless": ("harmless.jsonl", None),
    "over_refusal_safe": ("over_refusal.jsonl", "safe"),
    "over_refusal_unsafe": ("over_refusal.jsonl", "unsafe"),
}


def read_builtin(address: str, folder: Path) -> Pools:
    """Read a set written for this project."""
    if address not in _BUILTIN:
        raise InputError("no such built-in set", where=f"builtin:{address}", hint=nearest(address, list(_BUILTIN)))
    name, label = _BUILTIN[address]
    text = importlib.resources.files("refusalkit.builtin").joinpath("prompts", name).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in _lines(text) if line]
    return {"all": tuple(row["prompt"] for row in rows if label is None or row["label"] == label)}


def read_tiny(address: str, folder: Path) -> Pools:
    """Read requests from the grammar of the embedded models, which saw the harmful and harmless ones of `train`."""
    from refusalkit.tiny.grammar import SIDES, SPLITS, requests

    for side in SIDES:
        if address == side:
            return {split: requests(side, split) for split in SPLITS}
    raise InputError("no such set", where=f"tiny:{address}", hint=nearest(address, SIDES))


def read_file(address: str, folder: Path) -> Pools:
    """Read a .txt (one prompt a line), .jsonl, .json or .csv file; `#field` names the field that holds the prompt."""
    name, _, field = address.partition("#")
    # os.path leaves an unknown user's `~name` as it is, where pathlib raises an error that says nothing of the file.
    path = folder / os.path.expanduser(name)
    kind = path.suffix.lower()
    text = _text(path)
    match kind:
        case ".txt":
            if field:
                raise InputError(
                    f"a .txt file has no field {field!r}", where=str(path), hint=f"write file:{name} without the hash"
                )
            lines = [line.strip() for line in _lines(text)]
            prompts = [line for line in lines if line and not line.startswith("#")]
        case ".jsonl":
            numbered = [(number, line) for number, line in enumerate(_lines(text), start=1) if line.strip()]
            prompts = _prompts([(f"{path}:{number}", _json(line, path, number)) for number, line in numbered], field)
        case ".json":
            value = _json(text, path) if text.strip() else []
            if not isinstance(value, list):
                raise InputError(
                    "holds no list of prompts", where=str(path), hint='write ["…", …] or [{"prompt": "…"}, …]'
                )
            prompts = _prompts([(f"{path}[{number}]", row) for number, row in enumerate(value)], field)
        case ".csv":
            prompts = _prompts(_table(text, path), field)
        case other:
            raise InputError(
                f"{other or 'no extension'!r} is not a known kind of file",
                where=str(path),
                hint="use .txt, .jsonl, .json or .csv",
            )
    return {"all": _some(prompts, str(path))}


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


def _prompts(rows: Sequence[tuple[str, Any]], field: str) -> list[str]:
    """Take the prompt out of each row, which is a text or an object; the first object decides the field for all."""
    prompts = []
    for where, row in rows:
        value, name = row, ""
        if isinstance(row, dict):
            field = name = field or next((known for known in FIELDS if known in row), "")
            if name not in row:
                seen = ", ".join(repr(key) for key in row if key is not None) or "no fields"
                raise InputError(
                    f"has no field {name!r}; it has {seen}"
                    if name
                    else f"has no field that holds a prompt; it has {seen}",
                    where=where,
                    hint="name the field: `file:prompts.csv#request`, or `?field=request` behind `hf:`",
                )
            value = row[name]
        elif field and isinstance(row, str):
            raise InputError(f"is a text, which has no field {field!r}", where=where, hint="make every row an object")
        prompts.append(_one_text(value, where, name))
    return [prompt for prompt in prompts if prompt]


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
    where = f"hf:{address}"
    name, revision, options = _hub_address(address, where)
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
    rows = [(f"{where} row {number}", row) for number, row in enumerate(table)]
    return {"all": _some(_prompts(rows, options.get("field", "")), where)}


def _hub_address(address: str, where: str) -> tuple[str, str, dict[str, str]]:
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
        if key not in ("split", "config", "field"):
            raise InputError(f"unknown option {key!r}", where=where, hint="split, config or field")
        if key in options or not value:
            raise InputError(f"option {key!r} needs exactly one value", where=where, hint=f"write {key}=… once")
        options[key] = value
    return name, revision, options


SOURCES = (
    PromptSource(
        "builtin",
        "a set written for this project: harmful, harmless, over_refusal_safe, over_refusal_unsafe",
        read_builtin,
    ),
    PromptSource(
        "tiny",
        "requests for the embedded models: harmful, harmless, over_refusal; divided into splits already",
        read_tiny,
    ),
    PromptSource(
        "file", "a .txt, .jsonl, .json or .csv file, relative to the recipe; `#field` names the field", read_file
    ),
    PromptSource("hf", "a data set of the model hub: NAME@REVISION?split=…&config=…&field=… (extra `hf`)", read_hub),
)
