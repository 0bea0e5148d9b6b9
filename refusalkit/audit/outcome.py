"""Hold the outcome of an audit and write it: for a terminal, for programs, as a page."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from refusalkit.audit.checks import Check
from refusalkit.audit.findings import Findings

WIDTH = 80


@dataclass(frozen=True, eq=False)
class Outcome:
    """Hold what was found and how it compares with the thresholds."""

    model: str
    findings: Findings
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks whose threshold is not kept."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        n = sum(check.passed is not None for check in self.checks)
        if not self.failed:
            return "keeps the threshold" if n == 1 else f"keeps all {n} thresholds"
        return f"fails {len(self.failed)} of {n} threshold{'' if n == 1 else 's'}"


def table(outcome: Outcome) -> str:
    """Write a line a number and a sentence a threshold that is not kept, in 80 columns."""
    marks = {True: "pass", False: "FAIL", None: "-"}
    rows = [("", "measured", "asked", "")]
    rows += [(check.label, check.measured, check.asked, marks[check.passed]) for check in outcome.checks]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{outcome.model} {outcome.verdict}", ""]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for check in outcome.failed:
        lines += ["", *textwrap.wrap(f"FAIL {check.key}: {check.why} Asked: {check.asked}.", WIDTH)]
    return "\n".join(lines)


def document(outcome: Outcome) -> dict[str, Any]:
    """Return the content of `audit.json`, version 1; other tools rely on it."""
    found, choice = outcome.findings, outcome.findings.choice
    return {
        "version": 1,
        "model": outcome.model,
        "passed": not outcome.failed,
        "checks": [
            {
                "threshold": check.key,
                "value": None if math.isnan(check.value) else check.value,
                "bound": check.bound,
                "passed": check.passed,
                "why": check.why,
            }
            for check in outcome.checks
        ],
        "refusal_rate": _number(found.refusal_rate),
        "margin_nats": _number(found.margin),
        "ablation": {
            "position": choice.position,
            "layer": choice.layer,
            "refusal_rate": _number(found.ablated),
            "control_refusal_rate": _number(found.control),
            "drop": {key: value for key, value in asdict(found.lost).items() if key != "only"},
            "kl_nats": _number(found.kl),
        },
        "layers": [
            {
                "layer": each.layer,
                "position": each.row.position if each.row else None,
                "refusal_score": each.row.refusal_score if each.row else None,
                "kl_nats": each.row.kl_nats if each.row else None,
                "suffices": each.suffices,
            }
            for each in found.layers
        ],
        "over_refusal": {**_number(found.over_refusal), "refused": list(found.over_refused)},
    }


def _number(result: Any) -> dict[str, Any]:
    # Through JSON text, which writes a number that is none as null.
    shown: dict[str, Any] = json.loads(result.model_dump_json(include={"value", "low", "high", "n"}))
    return shown
