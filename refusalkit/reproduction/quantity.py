"""Say how each published quantity is read out of a run, and how far it may lie from the published number.

What counts as `close` is documented: `SPREAD` is the largest difference between the authors' own artefacts and their
own paper over their five published runs (`tests/test_reproduce.py` computes it again); rates differ by sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from refusalkit.reproduction.published import Published, Quantity
from refusalkit.run_directory import Run

#: Returns the run's value, or None where it has none.
Read = Callable[[Run, Published, Quantity], float | None]


@dataclass(frozen=True)
class Known:
    """Describe a quantity that a run measures."""

    label: str
    read: Read
    decimals: int
    """Digits shown; numbers that agree in all of them are equal."""


def _choice(what: str) -> Read:
    def read(run: Run, published: Published, row: Quantity) -> float | None:
        return float(getattr(run.choice, what))

    return read


def _score(what: str) -> Read:
    """Read a score of the candidate the authors chose, whichever this run chose."""

    def read(run: Run, published: Published, row: Quantity) -> float | None:
        place = (published.number("position"), published.number("layer"))
        found = [score for score in run.choice.scores if (score.position, score.layer) == place]
        value = getattr(found[0], what) if found else None
        return None if value is None else float(value)

    return read


def _norm(run: Run, published: Published, row: Quantity) -> float | None:
    position, layer = published.number("position"), published.number("layer")
    if position not in run.candidates.positions or layer is None:
        return None
    direction = run.candidates.directions[run.candidates.positions.index(int(position)), int(layer)]
    return float(direction.norm())


def _result(run: Run, published: Published, row: Quantity) -> float | None:
    for result in run.evaluation.results:
        if (result.metric, result.prompts, result.intervention) == (row.what, row.side, row.under):
            return None if math.isnan(result.value) else result.value
    return None


def _n_candidates(run: Run, published: Published, row: Quantity) -> float | None:
    return float(len(run.choice.scores))


MEASURED = {
    "position": Known("position of the choice", _choice("position"), 0),
    "layer": Known("layer of the choice", _choice("layer"), 0),
    "n_candidates": Known("candidates", _n_candidates, 0),
    "n_survivors": Known("survivors of the filters", _choice("n_survivors"), 0),
    "refusal_score": Known("bypass score of the authors' choice", _score("refusal_score"), 3),
    "induced_score": Known("induced score of the authors' choice", _score("induced_score"), 3),
    "kl_nats": Known("KL of the authors' choice", _score("kl_nats"), 3),
    "norm": Known("norm of the direction there", _norm, 2),
    "baseline_refusal_score": Known("refusal score, harmful validation", _choice("baseline_refusal_score"), 3),
    "baseline_harmless_score": Known("refusal score, harmless validation", _choice("baseline_harmless_score"), 3),
    "refusal_rate": Known("refusal rate", _result, 2),
    "cross_entropy": Known("loss on own completions", _result, 3),
}

#: What the paper reports and refusalkit does not measure.
ELSEWHERE = {
    "pile_loss": "loss on The Pile",
    "alpaca_loss": "loss on Alpaca",
    "safety_score": "safety score (Llama Guard 2)",
    "harmbench_default_system": "HarmBench success %, default system prompt",
    "harmbench_no_system": "HarmBench success %, no system prompt",
    "mmlu": "MMLU %",
    "tinyhellaswag": "tinyHellaSwag %",
    "arc": "ARC %",
    "winogrande": "WinoGrande %",
    "gsm8k": "GSM8K %",
    "truthfulqa": "TruthfulQA %",
}

SPREAD = {"refusal_score": 0.65, "induced_score": 0.33, "kl_nats": 0.012, "cross_entropy": 0.22}
#: A mean refusal score moves as the bypass score does, which is one under an ablation.
_LIKE = {"baseline_refusal_score": "refusal_score", "baseline_harmless_score": "refusal_score"}
#: The authors measured every rate on this many prompts.
_RATED = 100


def allowance(row: Quantity, ours: float) -> float:
    """Return how far `ours` may lie from the authors' value and still be close; 0 where only equal will do."""
    if row.what == "refusal_rate":
        # Two standard errors of the difference between two rates.
        variances = [p * (1 - p) / _RATED for p in (ours, row.authors or 0.0)]
        return 2 * math.sqrt(sum(variances))
    return SPREAD.get(_LIKE.get(row.what, row.what), 0.0)
