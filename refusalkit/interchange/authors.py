"""Read and write the layout of the paper's authors (andyrdt/refusal_direction).

`direction.pt` [d_model] and `generate_directions/mean_diffs.pt` [position, layer, d_model], both float64 and not
normalised; rows of the latter are the last positions of the prompt, the last row -1. `direction_metadata.json` says
which was chosen, `select_direction/direction_evaluations*.json` why; `authors_completions` has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit.artifacts import Candidates, Choice, ScoreRow
from refusalkit.errors import InputError
from refusalkit.interchange import torch_file
from refusalkit.interchange.authors_completions import read_completions, write_completions
from refusalkit.interchange.content import Content, Findings, Wanted, checked, ending, read_json, settled, unreadable
from refusalkit.store import whole_folder, write_json

DIRECTION, METADATA = "direction.pt", "direction_metadata.json"
MEAN_DIFFS = "generate_directions/mean_diffs.pt"
SCORES, SURVIVORS = (f"select_direction/direction_evaluations{part}.json" for part in ("", "_filtered"))
#: Their names of the scores, by ours.
NAMES = {"refusal_score": "refusal_score", "induced_score": "steering_score", "kl_nats": "kl_div_score"}
NAN = float("nan")


def recognises(path: Path) -> bool:
    """Tell a run's folder, or a file of torch that holds one tensor."""
    return (path / METADATA).is_file() or isinstance(torch_file.recognised(path), Tensor)


def read(path: Path, wanted: Wanted) -> Content:
    """Read a run's folder, `direction.pt`, or one of the directions in `mean_diffs.pt`."""
    if path.is_dir():
        return _read_folder(path, wanted)
    tensor: Tensor = torch_file.load(path)
    if tensor.ndim == 3:
        return Content(_one_of(tensor, wanted, path), wanted.layer, wanted.position)
    if tensor.ndim != 1:
        raise unreadable(path, f"a tensor of shape {list(tensor.shape)} is neither direction.pt nor mean_diffs.pt")
    return Content(checked(tensor, path), wanted.layer, wanted.position)


def _one_of(directions: Tensor, wanted: Wanted, path: Path) -> Tensor:
    """Return the direction at the position and layer that are wanted."""
    n_positions, n_layers, _ = directions.shape
    where = f"positions {-n_positions} to -1 and layers 0 to {n_layers - 1}"
    if wanted.layer is None or wanted.position is None:
        raise InputError(f"holds directions of {where}", where=str(path), hint="choose with --position and --layer")
    if not (-n_positions <= wanted.position <= -1 and 0 <= wanted.layer < n_layers):
        place = f"position {wanted.position}, layer {wanted.layer}"
        raise InputError(f"has no {place}, but {where}", where=str(path), hint="choose another --position or --layer")
    return checked(directions[wanted.position, wanted.layer], path)


def _read_folder(path: Path, wanted: Wanted) -> Content:
    chosen = read_json(path / METADATA, Mapping)
    try:
        layer, position = int(chosen["layer"]), int(chosen["pos"])
    except (KeyError, TypeError, ValueError):
        raise unreadable(path / METADATA, f"it is {chosen!r}, and not {{pos, layer}}") from None
    settled("layer", str(layer), wanted.layer, path)
    settled("position", str(position), wanted.position, path)
    direction = checked(torch_file.load(path / DIRECTION), path / DIRECTION)
    candidates = choice = None
    if (path / MEAN_DIFFS).is_file():
        diffs = torch_file.load(path / MEAN_DIFFS)
        if not isinstance(diffs, Tensor) or diffs.ndim != 3 or diffs.shape[-1] != len(direction):
            raise unreadable(path / MEAN_DIFFS, "it holds no directions [position, layer, d_model] of this length")
        candidates = Candidates(
            strategy="difference_in_means",
            site="resid_pre",
            positions=tuple(range(-len(diffs), 0)),
            directions=diffs.double(),
        )
    if (path / SCORES).is_file():
        choice = _choice(path, position, layer, direction)
    left = tuple(f"{name}/" for name in ("loss_evals",) if (path / name).is_dir())
    return Content(
        direction,
        layer,
        position,
        metadata={"strategy": "difference_in_means"},
        findings=Findings(candidates, choice, read_completions(path)),
        left_out=left,
    )


def _choice(path: Path, position: int, layer: int, direction: Tensor) -> Choice:
    """Return every candidate's scores and what became of it."""
    survivors = read_json(path / SURVIVORS, list) if (path / SURVIVORS).is_file() else []
    try:
        kept = {(row["position"], row["layer"]) for row in survivors}
        rows = tuple(
            ScoreRow(
                position=row["position"],
                layer=row["layer"],
                status=_status((row["position"], row["layer"]), (position, layer), kept),
                **{ours: _number(row[theirs]) for ours, theirs in NAMES.items()},
            )
            for row in read_json(path / SCORES, list)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path / SCORES, f"{type(error).__name__}: {error}") from None
    if all(row.status != "chosen" for row in rows):
        raise unreadable(path / SCORES, f"it has no position {position}, layer {layer}, which {METADATA} names")
    return Choice(
        selector="causal",
        position=position,
        layer=layer,
        direction=direction.double(),
        scores=rows,
        baseline_refusal_score=NAN,
        baseline_harmless_score=NAN,
    )


def _status(place: tuple[int, int], chosen: tuple[int, int], kept: set[tuple[int, int]]) -> str:
    if place == chosen:
        return "chosen"
    return "survivor" if place in kept else "fell to the authors' filters"


def _number(value: Any) -> float | None:
    """Return a score, None where it is missing or not a number."""
    return None if value is None or value != value else float(value)


# Writing


def write(content: Content, target: Path, _: object = None) -> tuple[str, ...]:
    """Write `direction.pt` alone, or a folder with everything that the source has of a run."""
    if content.site != "resid_pre":
        raise InputError(
            f"the direction was found at {content.site}, and the authors' are found at the input of blocks",
            where=str(target),
            hint="find a direction with `capture.site: resid_pre`",
        )
    direction = owned(content.added)
    if ending(target):
        torch_file.save(target, direction)
        return (f"the file holds the direction alone; who reads it has to know the layer ({content.layer})",)
    if content.layer is None or content.position is None:
        raise InputError(
            f"{METADATA} names a position and a layer, and the source does not",
            where=str(target),
            hint="give --position and --layer, or write the direction alone, as direction.pt",
        )
    found = content.findings or Findings()
    said: list[str] = []
    with whole_folder(target) as draft:
        for name in ("generate_directions", "select_direction"):
            (draft / name).mkdir()
        torch_file.save(draft / DIRECTION, direction)
        write_json(draft / METADATA, {"pos": content.position, "layer": content.layer})
        if found.candidates is not None:
            torch_file.save(draft / MEAN_DIFFS, _mean_diffs(found.candidates, target))
            if found.candidates.strategy != "difference_in_means":
                said.append(f"mean_diffs.pt holds what the strategy {found.candidates.strategy!r} found")
        if found.choice is not None:
            said += _write_scores(found.choice.scores, draft)
        said += write_completions(draft, found.completions)
    return tuple(said)


def owned(tensor: Tensor) -> Tensor:
    """Return a float64 copy with its own storage: of a view, torch would save the whole that it looks at."""
    return tensor.detach().to("cpu", torch.float64, copy=True, memory_format=torch.contiguous_format)


def _mean_diffs(candidates: Candidates, target: Path) -> Tensor:
    positions, directions = candidates.positions, candidates.directions
    if positions != tuple(range(-len(positions), 0)):
        raise InputError(
            f"mean_diffs.pt has a row for each of the last positions, and this run's are {positions}",
            where=str(target),
            hint="convert the run's direction.safetensors alone",
        )
    if directions.ndim != 3:
        raise InputError(
            f"mean_diffs.pt holds one direction a place, and this run found {directions.shape[2]}",
            where=str(target),
            hint="convert the run's direction.safetensors to a format that holds a subspace",
        )
    return owned(directions)


def _write_scores(scores: Sequence[ScoreRow], draft: Path) -> list[str]:
    def row(score: ScoreRow) -> dict[str, float | None]:
        values = {theirs: getattr(score, ours) for ours, theirs in NAMES.items()}
        return {"position": score.position, "layer": score.layer, **values}

    kept = [score for score in scores if score.status in ("chosen", "survivor")]
    write_json(draft / SCORES, [row(score) for score in scores])
    write_json(draft / SURVIVORS, [row(score) for score in sorted(kept, key=lambda score: score.refusal_score or 0.0)])
    missing = sum(None in row(score).values() for score in scores)
    return [f"{missing} of {len(scores)} candidates have scores that were not measured: null"] if missing else []
