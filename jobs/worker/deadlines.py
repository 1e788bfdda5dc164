"""How long a decode may be silent before it is killed and its video fails as `decode_timeout`. Pure."""

from __future__ import annotations

SLOWEST_READ = 10e6  # bytes/s, the slowest source for which the timeout allows


def longest_silence_s(video_timeout_s: float, unread_bytes: int) -> float:
    """Seconds without a message. `unread_bytes` are those of a video that was not opened yet: all of it may be read
    before the first frame comes, once to fetch it and index it. Negative if unknown."""
    return video_timeout_s + max(unread_bytes, 0) / SLOWEST_READ
