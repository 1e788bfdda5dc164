"""The device of an Encoder: which one, which precisions it computes in, what its errors mean, and how busy it is."""

from __future__ import annotations

import threading
from typing import Any, Final

import torch

from p3d.prepared import PRECISIONS

BF16_CAPABILITY: Final = (8, 0)  # the first GPUs with arithmetic in bf16: NVIDIA's CUDA programming guide, table 29
# Texts of RuntimeErrors that mean "out of memory", next to torch.OutOfMemoryError.
FULL: Final = (
    "out of memory",  # cudaErrorMemoryAllocation
    "CUDNN_STATUS_ALLOC_FAILED",  # QwenLM/Qwen3-VL issue 151
    "CUBLAS_STATUS_ALLOC_FAILED",  # QwenLM/Qwen3 issue 873: no memory for cuBLAS's workspace
)
# torch tries cuDNN's algorithms in turn and loses their errors (Conv_v8.cpp). The cause may be that no workspace fits
# into the memory (Nerogar/OneTrainer issue 274), or that the GPU has no algorithm for the precision or is too old for
# this build (rwth-i6/returnn issue 1508). The second text is that of older versions (XPixelGroup/DiffBIR issue 59).
NO_ENGINE: Final = ("unable to find an engine to execute this computation", "unable to find a valid cudnn algorithm")


class DeviceFull(RuntimeError):
    """The device's memory cannot hold even one clip. No video causes this: all clips have the same size."""


class NoKernel(RuntimeError):
    """The device's library has no convolution for this precision, or not enough memory for any."""


def device_for(wish: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is CUDA if available, else CPU, never mps.

    Raises ValueError for any other string and for a device that this machine does not have.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, number = wish.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isascii() and number.isdigit())):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {wish!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {wish} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but torch sees none here")
    return torch.device(wish)


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16, and torch uses them."""
    onednn: Any = torch.backends.mkldnn  # untyped
    return bool(onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computes_in(precision: str, device: torch.device) -> bool:
    """Whether `check_precision` accepts this precision on this device."""
    try:
        check_precision(precision, device)
    except ValueError:
        return False
    return True


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError unless `precision` is known and useful on this device.

    On a CPU, bf16 needs native instructions (such as AVX-512 BF16 or AMX). fp16 is refused there: on a CPU without fp16
    instructions torch is twenty times slower in fp16 than in fp32 (measured), and other CPUs can use bf16. On CUDA,
    bf16 and tf32 need a GPU of compute capability 8.0.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "fp32":
        return
    if device.type == "cuda":
        if precision != "fp16" and (capability := torch.cuda.get_device_capability(device)) < BF16_CAPABILITY:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            raise ValueError(
                f"precision {precision} needs a GPU of compute capability 8.0 or newer, and {name} has "
                f"{major}.{minor}; use fp16 or fp32 there"
            )
        return
    if device.type != "cpu":
        raise ValueError(f"precision {precision} was never tried on {device}; use fp32 there")
    if precision == "tf32":
        raise ValueError("precision tf32 is for CUDA devices; use fp32 on a CPU")
    if precision == "fp16":
        raise ValueError("precision fp16 is for CUDA devices: a CPU would be many times slower; use bf16 or fp32 there")
    if not cpu_has_bf16():
        raise ValueError("precision bf16 needs a CPU with instructions for it, which this one lacks; use fp32 here")


def set_tf32(on: bool) -> None:
    """Let convolutions and matrix products of float32 use TF32 or not, in the whole process.

    Both switches of torch are set. The older `allow_tf32` does not change convolutions where a program has set
    `torch.backends.fp32_precision` (torch 2.13, measured). It raises where the two disagree, also when other code reads
    it. The newer one is not in torch before 2.9.
    """
    backends: Any = torch.backends  # untyped
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = on
    if hasattr(backends, "fp32_precision"):
        for operation in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
            operation.fp32_precision = "tf32" if on else "ieee"


def is_full(error: Exception) -> bool:
    """Whether an error of an operation means for certain that the device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)
    )


def has_no_engine(error: Exception) -> bool:
    """Whether cuDNN found no algorithm: it has none, or none whose memory can be had."""
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_ENGINE)


class BusyTime:
    """The `seconds` in which a GPU computed at least one batch, by the events before and after each batch.

    Time in which a batch waits for a thread or for its frames does not count; pauses between its kernels do. Batches
    that overlap count once, or less if they are counted out of order.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: Any = None  # the event after the batch that ended last
        self._lock = threading.Lock()

    def count(self, before: Any, after: Any) -> None:
        """Count the batch between two `torch.cuda.Event`s that record times, once both have happened."""
        with self._lock:
            began_ms, ended_ms = 0.0, float(before.elapsed_time(after))
            if self._last is not None:  # relative to it, since a time in ms is too coarse after some hours (float32)
                began_ms, ended_ms = self._last.elapsed_time(before), self._last.elapsed_time(after)
            if ended_ms > 0:
                self.seconds += (ended_ms - max(began_ms, 0.0)) / 1e3
                self._last = after
