"""Compare finished runs: what each found, what its interventions do, and whether the differences can be chance.

Two runs are compared prompt by prompt where their test prompts are the same. The first run is the one that all others
are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusalkit.artifacts import Result
from refusalkit.errors import InputError
from refusalkit.metric import SIDES, Side
from refusalkit.report.changes import Change, change, corrected, from_unmodified
from refusalkit.report.measured import BASELINE, find, interventions, is_control
from refusalkit.report.wording import count
from refusalkit.run_directory import Run, missing_in, read_run
from refusalkit.sweep_folder import is_sweep_folder, runs_in


@dataclass(frozen=True, eq=False)
class Entry:
    """Hold one run under the name it has in the comparison."""

    label: str
    run: Run

    def result(self, intervention: str, side: Side, metric: str) -> Result | None:
        """Return one result, or None where it was not measured."""
        return find(self.run.evaluation.results, intervention, side, metric)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Hold everything that the table and the page say."""

    name: str
    entries: tuple[Entry, ...]
    unmodified: tuple[tuple[str, Entry], ...]
    """The unmodified models, each with a run that measured it."""
    from_unmodified: tuple[Change, ...]
    from_first: tuple[Change, ...]
    notes: tuple[str, ...]
    """What was not compared, and why."""

    @property
    def results(self) -> list[Result]:
        """Every result of every run."""
        return [result for entry in self.entries for result in entry.run.evaluation.results]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every intervention of any run, without the unmodified model and the controls."""
        named = dict.fromkeys(label for entry in self.entries for label in interventions(entry.run.evaluation))
        return tuple(label for label in named if label != BASELINE and not is_control(label))

    def marks(self, run: str, result: Result) -> str:
        """Return `*` where a result differs from the unmodified model and `+` where it differs from the first run."""
        return "".join(
            mark
            for mark, changes in (("*", self.from_unmodified), ("+", self.from_first))
            for found in changes
            if found.marked and found.run == run and found.second is result
        )


def compare(folders: Sequence[Path]) -> Comparison:
    """Read and compare the runs in `folders`; the folder of a sweep stands for all of its runs that are finished.

    Raises `InputError` where there are not two finished runs.
    """
    chosen: dict[Path, Path] = {}
    unfinished = []
    for folder in folders:
        for run in runs_in(folder) if is_sweep_folder(folder) else [folder]:
            if run != folder and missing_in(run):
                unfinished.append(f"{run.name} is not finished and left out.")
            else:
                chosen[run.resolve()] = run
    if len(chosen) < 2:
        raise InputError(
            f"{count(len(chosen), 'finished run')} to compare",
            where=", ".join(map(str, folders)),
            hint="name two runs or more, or the folder of a sweep",
        )
    runs = [read_run(folder) for folder in chosen.values()]
    entries = tuple(Entry(label, run) for label, run in zip(_labels(runs), runs, strict=True))
    return Comparison(
        folders[0].resolve().name if len(folders) == 1 else "comparison",
        entries,
        tuple(_unmodified(entries)),
        corrected(found for entry in entries for found in from_unmodified(entry.label, entry.run.evaluation)),
        corrected(found for entry in entries[1:] for found in _from_first(entries[0], entry)),
        (*unfinished, *_notes(entries)),
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their recipes, without the sweep they share; by their folders where that is not enough."""
    names = [str(run.recipe.get("name") or run.folder.name) for run in runs]
    sweeps = {name.rpartition("/")[0] for name in names}
    if len(sweeps) == 1:
        names = [name.rpartition("/")[2] for name in names]
    if len(set(names)) < len(names):
        names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _unmodified(entries: Sequence[Entry]) -> Iterator[tuple[str, Entry]]:
    """Take one run for each unmodified model, and more where it was measured on other prompts or in another way."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        model, evaluate = (entry.run.recipe.get(key) or {} for key in ("model", "evaluate"))
        asked = [model.get("revision"), model.get("dtype"), evaluate.get("metrics"), evaluate.get("max_new_tokens")]
        tests = [entry.run.prompts.of(side, "test") for side in SIDES]
        seen.setdefault(json.dumps([_model(entry.run), asked, tests]), entry)
    models = [_model(entry.run) for entry in seen.values()]
    for model, entry in zip(models, seen.values(), strict=True):
        yield (f"{model}, as in {entry.label}" if models.count(model) > 1 else model), entry


def _model(run: Run) -> str:
    return str((run.environment.get("model") or {}).get("id") or (run.recipe.get("model") or {}).get("id") or "model")


def _from_first(reference: Entry, entry: Entry) -> Iterator[Change]:
    for second in entry.run.evaluation.results:
        first = reference.result(second.intervention, second.prompts, second.metric)
        if second.intervention == BASELINE or is_control(second.intervention) or first is None:
            continue
        if _same_prompts(reference.run, entry.run, second.prompts):
            yield from change(entry.label, first, second)


def _same_prompts(one: Run, other: Run, side: Side) -> bool:
    return one.prompts.of(side, "test") == other.prompts.of(side, "test")


def _notes(entries: Sequence[Entry]) -> Iterator[str]:
    first = entries[0]
    for entry in entries[1:]:
        sides: list[Side] = [row.prompts for row in entry.run.evaluation.results]
        other = [side for side in dict.fromkeys(sides) if not _same_prompts(first.run, entry.run, side)]
        if other:
            yield f"{entry.label} has other {' and '.join(other)} test prompts than {first.label}: no paired test."
        here, there = set(interventions(entry.run.evaluation)), set(interventions(first.run.evaluation))
        alone = [label for label in interventions(entry.run.evaluation) if label in here - there]
        if alone := [label for label in alone if not is_control(label)]:
            yield f"{first.label} has no {', '.join(alone)} to compare that of {entry.label} with."
    for entry in entries:
        if any(row.n and not row.values for row in entry.run.evaluation.results):
            yield f"{entry.label} is from a version that kept no value a prompt: no paired test. Run its recipe again."


def differing(entries: Sequence[Entry]) -> list[tuple[str, tuple[str, ...]]]:
    """Return every key in which the recipes differ, with its value in each; a dash where a recipe has no such key."""
    flat = [dict(_flat(entry.run.recipe)) for entry in entries]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, tuple(values.get(key, "–") for values in flat)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key not in ("name", "description")]


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return " ".join(_shown(part) for part in value.values())
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def alignment(first: Run, other: Run) -> float | None:
    """Return the cosine of `other`'s direction with what `first` found at the same place.

    For a subspace it is the share of the first direction's length that lies in it. None where the runs are of different
    models, or `first` has no direction there.
    """
    from refusalkit import algebra

    place, found = other.choice, first.candidates
    same = (_model(first), first.candidates.site) == (_model(other), other.candidates.site)
    if not same or place.position not in found.positions or place.layer >= found.directions.shape[1]:
        return None
    theirs = found.directions[found.positions.index(place.position), place.layer]
    theirs = algebra.unit(theirs.reshape(-1, theirs.shape[-1])[0])
    if not theirs.any():
        return None
    ours = place.direction
    if ours.dim() == 1:
        return float(algebra.unit(ours) @ theirs)
    return float((algebra.orthonormal(ours) @ theirs).norm())
