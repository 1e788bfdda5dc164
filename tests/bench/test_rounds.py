"""The harness of all benchmarks: the order of turns, the ratios, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.rounds import Machine, Report, Rounds, Spread, Table, per_second, seconds, take_turns


def silent(_: str) -> None:
    pass


def test_turns_rotate_and_the_warm_one_does_not_count() -> None:
    """Each round begins one arm later, every arm runs once per round, and the warm-up turn is not recorded."""
    seen: list[str] = []

    def arm(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    found = take_turns({name: lambda name=name: arm(name) for name in "abc"}, 4, "turns", tell=silent)
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert found.of == {"a": (4, 9, 11, 13), "b": (5, 7, 12, 14), "c": (6, 8, 10, 15)}
    assert take_turns({"a": lambda: 1.0}, 2, "turns", warm=False, tell=silent).of == {"a": (1.0, 1.0)}


@pytest.mark.parametrize("rounds", [0, -1])
def test_nothing_to_measure_is_refused(rounds: int) -> None:
    """No rounds, no arms and no values are errors, not an empty table."""
    with pytest.raises(ValueError, match=f"rounds = {rounds}"):
        take_turns({"a": lambda: 1.0}, rounds, "s", tell=silent)
    with pytest.raises(ValueError, match=r"len\(arms\) = 0"):
        take_turns({}, 1, "s", tell=silent)
    with pytest.raises(ValueError, match="no median"):
        Spread.of([])


def test_ratios_are_taken_within_a_round() -> None:
    """A slow round does not affect only one arm: the median of ratios is used, not the ratio of medians."""
    found = Rounds("clips/s", {"ours": (10, 100, 30), "theirs": (5, 50, 10)})
    assert found.ratio("ours", "theirs") == Spread(2, 2, 3)
    assert found.spread("ours") == Spread(30, 10, 100)
    assert found.table("speed", "theirs").rows == (
        ("ours", "30 (10 to 100)", "2 (2 to 3)"),
        ("theirs", "10 (5 to 50)", "1 (1 to 1)"),
    )
    with pytest.raises(ValueError, match="'theirs': 1"):
        Rounds("clips/s", {"ours": (1, 2), "theirs": (1,)})


def test_an_arm_times_its_work() -> None:
    """`seconds` and `per_second` do the work once per turn and return its duration or its rate."""
    done: list[int] = []
    assert 0 < seconds(lambda: done.append(1))() < 60
    assert per_second(lambda: done.append(1), 1000)() > 1000 / 60
    assert len(done) == 2


def test_a_report_has_its_rounds_machine_commit_and_command(tmp_path: Path) -> None:
    """Both files state where and how the figures were measured, and the JSON file has every round."""
    report = Report("speed", "How fast", command="python -m bench.speed")
    report.add(Rounds("s", {"ours": (1.0, 2.0), "theirs": (2.0, 8.0)}).table("One clip", "theirs"))
    report.add(Table("Counts", ("what", "how many"), (("copies", "3"),)))
    path = report.write(tmp_path / "made")
    text, data = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert data["tables"][0]["rounds"] == {"unit": "s", "of": {"ours": [1.0, 2.0], "theirs": [2.0, 8.0]}}
    assert data["machine"]["cores"] >= 1 and data["machine"]["versions"]["torch"]
    for said in ("python -m bench.speed", Machine.here().cpu, data["machine"]["commit"], "| copies | 3 |"):
        assert said in text
    assert "| ours | 1.5 (1 to 2) | 0.375 (0.25 to 0.5) |" in text


def test_figures_are_short() -> None:
    """Figures have three significant digits and no exponents."""
    assert str(Spread(12345.6, 0.01234, 1.0)) == "12346 (0.0123 to 1)"
