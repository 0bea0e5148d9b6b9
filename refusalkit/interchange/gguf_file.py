"""Read and write GGUF files of directions: named one-dimensional float32 tensors and typed fields."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit.errors import InputError
from refusalkit.interchange.content import checked, unreadable
from refusalkit.store import write_bytes

ARCHITECTURE = "controlvector"
#: Before the names of fields that only refusalkit writes.
OURS = "refusalkit."
Field = str | int | float | bool


@dataclass(frozen=True, eq=False)
class GGUF:
    """Hold a file's fields and directions: by block, and by row of a subspace."""

    fields: Mapping[str, Any]
    directions: Mapping[int, Mapping[int, Tensor]]

    @property
    def ours(self) -> dict[str, str]:
        """What refusalkit wrote beside the directions."""
        return {name.removeprefix(OURS): str(value) for name, value in self.fields.items() if name.startswith(OURS)}

    @property
    def model_type(self) -> str | None:
        """The `model_type` of the model, where the file says."""
        hint = self.fields.get(f"{ARCHITECTURE}.model_hint")
        return None if hint is None else str(hint)


def is_gguf(path: Path) -> bool:
    """Tell a GGUF file by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def library(where: str) -> Any:
    """Import the package `gguf`; raises `InputError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputError("gguf is not installed", where=where, hint="pip install 'refusalkit[gguf]'") from None
    return gguf


def load(path: Path) -> GGUF:
    """Read a file of directions; raises `InputError` for one that is broken or holds something else."""
    gguf = library(str(path))
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: (tensor.tensor_type, torch.tensor(tensor.data)) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OSError, MemoryError) as error:
        raise unreadable(path, str(error)) from None
    directions: dict[int, dict[int, Tensor]] = {}
    for name, (kind, tensor) in tensors.items():
        block, row = _place(name, path)
        if kind != gguf.GGMLQuantizationType.F32 or tensor.ndim != 1:
            raise unreadable(path, f"{name} is {kind.name} of shape {list(tensor.shape)}, and not a row of F32")
        directions.setdefault(block, {})[row] = checked(tensor, path)
    if not directions:
        raise unreadable(path, "it holds no direction")
    if len({len(tensor) for rows in directions.values() for tensor in rows.values()}) > 1:
        raise unreadable(path, "its directions differ in length")
    return GGUF(fields, directions)


def _place(name: str, path: Path) -> tuple[int, int]:
    """Return the block and row of `direction.<block>` or `direction.<block>.<row>`."""
    head, *numbers = name.split(".")
    if head != "direction" or len(numbers) not in (1, 2) or not all(part.isdigit() for part in numbers):
        raise unreadable(path, f"it holds {name}, which is no direction of a control vector")
    return int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0


def save(path: Path, fields: Mapping[str, Field], directions: Mapping[str, Tensor]) -> None:
    """Write named rows [d_model] as float32, whole, with the fields in their order."""
    gguf = library(str(path))
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "directions.gguf"
        writer = gguf.GGUFWriter(draft, ARCHITECTURE)
        for name, value in fields.items():
            # True is an int, too.
            kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32))
            add = next((add for kind, add in kinds if isinstance(value, kind)), writer.add_string)
            add(name, value)
        for name, tensor in directions.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_bytes(path, draft.read_bytes())
