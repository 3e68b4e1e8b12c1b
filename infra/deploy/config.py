"""The section `deploy`: where and when a configuration runs by itself. Nothing in it changes a result."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from lodeset.infra.deploy.names import label, subdomain
from lodeset.infra.schedule.cron import parsed, zone_named
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.strict import Strict

_QUANTITY = re.compile(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")
_IMAGE = re.compile(r"[a-z0-9][\w.:/-]*(@sha256:[0-9a-f]{64})?")


def _quantity(value: str) -> str:
    if not _QUANTITY.fullmatch(value):
        raise ValueError("expected an amount of bytes, e.g. 16Gi or 500M")
    return value


def _image(value: str) -> str:
    if not _IMAGE.fullmatch(value):
        raise ValueError("expected an image, e.g. registry.example.org/lodeset:0.1.0")
    return value


def _mount(value: str) -> str:
    if not value.startswith("/") or ":" in value or ".." in value.split("/") or value.rstrip("/") == "":
        raise ValueError("expected an absolute path below `/`, e.g. /data")
    return value.rstrip("/")


Label = Annotated[str, AfterValidator(label)]
Subdomain = Annotated[str, AfterValidator(subdomain)]
Quantity = Annotated[str, AfterValidator(_quantity)]
Image = Annotated[str, AfterValidator(_image)]
Mount = Annotated[str, AfterValidator(_mount)]


class Schedule(Strict):
    """When runs start by themselves. A missed time does no harm: a run takes everything that is new."""

    cron: str = Field(
        description='minute, hour, day of the month, month, weekday, e.g. "0 3 * * 1" for Mondays at 3:00'
    )
    timezone: str | None = Field(
        None, description="time zone of these times, e.g. Europe/Berlin [default: the machine's; UTC in Kubernetes]"
    )

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str) -> str:
        try:
            return parsed(value).text
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("timezone")
    @classmethod
    def _is_a_zone(cls, value: str | None) -> str | None:
        try:
            return value if value is None else zone_named(value).key
        except ConfigError as error:
            raise ValueError(str(error)) from None


class Volume(Strict):
    """A claim that every pod mounts, at the same path."""

    name: Label
    claim: Subdomain = Field(description="name of a PersistentVolumeClaim; with several nodes it must be ReadWriteMany")
    path: Mount = Field(description="where it is mounted")
    read_only: bool = False


class Pod(Strict):
    """What a pod asks for: its requests are its limits."""

    cpus: float = Field(4, gt=0, description="cores")
    memory: Quantity = Field("16Gi", description="memory, the object store of Ray included")
    gpus: int = Field(0, ge=0)
    image: Image | None = Field(None, description="[default: that of `kubernetes`]")
    node_selector: dict[str, str] = Field({}, description="labels of the nodes to run on")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="as in Kubernetes")


class Workers(Pod):
    """A group of equal workers."""

    name: Label
    replicas: int = Field(1, ge=0, description="pods at the start")
    min_replicas: int | None = Field(None, ge=0, description="[default: replicas]")
    max_replicas: int | None = Field(None, ge=0, description="[default: replicas]; more than the minimum: autoscaling")

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if not self.fewest <= self.replicas <= self.most:
            raise ValueError(
                f"replicas {self.replicas} must lie between min_replicas {self.fewest} and max_replicas {self.most}"
            )
        return self

    @property
    def fewest(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas


class Kubernetes(Strict):
    """Runs in Kubernetes, with the KubeRay operator (1.7)."""

    image: Image = Field(description="an image that `docker/cpu.Dockerfile` made, or one with the same packages")
    gpu_image: Image | None = Field(
        None, description="image of pods with GPUs, of `docker/gpu.Dockerfile` [default: image]"
    )
    name: str | None = Field(
        None, description="name of the objects: a DNS label of at most 36 characters [default: the data set's name]"
    )
    namespace: Label = "default"
    mode: Literal["cluster", "ray_job", "ray_cron_job"] = Field(
        "cluster",
        description="cluster: a Ray cluster that stays, and runs are submitted to it; ray_job: each run starts a "
        "cluster of its own; ray_cron_job: the same, started by KubeRay's own scheduler, which is in alpha",
    )
    token_secret: Subdomain | None = Field(
        None, description="Secret whose key `auth_token` holds the token of the Ray cluster [default: NAME-ray-token]"
    )
    env_secrets: tuple[Subdomain, ...] = Field(
        (), description="Secrets whose keys become environment variables, e.g. credentials of an object store"
    )
    image_pull_secrets: tuple[Subdomain, ...] = ()
    service_account: Subdomain | None = Field(
        None, description="service account of the Ray pods, e.g. one with a role in a cloud [default: the namespace's]"
    )
    volumes: tuple[Volume, ...] = Field((), description="what holds the store and the sources, unless they are URLs")
    head: Pod = Field(Pod(), description="runs the driver and the Beam stages")
    workers: tuple[Workers, ...] = Field((), description="groups of Ray workers; without one, the head does all")
    scratch: Quantity = Field("20Gi", description="local disk of each pod, for temporary files and spilled objects")
    start_within_hours: float = Field(
        1, gt=0, description="a start that is later than this is skipped, and so is a cluster that is not up by then"
    )
    max_hours: float | None = Field(
        None, gt=0, description="a run with a cluster of its own is stopped after so long [default: no limit]"
    )
    keep_hours: float = Field(1, ge=0, description="the cluster of a run that failed is kept this long, to look at")
    history: int = Field(3, ge=0, le=100, description="finished jobs that are kept")

    @model_validator(mode="after")
    def _is_possible(self) -> Kubernetes:
        for what, names in (
            ("workers", [group.name for group in self.workers]),
            ("volumes", [volume.name for volume in self.volumes]),
            ("paths of volumes", [volume.path for volume in self.volumes]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what}: {', '.join(twice)} is used twice")
        if self.mode == "cluster" and self.max_hours is not None:
            raise ValueError("max_hours: only a run with a cluster of its own can be stopped in time: use mode ray_job")
        taken = sorted({volume.name for volume in self.volumes} & OWN_VOLUMES)
        if taken:
            raise ValueError(f"volumes: the name {taken[0]} is taken by a volume of lodeset's: use another")
        return self


# Volumes of every pod beside those of the configuration, and the one that KubeRay adds.
OWN_VOLUMES = frozenset({"tmp", "home", "config", "ray-token", "shared-mem", "ray-logs"})


class Machines(Strict):
    """Equal machines of a cloud."""

    machine: dict[str, Any] = Field({}, description="`node_config` of the provider, e.g. {InstanceType: m7i.4xlarge}")
    resources: dict[str, float] | None = Field(
        None, description="e.g. {CPU: 16, GPU: 1} [default: what the provider tells of the machine]"
    )


class WorkerMachines(Machines):
    """A group of equal workers."""

    name: Label
    min: int = Field(0, ge=0)
    max: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> WorkerMachines:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Launcher(Strict):
    """A cluster of machines that Ray's cluster launcher (`ray up`) starts."""

    provider: dict[str, Any] = Field(description="as in Ray's documentation, e.g. {type: aws, region: eu-central-1}")
    image: Image = Field(description="image that runs on all machines")
    ssh_user: str = Field("ubuntu", min_length=1)
    ssh_private_key: str | None = Field(None, description="path of the key [default: one that the launcher makes]")
    head: Machines = Machines()
    workers: tuple[WorkerMachines, ...] = ()
    idle_minutes: float = Field(10, gt=0, description="workers that are idle for so long are stopped")


class Deploy(Strict):
    """Where and when a configuration runs by itself."""

    schedule: Schedule | None = None
    kubernetes: Kubernetes | None = None
    launcher: Launcher | None = None
