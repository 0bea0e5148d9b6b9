"""Answer the analyses a recipe asks for, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit.analysis import Analysis, Attribution, Capability, Directions, Suffixes
from refusalkit.artifacts import Analyses, Found
from refusalkit.stages.attribution import attribute
from refusalkit.stages.capability import study_capability
from refusalkit.stages.compare_directions import Groups, compare_directions
from refusalkit.stages.findings import Findings
from refusalkit.stages.suffixes import study_suffixes


def analyze(asked: Sequence[tuple[Analysis, Groups]], findings: Findings) -> Analyses:
    """Run every analysis, in the order of the recipe."""
    return Analyses(found=tuple(_one(analysis, groups, findings) for analysis, groups in asked))


def _one(analysis: Analysis, groups: Groups, findings: Findings) -> Found:
    match analysis:
        case Suffixes():
            return study_suffixes(analysis, findings)
        case Attribution():
            return attribute(analysis, findings)
        case Directions():
            return compare_directions(analysis, groups, findings)
        case _:
            assert isinstance(analysis, Capability)
            return study_capability(analysis, findings)
