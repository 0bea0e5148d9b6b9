"""Read and write control vectors of repeng and llama.cpp: directions that are added at the outputs of blocks.

`direction.N` is added at the output of block N. llama.cpp has no block 0, so neither the input of the first block nor
that of the second can be steered.
"""

from __future__ import annotations

from pathlib import Path

from refusalkit.errors import InputError
from refusalkit.interchange.content import Content, Wanted, pick, with_known
from refusalkit.interchange.gguf_file import ARCHITECTURE, GGUF, OURS, Field, is_gguf, load, save


def recognises(path: Path) -> bool:
    """Tell a GGUF file that does not say `glp.mode`."""
    return is_gguf(path) and "glp.mode" not in load(path).fields


def read(path: Path, wanted: Wanted) -> Content:
    """Read the direction of one layer."""
    return read_added(load(path), path, wanted)


def read_added(file: GGUF, path: Path, wanted: Wanted) -> Content:
    """Return the direction that is added at the output of one block."""
    if any(set(rows) != {0} for rows in file.directions.values()):
        raise InputError(
            "holds several directions a layer, and what is to be added is one",
            where=str(path),
            hint="only projective files (GLP) may hold a subspace",
        )
    layer, vector, others = pick({block + 1: rows[0] for block, rows in file.directions.items()}, wanted, path)
    content = Content(vector, layer, operation="steer", model_type=file.model_type, left_out=others)
    return with_known(content, {**file.ours, "layer": str(layer), "site": "resid_pre"}, wanted, path)


def write(content: Content, target: Path, _: object = None) -> tuple[str, ...]:
    """Write the one direction that is added."""
    block = block_of(content, str(target))
    fields = {**about(content, 1), **{f"{OURS}{key}": value for key, value in content.known.items()}}
    save(target, fields, {f"direction.{block}": content.added})
    return (
        f"llama.cpp adds it at the output of block {block}, the input of layer {block + 1}: --control-vector "
        f"{target.name} adds it once, --control-vector-scaled {target.name}:-1 subtracts it; it cannot ablate",
    )


def block_of(content: Content, where: str) -> int:
    """Return N of `direction.N`; raises `InputError` for a layer that no N stands for."""
    block = content.block(where)
    if block == 0:
        raise InputError(
            f"layer {content.layer} would be direction.0, and llama.cpp refuses files that hold it",
            where=where,
            hint="choose a direction of a later layer",
        )
    return block


def about(content: Content, n_tensors: int) -> dict[str, Field]:
    """Return the fields that every control vector has."""
    assert content.model_type is not None, "the table says that the format needs it"
    return {f"{ARCHITECTURE}.model_hint": content.model_type, f"{ARCHITECTURE}.layer_count": n_tensors}
