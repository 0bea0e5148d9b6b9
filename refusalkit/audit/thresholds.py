"""Read which numbers an audit must show."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from refusalkit.errors import InputError
from refusalkit.recipe import Section
from refusalkit.recipe_file import Words, checked, read_source
from refusalkit.registry import Registry

WORDS = Words("thresholds file", "write `min_refusal_rate: 0.8`, or another threshold", "`refusalkit audit` prints one")
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Nats = Annotated[float, Field(strict=True)]


class Thresholds(Section):
    """Hold the bound of every number of an audit; a number without one is not checked."""

    min_refusal_rate: Share | None = None
    """Smallest share of held-out harmful requests that the model refuses, from 0 to 1."""
    min_margin_nats: Nats | None = None
    """Smallest mean refusal score of these requests, in nats."""
    max_ablation_drop: Share | None = None
    """Largest share of refusals that removing one direction may cost, beyond control directions, from 0 to 1."""
    max_layer_share: Share | None = None
    """Largest share of layers at which one direction suffices, from 0 to 1."""
    max_over_refusal_rate: Share | None = None
    """Largest share of harmless requests that look harmful which the model may refuse, from 0 to 1."""


def default_file() -> Path:
    """Return the file of the default thresholds, which explains each."""
    return Path(str(importlib.resources.files("refusalkit.audit").joinpath("thresholds.yaml")))


def read_thresholds(path: Path, registry: Registry) -> Thresholds:
    """Read a file of thresholds; raises `InputError` with file, line, key, what was seen and one hint."""
    found = checked(read_source(path, WORDS), Thresholds, registry)
    if all(bound is None for _, bound in found):
        raise InputError("sets no threshold, so that every model would pass", where=str(path), hint=WORDS.start)
    return found
