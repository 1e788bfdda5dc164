"""Draw different numbers from a text: the same ones on every machine and in every version of every library."""

from __future__ import annotations

import hashlib


def numbers_drawn(text: str, count: int, n: int) -> list[int]:
    """`count` different numbers of [0, n), sorted; all of them if `count` is larger. All sets are equally likely.

    The draw is Floyd's, over the 64-bit words of SHAKE-256 (FIPS 202) of `text`: a draw from [0, last] that is already
    in the set is replaced by `last`, which is never in it yet.
    """
    count = min(count, n)
    stream = hashlib.shake_256(text.encode()).digest(8 * count)
    drawn: set[int] = set()
    for at, last in enumerate(range(n - count, n)):
        word = int.from_bytes(stream[8 * at : 8 * at + 8], "big")
        number = word * (last + 1) >> 64  # [0, last]; the bias is below n / 2**64
        drawn.add(last if number in drawn else number)
    return sorted(drawn)
