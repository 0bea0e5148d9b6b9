"""The first sentence of a report follows the numbers and nothing else."""

from __future__ import annotations

import math

import pytest

from refusalkit.artifacts import Choice, Evaluation
from refusalkit.report.finding import sentence
from tests.test_report import RATES, choice_of, evaluation_of, mean, rate


@pytest.fixture(scope="module")
def choice() -> Choice:
    return choice_of(6, (-2, -1))


def test_a_strong_effect_is_said_with_its_numbers(choice: Choice) -> None:
    said = sentence(choice, evaluation_of(RATES))
    where = f"layer {choice.layer}, position {choice.position}"
    assert said.startswith(f"One direction at {where} switches refusal off and on: removing it")
    assert "removing it takes refusal of held-out harmful requests from 98% [92, 100] to 3% [1, 11]" in said
    assert "adding it makes 97% [89, 99] of held-out harmless requests refused, up from 2% [0, 8]" in said
    assert "; a control direction of the same norm changes the first by 2 points and the second by 2 points." in said


def test_a_partial_effect_is_called_partial(choice: Choice) -> None:
    said = sentence(choice, evaluation_of({"none": (0.9, 0.0), "ablate": (0.5, 0.0), "steer": (0.9, 0.25)}))
    assert "changes refusal in part" in said
    assert "removing it lowers refusal of held-out harmful requests only in part, from 90%" in said
    assert "adding it raises refusal of held-out harmless requests only in part, from 0%" in said
    assert "random" not in said


def test_no_effect_is_said_plainly(choice: Choice) -> None:
    said = sentence(choice, evaluation_of({"none": (0.9, 0.02), "ablate": (0.88, 0.02), "steer": (0.9, 0.03)}))
    assert "has no measurable effect on refusal: removing it does not measurably change" in said
    assert "(90% [80, 95] before, 88% [78, 94] after)" in said


def test_one_strong_half_does_not_speak_for_the_other(choice: Choice) -> None:
    no_adding = sentence(choice, evaluation_of({"none": (0.98, 0.02), "ablate": (0.03, 0.0), "steer": (0.9, 0.03)}))
    assert "switches refusal off, but not on" in no_adding
    some_adding = sentence(choice, evaluation_of({"none": (0.98, 0.02), "ablate": (0.03, 0.0), "steer": (0.9, 0.3)}))
    assert "switches refusal off and, in part, on" in some_adding


def test_an_effect_the_wrong_way_round_is_not_praised(choice: Choice) -> None:
    said = sentence(choice, evaluation_of({"none": (0.3, 0.0), "ablate": (0.9, 0.0)}))
    assert "does not act as a refusal direction should: removing it raises refusal" in said


def test_a_random_direction_that_does_the_same_takes_the_credit_away(choice: Choice) -> None:
    said = sentence(choice, evaluation_of({"none": (0.98, 0.0), "ablate": (0.03, 0.0), "ablate_random": (0.1, 0.0)}))
    assert "changes refusal, but so does a control direction" in said
    assert "changes this by 88 points" in said


def test_a_control_that_breaks_the_model_is_named_and_takes_no_credit(choice: Choice) -> None:
    rates = evaluation_of({"none": (0.98, 0.0), "ablate": (0.03, 0.0), "ablate_shuffled": (0.1, 0.0)})
    costs = [mean("ablate", "harmless", "kl", 0.4), mean("ablate_shuffled", "harmless", "kl", 1.9)]
    said = sentence(choice, rates.model_copy(update={"results": (*rates.results, *costs)}))
    assert "switches refusal off" in said
    assert "ablate_shuffled takes it to 10% [5, 20] but breaks the model, at a KL of 1.90 nats" in said
    # Where the direction breaks as much, the control counts.
    costs[0] = mean("ablate", "harmless", "kl", 1.2)
    said = sentence(choice, rates.model_copy(update={"results": (*rates.results, *costs)}))
    assert "but so does a control direction" in said


def test_missing_interventions_are_named(choice: Choice) -> None:
    only_adding = sentence(choice, evaluation_of({"none": (0.98, 0.02), "steer(scale=2.0)": (1.0, 0.97)}))
    assert "switches refusal on: adding it 2 times makes 97%" in only_adding
    assert only_adding.endswith("Removing it was not measured in this run.")
    weights = sentence(choice, evaluation_of({"none": (0.98, 0.02), "orthogonalize": (0.03, 0.0)}))
    assert "removing it from the weights takes" in weights
    subtracted = sentence(choice, evaluation_of({"none": (0.98, 0.02), "steer(scale=-1.0)": (0.03, 0.0)}))
    assert "subtracting it takes" in subtracted
    part = {"ablate(where=generated)": (0.9, 0.0), "ablate": (0.03, 0.0), "steer(where=last)": (1.0, 0.1)}
    whole = sentence(choice, evaluation_of({"none": (0.98, 0.02), **part, "steer": (1.0, 0.97)}))
    assert "switches refusal off and on" in whole, "the plain forms are spoken of, not those kept to some tokens"
    assert "did not measure" in sentence(choice, evaluation_of({"none": (0.98, 0.02)}))
    assert "did not measure" in sentence(choice, Evaluation(results=(), generated=(), separation=()))


def test_without_a_rate_the_sentence_rests_on_the_refusal_score() -> None:
    rows = [mean("none", "harmful", "refusal_score", 6.0), mean("ablate", "harmful", "refusal_score", -7.0)]
    said = sentence(choice_of(6, (-1,), rank=3), Evaluation(results=tuple(rows), generated=(), separation=()))
    assert said.startswith("One subspace of 3 directions")
    assert "takes the mean refusal score of held-out harmful requests from 6.00 [5.40, 6.60]" in said
    assert "to −7.00 [−7.70, −6.30] nats" in said


def test_not_a_number_counts_as_not_measured(choice: Choice) -> None:
    nan = rate("ablate", "harmful", 0.5).model_copy(update={"value": math.nan, "low": math.nan, "high": math.nan})
    said = sentence(choice, Evaluation(results=(rate("none", "harmful", 0.9), nan), generated=(), separation=()))
    assert "did not measure" in said


def test_a_repair_behind_a_gate_is_spoken_of_before_one_without(choice: Choice) -> None:
    gated = "conditional{}(apply=affine, when=over_refusal, false_positives=0.01)"
    rates = {
        "none": (0.98, 0.6),
        "affine": (0.5, 0.1),
        gated.format(""): (0.97, 0.2),
        gated.format("_random"): (1, 0.6),
    }
    rows = [
        rate(name, side, value)
        for name, both in rates.items()
        for side, value in zip(("harmful", "over_refusal"), both, strict=True)
    ]
    everything = Evaluation(results=tuple(rows), generated=(), separation=())
    said = sentence(choice, everything, repairs=True)
    assert "repairs over-refusal in part: putting it at the harmless mean where a gate opens lowers" in said
    assert "from 60% [48, 71] to 20% [12, 31]; refusal of held-out harmful requests stays from 98% [91, 100]" in said
    ungated = Evaluation(
        results=tuple(row for row in rows if "conditional" not in row.intervention), generated=(), separation=()
    )
    assert "lowers over-refusal, and true refusals with it" in sentence(choice, ungated, repairs=True)
    # What the gate keeps from harmful prompts says nothing of what removing it does to them.
    assert "from 98% [91, 100] to 50%" in sentence(choice, everything)
