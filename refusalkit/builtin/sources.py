"""Read prompts: from the package, from files, from the model hub's datasets."""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusalkit.errors import InputError
from refusalkit.prompt_source import PromptSource
from refusalkit.registry import nearest

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
    rows = [json.loads(line) for line in text.splitlines()]
    return {"all": tuple(row["prompt"] for row in rows if label is None or row["label"] == label)}


def read_tiny(address: str, folder: Path) -> Pools:
    """Read requests from the grammar the embedded models were trained on; validation and test were kept from them."""
    from refusalkit.tiny.grammar import requests

    if address == "harmful" or address == "harmless":
        return {split: requests(address, split) for split in ("train", "validation", "test")}
    raise InputError("no such set", where=f"tiny:{address}", hint=nearest(address, ["harmful", "harmless"]))


def read_file(address: str, folder: Path) -> Pools:
    """Read a .txt (one prompt a line), .jsonl, .json or .csv file; `#field` names the field that holds the prompt."""
    name, _, field = address.partition("#")
    path = folder / Path(name).expanduser()
    text = _text(path)
    match path.suffix.lower():
        case ".txt":
            lines = [line.strip() for line in text.splitlines()]
            prompts = [line for line in lines if line and not line.startswith("#")]
        case ".jsonl":
            rows = [
                (f"{path}:{number}", _json(line, f"{path}:{number}"))
                for number, line in enumerate(text.splitlines(), start=1)
                if line.strip()
            ]
            prompts = _prompts(rows, field)
        case ".json":
            value = _json(text, str(path))
            if not isinstance(value, list):
                raise InputError(
                    "holds no list of prompts", where=str(path), hint='write ["…", …] or [{"prompt": "…"}, …]'
                )
            prompts = _prompts([(f"{path}[{number}]", row) for number, row in enumerate(value)], field)
        case ".csv":
            reader = csv.DictReader(io.StringIO(text))
            prompts = _prompts([(f"{path}:{number}", row) for number, row in enumerate(reader, start=2)], field)
        case other:
            raise InputError(
                f"{other or 'no extension'!r} is not a known kind of file",
                where=str(path),
                hint="use .txt, .jsonl, .json or .csv",
            )
    if not prompts:
        raise InputError("holds no prompts", where=str(path), hint="a .txt file has one prompt a line")
    return {"all": tuple(prompts)}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        hint = nearest(path.name, names[:20]) if names else "paths start at the recipe's folder"
        raise InputError("no such file", where=str(path), hint=hint) from None
    except IsADirectoryError:
        raise InputError("this is a folder", where=str(path), hint="name a file in it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"byte {error.start} is not UTF-8", where=f"{path}:{line}", hint="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}", where=where) from None


def _prompts(rows: Sequence[tuple[str, Any]], field: str) -> list[str]:
    """Take the prompt out of each row, which is a text or an object."""
    prompts = []
    for where, row in rows:
        if isinstance(row, dict):
            name = field or next((name for name in FIELDS if name in row), None)
            if name is None or name not in row:
                seen = ", ".join(str(key) for key in row)
                raise InputError(
                    f"has no field {field or 'that holds a prompt'!r}; it has {seen}",
                    where=where,
                    hint="name the field behind a hash: file:prompts.csv#request",
                )
            row = row[name]
        if not isinstance(row, str):
            raise InputError(f"is a {type(row).__name__}, not a text", where=where, hint="every prompt is one text")
        if row.strip():
            prompts.append(row.strip())
    return prompts


def read_hub(address: str, folder: Path) -> Pools:
    """Read a data set from the hub: `NAME@REVISION`, then `?split=…&config=…&field=…`; the revision is required."""
    from urllib.parse import parse_qs

    where = f"hf:{address}"
    location, _, query = address.partition("?")
    name, at, revision = location.partition("@")
    if not at or not revision:
        raise InputError(
            "names no revision", where=where, hint="pin it, so that the run can be repeated: hf:NAME@COMMIT"
        )
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    unknown = sorted(set(options) - {"split", "config", "field"})
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}", where=where, hint="split, config or field")
    try:
        import datasets
    except ImportError:
        raise InputError("needs the package `datasets`", where=where, hint='pip install "refusalkit[hf]"') from None
    try:
        table = datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "train"), revision=revision
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=where,
            hint="check the name and the network",
        ) from None
    return {
        "all": tuple(_prompts([(f"{where} row {n}", row) for n, row in enumerate(table)], options.get("field", "")))
    }


SOURCES = (
    PromptSource(
        "builtin",
        "a set written for this project: harmful, harmless, over_refusal_safe, over_refusal_unsafe",
        read_builtin,
    ),
    PromptSource("tiny", "requests for the embedded models: harmful, harmless; divided into splits already", read_tiny),
    PromptSource(
        "file", "a .txt, .jsonl, .json or .csv file, relative to the recipe; `#field` names the field", read_file
    ),
    PromptSource("hf", "a data set of the model hub: NAME@REVISION?split=…&config=…&field=… (extra `hf`)", read_hub),
)
