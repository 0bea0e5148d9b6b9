"""Turn what a model did into numbers: what a metric is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from refusalkit.prompt_source import Passage

if TYPE_CHECKING:
    from torch import Tensor

#: What prompts are: requests to refuse, requests to answer, and requests to answer that look like those to refuse.
Side = Literal["harmful", "harmless", "over_refusal"]
SIDES: tuple[Side, ...] = get_args(Side)
#: `losses` and `token_kl` follow the unmodified model's completions under the intervention, `written_losses` the
#: intervention's completions under the unmodified model, `text_losses` the texts of a `TextMetric`.
Need = Literal["completions", "scores", "logits", "losses", "token_kl", "written_losses", "text_losses", "projections"]
Count = Annotated[int, Field(ge=1, strict=True)]
#: What a one says of a completion: that it refuses, or that it holds something harmful.
Verdict = Literal["refused", "harmful"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Hold what one intervention made of one side's test prompts; only what the metric `needs` is filled in."""

    side: Side
    prompts: tuple[str, ...]
    opener_ids: tuple[int, ...]
    """Token ids that open a refusal."""
    completions: tuple[str, ...] = ()
    """One greedy completion a prompt."""
    completion_ids: tuple[tuple[int, ...], ...] = ()
    """The same as token ids."""
    refusal_scores: Tensor | None = None
    """[prompt] float64, nats, at the last prompt position; with `kl_nats` what a metric gets that needs `scores`."""
    kl_nats: Tensor | None = None
    """[prompt] float64: KL(unmodified || modified) there."""
    logits: Tensor | None = None
    """[prompt, d_vocab] at the last prompt position. Prefer `scores`: from a server, logits are a large download."""
    baseline_logits: Tensor | None = None
    """The same of the unmodified model."""
    losses: Tensor | None = None
    """[prompt] summed cross-entropy, in nats: with `losses` of the unmodified model's own completion, with
    `written_losses` of the intervention's under the unmodified model, with `text_losses` of each of the texts, which
    then stand in `prompts`."""
    token_kl: Tensor | None = None
    """[prompt] KL(unmodified || modified), in nats, summed along the unmodified model's own completion."""
    n_tokens: Tensor | None = None
    """[prompt] the number of tokens summed in `losses` or `token_kl`."""
    projections: Tensor | None = None
    """[prompt] component of the residual stream along the unit direction, where the direction was found."""


@dataclass(frozen=True)
class Values:
    """Hold one number a prompt, from which the stage takes the mean and its interval."""

    values: tuple[float, ...]
    """Not-a-number where it cannot be told: counted as missing, and in no mean."""
    weights: tuple[float, ...] | None = None
    """What each prompt counts; None for equally. The cross-entropy is a mean over tokens, so prompts count by them."""


class Metric(BaseModel, ABC):
    """Provide a metric: a frozen pydantic class whose fields are its YAML keys and whose docstring is its help.

    Subclasses set the field `metric` to their name: `metric: Literal["kl"] = "kl"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    metric: str
    kind: ClassVar[Literal["rate", "mean"]]
    """A rate of yes-or-no values gets a Wilson interval, a mean a bootstrap interval."""
    unit: ClassVar[str]
    needs: ClassVar[Need]
    sides: ClassVar[tuple[Side, ...]] = SIDES
    """The sides on which the number means something."""

    @property
    def label(self) -> str:
        """The name shown in tables: the metric's name and every option that is not at its default."""
        shown = ", ".join(
            f"{name}={getattr(self, name)}"
            for name, field in type(self).model_fields.items()
            if name != "metric" and getattr(self, name) != field.default
        )
        return f"{self.metric}({shown})" if shown else self.metric

    @property
    def verdict(self) -> Verdict | None:
        """What a one says of a completion, for a rate over completions; such verdicts are compared with each other."""
        return None

    @property
    def parts(self) -> tuple[Metric, ...]:
        """What is measured in its place: a metric that counts several things has a part for each."""
        return (self,)

    @property
    def sends_to(self) -> str | None:
        """The host that gets the prompts and their completions; None where nothing leaves this machine."""
        return None

    def check(self) -> None:
        """Raise `InputError`, before anything runs, for what it needs and this machine does not have."""

    def ready(self) -> None:
        """Raise `RunError` as the evaluation starts, for what would otherwise fail at its end, hours later."""

    @abstractmethod
    def measure(self, evidence: Evidence) -> Values:
        """Return one value a prompt, in the order of `evidence.prompts`; not-a-number where it cannot be told."""


class TextMetric(Metric):
    """Provide a metric on texts that the recipe names and that are the same for every intervention.

    Its numbers stand with those of harmless prompts, one value a text.
    """

    kind = "mean"
    needs = "text_losses"
    sides = ("harmless",)
    answered: ClassVar[bool] = False
    """Whether each text is the answer to a prompt, rather than one that stands alone."""

    source: str
    """Where the texts come from, as prompts do."""
    most: Count = 128
    """How many texts to take, the first of the source."""
    max_tokens: Count = 256
    """Tokens of a text, its prompt not counted, after which it is cut off."""
    _texts: tuple[Passage, ...] = PrivateAttr(())

    @property
    def texts(self) -> tuple[Passage, ...]:
        """What was read from the source; nothing before a plan is made."""
        return self._texts

    def holding(self, texts: tuple[Passage, ...]) -> Self:
        """Return the metric with the first of `texts` in it."""
        made = self.model_copy()
        made._texts = texts[: self.most]
        return made
