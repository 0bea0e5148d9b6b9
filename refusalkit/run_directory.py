"""Read a finished run directory back, as everything that looks at results does.

A run directory holds one folder a stage (see `refusalkit.store`) and a few plain files. Only what is read here must
be there, so a run can be read while its report is being written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from refusalkit.artifacts import Analyses, Artifact, Candidates, Choice, Evaluation, PromptSplits
from refusalkit.errors import InputError
from refusalkit.store import Store

A = TypeVar("A", bound=Artifact)

READ_FILES = ("recipe.yaml", "environment.json", "summary.json")
READ_STAGES: tuple[type[Artifact], ...] = (PromptSplits, Candidates, Choice, Evaluation)
AGAIN = "run `refusalkit run` on its recipe again; finished stages are kept"


@dataclass(frozen=True, eq=False)
class Run:
    """Hold a finished run: what was asked, where it ran, and what every stage left behind."""

    folder: Path
    recipe: dict[str, Any]
    """`recipe.yaml`: the recipe as resolved, every default filled in."""
    environment: dict[str, Any]
    """`environment.json`: versions, device, model, times."""
    summary: dict[str, Any]
    """`summary.json`: the numbers other tools rely on."""
    prompts: PromptSplits
    candidates: Candidates
    choice: Choice
    evaluation: Evaluation
    analyses: Analyses | None = None
    """None where the recipe asks for none."""


def read_run(folder: Path) -> Run:
    """Read the finished run in `folder`, or say what is missing."""
    if not folder.is_dir():
        raise InputError("is not a folder", where=str(folder), hint="give the run directory that `refusalkit run` made")
    store = Store(folder)
    if missing := missing_in(folder):
        raise InputError(f"is not a finished run: no {', '.join(missing)}", where=str(folder), hint=AGAIN)
    return Run(
        folder=folder,
        recipe=mapping_in(folder / "recipe.yaml"),
        environment=mapping_in(folder / "environment.json"),
        summary=mapping_in(folder / "summary.json"),
        prompts=artifact_in(store, PromptSplits),
        candidates=artifact_in(store, Candidates),
        choice=artifact_in(store, Choice),
        evaluation=artifact_in(store, Evaluation),
        analyses=artifact_in(store, Analyses) if store.key(Analyses.stage) else None,
    )


def missing_in(folder: Path) -> list[str]:
    """Return what a finished run would have in `folder` and this one has not."""
    store = Store(folder)
    missing = [name for name in READ_FILES if not (folder / name).is_file()]
    return missing + [f"{kind.stage}/" for kind in READ_STAGES if store.key(kind.stage) is None]


def mapping_in(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), hint=AGAIN) from None
    if not isinstance(value, dict):
        raise InputError(f"holds {type(value).__name__}, not a mapping", where=str(path), hint=AGAIN)
    return value


def artifact_in(store: Store, kind: type[A]) -> A:
    """Read one artifact, or say what is wrong with it."""
    where = str(store.folder / kind.stage)
    try:
        artifact = store.load(kind)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"was written by another version of refusalkit: {key}: {first['msg']}"
        raise InputError(message, where=where, hint=AGAIN) from None
    if artifact is None:
        raise InputError("is not a finished stage", where=where, hint=AGAIN)
    return artifact
