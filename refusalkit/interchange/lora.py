"""Read and write PEFT LoRA adapters that remove a direction from the weights.

With `u` of length one, `W - u (u^T W)` is `W + B A` with `B = u` and `A = -u^T W`: a LoRA of rank one on each matrix
that writes the residual stream, and on the embedding, is exactly the weight edit of Arditi et al. 2024 (arXiv
2406.11717, section 4). A LoRA leaves the unembedding alone even where it is tied to the embedding, as the edit has to.
It cannot change a bias, nor a parameter that is no linear layer's, such as fused experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refusalkit import algebra
from refusalkit.bake import card, record
from refusalkit.checkpoint import Checkpoint
from refusalkit.engine.layout import resolve
from refusalkit.engine.load import load_module
from refusalkit.engine.weights import Edited, writers
from refusalkit.errors import InputError
from refusalkit.interchange.content import Content, Wanted, checked, read_json, unreadable, with_known
from refusalkit.interchange.own import read_safetensors
from refusalkit.store import whole_folder, write_json, write_tensors, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: Before the keys of the metadata that only refusalkit writes.
OURS = "refusalkit."
#: The least cosine between directions that count as one.
SAME = 1 - 1e-4
#: The share of a bias along the direction up to which it counts as having none.
ROUNDING = 1e-6


def recognises(path: Path) -> bool:
    """Tell an adapter's folder."""
    return (path / CONFIG).is_file()


def read(path: Path, wanted: Wanted) -> Content:
    """Read the direction, or the subspace, along which every module of an adapter writes."""
    config = _config(path)
    tensors, metadata = read_safetensors(path / WEIGHTS)
    bases = {
        name.partition(".lora_")[0]: algebra.orthonormal(checked(tensor.T, path).reshape(-1, len(tensor)))
        for name, tensor in tensors.items()
        if ".lora_B." in name or ".lora_embedding_B" in name
    }
    if not bases:
        raise unreadable(path, "it holds no lora_B")
    first, basis = next(iter(bases.items()))
    for name, other in bases.items():
        if basis.shape != other.shape or torch.linalg.svdvals(basis @ other.T).min() < SAME:
            raise InputError(
                f"its modules write along different directions: {_short(first)} and {_short(name)}",
                where=str(path),
                hint="only an adapter that removes one direction, or one subspace, everywhere can be read",
            )
    known = {key.removeprefix(OURS): value for key, value in metadata.items() if key.startswith(OURS)}
    content = Content(
        basis[0] if len(basis) == 1 else basis,
        None,
        operation="ablate",
        metadata={"model": str(config["base_model_name_or_path"])} if config.get("base_model_name_or_path") else {},
        left_out=() if known else ("how much of the direction the adapter removes, and the direction's sign",),
    )
    return with_known(content, known, wanted, path)


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(path / CONFIG, dict)
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("use_dora"):
        raise unreadable(path / CONFIG, f"it describes {'DoRA' if kind == 'LORA' else repr(kind)}, and not a LoRA")
    return config


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


def write(content: Content, target: Path, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """Write an adapter that removes the direction, and a model card that says so."""
    assert checkpoint is not None, "the table says that the format needs the model"
    if checkpoint.adapter.inexact is not None:
        raise InputError(
            f"no weight edit of {checkpoint.architecture} equals ablation: {checkpoint.adapter.inexact}",
            where=str(target),
            hint="`--to steered` removes the direction from activations; `refusalkit bake` writes the nearest weights",
        )
    module = load_module(checkpoint)
    basis = algebra.orthonormal(content.rows)
    tensors: dict[str, Tensor] = {}
    targets = []
    for path, factors in _factors(module, checkpoint, basis, target):
        targets.append(path)
        tensors |= {f"{PREFIX}{path}.{name}": factor for name, factor in factors.items()}
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    edited = Edited(tuple(f"{path}.weight" for path in targets), untied=False)
    said = record(checkpoint, content.layer, content.position, edited)
    with whole_folder(target) as draft:
        known = {f"{OURS}{key}": value for key, value in content.known_of_unit.items()}
        write_tensors(draft / WEIGHTS, tensors, {"format": "pt", **known})
        write_json(draft / CONFIG, _adapter_config(checkpoint, targets, len(basis)))
        write_json(draft / "refusalkit.json", said)
        write_text(draft / "README.md", card(said) + (f"\nNote: {TIED}.\n" if tied else ""))
    return (f"{len(targets)} modules changed", *([TIED] if tied else ()))


TIED = (
    "the unembedding is tied to the embedding: keep the adapter unmerged, because merging would change the unembedding "
    "too; `refusalkit bake` writes whole weights, untied"
)


def _factors(
    module: Any, checkpoint: Checkpoint, basis: Tensor, target: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each module that writes the stream and its factors A [rank, in] and B [d_model, rank], float32."""
    for writer in writers(module, checkpoint.adapter, basis):
        path, _, kind = writer.name.rpartition(".")
        layer = resolve(module, path)
        wide = algebra.widen(writer.weight)
        rows = writer.rows.to(wide)
        if isinstance(layer, nn.Linear) and kind == "weight":
            yield path, {"lora_A.weight": -(rows @ wide).float(), "lora_B.weight": rows.T.float()}
        elif isinstance(layer, nn.Embedding):
            yield path, {"lora_embedding_A": -(rows @ wide.T).float(), "lora_embedding_B": rows.T.float()}
        elif kind != "bias" or (wide @ rows.T).norm() > ROUNDING * wide.norm():
            what = "a bias" if kind == "bias" else f"of {type(layer).__name__}, which is no linear layer"
            raise InputError(
                f"{writer.name} writes along the direction and cannot be changed by a LoRA: it is {what}",
                where=str(target),
                hint="`refusalkit bake` writes a whole checkpoint without the direction",
            )


def _adapter_config(checkpoint: Checkpoint, targets: list[str], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.section.id,
        "revision": checkpoint.section.revision,
        "inference_mode": True,
        "r": rank,
        # The scaling is alpha over rank.
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": targets,
    }
