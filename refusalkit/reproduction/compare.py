"""Compare a run with a published one, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refusalkit.errors import InputError
from refusalkit.reproduction.published import Published, Quantity
from refusalkit.reproduction.quantity import MEASURED, allowance
from refusalkit.run_directory import Run

Verdict = Literal["equal", "close", "differs", "not scored", "not measured", "not compared"]

#: What has to be the same before two runs are of one model.
_SHAPE = ("architecture", "n_layers", "d_model", "d_vocab")


@dataclass(frozen=True)
class Row:
    """Hold one published number, what a run made of it, and how they compare."""

    quantity: Quantity
    ours: float | None
    verdict: Verdict


def compare(published: Published, run: Run | None) -> tuple[Row, ...]:
    """Return a row a published number; without a run, the rows a run would fill.

    Raises `InputError` when the run is of another model.
    """
    if run is not None:
        check_model(published, run.environment.get("model", {}), str(run.folder))
    return tuple(_row(published, quantity, run) for quantity in published.rows)


def _row(published: Published, quantity: Quantity, run: Run | None) -> Row:
    known = MEASURED.get(quantity.what)
    if known is None:
        return Row(quantity, None, "not measured")
    if run is None:
        return Row(quantity, None, "not compared")
    ours = known.read(run, published, quantity)
    if ours is None:
        return Row(quantity, None, "not scored")
    assert quantity.authors is not None, "whatever a run measures was published as an artefact"
    apart = abs(ours - quantity.authors)
    if apart <= 0.5 * 10.0**-known.decimals:
        return Row(quantity, ours, "equal")
    return Row(quantity, ours, "close" if apart <= allowance(quantity, ours) else "differs")


def check_model(published: Published, model: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` when what is known of a model rules out that it is the published one."""
    wanted = {key: getattr(published, key) for key in _SHAPE}
    found = {key: model.get(key) for key in _SHAPE}
    if found != wanted:
        seen = ", ".join(f"{key} {found[key]} and not {wanted[key]}" for key in _SHAPE if found[key] != wanted[key])
        raise InputError(
            f"this is not the model of the published run: {seen}",
            where=where,
            hint=f"the published run {published.name!r} is of {published.hub}",
        )
