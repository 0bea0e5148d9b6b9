"""Convert a direction from one format to another, or say why the other cannot hold it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from refusalkit.checkpoint import Checkpoint, open_checkpoint
from refusalkit.errors import InputError
from refusalkit.interchange.content import Content, Operation, Trait, Wanted, ending
from refusalkit.interchange.formats import FORMATS, Format, goal, recognise
from refusalkit.recipe import ModelSection
from refusalkit.registry import Registry


@dataclass(frozen=True)
class Converted:
    """Say what was written and what became of the rest."""

    source: Format
    target: Format
    said: tuple[str, ...]
    """What there is to know of the file."""
    lost: tuple[str, ...]
    """What the source holds and the target does not."""

    def __str__(self) -> str:
        lines = [f"{self.source.name} -> {self.target.name}", *self.said]
        return "\n".join([*lines, *(f"not in {self.target.name}: {what}" for what in self.lost)])


def convert(source: Path, target: Path, to: str | None, wanted: Wanted, registry: Registry) -> Converted:
    """Write what `source` says of a direction to `target`, in the format `to` or the one `target` ends like.

    Raises `InputError` when either cannot be used, or when the format cannot say what the source says.
    """
    _check_free(target)
    read, written = recognise(source), goal(target, to)
    if read is written and source.is_dir() and not ending(target):
        raise InputError(f"is {written.name} already", where=str(source), hint="copy the folder")
    content = read.read(source, wanted)
    _check_rank(content, written, target)
    content = _settled(content, written, wanted, target)
    checkpoint = _model(content, written, wanted, registry, target)
    said: tuple[str, ...] = ()
    if checkpoint is not None:
        _check_fits(content, checkpoint, source)
        said = _other_type(content, checkpoint)
        content = _named(content, checkpoint, by_user=wanted.model is not None)
    said += written.write(content, target, checkpoint)
    return Converted(read, written, said, content.left_out + _lost(content, written, target))


def _check_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError("is there already", where=str(target), hint="name a new file or folder")
    if not target.absolute().parent.is_dir():
        raise InputError("lies in a folder that is not there", where=str(target), hint=f"make {target.parent} first")


def _named(content: Content, checkpoint: Checkpoint, by_user: bool) -> Content:
    """Note the model: the user's word, or where the direction was found, even if the model has changed since."""
    model_type = str(checkpoint.config.model_type)
    named = {"model": checkpoint.section.id, "model_revision": checkpoint.revision}
    if by_user:
        return replace(content, model_type=model_type, metadata={**content.metadata, **named})
    return replace(content, model_type=content.model_type or model_type, metadata={**named, **content.metadata})


def _other_type(content: Content, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Say so where the source names another type of model; spellings differ too much to refuse it."""
    ours, theirs = str(checkpoint.config.model_type), content.model_type
    same = theirs is None or theirs == ours
    return () if same else (f"the source says that it is for {theirs!r}, and {checkpoint.section.id} is {ours!r}",)


def _check_rank(content: Content, written: Format, target: Path) -> None:
    rank = len(content.rows)
    if rank > 1 and not written.subspaces:
        able = ", ".join(kind.name for kind in FORMATS if kind.subspaces)
        raise InputError(
            f"the source holds a subspace of rank {rank}, and {written.name} holds one direction",
            where=str(target),
            hint=f"formats that hold a subspace: {able}",
        )


def _settled(content: Content, written: Format, wanted: Wanted, target: Path) -> Content:
    """Settle what is done with the direction: the user's word, the source's, or all that the format can say."""
    asked = wanted.operation or content.operation
    if asked is None and len(written.says) > 1:
        raise InputError(
            f"{written.name} can say {' or '.join(written.says)}, and the source leaves it open",
            where=str(target),
            hint=f"choose with --as {' or --as '.join(written.says)}",
        )
    if asked is not None and written.says and asked not in written.says:
        raise InputError(
            f"{written.name} cannot say {asked!r}: its files {_DONE[written.says[0]]}",
            where=str(target),
            hint=f"formats that can: {', '.join(kind.name for kind in FORMATS if asked in kind.says)}",
        )
    operation = asked or next(iter(written.says), None)
    if wanted.scale is not None and operation != "steer":
        raise InputError(
            "what is not added has no scale", where="--scale", hint="leave it out, or choose to add with --as steer"
        )
    scale = content.scale if wanted.scale is None else wanted.scale
    return replace(content, operation=operation, scale=scale)


_DONE: dict[Operation, str] = {"steer": "add a direction", "ablate": "remove a direction"}


def _model(content: Content, written: Format, wanted: Wanted, registry: Registry, target: Path) -> Checkpoint | None:
    """Open the model's configuration where it is named by the user or the format needs it."""
    missing = written.needs == "model" or (written.needs == "model_type" and content.model_type is None)
    if wanted.model is None and not missing:
        return None
    name = wanted.model or content.metadata.get("model")
    if name is None:
        raise InputError(
            f"{written.name} needs to know the model, and the source does not name it",
            where=str(target),
            hint="give --model: a hub name, a folder or an embedded model",
        )
    if content.model is not None and wanted.model is None:
        return open_checkpoint(content.model, registry)
    # A revision that was recorded is a commit of the hub, or a hash of a folder's files.
    recorded = content.metadata.get("model_revision", "")
    commit = recorded if wanted.model is None and len(recorded) == 40 else None
    return open_checkpoint(ModelSection(id=name, revision=commit), registry)


def _check_fits(content: Content, checkpoint: Checkpoint, source: Path) -> None:
    """Refuse a model that the direction cannot be of."""
    width, name = content.rows.shape[-1], checkpoint.section.id
    if width != checkpoint.d_model:
        raise InputError(
            f"its direction has {width} numbers, and {name} is {checkpoint.d_model} wide",
            where=str(source),
            hint="name the model that it was found in with --model",
        )
    if content.layer is not None and not 0 <= content.layer < checkpoint.n_layers:
        raise InputError(
            f"its direction is of layer {content.layer}, the input of that block, and {name} has "
            f"{checkpoint.n_layers} blocks",
            where=str(source),
            hint="choose another direction with --layer, or name the model with --model",
        )


def _lost(content: Content, written: Format, target: Path) -> tuple[str, ...]:
    """Say in words what of `content` the format does not keep."""
    added, origin = content.added, [key for key in ("model", "template_hash", "strategy") if key in content.metadata]
    held: dict[Trait, str] = {}
    if not torch.equal(added.float().double(), added.double()):
        held["digits"] = "digits beyond float32"
    if len(content.rows) > 1:
        held["length"] = "the lengths of the rows"
    if content.operation is not None and not written.says:
        held["operation"] = f"that it is meant to {content.operation}"
    if content.layer is not None and content.operation != "steer":
        held["layer"] = f"layer {content.layer}"
    if content.position is not None:
        held["position"] = f"position {content.position}"
    if origin:
        held["provenance"] = f"where it comes from ({', '.join(origin)})"
    if content.findings is not None:
        held["run"] = "candidates, scores and completions"
    # One file has no room for a run, whatever its format.
    keeps = written.keeps - {"run"} if ending(target) else written.keeps
    return tuple(what for trait, what in held.items() if trait not in keeps)
