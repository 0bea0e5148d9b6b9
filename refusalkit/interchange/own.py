"""Read and write our own files: `direction.safetensors`, and the plain files of a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

import refusalkit
from refusalkit.artifacts import AS_FOUND, LAYER_CONVENTION, Result
from refusalkit.builtin.metrics import RefusalRate
from refusalkit.errors import InputError
from refusalkit.interchange.content import (
    Completions,
    Content,
    Findings,
    Wanted,
    checked,
    ending,
    no_layer,
    pick,
    unreadable,
    with_known,
)
from refusalkit.intervals import wilson
from refusalkit.metric import Evidence, Side
from refusalkit.pipeline import summary, write_candidates, write_choice
from refusalkit.recipe import ModelSection
from refusalkit.run_directory import Run, read_run
from refusalkit.store import whole_folder, write_json, write_tensors

#: What the authors call counting refusal substrings.
SUBSTRINGS = "substring_matching"


def recognises(path: Path) -> bool:
    """Tell a run's folder or a safetensors file."""
    return (path / "recipe.yaml").is_file() or (path.is_file() and path.suffix == ".safetensors")


def read(path: Path, wanted: Wanted) -> Content:
    """Read a finished run's folder, `direction.safetensors`, or one of the directions in `candidates.safetensors`."""
    if path.is_file():
        return _read_file(path, wanted)
    run = read_run(path)
    content = _read_file(path / "direction.safetensors", wanted)
    model = ModelSection.model_validate(run.recipe["model"])
    return replace(content, model=model, findings=Findings(run.candidates, run.choice, _completions(run)))


def _read_file(path: Path, wanted: Wanted) -> Content:
    tensors, metadata = read_safetensors(path)
    if set(tensors) == {"directions"}:
        position, vectors = _at_position(tensors["directions"], metadata.get("positions", ""), wanted, path)
        layer, vector, others = pick(dict(enumerate(vectors)), wanted, path)
        content = Content(checked(vector, path), layer, left_out=others)
        return with_known(content, {**metadata, "layer": str(layer), "position": str(position)}, wanted, path)
    if set(tensors) != {"direction"}:
        found = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise unreadable(path, f"it holds {found}, and not the tensor `direction` alone")
    vector = checked(tensors["direction"], path)
    return with_known(Content(vector, None), metadata, wanted, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file; raises `InputError` when it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(path, str(error)) from None


def _at_position(directions: Tensor, listed: str, wanted: Wanted, path: Path) -> tuple[int, Tensor]:
    """Return the position that is wanted and its directions [layer, ...]."""
    positions = [int(part) for part in listed.split(",") if part.lstrip("-").isdigit()]
    if len(positions) != len(directions):
        raise unreadable(path, f"it names {len(positions)} positions for {len(directions)} rows of directions")
    if wanted.position not in positions:
        seen = "holds directions of" if wanted.position is None else f"has no position {wanted.position}, but"
        raise InputError(f"{seen} positions {listed}", where=str(path), hint="choose one with --position and --layer")
    return wanted.position, directions[positions.index(wanted.position)]


def _completions(run: Run) -> tuple[Completions, ...]:
    found = []
    for made in run.evaluation.generated:
        prompts = run.prompts.of(made.prompts, "test")
        successes = {SUBSTRINGS: judged_by_substrings(made.prompts, prompts, made.texts)}
        found.append(Completions(made.prompts, made.intervention, prompts, made.texts, successes))
    return tuple(found)


def judged_by_substrings(side: Side, prompts: Sequence[str], texts: Sequence[str]) -> tuple[float, ...]:
    """Return 1 for each completion without one of the paper's refusal substrings, as the authors count success."""
    refused = RefusalRate().measure(Evidence(side, tuple(prompts), (), tuple(texts)))
    return tuple(1 - value for value in refused.values)


# Writing


def write(content: Content, target: Path, _: object = None) -> tuple[str, ...]:
    """Write `direction.safetensors`, or a folder with everything that the source has of a run."""
    if content.layer is None:
        raise no_layer(str(target))
    if ending(target):
        _write_file(content, target)
        return ()
    with whole_folder(target) as draft:
        _write_file(content, draft / "direction.safetensors")
        found = content.findings or Findings()
        if found.candidates is not None:
            positions = ",".join(map(str, found.candidates.positions))
            write_candidates(draft, found.candidates, {**_metadata(content, "find"), "positions": positions})
        if found.choice is not None:
            choice = found.choice.model_copy(update={"direction": content.added.double()})
            write_choice(draft, choice, _metadata(content, "select"))
            model = {"id": content.metadata.get("model"), "adapter": None}
            write_json(draft / "summary.json", summary(target.name, model, found.choice, results(found.completions)))
    return (
        ("the rates of its completions are in summary.json, their texts are not copied",) if found.completions else ()
    )


def _write_file(content: Content, path: Path) -> None:
    metadata = {**_metadata(content, "select"), "layer": str(content.layer)}
    if content.position is not None:
        metadata["position"] = str(content.position)
    write_tensors(path, {"direction": content.added.double()}, metadata)


def _metadata(content: Content, stage: Literal["find", "select"]) -> dict[str, str]:
    """Return what stands beside the tensors of a run, as far as it is known."""
    ours = {
        "made_by": f"refusalkit {refusalkit.__version__}",
        "stage": stage,
        "site": content.site,
        "layer_convention": LAYER_CONVENTION,
        "operation": AS_FOUND,
    }
    return {**content.metadata, **ours}


def results(completions: Sequence[Completions]) -> list[Result]:
    """Return the rates with their intervals: refusals by substrings, successes by other judges.

    Completions of several data sets under one intervention count together.
    """
    pooled: dict[tuple[str, Side, str], list[float]] = {}
    for made in completions:
        for judge, values in made.successes.items():
            pooled.setdefault((made.intervention, made.side, judge), []).extend(values)
    found = []
    for (intervention, side, judge), successes in pooled.items():
        by_us = judge == SUBSTRINGS
        interval = wilson([1 - value for value in successes] if by_us else successes)
        found.append(
            Result(
                intervention=intervention,
                prompts=side,
                metric="refusal_rate" if by_us else f"{judge}_success_rate",
                value=interval.value,
                low=interval.low,
                high=interval.high,
                n=interval.n,
                unit="fraction of prompts",
                kind="rate",
            )
        )
    return found
