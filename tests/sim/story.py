"""The life of one job, from a seed: users launch, resume, retry and cancel under faults; then the faults stop.

Real code: `scheduler.state`, `scheduler.loop`, `scheduler.control`, `jobs.job`, `planning.prepare`, `run_job`, the
worker's `run_shard`, the whole commit protocol and the audit. Simulated: Ray, the network, decoding, time, and the
store, which implements the guarantees of S3 or of a folder in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.sim.life import CHANGED, FINISHED, GROWN, SMALL, Life
from tests.sim.wiring import SCRATCH, real_code_of


def live(seed: int) -> Life:
    """Run one whole life. If an invariant is violated, raise AssertionError with a note on how to replay it."""
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="p3d-sim-") as scratch:
        life = Life(seed, Path(scratch))
        try:
            with real_code_of(life):
                try:
                    trouble(life)
                    heal(life)
                finally:
                    life.end()
        except BaseException as error:
            error.add_note(f"replay with: P3D_FIRST_SEED={seed} P3D_SEEDS=1 pytest tests/sim/test_random.py")
            raise
    return life


def trouble(life: Life) -> None:
    """A launch, and commands of users who find it slow, stuck or dead."""
    rng = life.rng
    started = [life.driver("launch", life.launch, SMALL, False)]
    if rng.random() < 0.15:
        started.append(life.driver("launch grown", life.launch, GROWN, True))
    for _ in range(rng.choice((1, 2, 4, 7))):
        if pause := rng.choice((0.0, 0.01, 0.2, 2.0, 15.0, 100.0)):
            life.wait(pause)
        takeover = rng.random() < 0.5
        match rng.choice(("resume", "resume", "launch", "grown", "changed", "retry", "retry", "cancel")):
            case "resume":
                started.append(life.driver("resume", life.resume, takeover))
            case "launch":
                started.append(life.driver("launch", life.launch, SMALL, takeover))
            case "grown":
                started.append(life.driver("launch grown", life.launch, GROWN, takeover))
            case "changed":
                started.append(life.driver("launch changed", life.launch, CHANGED, takeover))
            case "retry":
                started.append(life.driver("retry", life.retry, takeover))
            case "cancel":
                life.driver("cancel", life.cancel, rng.random() < 0.5)
    life.wait(rng.choice((1.0, 30.0, 3000.0)), until=lambda: all(process.over for process in started))


def heal(life: Life) -> None:
    """Stop all faults: one resume finishes the job, and a second one finds nothing to do."""
    life.note("faults stop")
    life.rates, life.out_until = {}, 0.0
    drivers = [process for process in life.processes if process.kind == "driver"]
    takeover = life.rng.random() < 0.5
    if not takeover:
        life.wait(until=lambda: all(process.over for process in drivers))
    while life.late:  # delayed requests arrive
        life.wait(life.late[0][0] - life.clock + 0.001)
    done = go_on(life, takeover)
    if takeover:  # an earlier command may have added a plan, or be in charge now
        life.wait(until=lambda: all(process.over for process in drivers))
        done = go_on(life, False)
    if done not in FINISHED:
        raise done if isinstance(done, BaseException) else AssertionError(f"I10: a resume ends with {done}")
    life.wait(until=lambda: all(process.over for process in life.processes[1:]))
    life.check_end()
    written = len(life.store.written)
    done = type_in(life, "resume", life.resume, False)
    assert (done, life.store.written[written:]) == (0, []), f"I10: a second resume wrote, or ended with {done}"


def go_on(life: Life, takeover: bool) -> Any:
    """Resume; if the launch died before it created a plan, launch again."""
    planned = "plans/0001.json" in life.store.objects and "job.json" in life.store.objects
    again = ("resume", life.resume) if planned else ("launch", life.launch, SMALL)
    return type_in(life, *again, takeover)


def type_in(life: Life, name: str, act: Any, *given: Any) -> Any:
    """Run a command to its end and return its exit code or error."""
    process = life.driver(name, act, *given)
    life.wait(until=lambda: process.over)
    return process.result
