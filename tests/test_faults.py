"""Every row of the fault matrix has a test, or states why it has none."""

from __future__ import annotations

from tests.faults import FAULTS, UNTESTED, shown_by


def test_every_fault_is_shown_or_explained() -> None:
    """Rows without a test, and only those, state a reason; no number is left out, and no mark has an unknown one."""
    tests = shown_by()
    assert list(FAULTS) == list(range(1, len(FAULTS) + 1)), "no number is left out"
    assert tests.keys() == FAULTS.keys()
    without = {row for row, names in tests.items() if not names}
    assert without == UNTESTED.keys(), {row: FAULTS.get(row) for row in without ^ UNTESTED.keys()}
