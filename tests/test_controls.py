"""Every effect stands beside directions that should do nothing, and they do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refusalkit.artifacts import Activations
from refusalkit.intervention import Direction
from refusalkit.plan import Plan
from refusalkit.run_directory import Run, read_run
from refusalkit.stages.cases import all_cases
from refusalkit.store import Store


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Run:
    """Read the finished run."""
    return read_run(finished_run)


def test_shuffled_labels_find_less_than_labels_do(finished_run: Path, run: Run) -> None:
    found = Store(finished_run).load(Activations)
    assert found is not None
    assert found.shuffled is not None
    real = (found.harmful_mean - found.harmless_mean).norm(dim=-1)
    chance = found.shuffled.norm(dim=-1)
    place = found.positions.index(run.choice.position), run.choice.layer
    assert 0 < chance[place] < 0.5 * real[place]


def test_controls_do_not_do_what_the_direction_does(run: Run) -> None:
    rates = {(row.intervention, row.prompts): row for row in run.evaluation.results if row.metric == "refusal_rate"}
    for side, label in (("harmful", "ablate"), ("harmless", "steer")):
        before, after = rates["none", side], rates[label, side]
        assert abs(after.value - before.value) > 0.5
        for control in (f"{label}_random", f"{label}_shuffled"):
            assert rates[control, side].low <= before.value <= rates[control, side].high


@pytest.mark.parametrize(
    ("vector", "labels"),
    [
        (torch.arange(16.0), ["none", "ablate", "ablate_random", "ablate_random_2", "ablate_shuffled"]),
        (torch.eye(16)[:3], ["none", "ablate", "ablate_random", "ablate_random_2"]),
    ],
    ids=["a direction", "a subspace"],
)
def test_controls_are_as_long_as_the_direction_and_lie_elsewhere(
    plan_of: Callable[..., Plan], vector: torch.Tensor, labels: list[str]
) -> None:
    section = plan_of("evaluate.interventions=[ablate]", "evaluate.controls=2").recipe.evaluate
    adding = plan_of("evaluate.interventions=[steer]", "evaluate.controls=2").recipe.evaluate
    direction = Direction(vector, -1, 1, 4)
    shuffled = torch.ones(16)
    assert [case.label for case in all_cases(section, direction, shuffled)] == labels
    if vector.dim() == 1:
        added = [case.intervention.edits[0].add for case in all_cases(adding, direction, shuffled)[1:]]
        assert all(each is not None for each in added)
        lengths = torch.stack([each.norm() for each in added if each is not None])
        torch.testing.assert_close(lengths, lengths[:1].expand(len(lengths)))
        assert len({tuple(each.tolist()) for each in added if each is not None}) == len(added)


def test_without_controls_there_is_no_shuffled_one_either(plan_of: Callable[..., Plan]) -> None:
    section = plan_of("evaluate.interventions=[ablate]", "evaluate.controls=0").recipe.evaluate
    cases = all_cases(section, Direction(torch.ones(16), -1, 1, 4), torch.arange(16.0))
    assert [case.label for case in cases] == ["none", "ablate"]
