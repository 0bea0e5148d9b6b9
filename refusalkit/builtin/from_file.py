"""Read directions from a safetensors file: those of an earlier run, or a tensor that another tool wrote."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PrivateAttr

from refusalkit.errors import InputError, nearest
from refusalkit.strategy import Captured, Setting, Strategy

if TYPE_CHECKING:
    from torch import Tensor

#: What a run calls the tensors of its own files.
OWN = ("directions", "direction")
SHAPES = "[position, layer, d_model], [position, layer, rank, d_model], [layer, d_model] or [d_model]"


@dataclass(frozen=True)
class Stored:
    """Hold what a file says of one of its tensors, and where its directions belong in a model."""

    path: Path
    name: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str]
    sha256: str
    """Of the whole file."""

    @property
    def where(self) -> str:
        """Where an error is."""
        return f"find.path: {self.path}"

    @property
    def place(self) -> tuple[int | None, int] | None:
        """The position and layer of a `direction.safetensors`; one that `convert` made may have no position."""
        position, layer = self.metadata.get("position"), self.metadata.get("layer")
        return None if layer is None else (None if position is None else int(position), int(layer))

    @property
    def rank(self) -> tuple[int, ...]:
        """The number of rows of a subspace, where that is an axis of the tensor."""
        return self.shape[-2:-1] if len(self.shape) == (4 if self.place is None else 2) else ()


class FromFile(Strategy):
    """Read directions from a safetensors file instead of finding them.

    A run's `candidates.safetensors` and `direction.safetensors` say in their metadata where their directions belong. Of
    another file, a tensor `[position, layer, d_model]` has a direction for every captured position, `[layer, d_model]`
    for the last one, and `[d_model]` for the last one in every layer. Layer l is the block whose input is read; rows
    that were read behind the blocks belong to `capture.site: resid_post`. `refusalkit convert` reads other formats.
    """

    strategy: Literal["from_file"] = "from_file"
    reads_files = True
    path: str
    """The file, relative to the recipe."""
    tensor: str | None = None
    """The tensor's name in the file; null takes `directions` or `direction`, or the only one there is."""
    _found: tuple[Stored, Setting] | None = PrivateAttr(None)

    def fitted(self, setting: Setting) -> Strategy:
        stored = _look(setting.folder / os.path.expanduser(self.path), self.tensor)
        _check(stored, setting)
        made = self.model_copy()
        made._found = stored, setting
        return made

    @property
    def content(self) -> dict[str, Any]:
        assert self._found is not None
        return self.model_dump(mode="json", exclude={"path"}) | {"sha256": self._found[0].sha256}

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        import torch
        from safetensors import safe_open

        assert self._found is not None
        stored, setting = self._found
        with safe_open(stored.path, framework="pt") as file:
            values = file.get_tensor(stored.name).double()
        positions, layers = _places(stored, setting)
        # One row of layers stands for all that are named.
        rows = values.reshape(len(positions), -1, *stored.rank, setting.d_model)
        shape = (len(setting.positions), setting.n_layers, *stored.rank, setting.d_model)
        directions = torch.zeros(shape, dtype=torch.float64)
        for position, row in zip(positions, rows, strict=True):
            if position in setting.positions:
                directions[setting.positions.index(position), list(layers)] = row
        return directions


def _look(path: Path, tensor: str | None) -> Stored:
    """Read the header of a file and choose a tensor; raises `InputError` for what is none."""
    from safetensors import SafetensorError, safe_open

    where = f"find.path: {path}"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as file:
            name = _chosen(list(file.keys()), tensor, where)
            shape, dtype = tuple(file.get_slice(name).get_shape()), str(file.get_slice(name).get_dtype())
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise InputError("no such file", where=where, hint="paths start at the recipe's folder") from None
    except SafetensorError as error:
        raise InputError(
            f"is not a safetensors file: {error}",
            where=where,
            hint="`refusalkit convert` turns the files of other tools into a direction.safetensors",
        ) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=where) from None
    if not dtype.startswith(("F", "BF")):
        raise InputError(
            f"tensor {name!r} holds {dtype}, not floating-point numbers", where=where, hint="name another `tensor`"
        )
    return Stored(path, name, shape, metadata, digest)


def _chosen(names: Sequence[str], asked: str | None, where: str) -> str:
    if asked is not None:
        if asked not in names:
            raise InputError(f"holds no tensor {asked!r}", where=where, hint=nearest(asked, names))
        return asked
    known = [name for name in OWN if name in names] or (list(names) if len(names) == 1 else [])
    if not known:
        raise InputError(
            f"holds {len(names)} tensors, and which is meant is not said",
            where=where,
            hint=f"name it with `tensor:`: {', '.join(sorted(names)[:6])}" if names else "name another file",
        )
    return known[0]


def _check(stored: Stored, setting: Setting) -> None:
    """Refuse directions that are not of this model, this site, or any shape there is a meaning for."""
    from refusalkit.artifacts import LAYER_CONVENTION

    shape, said = list(stored.shape), stored.metadata
    origin = f" of {said['model']}" if "model" in said else ""
    if not 1 <= len(shape) <= (4 if stored.place is None else 2):
        raise InputError(
            f"tensor {stored.name!r} has shape {shape}", where=stored.where, hint=f"directions are {SHAPES}"
        )
    if shape[-1] != setting.d_model:
        raise InputError(
            f"directions{origin} have {shape[-1]} numbers, and d_model is {setting.d_model}",
            where=stored.where,
            hint="they were found in another model; the last axis of the tensor is d_model",
        )
    if said.get("site", setting.site) != setting.site:
        raise InputError(
            f"directions were read at {said['site']}, and the recipe reads at {setting.site}",
            where=stored.where,
            hint=f"write `site: {said['site']}` below `capture:`",
        )
    if said.get("layer_convention", LAYER_CONVENTION) != LAYER_CONVENTION:
        raise InputError(
            f"numbers layers in another way: {said['layer_convention']!r}",
            where=stored.where,
            hint=f"here {LAYER_CONVENTION}; shift the layers and leave `layer_convention` out of the metadata",
        )
    positions, layers = _places(stored, setting)
    if not set(positions) & set(setting.positions):
        raise InputError(
            f"directions were found at {_listed(positions)}, and captured is {_listed(setting.positions)}",
            where=stored.where,
            hint=f"write `positions: [{_listed(positions)}]` below `capture:`",
        )
    if max(layers) >= setting.n_layers:
        raise InputError(
            f"the direction was found in layer {max(layers)}, and this model has {setting.n_layers}",
            where=stored.where,
            hint="it was found in another model",
        )


def _places(stored: Stored, setting: Setting) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions and the layers that the tensor has directions for."""
    last, every = setting.positions[-1:], tuple(range(setting.n_layers))
    if stored.place is not None:
        position, layer = stored.place
        return last if position is None else (position,), (layer,)
    shape = list(stored.shape)
    if len(shape) == 1:
        return last, every
    by_position = len(shape) > 2
    if (found := shape[1 if by_position else 0]) != setting.n_layers:
        hint = f"directions are {SHAPES}"
        if found == setting.n_layers + 1:
            hint = (
                "with the embedding first, row l is the input of block l: leave out the last row, which is behind the "
                "last block"
            )
        raise InputError(
            f"tensor {stored.name!r} has shape {shape}: {found} layers, and this model has {setting.n_layers}",
            where=stored.where,
            hint=hint,
        )
    said = stored.metadata.get("positions")
    positions = setting.positions if said is None else tuple(int(each) for each in said.split(","))
    if by_position and shape[0] != len(positions):
        raise InputError(
            f"tensor {stored.name!r} has shape {shape}: {shape[0]} positions, and "
            f"{f'captured are {_listed(positions)}' if said is None else f'its metadata names {said}'}",
            where=stored.where,
            hint="capture as many positions as the file has, with `capture.positions`",
        )
    return (positions if by_position else last), every


def _listed(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions))
