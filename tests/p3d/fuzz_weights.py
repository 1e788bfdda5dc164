"""Damages small weights files of every format at random and checks that `load` refuses them or loads them correctly.

    python -m tests.p3d.fuzz_weights 100000      number of inputs, a fifth for each kind of file; the seed is printed
    python -m tests.p3d.fuzz_weights 1 --seed 5 --at 4711      repeat one input

Input i of a seed is always the same. Damage affects structure more often than numbers. In some inputs checksums and
lengths are repaired afterwards, so that the code behind these checks is reached. The result is either a one-line error
that names the file or a network of finite numbers. Only zip has checksums, so other formats cannot detect a changed
number.
"""

from __future__ import annotations

import argparse
import functools
import re
import resource
import struct
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from p3d import zoo
from p3d.weights import WeightsError, load, to_bytes
from p3d.weights.record import expected_shapes
from tests.p3d import caffe_writer, checkpoint_writer
from tests.p3d.tiny_nets import drawn, state_of, tiny_zoo

Rng = np.random.Generator
Damage = Callable[[Rng, bytes, np.ndarray], bytes]
LONGEST_MESSAGE = 1500  # characters in addition to the path
MOST_GROWTH_BYTES = 400 << 20


@functools.cache
def samples() -> dict[str, tuple[bytes, np.ndarray]]:
    """A whole file of each format, and the offsets of its structure: bytes that do not depend on the numbers."""
    with tiny_zoo():
        one, other = (_files(seed) for seed in (1, 2))
        found = {}
        for name, data in one.items():
            a, b = (np.frombuffer(each, np.uint8) for each in (data, other[name]))
            assert len(a) == len(b) <= 64 << 10
            found[name] = (data, np.flatnonzero(a == b))
        return found


def _files(seed: int) -> dict[str, bytes]:
    config = zoo.config("tiny", num_classes=3)
    state = drawn(config, seed)
    caffe = caffe_writer.caffemodel(list(caffe_writer.rows(config)), state)
    files = {f"{age}.pth": checkpoint_writer.checkpoint(state, age=age) for age in checkpoint_writer.AGES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.caffemodel"
        path.write_bytes(caffe)
        return {"w.caffemodel": caffe, "w.safetensors": to_bytes(load(path)), **files}


def _offset(rng: Rng, data: bytes, structure: np.ndarray) -> int:
    return int(rng.choice(structure)) if rng.random() < 0.8 else int(rng.integers(len(data)))


def _span(rng: Rng, data: bytes, structure: np.ndarray) -> tuple[int, int]:
    start = _offset(rng, data, structure)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 10)))


def flip_bits(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        out[_offset(rng, data, structure)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def change_bytes(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        out[_offset(rng, data, structure)] = int(rng.integers(256))
    return bytes(out)


def cut(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    return data[: _offset(rng, data, structure)]


def cut_out(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    start, end = _span(rng, data, structure)
    return data[:start] + data[end:]


def repeat(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    start, end = _span(rng, data, structure)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def move(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    """Overwrite a piece of the file with another piece."""
    start, end = _span(rng, data, structure)
    at = _offset(rng, data, structure)
    return data[:at] + data[start:end] + data[at + end - start :]


def extreme(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    """Replace a number by an extreme one."""
    value = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x7F80_0000, 0x7FFF_FFFF_FFFF_FFFF]))
    raw = struct.pack(str(rng.choice(["<Q", ">Q"])), value)[: int(rng.choice([1, 2, 4, 8]))]
    at = _offset(rng, data, structure)
    return data[:at] + raw + data[at + len(raw) :]


def random_bytes(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    start, end = _span(rng, data, structure)
    return data[:start] + rng.bytes(end - start) + data[end:]


PLAIN: list[Damage] = [flip_bits, flip_bits, change_bytes, cut, cut_out, repeat, move, extreme, random_bytes]


def repaired_zip(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    """Damage one member, mostly the pickle, and correct its checksum."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = "archive/data.pkl" if rng.random() < 0.8 else str(rng.choice(names))
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = _any_damage(rng, content, np.arange(len(content)))
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def repaired_safetensors(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    """Damage the header, or replace numbers and types in it, and correct its length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        words = [match.span() for match in re.finditer(rb"\d+|F32|true|\[|\\\"\w+\\\"", header)]
        start, end = words[int(rng.integers(len(words)))]
        word = str(
            rng.choice("0 1 -1 1e999 255 F16 F64 BF16 I8 F4 F8_E4M3 C64 BOOL null [ {} 18446744073709551616".split())
        )
        header = header[:start] + word.encode() + header[end:]
    else:
        header = _any_damage(rng, header, np.arange(len(header)))
    return struct.pack("<Q", len(header)) + header + body


def repaired_caffe(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    """Drop, repeat, rename, retype or reshape layers in a file whose lengths are all correct."""
    with tiny_zoo():
        config = zoo.config("tiny", num_classes=3)
        rows, state = list(caffe_writer.rows(config)), drawn(config, 1)
    at = int(rng.integers(len(rows)))
    row = rows[at]
    key = row.keys[int(rng.integers(len(row.keys)))]
    match int(rng.integers(6)):
        case 0:
            del rows[at]
        case 1:
            rows.insert(int(rng.integers(len(rows))), row)
        case 2:
            other = rows[int(rng.integers(len(rows)))].name
            rows[at] = caffe_writer.Row(str(rng.choice([other, "res6a_branch1", "", "é\0\n"])), row.kind, row.keys)
        case 3:
            rows[at] = caffe_writer.Row(row.name, str(rng.choice(["BN", "Convolution", "BatchNorm", ""])), row.keys)
        case 4:
            rows[at] = caffe_writer.Row(row.name, row.kind, tuple(rng.permutation([*row.keys, *row.keys[:1]])))
        case _:
            state[key] = state[key].flatten().repeat(2)[: int(rng.integers(1, 40))]
    return caffe_writer.caffemodel(rows, state)


def _any_damage(rng: Rng, data: bytes, structure: np.ndarray) -> bytes:
    return PLAIN[int(rng.integers(len(PLAIN)))](rng, data, structure)


REPAIRED: dict[str, Damage] = {
    "zip.pth": repaired_zip,
    "w.safetensors": repaired_safetensors,
    "w.caffemodel": repaired_caffe,
}


def damaged(seed: int, at: int) -> tuple[str, str, bytes]:
    """File name, kind of damage and bytes of input `at`."""
    rng = np.random.default_rng([seed, at])
    names = list(samples())
    name = names[at % len(names)]
    data, structure = samples()[name]
    repaired = name in REPAIRED and rng.random() < 0.4
    damage = REPAIRED[name] if repaired else PLAIN[int(rng.integers(len(PLAIN)))]
    return name, damage.__name__, damage(rng, data, structure)


@dataclass
class Tally:
    """The outcomes of the inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""


def run(count: int, seed: int, folder: Path, first: int = 0) -> Tally:
    """Load `count` inputs; an AssertionError names the input that failed."""
    tally = Tally()
    samples()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for at in range(first, first + count):
        name, kind, data = damaged(seed, at)
        path = folder / name
        path.write_bytes(data)
        started = time.monotonic()
        try:
            same = kind == "cut" or (name == "zip.pth" and kind != repaired_zip.__name__)
            outcome = check(path, intact=samples()[name][0] if same else None)
            assert [each.name for each in folder.iterdir()] == [name], "something was left behind"
        except Exception as error:
            raise AssertionError(f"{seed = }, {at = }: {kind} of {name}") from error
        took = time.monotonic() - started
        if took > tally.slowest_s:
            tally.slowest_s, tally.slowest = took, f"{at}: {kind} of {name}"
        tally.outcomes[f"{name} {outcome}"] += 1
        path.unlink()
        if (at + 1 - first) % 10_000 == 0:
            print(f"{at + 1 - first} inputs", flush=True)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert growth < MOST_GROWTH_BYTES, f"{growth = } bytes"
    return tally


def check(path: Path, intact: bytes | None) -> str:
    """Return "refused", or "loaded" if the loaded network is valid.

    With `intact` a loaded network must have the numbers of that file: the damage affected no number, or a checksum
    would have detected it.
    """
    try:
        with tiny_zoo():
            weights = load(path)
    except WeightsError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert message.isprintable() and len(message) < len(str(path)) + LONGEST_MESSAGE, message
        return "refused"
    state = state_of(weights)
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_shapes(weights.config)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in state.values())
    if intact is not None:
        path.write_bytes(intact)
        with tiny_zoo():
            assert all(torch.equal(value, state[key]) for key, value in state_of(load(path)).items())
    return "loaded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, default=0, help="the first input")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    print(f"seed {asked.seed}, inputs {asked.at}..{asked.at + asked.count - 1}", flush=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary
        tally = run(asked.count, asked.seed, Path(folder), asked.at)
        assert not list(Path(temporary).iterdir()), "a temporary file was left behind"
    for outcome, count in sorted(tally.outcomes.items()):
        print(f"{count:8d}  {outcome}")
    print(
        f"{asked.count} inputs in {time.monotonic() - started:.0f} s; slowest {tally.slowest_s:.2f} s ({tally.slowest})"
    )


if __name__ == "__main__":
    main()
