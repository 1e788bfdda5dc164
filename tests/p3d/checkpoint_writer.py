"""Writes checkpoints of the PyTorch port opcode by opcode, as different versions of torch did, without torch.save.

"2017"  torch 0.3 under Python 2: five pickles and raw storages; byte strings, long ints, no counters
"2019"  torch 1.0 under Python 3: the same container, text, arguments of _rebuild_tensor_v2
"zip"   torch 1.6 and later: an uncompressed zip archive with one member per storage
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

import torch

AGES = ("2017", "2019", "zip")
_MAGIC = 0x1950A86A20F9469CFC6C


class Pickler:
    """The opcodes of protocol 2 that torch writes."""

    def __init__(self, age: str) -> None:
        self.old = age == "2017"
        self.zipped = age == "zip"

    def text(self, value: str) -> bytes:
        raw = value.encode()
        return b"U" + bytes([len(raw)]) + raw if self.old else b"X" + struct.pack("<I", len(raw)) + raw

    def number(self, value: int) -> bytes:
        if self.old and value:  # Python 2 pickled the sizes of tensors as long
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        if value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if value < 1 << 16 else b"J" + struct.pack("<i", value)

    def numbers(self, values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(self.number, values)) + b"t"

    def tensor(self, value: torch.Tensor, storage: str, cuda: bool) -> bytes:
        kind = b"ctorch.cuda\nFloatStorage\n" if cuda else b"ctorch\nFloatStorage\n"
        place = self.text("cuda:0" if cuda else "cpu")
        view = b"" if self.zipped else b"N"
        mark = self.text("storage") + kind + self.text(storage) + place + self.number(value.numel()) + view
        rest = b"" if self.old else b"\x89ccollections\nOrderedDict\n)R"  # requires_grad, backward hooks
        strides = torch.empty(value.shape, device="meta").stride()
        args = b"((" + mark + b"tQ" + self.number(0) + self.numbers(value.shape) + self.numbers(strides) + rest + b"t"
        return b"ctorch._utils\n_rebuild_tensor" + (b"" if self.old else b"_v2") + b"\n" + args + b"R"

    def ordered(self, items: list[tuple[bytes, bytes]]) -> bytes:
        if self.old:
            pairs = b"".join(b"](" + key + value + b"e" for key, value in items)
            return b"ccollections\nOrderedDict\n](" + pairs + b"e\x85R"
        return b"ccollections\nOrderedDict\n)R(" + b"".join(key + value for key, value in items) + b"u"


def checkpoint(
    state: Mapping[str, torch.Tensor], *, age: str, prefix: str = "", nested: bool = True, cuda: bool = False
) -> bytes:
    """A whole file. `nested` stores an epoch and an architecture next to the state, as training scripts do."""
    pickler = Pickler(age)
    storages = {str(i if age == "zip" else 94_000_000 + 16 * i): value for i, value in enumerate(state.values())}
    items = [
        (pickler.text(prefix + key), pickler.tensor(value, storage, cuda))
        for (key, value), storage in zip(state.items(), storages, strict=True)
    ]
    content = pickler.ordered(items)
    if nested:
        extra = pickler.text("epoch") + pickler.number(300) + pickler.text("arch") + pickler.text("P3D")
        content = b"}(" + extra + pickler.text("state_dict") + content + b"u"
    raws = {
        storage: struct.pack(f"<{value.numel()}f", *value.flatten().tolist()) for storage, value in storages.items()
    }
    pickled = b"\x80\x02" + content + b"."
    return archive(pickled, raws) if age == "zip" else legacy(pickler, pickled, raws)


def legacy(pickler: Pickler, pickled: bytes, raws: Mapping[str, bytes]) -> bytes:
    magic = b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
    protocol = b"\x80\x02M" + struct.pack("<H", 1001) + b"."
    sizes = b"".join(
        pickler.text(kind) + pickler.number(size) for kind, size in (("short", 2), ("int", 4), ("long", 4))
    )
    system = b"\x80\x02}(" + pickler.text("protocol_version") + b"M\xe9\x03" + pickler.text("little_endian") + b"\x88"
    system += pickler.text("type_sizes") + b"}(" + sizes + b"uu."
    keys = b"\x80\x02](" + b"".join(map(pickler.text, sorted(raws))) + b"e."
    data = b"".join(struct.pack("<q", len(raws[key]) // 4) + raws[key] for key in sorted(raws))
    return magic + protocol + system + pickled + keys + data


def archive(pickled: bytes, raws: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as members:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            members.writestr(zipfile.ZipInfo(f"archive/{name}"), content, compression)
        for key, raw in raws.items():
            members.writestr(zipfile.ZipInfo(f"archive/data/{key}"), raw, compression)
    return out.getvalue()
