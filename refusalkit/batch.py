"""Plan everything a command was given before any of it runs: several recipes, and the runs of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refusalkit.errors import InputError
from refusalkit.pipeline import check_folder
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe_file import Member
from refusalkit.registry import Registry
from refusalkit.sweep_folder import check_sweep_folder


@dataclass(frozen=True, eq=False)
class Planned:
    """Hold one run: what it is, its plan and its folder."""

    member: Member
    plan: Plan
    out: Path


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold what one recipe asks for: a run, or the runs of a sweep."""

    path: Path
    folder: Path
    """The run's folder, or the one that holds the folders of the sweep."""
    runs: tuple[Planned, ...]

    @property
    def is_sweep(self) -> bool:
        """Whether the recipe has a sweep."""
        return self.runs[0].member.run is not None


def plan_batch(path: Path, members: Sequence[Member], out: Path | None, registry: Registry) -> Batch:
    """Plan every run that the recipe at `path` asks for, in `out` or by default in `runs/NAME`.

    Raises `InputError` for a model, prompts or a folder that cannot be used.
    """
    first = members[0]
    folder = out if out is not None else Path("runs") / first.recipe.name.removesuffix(f"/{first.run}")
    runs = []
    for member in members:
        try:
            plan = make_plan(member.recipe, path.parent, registry)
        except InputError as error:
            error.where = ": ".join(filter(None, [str(path), member.run and f"in the run {member.run}", error.where]))
            raise
        runs.append(Planned(member, plan, folder / member.run if member.run else folder))
    return Batch(path, folder, tuple(_share_samples(runs)))


def _share_samples(runs: Sequence[Planned]) -> Iterator[Planned]:
    """Keep every prompt's activations where one of the runs that share a capture needs them: one pass serves all."""
    wanted = {run.plan.keys["capture"] for run in runs if run.plan.needs == "samples"}
    for run in runs:
        yield replace(run, plan=replace(run.plan, keeps_samples=run.plan.keys["capture"] in wanted))


def check_folders(batches: Sequence[Batch]) -> None:
    """Refuse folders that hold something else, and recipes that would write into each other's.

    Raises `InputError` before anything is written.
    """
    for number, batch in enumerate(batches):
        for other in batches[:number]:
            mine, theirs = batch.folder.resolve(), other.folder.resolve()
            if mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
                raise InputError(
                    f"its results would go to {batch.folder}, and those of {other.path} to {other.folder}",
                    where=str(batch.path),
                    hint="give the recipes different names",
                )
        if batch.is_sweep:
            check_sweep_folder(batch.folder)
        for run in batch.runs:
            check_folder(run.plan, run.out)
