"""Keep stage results in a run directory: atomic writes, content keys, nothing computed twice.

Each stage has a folder with `artifact.json` and, where it holds tensors, `tensors.safetensors`. A folder appears under
its name only when both are complete on disk, so a run that is killed at any point leaves whole artifacts or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from refusalkit.errors import RunError

if TYPE_CHECKING:
    from refusalkit.artifacts import Artifact

A = TypeVar("A", bound="Artifact")

STAGES = ("prompts", "capture", "find", "select", "evaluate")


def content_key(parts: Mapping[str, Any]) -> str:
    """Hash `parts` (JSON values) to the key of the artifact that follows from them."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_bytes(path: Path, payload: bytes) -> None:
    """Write `path` so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; not-a-number is not JSON and is an error."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors with `metadata` that says what they are, atomically."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=dict(metadata)))


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a draft that takes the place of `out` when the block ends; after an error there is none of it."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        _remove(out)
        os.replace(draft, out)
    except OSError as error:
        raise cannot_write(out, error) from None
    except RunError as error:
        # The draft's own name tells nobody anything.
        error.where = str(out)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> RunError:
    """Say that `path` could not be written, and why."""
    return RunError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        hint="free some space or choose another folder with --out; finished stages are kept",
    )


def _remove(path: Path) -> None:
    """Remove a folder, or a file that stands where a folder belongs."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


class Store:
    """Read and write the stage folders of one run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, stage: str) -> str | None:
        """Return the content key of the finished artifact of `stage`, or None."""
        head = self._head(stage)
        return None if head is None else str(head["key"])

    def _head(self, stage: str) -> dict[str, Any] | None:
        try:
            document = json.loads((self.folder / stage / "artifact.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):
            # Not written by us: artifacts appear whole. Computing it again is what the user would do.
            return None
        whole = isinstance(document, dict) and isinstance(document.get("value"), dict) and "key" in document
        return document if whole else None

    def load(self, kind: type[A], keys: Collection[str] | None = None) -> A | None:
        """Return the artifact of `kind`, or None where there is none under one of `keys` (any key, when None).

        Files that cannot be read count as none. Raises `ValidationError` for the value of another version when no key
        is given; with keys it too counts as none, so that the stage is run again.
        """
        head = self._head(kind.stage)
        if head is None or (keys is not None and head["key"] not in keys):
            return None
        fields: dict[str, Any] = dict(head["value"])
        tensors = self.folder / kind.stage / "tensors.safetensors"
        if tensors.exists():
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                fields.update(load_file(tensors))
            except (SafetensorError, OSError):
                return None
        try:
            return kind.model_validate(fields)
        except ValidationError:
            if keys is None:
                raise
            return None

    def adopt(self, stage: str, keys: Collection[str], beside: Iterable[Path]) -> Path | None:
        """Take over the finished artifact of `stage` from the first run `beside` this one that has it under one of
        `keys`, and return that run's folder; None where there is none.

        Files are linked where the file system can, since they are never changed in place, and copied elsewhere.
        """
        final, draft = self.folder / stage, self._draft(stage)
        for folder in beside:
            if Store(folder).key(stage) not in keys:
                continue
            try:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                # Its key last: where the other run replaces the stage meanwhile, it is the new one's and does not fit.
                for name in ("tensors.safetensors", "artifact.json"):
                    if (folder / stage / name).exists():
                        _link(folder / stage / name, draft / name)
                if Store(self.folder).key(draft.name) in keys:
                    _remove(final)
                    os.replace(draft, final)
                    return folder
            except FileNotFoundError:
                continue
            except OSError as error:
                raise cannot_write(final, error) from None
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return None

    def _draft(self, stage: str) -> Path:
        return self.folder / f".{stage}.{os.getpid()}.tmp"

    def save(self, artifact: Artifact, key: str, metadata: Mapping[str, str]) -> None:
        """Write an artifact under `key`; the folder appears whole or not at all."""
        import torch

        tensors = {
            name: value
            for name in type(artifact).model_fields
            if isinstance(value := getattr(artifact, name), torch.Tensor)
        }
        with whole_folder(self.folder / artifact.stage) as draft:
            if tensors:
                write_tensors(draft / "tensors.safetensors", tensors, metadata)
            value = json.loads(artifact.model_dump_json(exclude=set(tensors)))
            write_json(draft / "artifact.json", {"version": 1, "key": key, "metadata": dict(metadata), "value": value})
