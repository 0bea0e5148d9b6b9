"""Train refusal directions and refusal cones by gradient descent on what a model says (arXiv 2502.17420)."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit import hookimpl
from refusalkit.selector import Selector
from refusalkit.strategy import Strategy
from refusalkit_rdo.selectors import Cone
from refusalkit_rdo.strategies import Rdo, RdoIndependent, RefusalCone

__all__ = ["Cone", "Rdo", "RdoIndependent", "RefusalCone"]


@hookimpl
def refusalkit_strategies() -> Sequence[type[Strategy]]:
    return (Rdo, RdoIndependent, RefusalCone)


@hookimpl
def refusalkit_selectors() -> Sequence[type[Selector]]:
    return (Cone,)
