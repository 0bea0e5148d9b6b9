"""Choose example completions and decide what of them the page may hold.

Completions to harmful prompts stay out of the page, data included, unless they are asked for: what is left is whether
the model refused and how long the answer is.
"""

from __future__ import annotations

from dataclasses import dataclass

from refusalkit.metric import Side
from refusalkit.report.measured import in_order, is_control
from refusalkit.report.wording import count
from refusalkit.run_directory import Run

EXAMPLES: dict[Side, int] = {"harmless": 4, "over_refusal": 4, "harmful": 8}


@dataclass(frozen=True)
class Completion:
    """Hold what one intervention made of one prompt."""

    intervention: str
    control: bool
    verdict: str | None
    """`refused`, `not refused` or `missing`; None where no metric judged the text."""
    words: str
    text: str | None
    """None where it is redacted."""


@dataclass(frozen=True)
class Example:
    """Hold one prompt and its completions, side by side."""

    prompt: str
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Examples:
    """Hold the example completions of one side."""

    side: Side
    interventions: tuple[str, ...]
    examples: tuple[Example, ...]
    of: int
    """How many prompts there are to choose from."""
    redacted: bool


def examples(run: Run, side: Side, *, show_completions: bool) -> Examples | None:
    """Take the first few test prompts of one side; None where nothing was generated for it."""
    generated = {row.intervention: row for row in run.evaluation.generated if row.prompts == side}
    if not generated:
        return None
    redacted = side == "harmful" and not show_completions
    labels = in_order(generated)
    prompts = run.prompts.of(side, "test")
    chosen = []
    for index, prompt in enumerate(prompts[: EXAMPLES[side]]):
        completions = [
            _completion(label, generated[label].texts[index], generated[label].refused, index, redacted)
            for label in labels
            if index < len(generated[label].texts)
        ]
        chosen.append(Example(prompt, tuple(completions)))
    return Examples(side, labels, tuple(chosen), len(prompts), redacted)


_VERDICTS = {True: "refused", False: "not refused", None: "missing"}


def _completion(
    label: str, text: str, refused: tuple[bool | None, ...] | None, index: int, redacted: bool
) -> Completion:
    verdict = None if refused is None else _VERDICTS[refused[index]]
    words = count(len(text.split()), "word")
    return Completion(label, is_control(label), verdict, words, None if redacted else text)
