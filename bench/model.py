"""The network alone: P3D's Encoder compared with the plain module in eager float32, and with the machine's peak.

    python -m bench.model                P3D-199, two batch sizes, one thread and all: two or three minutes
    python -m bench.model --full         every network, both graphs of P3D-199, batches of 1 to 8: half an hour
    python -m bench.model --networks p3d63 --batches 1 4 --threads 2 --rounds 9
    python -m bench.model --compile      adds the folded network through torch.compile instead of packed for oneDNN

All arms of a table, including the peak, take turns in one process (`rounds.py`). An arm begins with uint8 frames and
ends with feature rows on the host, so preparing the clips counts. Results are compared before anything is timed:
float32 within 1e-4 of the largest feature, bf16 by a cosine of 0.999. One thread is pinned to a core and timed by its
CPU time. Several threads are timed by elapsed time. On a busy machine that says little; `--clock cpu` then gives
multiply-adds per CPU second, which excludes the time that threads wait for each other.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in a job's worker, and before torch is imported

import numpy as np
import torch
from torch import nn

from bench.peak import Peak
from bench.plain import PlainP3D, macs_of, plain_of
from bench.rounds import Report, Rounds, Table, parser_of, per_second, take_turns
from p3d.encoder import Encoder, golden_clip, normalise
from p3d.networks.model import fold
from p3d.prepared import PRECISIONS
from p3d.weights import Weights, random_weights

SMALL = {"networks": ["p3d199"], "batches": [1, 4], "rounds": 7}
FULL = {"networks": ["p3d63", "p3d131", "p3d199", "p3d199:port"], "batches": [1, 2, 4, 8], "rounds": 9}
Clock = Callable[[], float]


def frames_of(weights: Weights, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips that share no frames and do not resemble each other."""
    frames_NHWC, _ = golden_clip(weights.recipe)
    shifted = np.concatenate([np.roll(frames_NHWC, 7 * clip, axis=(1, 2)) for clip in range(clips)])
    return shifted, np.arange(len(shifted), dtype=np.int64).reshape(clips, -1)


def plain_features(network: PlainP3D, weights: Weights, frames_NHWC: np.ndarray, index_BT: np.ndarray) -> np.ndarray:
    """Preparation of clips and the plain network, as a user would write them first."""
    recipe = weights.recipe
    clips = torch.from_numpy(frames_NHWC[index_BT])
    if recipe.channel_order == "bgr":
        clips = clips.flip(-1)
    values = clips.permute(0, 4, 1, 2, 3).float().contiguous() * (recipe.value_range / 255)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (recipe.mean, recipe.std))
    with torch.inference_mode():
        features: np.ndarray = network((values - mean) / std).numpy()
    return features


def compiled_of(weights: Weights, precision: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The Encoder's network by torch.compile: folded, channels last, weights constant, not packed by P3D."""
    import torch._inductor.config

    torch._inductor.config.freezing = True  # it then lays weights out for oneDNN once, too
    network = copy.deepcopy(weights.network).eval()
    fold(network)
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d | nn.Conv3d):
            conv.to(PRECISIONS[precision])
            layout = torch.channels_last if isinstance(conv, nn.Conv2d) else torch.channels_last_3d
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
    compiled = torch.compile(network.features, dynamic=False)

    def features(frames_NHWC: np.ndarray, index_BT: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            clips_BTHWC = torch.from_numpy(frames_NHWC).index_select(0, torch.from_numpy(index_BT).flatten())
            clips_BCTHW = normalise(clips_BTHWC.view(*index_BT.shape, *frames_NHWC.shape[1:]), weights.recipe)
            found: np.ndarray = compiled(clips_BCTHW.to(PRECISIONS[precision])).float().numpy()
        return found

    return features


def check_equal(plain: np.ndarray, found: np.ndarray, precision: str, arm: str) -> None:
    """SystemExit unless an arm computes what the plain network does."""
    if precision == "fp32":
        sound = np.allclose(found, plain, rtol=0, atol=1e-4 * np.abs(plain).max())
    else:
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(plain, axis=1)
        sound = bool(((found * plain).sum(axis=1) / lengths > 0.999).all())
    if not sound:
        raise SystemExit(f"{arm} computes something else: differs by {np.abs(found - plain).max():.3g}")


@contextmanager
def on_cores(threads: int) -> Iterator[None]:
    """Set the number of torch's threads; a single thread is pinned to one core."""
    before = os.sched_getaffinity(0)
    if threads == 1:
        os.sched_setaffinity(0, {min(before)})
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def arms_of(
    named: str, batches: list[int], precisions: list[str], threads: int, clock: Clock, compiled: bool
) -> dict[str, Callable[[], float]]:
    """An arm per batch size and precision, and a plain one per batch size: 1e9 multiply-adds per second."""
    name, _, graph = named.partition(":")
    weights = random_weights(name, 0, graph=graph or "caffe")
    plain = plain_of(weights.network.state_dict(), name, graph or "caffe")
    height, width = weights.recipe.crop_hw
    clip_macs = macs_of(plain, torch.zeros(1, weights.recipe.channels, weights.recipe.n_frames, height, width))[0]
    arms: dict[str, Callable[[], float]] = {}
    for batch in batches:
        given = frames_of(weights, batch)
        amount = batch * clip_macs / 1e9
        true = plain_features(plain, weights, *given)
        arms[f"plain fp32, {batch}"] = per_second(
            lambda given=given: plain_features(plain, weights, *given), amount, clock
        )
        for precision in precisions:
            encoder = Encoder(weights, batch_size=batch, threads=threads, precision=precision)
            check_equal(true, encoder.encode(*given), precision, f"{named} {precision}, {batch}")
            arms[f"{precision}, {batch}"] = per_second(
                lambda encoder=encoder, given=given: encoder.encode(*given), amount, clock
            )
            if compiled:
                its = compiled_of(weights, precision)
                check_equal(true, its(*given), precision, f"{named} compiled {precision}, {batch}")
                arms[f"compiled {precision}, {batch}"] = per_second(
                    lambda its=its, given=given: its(*given), amount, clock
                )
    return arms


def table_of(
    named: str, threads: int, batches: list[int], precisions: list[str], rounds: int, cpu: bool, compiled: bool
) -> Table:
    """One network on `threads` threads."""
    with on_cores(threads):
        cpu = cpu or threads == 1
        clock = time.process_time if cpu else time.perf_counter
        peak = Peak(threads, clock)
        unit = "GMAC per CPU second" if cpu else "GMAC/s"
        peaks = {f"peak {of}": lambda of=of: peak.macs_per_s(of) / 1e9 for of in precisions}
        found = take_turns(peaks | arms_of(named, batches, precisions, threads, clock, compiled), rounds, unit)
    rows = []
    for arm in found.of:
        precision, _, batch = arm.partition(", ")
        of_peak, to_plain = "", ""
        if batch:
            precision = precision.split()[-1]
            of_peak = _percent(found, arm, f"peak {precision}")
            to_plain = str(found.ratio(arm, f"plain fp32, {batch}"))
        rows.append((arm, str(found.spread(arm)), of_peak, to_plain))
    heading = f"{named}, {threads} thread{'s' * (threads > 1)}: precision, clips per batch"
    return Table(heading, ("arm", unit, "share of the peak", "times plain fp32"), tuple(rows), found)


def _percent(found: Rounds, arm: str, base: str) -> str:
    of = found.ratio(arm, base)
    return f"{of.median:.0%} ({of.lowest:.0%} to {of.highest:.0%})"


def work_table(networks: list[str]) -> Table:
    """Multiply-adds per clip, counted."""
    rows = []
    for named in networks:
        name, _, graph = named.partition(":")
        macs, real = macs_of(PlainP3D(name, graph or "caffe").eval(), torch.zeros(1, 3, 16, 160, 160))
        rows.append((named, f"{macs / 1e9:.3f}", f"{1 - real / macs:.1%}"))
    return Table("Multiply-adds per clip", ("network", "GMAC", "of which meet padding"), tuple(rows))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--networks", nargs="+", help="p3d63, p3d131 or p3d199, with :port for that graph")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--clock", choices=["elapsed", "cpu"], default="elapsed", help="clock for several threads (default: elapsed)"
    )
    parser.add_argument("--compile", action="store_true", help="add an arm of torch.compile; takes minutes to compile")
    given = parser.parse_args()
    form = {**(FULL if given.full else SMALL), **{k: v for k, v in vars(given).items() if v is not None}}
    precisions = ["fp32"] + ["bf16"] * bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    report = Report("model", f"The network alone; {Peak(1).describe()}")
    report.add(work_table(form["networks"]))
    for threads in form["threads"]:
        for named in form["networks"]:
            how = (form["batches"], precisions, form["rounds"], given.clock == "cpu", given.compile)
            report.add(table_of(named, threads, *how))
    print(f"\n{report.write(given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
