"""Gather where the numbers come from: model, prompts, template, openers, versions, seeds, times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusalkit.artifacts import PromptSplits
from refusalkit.metric import Side
from refusalkit.report.wording import NOTHING_TO_SHOW, bytes_of, duration, number, token
from refusalkit.run_directory import Run
from refusalkit.store import STAGES

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class SplitRow:
    """Say how many prompts of one side and split were used, and what the filter dropped."""

    side: Side
    split: str
    used: int
    dropped: str
    mean_score: str


@dataclass(frozen=True)
class StageRow:
    """Say what one stage cost."""

    stage: str
    seconds: str
    passes: str
    jobs: str = ""
    """What it took on a server; empty for a run on one machine."""


@dataclass(frozen=True)
class Provenance:
    """Hold what the last section of the page shows."""

    model: Pairs
    prompts: list[SplitRow]
    duplicates: int
    template: Pairs
    openers: Pairs
    versions: Pairs
    seeds: Pairs
    stages: list[StageRow]


def provenance(run: Run) -> Provenance:
    """Gather the provenance of a run."""
    return Provenance(
        model=_model(run),
        prompts=_splits(run.prompts),
        duplicates=run.prompts.duplicates_dropped,
        template=_template(run.prompts),
        openers=_openers(run.prompts),
        versions=_versions(run.environment),
        seeds=[(key, str(value)) for key, value in _seeds(run.recipe)],
        stages=_stages(run.environment),
    )


def _model(run: Run) -> Pairs:
    model: Mapping[str, Any] = run.environment.get("model") or {}
    pairs = [
        ("model", _text(model.get("id"))),
        ("revision", _text(model.get("revision"))),
        ("architecture", _text(model.get("architecture"))),
        ("adapter", f"{_text(model.get('adapter'))}, from {_text(model.get('adapter_owner'))}"),
    ]
    sizes = [f"{key} {model[key]:,}" for key in ("n_layers", "d_model", "d_vocab", "n_parameters") if model.get(key)]
    pairs.append(("size", ", ".join(sizes) or NOTHING_TO_SHOW))
    pairs.append(("device", f"{_text(run.environment.get('device'))}, {_text(run.environment.get('dtype'))}"))
    return pairs


def _splits(prompts: PromptSplits) -> list[SplitRow]:
    filtered = {(row.side, row.split): row for row in prompts.filtered}
    rows = []
    for side, splits in prompts.sides.items():
        for split, used in splits.items():
            told = filtered.get((side, split))
            dropped = "not filtered" if told is None else f"{told.of - told.kept} of {told.of}"
            rows.append(SplitRow(side, split, len(used), dropped, number(told.mean_score if told else None)))
    return rows


def _template(prompts: PromptSplits) -> Pairs:
    template = prompts.template
    return [
        ("before the instruction", repr(template.prefix)),
        ("after the instruction", repr(template.suffix)),
        ("suffix tokens", "  ".join(map(token, template.suffix_tokens)) or NOTHING_TO_SHOW),
        ("hash", template.hash),
    ]


def _openers(prompts: PromptSplits) -> Pairs:
    openers = prompts.openers
    source = {"recipe": "named in the recipe", "family": "the model family's own", "found": "found on the prompts"}
    return [
        ("texts", "  ".join(repr(text) for text in openers.texts)),
        ("token ids", ", ".join(map(str, openers.token_ids))),
        ("source", source[openers.source]),
        ("why these", openers.reason),
    ]


def _versions(environment: Mapping[str, Any]) -> Pairs:
    pairs = [(name, _text(environment.get(name))) for name in ("refusalkit", "python")]
    pairs += [(name, _text(version)) for name, version in (environment.get("packages") or {}).items()]
    pairs += [
        (f"plugin {_text(plugin.get('name'))}", _text(plugin.get("version")))
        for plugin in environment.get("plugins") or ()
    ]
    return [*pairs, ("platform", _text(environment.get("platform"))), ("started", _text(environment.get("started")))]


def _stages(environment: Mapping[str, Any]) -> list[StageRow]:
    seconds: Mapping[str, Any] = environment.get("seconds") or {}
    passes: Mapping[str, Any] = environment.get("forward_passes") or {}
    names = [stage for stage in STAGES if stage in seconds or stage in passes]
    names += [stage for stage in dict.fromkeys((*seconds, *passes)) if stage not in names]
    jobs: Mapping[str, Mapping[str, int]] = environment.get("jobs") or {}
    rows = [
        StageRow(name, duration(seconds.get(name)), _passes(passes.get(name)), _jobs([jobs.get(name, {})]))
        for name in names
    ]
    if len(rows) > 1:
        together = duration(sum(seconds.values())), _passes(sum(passes.values()) or None), _jobs([*jobs.values()])
        rows.append(StageRow("together", *together))
    return rows


def _jobs(counts: Sequence[Mapping[str, int]]) -> str:
    total = {name: sum(count.get(name, 0) for count in counts) for name in ("jobs", "bytes_up", "bytes_down")}
    if not total["jobs"]:
        return ""
    return f"{total['jobs']}, {bytes_of(total['bytes_up'])} up, {bytes_of(total['bytes_down'])} down"


def _passes(n: int | None) -> str:
    return NOTHING_TO_SHOW if n is None else f"{n:,}"


def _seeds(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Find every seed in the recipe, with its key path."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "seed" or str(key).endswith("_seed"):
                yield here, value
            else:
                yield from _seeds(value, here)
    elif isinstance(section, list):
        for index, value in enumerate(section):
            yield from _seeds(value, f"{path}[{index}]")


def _text(value: Any) -> str:
    return NOTHING_TO_SHOW if value is None else str(value)
