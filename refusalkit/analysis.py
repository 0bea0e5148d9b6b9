"""Say which analyses of a chosen direction a recipe may ask for: those of the paper and of its successors.

All but `capability` look at the unmodified model. They run behind the evaluation, and a recipe that names none has none
of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from refusalkit.errors import InputError

#: A name that a chart and a table can show.
Name = Annotated[str, StringConstraints(min_length=1, max_length=40)]
Suffix = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Seed = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
#: One position: where the direction was found, the prompt's last token, the instruction's, or counted from the end.
At = Literal["chosen", "last", "instruction_end"] | Annotated[int, Field(lt=0)]
#: The name that a run's own harmful training prompts have beside groups of them.
OWN = "harmful"


class Analysis(BaseModel):
    """Declare an analysis by the options it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    analysis: str
    reads_weights: ClassVar[bool] = False
    """Whether it looks at weights and inside attention, which only a model on this machine lets it."""

    follows_interventions: ClassVar[bool] = False
    """Whether it looks at the model under the interventions of `evaluate`."""

    def at(self, folder: Path) -> Self:
        """Return it for a recipe in `folder`; raise `InputError` for what it needs and this machine does not have."""
        return self

    @property
    def sources(self) -> Mapping[str, str]:
        """The addresses of the prompts it needs beside the run's own, by name."""
        return {}

    @property
    def files(self) -> Mapping[str, str]:
        """The hashes of the files it reads, by name."""
        return {}


class Suffixes(Analysis):
    """Follow the direction through the layers when a suffix is appended to harmful prompts (Arditi et al., 5.1).

    Cosine of the residual stream with the direction, and refusal, of the harmful and harmless test prompts, of harmful
    ones with each suffix, and with random tokens in its place, as many. A suffix that suppresses refusal by way of the
    direction lowers both; random tokens should lower neither.
    """

    analysis: Literal["suffixes"] = "suffixes"
    append: Annotated[dict[Name, Suffix], Field(min_length=1)]
    """What to append to every harmful prompt, behind a space, by name. refusalkit brings none along."""
    position: At = "chosen"
    """Where to read the stream: the position the direction was found at (`chosen`), the `last` of the prompt, as the
    paper, `instruction_end`, or a negative number."""
    seed: Seed = 0
    """Seed of the random suffixes; every prompt gets one of its own."""


class Directions(Analysis):
    """Compare directions with each other: of groups of harmful prompts (categories, languages), and of positions.

    Each is a group's mean minus that of the harmless training prompts. Noise alone keeps a cosine below 1, so every
    cosine stands beside its ceiling: how well the directions of two random halves of the same group agree.
    """

    analysis: Literal["directions"] = "directions"
    groups: dict[Name, str] = Field(default_factory=dict)
    """Prompt sources by name, such as `fraud: file:fraud.txt`; taken as they are, not filtered. The run's own harmful
    training prompts are compared with them under the name `harmful`."""
    positions: Annotated[tuple[At, ...], Field(min_length=1)] = ("chosen",)
    """Where to read: every group has a direction at each of these. `[instruction_end, last]` sets harmfulness beside
    refusal (arXiv 2507.11878)."""
    most: Count = 128
    """Prompts of a group, at most."""
    seed: Seed = 0
    """Decides which prompts of a larger group are taken, and how they are divided."""

    @property
    def sources(self) -> Mapping[str, str]:
        return self.groups

    @model_validator(mode="after")
    def _has_something_to_compare(self) -> Directions:
        if OWN in self.groups:
            raise ValueError(f"`{OWN}` is the name of the run's own prompts: call the group something else")
        if not self.groups and len(self.positions) < 2:
            raise ValueError("there is one direction and nothing to compare it with: name `groups` or `positions`")
        return self


class Attribution(Analysis):
    """Attribute the direction to the heads and MLPs that write it, at the last position (Arditi et al., section 5.2).

    What each attention head and MLP adds to the stream, along the direction, averaged over harmful and harmless test
    prompts; and how much of their attention the heads that write most pay to the instruction and to a suffix. Needs the
    weights, so the model has to run on this machine and must not be quantized.
    """

    analysis: Literal["attribution"] = "attribution"
    reads_weights = True
    append: dict[Name, Suffix] = Field(default_factory=dict)
    """What to append to every harmful prompt, as `suffixes` does; random tokens stand beside it."""
    top: Count = 8
    """How many heads to show one by one: those that write most along the direction on harmful prompts."""
    seed: Seed = 0
    """Seed of the random suffixes."""


class Capability(Analysis):
    """Score tasks of EleutherAI's lm-evaluation-harness, on the unmodified model and under every intervention.

    The harness (`pip install 'refusalkit[capability]'`) prepares, asks and scores; the engine answers. Its tasks are
    fetched from the model hub where they are not on this machine. The model has to run on this machine.
    """

    analysis: Literal["capability"] = "capability"
    follows_interventions = True
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks by the harness's names, such as `[arc_easy, gsm8k]`; `lm_eval ls tasks` lists them."""
    folder: str | None = None
    """A folder with tasks of your own, as the harness's YAML files; relative to the recipe."""
    limit: Count | None = None
    """The first so many documents of every task; null takes all."""
    fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Examples before every question; null leaves it to the task."""
    chat_template: bool = False
    """Put every question into the model's chat template."""

    def at(self, folder: Path) -> Self:
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError(
                "the lm-evaluation-harness is not installed",
                where="analyze: capability",
                hint="pip install 'refusalkit[capability]'",
            )
        if self.folder is None:
            return self
        found = (folder / self.folder).resolve()
        if not found.is_dir():
            raise InputError(f"{found} is no folder", where="analyze: capability.folder", hint="name one with tasks")
        return self.model_copy(update={"folder": str(found)})

    @property
    def files(self) -> Mapping[str, str]:
        paths = sorted(path for path in Path(self.folder).rglob("*") if path.is_file()) if self.folder else ()
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


ANALYSES: Mapping[str, type[Analysis]] = {
    "suffixes": Suffixes,
    "attribution": Attribution,
    "directions": Directions,
    "capability": Capability,
}
