"""Check a torch checkpoint for harmful or damaged content without unpickling it. `port` calls this before torch reads.

torch's own `weights_only=True` runs no foreign code, but three risks remain. It accepts compressed archives (a few kB
can become gigabytes), ignores an archive's checksums, and hashes every key of a pickle, which nested tuples can make
endless. A checkpoint of tensors needs only an uncompressed archive, a dozen pickle opcodes, few names and flat tuples.
Source: pickletools (the meaning of opcodes), torch.serialization (both containers), torch's notes on `weights_only`.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

_ITEM_BYTES: Final = {
    "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
}  # fmt: skip
_NAMES: Final = re.compile(
    r"collections OrderedDict|torch (Size|device|bool|u?int\d+|float\d+|bfloat16)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    rf"|torch(\.cuda)? ({'|'.join(_ITEM_BYTES)})Storage"
)
_PUSHES: Final = frozenset(
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING "
    "EMPTY_LIST EMPTY_DICT EMPTY_SET".split()
)
# opcode -> how many values it pops from the stack (None: all down to the mark), and whether it pushes a new one
_TAKES: Final[dict[str, tuple[int | None, bool]]] = {
    "EMPTY_TUPLE": (0, True), "TUPLE": (None, True), "TUPLE1": (1, True), "TUPLE2": (2, True), "TUPLE3": (3, True),
    "APPEND": (1, False), "APPENDS": (None, False), "SETITEM": (2, False), "SETITEMS": (None, False),
    "REDUCE": (2, True), "BUILD": (1, False), "BINPERSID": (1, True),
}  # fmt: skip
_DEEPEST: Final = 4  # nesting of tuples: a tensor's arguments contain its shape, and nothing deeper
_MARK: Final = object()
_TAR_MAGIC_AT: Final = 257
_DOS_FOLDER: Final = 0x10  # torch's reader leaves the memory for such a member uninitialised


class ForeignContentError(Exception):
    """A checkpoint holds something other than tensors; the message is its name."""


class DamageError(Exception):
    """A checkpoint is not a complete file of tensors; the message says why."""


def check(path: Path) -> None:
    """Return if torch may read this file.

    Raises ForeignContentError, DamageError, the errors of zipfile and pickletools on damage, and OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_TAR_MAGIC_AT + 5)
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            _check_archive(file, size)
        elif start[_TAR_MAGIC_AT:] == b"ustar":
            raise ForeignContentError("a tar archive of torch 0.1")
        else:
            _check_legacy(file, size)


def _check_archive(file: IO[bytes], size: int) -> None:
    """Require a zip archive with unique, uncompressed members, correct checksums and a harmless pickle."""
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: each for each in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise DamageError("it holds two members of the same name")
        if any(each.compress_type or each.flag_bits & 1 for each in members.values()):
            raise DamageError("its members are compressed or encrypted, which torch never does")
        if any(each.external_attr & _DOS_FOLDER or each.is_dir() for each in members.values()):
            raise DamageError("a member is marked as a folder, so torch would read nothing from it")
        if sum(each.file_size for each in members.values()) > size:
            raise DamageError("its members claim more bytes than the file has")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise DamageError("it has no single data.pkl")
        if archive.testzip() is not None:
            raise DamageError("the checksum of a member is wrong")
        root = pickles[0].removesuffix("data.pkl")

        def size_of(key: str) -> int:
            member = members.get(f"{root}data/{key}")
            return member.file_size if member else -1

        with archive.open(pickles[0]) as stream:
            survey(stream, size_of)


def _check_legacy(file: IO[bytes], size: int) -> None:
    """Check five pickles (magic number, protocol, system, content, storage keys); the storages' bytes follow."""
    for _ in range(5):
        survey(file, lambda key: size)


def survey(stream: IO[bytes], size_of: Callable[[str], int]) -> None:
    """Walk one pickle's opcodes up to its STOP; `size_of` gives the bytes available for the storage of a key.

    The simulated stack keeps only values that matter: numbers, text, names and tuples; others are None.
    Raises ForeignContentError and DamageError.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _PUSHES:
            stack.append(arg)
        elif name == "GLOBAL":
            if not _NAMES.fullmatch(arg):
                raise ForeignContentError(arg.replace(" ", "."))
            stack.append(_Name(arg))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if isinstance(memo[arg], tuple):
                raise DamageError("its pickle uses a tuple twice, which torch never does")
            stack.append(memo[arg])
        elif name in _TAKES:
            count, leaves = _TAKES[name]
            taken = _take(stack, count)
            if name == "BINPERSID":
                _check_storage(taken[0], size_of)
            elif name == "REDUCE" and not (isinstance(taken[0], _Name) and isinstance(taken[1], tuple)):
                raise DamageError("its pickle calls something that is not a function")
            if leaves:
                stack.append(_flat(taken) if "TUPLE" in name else None)
        elif name != "STOP" and (name, arg) != ("PROTO", 2):
            raise DamageError(f"its pickle uses {name}, which torch never does")


def _take(stack: list[Any], count: int | None) -> list[Any]:
    if count is None:
        count = next((depth for depth, value in enumerate(reversed(stack)) if value is _MARK), len(stack))
        taken = stack[len(stack) - count :]
        del stack[max(0, len(stack) - count - 1) :]
    else:
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        if len(taken) != count:
            raise DamageError("its pickle takes more values than it pushed")
    return taken


class _Name(str):
    """The name of a function or class, as opposed to text."""

    __slots__ = ()


class _Tuple(tuple[Any, ...]):
    """A tuple that records its nesting depth."""

    depth: int


def _flat(values: list[Any]) -> _Tuple:
    made = _Tuple(values)
    made.depth = 1 + max((value.depth for value in values if isinstance(value, _Tuple)), default=0)
    if made.depth > _DEEPEST:
        raise DamageError("its pickle nests tuples deeper than torch ever does")
    return made


def _check_storage(mark: Any, size_of: Callable[[str], int]) -> None:
    """Check that ("storage", type, key, device, count of numbers[, view]) fits into the bytes of the file."""
    if not isinstance(mark, tuple) or len(mark) < 5:
        raise DamageError("its pickle refers to something that is not a storage")
    kind, key, count = mark[1], mark[2], mark[4]
    item = _ITEM_BYTES.get(str(kind).rpartition(" ")[2].removesuffix("Storage"))
    if item is None or not isinstance(kind, _Name) or not isinstance(key, str) or not isinstance(count, int):
        raise DamageError("its pickle refers to something that is not a storage")
    if not 0 <= count * item <= size_of(key):
        raise DamageError(f"a storage claims {count} numbers, which the file does not hold")
