"""The device of an Encoder: what its errors mean, TF32, precisions of old GPUs, and the time in which it computes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from p3d.device import BusyTime, DeviceFull, NoKernel, check_precision, has_no_engine, is_full
from p3d.encoder import Encoder
from tests.conftest import REPO
from tests.p3d.test_encoder import every, seeded, video

FULL = {
    "pytorch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    "stable ABI": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "QwenLM/Qwen3-VL issue 151": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "QwenLM/Qwen3 issue 873": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
}
NO_ENGINE = {
    "rwth-i6/returnn issue 1508": RuntimeError("GET was unable to find an engine to execute this computation"),
    "Conv_v8.cpp with benchmark": RuntimeError("FIND was unable to find an engine to execute this computation"),
    "XPixelGroup/DiffBIR issue 59": RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
}
OTHER = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ValueError("out of memory"),
)


@pytest.mark.parametrize("error", [*FULL.values(), *NO_ENGINE.values()], ids=[*FULL, *NO_ENGINE])
def test_every_text_of_full_memory_halves_the_batch(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN and cuBLAS have their own words for it. Six clips in one batch fail, three fit."""
    encoder = Encoder(seeded(), batch_size=6, threads=2)
    true = encoder._network.features

    def features(clips_BCTHW: torch.Tensor) -> torch.Tensor:
        if len(clips_BCTHW) > 3:
            raise error
        return true(clips_BCTHW)

    monkeypatch.setattr(encoder._network, "features", features)
    rows = encoder.encode(video(30, seeded().recipe), every(2, 7))
    assert encoder.batch_size == 3 and np.isfinite(rows).all() and len(rows) == 7


@pytest.mark.parametrize("error", [*FULL.values(), *NO_ENGINE.values(), *OTHER])
def test_with_one_clip_the_error_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is full is DeviceFull. Without an algorithm the cause may be the precision, and the message says so.
    Errors of another kind are raised as they are, since they may mean that the device is lost."""
    encoder = Encoder(seeded(), batch_size=2, threads=2)

    def features(_: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(encoder._network, "features", features)
    expected = DeviceFull if is_full(error) else NoKernel if has_no_engine(error) else type(error)
    with pytest.raises(expected) as caught:
        encoder.encode(video(16, seeded().recipe), every(1, 1))
    if expected is NoKernel:
        assert "cpu cannot compute even one clip of p3d63 in fp32 (" in str(caught.value)
        assert str(caught.value).endswith("try --precision fp32")
    if error in OTHER:
        assert caught.value is error and encoder.batch_size == 2


@pytest.mark.parametrize(("precision", "capability", "good"), [
    ("bf16", (7, 5), False), ("tf32", (7, 5), False), ("fp16", (7, 5), True), ("bf16", (8, 0), True),
])  # fmt: skip
def test_bf16_needs_a_gpu_with_instructions_for_it(
    precision: str, capability: tuple[int, int], good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below compute capability 8.0 cuDNN says only that it finds no engine, so the GPU is named before."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    if good:
        check_precision(precision, torch.device("cuda"))
        return
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8.0 or newer, and Tesla T4 has 7.5; use"):
        check_precision(precision, torch.device("cuda"))


def test_tf32_is_off_whatever_the_process_set_before() -> None:
    """The older switches leave convolutions in TF32 where a program has chosen it for everything."""
    code = (
        "import torch; from p3d.device import set_tf32; b = torch.backends; b.fp32_precision = 'tf32'\n"
        "b.cuda.matmul.allow_tf32 = b.cudnn.allow_tf32 = False; print(b.cudnn.conv.fp32_precision)\n"
        "for on in (False, True, False):\n"
        "    set_tf32(on); print(b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision, b.cudnn.allow_tf32)\n"
        "with b.cudnn.flags(benchmark=True): pass"  # other code of the process may go on using them
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["tf32", "ieee ieee False", "tf32 tf32 True", "ieee ieee False", ""]


class Event:
    """A moment on a GPU, in ms."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms

    def elapsed_time(self, other: Event) -> float:
        return other.at_ms - self.at_ms


def test_batches_that_overlap_count_once() -> None:
    """The union of the batches, in the order in which two threads report them; gaps do not count."""
    busy = BusyTime()
    for began, ended, seconds in (
        (1000, 1500, 0.5),
        (1400, 1900, 0.9),  # overlaps the first
        (1450, 1800, 0.9),  # lies within
        (3000, 3100, 1.0),  # after a gap
    ):
        busy.count(Event(began), Event(ended))
        assert busy.seconds == pytest.approx(seconds)
