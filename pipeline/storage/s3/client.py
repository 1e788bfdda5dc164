"""Clients of S3, one per process for each way to reach it: made when first needed, shared by all stores and threads.

A client takes 80 ms of a processor to make and holds the open connections, so a process that reads many videos should
make one. Credentials come from botocore's chain, which is read again when a client is forgotten.
"""

from __future__ import annotations

import contextlib
import os
import threading
from datetime import datetime
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.utils import parse_timestamp

from p3d.pipeline.errors import InputError
from p3d.pipeline.storage.store import StoreOptions

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # of silence
CONNECTIONS = 32

_Key = tuple[StoreOptions, frozenset[tuple[str, str]]]
_clients: dict[_Key, Any] = {}
_making = threading.Lock()


def client_for(options: StoreOptions) -> Any:
    """The client of this process; another environment (AWS_*) means another client."""
    key = (options, frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _making:  # boto3 makes one client at a time; using it is thread-safe
        if key not in _clients:
            _clients[key] = _make(options)
        return _clients[key]


def forget(client: Any) -> None:
    """Make a new one next time, from credentials that are read again. Nothing happens if another thread did so."""
    with _making:
        for key in [key for key, held in _clients.items() if held is client]:
            del _clients[key]


def _make(options: StoreOptions) -> Any:
    core = botocore.session.get_session()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    session = boto3.session.Session(botocore_session=core, profile_name=options.profile, region_name=options.region)
    checksums = None if options.checksums == "when_supported" else options.checksums
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        # `S3Store` tries again itself: botocore has a stock of retries for all requests, which an outage uses up
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        # what is not asked for stays with the environment and ~/.aws/config
        s3=None if options.addressing == "auto" else {"addressing_style": options.addressing},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    try:
        return session.client("s3", endpoint_url=options.endpoint_url, config=config)
    except ValueError:  # botocore's word for an endpoint or a region that cannot be
        raise InputError(
            f"--endpoint-url {options.endpoint_url} or the region is not one that botocore takes"
        ) from None


def _timestamp(value: Any) -> datetime:
    """As botocore does, but the form that listings use is parsed in 1 us and not in 150: half the time of a listing."""
    if isinstance(value, str) and value[10:11] == "T":
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(value)
    parsed: datetime = parse_timestamp(value)
    return parsed


def _after_fork() -> None:
    """A child shares neither its parent's sockets nor a lock that another thread held."""
    global _making
    _making = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
