"""Say why a number may differ from the published one: what is known beforehand, and what this run did differently."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.reproduction.published import Published
from refusalkit.reproduction.quantity import MEASURED
from refusalkit.run_directory import Run


@dataclass(frozen=True)
class Reason:
    """Explain differences of some quantities, for some of the models or for all."""

    text: str
    whats: Collection[str]
    models: Collection[str] | None = None


_SCORES = ("refusal_score", "induced_score", "kl_nats", "baseline_refusal_score", "baseline_harmless_score")
_CHOICE = ("position", "layer", "n_survivors")

KNOWN = (
    Reason(
        "The artefacts in the authors' repository are not those behind the paper: bypass scores lie 0.02 to 0.64 "
        "apart, losses on own completions 0.01 to 0.22. The authors do not say why.",
        (*_SCORES[:3], "cross_entropy"),
    ),
    Reason(
        "The authors project in the dtype of the weights, refusalkit in float32; GPUs and versions of torch round "
        "16-bit sums differently.",
        (*_SCORES, *_CHOICE, "norm", "refusal_rate", "cross_entropy"),
    ),
    Reason(
        "The filter keeps prompts by the sign of their refusal score, so that one near 0 may fall on either side. "
        "The authors do not say how many were kept.",
        (*_SCORES, *_CHOICE, "norm"),
    ),
    Reason("A candidate near KL 0.1 or induced score 0 may fall on either side of the filters.", _CHOICE),
    Reason("The authors name no revision of the checkpoint.", tuple(MEASURED)),
    Reason(
        "Position -6 is the last token of the instruction: the authors count one template token too many. The recipe "
        "reads it too; `post_instruction` does not.",
        ("n_candidates", "n_survivors"),
        ("llama-2-7b-chat",),
    ),
    Reason(
        "The authors use the slow tokenizer; transformers 5 loads the fast one.",
        tuple(MEASURED),
        ("llama-2-7b-chat", "yi-6b-chat"),
    ),
    Reason(
        "One JailbreakBench request differs only in case from a training prompt; it is left out, so that harmful "
        "rates are over 99 prompts.",
        ("refusal_rate",),
    ),
    Reason(
        "In the artefacts 95 of 100 harmful and 62 of 100 harmless completions run on past the end of the turn; here "
        "they stop.",
        ("refusal_rate", "cross_entropy"),
        ("llama-3-8b-instruct",),
    ),
    Reason(
        "The authors tokenise the completion's text again; refusalkit scores the tokens as they were generated.",
        ("cross_entropy",),
    ),
)


def reasons(published: Published) -> tuple[Reason, ...]:
    """Return what is known beforehand of one published run."""
    return tuple(reason for reason in KNOWN if reason.models is None or published.name in reason.models)


#: Keys of a recipe that say where things lie and not what is done.
_PLACES = {"name", "description", "model.id", "model.revision", "model.adapter", "model.device", "model.batch_size"}


def departures(published: Published, run: Run, registry: Registry) -> tuple[Reason, ...]:
    """Return a reason a key in which the run's recipe is not the one that repeats the published run."""
    asked = dict(_flat(load_recipe(published.recipe, registry).model_dump(mode="json", serialize_as_any=True)))
    done = dict(_flat(run.recipe))
    return tuple(
        Reason(f"This run has `{key}: {done.get(key)}`; the published one has `{asked.get(key)}`.", tuple(MEASURED))
        for key in dict.fromkeys([*asked, *done])
        if key not in _PLACES and _comparable(asked.get(key)) != _comparable(done.get(key))
    )


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _comparable(value: Any) -> Any:
    """Drop the folder from an address of the authors' prompts: their hashes say that they are the same."""
    if isinstance(value, str) and value.startswith("arditi:"):
        return "arditi:" + value.rpartition("#")[2]
    return value
