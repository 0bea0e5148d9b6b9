"""Turn what a model did into numbers: what a metric is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

#: What prompts are: requests to refuse, requests to answer, and requests to answer that look like those to refuse.
Side = Literal["harmful", "harmless", "over_refusal"]
SIDES: tuple[Side, ...] = get_args(Side)
Need = Literal["completions", "scores", "logits", "losses"]
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
    refusal_scores: Tensor | None = None
    """[prompt] float64, nats, at the last prompt position; with `kl_nats` what a metric gets that needs `scores`."""
    kl_nats: Tensor | None = None
    """[prompt] float64: KL(unmodified || modified) there."""
    logits: Tensor | None = None
    """[prompt, d_vocab] at the last prompt position. Prefer `scores`: from a server, logits are a large download."""
    baseline_logits: Tensor | None = None
    """The same of the unmodified model."""
    losses: Tensor | None = None
    """[prompt] summed cross-entropy, in nats, of the unmodified model's own completion."""
    n_tokens: Tensor | None = None
    """[prompt] the number of tokens summed in `losses`."""


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
        """What it is called in tables: no two metrics of a recipe may be called the same."""
        return self.metric

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
