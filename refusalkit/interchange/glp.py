"""Read and write GLP files: control vectors whose fields say that they are projected out (msuiche/weightless, GLP.md).

`h - alpha (h . d) d` at the output of every block that has a direction. The rows of a block are orthonormal, and block
0 cannot be named, so this is close to our `ablate` and not the same: what block 0 writes stays until block 1 is
through, and in every block the MLP still reads what attention wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.checkpoint import Checkpoint
from refusalkit.interchange.content import Content, Wanted, pick, unreadable, with_known
from refusalkit.interchange.control_vector import about, read_added
from refusalkit.interchange.gguf_file import GGUF, OURS, Field, is_gguf, load, save
from refusalkit.intervention import Site

#: Where a direction is projected out, in GLP's words and ours.
HOOK_POINTS: Mapping[str, Site] = {
    "residual_stream_post_layer": "resid_post",
    "ffn_out_pre_residual": "mlp_out",
    "attn_out_pre_residual": "attn_out",
}
NEWEST = 2


def recognises(path: Path) -> bool:
    """Tell a GGUF file that says `glp.mode`."""
    return is_gguf(path) and "glp.mode" in load(path).fields


def read(path: Path, wanted: Wanted) -> Content:
    """Read the direction or subspace of one layer; where every layer has the same, that one."""
    file = load(path)
    mode = file.fields["glp.mode"]
    if mode == "add":
        return read_added(file, path, wanted)
    if mode != "project":
        raise unreadable(path, f"glp.mode is {mode!r}, which nobody may guess at")
    _check(file, path)
    # `resid_post` of a block is `resid_pre` of the next.
    derived = _site(file, path)
    shift = int(derived == "resid_post")
    site: Site = "resid_pre" if shift else derived
    stacked = {block: _rows(rows, file, path) for block, rows in file.directions.items()}
    content = Content(
        next(iter(stacked.values())),
        None,
        site=site,
        operation="ablate",
        model_type=file.model_type,
        metadata=_base_model(file),
        left_out=_strengths(file),
    )
    if all(torch.equal(rows, content.vector) for rows in stacked.values()) and len(stacked) > 1:
        return with_known(content, file.ours, wanted, path)
    layer, vector, others = pick({block + shift: rows for block, rows in stacked.items()}, wanted, path)
    content = replace(content, vector=vector, left_out=content.left_out + others)
    return with_known(content, {**file.ours, "layer": str(layer), "site": site}, wanted, path)


def _check(file: GGUF, path: Path) -> None:
    """Refuse what readers of the format have to refuse."""
    version = file.fields.get("glp.spec_version")
    if not isinstance(version, int) or not 1 <= version <= NEWEST:
        raise unreadable(path, f"glp.spec_version is {version}; known are 1 and 2")
    if 0 in file.directions:
        raise unreadable(path, "it holds direction.0, which GLP does not allow")
    blocks = ",".join(map(str, sorted(file.directions)))
    if file.fields.get("glp.layer_ids_zero_based", blocks) != blocks:
        raise unreadable(path, f"it says that its layers are {file.fields['glp.layer_ids_zero_based']}: {blocks} are")
    if file.fields.get("glp.content_sha256", digest := _digest(file.directions)) != digest:
        raise unreadable(path, "its directions are not those that its glp.content_sha256 was made of")


def _site(file: GGUF, path: Path) -> Site:
    """Return where the directions were found."""
    hook = file.fields.get("glp.derived_at", file.fields.get("glp.hook_point"))
    if hook not in HOOK_POINTS:
        raise unreadable(path, f"its hook point is {hook!r}; known are {', '.join(HOOK_POINTS)}")
    return HOOK_POINTS[hook]


def _rows(rows: Mapping[int, Tensor], file: GGUF, path: Path) -> Tensor:
    """Stack the rows of a block [rank, d_model], which have to be orthonormal: [d_model] where there is one."""
    if sorted(rows) != list(range(len(rows))):
        raise unreadable(path, f"a layer has the rows {sorted(rows)}")
    stacked = torch.stack([rows[row] for row in sorted(rows)])
    gap = (stacked @ stacked.T - torch.eye(len(rows))).abs().max().item()
    if gap > 1e-3 or (len(rows) > 1 and file.fields.get("glp.orthonormal") is not True):
        raise unreadable(path, "its directions are not orthonormal, and then projecting them out is not what it says")
    return stacked if len(rows) > 1 else stacked[0]


def _strengths(file: GGUF) -> tuple[str, ...]:
    """Say which strengths are left out: refusalkit removes a component, no more and no less."""
    said = {
        name: file.fields[name]
        for name in ("glp.alpha_default", "glp.dir_scales", "glp.layer_scales")
        if file.fields.get(name, 1.0) != 1.0
    }
    return tuple(f"{name} {value} (ablate removes the component once)" for name, value in said.items())


def _base_model(file: GGUF) -> dict[str, str]:
    base = "general.base_model.0."
    name, organization = (file.fields.get(f"{base}{part}") for part in ("name", "organization"))
    model = f"{organization}/{name}" if organization and name else name
    known = {
        "model": model,
        "model_revision": file.fields.get(f"{base}version"),
        "strategy": file.fields.get("glp.method"),
    }
    return {key: str(value) for key, value in known.items() if value}


def _digest(directions: Mapping[int, Mapping[int, Tensor]]) -> str:
    """Hash the bytes of the tensors in the order of blocks and rows."""
    digest = hashlib.sha256()
    for block in sorted(directions):
        for row in sorted(directions[block]):
            digest.update(directions[block][row].float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def write(content: Content, target: Path, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """Write the direction for the outputs of all blocks but the first."""
    assert checkpoint is not None, "the table says that the format needs the model"
    basis = algebra.orthonormal(content.rows).float()
    blocks = range(1, checkpoint.n_layers)
    directions = {block: dict(enumerate(basis)) for block in blocks}
    fields: dict[str, Field] = {
        **about(content, len(blocks) * len(basis)),
        "glp.mode": "project",
        "glp.spec_version": 1 if len(basis) == 1 else 2,
        "glp.alpha_default": 1.0,
        "glp.rank": len(basis),
        "glp.orthonormal": True,
        "glp.hook_point": "residual_stream_post_layer",
        "glp.derived_at": _derived_at(content.site),
        "glp.layer_ids_zero_based": ",".join(map(str, blocks)),
        "glp.content_sha256": _digest(directions),
        "general.base_model.count": 1,
        "general.base_model.0.name": content.metadata["model"],
        "general.base_model.0.version": content.metadata["model_revision"],
    }
    if strategy := content.metadata.get("strategy"):
        fields["glp.method"] = strategy
    fields |= {f"{OURS}{key}": value for key, value in content.known_of_unit.items()}
    names = {
        f"direction.{block}" + (f".{row}" if row else ""): vector
        for block, rows in directions.items()
        for row, vector in rows.items()
    }
    save(target, fields, names)
    return (
        "projects at the outputs of blocks: close to `ablate`, which also clears what block 0 and each attention "
        "write before they are read; readers that know no glp.mode (llama.cpp) would add it: do not give it to them",
    )


def _derived_at(site: Site) -> str:
    return next((hook for hook, ours in HOOK_POINTS.items() if ours == site), "residual_stream_post_layer")
