"""Run work on a server in few jobs, none larger than the server allows, and lose none.

Work is cut into jobs that are handed in one after the other, so that others get their turn. A server that ends a job
because it takes too long has shown its limit: from then on jobs are half as large as the one that was ended.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from refusalkit.engine.ledger import Ledger, Record, Results, key_of
from refusalkit.engine.server import LostError, Server, TooMuchError, UnavailableError, Update
from refusalkit.engine.work import Part, Task
from refusalkit.errors import RunError
from refusalkit.selector import Advance

#: Tokens that pass through the model in one job, until a server shows a smaller limit.
MOST_WORK = float(2**20)
#: How often a job is handed in again after the server lost it.
MOST_RESUBMISSIONS = 3
#: Seconds that a job may be unknown to the server after it was handed in: its first state is written a moment later.
UNKNOWN_FOR = 10.0
#: Seconds without news of a job, after the server was away, until it counts as lost.
SILENT_FOR = 1800.0


@dataclass(frozen=True, eq=False)
class Call:
    """Ask for one task; the items can be divided among jobs."""

    task: Task
    items: tuple[Any, ...]
    fixed: tuple[Any, ...]
    work: float
    """What each item costs, in tokens that pass through the model."""


#: (which call, its first item, the item after its last)
Slice = tuple[int, int, int]


def cut(calls: Sequence[Call], most: float) -> list[list[Slice]]:
    """Divide calls into jobs of at most `most` work, in order; an item that is larger is a job of its own."""
    jobs: list[list[Slice]] = [[]]
    room = most
    for number, call in enumerate(calls):
        start = 0
        while start < len(call.items):
            fits = min(len(call.items) - start, max(0, int(room // call.work)))
            if fits == 0 and jobs[-1]:
                jobs.append([])
                room = most
                continue
            taken = max(1, fits)
            jobs[-1].append((number, start, start + taken))
            start += taken
            room -= taken * call.work
    return [job for job in jobs if job]


@dataclass(frozen=True)
class Patience:
    """Say how long to go on trying while the server is away, in seconds."""

    limit: float = 600.0
    longest_pause: float = 30.0


class Jobs:
    """Run calls on a server."""

    def __init__(
        self,
        server: Server,
        model: Any,
        ledger: Ledger,
        tell: Callable[[str], None] = lambda said: None,
        patience: Patience = Patience(),
    ) -> None:
        self.server = server
        self.model = model
        self.ledger = ledger
        self.tell = tell
        self.patience = patience
        self.limit = ledger.limit()
        self._name = ""
        self._was_away = False

    def run(self, calls: Sequence[Call], advance: Advance | None = None) -> Results:
        """Return one result a call; raises `RunError` where the server cannot or may not do it."""
        found: list[Any] = [None] * len(calls)
        pending = cut(calls, self.limit or MOST_WORK)
        total, finished = len(pending), 0
        while pending:
            job = pending[0]
            self._name = f"job {finished + 1} of {total}"
            try:
                results = self.finish([_part(calls[number], start, stop) for number, start, stop in job])
            except TooMuchError as error:
                pending = self._smaller(calls, pending, error)
                total = finished + len(pending)
                continue
            for (number, _, _), result in zip(job, results, strict=True):
                found[number] = result if found[number] is None else found[number] + result
            pending = pending[1:]
            finished += 1
            if advance is not None:
                advance(finished, total)
        return found

    def close(self) -> dict[str, int]:
        """Forget the jobs of a stage that is finished; return how many there were and the bytes they moved."""
        totals = self.ledger.totals()
        self.ledger.clear(self.limit)
        return totals

    def _smaller(
        self, calls: Sequence[Call], pending: Sequence[Sequence[Slice]], error: TooMuchError
    ) -> list[list[Slice]]:
        """Cut what is left again, into jobs half as large as the one that the server ended."""
        job = pending[0]
        if sum(stop - start for _, start, stop in job) == 1:
            raise RunError(
                f"the smallest piece of work is more than the server allows: {error.message}",
                where=error.where,
                hint="lower `model.batch_size`, or use fewer or shorter prompts",
            ) from None
        work = sum((stop - start) * calls[number].work for number, start, stop in job)
        self.limit = work / 2
        self.tell(f"{error.message} Jobs are half as large from now on.")
        rest = [each for smaller in pending for each in smaller]
        parts = [replace(calls[number], items=calls[number].items[start:stop]) for number, start, stop in rest]
        return [
            [(rest[n][0], rest[n][1] + start, rest[n][1] + stop) for n, start, stop in smaller]
            for smaller in cut(parts, self.limit)
        ]

    def finish(self, parts: Sequence[Part]) -> Results:
        """Return a job's results: the kept ones, those of a job handed in earlier, or those of a new one."""
        key = key_of(self.server.model_key, parts)
        kept = self.ledger.results(key)
        if kept is not None:
            return kept
        record = self.ledger.record(key)
        while True:
            if record is None or record.host != self.server.host or record.lost:
                lost = 0 if record is None else record.resubmitted
                job, sent = self.patiently(lambda: self.server.hand_in(self.model, parts))
                record = Record(job, self.server.host, sent, resubmitted=lost)
                self.ledger.write(key, record)
            try:
                return self._collect(key, record, len(parts))
            except LostError as error:
                record = replace(record, lost=True, resubmitted=record.resubmitted + 1)
                self.ledger.write(key, record)
                if record.resubmitted > MOST_RESUBMISSIONS:
                    raise RunError(
                        f"{error.message} ({record.resubmitted} times)", where=error.where, hint=error.hint
                    ) from None
                self.tell(f"{error.message}; it is handed in again")
            except TooMuchError as error:
                self.ledger.write(key, replace(record, ended=error.message))
                raise

    def _collect(self, key: str, record: Record, n_parts: int) -> Results:
        """Wait for a job and keep its results."""
        if record.ended is not None:
            raise TooMuchError(record.ended, where=self.server.host)
        url = self._wait(record.id)
        results, received = self.patiently(lambda: self.server.fetch(url))
        if len(results) != n_parts:
            raise RunError("the server's answer is not what was asked for", where=self.server.host)
        self.ledger.keep(key, results)
        self.ledger.write(key, replace(record, bytes_down=received))
        return results  # type: ignore[no-any-return]

    def _wait(self, job: str) -> str:
        """Ask after a job until it is finished; return where its result lies."""
        pause, since = 0.1, time.monotonic()
        last: Update | None = None
        self._was_away = False
        while True:
            update: Update | None = self.patiently(lambda: self.server.ask(job))
            if update is not None and update.url is not None:
                return update.url
            silent = time.monotonic() - since
            if update is None and (last is not None or silent > UNKNOWN_FOR):
                raise LostError("the server no longer knows the job", where=self.server.host)
            if update is not None and update != last:
                self.tell(f"{self._name}: {update.said or update.state}")
                last, since, pause = update, time.monotonic(), 0.1
            elif self._was_away and silent > SILENT_FOR:
                raise LostError("the server has said nothing of the job since it was away", where=self.server.host)
            time.sleep(pause)
            pause = min(2.0, pause * 1.3)

    def patiently(self, attempt: Callable[[], Any]) -> Any:
        """Try until it works, pausing longer each time, or until the server has been away for too long."""
        pause, since = 1.0, time.monotonic()
        while True:
            try:
                return attempt()
            except UnavailableError as error:
                if time.monotonic() - since + pause > self.patience.limit:
                    raise
                self._was_away = True
                self.tell(f"{error.message}; trying again in {pause:.0f} s")
                # Not all clients at the same moment.
                time.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(self.patience.longest_pause, 2 * pause)


def _part(call: Call, start: int, stop: int) -> Part:
    return call.task, call.items[start:stop], call.fixed
