"""The steps of one process of a training: clips in, gradients, checkpoints.

    Feeder ──clips──> normalise ──> network ──> mean loss ──> gradients, summed over processes ──> one step

Every random number follows from the seed and the step, and sums have a fixed order. So a training that is resumed from
a checkpoint on one CPU process ends with the same bits. A clip that cannot be decoded is left out, and the loss of a
step is the mean over the clips that are there, in all processes.

Legend: B clips of this process's part of a batch, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it
from torch.nn.parallel import DistributedDataParallel

from p3d.device import is_full
from p3d.encoder import normalise
from p3d.jobs.training import checkpoints
from p3d.jobs.training.checkpoints import METRICS, State
from p3d.jobs.training.clips import ClipSource, Feeder, TrainingClips, largest_frames
from p3d.jobs.training.network import in_training_mode, network_of, optimizer_of, pad_frames_first, schedule_of
from p3d.jobs.training.options import TrainRun
from p3d.jobs.training.pulse import Process, Pulse
from p3d.jobs.training.record import TRAIN, TrainRecord
from p3d.jobs.training.sampling import Share
from p3d.jobs.training.snapshot import TRAINING, Stopped
from p3d.pipeline.clips.rules import Sampling, parse_sampling
from p3d.pipeline.errors import InputError, Unfinished, counted
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import UINT8, Failure, FrameSpec
from p3d.weights import Weights

SHOWN_STEPS = 50  # of which a heartbeat shows the mean loss and hits
ENOUGH_TRIED = 20  # videos, before a training may end because over half of them fail
AHEAD_BATCHES = 2  # that may be decoded before they are needed


class Training:
    """The state of a training in one process, and its steps."""

    def __init__(
        self,
        store: Store,
        record: TrainRecord,
        run: TrainRun,
        process: Process,
        start: Weights,
        videos: pa.Table,
        scratch: Path,
        pulse: Pulse,
    ) -> None:
        self.store, self.record, self.run, self.process = store, record, run, process
        self.start, self.scratch, self.pulse = start, scratch, pulse
        self.options = record.options
        self.videos = videos
        training = videos.filter(pc.equal(videos["split"], TRAIN))
        self.labels = training["label"].to_numpy()
        clip = start.recipe
        # the rule and its seed are set for each clip
        sampling = parse_sampling(
            "uniform:1", clip_frames=clip.n_frames, frame_step=self.options.frame_step, fps=self.options.fps
        )
        source = self.source(training, largest_frames(clip), sampling)
        self.clips = TrainingClips(source, clip.crop_hw, self.options.flip, self.options.seed)
        self.network = network_of(start, self.options, record.freeze).to(process.device)
        if self.options.precision == "bf16" and process.device.type == "cpu":
            pad_frames_first(self.network)
        self.optimizer = optimizer_of(self.network, self.options)
        self.schedule = schedule_of(self.optimizer, self.options)
        self.step = 0
        self.failures: dict[int, Failure] = {}
        self.metrics: list[tuple[float, ...]] = []
        self.tests: list[dict[str, float]] = []
        self._trained = [one for one in self.network.parameters() if one.requires_grad]
        self._ran = np.zeros(4)  # seconds, seconds waiting, clips and steps of this run
        self._began = self._saved_at = time.monotonic()
        if (state := checkpoints.newest(store)) is not None:
            self._restore(state)
            pulse.now = replace(pulse.now, checkpoint=self.step)
        pulse.now = replace(pulse.now, step=self.step, steps=self.options.steps, failed=len(self.failures))
        self.parallel: nn.Module = self.network
        if process.world > 1:
            ids = [process.device] if process.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.network, device_ids=ids)

    def source(self, videos: pa.Table, frames: FrameSpec, sampling: Sampling) -> ClipSource:
        """The clips of some videos, decoded with the limits of this run."""
        run = self.run
        return ClipSource(videos, frames, sampling, run.s3, self.scratch, run.video_timeout_s, run.max_decode_memory)

    def _restore(self, state: State) -> None:
        self.network.load_state_dict(dict(state.network))
        self.optimizer.load_state_dict(state.optimizer)
        self.schedule.load_state_dict(state.schedule)
        self.step, self.failures = state.step, state.failures
        self.metrics = [tuple(row) for row in state.metrics.tolist()]
        self.tests = state.tests

    def state(self) -> State:
        """What a checkpoint holds."""
        metrics = np.array(self.metrics, np.float64).reshape(-1, len(METRICS))
        schedule = {name: value for name, value in self.schedule.state_dict().items() if not callable(value)}
        return State(
            step=self.step,
            network=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            schedule=schedule,
            failures=self.failures,
            tests=self.tests,
            metrics=metrics,
        )

    def train(self, test: Callable[[Training], object]) -> None:
        """Take the steps that are left, with a checkpoint now and then and at the end. `test` tests the network."""
        if self.step >= self.options.steps:
            return
        in_training_mode(self.network, self.record.freeze)
        share = Share(
            self.process.rank,
            self.process.world,
            self.batch,
            self.step * self.options.batch_size,
            self.options.steps * self.options.batch_size,
        )
        children = self.run.decode_tasks
        ahead = -(-AHEAD_BATCHES * self.batch // children)
        self._began = self._saved_at = time.monotonic()
        with Feeder(self.clips, share, children=children, ahead=ahead, known=self.failures) as feeder:
            clips = iter(feeder)
            while self.step < self.options.steps:
                stop, due = self._step(clips)
                self._show()
                last = self.step == self.options.steps
                if self.run.test_every and self.step % self.run.test_every == 0 and not (last or stop):
                    test(self)
                    in_training_mode(self.network, self.record.freeze)
                if stop or last or due:
                    self.save()
                if stop:
                    raise self.pulse.error or Stopped

    @property
    def batch(self) -> int:
        """B, the clips of this process in each step."""
        return self.options.batch_size // self.process.world

    def save(self) -> None:
        """Write a checkpoint. All processes call this, and none goes on, or ends, before it is written."""
        if self.process.rank == 0:
            checkpoints.save(self.store, self.state())
            self.pulse.now = replace(self.pulse.now, checkpoint=self.step)
            self._saved_at = time.monotonic()
        self._sum(0)

    def _step(self, clips: Iterator[tuple[int, UINT8 | Failure]]) -> tuple[bool, bool]:
        """One step of all processes. Was the training asked to stop after it, and is a checkpoint due?"""
        began = time.monotonic()
        rows, numbers, new = list[UINT8](), list[int](), dict[int, Failure]()
        for _ in range(self.batch):
            position, found = next(clips)
            number = self.clips.number(position)
            if isinstance(found, Failure):
                new.setdefault(number, found)
            elif number not in new and number not in self.failures:  # whichever child decoded it, and however far ahead
                rows.append(found)
                numbers.append(number)
        waiting_s = time.monotonic() - began
        new = {number: one for number, one in new.items() if number not in self.failures}
        late = time.monotonic() - self._saved_at >= 60 * self.run.checkpoint_minutes
        # of rank 0 alone, since clocks differ
        n_clips, n_new, stop, due = self._sum(len(rows), len(new), self.pulse.asked.is_set(), late and self._leads)
        if n_new:
            self._note(new)
        loss, n_right = math.nan, 0.0
        if n_clips:
            loss, n_right = self._gradients(rows, self.labels[numbers], int(n_clips))
            norm = float(nn.utils.get_total_norm([one.grad for one in self._trained if one.grad is not None]))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._diverged(loss if not math.isfinite(loss) else norm)
            self.optimizer.step()
        elif self.step == 0:
            self.optimizer.step()  # without gradients it changes nothing; the schedule expects a step before its own
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        epoch = (self.step + 1) * self.options.batch_size / len(self.labels)
        self.step += 1
        top1 = n_right / n_clips if n_clips else math.nan
        self.metrics.append((self.step, epoch, loss, top1, lr, time.monotonic() - began, waiting_s, n_clips))
        self._check_failures()
        return bool(stop), bool(due)

    @property
    def _leads(self) -> bool:
        return self.process.rank == 0

    def _gradients(self, rows: list[UINT8], labels: Any, n_clips: int) -> tuple[float, float]:
        """Gradients of the mean loss over `n_clips` clips of all processes. That loss, and how many are right."""
        process, options = self.process, self.options
        torch.manual_seed(_seed(options.seed, self.step, process.rank))  # of dropout
        size = self.run.micro_batch
        parts = [(rows[at : at + size], labels[at : at + size]) for at in range(0, len(rows), size)]
        if not parts:
            return self._no_gradients()
        total, right = torch.zeros((), dtype=torch.float64), 0
        for at, (part, part_labels) in enumerate(parts):
            together = at == len(parts) - 1 or process.world == 1
            with contextlib.nullcontext() if together else self.parallel.no_sync():  # type: ignore[operator]
                logits_BK = self._fitting(np.concatenate(part))
                labels_B = torch.as_tensor(part_labels, dtype=torch.int64, device=process.device)
                loss = F.cross_entropy(logits_BK, labels_B, reduction="sum", label_smoothing=options.label_smoothing)
                # torch takes the mean of the processes' gradients, and `n_clips` are those of all
                torch.autograd.backward(loss * (process.world / n_clips))
            total += loss.detach().double().cpu()
            right += int((logits_BK.argmax(1) == labels_B).sum())
        summed, n_right = self._sum(float(total), right)
        return summed / n_clips, n_right

    def _no_gradients(self) -> tuple[float, float]:
        """Take part in a step of the other processes without a clip: a black one, whose gradients are zero."""
        black = np.zeros((1, self.start.recipe.n_frames, *self.start.recipe.crop_hw, 3), np.uint8)
        self.network.eval()  # so that no normalisation counts it
        torch.autograd.backward((0.0 * self._forward(black).nan_to_num()).sum())
        in_training_mode(self.network, self.record.freeze)
        summed, n_right = self._sum(0, 0)
        return summed, n_right

    def _fitting(self, clips_BTHWC: UINT8) -> Tensor:
        """`_forward`, with a message for people where the memory of the device is full."""
        try:
            return self._forward(clips_BTHWC)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_full(error):
                raise
            raise InputError(
                f"{self.process.device} has not enough memory for {len(clips_BTHWC)} clips at a time; the same "
                "`p3d train` with a smaller --micro-batch continues"
            ) from None

    def _forward(self, clips_BTHWC: UINT8) -> Tensor:
        """Scores of clips, [B, K] float32."""
        clips = torch.from_numpy(clips_BTHWC).to(self.process.device)
        clips_BCTHW = normalise(clips, self.start.recipe)
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            logits_BK: Tensor = self.parallel(clips_BCTHW)
        return logits_BK.float()

    def _sum(self, *values: float) -> list[float]:
        """The sums of values over all processes."""
        if self.process.world == 1:
            return [*values]
        together = torch.tensor(values, dtype=torch.float64, device=self.process.device)
        dist.all_reduce(together)
        return [float(one) for one in together]

    def _note(self, new: dict[int, Failure]) -> None:
        """Add the failures of all processes to those of the training."""
        every: list[Any] = [new]
        if self.process.world > 1:
            every = [None] * self.process.world
            dist.all_gather_object(every, new)
        for one in every:
            for number, failure in one.items():
                self.failures.setdefault(number, failure)

    def _check_failures(self) -> None:
        """Unfinished if more videos fail than the user allows; the state is saved before."""
        limit, n_failed = self.run.max_failures, len(self.failures)
        tried = min(self.step * self.options.batch_size, len(self.labels))
        over = (
            n_failed > limit.count
            if limit.count is not None
            else 100 * n_failed > limit.percent * len(self.labels)
            if limit.percent is not None
            else n_failed >= ENOUGH_TRIED and 2 * n_failed > tried
        )
        if n_failed == len(self.labels) or over:
            self.save()
            number, failure = next(iter(self.failures.items()))
            raise Unfinished(
                f"{n_failed} of {counted(len(self.labels), 'training video')} failed, such as "
                f"{self.clips.source.video(number).path}: {failure.reason}: {failure.detail}. Correct or remove them, "
                "or allow more with --max-failures"
            )

    def _diverged(self, loss: float) -> InputError:
        kept = checkpoints.newest_step(self.store)
        where = "there is no checkpoint yet" if kept is None else f"the last good checkpoint is that of step {kept}"
        return InputError(
            f"the loss or its gradient is {loss} in step {self.step + 1}, so the training stops before that step; "
            f"{where}. Train into another output with a lower --lr (now {self.options.lr:g})"
        )

    def _show(self) -> None:
        """Put the progress into the heartbeat."""
        recent = np.array(self.metrics[-SHOWN_STEPS:])
        _, _, _, _, _, seconds, waiting_s, n_clips = self.metrics[-1]
        self._ran += np.array([seconds, waiting_s, n_clips, 1])
        of_run_s, waited_s, clips, done = self._ran
        elapsed = time.monotonic() - self._began
        trained = recent[recent[:, 7] > 0]
        self.pulse.now = replace(
            self.pulse.now,
            phase=TRAINING,
            step=self.step,
            steps=self.options.steps,
            epochs=float(recent[-1, 1]),
            loss=float(trained[:, 2].mean()) if len(trained) else None,
            top1=float(trained[:, 3].mean()) if len(trained) else None,
            lr=float(recent[-1, 4]),
            clips_per_s=float(clips / elapsed),
            waiting=float(waited_s / max(of_run_s, 1e-9)),
            eta_s=float(elapsed / done * (self.options.steps - self.step)),
            failed=len(self.failures),
        )


def _seed(seed: int, step: int, rank: int) -> int:
    return int(hashlib.sha256(f"{seed}\n{step}\n{rank}".encode()).hexdigest()[:15], 16)
