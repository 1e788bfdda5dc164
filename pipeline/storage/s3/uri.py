"""Make and parse `s3://bucket/key` URIs, percent-encoded so that any key is kept."""

from __future__ import annotations

import os
from urllib.parse import quote, unquote_to_bytes

from p3d.pipeline.errors import InputError


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
