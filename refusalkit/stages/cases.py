"""List what an evaluation compares: the unmodified model, the interventions, and the controls of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import Activations, Choice, PromptSplits
from refusalkit.intervention import NOTHING, Direction, Intervention, InterventionSpec
from refusalkit.recipe import EvaluateSection
from refusalkit.stages.bench import Bench
from refusalkit.stages.states import states_at


@dataclass(frozen=True, eq=False)
class Case:
    """Hold one thing to compare: an intervention with the label it has in tables."""

    label: str
    intervention: Intervention
    acts: bool
    """Whether it is meant to change anything."""


def chosen_direction(activations: Activations, choice: Choice, splits: PromptSplits, bench: Bench) -> Direction:
    """Return the direction of a run, with the means at its position and what reads prompts there."""
    row = activations.positions.index(choice.position)
    return Direction(
        choice.direction.float(),
        choice.position,
        choice.layer,
        activations.harmless_mean.shape[1],
        activations.site,
        activations.harmless_mean[row].float(),
        activations.harmful_mean[row].float(),
        states=states_at(splits, bench),
    )


def all_cases(section: EvaluateSection, direction: Direction, shuffled: Tensor | None) -> list[Case]:
    """List the unmodified model, then each intervention followed by its controls.

    `shuffled` [d_model] is what a shuffled labelling finds at the place of `direction`; None where that is not known.
    """
    controls = list(_controls(section, direction, shuffled))
    cases = [Case("none", NOTHING, acts=False)]
    for spec in section.interventions:
        if not spec.uses_direction:
            continue
        cases.append(Case(spec.label, spec.build(direction), acts=True))
        # The control of a weight edit would be that of the same ablation in the activations.
        if not spec.on_weights:
            cases += [Case(_label(spec, suffix), spec.build(control), acts=False) for suffix, control in controls]
    return cases


def _controls(
    section: EvaluateSection, direction: Direction, shuffled: Tensor | None
) -> Iterator[tuple[str, Direction]]:
    """Yield what stands in for the direction, each as long."""
    vector = direction.vector
    for number in range(section.controls):
        draw = torch.randn(vector.shape, generator=torch.Generator().manual_seed(section.seed + number))
        yield f"random_{number + 1}" if number else "random", _as_long(draw, direction)
    # It is one direction: a subspace has random ones of its own rank alone.
    if section.controls and shuffled is not None and vector.dim() == 1 and shuffled.any():
        yield "shuffled", _as_long(shuffled, direction)


def _as_long(vector: Tensor, direction: Direction) -> Direction:
    scaled = algebra.unit(vector) * direction.vector.norm(dim=-1, keepdim=True)
    return replace(direction, vector=scaled)


def _label(spec: InterventionSpec, suffix: str) -> str:
    name, parenthesis, options = spec.label.partition("(")
    return f"{name}_{suffix}{parenthesis}{options}"
