"""Offer everything on the command line.

stdout is data, stderr is talk. Exit status 0: done; 1: the run failed or could not mean anything; 2: bad input.
Commands import what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refusalkit import safety_commands
from refusalkit.errors import InputError, Interrupted, RefusalkitError
from refusalkit.plugin_commands import Commands, plugin_app

if TYPE_CHECKING:
    from refusalkit.batch import Batch
    from refusalkit.plan import Plan
    from refusalkit.recipe import Recipe
    from refusalkit.registry import Registry

app = typer.Typer(
    name="refusalkit",
    cls=Commands,
    help="Find, measure and repair the refusal direction of language models, from a recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tiny_app = typer.Typer(help="The embedded models: small enough to try everything, no evidence about real ones.")
app.add_typer(tiny_app, name="tiny")
ndif_app = typer.Typer(help="Servers that run models for others: NDIF, or your own.", no_args_is_help=True)
app.add_typer(ndif_app, name="ndif")
app.add_typer(plugin_app, name="plugin")


class Until(StrEnum):
    """Name where a run may stop."""

    prompts = "prompts"
    capture = "capture"
    find = "find"  # type: ignore[assignment]
    select = "select"
    evaluate = "evaluate"
    analyze = "analyze"
    report = "report"


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


RecipePaths = Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes in YAML.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set model.dtype=float32")
]


def main() -> None:
    """Run the command line and turn errors into messages and exit statuses."""
    signal.signal(signal.SIGINT, _interrupt)
    # Threads that spin while they wait make a run five times slower on a machine whose cores are shared. Read by the
    # OpenMP runtime when torch is imported, so it has to be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except RefusalkitError as error:
        _say(error)
        sys.exit(error.exit_status)
    except Interrupted as stop:
        print(f"\ninterrupted; {stop}", file=sys.stderr)
        sys.exit(130)


def _interrupt(*_: object) -> None:
    raise Interrupted("finished stages are kept, and the same command goes on from there")


def _say(error: RefusalkitError) -> None:
    print(f"error: {error}", file=sys.stderr)


def _load(recipe: Path, settings: list[str] | None) -> tuple[Recipe, Registry]:
    from refusalkit.recipe_file import load_recipe
    from refusalkit.registry import load_registry

    registry = load_registry()
    return load_recipe(recipe, registry, settings or ()), registry


def _plan(recipe: Path, settings: list[str] | None) -> Plan:
    checked, registry = _load(recipe, settings)
    from refusalkit.checkpoint import quiet
    from refusalkit.plan import make_plan

    quiet()
    return make_plan(checked, recipe.parent, registry)


def _out(plan: Plan, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / plan.recipe.name


def _plan_all(recipes: list[Path], settings: list[str] | None, out: Path | None) -> list[Batch]:
    """Plan every run that the recipes ask for, and say of each recipe what is wrong with it."""
    from refusalkit.batch import check_folders, plan_batch
    from refusalkit.checkpoint import quiet
    from refusalkit.registry import load_registry

    if out is not None and len(recipes) > 1:
        raise InputError(
            "several recipes need several folders", where="--out", hint="leave it out: they go to runs/NAME"
        )
    quiet()
    registry, batches, errors = load_registry(), [], []
    for path in recipes:
        try:
            batches.append(plan_batch(path, settings or (), out, registry))
        except InputError as error:
            errors.append(error)
    for found in errors[:-1]:
        _say(found)
    if errors:
        raise errors[-1]
    check_folders(batches)
    return batches


@app.command()
def run(
    recipes: RecipePaths,
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/NAME.")] = None,
    until: Annotated[Until, typer.Option(help="Stop after this stage.")] = Until.report,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at a time, each in a process of its own.")] = 1,
    settings: Settings = None,
) -> None:
    """Run recipes: find a direction, choose one, measure what it does, write a report.

    Finished stages are kept: an interrupted run goes on where it stopped. Several recipes, and the runs of a sweep, are
    all checked before the first starts; one that fails stops no other, and a table at the end says how each ended. A
    sweep ends in a comparison of its runs.
    """
    batches = _plan_all(recipes, settings, out)
    if len(batches) > 1 or batches[0].is_sweep:
        from refusalkit.many import run_batches

        raise typer.Exit(run_batches(batches, until.value, jobs))
    (planned,) = batches[0].runs
    _execute(planned.plan, planned.out, until)
    if until is Until.report:
        print(planned.out / "report.html")


def _execute(plan: Plan, folder: Path, until: Until = Until.report) -> None:
    from refusalkit.pipeline import execute
    from refusalkit.progress import progress

    with progress() as shown:
        execute(plan, folder, shown, until.value)
    if until is Until.report:
        from refusalkit.report.finding import left_out, sentence
        from refusalkit.run_directory import read_run

        finished = read_run(folder)
        print(sentence(finished.choice, finished.evaluation, repairs=finished.candidates.repairs), file=sys.stderr)
        if missing := left_out(finished.evaluation):
            print(missing, file=sys.stderr)


@app.command()
def plan(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option(help="The run's folder, to see what is already done there.")] = None,
    settings: Settings = None,
) -> None:
    """Show what a recipe would do, before any weight is loaded."""
    (batch,) = _plan_all([recipe], settings, out)
    from refusalkit.plan_text import describe, describe_sweep

    planned = batch.runs[0]
    print(describe_sweep(batch) if batch.is_sweep else describe(planned.plan, planned.out))


@app.command()
def validate(recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes to check.")]) -> None:
    """Check recipes without running anything."""
    from refusalkit.recipe_file import load_members
    from refusalkit.registry import load_registry

    registry = load_registry()
    failed = False
    for path in recipes:
        try:
            members = load_members(path, registry)
        except InputError as error:
            failed = True
            _say(error)
        else:
            print(f"{path}: ok" + (f", {len(members)} runs" if members[0].run else ""))
    if failed:
        raise typer.Exit(2)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, installed plugins included."""
    import json

    from refusalkit.recipe import json_schema
    from refusalkit.registry import load_registry

    print(json.dumps(json_schema(load_registry()), indent=2))


@app.command()
def plugins() -> None:
    """List every plugin, its version, whether it works, and all it provides; of a broken one, its error.

    Exit status 1 says that one is broken. The others work all the same.
    """
    from refusalkit.plugin.listing import plugin_list
    from refusalkit.registry import load_registry

    registry = load_registry()
    print(plugin_list(registry))
    if registry.broken:
        raise typer.Exit(1)


@app.command()
def adapters(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A hub name, a folder or tiny:FAMILY.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Check this adapter, not the one that fits.")] = None,
) -> None:
    """List the architectures that can be studied, or check the adapter of a model on its weights, in float32.

    Exit status 1 says that a law of adapters does not hold there: results on this model would be wrong.
    """
    from refusalkit.adapter_check import adapter_table, check_checkpoint, check_text
    from refusalkit.registry import load_registry

    registry = load_registry()
    if model is None:
        print(adapter_table(registry))
        return
    from refusalkit.checkpoint import open_checkpoint, quiet
    from refusalkit.recipe import ModelSection

    quiet()
    checkpoint = open_checkpoint(ModelSection(id=model, adapter=adapter, dtype="float32"), registry)
    laws = check_checkpoint(checkpoint)
    print(check_text(checkpoint, registry, laws))
    if not all(law.holds for law in laws):
        raise typer.Exit(1)


@app.command()
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


@app.command()
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


@app.command()
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
        finished = _out(plan, out)
        _execute(plan, finished)
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


@app.command()
def bake(
    source: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or a finished run's folder.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes; a new folder.")],
    settings: Settings = None,
) -> None:
    """Write a checkpoint with the direction removed from its weights, and a model card that says so."""
    is_run = source.is_dir()
    recipe = source / "recipe.yaml" if is_run else source
    if is_run and not recipe.is_file():
        raise InputError("the folder holds no run", where=str(source), hint="name a recipe, or a run's folder")
    if is_run:
        # The prompts are not needed again, and may lie elsewhere.
        checked, registry = _load(recipe, settings)
        from refusalkit.checkpoint import open_checkpoint, quiet

        quiet()
        folder, checkpoint = source, open_checkpoint(checked.model, registry)
    else:
        made = _plan(recipe, settings)
        folder, checkpoint = _out(made, None), made.checkpoint
        _execute(made, folder, Until.select)
    from refusalkit.artifacts import Choice
    from refusalkit.bake import bake as write_checkpoint
    from refusalkit.store import Store

    choice = Store(folder).load(Choice)
    if choice is None:
        raise InputError("the run has not chosen a direction yet", where=str(folder), hint="run its recipe first")
    edited = write_checkpoint(checkpoint, choice, out)
    print(f"{len(edited.names)} parameters changed", file=sys.stderr)
    print(out)


@ndif_app.callback()
def ndif() -> None:
    """Servers that run models for others: NDIF, or your own."""


@ndif_app.command("status")
def ndif_status(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="Say whether its model can run.")] = None,
    host: Annotated[str | None, typer.Option(help="The server; by default NDIF_HOST or nnsight's own.")] = None,
    settings: Settings = None,
) -> None:
    """Show what an NDIF server hosts and how its versions differ; nothing is sent to be run.

    Exit status 1 says that the server cannot be reached.
    """
    from refusalkit.engine.server import chosen_host

    plan = None
    if recipe is not None:
        chosen = [] if host is None else [f"model.host={host}"]
        plan = _plan(recipe, [*(settings or ()), "model.where=ndif", *chosen])
    address = plan.host if plan is not None and plan.host is not None else chosen_host(host)
    from refusalkit.engine.status import look
    from refusalkit.server_status import status_text

    print(status_text(look(address), plan))


app.command()(safety_commands.monitor)
app.command()(safety_commands.audit)


@app.command()
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


@tiny_app.command("train")
def tiny_train(
    family: Annotated[str, typer.Argument(help="llama, gemma, qwen or yi.")],
    out: Annotated[Path | None, typer.Option(help="Where the checkpoint goes; by default tiny-FAMILY.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of lessons.")] = 0,
) -> None:
    """Train an embedded model from a seed, as the shipped one was."""
    from refusalkit import tiny

    tiny.checkpoint(family)
    from refusalkit.checkpoint import quiet
    from refusalkit.progress import progress
    from refusalkit.tiny.train import train

    quiet()
    folder = out if out is not None else Path(f"tiny-{family}")
    with progress() as shown:
        shown.stage("train", "running")
        made = train(family, folder, seed=seed, progress=lambda step, steps, _: shown.advance("steps", step, steps))
        shown.stage("train", "done")
    print(
        f"refuses {made.harmful_refusal_rate:.0%} of harmful and {made.harmless_refusal_rate:.0%} of harmless requests",
        file=sys.stderr,
    )
    print(folder)
