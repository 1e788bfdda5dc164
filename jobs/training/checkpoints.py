"""The state of a training after some step: one file per checkpoint, which is created once and named by its content.

    _job/checkpoints/000001200-<sha256>.safetensors

It holds the network, the optimiser, the schedule, the failures and the metrics of all steps so far. Random numbers
need no state, because they follow from the seed and the step. A checkpoint that was cut by a power loss does not match
its name, and an older one is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from p3d.pipeline.errors import MALFORMED, DamagedJob, Reason, StoreMissing
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import Failure

FOLDER = "_job/checkpoints/"
NAME = re.compile(rf"{FOLDER}([0-9]{{9,12}})-([0-9a-f]{{64}})\.safetensors")
KEPT = 2
CARD = "p3d-train"
# columns of the metrics, one row per step; times in seconds
METRICS = ("step", "epoch", "loss", "top1", "lr", "seconds", "waiting_s", "clips")


@dataclass(slots=True)
class State:
    """A training after `step` steps. `failures` are by the number of the training video; `metrics` are float64 [S, 8].

    `tests` has the step and the hit rates of each test so far.
    """

    step: int
    network: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    failures: dict[int, Failure] = field(default_factory=dict)
    tests: list[dict[str, float]] = field(default_factory=list)
    metrics: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, len(METRICS))))


def to_bytes(state: State) -> bytes:
    """The content of the file; equal states give equal bytes."""
    tensors = {f"network.{key}": value.detach().cpu().contiguous() for key, value in state.network.items()}
    for number, values in state.optimizer["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    tensors["metrics"] = torch.from_numpy(np.ascontiguousarray(state.metrics))
    card = {
        "step": state.step,
        "groups": state.optimizer["param_groups"],
        "schedule": state.schedule,
        "tests": state.tests,
        "failures": {number: [one.reason, one.detail, one.attempts] for number, one in state.failures.items()},
    }
    return safetensors.torch.save(tensors, metadata={CARD: json.dumps(card, sort_keys=True)})


def from_bytes(content: bytes) -> State:
    """The state that `to_bytes` wrote. One of MALFORMED for anything else."""
    length = int.from_bytes(content[:8], "little")
    card = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][CARD])
    tensors = safetensors.torch.load(content)
    network, held = {}, dict[int, dict[str, Tensor]]()
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "network":
            network[rest] = value
        elif kind == "optimizer":
            number, _, name = rest.partition(".")
            held.setdefault(int(number), {})[name] = value
    failures = {
        int(number): Failure(Reason(reason), str(detail), int(attempts))
        for number, (reason, detail, attempts) in card["failures"].items()
    }
    optimizer = {"state": held, "param_groups": card["groups"]}
    metrics, tests = tensors["metrics"].numpy(), list(card["tests"])
    return State(int(card["step"]), network, optimizer, card["schedule"], failures, tests, metrics)


def save(store: Store, state: State) -> str:
    """Create a checkpoint, then remove all but the newest. Returns its key."""
    content = to_bytes(state)
    key = f"{FOLDER}{state.step:09d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    store.create(key, content)
    for old in _keys(store)[:-KEPT]:
        store.delete(old)
    return key


def newest(store: Store) -> State | None:
    """The newest whole checkpoint; None without any. DamagedJob if there are some and none is whole."""
    keys = _keys(store)
    for key in reversed(keys):
        try:
            content = store.read(key)
        except StoreMissing:  # another run has removed it, as newer ones exist
            continue
        name = NAME.fullmatch(key)
        assert name is not None, "as listed"
        if hashlib.sha256(content).hexdigest() == name[2]:
            try:
                return from_bytes(content)
            except (*MALFORMED, SafetensorError) as error:
                raise DamagedJob(f"{store.url}/{key} is not a checkpoint that p3d writes ({error})") from None
    if keys:
        raise DamagedJob(
            f"{store.url}/{keys[-1]} is damaged: its sha256 is not that of its name, and no older checkpoint is whole; "
            "restore one, or train into another output"
        )
    return None


def newest_step(store: Store) -> int | None:
    """The step of the newest checkpoint, as its name says; None without any."""
    keys = _keys(store)
    return int(NAME.fullmatch(keys[-1])[1]) if keys else None  # type: ignore[index] # as listed


def _keys(store: Store) -> list[str]:
    return sorted(info.key for info in store.list(FOLDER) if NAME.fullmatch(info.key))
