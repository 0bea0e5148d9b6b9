"""Convert directions in tests, and look at what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from refusalkit.errors import InputError
from refusalkit.interchange.content import Operation, Wanted
from refusalkit.interchange.convert import Converted
from refusalkit.interchange.convert import convert as convert_with
from tests.conftest import BUILT_IN, one_hint

#: A target and what to do with the direction, where that is not clear, for each format.
TARGETS: Mapping[str, tuple[str, Operation | None]] = {
    "refusalkit": ("x.safetensors", None),
    "authors": ("x", None),
    "gguf": ("x.gguf", None),
    "glp": ("x.gguf", None),
    "lora": ("x", None),
    "steered": ("x.pt", "ablate"),
    "svec": ("x.svec", None),
}


def convert(source: Path, target: Path, to: str | None = None, **wanted: Any) -> Converted:
    """Convert with the options as keywords."""
    return convert_with(source, target, to, Wanted(**wanted), BUILT_IN)


def vector(path: Path) -> Tensor:
    return load_file(path)["direction"]


def place(path: Path) -> tuple[int, int | None]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    return int(about["layer"]), int(about["position"]) if "position" in about else None


def refused(act: Callable[[], object], *words: str) -> None:
    """Check that `act` ends in an error that names the place and has one hint, and says `words`."""
    with pytest.raises(InputError) as caught:
        act()
    assert caught.value.where
    assert one_hint(str(caught.value).splitlines()), str(caught.value)
    for word in words:
        assert word in str(caught.value)


def write_gguf(path: Path, tensors: Mapping[str, Any], **fields: str) -> Path:
    """Write a control vector as repeng does; fields are named with `__` for a dot."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value) if isinstance(value, str) else writer.add_uint32(
            name.replace("__", "."), value
        )
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
