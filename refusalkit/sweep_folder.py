"""Keep the folder of a sweep: one folder a run, and `sweep.yaml`, which says which runs they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from refusalkit.errors import InputError
from refusalkit.store import cannot_write, write_text

FILE = "sweep.yaml"


def is_sweep_folder(folder: Path) -> bool:
    """Whether `folder` holds the runs of a sweep."""
    return (folder / FILE).is_file()


def check_sweep_folder(folder: Path) -> None:
    """Refuse a folder in which something else stands already."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError("this is a file, not a folder", where=f"--out {folder}", hint="name a folder")
        taken = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
        if taken and not is_sweep_folder(folder):
            raise InputError(
                "the folder is not empty and holds no sweep", where=f"--out {folder}", hint="name a new or empty folder"
            )
    except OSError as error:
        raise cannot_write(folder, error) from None


def write_sweep(folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write which runs the sweep in `folder` has, and what it sets for each, by dotted key."""
    content = {"runs": {name: dict(values) for name, values in runs.items()}}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    write_text(folder / FILE, "# The runs of a sweep, each in the folder of its name, and what it sets.\n" + text)


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of the sweep's runs, in its order; a run that did not start has none."""
    where = str(folder / FILE)
    hint = "run its recipe again; finished stages are kept"
    try:
        found = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read: {error}", where=where, hint=hint) from None
    runs = found.get("runs") if isinstance(found, dict) else None
    if not isinstance(runs, dict):
        raise InputError("names no runs", where=where, hint=hint)
    return [folder / str(name) for name in runs if (folder / str(name)).is_dir()]
