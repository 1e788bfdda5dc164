"""How fast `p3d train` takes steps, next to a plain loop of torch over frames that are in memory already.

    python -m bench.training                     P3D-63 at 16x160x160 from 320x240 H.264, about ten minutes

Both arms compute the same network on batches of the same size, with the same parts, threads and optimiser. The plain
loop has no files, no children, no checks and no metrics. The arms take turns within each round. Between turns the
children of `p3d train` wait with full queues, so a turn decodes as many clips as it uses. `waiting` is the share of the
time in which no clip was ready.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from bench.rounds import Report, Table, parser_of, take_turns
from p3d.encoder import normalise
from p3d.jobs.machine import usable_cpus
from p3d.jobs.training.clips import Feeder
from p3d.jobs.training.loop import AHEAD_BATCHES, Training
from p3d.jobs.training.network import in_training_mode, network_of, optimizer_of
from p3d.jobs.training.options import LabelOptions, TrainOptions, TrainRun
from p3d.jobs.training.plan import TrainSpec, plan
from p3d.jobs.training.process import read_start
from p3d.jobs.training.pulse import Process, Pulse
from p3d.jobs.training.record import read_samples
from p3d.jobs.training.sampling import Share
from p3d.networks.fused import keep_freed_memory
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from tests.zoo import corpus

CLASSES, PER_CLASS = 4, 8


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="p3d63")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of a turn (default 4)")
    parser.add_argument("--decode-tasks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    report = Report("training", f"Training of {given.model}")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as scratch:
        folder = Path(scratch)
        for at in range(CLASSES):
            corpus.make(folder / f"videos/{at}", PER_CLASS, (240, 320), 100, 12)
        steps = given.steps * (given.rounds + 2)
        options = TrainOptions(steps=steps, batch_size=given.batch_size, freeze="bn")
        store = open_store(str(folder / "out"), DEFAULTS)
        spec = TrainSpec(str(folder / "videos"), "random:0", given.model, None, LabelOptions(holdout=0.0), options)
        record = plan(store, spec, DEFAULTS, print)
        run = TrainRun(
            workers=1,
            device="cpu",
            threads=given.threads,
            micro_batch=given.micro_batch,
            decode_tasks=given.decode_tasks,
        )
        start, process = read_start(store, record), Process(0, 1, torch.device("cpu"), 1)
        with Pulse(store, process) as pulse:
            ours = Training(store, record, run, process, start, read_samples(store, record), folder / "scratch", pulse)
            in_training_mode(ours.network, record.freeze)
            share = Share(0, 1, ours.batch, 0, steps * given.batch_size)
            ahead = -(-AHEAD_BATCHES * ours.batch // given.decode_tasks)
            network = network_of(start, options, record.freeze)
            in_training_mode(network, record.freeze)
            optimizer = optimizer_of(network, options)
            with Feeder(ours.clips, share, children=given.decode_tasks, ahead=ahead) as feeder:
                clips = iter(feeder)
                frames = np.zeros((given.batch_size, 16, *start.recipe.crop_hw, 3), np.uint8)
                frames[:] = np.random.default_rng(0).integers(0, 256, frames.shape[2:], np.uint8)
                labels = torch.arange(given.batch_size) % CLASSES

                def per_second(began: float) -> float:
                    return given.steps * given.batch_size / (time.perf_counter() - began)

                def plain() -> float:
                    began = time.perf_counter()
                    for _ in range(given.steps):
                        optimizer.zero_grad(set_to_none=True)
                        for at in range(0, given.batch_size, given.micro_batch):
                            part = slice(at, at + given.micro_batch)
                            clips_BCTHW = normalise(torch.from_numpy(frames[part]), start.recipe)
                            loss = functional.cross_entropy(network(clips_BCTHW), labels[part], reduction="sum")
                            (loss / given.batch_size).backward()
                        optimizer.step()
                    return per_second(began)

                def trained() -> float:
                    began = time.perf_counter()
                    for _ in range(given.steps):
                        ours._step(clips)
                    return per_second(began)

                arms = {"plain loop": plain, "p3d train": trained}
                found = take_turns(arms, given.rounds, "clips/s")
        heading = f"{given.model}, batches of {given.batch_size}, {given.threads} threads, 320x240 H.264"
        report.add(found.table(heading, "plain loop"))
        rows = np.array(ours.metrics[given.steps :])
        waiting = f"{100 * rows[:, 6].sum() / rows[:, 5].sum():.2f}"
        report.add(Table("Waiting for clips", ("what", "figure"), (("share of the time, %", waiting),)))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
