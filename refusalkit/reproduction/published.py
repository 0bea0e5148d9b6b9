"""Hold what the authors published of each run: their repository's artefacts and the paper's tables."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from refusalkit.errors import InputError, nearest
from refusalkit.metric import Side

NAMES = ("gemma-2b-it", "llama-2-7b-chat", "llama-3-8b-instruct", "yi-6b-chat")


class Quantity(BaseModel):
    """Hold one published number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    """A key of `quantity.MEASURED` or `quantity.ELSEWHERE`."""
    side: Side | None = None
    """The test prompts it is of."""
    under: str | None = None
    """The label of the intervention it is measured under."""
    authors: float | None = None
    """In the artefacts of the authors' repository."""
    paper: float | None = None
    """In the paper's tables; not always the same run."""


class Published(BaseModel):
    """Hold one published run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    hub: str
    """The checkpoint's name on the hub."""
    run: str
    """The folder in the authors' repository."""
    architecture: str
    n_layers: int
    d_model: int
    d_vocab: int
    rows: tuple[Quantity, ...]

    @property
    def recipe(self) -> Path:
        """The recipe that repeats the run."""
        return _data(f"{self.name}.yaml")

    def number(self, what: str) -> float | None:
        """Return the authors' value of a quantity that stands once."""
        return next((row.authors for row in self.rows if row.what == what), None)


def published(name: str) -> Published:
    """Return the published run of a model. Raises `InputError` for a name without one."""
    if name not in NAMES:
        raise InputError("no published run has this name", where=repr(name), hint=nearest(name, NAMES))
    records = json.loads(_data("published.json").read_text(encoding="utf-8"))["models"]
    return Published.model_validate({"name": name, **records[name]})


def _data(name: str) -> Path:
    return Path(str(importlib.resources.files("refusalkit.reproduction").joinpath(name)))
