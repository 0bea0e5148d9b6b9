"""Hold what every selector does with candidates: list them, drop those that cannot be chosen, ablate and steer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.intervention import Direction, Edit, Intervention
from refusalkit.selector import Score, SelectInputs

Fraction = Annotated[float, Field(ge=0, lt=1)]

NO_DIFFERENCE = "no direction was found here"
PRUNED = "in the last layers, which are pruned"
NOT_A_NUMBER = "a score is not a number"


@dataclass(frozen=True)
class Candidate:
    """Point at one candidate: its place in the tensor and the label of its position."""

    row: int
    layer: int
    position: int

    def __str__(self) -> str:
        return f"position {self.position}, layer {self.layer}"


def candidates_of(inputs: SelectInputs) -> list[Candidate]:
    """List the candidates in the authors' order: by position, then by layer."""
    return [
        Candidate(row, layer, position)
        for row, position in enumerate(inputs.positions)
        for layer in range(inputs.directions.shape[1])
    ]


def dropped(candidates: Sequence[Candidate], inputs: SelectInputs, prune_last: float) -> dict[Candidate, str]:
    """Return the candidates that cannot be chosen whatever they do, each with the reason."""
    first_pruned = int(inputs.directions.shape[1] * (1 - prune_last))
    fell = {}
    for candidate in candidates:
        direction = inputs.directions[candidate.row, candidate.layer]
        if not direction.isfinite().all():
            fell[candidate] = NOT_A_NUMBER
        elif not direction.any():
            fell[candidate] = NO_DIFFERENCE
        elif candidate.layer >= first_pruned:
            fell[candidate] = PRUNED
    return fell


def ablation(candidate: Candidate, inputs: SelectInputs) -> Intervention:
    """Remove a candidate at every read and write of every block."""
    vector = inputs.directions[candidate.row, candidate.layer].float()
    return ablate_everywhere(Direction(vector, candidate.position, candidate.layer, inputs.directions.shape[1]))


def steering(candidate: Candidate, inputs: SelectInputs) -> Intervention:
    """Add a candidate, of a subspace the first row, where it was found."""
    vector = inputs.directions[candidate.row, candidate.layer].float()
    return Intervention((Edit(inputs.site, candidate.layer, add=vector.reshape(-1, vector.shape[-1])[0]),))


def scores(
    candidates: Sequence[Candidate], fell: dict[Candidate, str], best: Candidate | None, known: dict[Candidate, Score]
) -> tuple[Score, ...]:
    """Return a row for every candidate: what is `known` of it, under the status it ends with."""
    rows = []
    for candidate in candidates:
        status = "chosen" if candidate == best else fell.get(candidate, "survivor")
        row = known.get(candidate)
        rows.append(
            Score(candidate.position, candidate.layer, None, None, None, status)
            if row is None
            else Score(
                row.position,
                row.layer,
                finite(row.refusal_score),
                finite(row.induced_score),
                finite(row.kl_nats),
                status,
                row.extra,
            )
        )
    return tuple(rows)


def finite(value: float | None) -> float | None:
    """Return a number that is one, or None."""
    return value if value is not None and abs(value) != float("inf") and value == value else None
