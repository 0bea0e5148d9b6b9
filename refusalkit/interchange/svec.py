"""Read and write `.svec` files (IBM's activation-steering and AISteer360).

JSON: `{"model_type", "directions": {"<layer>": [floats]}, "explained_variances": {}}`, a layer being the block whose
output is meant. The file does not say what is done with the directions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit.errors import InputError
from refusalkit.interchange.content import Content, Wanted, checked, pick, read_json, unreadable, with_known
from refusalkit.store import write_text


def recognises(path: Path) -> bool:
    """Tell the file by its name."""
    return path.is_file() and path.suffix == ".svec"


def read(path: Path, wanted: Wanted) -> Content:
    """Read the direction of one layer."""
    document = read_json(path, dict)
    try:
        blocks = {int(block): values for block, values in document["directions"].items()}
        model_type = str(document["model_type"])
        layer, values, others = pick({block + 1: values for block, values in blocks.items()}, wanted, path)
        vector = _vector(values, path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from None
    known = {str(key): str(value) for key, value in dict(document.get("refusalkit") or {}).items()}
    content = Content(vector, layer, model_type=model_type, left_out=others)
    return with_known(content, {**known, "layer": str(layer), "site": "resid_pre"}, wanted, path)


def _vector(values: Any, path: Path) -> Tensor:
    vector = torch.tensor(values, dtype=torch.float64)
    if vector.ndim == 2 and len(vector) > 1:
        raise InputError(
            f"holds {len(vector)} rows a layer, which may be positions, heads or a basis: the file does not say",
            where=str(path),
            hint="write a file with one row a layer",
        )
    return checked(vector.reshape(-1), path)


def write(content: Content, target: Path, _: object = None) -> tuple[str, ...]:
    """Write the direction under the block whose output it was found at, and what else is known beside it."""
    document = {
        "model_type": content.model_type,
        "directions": {str(content.block(str(target))): content.added.double().tolist()},
        # Readers look for it; only principal components have one.
        "explained_variances": {},
        "refusalkit": content.known,
    }
    write_text(target, json.dumps(document) + "\n")
    return ()
