"""Show how far a run is, on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """Follow the stages of a run."""

    def stage(self, name: str, state: str) -> None:
        """Say that a stage starts (`running`), has ended (`done`) or need not run (`kept`, or `shared` with another
        run), or that it is `waiting` for a run that computes the same."""

    def advance(self, what: str, done: int, total: int) -> None:
        """Say how far a part of the stage is."""

    def state(self, said: str) -> None:
        """Say what is waited for: where a job is in a server's queue, or that the server is away."""


class Silent:
    """Show nothing, for use from Python."""

    def stage(self, name: str, state: str) -> None:
        """Show nothing."""

    def advance(self, what: str, done: int, total: int) -> None:
        """Show nothing."""

    def state(self, said: str) -> None:
        """Show nothing."""


class Lines:
    """Write a plain line when a stage starts and ends, and every few seconds between."""

    interval = 10.0

    def __init__(self, run: str = "") -> None:
        self._run = f"{run}: " if run else ""
        self._stage = ""
        self._since = time.monotonic()
        self._shown = self._since

    def stage(self, name: str, state: str) -> None:
        """Write one line a change."""
        now = time.monotonic()
        if state == "running":
            self._stage, self._since, self._shown = name, now, now
            self._say(f"{name}: running")
        elif state == "done":
            self._say(f"{name}: done in {now - self._since:.1f} s")
        else:
            self._say(f"{name}: {state}")

    def advance(self, what: str, done: int, total: int) -> None:
        """Write a line when the last one is old."""
        now = time.monotonic()
        if now - self._shown >= self.interval:
            self._shown = now
            self._say(f"{self._stage}: {what} {done}/{total}")

    def _say(self, text: str) -> None:
        print(self._run + text, file=sys.stderr, flush=True)

    def state(self, said: str) -> None:
        """Write every state: there are few, and each may last for hours."""
        self._say(f"{self._stage}: {said}")


class Bars:
    """Draw one bar for each part of a stage, with its rate and the time left."""

    def __init__(self, display: Any, run: str = "") -> None:
        self._display = display
        self._run = f"{run}: " if run else ""
        self._stage = ""
        self._since = time.monotonic()
        self._tasks: dict[tuple[str, str], Any] = {}

    def stage(self, name: str, state: str) -> None:
        """Write one line above the bars when a stage has ended."""
        if state == "running":
            self._stage, self._since = name, time.monotonic()
            self._tasks[name, ""] = self._display.add_task(self._run + name, total=None)
            return
        for (stage, _), task in list(self._tasks.items()):
            if stage == name:
                self._display.remove_task(task)
                del self._tasks[stage, _]
        took = f"done in {time.monotonic() - self._since:.1f} s" if state == "done" else state
        self._display.console.print(f"{self._run}{name:<9} {took}", highlight=False, markup=False)

    def advance(self, what: str, done: int, total: int) -> None:
        """Move the bar of `what`, making it first if need be."""
        key = (self._stage, what)
        if key not in self._tasks:
            waiting = self._tasks.pop((self._stage, ""), None)
            if waiting is not None:
                self._display.remove_task(waiting)
            self._tasks[key] = self._display.add_task(f"{self._run}{self._stage}: {what}", total=total)
        self._display.update(self._tasks[key], completed=done, total=total)

    def state(self, said: str) -> None:
        """Show the state behind the name of the bar that moved last, or of the stage."""
        mine = [task for (stage, _), task in self._tasks.items() if stage == self._stage]
        if mine:
            self._display.update(mine[-1], description=f"{self._stage}: {said}")


class Board:
    """Show how far several runs are, all in one place."""

    def __init__(self, display: Any = None) -> None:
        self._display = display

    def follow(self, run: str) -> Progress:
        """Return what shows one run; its name stands before everything said of it, and may be empty."""
        return Lines(run) if self._display is None else Bars(self._display, run)

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self._display is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._display.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def board() -> Iterator[Board]:
    """Choose bars or lines by where stderr goes."""
    if not sys.stderr.isatty():
        yield Board()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        yield Board(display)


@contextmanager
def progress() -> Iterator[Progress]:
    """Show how far one run is."""
    with board() as shown:
        yield shown.follow("")
