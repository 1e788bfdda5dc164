"""`p3d cluster`: check the nodes of a Ray cluster before a job."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.pipeline.sources.below import absolute


@click.command()
@click.argument("out", required=False)
@click.option(
    "--source", metavar="SRC", help="Check that every node can read this folder or s3://bucket/prefix. Default: none."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option(
    "--address",
    metavar="WHERE",
    help="Check this Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Default: this machine.",
)
@store_options
def check(out: str | None, source: str | None, as_json: bool, address: str | None, **typed: Any) -> int:
    """Check every node for a job: code, packages, decoders, disk space, and access to OUT and SRC if given.

    With OUT it also verifies that the store creates an object exactly once, on which every commit depends. A launch
    runs the same checks. Exits 0 when all checks pass, 6 otherwise.
    """
    from p3d.jobs.scheduler.cluster import inspect_nodes, joined_cluster, local_cluster

    if remote.runs_remotely(address):
        raise click.UsageError(
            f"--address {address}: nodes are checked from inside the cluster. Run `p3d cluster check --address auto` "
            "on the head (`ray exec`, `kubectl exec`), or give ray://HEAD:10001. A launch there checks them too"
        )
    s3 = store_options_of(typed)
    source = source and absolute(source)
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
    gpu = ("gpu", "driver", "cuda", "cudnn", "torchcodec", "ffmpeg") if any("gpu" in n.software for n in nodes) else ()
    head = ("node", "cores", "scratch", "decoders", "torch", "av", *gpu)
    rows = [
        (
            node.host,
            str(node.cpus),
            f"{output.human_bytes(node.scratch_bytes)} free",
            " ".join(node.decoders),
            node.software["torch"],
            node.software["av"],
            *(node.software.get(name, "") for name in gpu),
        )
        for node in nodes
    ]
    output.show(*output.table([head, *rows], right=(1, 2)))
    there = cluster.machines
    output.show(f"{output.count(there.cpus, 'core')}, {output.count(there.gpus, 'GPU')} in all")
    for sentence in problems:
        output.say(sentence)
    if not problems:
        output.say("all checks passed: a job can run here")
    return 6 if problems else 0
