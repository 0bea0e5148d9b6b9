"""Execute runs in a process of their own, and tell the one that started it how they go.

Nothing heavy is imported at the top: how many threads the libraries take is settled before they are loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from refusalkit.errors import RefusalkitError

#: Progress is sent no more often than this, in seconds.
INTERVAL = 0.1


@dataclass(frozen=True)
class Task:
    """Say which run to execute, in plain values that reach another process."""

    name: str
    path: Path
    """The recipe's file, from which relative paths start."""
    recipe: Mapping[str, Any]
    """The recipe as it was when it was checked: the file may be edited while others run."""
    out: Path
    sweep: Path | None
    """The folder of the sweep."""
    keeps_samples: bool
    until: str


@dataclass(frozen=True)
class Ended:
    """Say how a run ended: with what was found, or with an error."""

    seconds: float
    found: str | None = None
    error: RefusalkitError | None = None


class Stopped(BaseException):
    """End the process at the next chance, cleaning up on the way out."""


class Sent:
    """Send progress to the process that shows it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent = 0.0

    def stage(self, name: str, state: str) -> None:
        """Send every change."""
        self._connection.send(("stage", name, state))

    def advance(self, what: str, done: int, total: int) -> None:
        """Send the last step, and of the others what an eye can follow."""
        now = time.monotonic()
        if done >= total or now - self._sent >= INTERVAL:
            self._sent = now
            self._connection.send(("advance", what, done, total))

    def state(self, said: str) -> None:
        """Send every state."""
        self._connection.send(("state", said))


def serve(connection: Connection, log: Path, threads: int | None) -> None:
    """Execute every task that comes through `connection`, until there are no more; talk goes to the file `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        _work(connection)
    except Stopped:
        sys.exit(1)


def _work(connection: Connection) -> None:
    from refusalkit.checkpoint import quiet
    from refusalkit.sharing import Models

    quiet()
    models = Models()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_execute(task, models, Sent(connection)))


def _execute(task: Task, models: Any, progress: Sent) -> Ended:
    from refusalkit.pipeline import execute
    from refusalkit.plan import make_plan
    from refusalkit.recipe_file import Source, check
    from refusalkit.registry import load_registry
    from refusalkit.sharing import Sharing

    since = time.monotonic()
    try:
        registry = load_registry()
        recipe = check(Source(task.path, dict(task.recipe), {}), registry)
        plan = make_plan(recipe, task.path.parent, registry, keeps_samples=task.keeps_samples)
        execute(plan, task.out, progress, task.until, Sharing(task.sweep, models))
        found = _found(task.out) if task.until == "report" else f"stopped after {task.until}"
    except RefusalkitError as error:
        return Ended(time.monotonic() - since, error=error)
    return Ended(time.monotonic() - since, found=found)


def _found(folder: Path) -> str:
    from refusalkit.report.finding import sentence
    from refusalkit.run_directory import read_run

    run = read_run(folder)
    return sentence(run.choice, run.evaluation, repairs=run.candidates.repairs)


def _stop(*_: object) -> None:
    raise Stopped


def _end_with_parent() -> None:
    """End at once when the parent is gone: nobody would ever hear of the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
