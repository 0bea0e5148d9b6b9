"""Run many recipes: in processes of their own, one at a time or several, and what fails stops nothing else.

A process executes one run after another and keeps the model in memory for the next that asks for it. Where it is
killed, its run has failed, and a new process takes the rest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from refusalkit.artifacts import Choice
from refusalkit.batch import Batch
from refusalkit.errors import InputError, RefusalkitError, RunError
from refusalkit.progress import Board, Progress, board
from refusalkit.report.wording import count, duration
from refusalkit.sharing import TURNS, hold
from refusalkit.store import Store, cannot_write
from refusalkit.sweep_folder import write_sweep
from refusalkit.worker import Ended, Task, serve

#: Seconds a process is given to clean up before it is killed.
PATIENCE = 10.0
_LOG_LINES = 15
_LONGEST_NAME = 38


def run_batches(batches: Sequence[Batch], until: str, jobs: int) -> int:
    """Run everything, say at the end how each run went, compare the runs of sweeps, and return the exit status."""
    tasks = [task for batch in batches for task in _tasks(batch, until)]
    ended: dict[str, Ended] = {}
    with sweep_folders(batches):
        try:
            run_all(tasks, jobs, ended)
        finally:
            print(f"\n{table(tasks, ended)}", file=sys.stderr)
        if until == "report":
            for batch in batches:
                _print_result(batch, ended)
    return exit_status(list(ended.values()))


def run_all(tasks: Sequence[Task], jobs: int, ended: dict[str, Ended]) -> None:
    """Execute every task, at most `jobs` at a time, and note in `ended` under its name how it ended.

    What was interrupted is not in there. The processes are gone when this returns, however it does.
    """
    with board() as shown, tempfile.TemporaryDirectory() as logs:
        pool = Pool(Path(logs), min(jobs, len(tasks)), shown)
        try:
            pool.work(list(tasks), ended)
        finally:
            pool.stop()


def exit_status(ended: Sequence[Ended]) -> int:
    """Return 0 where all went well, 2 where whatever went wrong was bad input, else 1."""
    errors = [end.error for end in ended if end.error is not None]
    if not errors:
        return 0
    return InputError.exit_status if all(isinstance(error, InputError) for error in errors) else RunError.exit_status


def table(tasks: Sequence[Task], ended: Mapping[str, Ended]) -> str:
    """Say in a line of 80 columns a run how each ended, how long it took, and what it found or why it failed."""
    rows = []
    for task in tasks:
        end = ended.get(task.name)
        state = "not finished" if end is None else "failed" if end.error else "done"
        name = task.name if len(task.name) <= _LONGEST_NAME else f"…{task.name[1 - _LONGEST_NAME :]}"
        rows.append((name, state, duration(end.seconds) if end else "", _outcome(task, end)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    counts = Counter(state for _, state, *_ in rows)
    summary = ", ".join(f"{counts[state]} {state}" for state in ("done", "failed", "not finished") if counts[state])
    return "\n".join([*(line[:80].rstrip() for line in lines), f"{count(len(tasks), 'run')}: {summary}"])


def _outcome(task: Task, end: Ended | None) -> str:
    if end is None:
        return ""
    if end.error is not None:
        return ": ".join(filter(None, [end.error.where, end.error.message.partition("\n")[0]]))
    choice = Store(task.out).load(Choice)
    return f"layer {choice.layer}, position {choice.position}" if choice else f"until {task.until}"


def _print_result(batch: Batch, ended: Mapping[str, Ended]) -> None:
    """Print the path of the page to read: the report of a run, the comparison of a sweep."""
    done = [run.out for run in batch.runs if run.plan.recipe.name in ended and not ended[run.plan.recipe.name].error]
    if len(done) == 1:
        print(done[0] / "report.html")
    elif done:
        from refusalkit.report.comparison import compare
        from refusalkit.report.comparison_page import write_comparison
        from refusalkit.report.comparison_text import text

        comparison = compare([batch.folder])
        write_comparison(comparison, batch.folder / "comparison.html")
        print(f"\n{text(comparison)}\n", file=sys.stderr)
        print(batch.folder / "comparison.html")


def _tasks(batch: Batch, until: str) -> Iterator[Task]:
    for run in batch.runs:
        yield Task(
            name=run.plan.recipe.name,
            path=batch.path,
            recipe=run.plan.recipe.model_dump(mode="json", serialize_as_any=True),
            out=run.out,
            sweep=batch.folder if batch.is_sweep else None,
            keeps_samples=run.plan.keeps_samples,
            until=until,
        )


@contextmanager
def sweep_folders(batches: Sequence[Batch]) -> Iterator[None]:
    """Make the folders of sweeps and keep other processes out of them."""
    with ExitStack() as stack:
        for batch in batches:
            if not batch.is_sweep:
                continue
            try:
                batch.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(batch.folder, error) from None
            stack.enter_context(hold(batch.folder))
            stack.callback(shutil.rmtree, batch.folder / TURNS, ignore_errors=True)
            write_sweep(batch.folder, {str(run.member.run): run.member.values for run in batch.runs})
        yield


@dataclass
class Worker:
    """Hold one process and what it is doing."""

    process: SpawnProcess
    log: Path
    task: Task | None = None
    model: Any = None
    """The section `model` of its last recipe."""
    progress: Progress | None = None
    stage: str = ""
    """Which stage it is in."""
    read: int = 0
    """How much of the log is about earlier runs."""


@dataclass
class Pool:
    """Hand out tasks to processes and hear how they go."""

    logs: Path
    size: int
    shown: Board
    workers: dict[Connection, Worker] = field(default_factory=dict)
    started: int = 0

    def work(self, waiting: list[Task], ended: dict[str, Ended]) -> None:
        """Work until nothing is waiting or under way."""
        while waiting or any(worker.task for worker in self.workers.values()):
            idle = [connection for connection, worker in self.workers.items() if worker.task is None]
            while waiting and (idle or len(self.workers) < self.size):
                self._give(idle.pop() if idle else self._start(), waiting)
            for ready in wait(list(self.workers)):
                assert isinstance(ready, Connection)
                worker = self.workers[ready]
                end = self._hear(ready, worker)
                if end is not None and worker.task is not None:
                    ended[worker.task.name] = end
                    self._say(worker, worker.task, end)
                    worker.task = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = self.logs / str(self.started)
        self.started += 1
        process = context.Process(target=serve, args=(theirs, log, _threads(self.size)))
        # Born deaf to Ctrl-C, which reaches every process of the terminal: this one decides when the others stop.
        with _deaf():
            process.start()
        theirs.close()
        self.workers[ours] = Worker(process, log)
        return ours

    def _give(self, connection: Connection, waiting: list[Task]) -> None:
        """Hand out the next task, if there is one with the model that the process has in memory."""
        worker = self.workers[connection]
        task = next((task for task in waiting if task.recipe["model"] == worker.model), waiting[0])
        waiting.remove(task)
        worker.task, worker.model, worker.progress = task, task.recipe["model"], self.shown.follow(task.name)
        worker.read = worker.log.stat().st_size if worker.log.exists() else 0
        # A process that has died meanwhile is heard of when it is listened to.
        with contextlib.suppress(BrokenPipeError):
            connection.send(task)

    def _hear(self, connection: Connection, worker: Worker) -> Ended | None:
        """Pass one message on, and return how the run ended where that is what it says."""
        try:
            message = connection.recv()
        except EOFError:
            worker.process.join()
            connection.close()
            del self.workers[connection]
            return Ended(float("nan"), error=_died(worker))
        if isinstance(message, Ended):
            return message
        kind, *details = message
        assert worker.progress is not None
        if kind == "stage":
            worker.stage = details[0]
        told: dict[str, Callable[..., None]] = {
            "stage": worker.progress.stage,
            "advance": worker.progress.advance,
            "state": worker.progress.state,
        }
        told[kind](*details)
        return None

    def _say(self, worker: Worker, task: Task, end: Ended) -> None:
        if end.error is not None:
            if worker.progress is not None and worker.stage:
                worker.progress.stage(worker.stage, "failed")
            self.shown.say(f"{task.name}: error: {end.error}")
        elif task.until == "report":
            self.shown.say(f"{task.name}: {end.found}")

    def stop(self) -> None:
        """End every process: those that are at work are told to, and killed where they do not listen."""
        with _deaf():
            for connection, worker in self.workers.items():
                if worker.task is not None:
                    worker.process.terminate()
                connection.close()
            for worker in self.workers.values():
                worker.process.join(PATIENCE)
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()


@contextmanager
def _deaf() -> Iterator[None]:
    """Hear no Ctrl-C for a moment."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _threads(processes: int) -> int | None:
    """Return how many threads each of several processes should compute with; one process alone decides for itself."""
    return None if processes == 1 else max(1, _cores() // processes)


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _died(worker: Worker) -> RefusalkitError:
    """Say how a process ended that did not say so itself."""
    status = worker.process.exitcode or 0
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    said = worker.log.read_bytes()[worker.read :].decode(errors="replace") if worker.log.exists() else ""
    lines = said.strip().splitlines()[-_LOG_LINES:]
    return RunError(
        "\n".join([f"its process was {how}" if status < 0 else f"its process {how}", *lines]),
        hint="SIGKILL mostly means that memory ran out: run fewer at a time with --jobs"
        if status == -signal.SIGKILL
        else "this is a fault of refusalkit or of a plugin",
    )
