"""Write down every job before it is waited for, and its result when it is there, so that neither is lost.

Each job has a file named by the hash of what it asks, in the folder `jobs` of the run. A process that was killed finds
the job again by that name, and a result that was fetched is never asked for twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import refusalkit
from refusalkit.engine.work import Part
from refusalkit.store import write_json, write_tensors

Results = list[Any]
_LIMIT = "limit.json"


@dataclass(frozen=True)
class Record:
    """Hold what is known of one job."""

    id: str
    host: str
    bytes_up: int
    bytes_down: int = 0
    resubmitted: int = 0
    """How often it had to be handed in again."""
    lost: bool = False
    """Whether the server lost it, so that it has to be handed in again."""
    ended: str | None = None
    """What the server said when it ended the job as too large."""


class Ledger:
    """Keep the jobs of one run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, key: str) -> Record | None:
        """Return what is known of a job, or None."""
        try:
            return Record(**json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
            return None

    def write(self, key: str, record: Record) -> None:
        """Write down a job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{key}.json", asdict(record))

    def results(self, key: str) -> Results | None:
        """Return the results of a finished job, or None."""
        try:
            tensors = load_file(self.folder / f"{key}.safetensors")
        except (OSError, SafetensorError):
            return None
        found: Results = []
        for name in sorted(tensors, key=lambda name: [int(part) for part in name.split(".")]):
            part, _, place = name.partition(".")
            if not place:
                found.append(tensors[name])
            elif place == "0":
                found.append([tensors[name]])
            else:
                found[int(part)].append(tensors[name])
        return found

    def keep(self, key: str, results: Results) -> None:
        """Write down the results of a finished job: each a tensor, or a list of at least one."""
        named: dict[str, Tensor] = {}
        for number, result in enumerate(results):
            if isinstance(result, Tensor):
                named[f"{number}"] = result
            else:
                named.update({f"{number}.{place}": tensor for place, tensor in enumerate(result)})
        write_tensors(self.folder / f"{key}.safetensors", named, {"made_by": f"refusalkit {refusalkit.__version__}"})

    def totals(self) -> dict[str, int]:
        """Count the jobs since the folder was last emptied, and the bytes they moved."""
        records = [record for path in self.folder.glob("*.json") if (record := self.record(path.stem)) is not None]
        return {
            "jobs": sum(1 + record.resubmitted for record in records),
            "bytes_up": sum(record.bytes_up for record in records),
            "bytes_down": sum(record.bytes_down for record in records),
        }

    def limit(self) -> float | None:
        """Return the most work a job may hold, where an earlier stage has met a limit of the server's."""
        try:
            return float(json.loads((self.folder / _LIMIT).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def clear(self, limit: float | None) -> None:
        """Forget all jobs, because the stage they were for is finished, and remember the limit for the next.

        Not earlier: a stage that is resumed has to be cut into the same jobs again, to find them.
        """
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)
        if limit is not None:
            write_json(self.folder / _LIMIT, limit)
        elif self.folder.is_dir():
            self.folder.rmdir()


def key_of(model_key: str, parts: Sequence[Part]) -> str:
    """Hash what a job asks; the same question has the same key in every process."""
    digest = hashlib.sha256(f"{refusalkit.__version__} {model_key}".encode())
    for task, items, fixed in parts:
        digest.update(task.__qualname__.encode())
        for piece in _pieces((items, fixed)):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _pieces(value: Any) -> Iterable[bytes]:
    """Walk through plain values in their order; each says what it is, so that no two shapes look alike."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for name, inner in value.items():
            yield str(name).encode()
            yield from _pieces(inner)
    elif isinstance(value, tuple | list):
        yield f"sequence {len(value)}".encode()
        for inner in value:
            yield from _pieces(inner)
    else:
        yield f"{type(value).__name__} {value!r};".encode()
