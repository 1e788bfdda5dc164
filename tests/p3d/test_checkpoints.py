"""Checkpoints of the port as different versions of torch wrote them, and malicious or damaged ones."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from p3d import zoo
from p3d.preprocessing import PORT_FLOW, PORT_RGB
from p3d.weights import WeightsError, load, pickle_guard
from tests.p3d.checkpoint_writer import AGES, Pickler, archive, checkpoint, legacy
from tests.p3d.tiny_nets import State, assert_bits_equal, drawn, state_of, tiny_zoo


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "w.pth.tar"
    path.write_bytes(content)
    return path


def tiny(name: str = "tiny") -> State:
    with tiny_zoo():
        return drawn(zoo.config(name, num_classes=3), 11)


def refused(path: Path, reason: str) -> None:
    """The file is refused with one line that names it, and no other file is left behind."""
    with tiny_zoo(), pytest.raises(WeightsError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize(
    ("name", "prefix", "nested", "cuda"),
    [
        ("tiny", "", True, True),
        ("tiny-flow", "", True, False),
        ("tiny", "module.", True, False),
        ("tiny", "", False, True),
    ],
    ids=["rgb", "flow", "data_parallel", "bare"],
)
def test_checkpoints_of_every_age_load(
    tmp_path: Path, age: str, name: str, prefix: str, nested: bool, cuda: bool
) -> None:
    """Python 2 with torch 0.3, torch 1 and zip archives, saved from a GPU or not, without counters: the same bits."""
    state = tiny(name)
    path = write(tmp_path, checkpoint(state, age=age, prefix=prefix, nested=nested, cuda=cuda))
    with tiny_zoo():
        weights = load(path)
        assert weights.config == zoo.config(name, graph="port", num_classes=3)
    assert_bits_equal(state_of(weights), state)
    assert weights.recipe == (PORT_FLOW if name == "tiny-flow" else PORT_RGB)
    assert weights.network.bn1.num_batches_tracked.item() == 0


def test_the_writer_writes_what_torch_writes(tmp_path: Path) -> None:
    """torch's own reader finds the same tensors in the hand-made files, so the tests here test real formats."""
    state = tiny()
    for age in AGES:
        read = torch.load(write(tmp_path, checkpoint(state, age=age)), weights_only=True)
        assert (read["epoch"], read["arch"]) == (300, "P3D")
        assert_bits_equal(dict(read["state_dict"]), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_guard_takes_whatever_torch_saves_today(tmp_path: Path, zipped: bool) -> None:
    """Parameters, several types of number, shared storages, an optimizer's state and plain extras are accepted."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    network(torch.ones(2, 3)).sum().backward()
    momenta = {at: {"momentum_buffer": each.grad} for at, each in enumerate(network.parameters())}
    shared = torch.ones(4, 4)
    content = {
        "state_dict": network.state_dict(),
        "parameters": list(network.parameters()),
        "optimizer": {"state": momenta, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]},
        "numbers": [torch.ones(2, dtype=kind) for kind in (torch.float64, torch.bfloat16, torch.uint8, torch.bool)],
        "views": [shared, shared[1:, ::2], shared.t(), torch.ones(0)],
        "extras": {
            "lr": 0.1,
            "size": torch.Size((1, 2)),
            "type": torch.float32,
            "on": True,
            "big": 1 << 70,
            "no": None,
        },
    }
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    pickle_guard.check(path)


def harmful(name: str, *args: bytes) -> bytes:
    """A pickle whose 'extra' calls a function of this name."""
    return b"\x80\x02}(U\x05extrac" + name.encode() + b"\n(" + b"".join(args) + b"tRu."


def files_with(pickled: bytes) -> list[bytes]:
    return [legacy(Pickler("2017"), pickled, {}), archive(pickled, {})]


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (harmful("os\nsystem", b"U\x0atouch trap"), r"holds os\.system, .*could run code.*weights_only=False"),
        (
            harmful("numpy.core.multiarray\nscalar"),
            r"holds numpy\.core\.multiarray\.scalar, .*save its 'state_dict' alone",
        ),
        (harmful("__builtin__\neval", b"U\x011"), r"holds __builtin__\.eval"),
        (harmful("__builtin__\nbytearray", b"J\xff\xff\xff\x7f"), r"holds __builtin__\.bytearray"),
        (harmful("torch\nUntypedStorage", b"J\xff\xff\xff\x7f"), r"holds torch\.UntypedStorage"),
        (b"\x80\x02}" + b"U\x01a" + b"\x85" * 1_000_000 + b"Ns.", "nests tuples deeper"),
        (b"\x80\x02}U\x01a\x85" + b"q\x00h\x00\x86" * 60 + b"Ns.", "uses a tuple twice"),
        (b"\x80\x02}U\x01a\x85" + b"2\x86" * 60 + b"Ns.", "uses DUP"),
        (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}.", "uses PROTO"),
        (b"\x80\x02}(U\x01aU\x01bU\x01cRu.", "calls something that is not a function"),
        (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "no state dict"),
        (b"\x80\x02" + b"}U\x01k" * 50_000 + b"N" + b"s" * 50_000 + b".", "'k', which is not a named tensor"),
        (b"\x80\x02e.", "takes more values|no state dict|not a whole"),
    ],
    ids="system numpy eval bytearray storage deep twice dup protocol4 text_called lists dicts nothing".split(),
)
@pytest.mark.fault(48)
def test_a_pickle_that_does_more_than_hold_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bytes, reason: str
) -> None:
    """Code, unbounded memory, and tuples that never finish hashing or overflow the stack are refused unopened."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for content in files_with(pickled):
        refused(write(folder, content), reason)


@pytest.mark.parametrize("age", AGES)
@pytest.mark.fault(48)
def test_a_storage_that_is_not_there_is_refused(tmp_path: Path, age: str) -> None:
    """A pickle may claim any count of numbers; memory is allocated only for those that the file holds."""
    state = tiny()
    pickler = Pickler(age)
    value = state["bn1.weight"]
    honest = pickler.tensor(value, "7", cuda=False)
    count = pickler.number(value.numel()) + (b"" if age == "zip" else b"N") + b"tQ"
    lying = honest.replace(count, b"J" + struct.pack("<i", 2**31 - 1) + count[count.index(b"tQ") - (age != "zip") :])
    pickled = b"\x80\x02}" + pickler.text("bn1.weight") + lying + b"s."
    raws = {"7": bytes(4)}
    refused(
        write(tmp_path, archive(pickled, raws) if age == "zip" else legacy(pickler, pickled, raws)), "claims 2147483647"
    )


@pytest.mark.fault(48)
def test_a_small_file_of_large_tensors_is_refused(tmp_path: Path) -> None:
    """Stride 0 makes many gigabytes of one number; the file is refused before they are allocated."""
    path = tmp_path / "w.pth"
    torch.save({"fc.weight": torch.zeros(1).expand(1_000_000, 2048), "fc.bias": torch.zeros(1)}, path)
    refused(path, r"has \d+ bytes but claims 8192000004 bytes of tensors")


def rewritten(data: bytes, compression: int = zipfile.ZIP_STORED, times: int = 1) -> bytes:
    """The archive written again, with every member `times` times under its name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist() * times:
            new.writestr(zipfile.ZipInfo(name), old.read(name), compression)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.fault(48)
def test_archives_that_grow_are_refused(tmp_path: Path) -> None:
    """torch never compresses: an archive with compressed, duplicate or overlapping members is a bomb or damaged."""
    data = checkpoint(tiny(), age="zip")
    refused(write(tmp_path, rewritten(data, zipfile.ZIP_DEFLATED)), "compressed or encrypted")
    bomb = archive(b"\x80\x02}.", {"0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 64 << 10
    refused(write(tmp_path, bomb), "compressed or encrypted")
    refused(write(tmp_path, rewritten(data, times=2)), "two members of the same name")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as members:  # a hundred names for the same bytes
        members.writestr("archive/data.pkl", b"\x80\x02}.")
        members.writestr("archive/data/0", bytes(40_000))
        for at in range(1, 100):
            twin = zipfile.ZipInfo(f"archive/data/{at}")
            known = members.getinfo("archive/data/0")
            twin.header_offset, twin.CRC = known.header_offset, known.CRC
            twin.file_size = twin.compress_size = known.file_size
            members.filelist.append(twin)
    refused(write(tmp_path, out.getvalue()), "claim more bytes than the file has")


@pytest.mark.fault(48)
def test_a_member_that_passes_for_a_folder_is_refused(tmp_path: Path) -> None:
    """torch reads nothing from a member marked as a folder and returns uninitialised memory (found by fuzzing)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint(tiny(), age="zip"))) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0x10 if name == "archive/data/76" else 0o600 << 16
            new.writestr(member, old.read(name))
    refused(write(tmp_path, out.getvalue()), "marked as a folder")


def test_a_flipped_bit_of_a_number_in_an_archive_is_seen(tmp_path: Path) -> None:
    """torch ignores the checksums of an archive; we check every member."""
    data = bytearray(checkpoint(tiny(), age="zip"))
    for at in range(len(data) // 4, len(data) // 2, 997):
        data[at] ^= 4
        with tiny_zoo():
            try:
                weights = load(write(tmp_path, bytes(data)))
            except WeightsError as error:
                assert "w.pth.tar" in str(error)
            else:  # the bit was in unused metadata, such as a date
                assert_bits_equal(state_of(weights), tiny())
        data[at] ^= 4


def test_a_tar_of_the_first_torch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Files of torch 0.1 are tar archives of pickles that no safe reader accepts."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as members:
        members.addfile(tarfile.TarInfo("storages"))
    refused(write(tmp_path, out.getvalue()), r"a tar archive of torch 0\.1, .*weights_only=False")


def test_names_out_of_a_file_stay_on_one_short_line(tmp_path: Path) -> None:
    """A key may hold escape sequences, line feeds or a megabyte; the message shows it escaped and cut."""
    path = tmp_path / "w.pth"
    torch.save({**tiny(), "\x1b[31m\n": torch.ones(1), "k" * 1_000_000: torch.ones(1)}, path)
    refused(path, r"unexpected \\x1b\[31m\\n, k{80};")
    torch.save({"\n" * 1_000_000: 1}, path)
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert len(str(caught.value)) < len(str(path)) + 500
