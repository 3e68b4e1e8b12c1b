"""A configuration as objects for Kubernetes: a Ray cluster or Ray jobs, and what starts runs on it at fixed times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lodeset.infra.config import read
from lodeset.infra.deploy import names, pods
from lodeset.infra.deploy.config import Kubernetes, Schedule
from lodeset.infra.deploy.portable import portable
from lodeset.infra.deploy.written import Document, as_yaml
from lodeset.infra.schedule.cron import for_kubernetes, parsed
from lodeset.infra.schedule.entry import HELD
from lodeset.pipeline.errors import ConfigError

JOB_FILE = "rayjob.yaml"
# A run that found another at work (exit status 4) is skipped: that is no failure.
_SKIP = f'{{ code=$?; [ "$code" -eq {HELD} ] || exit "$code"; echo "skipped: another run is at work"; }}'
# What a later try cannot mend: a wrong configuration, a breached gate.
_FINAL = [2, 3]


NODES_S = 900


def render_kubernetes(
    path: Path, overrides: tuple[str, ...] = (), schedule: Schedule | None = None
) -> tuple[Document, ...]:
    """The objects of a configuration, in the order in which to apply them.

    Args:
        schedule: instead of that of the configuration.

    Raises:
        ConfigError: the section `deploy.kubernetes` is missing, a name does not fit, or pods cannot see a path.
    """
    config = read(path, overrides)
    given = config.deploy.kubernetes if config.deploy is not None else None
    if given is None:
        raise ConfigError(
            f"{path}: there is no section `deploy.kubernetes`: add one with the image, "
            "e.g. deploy: {kubernetes: {image: registry.example.org/lodeset:0.1.0}}"
        )
    when = schedule or (config.deploy.schedule if config.deploy is not None else None)
    if when is None and given.mode == "ray_cron_job":
        raise ConfigError(f"{path}: mode ray_cron_job needs times: set `deploy.schedule.cron`, or give --cron")
    name = _name(path, given, config.name, scheduled=when is not None)
    mounted = [volume.path for volume in given.volumes]
    if any(group.most > group.fewest for group in given.workers):
        overrides = (*overrides, f"resources.ray.wait_for_nodes={NODES_S}")  # the autoscaler takes minutes to add one
    text = portable(path, overrides, mounted)
    if given.mode == "cluster":
        return _on_a_cluster(given, name, text, when)
    if given.mode == "ray_job" or when is None:
        return _as_ray_jobs(given, name, text, when)
    return _as_a_ray_cron_job(given, name, text, when)


def _name(path: Path, given: Kubernetes, data_set: str, *, scheduled: bool) -> str:
    kinds = {
        "cluster": ("RayCluster", "CronJob") if scheduled else ("RayCluster",),
        "ray_job": ("RayJob",),
        "ray_cron_job": ("RayCronJob",),
    }[given.mode]
    longest = min(names.LONGEST[kind] for kind in kinds)
    if given.mode == "ray_job" and scheduled:
        longest -= names.APPENDED  # each RayJob is named after the Job that starts it
    name = given.name or data_set
    if wrong := names.problem(name, longest):
        key = "deploy.kubernetes.name" if given.name else "the name of the data set"
        raise ConfigError(
            f"{path}: {key} `{name}` {wrong}, as the name of a {' and a '.join(kinds)}: set `deploy.kubernetes.name`, "
            f"e.g. {names.suggested(name, longest)}"
        )
    return name


def _object(api: str, kind: str, given: Kubernetes, name: str, suffix: str = "", **rest: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "lodeset", "app.kubernetes.io/instance": name}
    return {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": f"{name}{suffix}", "namespace": given.namespace, "labels": labels},
        **rest,
    }


def _config_map(given: Kubernetes, name: str, files: dict[str, str]) -> Document:
    return Document("config", _object("v1", "ConfigMap", given, name, "-config", data=files))


def _token(given: Kubernetes, name: str) -> str:
    secret = pods.token_secret(given, name)
    return (
        f"The token of the cluster is in the Secret {secret}, which must exist first. To make one:\n"
        f"  head -c 32 /dev/urandom | base64 | tr -d '\\n' > auth_token\n"
        f"  kubectl create secret generic {secret} --namespace {given.namespace} --from-file=auth_token && rm auth_token\n"
        "A token is not encryption: keep other pods away from the cluster by a NetworkPolicy."
    )


def _on_a_cluster(given: Kubernetes, name: str, text: str, when: Schedule | None) -> tuple[Document, ...]:
    cluster = _object("ray.io/v1", "RayCluster", given, name, spec=pods.cluster_spec(given, name))
    made = [Document("cluster", cluster, _token(given, name))]
    if when is not None:
        made.insert(0, _config_map(given, name, {pods.CONFIG_FILE: text}))
        made.append(Document("schedule", _submitting(given, name, when), "Submits a run at these times."))
    return tuple(made)


def _submitting(given: Kubernetes, name: str, when: Schedule) -> dict[str, Any]:
    """A CronJob whose pods submit a run to the cluster and follow it."""
    volume, mount = pods.config_volume(f"{name}-config")
    token = {
        "name": "ray-token",
        "secret": {
            "secretName": pods.token_secret(given, name),
            "defaultMode": 0o440,
            "items": [{"key": "auth_token", "path": "auth_token"}],
        },
    }
    mounted = {"name": "ray-token", "mountPath": "/var/run/secrets/ray", "readOnly": True}
    content = pods.container(given, "submit", given.image, {"cpu": "500m", "memory": "1Gi"}, (mount, mounted))
    content["env"] += [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN_PATH", "value": "/var/run/secrets/ray/auth_token"},
    ]
    content["command"] = ["/bin/sh", "-c", f'lodeset "$@" || {_SKIP}', "lodeset"]
    content["args"] = ["submit", pods.CONFIG_PATH, "--address", f"http://{name}-head-svc:8265"]
    return _cron_job(given, name, when, pods.pod(given, content, (volume, token)))


def _cron_job(given: Kubernetes, name: str, when: Schedule, pod: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = {
        # A pod that takes over follows the run that its predecessor started.
        "backoffLimit": 3,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": pod["containers"][0]["name"],
                        "operator": "In",
                        "values": _FINAL,
                    },
                },
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        # It only follows: the run goes on without it.
        "template": {"spec": {**pod, "restartPolicy": "Never", "terminationGracePeriodSeconds": 10}},
    }
    if given.max_hours is not None:
        job = {"activeDeadlineSeconds": _seconds(given.max_hours + given.start_within_hours), **job}
    spec = {
        "schedule": for_kubernetes(parsed(when.cron)),
        "timeZone": when.timezone or "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": _seconds(given.start_within_hours),
        "successfulJobsHistoryLimit": given.history,
        "failedJobsHistoryLimit": given.history,
        "jobTemplate": {"spec": job},
    }
    return _object("batch/v1", "CronJob", given, name, spec=spec)


def _as_ray_jobs(given: Kubernetes, name: str, text: str, when: Schedule | None) -> tuple[Document, ...]:
    job = _object("ray.io/v1", "RayJob", given, name, spec=_job_spec(given, name))
    if when is None:
        return _config_map(given, name, {pods.CONFIG_FILE: text}), Document("job", job, _token(given, name))
    files = {pods.CONFIG_FILE: text, JOB_FILE: as_yaml(job)}
    suffix, rbac = "-launcher", "rbac.authorization.k8s.io"
    role = {"apiGroup": rbac, "kind": "Role", "name": f"{name}{suffix}"}
    rules = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    subjects = [{"kind": "ServiceAccount", "name": f"{name}{suffix}", "namespace": given.namespace}]
    account = _object("v1", "ServiceAccount", given, name, suffix, automountServiceAccountToken=False)
    return (
        _config_map(given, name, files),
        Document("account", account),
        Document("role", _object(f"{rbac}/v1", "Role", given, name, suffix, rules=rules)),
        Document("binding", _object(f"{rbac}/v1", "RoleBinding", given, name, suffix, roleRef=role, subjects=subjects)),
        Document(
            "schedule",
            _launching(given, name, when),
            f"Creates a RayJob at these times, and waits for it.\n{_token(given, name)}",
        ),
    )


def _launching(given: Kubernetes, name: str, when: Schedule) -> dict[str, Any]:
    """A CronJob whose pods create a RayJob and wait for its end."""
    volume, mount = pods.config_volume(f"{name}-config")
    given = given.model_copy(update={"volumes": (), "env_secrets": ()})  # none of this pod's business
    content = pods.container(given, "launch", given.image, {"cpu": "200m", "memory": "512Mi"}, (mount,))
    # The RayJob belongs to the Job: it is deleted with it.
    for variable, field in (
        ("LODESET_NAMESPACE", "metadata.namespace"),
        ("LODESET_JOB_NAME", "metadata.labels['batch.kubernetes.io/job-name']"),
        ("LODESET_JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
    ):
        content["env"].append({"name": variable, "valueFrom": {"fieldRef": {"fieldPath": field}}})
    content["command"] = ["python", "-P", "-m", "lodeset.infra.deploy.launch"]
    content["args"] = [f"{pods.CONFIG_FOLDER}/{JOB_FILE}"]
    pod = {**pods.pod(given, content, (volume,), api=True), "serviceAccountName": f"{name}-launcher"}
    return _cron_job(given, name, when, pod)


def _job_spec(given: Kubernetes, name: str, *, deletes_itself: bool = False) -> dict[str, Any]:
    kept = _seconds(given.keep_hours)
    rules = [
        {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}},
        {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": kept}},
        # One that KubeRay gave up, e.g. at a deadline.
        {"policy": "DeleteCluster", "condition": {"jobDeploymentStatus": "Failed", "ttlSeconds": kept}},
    ]
    if deletes_itself:
        week = max(kept, 7 * 24 * 3600)
        for condition in ({"jobStatus": "SUCCEEDED"}, {"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"}):
            rules.append({"policy": "DeleteSelf", "condition": {**condition, "ttlSeconds": week}})
    spec: dict[str, Any] = {
        # The operator submits by HTTP and asks for the status. The other modes follow a log stream, which breaks
        # under healthy jobs.
        "submissionMode": "HTTPMode",
        "entrypoint": f"lodeset run {pods.CONFIG_PATH} || {_SKIP}",
        # Another try would be another cluster, and the next run goes on from what this one finished.
        "backoffLimit": 0,
        "preRunningDeadlineSeconds": _seconds(given.start_within_hours),
        "runtimeEnvYAML": as_yaml({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(pods.STOP_S)}}),
        "deletionStrategy": {"deletionRules": rules},
        "rayClusterSpec": pods.cluster_spec(given, name, f"{name}-config"),
    }
    if given.max_hours is not None:
        spec["activeDeadlineSeconds"] = _seconds(given.max_hours + given.start_within_hours)
    return spec


_GAPS = """\
A RayCronJob needs KubeRay 1.6 or newer with the feature gate RayCronJob, which is in alpha and off by default.
It cannot do what a CronJob does (`mode: ray_job`):
- It forbids no overlap. A run that starts while another is at work ends at once as skipped, but its cluster starts first.
- It has no deadline for late starts: times that passed while the operator was down are made up for, one after the other.
- It limits no history: RayJobs delete themselves, by `deletionRules`."""


def _as_a_ray_cron_job(given: Kubernetes, name: str, text: str, when: Schedule) -> tuple[Document, ...]:
    spec = {
        "schedule": for_kubernetes(parsed(when.cron)),
        "timeZone": when.timezone or "Etc/UTC",
        "jobTemplate": _job_spec(given, name, deletes_itself=True),
    }
    cron_job = _object("ray.io/v1", "RayCronJob", given, name, spec=spec)
    return (
        _config_map(given, name, {pods.CONFIG_FILE: text}),
        Document("schedule", cron_job, f"{_GAPS}\n{_token(given, name)}"),
    )


def _seconds(hours: float) -> int:
    return max(1, round(hours * 3600))
