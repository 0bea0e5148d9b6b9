"""Provide what refusalkit knows by itself, through the hooks that any plugin uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refusalkit.builtin.adapters import ADAPTERS
from refusalkit.builtin.arditi import ARDITI
from refusalkit.builtin.components import COMPONENTS
from refusalkit.builtin.compositions import COMPOSITIONS
from refusalkit.builtin.cosmic import Cosmic
from refusalkit.builtin.estimators import ESTIMATORS
from refusalkit.builtin.from_file import FromFile
from refusalkit.builtin.interventions import INTERVENTIONS
from refusalkit.builtin.metrics import METRICS
from refusalkit.builtin.repair import Repair
from refusalkit.builtin.selectors import SELECTORS
from refusalkit.builtin.separation import Separation
from refusalkit.builtin.sources import SOURCES
from refusalkit.builtin.strategies import STRATEGIES
from refusalkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refusalkit.adapter import Adapter
    from refusalkit.intervention import InterventionSpec
    from refusalkit.metric import Metric
    from refusalkit.prompt_source import PromptSource
    from refusalkit.selector import Selector
    from refusalkit.strategy import Strategy


@hookimpl
def refusalkit_adapters() -> Sequence[Adapter]:
    return ADAPTERS


@hookimpl
def refusalkit_strategies() -> Sequence[type[Strategy]]:
    return (*STRATEGIES, *ESTIMATORS, FromFile)


@hookimpl
def refusalkit_selectors() -> Sequence[type[Selector]]:
    return (*SELECTORS, Cosmic, Separation, Repair)


@hookimpl
def refusalkit_interventions() -> Sequence[type[InterventionSpec]]:
    return (*INTERVENTIONS, *COMPONENTS, *COMPOSITIONS)


@hookimpl
def refusalkit_metrics() -> Sequence[type[Metric]]:
    return METRICS


@hookimpl
def refusalkit_prompt_sources() -> Sequence[PromptSource]:
    return (*SOURCES, ARDITI)
