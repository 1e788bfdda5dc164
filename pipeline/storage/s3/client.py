"""S3 clients: one per process and set of options, made when first needed, shared by all stores and threads.

Making a client takes 80 ms of CPU time, and a client holds the open connections, so a process that reads many videos
should make only one. Credentials come from botocore's chain, which is read again after `forget`.
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
from p3d.pipeline.storage.s3.pace import pace_replies
from p3d.pipeline.storage.store import StoreOptions

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # of silence
CONNECTIONS = 32

_Key = tuple[StoreOptions, frozenset[tuple[str, str]]]
_clients: dict[_Key, Any] = {}
_making = threading.Lock()


def client_for(options: StoreOptions) -> Any:
    """The client of this process for these options. Other AWS_* variables in the environment mean another client."""
    key = (options, frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _making:  # making a client is not thread-safe in boto3, using one is
        if key not in _clients:
            _clients[key] = _make(options)
        return _clients[key]


def forget(client: Any) -> None:
    """Make `client_for` make a new client, which reads the credentials again. Does nothing if it has done so."""
    with _making:
        for key in [key for key, held in _clients.items() if held is client]:
            del _clients[key]


def _make(options: StoreOptions) -> Any:
    pace_replies()
    core = botocore.session.get_session()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    session = boto3.session.Session(botocore_session=core, profile_name=options.profile, region_name=options.region)
    checksums = None if options.checksums == "when_supported" else options.checksums
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        # `retry.ask` retries instead: botocore shares one retry quota among all requests, which an outage uses up
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        # None leaves a setting to the environment and ~/.aws/config
        s3=None if options.addressing == "auto" else {"addressing_style": options.addressing},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    try:
        return session.client("s3", endpoint_url=options.endpoint_url, config=config)
    except ValueError:  # raised by botocore for an invalid endpoint or region
        raise InputError(
            "botocore does not accept the endpoint or the region of S3; see --endpoint-url and --region, or "
            "AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and ~/.aws/config"
        ) from None


def _timestamp(value: Any) -> datetime:
    """Parse a time as botocore does, but the format of listings in 1 us instead of 150: half the time of a listing."""
    if isinstance(value, str) and value[10:11] == "T":
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(value)
    parsed: datetime = parse_timestamp(value)
    return parsed


def _after_fork() -> None:
    """Reset the state in a child process: it must not use its parent's sockets or a lock that another thread held."""
    global _making
    _making = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
