"""Show what the analyses of a run found: a section each, made of sentences, figures and tables."""

from __future__ import annotations

from refusalkit.artifacts import AttributionFound, CapabilityFound, DirectionsFound, Found, SuffixesFound
from refusalkit.report.attribution import attribution
from refusalkit.report.capability import capability
from refusalkit.report.directions import directions
from refusalkit.report.part import Part
from refusalkit.report.suffixes import suffixes
from refusalkit.run_directory import Run


def parts(run: Run) -> tuple[Part, ...]:
    """Describe every analysis of a run, in the order of its recipe."""
    found = () if run.analyses is None else run.analyses.found
    return tuple(_part(run, each, f"analysis-{number}") for number, each in enumerate(found, start=1))


def _part(run: Run, found: Found, name: str) -> Part:
    match found:
        case SuffixesFound():
            return suffixes(run, found, name)
        case AttributionFound():
            return attribution(run, found, name)
        case DirectionsFound():
            return directions(run, found, name)
        case CapabilityFound():
            return capability(found)
