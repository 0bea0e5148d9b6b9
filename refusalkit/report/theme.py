"""Give charts the colours and type of the page, in light and in dark.

Charts name roles (`category`, `diverging`, `ramp`, and the mark styles below), never colours, so one chart serves
both themes. Orange and blue, purple and teal stay apart under the common kinds of colour blindness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from refusalkit.metric import SIDES, Side

Mode = Literal["light", "dark"]
#: The mark of each side, so that colour is not all that tells them apart.
SHAPES: dict[Side, str] = {"harmful": "circle", "harmless": "diamond", "over_refusal": "triangle-up"}

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"


@dataclass(frozen=True)
class Palette:
    """Hold the colours of one theme."""

    paper: str
    ink: str
    muted: str
    rule: str
    missing: str
    harmful: str
    harmless: str
    over_refusal: str
    diverging: tuple[str, ...]
    """From answers (negative scores) to refuses (positive ones)."""
    ramp: tuple[str, ...]
    """From little to much."""


LIGHT = Palette(
    paper="#ffffff",
    ink="#1c1d20",
    muted="#5c6068",
    rule="#e4e4e0",
    missing="#efefec",
    harmful="#b8470b",
    harmless="#1f6fb2",
    over_refusal="#6d7f1a",
    diverging=("#0b5d56", "#4fa69c", "#c3e2dd", "#f7f6f2", "#dac7e6", "#a475c2", "#57267a"),
    ramp=("#f8f5ee", "#f9dcae", "#ee9f55", "#c2542c", "#6b1d1d"),
)
DARK = Palette(
    paper="#16181b",
    ink="#e7e7e4",
    muted="#a0a5ad",
    rule="#2f3338",
    missing="#212428",
    harmful="#f19a5b",
    harmless="#6fb5f0",
    over_refusal="#c0cf5a",
    diverging=("#84e3d6", "#3d9f94", "#20534e", "#2b2d32", "#4d3465", "#8d5cb6", "#d7b0f6"),
    ramp=("#2a2a2e", "#5c3622", "#a85a2d", "#ea9a54", "#fde5bd"),
)
PALETTES: dict[Mode, Palette] = {"light": LIGHT, "dark": DARK}


def config(mode: Mode) -> dict[str, Any]:
    """Return the Vega-Lite configuration of one theme."""
    colours = PALETTES[mode]
    axis = {
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
        "labelColor": colours.ink,
        "titleColor": colours.muted,
        "gridColor": colours.rule,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelLimit": 320,
    }
    legend = {
        "labelColor": colours.ink,
        "titleColor": colours.muted,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titleLimit": 320,
        "labelLimit": 240,
    }
    return {
        "background": "transparent",
        "font": SANS,
        "view": {"stroke": None},
        "axis": axis,
        "legend": legend,
        "range": {
            "category": [getattr(colours, side) for side in SIDES],
            "diverging": list(colours.diverging),
            "ramp": list(colours.ramp),
        },
        "style": _mark_styles(colours),
    }


def _mark_styles(colours: Palette) -> dict[str, dict[str, Any]]:
    return {
        "missing": {"color": colours.missing},
        "hatch": {"color": colours.muted, "strokeWidth": 1, "strokeOpacity": 0.6},
        "survivor": {"color": colours.ink},
        "chosen": {"color": colours.ink, "strokeWidth": 2},
        "on-pale": {"color": colours.ink},
        "on-strong": {"color": colours.paper},
        # Lies under the two above, so that they show on the darkest and the lightest cell.
        "halo": {"color": colours.paper, "strokeWidth": 5},
        "reference": {"color": colours.muted, "strokeWidth": 1, "strokeDash": [3, 3]},
    }
