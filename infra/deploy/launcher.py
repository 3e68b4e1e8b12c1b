"""A configuration for Ray's cluster launcher (`ray up`), which starts machines of a cloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lodeset.infra.config import read
from lodeset.infra.deploy.config import Launcher, Machines
from lodeset.infra.deploy.names import problem, suggested
from lodeset.infra.deploy.written import Document
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown

LONGEST = 63
_TOKEN = "~/.ray/auth_token"
_COMMENT = f"""\
Start it with `ray up cluster.yaml`, and stop it with `ray down cluster.yaml`.
The token of the cluster is this machine's {_TOKEN}: `ray get-auth-token --generate` makes it; then `chmod 600` it.
The dashboard listens on the head's loopback: `ray dashboard cluster.yaml` opens a tunnel to it."""


def render_cluster(path: Path, overrides: tuple[str, ...] = ()) -> Document:
    """The configuration of the cluster in the section `deploy.launcher`.

    Raises:
        ConfigError: the section is missing, or Ray's own schema refuses what is in it.
    """
    config = read(path, overrides)
    given = config.deploy.launcher if config.deploy is not None else None
    if given is None:
        raise ConfigError(
            f"{path}: there is no section `deploy.launcher`: add one with the provider and the image, "
            "e.g. deploy: {launcher: {provider: {type: aws, region: eu-central-1}, image: registry.example.org/lodeset:0.1.0}}"
        )
    if wrong := problem(config.name, LONGEST):
        raise ConfigError(
            f"{path}: the name of the data set `{config.name}` {wrong}, as the name of a cluster: "
            f"`--set name={suggested(config.name, LONGEST)}`"
        )
    body = _body(given, config.name)
    _check(path, body)
    return Document("cluster", body, _COMMENT)


def _body(given: Launcher, name: str) -> dict[str, Any]:
    environment = "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0; ulimit -n 65536"
    started = "ray start --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
    auth = {"ssh_user": given.ssh_user}
    if given.ssh_private_key is not None:
        auth["ssh_private_key"] = given.ssh_private_key
    types = {"head": {**_type(given.head), "min_workers": 0, "max_workers": 0}}
    for group in given.workers:
        types[f"worker-{group.name}"] = {**_type(group), "min_workers": group.min, "max_workers": group.max}
    return {
        "cluster_name": name,
        "max_workers": sum(group.max for group in given.workers),
        "idle_timeout_minutes": given.idle_minutes,
        "provider": dict(given.provider),
        "auth": auth,
        "docker": {"image": given.image, "container_name": "lodeset", "pull_before_run": True},
        "available_node_types": types,
        "head_node_type": "head",
        "file_mounts": {_TOKEN: _TOKEN},
        "head_start_ray_commands": ["ray stop", f"{environment}; {started}"],
        "worker_start_ray_commands": ["ray stop", f"{environment}; ray start --address=$RAY_HEAD_IP:6379"],
    }


def _type(machines: Machines) -> dict[str, Any]:
    resources = {key: int(value) if value == int(value) else value for key, value in (machines.resources or {}).items()}
    return {"node_config": dict(machines.machine), "resources": resources}


def _check(path: Path, body: dict[str, Any]) -> None:
    """Raise ConfigError where Ray's schema refuses what the configuration passes on."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    problems = sorted(jsonschema.Draft7Validator(schema).iter_errors(body), key=lambda error: list(error.path))
    if problems:
        where = ".".join(str(step) for step in problems[0].absolute_path)
        raise ConfigError(
            f"{path}: Ray's cluster launcher refuses {where or 'the section'}: {shown(problems[0].message)}"
        )
