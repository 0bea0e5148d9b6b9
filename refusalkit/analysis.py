"""Say which analyses of a chosen direction a recipe may ask for: those of the paper and of its successors.

An analysis looks at the unmodified model. It runs behind the evaluation, and a recipe that names none has none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

#: A name that a chart and a table can show.
Name = Annotated[str, StringConstraints(min_length=1, max_length=40)]
Suffix = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Seed = Annotated[int, Field(strict=True)]


class Analysis(BaseModel):
    """Declare an analysis by the options it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    analysis: str
    reads_weights: ClassVar[bool] = False
    """Whether it looks at weights and inside attention, which only a model on this machine lets it."""

    @property
    def groups(self) -> Mapping[str, str]:
        """The addresses of the prompts it needs beside the run's own, by name."""
        return {}


class Suffixes(Analysis):
    """Follow the direction through the layers when a suffix is appended to harmful prompts (Arditi et al., 5.1).

    Cosine of the residual stream with the direction, and refusal, of the harmful and harmless test prompts, of harmful
    ones with each suffix, and with random tokens in its place, as many. A suffix that suppresses refusal by way of the
    direction lowers both; random tokens should lower neither.
    """

    analysis: Literal["suffixes"] = "suffixes"
    suffixes: Annotated[dict[Name, Suffix], Field(min_length=1)]
    """What to append to every harmful prompt, behind a space, by name. refusalkit brings none along."""
    position: Literal["chosen", "last"] = "chosen"
    """Where to read the stream: the position the direction was found at, or the last of the prompt, as the paper."""
    seed: Seed = 0
    """Seed of the random suffixes; every prompt gets one of its own."""


ANALYSES: Mapping[str, type[Analysis]] = {"suffixes": Suffixes}
