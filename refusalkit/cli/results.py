"""Offer what is done with finished runs: report, compare, convert, and hold against a published one."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from refusalkit.cli.shared import execute, folder_of
from refusalkit.errors import InputError


class Form(StrEnum):
    """Name what a report may be written as."""

    html = "html"
    md = "md"
    json = "json"
    csv = "csv"


class Done(StrEnum):
    """Name what a file may do with a direction."""

    ablate = "ablate"
    steer = "steer"


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    show_completions: Annotated[
        bool, typer.Option("--show-completions", help="Show completions to harmful prompts; redacted otherwise.")
    ] = False,
    form: Annotated[
        Form, typer.Option("--format", help="A page, Markdown, all as JSON, or numbers as CSV.")
    ] = Form.html,
) -> None:
    """Write a run's report again, without a model: report.html in its folder, or .md, .json or .csv."""
    from refusalkit.pipeline import write_report

    print(write_report(folder, show_completions=show_completions, form=form.value))


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Finished runs' folders; a sweep's stands for all its runs.")
    ],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("comparison.html"),
) -> None:
    """Compare runs: a table here, and a page with charts, costs and paired tests against the first run.

    Runs are tested against each other where their test prompts are the same, prompt by prompt.
    """
    from refusalkit.report.comparison import compare as compare_runs
    from refusalkit.report.comparison_page import write_comparison
    from refusalkit.report.comparison_text import text

    comparison = compare_runs(folders)
    write_comparison(comparison, out)
    print(text(comparison))
    print(out, file=sys.stderr)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A finished run's folder, or a file or folder.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The new file, or the new folder.")],
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="The format, where TARGET's name leaves it open.")
    ] = None,
    operation: Annotated[
        Done | None, typer.Option("--as", help="What is done with the direction, where files leave it open.")
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="The layer, where SOURCE has several or none.")] = None,
    position: Annotated[
        int | None, typer.Option(max=-1, help="The position, where SOURCE has several or none.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A hub name, a folder or tiny:FAMILY, where SOURCE names none.")
    ] = None,
    scale: Annotated[float | None, typer.Option(metavar="NUMBER", help="Multiples of the direction to add.")] = None,
) -> None:
    """Write a direction in the format of another tool, or read one, and say what the format does not hold.

    Formats are told by name and content: run folders and safetensors of refusalkit, the paper's authors' runs, GGUF
    control vectors, GLP, PEFT LoRA, lm-eval's `steered` and `.svec`.
    """
    from refusalkit.checkpoint import quiet
    from refusalkit.interchange.content import Wanted
    from refusalkit.interchange.convert import convert as write_as
    from refusalkit.registry import load_registry

    quiet()
    wanted = Wanted(layer, position, model, None if operation is None else operation.value, scale)
    print(write_as(source, target, to, wanted, load_registry()), file=sys.stderr)
    print(target)


def reproduce(
    model: Annotated[str, typer.Argument(help="gemma-2b-it, llama-2-7b-chat, llama-3-8b-instruct or yi-6b-chat.")],
    weights: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The checkpoint; by default the hub's, where it is cached.")
    ] = None,
    prompts: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder `dataset` of the authors' repository.")
    ] = Path("refusal_direction/dataset"),
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/arditi-MODEL.")] = None,
    finished: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Compare this finished run and run nothing.")
    ] = None,
) -> None:
    """Repeat a published run of Arditi et al. (2024) and compare: ours, the authors' artefact, the paper.

    Where the weights are not on this machine it prints what it would compare and the recipe, with exit status 1.
    """
    from refusalkit.checkpoint import quiet
    from refusalkit.registry import load_registry
    from refusalkit.reproduction.published import published
    from refusalkit.reproduction.repeat import compared, plan_repetition

    quiet()
    record, registry = published(model), load_registry()
    if finished is not None and (weights is not None or out is not None):
        raise InputError("a finished run needs no weights and no --out", where="--run", hint="leave them out")
    if finished is None:
        plan = plan_repetition(record, weights, prompts, registry)
        if plan is None:
            print(compared(record, None, registry))
            print(f"\nThe recipe:\n\n```yaml\n{record.recipe.read_text(encoding='utf-8')}```")
            _say_what_is_missing(record.hub, model)
            raise typer.Exit(1)
        finished = folder_of(plan, out)
        execute(plan, finished)
    print(compared(record, finished, registry))


def _say_what_is_missing(hub: str, model: str) -> None:
    from refusalkit.builtin.arditi import COMMIT, REPOSITORY

    print(
        f"nothing was compared: the weights of {hub} are not on this machine. Where they are:\n"
        f"  hf download {hub}\n"
        f"  git clone {REPOSITORY} && git -C refusal_direction checkout {COMMIT}\n"
        f"  refusalkit reproduce {model}",
        file=sys.stderr,
    )
