"""Offer what safety teams need: watch prompts, and hold a checkpoint to thresholds."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refusalkit.cli.shared import Settings
from refusalkit.errors import InputError, Interrupted

if TYPE_CHECKING:
    from refusalkit.monitor.fit import Monitor


class Score(StrEnum):
    """Name how a prompt is scored."""

    projection = "projection"
    latent_guard = "latent_guard"


def monitor(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one with a copy of its monitor/.")],
    prompts: Annotated[
        str | None,
        typer.Argument(metavar="PROMPTS", help="A JSONL file, or - for stdin; left out, the detector is described."),
    ] = None,
    fpr: Annotated[float, typer.Option(help="The share of harmless prompts that may be flagged.")] = 0.05,
    score: Annotated[Score, typer.Option(help="What a prompt is scored by.")] = Score.projection,
    settings: Settings = None,
) -> None:
    """Score prompts as they come and flag those that look harmful to the model, with a detector made from a run.

    A line in is `{"prompt": ...}` or `{"messages": [...]}`, a line out `{"line", "score", "flagged", "threshold"}`. A
    line that cannot be read gives `{"line", "error"}` and, at the end, exit status 2.
    """
    from refusalkit.checkpoint import quiet
    from refusalkit.monitor.detector import card, sentence
    from refusalkit.monitor.fit import open_monitor, reader_of
    from refusalkit.progress import progress
    from refusalkit.registry import load_registry

    quiet()
    descriptor = None if prompts is None else _opened(prompts)
    with progress() as shown:
        reader = reader_of(folder, load_registry(), settings or (), shown)
        opened = open_monitor(folder, score.value, fpr, reader)
    print(sentence(opened.detector), file=sys.stderr)
    if descriptor is None:
        print(json.dumps(card(opened.detector), indent=1))
    elif unread := _watched(descriptor, opened):
        print(f"lines that could not be read: {unread}; their records say why", file=sys.stderr)
        raise typer.Exit(2)


def _opened(prompts: str) -> int:
    if prompts == "-":
        return sys.stdin.fileno()
    try:
        if Path(prompts).is_dir():
            raise InputError("this is a folder", where=prompts, hint="name a JSONL file, or - for stdin")
        return os.open(prompts, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=prompts, hint="name a JSONL file, or - for stdin"
        ) from None


def _watched(descriptor: int, opened: Monitor) -> int:
    """Write a record a line until the input ends or nobody reads them; return how many lines could not be read."""
    from refusalkit.monitor.stream import lines, records

    written = unread = 0
    try:
        for group in records(lines(descriptor), opened):
            text = "".join(json.dumps(record) + "\n" for record in group)
            # Counted first: a reader may interrupt as soon as it has read them.
            written += len(group)
            unread += sum("error" in record for record in group)
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Interrupted:
        raise Interrupted(f"records written: {written}") from None
    return unread


def audit(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A hub name, a folder or tiny:FAMILY; left out, prints the thresholds."),
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Thresholds in YAML, in place of the default ones.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The audit's folder; by default runs/audit-NAME.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    settings: Settings = None,
) -> None:
    """Measure how brittle a checkpoint's refusals are, and hold it to thresholds.

    Exit status 1 says that a threshold is not kept; the output says which and why. Finished stages are kept. Without
    MODEL it prints the default thresholds, to start a file of your own from.
    """
    from refusalkit.audit.thresholds import default_file, read_thresholds

    if model is None:
        if thresholds is not None or out is not None or as_json or settings:
            raise InputError("there is no model to audit", where="MODEL", hint="a hub name, a folder or tiny:llama")
        print(default_file().read_text(encoding="utf-8"), end="")
        return
    from refusalkit.audit.outcome import document, table
    from refusalkit.audit.run import audit as run_audit
    from refusalkit.audit.run import plan_audit
    from refusalkit.checkpoint import quiet
    from refusalkit.progress import progress
    from refusalkit.registry import load_registry

    quiet()
    registry = load_registry()
    asked = read_thresholds(thresholds or default_file(), registry)
    plan = plan_audit(model, settings or (), registry)
    folder = out if out is not None else Path("runs") / plan.recipe.name
    with progress() as shown:
        outcome = run_audit(plan, folder, asked, shown)
    print(json.dumps(document(outcome), indent=1) if as_json else f"{table(outcome)}\n\n{folder / 'audit.html'}")
    if outcome.failed:
        raise typer.Exit(1)
