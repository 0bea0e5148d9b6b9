"""Refuse, before a weight is loaded, what a recipe asks of a model that a server hosts or whose weights are packed."""

from __future__ import annotations

import importlib.util

from refusalkit.errors import InputError
from refusalkit.recipe import Recipe


def check_remote(recipe: Recipe) -> None:
    """Refuse, before anything is sent, what a server that others use cannot do or must not be asked to."""
    model = recipe.model
    if model.where == "local":
        if model.host is not None:
            raise InputError(
                "names a server, and the model runs on this machine",
                where="model.host",
                hint="add `where: ndif`, or leave it out",
            )
        return
    local = "leave it out, or run with `model.where: local`"
    if edits := [spec.label for spec in recipe.evaluate.interventions if spec.on_weights]:
        raise InputError(
            f"{edits[0]!r} edits weights, and others use the weights of a server's model",
            where="evaluate.interventions",
            hint=local,
        )
    for where, needed in gradients(recipe).items():
        if needed:
            raise InputError(
                "needs gradients, which a server does not compute for code it does not trust", where=where, hint=local
            )
    if reading := [analysis.analysis for analysis in recipe.analyze if analysis.reads_weights]:
        raise InputError(
            f"{reading[0]} reads weights and attention patterns, which stay on the server",
            where="analyze",
            hint=local,
        )
    if many := [analysis.analysis for analysis in recipe.analyze if analysis.follows_interventions]:
        raise InputError(
            f"{many[0]} asks for thousands of answers, more than a shared server is for", where="analyze", hint=local
        )
    if model.quantize != "none":
        raise InputError("the server decides how weights are stored", where="model.quantize", hint=local)


def gradients(recipe: Recipe) -> dict[str, bool]:
    """Say which of the stages that may run backward passes do."""
    return {
        "find": any(strategy.needs_gradients for strategy in recipe.find.strategies),
        "select": recipe.select.needs_gradients,
    }


def check_quantized(recipe: Recipe) -> None:
    """Refuse what packed weights cannot do, and packing without the library for it."""
    if recipe.model.quantize == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "bitsandbytes is not installed",
            where=f"model.quantize {recipe.model.quantize!r}",
            hint="pip install 'refusalkit[quantized]'",
        )
    if edits := [spec.label for spec in recipe.evaluate.interventions if spec.on_weights]:
        raise InputError(
            f"{edits[0]!r} edits weights, and quantized weights cannot be edited",
            where="evaluate.interventions",
            hint="leave it out, or load the model with `quantize: none`",
        )
    if reading := [analysis.analysis for analysis in recipe.analyze if analysis.reads_weights]:
        raise InputError(
            f"{reading[0]} reads weights, and those of a quantized model are packed",
            where="analyze",
            hint="leave it out, or load the model with `quantize: none`",
        )
