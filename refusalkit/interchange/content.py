"""Hold what a file says of a direction, in our conventions whatever its own are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from refusalkit.artifacts import Candidates, Choice
from refusalkit.errors import InputError
from refusalkit.intervention import SITES, Site
from refusalkit.metric import Side
from refusalkit.recipe import ModelSection

Operation = Literal["ablate", "steer"]
#: What a file may keep: the digits beyond float32, the lengths of a subspace's rows, what is done with the direction,
#: where it was found, in which model and how, and what was found beside it.
Trait = Literal["digits", "length", "operation", "layer", "position", "provenance", "run"]

T = TypeVar("T")

COUNTED = "--layer counts as recipes do: layer l is the block whose input it is, and the output of block l - 1"


@dataclass(frozen=True)
class Wanted:
    """Hold what the user says where files do not."""

    layer: int | None = None
    position: int | None = None
    model: str | None = None
    """A hub name, a folder or an embedded model."""
    operation: Operation | None = None
    scale: float | None = None
    """Multiples of the direction to add."""


@dataclass(frozen=True)
class Completions:
    """Hold the completions of one side's test prompts under one intervention."""

    side: Side
    intervention: str
    """The label of tables: `none`, `ablate`, `steer(scale=-1.0)`."""
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    successes: Mapping[str, tuple[float, ...]]
    """By judge: 1 for each completion that it calls a jailbreak, else 0."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Hold what a run found beside the direction, as far as the source has it."""

    candidates: Candidates | None = None
    choice: Choice | None = None
    completions: tuple[Completions, ...] = ()


@dataclass(frozen=True, eq=False)
class Content:
    """Hold a direction, what is done with it and where it comes from, as far as the source says."""

    vector: Tensor
    """[d_model], or [rank, d_model] for a subspace; not normalised where the source keeps lengths."""
    layer: int | None
    """The layer where the direction was found and is added; None where the source does not say."""
    position: int | None = None
    site: Site = "resid_pre"
    operation: Operation | None = None
    """What the source does with the direction; None leaves it open."""
    scale: float = 1.0
    """Multiples of the direction to add."""
    model_type: str | None = None
    """`config.model_type` of the model."""
    model: ModelSection | None = None
    """The model as a run's recipe names it."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What else is known, under the keys of our safetensors files: `model`, `model_revision`, `strategy` and others."""
    findings: Findings | None = None
    left_out: tuple[str, ...] = ()
    """What the source holds and this does not, in words."""

    @property
    def rows(self) -> Tensor:
        """The direction as rows [rank, d_model]."""
        return self.vector.reshape(-1, self.vector.shape[-1])

    @property
    def added(self) -> Tensor:
        """What is added when steering: [d_model]."""
        return self.vector * self.scale

    @property
    def known(self) -> dict[str, str]:
        """What a file with room for texts keeps beside the direction."""
        place = {"layer": self.layer, "position": self.position, "site": self.site}
        return {**self.metadata, **{key: str(value) for key, value in place.items() if value is not None}}

    @property
    def known_of_unit(self) -> dict[str, str]:
        """The same for a file whose directions have length one, and the length that is lost by that."""
        rows = self.rows
        return {**self.known, "norm": repr(rows[0].norm().item())} if len(rows) == 1 else self.known

    def block(self, where: str) -> int:
        """Return the block at whose output the direction is added: `resid_pre[l]` is the output of block `l - 1`."""
        if self.layer is None:
            raise no_layer(where)
        if self.site not in ("resid_pre", "resid_post"):
            raise InputError(
                f"the direction was found at {self.site}, and the format adds at the output of blocks alone",
                where=where,
                hint="find a direction with `capture.site: resid_pre`",
            )
        block = self.layer - (self.site == "resid_pre")
        if block < 0:
            raise InputError(
                "layer 0 is the input of the first block, and the format adds at the output of blocks alone",
                where=where,
                hint="choose a direction of a later layer",
            )
        return block


#: Keys that say of one of our safetensors files, and of no other, how it came about and is to be used.
OF_THE_FILE = ("made_by", "stage", "operation")


def with_known(content: Content, known: Mapping[str, str], wanted: Wanted, path: Path) -> Content:
    """Add to `content` what a file of ours keeps beside the direction, and what the user says where it does not."""
    metadata = {key: value for key, value in known.items() if key not in OF_THE_FILE}
    layer, position, norm, named = (metadata.pop(key, None) for key in ("layer", "position", "norm", "site"))
    site = next((site for site in SITES if site == named), None)
    if named is not None and site is None:
        raise unreadable(path, f"its site is {named!r}")
    try:
        return replace(
            content,
            vector=content.vector * (1.0 if norm is None else float(norm)),
            layer=settled("layer", layer, wanted.layer, path),
            position=settled("position", position, wanted.position, path),
            site=site or content.site,
            metadata={**content.metadata, **metadata},
        )
    except ValueError:
        raise unreadable(path, f"its layer, position and norm are {layer!r}, {position!r} and {norm!r}") from None


def settled(name: str, said: str | None, wanted: int | None, path: Path) -> int | None:
    """Return the layer or position that a file says or the user gives; raises `InputError` where they differ."""
    if said is None:
        return wanted
    if wanted not in (None, int(said)):
        raise InputError(f"its {name} is {said}, not {wanted}", where=str(path), hint=f"leave out --{name}")
    return int(said)


#: How the files end; whatever ends otherwise is a folder.
ENDINGS = (".safetensors", ".gguf", ".pt", ".svec")


def ending(target: Path) -> str:
    """Return how a file ends, or nothing for a folder (whose name may hold a point)."""
    return target.suffix if target.suffix in ENDINGS else ""


def no_layer(where: str) -> InputError:
    """Say that the layer is known to nobody."""
    return InputError("the layer of the direction is not known", where=where, hint=f"give --layer; {COUNTED}")


def pick(directions: Mapping[int, T], wanted: Wanted, path: Path) -> tuple[int, T, tuple[str, ...]]:
    """Return the layer that is wanted, or the only one, its direction, and what is left out by that."""
    layers = sorted(directions)
    listed = ", ".join(map(str, layers))
    if wanted.layer is None and len(layers) > 1:
        raise InputError(
            f"holds directions of {len(layers)} layers: {listed}",
            where=str(path),
            hint=f"choose with --layer; {COUNTED}",
        )
    layer = layers[0] if wanted.layer is None else wanted.layer
    if layer not in directions:
        raise InputError(f"has no direction of layer {layer}, but of {listed}", where=str(path), hint=COUNTED)
    others = (f"the directions of the {len(layers) - 1} other layers",) if len(layers) > 1 else ()
    return layer, directions[layer], others


def checked(vector: Tensor, path: Path) -> Tensor:
    """Return `vector` [d_model], or [rank, d_model] where there are several rows.

    Raises `InputError` for what is no direction: another shape or type, zero, or not finite.
    """
    shape = list(vector.shape)
    if vector.ndim not in (1, 2) or not vector.numel():
        what = f"a tensor of shape {shape} is no direction [d_model] and no rows [rank, d_model]"
    elif not vector.dtype.is_floating_point:
        what = f"a direction of type {str(vector.dtype).removeprefix('torch.')} is none: it has to be floating point"
    elif not vector.isfinite().all():
        what = "the direction holds values that are not finite numbers"
    elif not vector.any():
        what = "the direction is zero"
    else:
        return vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
    raise InputError(what, where=str(path), hint="check that the file is whole and holds a direction")


def unreadable(path: Path, what: str) -> InputError:
    """Say that a file is not what it should be."""
    return InputError(f"cannot be read: {what}", where=str(path), hint="check that the file is whole")


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file that holds a `kind`; raises `InputError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from None
    if not isinstance(value, kind):
        raise unreadable(path, f"it holds {type(value).__name__}, not {kind.__name__}")
    return value
