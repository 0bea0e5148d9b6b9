"""Hold a chart with what a page and a file need of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt


@dataclass(frozen=True, eq=False)
class Figure:
    """Hold one chart and what the page needs to place it."""

    name: str
    """Names the figure in files: letters, digits, `.`, `_` and `-`."""
    title: str
    description: str
    """What a person who cannot see the chart is told."""
    chart: alt.LayerChart | alt.FacetChart
    note: str = ""
    """One line under the title."""
    min_width: int = 280
    """Pixels below which the chart scrolls in its box."""
    saved_width: int = 640
    """Width of the plot in a saved picture."""

    @cached_property
    def specification(self) -> Mapping[str, Any]:
        """The Vega-Lite specification, without the theme."""
        chart = self.chart.properties(description=self.description)
        # Tests hold the figures of runs and analyses to the schema; here that takes longer than to draw them.
        document: dict[str, Any] = chart.to_dict(validate=False)
        # Altair adds its own default theme, and the schema's address is of no use to a page without a network.
        document.pop("config", None)
        document.pop("$schema", None)
        return document
