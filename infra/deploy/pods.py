"""Pods of a Ray cluster, as KubeRay wants them described."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from lodeset.infra.deploy.config import Kubernetes, Pod

UID = 10001  # of the user in the images of `docker/`
CONFIG_FOLDER, CONFIG_FILE = "/etc/lodeset", "lodeset.yaml"
CONFIG_PATH = f"{CONFIG_FOLDER}/{CONFIG_FILE}"
GPUS = "nvidia.com/gpu"
# A run that is stopped commits the parts at hand first.
STOP_S = 120

POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": UID,
    "runAsGroup": UID,
    "fsGroup": UID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def container(
    given: Kubernetes,
    name: str,
    image: str,
    resources: dict[str, str],
    mounts: tuple[dict[str, Any], ...] = (),
) -> dict[str, Any]:
    """A container that writes only to `/tmp`, its home and the volumes."""
    data = [{"name": one.name, "mountPath": one.path, "readOnly": one.read_only} for one in given.volumes]
    own = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": "/home/lodeset"}]
    environment = {"HOME": "/home/lodeset", "RAY_USAGE_STATS_ENABLED": "0"}
    described: dict[str, Any] = {
        "name": name,
        "image": image,
        "resources": {"requests": resources, "limits": resources},
        "env": [{"name": key, "value": value} for key, value in environment.items()],
    }
    if given.env_secrets:
        described["envFrom"] = [{"secretRef": {"name": secret}} for secret in given.env_secrets]
    described["volumeMounts"] = [*data, *mounts, *own]
    described["securityContext"] = CONTAINER_SECURITY
    return described


def pod(
    given: Kubernetes, content: dict[str, Any], volumes: tuple[dict[str, Any], ...] = (), *, api: bool = False
) -> dict[str, Any]:
    """The `spec` of a pod with one container; `api`: the pod calls the API of Kubernetes."""
    claims = [
        {"name": one.name, "persistentVolumeClaim": {"claimName": one.claim, "readOnly": one.read_only}}
        for one in given.volumes
    ]
    own = [{"name": name, "emptyDir": {"sizeLimit": given.scratch}} for name in ("tmp", "home")]
    spec: dict[str, Any] = {"containers": [content], "volumes": [*claims, *volumes, *own]}
    spec["securityContext"] = POD_SECURITY
    spec["terminationGracePeriodSeconds"] = STOP_S
    spec["automountServiceAccountToken"] = api
    if given.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in given.image_pull_secrets]
    return spec


def config_volume(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The volume of a ConfigMap with the configuration, and how a container mounts it."""
    return {"name": "config", "configMap": {"name": name}}, {
        "name": "config",
        "mountPath": CONFIG_FOLDER,
        "readOnly": True,
    }


def token_secret(given: Kubernetes, name: str) -> str:
    """The Secret that holds the token of the cluster."""
    return given.token_secret or f"{name}-ray-token"


def cluster_spec(given: Kubernetes, name: str, config_map: str | None = None) -> dict[str, Any]:
    """The `spec` of a RayCluster. The head mounts the ConfigMap, if there is one."""
    autoscaled = any(group.most > group.fewest for group in given.workers)
    head = _template(given, given.head, "ray-head", config_map, api=autoscaled)
    head["spec"]["containers"][0]["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "metrics", "containerPort": 8080},
    ]
    parameters = {"dashboard-host": "0.0.0.0"}
    if any(group.most for group in given.workers):
        parameters["num-cpus"] = "0"  # the head's cores are the driver's and Beam's
    spec: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": token_secret(given, name)},
    }
    if autoscaled:
        amount = {"cpu": "500m", "memory": "1Gi"}
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "idleTimeoutSeconds": 300,
            "resources": {"requests": amount, "limits": amount},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    spec["headGroupSpec"] = {"serviceType": "ClusterIP", "rayStartParams": parameters, "template": head}
    spec["workerGroupSpecs"] = [
        {
            "groupName": group.name,
            "replicas": group.replicas,
            "minReplicas": group.fewest,
            "maxReplicas": group.most,
            "rayStartParams": {},
            "template": _template(given, group, "ray-worker", None, api=False),
        }
        for group in given.workers
    ]
    return spec


def _template(given: Kubernetes, asked: Pod, name: str, config_map: str | None, *, api: bool) -> dict[str, Any]:
    image = asked.image or (given.gpu_image if asked.gpus else None) or given.image
    cpus = f"{asked.cpus:g}" if asked.cpus == int(asked.cpus) else f"{round(asked.cpus * 1000)}m"
    amount = {"cpu": cpus, "memory": asked.memory} | ({GPUS: str(asked.gpus)} if asked.gpus else {})
    if config_map is None:
        spec = pod(given, container(given, name, image, amount), api=api)
    else:
        volume, mount = config_volume(config_map)
        spec = pod(given, container(given, name, image, amount, (mount,)), (volume,), api=api)
    if given.service_account is not None:
        spec["serviceAccountName"] = given.service_account
    if asked.node_selector:
        spec["nodeSelector"] = dict(asked.node_selector)
    tolerations = [dict(one) for one in asked.tolerations]
    if asked.gpus:
        tolerations.append({"key": GPUS, "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    return {"spec": spec}
