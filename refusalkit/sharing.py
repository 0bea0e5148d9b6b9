"""Let runs share what they have in common, and keep processes out of each other's way.

The runs of a sweep stand in folders beside each other. A stage that comes out the same in several of them is computed
in one and linked into the others, and a model stays in memory for the next run that asks for it. Locks belong to the
process that holds them: the system releases them when it ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from refusalkit.checkpoint import Checkpoint
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import RunError
from refusalkit.store import cannot_write

#: Where a sweep keeps one lock for each stage that is being computed.
TURNS = ".turns"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep every other process out of `folder` while this one writes there; raises `RunError` where one is in it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            "another process is running in this folder",
            where=str(folder),
            hint="wait until it has ended, or choose another folder with --out",
        ) from None
    except OSError as error:
        raise cannot_write(folder / ".lock", error) from None
    try:
        yield
    finally:
        lock.release()


class Models:
    """Keep the last model that was loaded, for the next run that asks for the same."""

    def __init__(self) -> None:
        self._held: tuple[Checkpoint, Engine] | None = None

    def engine(self, checkpoint: Checkpoint) -> Engine:
        """Return the model of `checkpoint`, loading it where another one is held."""
        if self._held is not None and _alike(self._held[0], checkpoint):
            return self._held[1]
        # Let go of the old one first: there may not be room for both.
        self._held = None
        engine = load(checkpoint)
        self._held = (checkpoint, engine)
        return engine


def _alike(one: Checkpoint, other: Checkpoint) -> bool:
    return (one.section, one.revision, one.adapter) == (other.section, other.revision, other.adapter)


@dataclass(frozen=True, eq=False)
class Sharing:
    """Say what a run may share, and with whom."""

    folder: Path | None = None
    """The folder of the sweep it belongs to; null for a run on its own."""
    models: Models = field(default_factory=Models)

    def beside(self, out: Path) -> list[Path]:
        """Return the folders of the sweep's other runs."""
        if self.folder is None:
            return []
        entries = (entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return sorted(entry for entry in entries if entry.name != out.name)

    @contextmanager
    def turn(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Let one run of the sweep at a time work on what `key` stands for, so that the others find it done."""
        if self.folder is None:
            yield
            return
        (self.folder / TURNS).mkdir(exist_ok=True)
        lock = FileLock(self.folder / TURNS / f"{key[:32]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
