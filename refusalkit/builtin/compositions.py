"""Make interventions of interventions: one that waits for a gate, and several in a stated order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from refusalkit.builtin.estimators import Lda
from refusalkit.builtin.interventions import Steer
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import (
    SITES,
    ActivationSpec,
    Direction,
    Edit,
    Gate,
    Intervention,
    InterventionSpec,
    Ordinal,
)

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit.metric import Side


_FOLDS = 5
#: The prompts that a gate opens for, and those that it is to stay shut for.
_SIDES: dict[str, tuple[Side, Side]] = {
    "harmful": ("harmful", "harmless"),
    "harmless": ("harmless", "harmful"),
    "over_refusal": ("over_refusal", "harmful"),
}


class Conditional(InterventionSpec):
    """Apply another intervention only to prompts that a gate lets through (conditional steering, CAST, 2409.05907).

    The gate reads one component of the hidden state once, in the prompt, at the position the direction was found at:
    the one along which linear discriminant analysis tells training prompts apart there. What it decides holds for the
    whole completion. Every prompt of a batch is decided by itself, and those that are turned away run bit for bit as in
    the unmodified model.
    """

    intervention: Literal["conditional"] = "conditional"
    apply: InterventionSpec = Steer()
    """What to do where the gate opens: another intervention on activations."""
    when: Literal["harmful", "harmless", "over_refusal"] = "harmful"
    """The prompts that it opens for: harmful ones rather than harmless ones, or the other way round, or over-refusal
    ones rather than harmful ones."""
    threshold: float = 0.5
    """Where the gate stands: 0 is the mean of training prompts that it stays shut for, 1 that of those it opens for."""
    false_positives: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In place of `threshold`: the share of training prompts that the gate may open for by mistake, each read by a
    probe that was made without it and a fifth of the others. It stands above the readings of all others."""
    layer: Ordinal | None = None
    """The layer in which the gate is read; null is the one the direction was found in."""

    @model_validator(mode="after")
    def _has_one_threshold(self) -> Conditional:
        if self.false_positives is not None and "threshold" in self.model_fields_set:
            raise ValueError("`threshold` and `false_positives` both say where the gate stands: keep one of them")
        return self

    @model_validator(mode="after")
    def _can_wait(self) -> Conditional:
        _check_part(self.apply)
        if self.apply.gated:
            raise ValueError(f"two gates: {self.apply.label} has one already, so take that")
        for spec in (self.apply, *self.apply.nested):
            first = spec.starts if isinstance(spec, ActivationSpec) and _reaches_prompt(spec.tokens) else None
            if first is not None and first < (1 if self.layer is None else self.layer):
                where = "the direction's layer" if self.layer is None else f"layer {self.layer}"
                raise ValueError(
                    f"{spec.label} acts from layer {first} on, before the gate is read in {where}: give it later "
                    "`layers`, or `where: generated`"
                )
        return self

    @property
    def gated(self) -> bool:
        return True

    @property
    def sides(self) -> frozenset[Side]:
        return super().sides | self.learns_from - {"harmful", "harmless"}

    @property
    def learns_from(self) -> frozenset[Side]:
        return super().learns_from | set(_SIDES[self.when])

    def check(self, n_layers: int) -> None:
        super().check(n_layers)
        if self.layer is not None and self.layer >= n_layers:
            raise InputError(
                f"layer {self.layer} of {n_layers}", where=_where(self), hint=f"`layer` from 0 to {n_layers - 1}"
            )

    def build(self, direction: Direction) -> Intervention:
        self.check(direction.n_layers)
        gate = self._gate(direction)
        made = self.apply.build(direction)
        early = [edit for edit in made.edits if _reaches_prompt(edit.tokens) and _place(edit) < _place(gate)]
        if early:
            raise InputError(
                f"{self.apply.label} acts in layer {early[0].layer}, before the gate is read in layer {gate.layer}",
                where=_where(self),
                hint=f"give it `layers: [{gate.layer}, {direction.n_layers - 1}]` or `where: generated`",
            )
        return Intervention(tuple(replace(edit, gated=True) for edit in made.edits), gate=gate)

    def _gate(self, direction: Direction) -> Gate:
        assert direction.states is not None
        place = replace(direction.place, layer=direction.layer if self.layer is None else self.layer)
        toward, away = (direction.states(side, "train", place) for side in _SIDES[self.when])
        probe = _probe(toward, away)
        if not probe.along.any():
            raise RunError(
                f"{' and '.join(_SIDES[self.when])} training prompts do not differ at position {place.position}, layer "
                f"{place.layer}, so there is nothing to read",
                where=_where(self),
                hint="read the gate in a later `layer`: layer 0 sees the template's token alone",
            )
        at = self.threshold
        if self.false_positives is not None:
            readings = _held_out(toward, away).sort(descending=True).values
            # A hair above, so that rounding does not open the gate for the first one that it must turn away.
            at = readings[int(self.false_positives * len(readings))].item() + 1e-4
        return Gate(place.site, place.layer, place.position, probe.along, probe.low + at * (probe.high - probe.low))


@dataclass(frozen=True, eq=False)
class _Probe:
    """Hold what a gate reads along, and where the two sides that it was made from lie there on average."""

    along: Tensor
    """A unit vector [d_model] float64, or zero where the sides do not differ."""
    low: float
    high: float

    def read(self, states: Tensor) -> Tensor:
        """Return where states [prompt, d_model] lie, 0 at `low` and 1 at `high`: [prompt]."""
        return (states @ self.along - self.low) / (self.high - self.low)


def _probe(toward: Tensor, away: Tensor) -> _Probe:
    """Tell samples [prompt, d_model] of two sides apart by linear discriminant analysis."""
    from refusalkit import algebra

    along = algebra.unit(Lda().fit(toward, away))
    return _Probe(along, float(away.mean(0) @ along), float(toward.mean(0) @ along))


def _held_out(toward: Tensor, away: Tensor) -> Tensor:
    """Read each prompt of `away` with a probe that was made without it and others, a fifth of them."""
    import torch

    fold = torch.arange(len(away)) % _FOLDS
    readings = away.new_empty(len(away))
    for out in range(_FOLDS):
        readings[fold == out] = _probe(toward, away[fold != out]).read(away[fold == out])
    return readings


class Combine(InterventionSpec):
    """Apply several interventions on activations; where they meet, in the order in which they are listed."""

    intervention: Literal["combine"] = "combine"
    parts: Annotated[tuple[InterventionSpec, ...], Field(min_length=2, examples=[["ablate", "steer"]])]
    """What to combine, first to last; at most one of them `conditional`."""

    @model_validator(mode="after")
    def _fit_together(self) -> Combine:
        for number, part in enumerate(self.parts):
            _check_part(part)
            if isinstance(part, Combine):
                raise ValueError("holds a combination: write all parts in one list")
            if part in self.parts[:number]:
                raise ValueError(f"lists {part.label} twice: keep one of them")
        gated = [part.label for part in self.parts if part.gated]
        if len(gated) > 1:
            raise ValueError(f"two gates: {gated[0]} and {gated[1]}; put what they share in one, as a combination")
        return self

    def build(self, direction: Direction) -> Intervention:
        self.check(direction.n_layers)
        made = [part.build(direction) for part in self.parts]
        gate = next((each.gate for each in made if each.gate is not None), None)
        if gate is not None:
            self._check_gate(gate, made)
        for number, part in enumerate(made):
            after = [edit for later in made[number + 1 :] for edit in later.edits]
            if all(any(_overwrites(later, edit) for later in after) for edit in part.edits):
                raise InputError(
                    f"{self.parts[number].label} does nothing: what follows overwrites it wherever it acts",
                    where=_where(self),
                    hint="put it after the others, give it other `layers`, or leave it out",
                )
        return Intervention(tuple(edit for each in made for edit in each.edits), gate=gate)

    def _check_gate(self, gate: Gate, made: Sequence[Intervention]) -> None:
        for part, each in zip(self.parts, made, strict=True):
            for edit in each.edits:
                if not edit.gated and _reaches_prompt(edit.tokens) and _place(edit) < _place(gate):
                    raise InputError(
                        f"{part.label} changes in layer {edit.layer} what the gate reads in layer {gate.layer}",
                        where=_where(self),
                        hint=f"let it act from layer {gate.layer} on (`layers`), or `where: generated`",
                    )


def _check_part(part: InterventionSpec) -> None:
    if part.on_weights:
        raise ValueError(f"{part.label} edits the weights: list it by itself")
    if not part.uses_direction:
        raise ValueError(f"{part.label} does nothing here: leave it out")


def _where(spec: InterventionSpec) -> str:
    return f"evaluate.interventions: {spec.label}"


def _reaches_prompt(tokens: tuple[int | None, int | None]) -> bool:
    return tokens[0] is None or tokens[0] <= 0


def _place(at: Edit | Gate) -> tuple[int, int]:
    return at.layer, SITES.index(at.site)


def _overwrites(later: Edit, edit: Edit) -> bool:
    """Say whether nothing of `edit` is left once `later` has acted at the same place."""
    if _place(later) != _place(edit) or later.remove is None or later.along is not None:
        return False
    if later.gated and not edit.gated:
        return False
    (first, last), (start, stop) = later.tokens, edit.tokens
    if not (first is None or (start is not None and first <= start)):
        return False
    if not (last is None or (stop is not None and last >= stop)):
        return False
    basis = later.remove.double()
    touched = [part.double() for part in (edit.remove, edit.add, edit.turn) if part is not None]
    return all((part - part @ basis.T @ basis).norm() <= 1e-4 * part.norm() for part in touched)


COMPOSITIONS = (Conditional, Combine)
