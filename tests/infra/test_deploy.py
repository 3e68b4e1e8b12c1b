"""What is rendered for Kubernetes and for Ray's cluster launcher is valid, means what was configured, and gives nothing away."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import ipaddress
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import lodeset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lodeset.infra import config as configured
from lodeset.infra.config import read
from lodeset.infra.deploy import launch, names
from lodeset.infra.deploy.kubernetes import render_kubernetes
from lodeset.infra.deploy.launcher import render_cluster
from lodeset.infra.deploy.portable import portable
from lodeset.pipeline.errors import ConfigError, LodesetError

ROOT = Path(__file__).parents[2]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, sooner
SCHEMAS = ROOT.parent / "shared/data/schemas/kuberay_v1.7.0_schemas.json.gz"

CONFIG = """
name: flowers-2026
store: s3://bucket/runs
pool: ["s3://bucket/crawl/*.tar"]
curated: [{name: flowers, uri: /data/flowers.tar, retrieve: {mode: cluster, per_cluster: 7}}]
embed: {semantic: {kind: onnx, path: /data/model.onnx}}
deploy:
  schedule: {cron: "0 3 * * 7", timezone: Europe/Berlin}
  kubernetes:
    image: registry.example.org/lodeset:0.1.0
    gpu_image: registry.example.org/lodeset:0.1.0-gpu
    namespace: curation
    env_secrets: [s3-credentials]
    image_pull_secrets: [registry]
    volumes: [{name: data, claim: lodeset-data, path: /data}]
    head: {cpus: 2.5, memory: 12Gi}
    workers:
      - {name: cpu, replicas: 2, cpus: 8, memory: 32Gi, node_selector: {pool: big}}
      - {name: gpu, replicas: 0, max_replicas: 4, cpus: 16, memory: 64Gi, gpus: 1}
  launcher:
    provider: {type: aws, region: eu-central-1}
    image: registry.example.org/lodeset:0.1.0
    head: {machine: {InstanceType: m7i.4xlarge}}
    workers: [{name: gpu, max: 4, machine: {InstanceType: g6.4xlarge}, resources: {CPU: 16, GPU: 1}}]
"""
AUTO = "resources.ray_address=auto"  # pods join the cluster that they are part of
MODES = ("cluster", "ray_job", "ray_cron_job")
Objects = dict[str, dict[str, Any]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "lodeset.yaml").write_text(CONFIG)
    return tmp_path / "lodeset.yaml"


def objects(path: Path, *overrides: str) -> Objects:
    """Kind -> object, read back from the YAML that is written; the RayJob of a ConfigMap among them."""
    out, _ = lodeset("render", "kubernetes", path, *(word for one in overrides for word in ("--set", one)))
    found = {body["kind"]: body for body in yaml.load_all(out, Loader=LOADER)}
    files = found["ConfigMap"]["data"] if "ConfigMap" in found else {}
    if "rayjob.yaml" in files:
        found["RayJob"] = yaml.load(files["rayjob.yaml"], Loader=LOADER)
    return found


def in_mode(path: Path, mode: str, *overrides: str) -> Objects:
    return objects(path, f"deploy.kubernetes.mode={mode}", *overrides)


def without_schedule(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    del tree["deploy"]["schedule"]
    path.write_text(yaml.safe_dump(tree))


def pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, Mapping):
        if "containers" in node:
            yield dict(node)
        for value in node.values():
            yield from pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_specs(value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduled", [True, False])
def test_kubernetes_takes_every_object(path: Path, mode: str, scheduled: bool) -> None:
    if not scheduled:
        without_schedule(path)
        if mode == "ray_cron_job":
            lodeset("render", "kubernetes", path, "--set", f"deploy.kubernetes.mode={mode}", code=2)
            return
    found = in_mode(path, mode)
    builtin = {kind: body for kind, body in found.items() if not body["apiVersion"].startswith("ray.io/")}
    for body in builtin.values():
        kubernetes_validate.validate(body, "1.34", strict=True)
    assert ("CronJob" in builtin) == (scheduled and mode != "ray_cron_job")
    for body in found.values():
        assert body["metadata"]["namespace"] == "curation"
        assert body["metadata"]["labels"]["app.kubernetes.io/instance"] == "flowers-2026"


def test_a_typo_would_be_found(path: Path) -> None:
    job = objects(path)["CronJob"]
    job["spec"]["concurencyPolicy"] = job["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.34", strict=True)


@pytest.mark.skipif(not SCHEMAS.exists(), reason="needs the schemas of KubeRay 1.7")
@pytest.mark.parametrize("mode", MODES)
def test_kuberay_takes_every_object(path: Path, mode: str) -> None:
    schemas = json.loads(gzip.decompress(SCHEMAS.read_bytes()))["schemas"]
    kinds = {"cluster": "RayCluster", "ray_job": "RayJob", "ray_cron_job": "RayCronJob"}
    body = in_mode(path, mode)[kinds[mode]]
    jsonschema.Draft202012Validator(schemas[kinds[mode]]).validate(body)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schemas[kinds[mode]]).validate({**body, "spec": {**body["spec"], "typo": 1}})


def broken_job_rules(job: Mapping[str, Any]) -> list[str]:
    """The rules of KubeRay 1.7 between fields of a RayJob's `spec`, which no schema holds."""
    rules = job.get("deletionStrategy", {}).get("deletionRules", [])
    cluster = job.get("rayClusterSpec")
    broken = {
        "deletionRules exclude shutdownAfterJobFinishes": bool(rules) and job.get("shutdownAfterJobFinishes", False),
        "a ttl needs shutdownAfterJobFinishes": "ttlSecondsAfterFinished" in job
        and not job.get("shutdownAfterJobFinishes", False),
        "clusterSelector or rayClusterSpec": cluster is None and "clusterSelector" not in job,
        "clusterSelector: no backoff, no suspend, no sidecar": "clusterSelector" in job
        and (job.get("backoffLimit", 0) > 0 or job.get("suspend") or job.get("submissionMode") == "SidecarMode"),
        "sidecar: no submitter": job.get("submissionMode") == "SidecarMode"
        and ("submitterPodTemplate" in job or "submitterConfig" in job),
        "the runtime environment is YAML": not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict),
        "positive deadlines": any(
            job.get(key, 1) <= 0 for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
        ),
        "no negative backoff": job.get("backoffLimit", 0) < 0,
    }
    ttls: dict[str, dict[str, int]] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        ttl = condition.pop("ttlSeconds", 0)
        broken["one condition a rule"] = broken.get("one condition a rule", False) or len(condition) != 1
        policies = ttls.setdefault(str(condition), {})
        broken["one rule for a policy and a condition"] = rule["policy"] in policies
        policies[rule["policy"]] = ttl
    for policies in ttls.values():
        ordered = [policies[p] for p in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if p in policies]
        broken["workers, cluster, self"] = broken.get("workers, cluster, self", False) or ordered != sorted(ordered)
    if cluster is not None:
        broken.update(dict.fromkeys(broken_cluster_rules(cluster), True))
        autoscaled = cluster.get("enableInTreeAutoscaling", False)
        broken["autoscaling: no DeleteWorkers"] = autoscaled and any(r["policy"] == "DeleteWorkers" for r in rules)
    return [rule for rule, is_broken in broken.items() if is_broken]


def broken_cluster_rules(cluster: Mapping[str, Any]) -> list[str]:
    """The same of a RayCluster's `spec`."""
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    version = tuple(int(number) for number in cluster["rayVersion"].split("."))
    own = ("num-cpus", "num-gpus", "memory", "resources")
    broken = {
        "a token needs Ray 2.52": cluster["authOptions"]["mode"] == "token" and version < (2, 52),
        "resources in one place": any(
            g.get("resources") and any(key in g["rayStartParams"] for key in own) for g in groups
        ),
        "no labels in rayStartParams": any("labels" in g["rayStartParams"] for g in groups),
        "every group has a container": not all(g["template"]["spec"]["containers"] for g in groups),
        "names of groups differ": len({g.get("groupName") for g in groups}) != len(groups),
        "replicas in order": any(
            not g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in cluster.get("workerGroupSpecs", [])
        ),
        "a range needs autoscaling": not cluster.get("enableInTreeAutoscaling")
        and any(g["minReplicas"] != g["maxReplicas"] for g in cluster.get("workerGroupSpecs", [])),
        "autoscaling: no other restartPolicy than Never": bool(cluster.get("enableInTreeAutoscaling"))
        and any(g["template"]["spec"].get("restartPolicy", "Never") != "Never" for g in groups),
    }
    return [rule for rule, is_broken in broken.items() if is_broken]


def test_rules_between_fields(path: Path) -> None:
    spec = in_mode(path, "ray_job", "deploy.kubernetes.max_hours=12")["RayJob"]["spec"]
    assert broken_cluster_rules(in_mode(path, "cluster")["RayCluster"]["spec"]) == []
    assert broken_job_rules(spec) == []
    cron_job = in_mode(path, "ray_cron_job")["RayCronJob"]["spec"]
    assert broken_job_rules(cron_job["jobTemplate"]) == []
    assert {rule["policy"] for rule in cron_job["jobTemplate"]["deletionStrategy"]["deletionRules"]} == {
        "DeleteCluster",
        "DeleteSelf",
    }
    # The rules can be broken.
    assert broken_job_rules({**spec, "shutdownAfterJobFinishes": True, "activeDeadlineSeconds": 0}) == [
        "deletionRules exclude shutdownAfterJobFinishes",
        "positive deadlines",
    ]
    assert broken_job_rules({**spec, "rayClusterSpec": {**spec["rayClusterSpec"], "rayVersion": "2.51.0"}})


def test_overlap_is_refused_and_a_held_store_is_a_skip(path: Path) -> None:
    for mode in ("cluster", "ray_job"):
        limit = () if mode == "cluster" else ("deploy.kubernetes.max_hours=12",)
        spec = in_mode(path, mode, *limit)["CronJob"]["spec"]
        assert spec["concurrencyPolicy"] == "Forbid" and spec["timeZone"] == "Europe/Berlin"
        assert spec["schedule"] == "0 3 * * 0"  # 7 is not known to Kubernetes
        assert 0 < spec["startingDeadlineSeconds"] == 3600
        job = spec["jobTemplate"]["spec"]
        assert job.get("activeDeadlineSeconds") == (None if mode == "cluster" else 13 * 3600)
        assert job["template"]["spec"]["restartPolicy"] == "Never"  # as podFailurePolicy requires
        rule = job["podFailurePolicy"]["rules"][0]
        assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
        assert 4 not in rule["onExitCodes"]["values"] and 0 not in rule["onExitCodes"]["values"]


def test_the_shell_commands_end_as_they_should(path: Path, tmp_path: Path) -> None:
    submit = in_mode(path, "cluster")["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    entrypoint = in_mode(path, "ray_job")["RayJob"]["spec"]["entrypoint"]
    address = "http://flowers-2026-head-svc:8265"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "lodeset").touch(0o755)
    for status, code, told in ((0, 0, ""), (4, 0, "skipped"), (3, 3, ""), (1, 1, "")):
        (tmp_path / "lodeset").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit {status}\n')
        for command, said in (
            ([*submit["command"], *submit["args"]], f"submit /etc/lodeset/lodeset.yaml --address {address}"),
            (["/bin/sh", "-c", entrypoint], "run /etc/lodeset/lodeset.yaml"),
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == code and told in done.stdout
            assert (tmp_path / "said").read_text().strip() == said


@pytest.mark.parametrize("mode", MODES)
def test_pods_have_no_rights_that_they_do_not_need(path: Path, mode: str) -> None:
    found = in_mode(path, mode)
    specs = [spec for body in found.values() for spec in pod_specs(body)]
    assert len(specs) >= 3
    for spec in specs:
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert {"tmp", "home"} <= mounted == {volume["name"] for volume in spec["volumes"]}
    if mode == "ray_job":
        assert found["Role"]["rules"] == [
            {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
        ]
        launcher = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        assert launcher["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
        assert "envFrom" not in launcher["containers"][0]


def test_groups_get_what_was_configured(path: Path) -> None:
    cluster = in_mode(path, "cluster")["RayCluster"]["spec"]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"  # the head is the driver's
    assert head["template"]["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "2500m", "memory": "12Gi"}
    cpu, gpu = cluster["workerGroupSpecs"]
    assert cpu["template"]["spec"]["nodeSelector"] == {"pool": "big"} and cpu["replicas"] == 2
    container = gpu["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert container["image"].endswith("-gpu") and container["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
    assert gpu["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "flowers-2026-ray-token"}
    alone = in_mode(path, "cluster", "deploy.kubernetes.workers=[]")["RayCluster"]["spec"]
    assert "num-cpus" not in alone["headGroupSpec"]["rayStartParams"] and "enableInTreeAutoscaling" not in alone


def test_the_configuration_in_the_cluster_is_the_same(path: Path, tmp_path: Path) -> None:
    found = in_mode(path, "ray_job", "dedup.threshold=0.5")
    copy = tmp_path / "copy.yaml"
    copy.write_text(found["ConfigMap"]["data"]["lodeset.yaml"])
    # Its groups can grow, which takes a while.
    there, here = read(copy), read(path, ("dedup.threshold=0.5", AUTO, "resources.ray.wait_for_nodes=900"))
    assert there == here.model_copy(update={"deploy": None})


def test_recipes_survive_being_written_out(tmp_path: Path) -> None:
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        (tmp_path / recipe.name).write_text(portable(recipe, (), (str(ROOT),)))
        assert read(tmp_path / recipe.name) == read(recipe, (AUTO,))


KINDS = """
pool: {uri: /data/pool, members: {exclude: "*.seg.png"}, exclude: [thumbs/]}
curated: [/data/flowers.tar, {name: all-in, uri: /data/b, include: true}]
reference: /data/test
targets: [{name: birds, uri: /data/birds.parquet, label: class}]
embed: {semantic: {kind: patch_dictionary, words: 16}, dedup: {kind: huggingface, model: facebook/dinov2-small}}
filter: {min_side: 32, classifiers: [{name: nsfw, path: /data/nsfw.onnx, index: 1, keep: below, threshold: 0.5}]}
cluster: {k: [100, 10]}
balance: {images: 50}
training: {recipe: short, losses: {koleo: 0.1}, mix: {all-in: 2.0}, distill: {model: {dim: 64}, steps: 5}}
pruning: [{method: entropic, sweep: [1.0e-3]}, {method: lottery, tasks: [rotation]}, {method: self_masking, task: swav}]
store: /data/runs
"""


def test_every_kind_of_section_survives_being_written_out(tmp_path: Path) -> None:
    """A section that is short only because of its defaults still says of which kind it is."""
    (tmp_path / "a.yaml").write_text(KINDS)
    overrides = ("dedup.threshold=0.5",)
    (tmp_path / "b.yaml").write_text(portable(tmp_path / "a.yaml", overrides, ("/data",)))
    assert read(tmp_path / "b.yaml") == read(tmp_path / "a.yaml", (*overrides, AUTO))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["store=./runs"], "pods cannot see store: "),
        (["store=./runs"], "use URLs, or paths below /data"),
        (["store=/data/../runs"], "pods cannot see store: /runs"),
        (["store=file:///runs"], "pods cannot see store: /runs"),
        (["embed.semantic.path=/elsewhere/model.onnx"], "embed.semantic.path: /elsewhere/model.onnx"),
        (["store=s3://key:topsecret@bucket/runs"], "it holds a credential"),
        (["deploy.kubernetes.name=Flowers"], "`Flowers` must hold lower-case letters"),
        (["deploy.kubernetes.name=1st"], "e.g. lodeset-1st"),
        (["name=my_set"], "the name of the data set `my_set` must hold"),
        ([f"deploy.kubernetes.name={'a' * 53}"], "has 53 characters, and at most 52 are allowed, as the name of a Ray"),
        (
            ["deploy.kubernetes.mode=ray_job", f"deploy.kubernetes.name={'a' * 37}"],
            "at most 36 are allowed, as the name of a RayJob",
        ),
        (
            ["deploy.kubernetes.mode=ray_cron_job", f"deploy.kubernetes.name={'a' * 37}"],
            "at most 36 are allowed, as the name of a RayCronJob",
        ),
        (["deploy.kubernetes=null"], "there is no section `deploy.kubernetes`"),
        (["deploy.kubernetes.workers.0.name=a_b"], "expected lower-case letters, digits and `-`"),
        (["deploy.kubernetes.workers.1.name=cpu"], "workers: cpu is used twice"),
        (["deploy.kubernetes.workers.1.replicas=5"], "replicas 5 must lie between min_replicas 5 and max_replicas 4"),
        (["deploy.kubernetes.volumes.0.path=data"], "expected an absolute path below `/`"),
        (["deploy.kubernetes.max_hours=3"], "only a run with a cluster of its own can be stopped in time"),
        (["deploy.kubernetes.volumes.0.name=tmp"], "the name tmp is taken"),
        (["deploy.kubernetes.head.memory=16 GB"], "expected an amount of bytes, e.g. 16Gi"),
        (["deploy.kubernetes.image=two words"], "expected an image"),
        (["deploy.schedule.cron=61 * * * *"], "the minute is out of range"),
        (["deploy.schedule.timezone=Europe/Berln"], "did you mean Europe/Berlin?"),
    ],
)
def test_what_would_fail_in_the_cluster_is_refused(path: Path, overrides: list[str], told: str) -> None:
    words = [word for one in overrides for word in ("--set", one)]
    _, err = lodeset("render", "kubernetes", path, *words, code=2)
    assert told in err and "topsecret" not in err


def test_lengths_without_a_schedule(path: Path) -> None:
    without_schedule(path)
    for mode, kind in (("cluster", "RayCluster"), ("ray_job", "RayJob")):
        longest = names.LONGEST[kind]
        assert in_mode(path, mode, f"deploy.kubernetes.name={'a' * longest}")[kind]
        with pytest.raises(ConfigError, match=f"at most {longest} are allowed"):
            render_kubernetes(path, (f"deploy.kubernetes.mode={mode}", f"deploy.kubernetes.name={'a' * (longest + 1)}"))


def test_the_gaps_of_a_ray_cron_job_are_told(path: Path) -> None:
    out, _ = lodeset("render", "kubernetes", path, "--set", "deploy.kubernetes.mode=ray_cron_job")
    assert "# - It forbids no overlap." in out and "feature gate RayCronJob" in out


def test_files_are_numbered_in_the_order_to_apply_them(path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.yaml").touch()
    out, err = lodeset("render", "kubernetes", path, "--out", tmp_path / "out")
    assert [line.rpartition("/")[2] for line in out.splitlines()] == [
        "1-config.yaml",
        "2-cluster.yaml",
        "3-schedule.yaml",
    ]
    assert "also holds old.yaml" in err
    whole, _ = lodeset("render", "kubernetes", path)
    parts = [(tmp_path / "out" / name).read_text() for name in ("1-config.yaml", "2-cluster.yaml", "3-schedule.yaml")]
    assert "---\n".join(parts) == whole
    told = json.loads(lodeset("render", "kubernetes", path, "--json")[0])
    assert told["objects"] == list(yaml.safe_load_all(whole))


def test_a_schedule_as_a_cron_job(path: Path) -> None:
    out, _ = lodeset("schedule", path, "--as", "kubernetes", "--cron", "30 4 * * 2")
    cron_job = next(body for body in yaml.safe_load_all(out) if body["kind"] == "CronJob")
    assert (cron_job["spec"]["schedule"], cron_job["spec"]["timeZone"]) == ("30 4 * * 2", "Europe/Berlin")
    assert out.startswith("# next (Europe/Berlin): Tue ")
    lodeset("schedule", path, "--as", "kubernetes", "--install", code=2)


def test_ray_takes_the_configuration_of_its_launcher(path: Path) -> None:
    """By the schema in its wheel, and by what `ray up` does with a configuration before it starts anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    body = yaml.safe_load(lodeset("render", "cluster", path)[0])
    assert body["max_workers"] == 4 and body["available_node_types"]["worker-gpu"]["resources"] == {"CPU": 16, "GPU": 1}
    validate_config(prepare_config(body))
    for command in (body["head_start_ray_commands"][1], body["worker_start_ray_commands"][1]):
        assert "RAY_AUTH_MODE=token" in command
    with pytest.raises(ConfigError, match=r"refuses provider.region: 3 is not of type 'string'"):
        render_cluster(path, ("deploy.launcher.provider.region=3",))
    with pytest.raises(ConfigError, match=r"there is no section `deploy\.launcher`"):
        render_cluster(path, ("deploy.launcher=null",))


def test_a_container_has_the_cores_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(configured, "_CGROUP", limit)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for text, cores in (("max 100000", 64), ("250000 100000", 3), ("10000 100000", 1), ("odd", 64)):
        limit.write_text(text)
        assert configured.usable_cpus() == cores


class Cluster:
    """An API server that holds RayJobs; each entry of `script` answers one request for the status."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.jobs, self.tokens = script, {}, set[str]()  # type: ignore[var-annotated]

    def handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def answer(self, code: int, body: Any) -> None:
                text = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_POST(self) -> None:
                outer.tokens.add(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = body["metadata"]["name"]
                code = 409 if name in outer.jobs else 201
                outer.jobs.setdefault(name, body)
                self.answer(code, {"message": "already exists"} if code == 409 else body)

            def do_GET(self) -> None:
                step = outer.script.pop(0)
                if isinstance(step, int):
                    self.answer(step, {"message": "no"})
                else:
                    self.answer(200, {"status": step})

        return Handler


@contextlib.contextmanager
def serving(cluster: Cluster, account: Path) -> Iterator[int]:
    """The port of an API server with this cluster; `account` gets what a pod has to call it."""
    (account / "token").write_text("secret\n")
    certificate(account)
    with HTTPServer(("127.0.0.1", 0), cluster.handler()) as server:
        server.socket = server_context(account).wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


@pytest.fixture
def launched(tmp_path: Path) -> Callable[..., tuple[int, Cluster]]:
    def run(script: list[Any], name: str = "flowers-29400000", **existing: Any) -> tuple[int, Cluster]:
        cluster = Cluster(script)
        cluster.jobs.update(existing)
        body = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "flowers"}, "spec": {}}
        with serving(cluster, tmp_path) as port:
            api = launch.Api(f"https://127.0.0.1:{port}", "curation", tmp_path)
            return launch.launch(api, body, name, "the-uid", poll_s=0.01), cluster

    return run


def certificate(folder: Path) -> None:
    """A certificate for 127.0.0.1, as `ca.crt` and `key.pem`."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def server_context(folder: Path) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    return context


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def test_a_launcher_waits_for_the_end_through_outages(
    launched: Callable[..., tuple[int, Cluster]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, cluster = launched([{}, RUNNING, 503, 429, RUNNING, DONE])
    assert code == 0 and cluster.tokens == {"Bearer secret"}
    told = capsys.readouterr()
    assert told.out.splitlines() == ["created RayJob flowers-29400000", "Running RUNNING", "Complete SUCCEEDED"]
    (job,) = cluster.jobs.values()
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "flowers-29400000", "uid": "the-uid"}
    ]


def test_a_launcher_finds_everything_in_its_pod(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of the pod, with the file and the variables that the CronJob gives it."""
    found = in_mode(path, "ray_job")
    launcher = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert launcher["command"] == ["python", "-P", "-m", launch.__name__]
    (tmp_path / "rayjob.yaml").write_text(found["ConfigMap"]["data"]["rayjob.yaml"])
    values = {"LODESET_NAMESPACE": "curation", "LODESET_JOB_NAME": "flowers-1", "LODESET_JOB_UID": "a-uid"}
    assert set(values) <= {variable["name"] for variable in launcher["env"]}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "ACCOUNT", tmp_path)
    monkeypatch.setattr("sys.argv", ["launch", str(tmp_path / launcher["args"][0].rpartition("/")[2])])
    real, seen = launch.launch, []

    def launching(api: launch.Api, body: Any, name: str, uid: str) -> int:
        seen.append((api.namespace, name, uid, body["kind"]))
        return real(api, body, name, uid, poll_s=0.01)

    monkeypatch.setattr(launch, "launch", launching)
    for script, code in (([DONE], 0), ([403], 1)):
        with serving(Cluster(script), tmp_path) as port:
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
            assert launch.main() == code
    assert seen == [("curation", "flowers-1", "a-uid", "RayJob")] * 2


def test_a_launcher_follows_the_job_of_its_predecessor(
    launched: Callable[..., tuple[int, Cluster]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, cluster = launched([DONE], **{"flowers-29400000": {"mine": True}})
    assert code == 0 and cluster.jobs == {"flowers-29400000": {"mine": True}}
    assert "following RayJob flowers-29400000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "message": "command failed with exit code 3, last",
            },
            3,
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "stopped by a user"}, 1),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 0"}, 1),
    ],
)
def test_a_launcher_ends_as_the_driver_did(
    launched: Callable[..., tuple[int, Cluster]], status: dict[str, str], code: int
) -> None:
    assert launched([status])[0] == code


def test_a_launcher_gives_up_where_waiting_is_in_vain(
    launched: Callable[..., tuple[int, Cluster]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LodesetError, match="RayJob flowers-29400000 was deleted before it ended"):
        launched([RUNNING, 404])
    with pytest.raises(LodesetError, match="Kubernetes refused: HTTP 403: no"):
        launched([403])
    with pytest.raises(LodesetError, match="at most 47 are allowed"):
        launched([], name="a" * 48)
    monkeypatch.setattr(launch, "PATIENCE_S", 0.0)
    with pytest.raises(LodesetError, match="did not answer for 0 minutes"):
        launched([503] * 9)
