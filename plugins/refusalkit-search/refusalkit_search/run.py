"""Run a search: the recipe as it is, the search, random search, and then what was chosen on test prompts.

Trials stand in `trials/` as the runs of a sweep do and share their stages; they know validation prompts only. What is
chosen of them stands in `test/`, as runs with a report each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from refusalkit.artifacts import Evaluation
from refusalkit.errors import InputError, Interrupted, RefusalkitError, RunError
from refusalkit.pipeline import execute
from refusalkit.progress import Progress, Silent
from refusalkit.run_directory import Run, mapping_in, read_run
from refusalkit.sharing import Models, Sharing, hold
from refusalkit.store import Store, cannot_write, write_json, write_text
from refusalkit_search.choice import best, front
from refusalkit_search.outcome import Found, document
from refusalkit_search.page import write_page
from refusalkit_search.setup import Setup
from refusalkit_search.study import Attempt, Budget, Kind, Trial, open_journal, open_study, spend, trials

FILE = "search.yaml"
#: Keys of `model` that decide no number, so that a search may go on elsewhere.
_ANYWHERE = {"device", "batch_size"}


@dataclass(frozen=True, eq=False)
class Bench:
    """Hold what the trials of a search share."""

    setup: Setup
    folder: Path
    models: Models = field(default_factory=Models)

    def measure(self, run: str, values: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the objectives of one trial.

        Raises `InputError` where the values do not fit together, `RunError` where the trial comes to nothing.
        """
        plan, shared = self.setup.trial(run, values), self.folder / "trials"
        execute(plan, shared / run, Silent(), "evaluate", Sharing(shared, self.models))
        evaluation = Store(shared / run).load(Evaluation)
        assert evaluation is not None
        return self.setup.values(run, values, evaluation)

    def attempt(self, run: str, values: Mapping[str, Any]) -> Attempt:
        """Say what comes of some values. What would stop every other trial too, such as a full disk, is raised."""
        try:
            return Attempt("measured", self.measure(run, values))
        except InputError as error:
            return Attempt("impossible", reason=_first_line(error))
        except RunError as error:
            if error.where is not None and error.where.startswith(str(self.folder)):
                raise
            return Attempt("failed", reason=_first_line(error))

    def test(self, run: str, values: Mapping[str, Any]) -> Run:
        """Run what was chosen on test prompts, with everything that the recipe measures."""
        plan, shared = self.setup.test(run, values), self.folder / "test"
        shared.mkdir(exist_ok=True)
        execute(plan, shared / run, Silent(), "report", Sharing(shared, self.models))
        return read_run(shared / run)


def run_search(setup: Setup, folder: Path, budget: Budget, progress: Progress) -> Found:
    """Run or go on with the search in `folder` and write `search.html` and `search.json`.

    Raises `InputError` when the folder holds something else, `RunError` when the search cannot mean anything.
    """
    _check_folder(folder)
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    with hold(folder):
        _claim(setup, folder, budget)
        bench = Bench(setup, folder)
        found = _tried(bench, budget, progress)
        progress.stage("test", "running")
        # A recipe that came to nothing on validation prompts has chosen no direction to test.
        named = [(run, trial) for run, trial in found.compared() if trial.measured is not None]
        for number, (run, trial) in enumerate(named):
            progress.advance("runs", number, len(named))
            found.tests[run] = bench.test(run, trial.values)
        progress.stage("test", "done")
        write_json(folder / "search.json", document(found))
        write_page(found, folder)
    return found


def _tried(bench: Bench, budget: Budget, progress: Progress) -> Found:
    """Make every trial, and choose among them."""
    space = bench.setup.space
    progress.stage("fixed", "running")
    fixed = _fixed(bench)
    progress.stage("fixed", "done")
    journal, own = open_journal(bench.folder / "journal.log"), bench.setup.own()
    made: dict[Kind, list[Trial]] = {"search": [], "random": []}
    for kind in made:
        study = open_study(journal, kind, space, own)
        progress.stage(kind, "running")
        try:
            spend(study, space, budget, bench.attempt, lambda done, total: progress.advance("trials", done, total))
        except Interrupted:
            done = len(trials(study, space))
            raise Interrupted(
                f"{done} of {budget.trials} trials of {kind} are kept, and the same command goes on from there"
            ) from None
        made[kind] = trials(study, space)
        progress.stage(kind, "done")
    measured = [trial for kind in made for trial in made[kind] if trial.measured is not None]
    if not measured:
        reasons = [trial.reason for kind in made for trial in made[kind]]
        raise RunError(f"no trial could be measured; the first: {reasons[0]}", where=str(bench.folder))
    return Found(
        bench.setup,
        budget,
        fixed,
        tuple(made["search"]),
        tuple(made["random"]),
        best(made["search"], space.objectives),
        best(made["random"], space.objectives),
        front(made["search"], space.objectives),
    )


def _fixed(bench: Bench) -> Trial:
    """Measure the recipe as it is. It may come to nothing where others do not, once its prompts are settled."""
    try:
        return Trial("fixed", {}, bench.measure("fixed", {}))
    except RunError as error:
        if Store(bench.folder / "trials" / "fixed").key("prompts") is None:
            raise
        return Trial("fixed", {}, None, _first_line(error))


def _first_line(error: RefusalkitError) -> str:
    return str(error).partition("\n")[0]


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which something else stands already."""
    if folder.exists() and not folder.is_dir():
        raise InputError("this is a file, not a folder", where=f"--out {folder}", hint="name a folder")
    taken = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    if taken and not (folder / FILE).is_file():
        raise InputError(
            "the folder is not empty and holds no search", where=f"--out {folder}", hint="name a new or empty folder"
        )


def _claim(setup: Setup, folder: Path, budget: Budget) -> None:
    """Write down whose folder it is; raises `InputError` where another search stands in it."""
    recipe = setup.recipe("search", {}).model_dump(mode="json", serialize_as_any=True)
    recipe["model"] = {key: value for key, value in recipe["model"].items() if key not in _ANYWHERE}
    content = {"recipe": recipe, **setup.space.model_dump(mode="json"), "seed": budget.seed}
    if (folder / FILE).is_file():
        before = mapping_in(folder / FILE)
        differing = [key for key in content if before.get(key) != content[key]]
        if differing:
            raise InputError(
                f"the folder holds another search: its {differing[0]} differs",
                where=f"--out {folder}",
                hint="choose another folder with --out, or delete this one",
            )
        return
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    write_text(folder / FILE, "# What is searched. The number of trials is no part of it: it can be raised.\n" + text)
