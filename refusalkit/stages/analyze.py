"""Answer the analyses a recipe asks for, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refusalkit.analysis import Analysis, Suffixes
from refusalkit.artifacts import Analyses, Found
from refusalkit.stages.findings import Findings
from refusalkit.stages.suffixes import study_suffixes

#: The prompts an analysis needs beside the run's own, by the name it has for them.
Groups = Mapping[str, tuple[str, ...]]


def analyze(asked: Sequence[tuple[Analysis, Groups]], findings: Findings) -> Analyses:
    """Run every analysis, in the order of the recipe."""
    return Analyses(found=tuple(_one(analysis, groups, findings) for analysis, groups in asked))


def _one(analysis: Analysis, groups: Groups, findings: Findings) -> Found:
    match analysis:
        case Suffixes():
            return study_suffixes(analysis, findings)
        case _:
            raise NotImplementedError(analysis.analysis)
