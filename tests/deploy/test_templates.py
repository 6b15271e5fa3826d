"""Templates of clusters: they are valid, and name only what this project has."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from source_tree import ROOT, sources

from common.config.load import load_config
from common.config.sections import Config
from deploy.command.presets import CONFIGS
from deploy.predict.cluster_plan import ClusterPlan
from deploy.run.ray_metrics import gauge_name

DEPLOY = ROOT / "deploy"


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay" / name).read_text())


def of_command(command: str) -> Config:
    """The configuration of a command line `... train --config FILE key=value ...`."""
    words = command.split()
    file = words[words.index("--config") + 1]
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    return load_config([ROOT / file], overrides, CONFIGS / "recipes")


def test_the_job_runs_a_preset_on_pools_that_the_cluster_has() -> None:
    job, cluster = document("rayjob.yaml")["spec"], document("raycluster.yaml")
    config = of_command(job["entrypoint"])
    assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    groups = {group["labels"]["pool"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    pools = (config.generator.labels, config.learner.labels, config.verifier.labels)
    assert {labels["pool"] for labels in pools} == set(groups)
    plan = ClusterPlan.of(config)
    for labels, wanted in (
        (config.generator.labels, plan.pools.generators),
        (config.learner.labels, plan.pools.ranks),
    ):
        group = groups[labels["pool"]]
        gpus = int(container(group)["resources"]["limits"]["nvidia.com/gpu"])
        assert gpus * group["maxReplicas"] >= wanted
    assert config.resume == "auto" and config.name
    mounts = [m["mountPath"] for m in container(groups["learning"])["volumeMounts"]]
    assert config.runs_dir in mounts


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def test_the_cluster_is_that_of_our_ray_and_keeps_its_token() -> None:
    spec = document("raycluster.yaml")["spec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    targets = set(re.findall(r"^FROM \S+ AS (\w+)", dockerfile(), re.M))
    groups = [*spec["workerGroupSpecs"], spec["headGroupSpec"]]
    for group in groups:
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        name, _, target = container(group)["image"].partition(":")
        assert name == "grpo-lambda" and target in targets
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "readinessProbe" in container(group) and "livenessProbe" in container(group)


# Fields of KubeRay's ray.io/v1, as its raycluster_types.go and rayjob_types.go name them: a cluster
# that does not validate strictly drops an unknown one in silence.
CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions"}
CLUSTER |= {"headGroupSpec", "workerGroupSpecs"}
AUTOSCALER = {"version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "env"}
HEAD = {"rayStartParams", "template", "labels", "resources", "serviceType", "headService"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "labels", "resources"}
GROUP |= {"rayStartParams", "template", "scaleStrategy"}
JOB = {"submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "clusterSelector"}
JOB |= {"entrypoint", "runtimeEnvYAML", "activeDeadlineSeconds", "submitterPodTemplate"}
KUBERNETES = "1.33"


def test_the_operator_knows_every_field() -> None:
    spec, job = document("raycluster.yaml")["spec"], document("rayjob.yaml")["spec"]
    assert set(spec) <= CLUSTER and set(spec["autoscalerOptions"]) <= AUTOSCALER
    assert set(spec["headGroupSpec"]) <= HEAD
    assert all(set(group) <= GROUP for group in spec["workerGroupSpecs"])
    assert set(job) <= JOB


def test_the_operator_takes_them() -> None:
    """What KubeRay's validation.go asks for, of what the templates use."""
    for name, longest in (("raycluster.yaml", 63), ("rayjob.yaml", 47)):
        metadata = document(name)["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata) and len(metadata) <= longest
    spec = document("raycluster.yaml")["spec"]
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)  # for tokens
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert not {"labels", "resources"} & set(group["rayStartParams"])
        if spec["autoscalerOptions"]["version"] == "v2":
            assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_kubernetes_takes_every_pod() -> None:
    spec = document("raycluster.yaml")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        mistyped = json.loads(json.dumps(pod).replace("containers", "containrs"))
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(mistyped, KUBERNETES, strict=True)


def dockerfile() -> str:
    return (DEPLOY / "docker" / "Dockerfile").read_text()


def test_the_image_copies_what_is_there_and_runs_as_a_user() -> None:
    copied = re.findall(r"^COPY --chown=ray:ray (.+) \S+$", dockerfile(), re.M)
    for name in {name for line in copied for name in line.split()}:
        assert (ROOT / name).exists(), name
    assert "USER ray" in dockerfile()
    needed = {"pyproject.toml", "constraints.txt", "overrides-cpu.txt"}
    needed |= {"deploy/setup.sh", "deploy/check_machine.sh"}
    assert needed <= {name for line in copied for name in line.split()}


def test_the_batch_script_is_shell_and_its_overrides_are_keys() -> None:
    path = DEPLOY / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)
    text = path.read_text()
    keys = re.findall(r"(ray\.\w+)=", text)
    assert {"ray.address", "ray.placement_timeout_s"} <= set(keys)
    for key in keys:
        assert key.removeprefix("ray.") in Config().ray.__dataclass_fields__
    example = re.search(r"sbatch --nodes=2 deploy/slurm/train.sbatch (.+)$", text, re.M)
    assert example and of_command(example.group(1)).name


def test_the_dashboard_shows_gauges_that_a_run_sets() -> None:
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"ray_(grpo_lambda_\w+)", query)}
    assert len(shown) > 15
    written = {
        gauge_name(key)
        for package in ("actors", "common", "deploy", "learner")
        for path in sources(package)
        for key in re.findall(r'"([a-z_]+(?:/[a-z_0-9]+)?)"', path.read_text())
    }
    assert shown <= written, shown - written


@pytest.mark.parametrize("key", ["reward/mean", "lambda_grpo/lambda", "step"])
def test_gauges_have_names_that_prometheus_takes(key: str) -> None:
    assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", gauge_name(key))
    assert Path(gauge_name(key)).name == gauge_name(key)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*x8.yaml")), ids=lambda path: path.stem)
def test_a_preset_has_the_time_to_save_a_step_before_slurm_ends_it(path: Path) -> None:
    """A quarter more than the predicted step, for what the prediction does not know."""
    warned = re.search(r"--signal=B:TERM@(\d+)", (DEPLOY / "slurm" / "train.sbatch").read_text())
    assert warned is not None
    config = load_config([path], [], CONFIGS / "recipes")
    step_s = ClusterPlan.of(config).predict(steps=12).step_s
    assert 1.25 * step_s < config.checkpoint.stop_grace_s < int(warned[1])
