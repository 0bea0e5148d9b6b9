"""Offer to look at models: their adapters, the embedded ones, and what a server hosts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from refusalkit.cli.shared import Settings, plan_of

tiny_app = typer.Typer(help="The embedded models: small enough to try everything, no evidence about real ones.")
ndif_app = typer.Typer(help="Servers that run models for others: NDIF, or your own.", no_args_is_help=True)


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
        plan = plan_of(recipe, [*(settings or ()), "model.where=ndif", *chosen])
    address = plan.host if plan is not None and plan.host is not None else chosen_host(host)
    from refusalkit.engine.status import look
    from refusalkit.server_status import status_text

    print(status_text(look(address), plan))


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
