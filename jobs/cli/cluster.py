"""`p3d cluster`: what a job would run on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.options import out_store, store_options, store_options_of


@click.command()
@click.argument("out", required=False)
@click.option("--source", metavar="SRC", help="A folder or s3://bucket/prefix that every node must reach.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--address", metavar="WHERE", help="A Ray cluster to ask: auto, HOST:PORT or ray://HOST:PORT.")
@store_options
def check(out: str | None, source: str | None, as_json: bool, address: str | None, **typed: Any) -> int:
    """Ask every node whether it could do its part of a job: code, packages, decoders, space; OUT and SRC, if given.

    With OUT it is also proved that an object can be created there exactly once, which every result rests on. A launch
    asks the same. Exits 0 when nothing stands against a job, 6 otherwise.
    """
    from p3d.jobs.scheduler.cluster import inspect_nodes, joined_cluster, local_cluster

    if remote.runs_remotely(address):
        raise click.UsageError(
            f"--address {address}: the nodes are asked from a node. Run `p3d cluster check --address auto` on the head "
            "(`ray exec`, `kubectl exec`), or give ray://HEAD:10001; a launch at this address asks them itself"
        )
    s3 = store_options_of(typed)
    url, key = "", "_job/preflight"
    if out is not None:
        store = out_store(out, s3)
        store.prove_create_once()
        store.replace(key, b"")
        url = store.url
    try:
        with joined_cluster(address) if address else local_cluster() as cluster:
            nodes, problems = inspect_nodes(url, key, source or "", s3)
    finally:
        if out is not None:
            store.delete(key)
    if as_json:
        output.show_json(
            {"gpus": cluster.machines.gpus, "nodes": [asdict(node) for node in nodes], "problems": problems}
        )
        return 6 if problems else 0
    head = ("node", "cores", "scratch", "decoders", "torch", "av")
    rows = [
        (
            node.host,
            str(node.cpus),
            f"{output.human_bytes(node.scratch_bytes)} free",
            " ".join(node.decoders),
            node.software["torch"],
            node.software["av"],
        )
        for node in nodes
    ]
    output.show(*output.table([head, *rows], right=(1, 2)))
    there = cluster.machines
    output.show(f"{output.count(there.cpus, 'core')}, {output.count(there.gpus, 'GPU')} in all")
    for sentence in problems:
        output.say(sentence)
    if not problems:
        output.say("nothing stands against a job here")
    return 6 if problems else 0
