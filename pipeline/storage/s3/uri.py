"""Make and parse `s3://bucket/key` URIs, percent-encoded so that any key is kept."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote_to_bytes

from p3d.pipeline.errors import InputError


def refuse_almost_s3(text: str) -> None:
    """InputError for `s3:/bucket`, `s3//bucket` and the like, which would be a folder of that name."""
    if (found := re.match(r"s3(:|//)/*", text, re.IGNORECASE)) and not text.startswith("s3://"):
        raise InputError(
            f"{found[0]}... looks like an S3 URL, which has the form s3://bucket/prefix; a folder of that name is "
            f"written ./{found[0]}..."
        )


def s3_uri(bucket: str, key: str) -> str:
    """`s3://bucket/key`, percent-encoded."""
    return f"s3://{bucket}/{quote(key)}"


def split_s3_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` -> (bucket, key), percent-decoded. InputError if the key is not UTF-8, as S3 keys must be."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    raw = unquote_to_bytes(os.fsencode(key))
    try:
        return bucket, raw.decode()
    except UnicodeDecodeError:
        shown = raw.decode("utf-8", "backslashreplace")
        raise InputError(f"s3://{bucket}/{shown} is not UTF-8, as S3 keys must be") from None
