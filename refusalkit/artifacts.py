"""Define what each stage leaves behind: frozen values that are written once and read by everything after.

`prompts -> PromptSplits`, `capture -> Activations`, `find -> Candidates`, `select -> Choice`,
`evaluate -> Evaluation`, and `analyze -> Analyses` where a recipe asks for any. Fields that are tensors go to
safetensors, the rest to JSON; `refusalkit.store` does both.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from refusalkit.intervention import Site
from refusalkit.metric import SIDES, Side, Verdict
from refusalkit.strategy import Captured

Split = Literal["train", "validation", "test"]

#: What stands beside the tensors of a stage, so that a file can be understood alone.
LAYER_CONVENTION = "layer l is the block whose input is resid_pre[l]"
AS_FOUND = "directions as found, not normalised: ablate removes the unit vector, steer adds as is"

# JSON has no not-a-number: it is written as null and read back as NaN where a number must stand.
MaybeNaN = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


class Frozen(BaseModel):
    """Forbid unknown fields and changes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="null", protected_namespaces=()
    )


class Artifact(Frozen):
    """Leave a stage's result behind."""

    stage: ClassVar[str]


class FilterCount(Frozen):
    """Count what the refusal-score filter kept of one split."""

    side: Side
    split: Split
    kept: int
    of: int
    mean_score: float
    """Mean refusal score before the filter, in nats."""


class Template(Frozen):
    """Describe how instructions are rendered: what stands before and after them, in this tokenizer's tokens."""

    hash: str
    """SHA-256 of the chat template and the options it is rendered with."""
    prefix: str
    """The text before the instruction; a default system prompt shows here."""
    suffix: str
    """The text after the instruction, up to where the answer starts."""
    suffix_tokens: tuple[str, ...]
    """The tokens of the suffix: the `post_instruction` positions, left to right."""


class Openers(Frozen):
    """Say which tokens count as opening a refusal, and why these."""

    texts: tuple[str, ...]
    token_ids: tuple[int, ...]
    source: Literal["recipe", "family", "found"]
    reason: str
    """One sentence for the report."""


class PromptSplits(Artifact):
    """Hold the prompts of every side and split, after the filter, and how they are rendered."""

    stage = "prompts"

    harmful: dict[Split, tuple[str, ...]]
    harmless: dict[Split, tuple[str, ...]]
    over_refusal: dict[Split, tuple[str, ...]] | None = None
    """None where the recipe names none."""
    positions: tuple[int, ...]
    """The positions to capture: negative, counted from the end of the rendered prompt, ascending."""
    position_tokens: tuple[str, ...]
    """The token at each position, or `…` where it differs from prompt to prompt."""
    template: Template
    openers: Openers
    filtered: tuple[FilterCount, ...] = ()
    """What the filter did; empty when it is off."""
    duplicates_dropped: int = 0

    @property
    def sides(self) -> dict[Side, dict[Split, tuple[str, ...]]]:
        """The prompts of every side there is, by split."""
        present = {side: getattr(self, side) for side in SIDES}
        return {side: splits for side, splits in present.items() if splits is not None}

    def of(self, side: Side, split: Split) -> tuple[str, ...]:
        """Return the prompts of one side and split; none where there is no such side."""
        return self.sides.get(side, {}).get(split, ())


class Activations(Artifact):
    """Hold the residual stream of the training prompts."""

    stage = "capture"

    site: Site
    positions: tuple[int, ...]
    harmful_mean: Tensor
    """[position, layer, d_model] float64."""
    harmless_mean: Tensor
    """[position, layer, d_model] float64."""
    n_harmful: int
    n_harmless: int
    shuffled: Tensor | None = None
    """[position, layer, d_model] float64: the difference in means of a labelling that says nothing, halves of every
    side against its other halves; None where a side has a single prompt."""
    harmful_samples: Tensor | None = None
    """[prompt, position, layer, d_model] float32, where the strategy or the selector needs them."""
    harmless_samples: Tensor | None = None
    over_refusal_mean: Tensor | None = None
    """[position, layer, d_model] float64; this and what follows, where the strategy finds from over-refusal prompts."""
    n_over_refusal: int = 0
    over_refusal_samples: Tensor | None = None

    @property
    def captured(self) -> dict[Side, Captured]:
        """What strategies are given, by side."""
        return {
            side: Captured(mean, getattr(self, f"n_{side}"), getattr(self, f"{side}_samples"))
            for side in SIDES
            if (mean := getattr(self, f"{side}_mean")) is not None
        }


class Candidates(Artifact):
    """Hold the directions found."""

    stage = "find"

    strategy: str
    """With what was done to its directions afterwards."""
    site: Site
    positions: tuple[int, ...]
    directions: Tensor
    """[position, layer, d_model] or [position, layer, rank, d_model] float64, as found (not normalised)."""
    cosines: Tensor | None = None
    """[position, layer] float64: of each direction, or the first row of a subspace, with the difference in means there;
    not-a-number where one of the two is zero, and None where the activations are not known."""
    repairs: bool = False
    """Whether it was found from over-refusal prompts, to answer them."""


class ScoreRow(Frozen):
    """Hold one candidate's scores; null where it was not scored, and `status` says why."""

    position: int
    layer: int
    refusal_score: float | None
    induced_score: float | None
    kl_nats: float | None
    status: str
    """`chosen`, `survivor`, or the reason it fell."""
    extra: dict[str, float] = Field(default_factory=dict)


class Choice(Artifact):
    """Hold the selected direction and every score that led to it."""

    stage = "select"

    selector: str
    position: int
    layer: int
    direction: Tensor
    """[d_model] or [rank, d_model] float64, as found."""
    scores: tuple[ScoreRow, ...]
    baseline_refusal_score: float | None
    baseline_harmless_score: float | None
    cosine: MaybeNaN | None = None
    """Between the direction, of a subspace the first row, and the difference in means at the same place."""
    meanings: dict[str, tuple[str, str]] = Field(default_factory=dict)
    """What the selector calls a score, and what it says of it."""

    @property
    def chosen(self) -> ScoreRow:
        """The scores of the choice."""
        return next(row for row in self.scores if row.status == "chosen")

    @property
    def n_survivors(self) -> int:
        """How many candidates passed every filter, the chosen one included."""
        return sum(row.status in ("chosen", "survivor") for row in self.scores)


class Unmodified(Artifact):
    """Hold what the unmodified model writes to the test prompts, with which every intervention is compared.

    No stage of its own: it is made during `evaluate`, and kept apart because it does not depend on any direction.
    """

    stage = "baseline"

    completions: dict[Side, tuple[tuple[int, ...], ...]]
    """Greedy completions as token ids, one a test prompt, of the sides on which a metric looks at them."""


class Result(Frozen):
    """Hold one number of the evaluation with its 95% interval."""

    intervention: str
    """The label: `none`, `ablate`, `steer(scale=-1.0)`, `ablate_random` and `ablate_shuffled` for controls."""
    prompts: Side
    metric: str
    value: MaybeNaN
    low: MaybeNaN
    high: MaybeNaN
    n: int
    """How many prompts the number rests on; those without a value are not counted."""
    unit: str
    kind: Literal["rate", "mean"]
    values: tuple[MaybeNaN, ...] = ()
    """One value a test prompt, in their order; not-a-number where a prompt has none."""
    weights: tuple[float, ...] | None = None
    """What each prompt counts in the mean; null for equally."""
    verdict: Verdict | None = None
    """What a one says of a completion, where the values are verdicts."""

    @property
    def missing(self) -> int:
        """How many test prompts have no value."""
        return max(0, len(self.values) - self.n)


class Generated(Frozen):
    """Hold the greedy completions of one side's test prompts under one intervention."""

    intervention: str
    prompts: Side
    texts: tuple[str, ...]
    refused: tuple[bool | None, ...] | None = None
    """Whether each is a refusal by the first metric that tells, null where its verdict is missing; null as a whole
    where none was asked for."""


class Separation(Frozen):
    """Show how one side's test prompts lie along the direction, layer by layer, in the unmodified model."""

    prompts: Side
    mean: tuple[MaybeNaN, ...]
    """[layer] mean over prompts of the cosine between resid_pre and the direction at the chosen position."""
    low: tuple[MaybeNaN, ...]
    """[layer] the 5th percentile."""
    high: tuple[MaybeNaN, ...]
    """[layer] the 95th percentile."""


class WeightEdit(Frozen):
    """Report a weight edit and how far it is from the same ablation of the activations."""

    label: str
    edited: tuple[str, ...]
    """Names of the parameters that were changed."""
    untied: bool
    """Whether the unembedding had to be untied from the embedding first."""
    claim: str | None
    """Why the edit is not equivalent to ablation on this architecture; null where it is claimed to be."""
    max_logit_gap: float
    """Largest difference of last-position logits to activation ablation over the test prompts, over the standard
    deviation of the logits."""
    plain_logit_gap: float | None = None
    """The same to the plain weight edit, where this one keeps norms."""


#: The name of the share of prompts that a gate opens for.
GATE_RATE = "gate_rate"


class Evaluation(Artifact):
    """Hold what the interventions did to the held-out test prompts."""

    stage = "evaluate"

    results: tuple[Result, ...]
    generated: tuple[Generated, ...]
    separation: tuple[Separation, ...]
    weight_edits: tuple[WeightEdit, ...] = ()
    gates: tuple[Result, ...] = ()
    """For how many test prompts of each side the gates of interventions open; a control has the same gate."""


class SuffixGroup(Frozen):
    """Show how prompts with something appended lie along the direction, and whether they are refused."""

    label: str
    suffix: str | None
    """The suffix by name; null for prompts as they are."""
    random: bool
    """Whether random tokens stand in the suffix's place."""
    text: str
    """What was appended, to the first prompt where each has its own."""
    n: int
    mean: tuple[MaybeNaN, ...]
    """[layer] mean over prompts of the cosine between the residual stream and the direction."""
    low: tuple[MaybeNaN, ...]
    """[layer] the lower end of its 95% interval, over prompts."""
    high: tuple[MaybeNaN, ...]
    """[layer] the upper end."""
    results: tuple[Result, ...]
    """Refusal in the unmodified model."""


class SuffixesFound(Frozen):
    """Hold what suffixes do to the direction and to refusal (Arditi et al. 2024, section 5.1)."""

    analysis: Literal["suffixes"] = "suffixes"
    position: int
    """Where the stream was read."""
    groups: tuple[SuffixGroup, ...]
    """Harmful, harmless, then harmful with each suffix and with random ones like it."""


class DirectionRow(Frozen):
    """Name one direction: a group of prompts minus the harmless ones, at a position."""

    label: str
    group: str
    position: int
    n: int
    """How many prompts it is the mean of."""


class DirectionPair(Frozen):
    """Hold how alike two directions are in every layer, or one and itself on other prompts; null where one is zero."""

    first: str
    second: str
    cosine: tuple[MaybeNaN, ...]
    """[layer] between the directions as found, from all prompts."""
    between_halves: tuple[MaybeNaN, ...]
    """[layer] between the first from half of the prompts, harmless ones too, and the second from the others, averaged
    over divisions into halves: no prompt is behind both."""
    ceiling: tuple[MaybeNaN, ...]
    """[layer] what `between_halves` would be if noise were all that keeps the two apart: the geometric mean of what it
    is for each direction and itself; null where one of those is not positive."""


class DirectionsFound(Frozen):
    """Hold the cosines between directions, beside what noise allows."""

    analysis: Literal["directions"] = "directions"
    rows: tuple[DirectionRow, ...]
    n_harmless: int
    n_divisions: int
    """Divisions into halves that were averaged."""
    pairs: tuple[DirectionPair, ...]
    """Every two, and every one with itself."""


class AttributionGroup(Frozen):
    """Hold what heads and MLPs write along the direction, averaged over prompts, in the units of the stream."""

    label: str
    suffix: str | None
    random: bool
    n: int
    heads: tuple[tuple[MaybeNaN, ...], ...]
    """[layer][head]; null where a layer has fewer heads than another."""
    attention: tuple[float, ...]
    """[layer] all that attention adds: its heads and the bias of its projection."""
    mlp: tuple[float, ...]
    """[layer]"""


class HeadFound(Frozen):
    """Hold what one head does on one group of prompts, with the 95% interval over prompts."""

    layer: int
    head: int
    label: str
    """The group of prompts."""
    value: float
    """What it writes along the direction."""
    low: float
    high: float
    on_instruction: MaybeNaN
    """The share of its attention from the last position to the instruction; null in a layer without such weights."""
    on_suffix: MaybeNaN
    """The same to what is appended; null where nothing is."""


class AttributionFound(Frozen):
    """Hold which heads and MLPs write the direction (Arditi et al. 2024, section 5.2)."""

    analysis: Literal["attribution"] = "attribution"
    groups: tuple[AttributionGroup, ...]
    top: tuple[HeadFound, ...]
    """The heads that write most on harmful prompts, most first, on every group."""


class TaskScore(Frozen):
    """Hold one number that the lm-evaluation-harness gives to a model under an intervention."""

    intervention: str
    task: str
    metric: str
    """With the harness's filter, where it has one."""
    value: float
    low: MaybeNaN
    high: MaybeNaN
    n: int
    """Documents."""
    kind: Literal["rate", "mean"]
    values: tuple[float, ...]
    """A document's number each; empty where the score is not their mean."""


class CapabilityFound(Frozen):
    """Hold what the model can do before and after every intervention."""

    analysis: Literal["capability"] = "capability"
    version: str
    """Of the harness."""
    scores: tuple[TaskScore, ...]


Found = Annotated[SuffixesFound | AttributionFound | DirectionsFound | CapabilityFound, Field(discriminator="analysis")]


class Analyses(Artifact):
    """Hold what the analyses of a recipe found, in its order."""

    stage = "analyze"

    found: tuple[Found, ...]
