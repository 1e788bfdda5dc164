"""The scheduler as a pure state machine: its transitions one by one, then whole runs in a seeded simulation of faults.

    unit tests      one property each, by feeding events
    simulate(seed)  workers, a store and faults, with a model of what the scheduler may do; then a resume without faults
    mutants         schedulers with one defect each: the simulation must catch every one

A note of the error names the seed that failed; `simulate(seed)` replays it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3d.jobs.scheduler import state
from p3d.jobs.scheduler.state import (
    FIRST_VIDEOS,
    Check,
    Checked,
    CheckFailed,
    Command,
    Counted,
    Dispatch,
    Drain,
    Event,
    Finish,
    Reopened,
    Scheduler,
    ShardDone,
    ShardTrouble,
    StartWorker,
    Stop,
    StopWorker,
    TryAgain,
    WorkerDied,
    WorkerLimitRaised,
    WorkerReady,
    WorkerRefused,
    WorkerUnready,
)
from p3d.pipeline.dataset.totals import ShardKey, Totals
from p3d.pipeline.errors import counted
from p3d.pipeline.recipe import MaxFailures, RunOptions

ANY_NUMBER = MaxFailures(count=10**9)  # a job that no number of failed videos stops
CANCEL = Stop(6, "cancelled", drain=True)
INTERRUPT = Stop(143, "interrupted")


# ---- tools ------------------------------------------------------------------------------------------------------


def shards(n: int) -> list[ShardKey]:
    return [ShardKey(1, at) for at in range(n)]


def feed(scheduler: Scheduler, *events: Event) -> list[Command]:
    """All that the scheduler answers to these events; it is validated after each."""
    commands: list[Command] = []
    for event in events:
        commands += scheduler.handle(event)
        scheduler.validate()
    return commands


def flying(scheduler: Scheduler) -> list[tuple[int, ShardKey]]:
    """(worker, shard) of all shards in progress, by worker, each one's oldest first."""
    return [(worker, shard) for worker, shards in sorted(scheduler.in_flight.items()) for shard in shards]


def machine(n_shards: int, *, workers: int = 1, n_videos: int = 1000, **options) -> Scheduler:
    """A scheduler whose workers are all ready: worker i processes shard i."""
    scheduler = Scheduler(shards(n_shards), n_workers=workers, n_videos=n_videos, **options)
    for command in scheduler.start():
        if isinstance(command, StartWorker):
            feed(scheduler, WorkerReady(command.worker))
    return scheduler


def done(worker: int, shard: ShardKey, n_videos: int = 10, **failures: int) -> ShardDone:
    return ShardDone(worker, shard, n_videos, 2 * n_videos, tuple(failures.items()))


def trouble(worker: int, shard: ShardKey, kind: str) -> ShardTrouble:
    return ShardTrouble(worker, shard, kind, f"{kind} trouble")


def work_off(scheduler: Scheduler, answer: Callable[[int, ShardKey], list[Event]] | None = None) -> Finish:
    """Answer every worker in turn (by default: done) until the end; new workers become ready at once."""
    for _ in range(1000):
        if scheduler.finished is not None:
            return scheduler.finished
        for worker in sorted(scheduler.starting):
            feed(scheduler, WorkerReady(worker))
        for worker, shard in flying(scheduler):
            feed(scheduler, *(answer(worker, shard) if answer else [done(worker, shard)]))
    raise AssertionError("no end after 1000 rounds")


def of_kind(commands: Iterable[Command], kind: type) -> list:
    return [command for command in commands if isinstance(command, kind)]


# ---- the transitions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_shards", "n_workers", "expected"), [(5, 2, 2), (2, 5, 2), (1, 1, 1), (3, 3, 3)])
def test_no_more_workers_start_than_work_or_limit(n_shards: int, n_workers: int, expected: int) -> None:
    """The first commands start min(workers, shards) workers with different numbers, and nothing else."""
    commands = Scheduler(shards(n_shards), n_workers=n_workers, n_videos=9).start()
    assert commands == [StartWorker(worker) for worker in range(expected)]


def test_a_worker_that_is_ready_gets_the_first_shard() -> None:
    """WorkerReady leads to one Dispatch, of the oldest shard in the queue."""
    scheduler = Scheduler(shards(3), n_workers=2, n_videos=9)
    scheduler.start()
    assert feed(scheduler, WorkerReady(1)) == [Dispatch(1, ShardKey(1, 0))]
    assert feed(scheduler, WorkerReady(0)) == [Dispatch(0, ShardKey(1, 1))]


def test_a_done_shard_leads_to_the_next() -> None:
    """ShardDone leads to the Dispatch of the next shard to the same worker."""
    scheduler = machine(2)
    assert feed(scheduler, done(0, ShardKey(1, 0))) == [Dispatch(0, ShardKey(1, 1))]


def test_every_shard_is_dispatched_once() -> None:
    """Without trouble each shard goes to one worker, once, whatever the number of workers."""
    scheduler = machine(9, workers=4)
    given = Counter(shard for _, shard in flying(scheduler))
    while scheduler.finished is None:
        worker, shard = flying(scheduler)[-1]
        given.update(command.shard for command in of_kind(feed(scheduler, done(worker, shard)), Dispatch))
    assert given == dict.fromkeys(shards(9), 1)


def test_a_shard_that_is_listed_twice_is_noticed() -> None:
    """A todo list that would dispatch one shard twice does not pass validate()."""
    with pytest.raises(AssertionError, match="two places"):
        Scheduler([*shards(2), ShardKey(1, 0)], n_workers=2, n_videos=9).validate()


def test_the_last_shard_stops_the_workers_and_finishes() -> None:
    """The last ShardDone leads to one StopWorker for each live worker, then to Finish, and no shard is open."""
    scheduler = machine(2, workers=2)
    assert feed(scheduler, done(1, ShardKey(1, 1))) == []
    commands = feed(scheduler, done(0, ShardKey(1, 0)))
    assert commands[:-1] == [StopWorker(0), StopWorker(1)]
    assert isinstance(commands[-1], Finish)
    assert commands[-1].exit_code == 0
    assert not scheduler.open


def test_sums_are_those_of_the_done_shards_and_of_earlier_runs() -> None:
    """Totals add up videos, clips and failures by reason over this run and what was done before it."""
    before = Totals(videos=100, clips=300, failures=Counter(truncated=2))
    scheduler = machine(2, done=before)
    work_off(scheduler, lambda worker, shard: [done(worker, shard, truncated=1, too_long=1)])
    assert scheduler.totals == Totals(120, 340, Counter(truncated=4, too_long=2))
    assert scheduler.totals.failed == 6


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({}, 0),
        ({"truncated": 1}, 3),
        ({"truncated": 7, "too_long": 2}, 3),
        ({"internal": 1}, 1),
        ({"truncated": 7, "internal": 1}, 1),
    ],
)
def test_the_exit_code_tells_of_failures(failures: dict[str, int], code: int) -> None:
    """Finished is 0 without failed videos, 3 with some, 1 when a defect of the program failed one."""
    scheduler = machine(1)
    finish = work_off(scheduler, lambda worker, shard: [done(worker, shard, **failures)])
    assert finish.exit_code == code
    n_failed = sum(failures.values())
    if code != 1:
        assert f"{counted(10 - n_failed, 'video')} embedded, {n_failed or 'none'} failed" in finish.sentence


@pytest.mark.parametrize(("before", "code"), [({}, 0), ({"truncated": 1}, 3), ({"internal": 1}, 1)])
def test_nothing_to_do_finishes_at_once(before: dict[str, int], code: int) -> None:
    """With no shard left the first command is the last, with the exit code of what is there already."""
    scheduler = Scheduler([], n_workers=4, n_videos=9, done=Totals(9, 9, Counter(before)))
    commands = scheduler.start()
    assert [type(command) for command in commands] == [Finish]
    assert commands[0].exit_code == code
    scheduler.validate()


def test_no_outcome_before_earlier_runs_are_counted() -> None:
    """Shards are dispatched while earlier ones are still being counted; the outcome waits, and includes both."""
    scheduler = machine(1, n_videos=30, counting=True)
    assert flying(scheduler) == [(0, ShardKey(1, 0))]
    assert of_kind(feed(scheduler, done(0, ShardKey(1, 0))), Finish) == []
    commands = feed(scheduler, Counted(Totals(20, 50, Counter(truncated=2))))
    assert commands[-1].exit_code == 3
    assert scheduler.totals == Totals(30, 70, Counter(truncated=2))


def test_a_shard_that_was_lost_is_computed_before_the_run_finishes() -> None:
    """A listing finds it while the run goes on. It is queued once, and the outcome waits for it."""
    scheduler = machine(1, n_videos=30, counting=True)
    feed(scheduler, done(0, ShardKey(1, 0)))
    assert feed(scheduler, Reopened((ShardKey(1, 7), ShardKey(1, 8)))) == [Dispatch(0, ShardKey(1, 7))]
    with pytest.raises(AssertionError, match="is open already"):
        scheduler.handle(Reopened((ShardKey(1, 8),)))
    feed(scheduler, Counted(Totals(10, 20)))
    assert feed(scheduler, done(0, ShardKey(1, 7))) == [Dispatch(0, ShardKey(1, 8))]
    assert feed(scheduler, done(0, ShardKey(1, 8)))[-1].exit_code == 0


def test_a_stop_does_not_wait_for_the_count() -> None:
    """Interrupted while only the count is missing, the run ends at once."""
    scheduler = machine(1, counting=True)
    feed(scheduler, done(0, ShardKey(1, 0)))
    assert feed(scheduler, Stop(130, "interrupted"))[-1] == Finish(130, "interrupted")


def test_failures_of_earlier_runs_count_against_the_limit() -> None:
    """A resume stops when the count shows that more videos have failed than `--max-failures` allows."""
    scheduler = machine(9, counting=True, max_failures=MaxFailures(count=2))
    assert feed(scheduler, Counted(Totals(20, 50, Counter(truncated=3))))[-1].exit_code == 6


def test_after_the_end_nothing_happens() -> None:
    """Events after Finish are answered with nothing and change no sum."""
    scheduler = machine(2, workers=2)
    feed(scheduler, INTERRUPT)
    late = [done(0, ShardKey(1, 0)), WorkerDied(1, "x"), WorkerReady(9), Checked(ShardKey(1, 1), True, 5, 5), CANCEL]
    assert feed(scheduler, *late) == []
    assert scheduler.totals == Totals()
    assert scheduler.finished == Finish(143, "interrupted")


def test_nodes_that_join_get_workers() -> None:
    """A higher limit starts workers at once, as far as there is work. A lower one stops none."""
    scheduler = machine(4, workers=1)
    assert feed(scheduler, WorkerLimitRaised(9)) == [StartWorker(1), StartWorker(2), StartWorker(3)]
    assert feed(scheduler, WorkerLimitRaised(2)) == []
    assert scheduler.n_workers == 9


# ---- two shards per worker --------------------------------------------------------------------------------------


def test_a_busy_worker_gets_its_next_shard() -> None:
    """With two each, a worker gets its next shard at once, and another whenever one of the two is done."""
    scheduler = machine(5, shards_each=2)
    assert flying(scheduler) == [(0, ShardKey(1, 0)), (0, ShardKey(1, 1))]
    assert feed(scheduler, done(0, ShardKey(1, 1))) == [Dispatch(0, ShardKey(1, 2))]
    assert feed(scheduler, done(0, ShardKey(1, 0))) == [Dispatch(0, ShardKey(1, 3))]


@pytest.mark.parametrize(("n_shards", "early"), [(2, 0), (3, 0), (4, 1), (5, 2), (9, 2)])
def test_the_last_shards_wait_for_idle_workers(n_shards: int, early: int) -> None:
    """No worker gets a second shard if that would leave less than one shard per worker in the queue."""
    scheduler = machine(n_shards, workers=2, shards_each=2)
    assert len(flying(scheduler)) == min(n_shards, 2) + early


def test_shards_that_were_together_when_their_worker_died_are_done_alone() -> None:
    """Both are checked. Then neither is processed with another shard again, so the cause of a death is unambiguous."""
    scheduler = machine(6, shards_each=2)
    commands = feed(scheduler, WorkerDied(0, "killed"))
    assert of_kind(commands, Check) == [Check(ShardKey(1, 0)), Check(ShardKey(1, 1))]
    feed(scheduler, *[Checked(ShardKey(1, at), committed=False) for at in (0, 1)], WorkerReady(1))
    seen = []
    while scheduler.finished is None:
        in_hand = flying(scheduler)
        seen.append([shard.shard for _, shard in in_hand])
        feed(scheduler, done(*in_hand[0]))
    assert [of for of in seen if {0, 1} & set(of)] == [[0], [1]] and [2, 3] in seen


def test_a_death_with_two_shards_counts_once() -> None:
    """The budget of deaths counts workers, not shards."""
    scheduler = machine(40, shards_each=2, worker_deaths=3)
    for worker in range(2):
        shards_of = [shard for _, shard in flying(scheduler)]
        feed(scheduler, WorkerDied(worker, "killed"), *[Checked(shard, committed=False) for shard in shards_of])
        assert scheduler.finished is None
        feed(scheduler, WorkerReady(worker + 1))
    (shard,) = (shard for _, shard in flying(scheduler)[:1])
    commands = feed(scheduler, WorkerDied(2, "killed"), Checked(shard, committed=False))
    assert commands[-1].exit_code == 6


def test_a_drain_withdraws_shards_that_have_not_started() -> None:
    """A withdrawn shard is open again without an attempt counted. The run ends with those that had started."""
    scheduler = machine(5, shards_each=2, shard_attempts=1)
    assert feed(scheduler, CANCEL) == [Drain(0)]
    assert feed(scheduler, trouble(0, ShardKey(1, 1), "withdrawn")) == []
    assert feed(scheduler, done(0, ShardKey(1, 0)))[-1] == Finish(6, "cancelled")
    assert scheduler.attempts[ShardKey(1, 1)] == 0 and scheduler.queue[0] == ShardKey(1, 1) and not scheduler.stuck


# ---- deaths -----------------------------------------------------------------------------------------------------


def test_a_dead_workers_shard_is_checked_before_it_is_done_again() -> None:
    """WorkerDied leads to one Check of its shard, which no worker gets before the answer."""
    scheduler = machine(2, workers=2)
    commands = feed(scheduler, WorkerDied(0, "killed"))
    assert of_kind(commands, Check) == [Check(ShardKey(1, 0))]
    assert not of_kind(feed(scheduler, done(1, ShardKey(1, 1))), Dispatch)
    assert feed(scheduler, Checked(ShardKey(1, 0), committed=False)) == [Dispatch(1, ShardKey(1, 0))]


def test_a_commit_found_by_the_check_counts_once() -> None:
    """A shard that its dead worker had committed is counted with the store's numbers and never dispatched again."""
    scheduler = machine(1)
    feed(scheduler, WorkerDied(0, "killed"))
    commands = feed(scheduler, Checked(ShardKey(1, 0), True, 10, 30, (("truncated", 1),)))
    assert not of_kind(commands, Dispatch)
    assert commands[-1].exit_code == 3
    assert scheduler.totals == Totals(10, 30, Counter(truncated=1))


def test_a_shard_that_another_worker_also_did_counts_once() -> None:
    """A worker thought dead commits after all; its successor finds that commit, and the sums hold the shard once."""
    scheduler = machine(1)
    commands = feed(scheduler, WorkerDied(0, "unreachable"), Checked(ShardKey(1, 0), committed=False))
    (started,) = of_kind(commands, StartWorker)
    assert feed(scheduler, WorkerReady(started.worker)) == [Dispatch(started.worker, ShardKey(1, 0))]
    commands = feed(scheduler, done(started.worker, ShardKey(1, 0)))  # it found the commit of worker 0
    assert commands[-1].exit_code == 0
    assert scheduler.totals == Totals(10, 20)


def test_a_worker_answers_only_for_its_own_shard() -> None:
    """An answer for a shard that the worker was not given is an error, not a commit."""
    scheduler = machine(2, workers=2)
    with pytest.raises(AssertionError, match="was not given"):
        scheduler.handle(done(0, ShardKey(1, 1)))
    assert scheduler.totals == Totals()


def test_a_dead_worker_is_replaced_while_there_is_work() -> None:
    """A new worker with a new number starts for a dead one if shards wait, and none starts if none do."""
    scheduler = machine(3, workers=2)
    assert of_kind(feed(scheduler, WorkerDied(0, "killed")), StartWorker) == [StartWorker(2)]
    scheduler = machine(2, workers=2)
    assert not of_kind(feed(scheduler, WorkerDied(0, "killed")), StartWorker)


def test_an_idle_or_starting_workers_death_costs_no_shard() -> None:
    """The death of a worker without a shard asks for no check, and another one is started if needed."""
    scheduler = Scheduler(shards(2), n_workers=2, n_videos=9)
    scheduler.start()
    assert feed(scheduler, WorkerDied(0, "killed")) == [StartWorker(2)]
    feed(scheduler, WorkerReady(1), WorkerReady(2), done(1, ShardKey(1, 0)))
    assert feed(scheduler, WorkerDied(1, "killed")) == []
    assert feed(scheduler, done(2, ShardKey(1, 1)))[-1].exit_code == 0


def die(scheduler: Scheduler, *, committed: bool = False) -> list[Command]:
    """The worker that holds a shard dies, and the check is answered; if none holds one, a new one gets ready first."""
    if not scheduler.in_flight:
        feed(scheduler, WorkerReady(min(scheduler.starting)))
    worker, shard = flying(scheduler)[0]
    commands = feed(scheduler, WorkerDied(worker, "killed by a test"))
    answer = Checked(shard, True, 10, 20) if committed else Checked(shard, committed=False)
    return commands + feed(scheduler, answer)


def test_too_many_deaths_in_a_row_stop_the_job() -> None:
    """The job ends with 6 when the budget of worker deaths is used up, not earlier, and names the last death."""
    scheduler = machine(9, worker_deaths=4, shard_attempts=99)
    for _ in range(3):
        die(scheduler)
        assert scheduler.finished is None
    finish = die(scheduler)[-1]
    assert finish.exit_code == 6
    assert "killed by a test" in finish.sentence
    assert len(scheduler.open) == 9


def test_the_budget_of_deaths_grows_with_the_workers() -> None:
    """A job that went from one worker to sixteen survives a node of eight that is lost at once."""
    scheduler = machine(100, worker_deaths=3)
    for command in feed(scheduler, WorkerLimitRaised(16)):
        feed(scheduler, WorkerReady(command.worker))
    lost = flying(scheduler)[:8]
    feed(scheduler, *[WorkerDied(worker, "its node is gone") for worker, _ in lost])
    feed(scheduler, *[Checked(shard, committed=False) for _, shard in lost])
    assert scheduler.finished is None


def test_no_shard_is_counted_twice() -> None:
    """Whatever else went wrong, the second answer for a shard is an error at once, in a job of any size."""
    scheduler = machine(1000, workers=2)
    scheduler.in_flight[1].append(ShardKey(1, 0))
    scheduler.handle(done(0, ShardKey(1, 0)))
    with pytest.raises(AssertionError, match="counted twice"):
        scheduler.handle(done(1, ShardKey(1, 0)))


def test_workers_that_never_get_ready_stop_the_job() -> None:
    """Deaths during the start count too, so that a broken installation ends after the budget."""
    scheduler = Scheduler(shards(9), n_workers=2, n_videos=9, worker_deaths=5)
    scheduler.start()
    for _ in range(4):
        feed(scheduler, WorkerDied(min(scheduler.starting), "no driver"))
    assert scheduler.finished is None
    feed(scheduler, WorkerDied(min(scheduler.starting), "no driver"))
    assert scheduler.finished.exit_code == 6


@pytest.mark.parametrize("found_by_check", [False, True])
def test_a_commit_renews_the_budget_of_deaths(found_by_check: bool) -> None:
    """Deaths are counted from the last commit, whether a worker reported it or a check found it."""
    scheduler = machine(9, worker_deaths=3, shard_attempts=99)
    for _ in range(4):
        die(scheduler)
        die(scheduler, committed=found_by_check)
        if not found_by_check:
            worker = min(scheduler.starting)
            (given,) = of_kind(feed(scheduler, WorkerReady(worker)), Dispatch)
            feed(scheduler, done(worker, given.shard))
    assert scheduler.finished is None
    assert len(scheduler.open) == 5


def test_workers_that_commit_and_then_die_do_not_spend_the_budget() -> None:
    """Deaths after a commit are not deaths without one, even if all are reported before the first check is answered."""
    scheduler = machine(6, workers=3, worker_deaths=3)
    feed(scheduler, *[WorkerDied(worker, "its node went") for worker in range(3)])
    feed(scheduler, *[Checked(ShardKey(1, at), True, 10, 20) for at in range(3)])
    assert work_off(scheduler).exit_code == 0


def dies_on(shard: ShardKey) -> Callable[[int, ShardKey], list[Event]]:
    return lambda worker, given: (
        [WorkerDied(worker, "killed"), Checked(given, committed=False)] if given == shard else [done(worker, given)]
    )


def defect_on(shard: ShardKey) -> Callable[[int, ShardKey], list[Event]]:
    return lambda worker, given: [trouble(worker, given, "internal") if given == shard else done(worker, given)]


@pytest.mark.parametrize(("answer", "code"), [(dies_on, 6), (defect_on, 1)])
@pytest.mark.parametrize("attempts", [1, 4])
def test_a_shard_that_cannot_be_finished_is_given_up_alone(answer: Callable, code: int, attempts: int) -> None:
    """A shard whose tries are spent ends the job with 6 (deaths) or 1 (defect) and is named; all others are done."""
    scheduler = machine(6, workers=2, shard_attempts=attempts)
    tries: Counter[ShardKey] = Counter()
    reply = answer(ShardKey(1, 3))

    def counted(worker: int, shard: ShardKey) -> list[Event]:
        tries[shard] += 1
        return reply(worker, shard)

    finish = work_off(scheduler, counted)
    assert finish.exit_code == code
    assert "1/3" in finish.sentence
    assert scheduler.open == {ShardKey(1, 3)}
    assert scheduler.totals == Totals(50, 100)
    assert tries == {**dict.fromkeys(shards(6), 1), ShardKey(1, 3): attempts}


def test_a_shard_that_succeeds_at_its_last_try_is_done() -> None:
    """Three defects and then a success are a success."""
    scheduler = machine(1, shard_attempts=4)
    for _ in range(3):
        assert feed(scheduler, trouble(0, ShardKey(1, 0), "internal")) == [Dispatch(0, ShardKey(1, 0))]
    assert feed(scheduler, done(0, ShardKey(1, 0)))[-1].exit_code == 0


# ---- trouble and stops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "code"), [("store", 6), ("job", 2)])
def test_trouble_that_no_retry_fixes_stops_the_job_at_once(kind: str, code: int) -> None:
    """An error of the store ends with 6, one of the job with 2, at once, with its message. The shard is open."""
    scheduler = machine(4, workers=2)
    commands = feed(scheduler, trouble(0, ShardKey(1, 0), kind))
    assert commands == [StopWorker(0), StopWorker(1), Finish(code, f"{kind} trouble")]
    assert scheduler.open == set(shards(4))


@pytest.mark.fault(28, 46)
def test_an_outage_pauses_until_a_shard_on_trial_is_done() -> None:
    """After an outage nothing is dispatched; `TryAgain` gives one shard a trial, and its success ends the pause."""
    scheduler = machine(6, workers=3)
    assert feed(scheduler, *(trouble(worker, ShardKey(1, worker), "outage") for worker in range(3))) == []
    assert scheduler.outage == "outage trouble"
    for _ in range(20):  # far more than the attempts of a shard: an outage does not count
        dispatched = of_kind(feed(scheduler, TryAgain(), TryAgain()), Dispatch)
        assert len(dispatched) == 1
        assert feed(scheduler, trouble(dispatched[0].worker, dispatched[0].shard, "outage")) == []
    [(worker, shard)] = scheduler_trial(scheduler)
    assert len(of_kind(feed(scheduler, done(worker, shard)), Dispatch)) == 3
    again = [feed(scheduler, trouble(*pair, "outage")) for pair in flying(scheduler)]
    assert again == [[], [], []], "the trial that ended one outage is not left over for the next"
    assert len(scheduler_trial(scheduler)) == 1
    for worker, shard in flying(scheduler):
        feed(scheduler, done(worker, shard))
    assert work_off(scheduler).exit_code == 0


def scheduler_trial(scheduler: Scheduler) -> list[tuple[int, ShardKey]]:
    return [(command.worker, command.shard) for command in of_kind(feed(scheduler, TryAgain()), Dispatch)]


def test_a_source_that_never_answers_does_not_hold_up_the_others() -> None:
    """One shard whose source never answers: all others are done, and the run waits for that one only."""
    scheduler = machine(4, shard_attempts=2)
    for _ in range(100):
        if scheduler.finished:
            break
        feed(scheduler, TryAgain())
        for worker, shard in flying(scheduler):
            feed(scheduler, trouble(worker, shard, "outage") if shard.shard == 0 else done(worker, shard))
        if scheduler.outage and scheduler.open == {ShardKey(1, 0)}:
            break  # only that one is left, until the driver's patience ends
    assert scheduler.open == {ShardKey(1, 0)}
    assert scheduler.totals.videos == 30


def test_an_outage_while_a_worker_starts_costs_no_budget() -> None:
    """A worker that could not read its weights is started again on trial, however often, and the job goes on."""
    scheduler = Scheduler(shards(1), n_workers=1, n_videos=9, worker_deaths=1)
    scheduler.start()
    for worker in range(10):
        assert feed(scheduler, WorkerUnready(worker, "no store")) == []
        assert feed(scheduler, TryAgain()) == [StartWorker(worker + 1)]
    assert feed(scheduler, WorkerReady(10)) == [Dispatch(10, ShardKey(1, 0))]
    assert feed(scheduler, done(10, ShardKey(1, 0)))[-1].exit_code == 0


def test_a_check_that_finds_no_store_leaves_the_shard_open() -> None:
    """The shard of a dead worker goes back to the queue if the check fails, and waits for the end of the outage."""
    scheduler = machine(1)
    assert feed(scheduler, WorkerDied(0, "killed")) == [Check(ShardKey(1, 0))]
    assert feed(scheduler, CheckFailed(ShardKey(1, 0), "no store")) == []
    assert feed(scheduler, TryAgain()) == [StartWorker(1)]
    assert feed(scheduler, WorkerReady(1)) == [Dispatch(1, ShardKey(1, 0))]


def test_a_refused_worker_stops_the_job() -> None:
    """A worker that must not be used ends the job with 6 and says why; it runs no shard."""
    scheduler = Scheduler(shards(4), n_workers=2, n_videos=9)
    scheduler.start()
    commands = feed(scheduler, WorkerReady(0), WorkerRefused(1, "other code than the driver's"))
    assert commands[-1] == Finish(6, "other code than the driver's")
    assert of_kind(commands, Dispatch) == [Dispatch(0, ShardKey(1, 0))]


def test_a_drain_finishes_shards_in_progress_and_starts_nothing() -> None:
    """Stop with drain waits for every shard in progress, dispatches and starts nothing more, then gives its code."""
    scheduler = machine(6, workers=2)
    assert feed(scheduler, CANCEL) == [Drain(0), Drain(1)]
    assert feed(scheduler, done(0, ShardKey(1, 0))) == []
    commands = feed(scheduler, done(1, ShardKey(1, 1)))
    assert commands == [StopWorker(0), StopWorker(1), Finish(6, "cancelled")]
    assert scheduler.totals == Totals(20, 40)


def test_a_drain_waits_for_the_check_of_a_dead_workers_shard() -> None:
    """A death during a drain is still checked, and a commit found then is counted before the end."""
    scheduler = machine(3)
    assert feed(scheduler, CANCEL, WorkerDied(0, "killed")) == [Drain(0), Check(ShardKey(1, 0))]
    assert feed(scheduler, Checked(ShardKey(1, 0), True, 10, 20)) == [Finish(6, "cancelled")]
    assert scheduler.totals == Totals(10, 20)


def test_a_drain_with_nothing_in_flight_ends_at_once() -> None:
    """Workers that are only starting are not waited for."""
    scheduler = Scheduler(shards(3), n_workers=2, n_videos=9)
    scheduler.start()
    assert feed(scheduler, CANCEL) == [StopWorker(0), StopWorker(1), Finish(6, "cancelled")]


def test_a_hard_stop_overrides_a_drain() -> None:
    """Stop without drain ends a drain at once, with its own code."""
    scheduler = machine(3)
    assert feed(scheduler, CANCEL) == [Drain(0)]
    assert feed(scheduler, INTERRUPT) == [StopWorker(0), Finish(143, "interrupted")]


def test_the_first_drain_gives_the_code() -> None:
    """A second drain changes neither the code nor the sentence of the first."""
    scheduler = machine(3)
    feed(scheduler, CANCEL, Stop(5, "superseded", drain=True))
    assert feed(scheduler, done(0, ShardKey(1, 0)))[-1] == Finish(6, "cancelled")


@pytest.mark.parametrize(
    ("options", "before", "failures", "code"),
    [({}, [CANCEL], {}, 0), ({"max_failures": MaxFailures(count=0)}, [], {"truncated": 1}, 3)],
    ids=["drain", "max-failures"],
)
def test_a_stop_that_leaves_nothing_open_is_a_finish(options: dict, before: list, failures: dict, code: int) -> None:
    """A job whose last shard is done has finished, though a drain or --max-failures stopped it at that very shard."""
    scheduler = machine(1, **options)
    feed(scheduler, *before)
    assert feed(scheduler, done(0, ShardKey(1, 0), **failures))[-1].exit_code == code


# ---- hopeless jobs ----------------------------------------------------------------------------------------------


def run_of(scheduler: Scheduler, failures: list[dict[str, int]], n_videos: int) -> Finish:
    """One worker does the shards in order, shard i with failures[i]."""
    return work_off(scheduler, lambda worker, shard: [done(worker, shard, n_videos, **failures[shard.shard])])


def test_more_than_half_of_the_first_200_for_one_reason_is_hopeless() -> None:
    """101 of the first 200 videos failing for one reason end the job with 6 and name the reason; 100 do not."""
    scheduler = machine(5, n_videos=500)
    finish = run_of(scheduler, [{"truncated": 60}, {"truncated": 41}, {}, {}, {}], 100)
    assert finish.exit_code == 6
    assert "101 of the first 200" in finish.sentence
    assert "truncated" in finish.sentence
    assert len(scheduler.open) == 3
    assert run_of(machine(5, n_videos=500), [{"truncated": 60}, {"truncated": 40}, {}, {}, {}], 100).exit_code == 3


def test_mixed_reasons_are_not_hopeless() -> None:
    """All of the first 200 videos may fail if no single reason has more than half of them."""
    mixed = {"truncated": 50, "too_long": 50}
    assert run_of(machine(4, n_videos=400), [mixed, mixed, {}, {}], 100).exit_code == 3


def test_only_the_first_videos_can_be_hopeless() -> None:
    """After 200 good videos, any number of failures is counted and does not stop the job."""
    bad = {"truncated": 100}
    assert run_of(machine(5, n_videos=500), [{}, {}, bad, bad, bad], 100).exit_code == 3


def test_a_tenth_of_a_large_shard_is_not_hopeless() -> None:
    """101 failures in a first shard of 1000 videos are a tenth, not more than half, and do not stop the job."""
    assert run_of(machine(2, n_videos=2000), [{"truncated": 101}, {}], 1000).exit_code == 3


@pytest.mark.parametrize("rule", [MaxFailures(count=500), MaxFailures(percent=100)])
def test_a_limit_of_the_user_replaces_the_default_rule(rule: MaxFailures) -> None:
    """With --max-failures, given as a number or a share, a job whose every video fails for one reason goes on."""
    bad = {"truncated": 100}
    assert run_of(machine(5, n_videos=500, max_failures=rule), [bad] * 5, 100).exit_code == 3


def test_a_share_of_a_tiny_job() -> None:
    """A share is of all videos, even if that is one: its failure is more than 60%, and no more than 100%."""
    for percent, stops in ((60, True), (100, False)):
        scheduler = machine(2, n_videos=1, max_failures=MaxFailures(percent=percent))
        feed(scheduler, done(0, ShardKey(1, 0), 1, truncated=1))
        assert (scheduler.finished is not None) == stops


def test_patience_is_that_of_the_run_options() -> None:
    """A scheduler without arguments has the limits that RunOptions has by default."""
    scheduler, options = machine(1), RunOptions(workers=1, batch_size=1, threads=1, decode_tasks=1)
    assert scheduler.shard_attempts == options.shard_attempts
    assert scheduler.worker_deaths == options.worker_deaths
    assert scheduler.max_failures == options.max_failures


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((10, 20, 25, 40, 50, 100)).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(st.tuples(st.integers(0, size), st.booleans()), min_size=1, max_size=40),
        )
    )
)
def test_the_default_rule_for_any_shards(job: tuple[int, list[tuple[int, bool]]]) -> None:
    """A job stops as hopeless exactly at the commit that makes one reason the reason of over half of 200 videos."""
    size, bad = job
    failures = [{"truncated" if first else "too_long": count} for count, first in bad]
    videos: list[str] = []  # one word for each video in the order of commits
    stops_at = None
    for at, (count, first) in enumerate(bad):
        videos += ["truncated" if first else "too_long"] * count + ["fine"] * (size - count)
        head = Counter(videos[:FIRST_VIDEOS])
        if max(head["truncated"], head["too_long"]) > 100:
            stops_at = at
            break
    scheduler = machine(len(bad) + 1, n_videos=10_000)
    finish = run_of(scheduler, [*failures, {}], size)
    assert len(scheduler.open) == (0 if stops_at is None else len(bad) - stops_at)
    assert (finish.exit_code == 6) == (stops_at is not None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=12), st.integers(0, 30), st.booleans(), st.integers(0, 15))
def test_the_users_limit_for_any_shards(bad: list[int], limit: int, share: bool, before: int) -> None:
    """A job stops at the first commit that brings all failures, those of earlier runs included, above the limit."""
    n_videos = 10 * (len(bad) + 2)
    rule = MaxFailures(percent=limit) if share else MaxFailures(count=limit)
    sums = [before + sum(bad[: at + 1]) for at in range(len(bad))]
    over = [100 * failed > limit * n_videos if share else failed > limit for failed in sums]
    scheduler = machine(
        len(bad) + 1, n_videos=n_videos, max_failures=rule, done=Totals(0, 0, Counter(truncated=before))
    )
    # the last shard never answers, so that the limit is met with work left or not at all
    for at, count in enumerate(bad):
        if scheduler.finished is None:
            feed(scheduler, done(0, ShardKey(1, at), truncated=count))
        assert (scheduler.finished is not None) == any(over[: at + 1])
    assert scheduler.finished is None or scheduler.finished.exit_code == 6


# ---- what people and developers see -----------------------------------------------------------------------------


def test_story_tells_one_shards_history() -> None:
    """The story of a shard holds its dispatches, death, check and end in order, and nothing of other shards."""
    scheduler = machine(2, workers=2)
    shard = ShardKey(1, 0)
    feed(scheduler, WorkerDied(0, "killed"), done(1, ShardKey(1, 1)), Checked(shard, committed=False), done(1, shard))
    story = scheduler.story(shard)
    words = ["WorkerReady(worker=0)", "WorkerDied(worker=0", "Checked(", "ShardDone(worker=1"]
    assert [line.startswith(word) for line, word in zip(story, words, strict=True)] == [True] * 4
    assert "Dispatch(worker=1" in story[2]
    assert "Check(" in story[1]
    assert scheduler.story(ShardKey(1, 1))[1].endswith(" -> nothing")  # no shard was left for its worker
    assert scheduler.story(ShardKey(1, 9)) == []


def test_story_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest events are kept, so that a long job's memory does not grow."""
    monkeypatch.setattr(state, "STORY_EVENTS", 10)
    scheduler = machine(30)
    work_off(scheduler)
    assert scheduler.story(ShardKey(1, 3)) == []
    assert scheduler.story(ShardKey(1, 29)) != []


def finish_with(code: int) -> Callable[[Scheduler], None]:
    return lambda scheduler: setattr(scheduler, "finished", Finish(code, "finished"))


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (lambda s: s.queue.append(s.queue[0]), r"a shard is in two places: \[\(.*, 2\)\]"),
        (lambda s: s.queue.append(s.in_flight[0][0]), r"a shard is in two places: \[\(.*, 2\)\]"),
        (lambda s: s.checking.update({s.in_flight[0][0]: True}), r"a shard is in two places: \[\(.*, 2\)\]"),
        (lambda s: s.stuck.update({s.queue[0]: "why"}), r"a shard is in two places: \[\(.*, 2\)\]"),
        (lambda s: s.queue.popleft(), r"shards lost: \{.*\}"),
        (lambda s: s.in_flight.pop(0), r"shards lost: \{.*\}"),
        (lambda s: s.queue.append(ShardKey(7, 7)), r"shards lost: \{.*\}"),
        (lambda s: s.open.discard(s.queue[0]), r"shards lost: \{.*\}"),
        (lambda s: s.idle.add(0), "a worker is idle and busy"),
        (lambda s: s.in_flight[0].append(s.queue.pop()), "a worker has too much"),
        (lambda s: s.starting.add(77), "too many workers"),
        (lambda s: s.idle.add(77), "too many workers"),
        (finish_with(0), "finished with 4 open shards"),
        (finish_with(3), "finished with 4 open shards"),
    ],
)
def test_validate_notices_a_state_that_contradicts_itself(tamper: Callable, complaint: str) -> None:
    """validate() passes on a true state and raises on one that was tampered with, saying what is wrong."""
    scheduler = machine(4, workers=2)
    scheduler.validate()
    tamper(scheduler)
    with pytest.raises(AssertionError, match=f"^{complaint}$"):
        scheduler.validate()


def test_a_small_job_is_validated_after_every_event() -> None:
    """`check` notices at once that a shard was lost."""
    scheduler = machine(state.CHECKED_AT_ONCE - 1, workers=1)
    scheduler.check()
    scheduler.queue.pop()
    with pytest.raises(AssertionError, match="lost"):
        scheduler.check()


def test_a_large_job_is_validated_so_rarely_that_the_cost_per_event_is_constant() -> None:
    """A job of n shards is validated once in n / CHECKED_AT_ONCE events, which notices a lost shard."""
    for n_shards in (1000, 5000):
        scheduler, silent = machine(n_shards, workers=1), n_shards // state.CHECKED_AT_ONCE
        for _ in range(2):
            for _ in range(silent + 1):
                scheduler.check()
            lost = scheduler.queue.pop()
            for _ in range(silent):
                scheduler.check()
            with pytest.raises(AssertionError, match="lost"):
                scheduler.check()
            scheduler.queue.append(lost)


def test_the_end_of_a_run_is_validated() -> None:
    """However large the job was: a run that finishes with an open shard is not a success."""
    scheduler = machine(1000)
    finish_with(0)(scheduler)
    with pytest.raises(AssertionError, match="open shards"):
        scheduler.check()


def test_of_a_done_shard_nothing_is_kept() -> None:
    """Neither its tries nor that it had to be done alone. Otherwise a job of millions of shards would keep them all."""
    scheduler = machine(9, workers=2, shards_each=2)
    feed(scheduler, WorkerDied(0, "gone"), *(Checked(shard, committed=False) for shard in list(scheduler.in_flight[0])))
    assert scheduler.alone
    work_off(scheduler)
    assert not scheduler.alone and not scheduler.attempts


def test_the_scheduler_works_without_asserts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `python -O` a done shard leaves its worker, and the job ends."""
    bare = ModuleType("p3d.jobs.state_without_asserts")
    monkeypatch.setitem(sys.modules, bare.__name__, bare)
    exec(compile(Path(state.__file__).read_text(), state.__file__, "exec", optimize=1), bare.__dict__)
    scheduler = bare.Scheduler([bare.ShardKey(1, 0)], n_workers=1, n_videos=1)
    scheduler.start()
    scheduler.handle(bare.WorkerReady(0))
    scheduler.handle(bare.ShardDone(0, bare.ShardKey(1, 0), 1, 1))
    assert scheduler.finished is not None


# ---- the simulation ---------------------------------------------------------------------------------------------

SEEDS = range(int(os.environ.get("P3D_FIRST_SEED", "0")), int(os.environ.get("P3D_FIRST_SEED", "0")) + 5000)
DOCUMENTED = {0, 1, 2, 3, 5, 6, 130, 143}  # exit codes of docs/reference/exit-codes.md that a scheduler can give
OFTEN = (
    "dies starting",
    "dies idle",
    "dies before commit",
    "dies after commit",
    "commits when dead",
    "internal",
    "outage",
    "try again",
)
RARE = ("store", "job", "refused", "check fails", "unready", "stop", "drain")
REASONS = ("truncated", "too_long", "not_a_video")


@dataclass
class World:
    """Workers, a store and faults, and a model of what the scheduler may do, compared with all it does.

    `truth` is what each shard holds once committed; `store` holds those that are. A worker believed dead may commit.
    """

    rng: Random
    truth: dict[ShardKey, ShardDone]
    rates: dict[str, float]
    store: set[ShardKey] = field(default_factory=set)
    undead: list[ShardKey] = field(default_factory=list)  # shards of workers that are alive but believed dead
    fired: Counter[str] = field(default_factory=Counter)
    trace: list[tuple[Event, tuple[Command, ...]]] = field(default_factory=list)

    def run(self, make: Callable[..., Scheduler], *, n_workers: int, max_failures: MaxFailures) -> Finish:
        """One run of the job, from what the store holds to its last command."""
        rng = self.rng
        self.n_workers, self.max_failures = n_workers, max_failures
        self.shard_attempts, self.worker_deaths = rng.randint(1, 4), rng.randint(1, 8)
        self.todo = [shard for shard in self.truth if shard not in self.store]
        self.n_videos = sum(shard.n_videos for shard in self.truth.values())
        self.workers: dict[int, str] = {}  # starting, idle, busy: those that the scheduler must consider alive
        self.ever: set[int] = set()
        self.shards_each = rng.choice((1, 1, 2, 3))
        self.flying: dict[int, list[ShardKey]] = {}
        self.alone: set[ShardKey] = set()
        self.drained: set[int] = set()  # workers that must start nothing more
        self.unchecked: dict[ShardKey, bool] = {}  # shards of dead workers: has a Check been asked?
        self.second: set[ShardKey] = set()  # of those, the ones whose death is already counted by another
        self.closed: set[ShardKey] = set()
        self.stuck: dict[ShardKey, bool] = {}  # by a defect?
        self.tries: Counter[ShardKey] = Counter()
        self.deaths, self.fruitless_deaths = 0, 0  # since a commit: reported, and known to be without one
        self.before = self.sums(self.store)
        self.first: Counter[str] = Counter()
        self.first_videos = 0
        self.stopped: Stop | None = None
        self.paused, self.trials, self.outages = False, 0, 0
        self.finish: Finish | None = None
        self.scheduler = make(
            self.todo,
            n_workers=n_workers,
            n_videos=self.n_videos,
            shards_each=self.shards_each,
            done=self.sums(self.store),
            max_failures=max_failures,
            shard_attempts=self.shard_attempts,
            worker_deaths=self.worker_deaths,
        )
        self.worker_deaths = max(self.worker_deaths, 2 * n_workers)  # losing a node is one event
        self.obey(self.scheduler.start())
        self.scheduler.validate()
        dispatches = len(self.todo) * self.shard_attempts
        deaths = self.worker_deaths * (len(self.todo) + 1) + n_workers
        bound = 2 * dispatches + 2 * deaths + n_workers + 3  # answers and checks, deaths and starts, stops
        n_events = 0
        while self.finish is None:
            if (event := self.something()) is not None:
                n_events += 1
                assert n_events <= bound + 8 * self.outages, f"no end after {n_events} events"
                self.deliver(event)
        self.check_end()
        return self.finish

    def sums(self, shards: Iterable[ShardKey]) -> Totals:
        totals = Totals()
        for shard in shards:
            totals.videos += self.truth[shard].n_videos
            totals.clips += self.truth[shard].n_clips
            totals.failures.update(dict(self.truth[shard].failures))
        return totals

    # -- the world

    def strikes(self, fault: str) -> bool:
        if self.rates.get(fault, 0.0) <= self.rng.random():
            return False
        self.fired[fault] += 1
        return True

    def something(self) -> Event | None:
        """The next event; None if something happens that the scheduler does not see."""
        asked = [shard for shard, has in self.unchecked.items() if has]
        awaited = [*[w for w, does in self.workers.items() if does != "idle"], *asked]
        if self.paused and (not awaited or self.strikes("try again")):
            return TryAgain()
        assert awaited, "nothing can happen any more, and the job has not finished"
        if self.stopped is None or self.stopped.drain:
            if self.strikes("stop"):
                return Stop(self.rng.choice((5, 6, 130, 143)), "from outside")
            if self.strikes("drain"):
                return CANCEL
        if self.undead and self.rng.random() < 0.2:
            self.fired["commits when dead"] += 1
            self.store.add(self.undead.pop(self.rng.randrange(len(self.undead))))
            return None
        idle = [worker for worker, does in self.workers.items() if does == "idle"]
        if idle and self.strikes("dies idle"):
            return WorkerDied(self.rng.choice(idle), "died idle")
        match self.rng.choice(awaited):
            case ShardKey() as shard:
                return self.look(shard)
            case worker if self.workers[worker] == "starting":
                if self.strikes("refused"):
                    return WorkerRefused(worker, "refused")
                if self.strikes("unready"):
                    return WorkerUnready(worker, "no store")
                return WorkerDied(worker, "died starting") if self.strikes("dies starting") else WorkerReady(worker)
            case worker:
                return self.answer(worker, self.rng.choice(self.flying[worker]))

    def look(self, shard: ShardKey) -> Event:
        if self.strikes("check fails"):
            return CheckFailed(shard, "the store does not answer")
        if shard not in self.store:
            return Checked(shard, committed=False)
        truth = self.truth[shard]
        return Checked(shard, True, truth.n_videos, truth.n_clips, truth.failures)

    def answer(self, worker: int, shard: ShardKey) -> Event:
        if worker in self.drained and self.strikes("withdrawn"):
            return ShardTrouble(worker, shard, "withdrawn", "")
        if self.strikes("dies before commit"):
            return WorkerDied(worker, "died before its commit")
        if self.rates["commits when dead"] > self.rng.random():
            self.undead += self.flying[worker]
            return WorkerDied(worker, "out of reach")
        for kind in ("outage", "internal", "store", "job"):
            if self.strikes(kind):
                if self.rng.random() < 0.3:
                    self.store.add(shard)  # committed before the error
                return ShardTrouble(worker, shard, kind, f"{kind} trouble")
        self.store.add(shard)
        if self.strikes("dies after commit"):
            return WorkerDied(worker, "died after its commit")
        truth = self.truth[shard]
        return ShardDone(worker, shard, truth.n_videos, truth.n_clips, truth.failures)

    # -- the model

    def deliver(self, event: Event) -> None:
        """Pass an event to the scheduler, and compare its commands with the model."""
        match event:
            case WorkerReady(worker):
                self.workers[worker] = "idle"
            case WorkerRefused(worker):
                del self.workers[worker]
                self.stop(Stop(6, ""))
            case WorkerUnready(worker):
                del self.workers[worker]
                self.pause()
            case CheckFailed(shard):
                del self.unchecked[shard]
                self.tries[shard] -= 1
                self.pause()
            case TryAgain():
                self.trials = int(self.paused and not self.flying)
            case WorkerDied(worker):
                del self.workers[worker]
                self.deaths += 1
                shards = self.flying.pop(worker, [])
                if not shards:
                    self.fruitless_deaths += 1
                if len(shards) > 1:
                    self.alone.update(shards)
                self.unchecked.update(dict.fromkeys(shards, False))
                self.second.difference_update(shards[:1])
                self.second.update(shards[1:])
            case ShardDone(worker, shard):
                self.leave(worker, shard)
                self.close(shard)
            case ShardTrouble(worker, shard, kind):
                self.leave(worker, shard)
                if kind == "withdrawn":
                    self.tries[shard] -= 1
                elif kind == "internal":
                    self.again(shard, internal=True)
                elif kind == "outage":
                    self.tries[shard] -= self.paused
                    self.again(shard, internal=False)
                    self.pause()
                else:
                    self.stop(Stop({"store": 6, "job": 2}[kind], ""))
            case Checked(shard, committed):
                del self.unchecked[shard]
                if committed:
                    self.close(shard)
                else:
                    self.fruitless_deaths += shard not in self.second
                    self.again(shard, internal=False)
            case Stop():
                self.stop(event)
        # Both readings of the budget may stop the job: deaths as reported, and deaths whose check found nothing.
        if min(self.deaths, self.fruitless_deaths) >= self.worker_deaths:
            self.stop(Stop(6, ""))
            self.fired["budget"] += 1
        commands = self.scheduler.handle(event)
        self.trace.append((event, tuple(commands)))
        self.scheduler.validate()
        self.obey(commands)

    def leave(self, worker: int, shard: ShardKey) -> None:
        self.flying[worker].remove(shard)
        if not self.flying[worker]:
            del self.flying[worker]
            self.workers[worker] = "idle"

    def pause(self) -> None:
        self.paused, self.trials, self.outages = True, 0, self.outages + 1

    def stop(self, stop: Stop) -> None:
        if self.stopped is None or (self.stopped.drain and not stop.drain):
            self.stopped = stop

    def again(self, shard: ShardKey, *, internal: bool) -> None:
        if self.tries[shard] == self.shard_attempts:
            self.stuck[shard] = internal
            self.fired["stuck"] += 1

    def close(self, shard: ShardKey) -> None:
        assert shard not in self.closed
        self.closed.add(shard)
        self.deaths = self.fruitless_deaths = 0
        self.paused, self.trials = False, 0
        truth, rule = self.truth[shard], self.max_failures
        if self.first_videos < FIRST_VIDEOS:  # all shards have the same size here, a divisor of 200
            self.first_videos += truth.n_videos
            self.first.update(dict(truth.failures))
        failed = self.before.failed + self.sums(self.closed).failed
        if rule == MaxFailures():
            hopeless = max(self.first.values(), default=0) > FIRST_VIDEOS // 2
        elif rule.count is not None:
            hopeless = failed > rule.count
        else:
            hopeless = 100 * failed > rule.percent * self.n_videos
        if hopeless:
            self.stop(Stop(6, ""))
            self.fired["hopeless"] += 1

    def outcome(self) -> int:
        if self.stuck:
            return 1 if any(self.stuck.values()) else 6
        failures = self.before.failures + self.sums(self.closed).failures
        return 1 if failures["internal"] else 3 if failures else 0

    def obey(self, commands: list[Command]) -> None:
        """Carry out the scheduler's commands, if the model allows them."""
        finish = next(iter(of_kind(commands, Finish)), None)
        assert finish is None or commands[-1] is finish, "Finish is the last command"
        for command in commands:
            match command:
                case StartWorker(worker):
                    assert self.stopped is None, "a worker starts during a stop"
                    assert not self.paused or self.trials, "a worker starts during an outage"
                    assert worker not in self.ever, "a worker's number is used again"
                    self.workers[worker] = "starting"
                    self.ever.add(worker)
                    work = len(self.todo) - len(self.closed) - len(self.stuck)
                    assert len(self.workers) <= min(self.n_workers, work), "more workers than allowed, or than work"
                case Dispatch(worker, shard):
                    assert self.stopped is None, "a dispatch during a stop"
                    assert not self.paused or self.trials, "a dispatch during an outage"
                    self.trials -= self.paused
                    in_hand = self.flying.get(worker, [])
                    if in_hand:
                        assert self.workers[worker] == "busy" and not self.paused, "no time for a second shard"
                        assert "idle" not in self.workers.values(), "a second shard, where another has none"
                        assert len(in_hand) < self.shards_each, "too many shards for a worker"
                        assert self.alone.isdisjoint([*in_hand, shard]), "a shard that must be alone gets company"
                        self.fired["ahead"] += 1
                    else:
                        assert self.workers.get(worker) == "idle", f"worker {worker} is not idle"
                    assert shard in self.truth, "a dispatch of a shard that is not in the job"
                    assert not any(shard in shards for shards in self.flying.values()), "on two live workers"
                    assert shard not in self.unchecked, "a dead worker's shard is dispatched before it was checked"
                    assert shard not in self.closed, "a done shard is dispatched again"
                    assert self.tries[shard] < self.shard_attempts, "a shard is tried too often"
                    self.tries[shard] += 1
                    self.flying.setdefault(worker, []).append(shard)
                    self.workers[worker] = "busy"
                case Drain(worker):
                    assert self.stopped is not None and self.stopped.drain, "a drain that nobody asked for"
                    assert worker in self.flying and worker not in self.drained, "a drain of an idle worker, or twice"
                    self.drained.add(worker)
                case Check(shard):
                    assert self.unchecked.get(shard) is False, "a check of a shard that needs none"
                    self.unchecked[shard] = True
                case StopWorker(worker):
                    assert finish is not None, "a worker is stopped before the end"
                    assert worker in self.workers, "a worker is stopped that is not there"
                    del self.workers[worker]
                case Finish():
                    self.finish = finish
        if finish is None:
            assert all(self.unchecked.values()), "a dead worker's shard is not checked"
        self.may_finish(finish)

    def may_finish(self, finish: Finish | None) -> None:
        waits = bool(self.flying or self.unchecked)
        spent = max(self.deaths, self.fruitless_deaths) >= self.worker_deaths  # by at least one reading
        left = len(self.todo) - len(self.closed)
        if self.stopped is not None and not (self.stopped.drain and waits):
            assert finish is not None, "a stop is ignored"
            # A test above shows which of the two it is when a stop comes with the very last shard.
            assert finish.exit_code in ({self.stopped.exit_code} if left else {self.stopped.exit_code, self.outcome()})
            return
        codes = {6} if spent else set()
        if self.stopped is None and left == len(self.stuck):
            assert finish is not None, "all is done, and the job does not finish"
            codes.add(self.outcome())
        assert finish is None or finish.exit_code in codes, f"finished too early or wrongly: {finish}"

    def check_end(self) -> None:
        """What must hold at the end of a run."""
        assert self.finish.exit_code in DOCUMENTED
        assert self.finish.sentence
        assert not self.workers, f"workers left alive: {self.workers}"
        assert self.closed <= self.store, "a shard counts as done that the store does not have"
        assert self.scheduler.open == set(self.todo) - self.closed
        assert self.scheduler.totals == self.sums(set(self.truth) - self.scheduler.open), "sums are not the store's"
        if self.finish.exit_code in (0, 3):
            assert self.store == set(self.truth), f"{self.finish} with shards missing in the store"
        before = repr(self.scheduler.totals)
        for worker, shards in self.flying.items():  # answers that come too late
            for shard in shards:
                assert self.scheduler.handle(ShardDone(worker, shard, 1, 1)) == []
        assert repr(self.scheduler.totals) == before


def simulate(seed: int, make: Callable[..., Scheduler] = Scheduler) -> World:
    """One job in a world with faults, then a resume in one without. In the end every shard is done once."""
    rng = Random(seed)
    size, n_shards = rng.choice((1, 8, 40, 50, 100)), rng.randint(0, 12)
    truth = {}
    reasons = rng.choice(((), (), REASONS, REASONS[:1], (*REASONS, "internal")))
    failing = rng.choice((0.1, 0.7, 1.0))
    for at in range(n_shards):
        failures: Counter[str] = Counter()
        if reasons and rng.random() < failing:
            failures[rng.choice(reasons)] += rng.randint(1, size)
        shard = ShardKey(1 + at % 2, at)
        truth[shard] = ShardDone(0, shard, size, rng.randint(0, 5 * size), tuple(failures.items()))
    rates = {fault: rng.choice((0.0, 0.0, 0.03, 0.15, 0.4)) for fault in OFTEN}
    rates |= {fault: rng.choice((0.0, 0.0, 0.0, 0.05)) for fault in RARE}
    rates["withdrawn"] = 0.5
    world = World(rng, truth, rates)
    world.store = {shard for shard in truth if rng.random() < 0.1}  # of an earlier run
    rule = rng.choice((MaxFailures(), MaxFailures(), ANY_NUMBER, MaxFailures(count=30), MaxFailures(percent=20)))
    world.run(make, n_workers=rng.randint(1, 5), max_failures=rule)

    world.rates = dict.fromkeys(OFTEN, 0.0)
    finish = world.run(make, n_workers=rng.randint(1, 5), max_failures=ANY_NUMBER)
    assert world.store == set(truth), "the resume did not do everything"
    assert not world.scheduler.open
    assert finish.exit_code in (0, 1, 3)
    assert max(world.tries.values(), default=0) <= 1, "a resume without faults does a shard twice"
    return world


def simulate_named(seed: int, make: Callable[..., Scheduler] = Scheduler) -> World:
    """simulate(); a failure names its seed."""
    try:
        return simulate(seed, make)
    except BaseException as error:
        error.add_note(f"replay with simulate({seed})")
        raise


def test_whole_jobs_in_a_hostile_world() -> None:
    """Whatever dies, stalls or stops: each shard is done once, sums are those of the store, and the exit code is right.

    P3D_FIRST_SEED moves the range of seeds.
    """
    fired: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    started = time.monotonic()
    for seed in SEEDS:
        world = simulate_named(seed)
        fired.update(world.fired.keys())
        first_end = next((commands[-1] for _, commands in world.trace if of_kind(commands, Finish)), None)
        if first_end is not None:
            codes[first_end.exit_code] += 1
    rate = len(SEEDS) / (time.monotonic() - started)
    print(f"seeds {SEEDS.start}..{SEEDS.stop - 1}, {rate:.0f} seeds/s; first ends by exit code {dict(codes)}")
    print("share of seeds in which each fault fired:", {k: f"{100 * n / len(SEEDS):.1f}%" for k, n in fired.items()})
    seldom = {"ahead", "withdrawn", "budget", "stuck", "hopeless"}
    never = {*OFTEN, *RARE, *seldom} - {k for k, n in fired.items() if n > len(SEEDS) / 500}
    assert not never, f"hardly any seed saw {never}"
    assert codes.keys() == DOCUMENTED


def test_a_seed_determines_the_run() -> None:
    """The same seed gives the same events and commands, so that a failure can be replayed."""
    for seed in range(20):
        assert simulate(seed).trace == simulate(seed).trace
    assert simulate(1).trace != simulate(2).trace


# ---- mutants ----------------------------------------------------------------------------------------------------


class ForgetsToRequeue(Scheduler):
    """After a death nobody does the shard again."""

    def _again(self, shard, detail):
        pass


class DispatchesWithoutRemoving(Scheduler):
    """A shard stays in the queue when it is given to a worker."""

    def _settle(self, commands):
        commands = super()._settle(commands)
        self.queue.extend(command.shard for command in of_kind(commands, Dispatch))
        return commands


class CountsTwice(Scheduler):
    """A commit that a check finds is counted twice."""

    def handle(self, event):
        if isinstance(event, Checked) and event.committed:
            self._count(event.shard, event.n_videos, event.n_clips, event.failures)
        return super().handle(event)


class CountsNoFailures(Scheduler):
    """Failed videos of a commit are forgotten."""

    def _count(self, shard, n_videos, n_clips, failures):
        super()._count(shard, n_videos, n_clips, ())


class IgnoresDrain(Scheduler):
    """A stop with drain is taken as one without."""

    def _stop(self, stop):
        super()._stop(Stop(stop.exit_code, stop.sentence))


class DrainsForEver(Scheduler):
    """A hard stop does not override a drain."""

    def _stop(self, stop):
        self.stopping = self.stopping or stop


class IgnoresStops(Scheduler):
    """Stops from outside are ignored."""

    def handle(self, event):
        return super().handle(event) if not isinstance(event, Stop) else []


class NeverForgivesDeaths(Scheduler):
    """A commit does not renew the budget of deaths."""

    def _count(self, *args):
        deaths = self._deaths
        super()._count(*args)
        self._deaths = deaths


class ForgivesDeathsAtOnce(Scheduler):
    """A new worker renews the budget of deaths."""

    def handle(self, event):
        if isinstance(event, WorkerReady):
            self._deaths = 0
        return super().handle(event)


class SkipsTheCheck(Scheduler):
    """A dead worker's shard is done again without a check of the store."""

    def _worker_died(self, worker, detail):
        for command in super()._worker_died(worker, detail):
            self.checking.pop(command.shard)
            self._again(command.shard, detail)
        return []


class DispatchesBeforeTheCheck(Scheduler):
    """A dead worker's shard is done again while the store is still asked."""

    def _worker_died(self, worker, detail):
        commands = super()._worker_died(worker, detail)
        for command in commands:
            self.checking.pop(command.shard)
            self.queue.appendleft(command.shard)
        return commands


class DisbelievesTheCheck(Scheduler):
    """A commit that a check finds is done again."""

    def handle(self, event):
        return super().handle(Checked(event.shard, False) if isinstance(event, Checked) else event)


class ForgetsTheCheck(Scheduler):
    """A shard that was checked stays among those to check."""

    def handle(self, event):
        commands = super().handle(event)
        if isinstance(event, Checked):
            self.checking[event.shard] = True
        return commands


class DispatchesWhileStopping(Scheduler):
    """A drain continues with the queue."""

    def _settle(self, commands):
        commands = super()._settle(commands)
        if self.stopping and not self.finished and self.queue and self.idle:
            worker, shard = self.idle.pop(), self.queue.popleft()
            self.in_flight.setdefault(worker, []).append(shard)
            commands.append(Dispatch(worker, shard))
        return commands


class ForgetsStuckShards(Scheduler):
    """A shard whose tries are spent is dropped without a word."""

    def _again(self, shard, detail):
        super()._again(shard, detail)
        if self.stuck.pop(shard, None):
            self.open.discard(shard)


class TriesForEver(Scheduler):
    """A shard is tried without bound."""

    def _again(self, shard, detail):
        self.queue.append(shard)


class TriesOnceLess(Scheduler):
    """A shard is given up one try too early."""

    def _again(self, shard, detail):
        self.attempts[shard] += 1
        super()._again(shard, detail)


class RetriesTheStore(Scheduler):
    """An error of the store is treated as a defect: tried again."""

    def _trouble(self, shard, kind, detail):
        super()._trouble(shard, "internal" if kind == "store" else kind, detail)


class LosesTroubledShards(Scheduler):
    """An error that stops the job closes its shard."""

    def _trouble(self, shard, kind, detail):
        super()._trouble(shard, kind, detail)
        if kind != "internal":
            self.open.discard(self.queue.popleft())


class ExcusesDefects(Scheduler):
    """A shard stuck by a defect ends the job as one stuck by deaths does."""

    def _outcome(self):
        self._internal = False
        return super()._outcome()


class TrustsTheDead(Scheduler):
    """A dead worker is still believed to be idle."""

    def _worker_died(self, worker, detail):
        commands = super()._worker_died(worker, detail)
        self.idle.add(worker)
        return commands


class ReplacesNobody(Scheduler):
    """No worker starts for a dead one."""

    def _settle(self, commands):
        commands = super()._settle(commands)
        if commands and self._deaths:
            started = of_kind(commands, StartWorker)
            self.starting -= {command.worker for command in started}
            commands = [command for command in commands if command not in started]
        return commands


class StartsOneTooMany(Scheduler):
    """One worker more than there is work for."""

    def start(self):
        commands = super().start()
        return commands if self.finished else [*commands, StartWorker(99)]


class FinishesDuringChecks(Scheduler):
    """The end does not wait for the answers of checks."""

    def _settle(self, commands):
        checking, self.checking = self.checking, {}
        try:
            return super()._settle(commands)
        finally:
            self.checking = checking


class NeverFinishes(Scheduler):
    """A finished job does not say so."""

    def _outcome(self):
        return 0, ""

    def _end(self, exit_code, sentence):
        return super()._end(exit_code, sentence) if sentence else []


class LeavesWorkersBehind(Scheduler):
    """Busy workers are not stopped at the end."""

    def _end(self, exit_code, sentence):
        commands = super()._end(exit_code, sentence)
        return [c for c in commands if not isinstance(c, StopWorker) or c.worker not in self.in_flight]


class NeverHopeless(Scheduler):
    """A hopeless job continues."""

    def _hopeless(self):
        return None


class HopelessTooEarly(Scheduler):
    """The default rule counts all reasons together."""

    def _hopeless(self):
        self._first = Counter(all=sum(self._first.values()))
        return super()._hopeless()


class DispatchesInAnOutage(Scheduler):
    """Workers still get shards during an outage."""

    def _pause(self, detail):
        pass


class NeverTriesAgain(Scheduler):
    """A pause never ends."""

    def handle(self, event):
        return [] if isinstance(event, TryAgain) else super().handle(event)


class ChargesShardsForAnOutage(Scheduler):
    """Every trial in an outage counts as an attempt of its shard."""

    def _trouble(self, shard, kind, detail):
        self.attempts[shard] += kind == "outage" and bool(self.outage)
        super()._trouble(shard, kind, detail)


class StaysPaused(Scheduler):
    """A shard that is done does not end the pause."""

    def _count(self, shard, n_videos, n_clips, failures):
        before = self.outage
        super()._count(shard, n_videos, n_clips, failures)
        self.outage = before


class HearsTheDead(Scheduler):
    """Answers after the end are still counted."""

    def handle(self, event):
        if self.finished and isinstance(event, ShardDone):
            self.totals.videos += event.n_videos
        return super().handle(event)


MUTANTS = [
    ForgetsToRequeue,
    DispatchesWithoutRemoving,
    CountsTwice,
    CountsNoFailures,
    IgnoresDrain,
    DrainsForEver,
    IgnoresStops,
    NeverForgivesDeaths,
    ForgivesDeathsAtOnce,
    SkipsTheCheck,
    DispatchesBeforeTheCheck,
    DisbelievesTheCheck,
    ForgetsTheCheck,
    DispatchesWhileStopping,
    ForgetsStuckShards,
    TriesForEver,
    TriesOnceLess,
    RetriesTheStore,
    LosesTroubledShards,
    ExcusesDefects,
    TrustsTheDead,
    ReplacesNobody,
    StartsOneTooMany,
    FinishesDuringChecks,
    NeverFinishes,
    LeavesWorkersBehind,
    NeverHopeless,
    HopelessTooEarly,
    DispatchesInAnOutage,
    NeverTriesAgain,
    ChargesShardsForAnOutage,
    StaysPaused,
    HearsTheDead,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_catches_a_scheduler_with_this_defect(mutant: type[Scheduler]) -> None:
    """A scheduler with one defect fails in one of the first seeds, all of which the true scheduler passes."""
    with pytest.raises(AssertionError) as caught:
        for seed in SEEDS[:1000]:
            simulate_named(seed, mutant)
    print(caught.value.__notes__[0], str(caught.value).splitlines()[:1])


# ---- messages ---------------------------------------------------------------------------------------------------


def given_up(*events: Event) -> str:
    """The last message of a job of two shards with one try each, where the first one gets `events`."""
    scheduler = machine(2, shard_attempts=1)
    feed(scheduler, *events)
    return work_off_trials(scheduler).sentence


def work_off_trials(scheduler: Scheduler) -> Finish:
    """Work off what is left; where stores failed, time passes."""
    for _ in range(20):
        if scheduler.finished is not None:
            return scheduler.finished
        feed(scheduler, TryAgain())
        for worker in sorted(scheduler.starting):
            feed(scheduler, WorkerReady(worker))
        for worker, shard in flying(scheduler):
            feed(scheduler, done(worker, shard))
    raise AssertionError("no end")


def test_the_outcome_says_why_a_shard_was_given_up() -> None:
    """A defect, a store and a death are each named, with the shard and the number of tries."""
    first = ShardKey(1, 0)
    start = "1 shard failed 1 time each; the first, 1/0: "
    assert given_up(trouble(0, first, "internal")) == f"{start}internal trouble"
    assert given_up(trouble(0, first, "outage")) == f"{start}outage trouble"
    assert given_up(WorkerDied(0, "killed"), Checked(first, committed=False)) == f"{start}its worker died"


def test_the_budget_of_deaths_says_what_killed_the_last() -> None:
    """The message has the number of deaths in a row and the detail of the last one."""
    scheduler = machine(1, shard_attempts=99, worker_deaths=2)
    for worker in (0, 1):
        if worker in scheduler.starting:
            feed(scheduler, WorkerReady(worker))
        feed(scheduler, WorkerDied(worker, f"death {worker}"), Checked(ShardKey(1, 0), committed=False))
    assert scheduler.finished is not None
    assert scheduler.finished.sentence == "2 workers died in a row without finishing a shard; the last: death 1"


def test_a_hopeless_job_names_its_commonest_reason_and_the_way_out() -> None:
    """Of two reasons the more frequent one is named, with the option to continue nevertheless."""
    scheduler = machine(9)
    [*_, finish] = feed(scheduler, done(0, ShardKey(1, 0), 200, not_a_video=120, truncated=2))
    assert finish == Finish(
        6,
        "120 of the first 200 videos failed with not_a_video, so the job looks hopeless; see `p3d failures`, and use "
        "--max-failures to continue nevertheless",
    )
