"""Append suffixes to harmful prompts, and see what becomes of the direction and of refusal."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from refusalkit.analysis import Suffixes
from refusalkit.artifacts import Result, SuffixesFound, SuffixGroup
from refusalkit.builtin.metrics import RefusalScore
from refusalkit.engine.request import Completions, Cosines, Reading, Readings, Request
from refusalkit.errors import RunError
from refusalkit.intervals import bootstrap
from refusalkit.intervention import NOTHING
from refusalkit.metric import Evidence, Metric, Side
from refusalkit.stages.evaluate import summarise
from refusalkit.stages.findings import Findings
from refusalkit.template import ChatTemplate

#: An instruction to which suffixes are appended to count their tokens.
_PROBE = "Name a colour"
#: How many tokens are tried for each one of a random suffix.
_TRIES = 200


@dataclass(frozen=True, eq=False)
class Appended:
    """Hold a group of prompts, and what was appended to them."""

    label: str
    side: Side
    prompts: tuple[str, ...]
    suffix: str | None = None
    """The suffix by name; None for prompts as they are."""
    random: bool = False
    text: str = ""
    """What was appended, to the first prompt where each has its own."""


def append(prompt: str, suffix: str) -> str:
    """Put a suffix behind an instruction."""
    return f"{prompt} {suffix}"


def appended(suffixes: Mapping[str, str], seed: int, harmful: Sequence[str], template: ChatTemplate) -> list[Appended]:
    """Append every suffix, and random ones of as many tokens, to harmful prompts."""
    groups = []
    for number, (name, text) in enumerate(suffixes.items()):
        prompts = tuple(append(prompt, text) for prompt in harmful)
        groups.append(Appended(f"harmful + {name}", "harmful", prompts, name, text=text))
        draws = random.Random(f"{seed}/{number}")
        others = [random_suffix(template, n_tokens(template, text), draws) for _ in harmful]
        prompts = tuple(append(prompt, other) for prompt, other in zip(harmful, others, strict=True))
        groups.append(Appended(f"harmful + random like {name}", "harmful", prompts, name, random=True, text=others[0]))
    return groups


def n_tokens(template: ChatTemplate, suffix: str) -> int:
    """Return how many tokens a suffix adds to a prompt."""
    return len(template.tokens(append(_PROBE, suffix))) - len(template.tokens(_PROBE))


def random_suffix(template: ChatTemplate, length: int, draws: random.Random) -> str:
    """Draw a suffix of exactly `length` tokens from those of the tokenizer that are text, not signs to the model.

    Raises `RunError` where no text of that length is found.
    """
    tokenizer = template.tokenizer
    signs = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    words: list[str] = []
    for _ in range(_TRIES * length):
        if len(words) == length:
            break
        token = draws.randrange(len(tokenizer))
        word = tokenizer.decode([token]).strip()
        if token in signs or not word or "\N{REPLACEMENT CHARACTER}" in word or not word.isprintable():
            continue
        # A word that is cut in two behind the others, or grows into one with them, is put back.
        if n_tokens(template, " ".join([*words, word])) == len(words) + 1:
            words.append(word)
    if len(words) < length:
        raise RunError(
            f"no random text of {length} tokens is found in this tokenizer",
            where="analyze: suffixes",
            hint="use a shorter suffix",
        )
    return " ".join(words)


def study_suffixes(analysis: Suffixes, findings: Findings) -> SuffixesFound:
    """Read every group along the direction, and measure whether the unmodified model refuses it."""
    bench, splits = findings.bench, findings.splits
    harmful, harmless = (splits.of(side, "test") for side in ("harmful", "harmless"))
    groups = [
        Appended("harmful", "harmful", harmful),
        Appended("harmless", "harmless", harmless),
        *appended(analysis.append, analysis.seed, harmful, bench.template),
    ]
    position = findings.position(analysis.position)
    parts = [part for metric in findings.section.metrics for part in metric.parts]
    rates = [part for part in parts if (part.kind, part.needs) == ("rate", "completions")]
    requests: dict[tuple[str, str], Request] = {}
    for group in groups:
        tokens = bench.tokens(group.prompts)
        site = findings.activations.site
        requests[group.label, "cosines"] = Cosines(tokens, findings.direction, position, site)
        requests[group.label, "readings"] = Readings(tokens, [NOTHING], splits.openers.token_ids)
        if rates and (group.suffix is not None or group.side not in findings.unmodified.completions):
            openings = bench.openings(group.prompts)
            requests[group.label, "completions"] = Completions(openings, NOTHING, findings.section.max_new_tokens)
    found = bench.engine.run(list(requests.values()), bench.advance("suffixes"))
    answers = dict(zip(requests, found, strict=True))
    made = []
    for group in groups:
        written = answers.get((group.label, "completions"), findings.unmodified.completions.get(group.side, ()))
        (reading,) = answers[group.label, "readings"]
        results = _results(group, reading, written, [*rates, RefusalScore()], findings)
        made.append(_group(group, answers[group.label, "cosines"], results, findings.section.seed))
    return SuffixesFound(position=position, groups=tuple(made))


def _results(
    group: Appended,
    reading: Reading,
    completions: Sequence[tuple[int, ...]],
    metrics: Sequence[Metric],
    findings: Findings,
) -> list[Result]:
    template = findings.bench.template
    answers = [template.answer(ids) or () for ids in completions]
    evidence = Evidence(
        group.side,
        group.prompts,
        findings.splits.openers.token_ids,
        completions=tuple(template.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers),
        completion_ids=tuple(answers),
        refusal_scores=reading.refusal_scores,
        kl_nats=reading.kl_nats,
    )
    wanted = [metric for metric in metrics if group.side in metric.sides]
    return [summarise(metric, "none", evidence, findings.section.seed) for metric in wanted]


def _group(group: Appended, cosines: Tensor, results: Sequence[Result], seed: int) -> SuffixGroup:
    """Reduce cosines [prompt, layer] to means over prompts with their intervals."""
    intervals = [bootstrap(layer.tolist(), seed=seed) for layer in cosines.unbind(1)]
    return SuffixGroup(
        label=group.label,
        suffix=group.suffix,
        random=group.random,
        text=group.text,
        n=len(cosines),
        mean=tuple(interval.value for interval in intervals),
        low=tuple(interval.low for interval in intervals),
        high=tuple(interval.high for interval in intervals),
        results=tuple(results),
    )
