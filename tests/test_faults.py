"""Every row of the fault matrix has a test, or a sentence that says why not."""

from __future__ import annotations

from tests.faults import FAULTS, UNTESTED, shown_by


def test_every_fault_is_shown_or_explained() -> None:
    """A row with tests needs no excuse, a row without has one, and no test marks a row that does not exist."""
    tests = shown_by()
    assert tests.keys() == FAULTS.keys()
    without = {row for row, names in tests.items() if not names}
    assert without == UNTESTED.keys(), {row: FAULTS.get(row) for row in without ^ UNTESTED.keys()}
