"""Everything that this plugin provides obeys the laws."""

import refusalkit_template

from refusalkit.testing import broken_laws


def test_everything_it_provides_obeys_the_laws() -> None:
    assert not broken_laws(refusalkit_template)
