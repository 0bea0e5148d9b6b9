"""Write a checkpoint whose weights have the direction removed, and which says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refusalkit import algebra
from refusalkit.artifacts import LAYER_CONVENTION, Choice
from refusalkit.checkpoint import Checkpoint
from refusalkit.engine.load import load_module
from refusalkit.engine.weights import Edited, orthogonalize
from refusalkit.errors import InputError
from refusalkit.store import whole_folder, write_json, write_text


def bake(checkpoint: Checkpoint, choice: Choice, out: Path) -> Edited:
    """Remove the chosen direction from every weight that writes the residual stream and save the model in `out`.

    `AutoModelForCausalLM.from_pretrained(out)` loads the result. A model card and `refusalkit.json` say what was
    done. Raises `InputError` when `out` is not empty, `RunError` when it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("the folder is not empty", where=f"--out {out}", hint="name a new folder")
    module = load_module(checkpoint)
    vectors = choice.direction.reshape(-1, choice.direction.shape[-1])
    edited = orthogonalize(module, checkpoint.adapter, algebra.orthonormal(vectors))
    said = record(checkpoint, choice.layer, choice.position, edited)
    with whole_folder(out) as draft:
        module.save_pretrained(draft)
        checkpoint.tokenizer.save_pretrained(draft)
        write_json(draft / "refusalkit.json", said)
        write_text(draft / "README.md", card(said))
    return edited


def record(checkpoint: Checkpoint, layer: int | None, position: int | None, edited: Edited) -> dict[str, Any]:
    """Return what programs are told of weights without the direction that was found at `layer` and `position`."""
    import refusalkit

    return {
        "made_by": f"refusalkit {refusalkit.__version__}",
        "operation": "orthogonalize",
        "safety_behaviour_altered": True,
        "base_model": checkpoint.section.id,
        "base_revision": checkpoint.revision,
        "adapter": checkpoint.adapter.name,
        "position": position,
        "layer": layer,
        "layer_convention": LAYER_CONVENTION,
        "equivalent_to_ablation": checkpoint.adapter.inexact is None,
        "why_not_equivalent": checkpoint.adapter.inexact,
        "unembedding_untied": edited.untied,
        "edited_parameters": list(edited.names),
    }


def card(record: Mapping[str, Any]) -> str:
    """Return the model card that belongs to a record."""
    place = {key: "not known" if record[key] is None else record[key] for key in ("layer", "position")}
    same = (
        "By construction this equals removing the direction from the activations at every layer and token."
        if record["equivalent_to_ablation"]
        else f"This is not equivalent to removing the direction from the activations: {record['why_not_equivalent']}."
    )
    untied = " The unembedding was untied from the embedding first." if record["unembedding_untied"] else ""
    return f"""---
base_model: {record["base_model"]}
tags:
- refusalkit
- refusal-direction
- safety-behaviour-altered
---
# {record["base_model"]}, refusal direction removed from the weights

**The safety behaviour of this model was altered for research.** It refuses fewer harmful requests than the model it
was made from. Do not deploy it, and do not judge the base model's safety by it.

| | |
|---|---|
| base model | {record["base_model"]} |
| base revision | {record["base_revision"]} |
| operation | weight orthogonalization (Arditi et al. 2024, arXiv 2406.11717) |
| direction from | layer {place["layer"]}, position {place["position"]} ({record["layer_convention"]}) |
| parameters changed | {len(record["edited_parameters"])} (listed in `refusalkit.json`) |
| made by | {record["made_by"]} |

{same}{untied}
"""
