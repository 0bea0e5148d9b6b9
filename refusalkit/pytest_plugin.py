"""Check the laws on everything that is installed, as tests: `pytest --refusalkit`, or `--refusalkit=DISTRIBUTION`.

pytest loads this module wherever refusalkit is installed, so it imports nothing of weight until it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refusalkit.testing.law_sets import LawSet


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that asks for the laws."""
    parser.getgroup("refusalkit").addoption(
        "--refusalkit",
        nargs="?",
        const="",
        metavar="DISTRIBUTION",
        help="check the laws of refusalkit on everything installed, or on what one distribution provides",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a distribution that is not installed, or is broken, before anything is collected."""
    if config.option.refusalkit is not None:
        _chosen(config.option.refusalkit)


# First, so that `-k` and `-m` choose among these tests too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each set of laws."""
    if config.option.refusalkit is None:
        return
    from refusalkit.testing.law_sets import law_sets

    registry, only = _chosen(config.option.refusalkit)
    sets = law_sets(registry, only)
    for name in dict.fromkeys(laws.owner.name for laws in sets):
        owned = [laws for laws in sets if laws.owner.name == name]
        distribution = Distribution.from_parent(session, path=config.rootpath / name, sets=owned)
        report = config.hook.pytest_make_collect_report(collector=distribution)
        config.hook.pytest_collectreport(report=report)
        items += report.result


def _chosen(name: str) -> tuple[Any, str | None]:
    """Load what is installed, and return it with the distribution that is asked for, if one is."""
    from refusalkit.errors import RefusalkitError
    from refusalkit.plugin.check import installed_plugin
    from refusalkit.registry import load_registry

    try:
        registry = load_registry()
        return registry, installed_plugin(registry, name).name if name else None
    except RefusalkitError as error:
        raise pytest.UsageError(f"--refusalkit: {error}") from None


class Distribution(pytest.File):
    """Stand where a test file stands in the names of tests; there is no such file."""

    def __init__(self, *, sets: list[LawSet], **options: Any) -> None:
        super().__init__(**options)
        self.sets = sets

    def collect(self) -> Iterator[pytest.Item]:
        yield from (LawItem.from_parent(self, name=str(laws), laws=laws) for laws in self.sets)


class BrokenLawsError(Exception):
    """Hold the laws of one set that do not hold."""


class LawItem(pytest.Item):
    """Check one set of laws."""

    def __init__(self, *, laws: LawSet, **options: Any) -> None:
        super().__init__(**options)
        self.laws = laws

    def runtest(self) -> None:
        from refusalkit.testing.law_sets import UncheckedError

        try:
            laws = self.laws.check()
        except UncheckedError as error:
            pytest.skip(str(error))
        if broken := [str(law) for law in laws if not law.holds]:
            raise BrokenLawsError("\n".join(broken))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from refusalkit.testing import law_sets

        if isinstance(excinfo.value, BrokenLawsError):
            return str(excinfo.value)
        # How pytest came to ask says nothing of the plugin.
        excinfo.traceback = excinfo.traceback.cut(path=law_sets.__file__)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, str(self.laws)
