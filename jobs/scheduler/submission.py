"""Submit a job to Ray's job server (`http://HEAD:8265`), from a machine that may then disconnect.

The driver runs on the cluster as `p3d launch ... --address auto`. The code is uploaded as a runtime environment, the
weights are stored in OUT. Afterwards only OUT is needed: `status`, `cancel` and `resume` work without Ray.

The head starts the driver with the `python` of its PATH, in which Ray and our packages must be installed.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import shlex
import time
import uuid
from urllib.parse import urlsplit

from p3d.jobs.scheduler.cluster import code_folders, refuse_silent
from p3d.jobs.trust import LISTED
from p3d.pipeline.errors import ClusterError

LAST_LINES = 20
NO_AGENT = "No available agent"  # the error of a head that has only just started
YOUNG_S = 60.0


def submit(address: str, words: list[str], out: str, *, trusted: bool) -> str:
    """Start `p3d WORDS` on the cluster's head. Returns Ray's submission id. ClusterError if it fails.

    `trusted`: the driver, which runs as another user, trusts the job at `out` because this user does.
    """
    from ray.job_submission import JobSubmissionClient

    refuse_silent(address)
    name = f"p3d-{uuid.uuid4().hex[:12]}"
    # -P: a folder `jobs` where Ray starts the driver must not shadow ours
    command = shlex.join(["python", "-P", "-m", "p3d", *words])
    try:
        client, until = JobSubmissionClient(address), time.monotonic() + YOUNG_S
        for talker in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(talker).setLevel(logging.WARNING)  # they would log every package that is uploaded
        while True:
            try:
                client.submit_job(
                    entrypoint=command,
                    submission_id=name,
                    runtime_env={"py_modules": code_folders(), "env_vars": {LISTED: out} if trusted else {}},
                    metadata={"out": out},
                )
                return name
            except RuntimeError as error:
                if NO_AGENT not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(1)
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and what its HTTP library raises
        raise ClusterError(
            f"{address} did not accept the job ({' '.join(str(error).split())[:300]}). Is it the address of the head's "
            "dashboard, and is its token here (`ray get-auth-token`, RAY_AUTH_TOKEN)?"
        ) from error


def state_of(address: str, name: str) -> tuple[str, str]:
    """("", "") while the driver runs; else how it ended and, if it failed, the last lines of its output."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        status = client.get_job_status(name)
        if not status.is_terminal():
            return "", ""
        last = "" if status == JobStatus.SUCCEEDED else client.get_job_logs(name).strip()
        return f"the driver has ended: {status}", "\n".join(last.splitlines()[-LAST_LINES:])
    except Exception as error:  # as above
        raise ClusterError(f"{address} no longer answers ({' '.join(str(error).split())[:300]})") from error


def openness(address: str) -> str:
    """A message if the connection to this address is not secure; empty if it is."""
    url = urlsplit(address)
    if url.hostname is None or _is_loopback(url.hostname):
        return ""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return f"RAY_AUTH_MODE=disabled: anyone who can connect to {url.hostname} can run code on it"
    if url.scheme == "http":
        return f"the connection to {url.hostname} is not encrypted and exposes the token; use https or an SSH tunnel"
    return ""


def without_user(address: str) -> str:
    """The address without user name and password, which can be stored in OUT."""
    url = urlsplit(address)
    return url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
