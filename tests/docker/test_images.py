"""No container engine runs here: what can be checked is that the files agree with the tree and with schemas."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))

_TEMPLATE = {"type": "object", "required": ["spec"]}
_PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
# The fields of ray.io/v1 RayJob that KubeRay 1.4 and later know and a manifest of ours may use; no others.
_RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "backoffLimit": _COUNT,
                "activeDeadlineSeconds": _COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": _COUNT,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
                "runtimeEnvYAML": {"type": "string"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "idleTimeoutSeconds": _COUNT,
                                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                            },
                        },
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["template"],
                            "additionalProperties": False,
                            "properties": {"rayStartParams": _PARAMETERS, "template": _TEMPLATE},
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                                "additionalProperties": False,
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": _COUNT,
                                    "minReplicas": _COUNT,
                                    "maxReplicas": _COUNT,
                                    "rayStartParams": _PARAMETERS,
                                    "template": _TEMPLATE,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def check(manifest: dict[str, Any]) -> None:
    """The job by the schema above, its pods by that of Kubernetes."""
    jsonschema.validate(manifest, _RAY_JOB)
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a-pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


@pytest.fixture
def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / "rayjob.yaml").read_text())


def test_the_ray_job_is_one(manifest: dict[str, Any]) -> None:
    check(manifest)


def test_a_misspelt_field_is_found(manifest: dict[str, Any]) -> None:
    worker = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    worker["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifest)
    del worker["template"]["spec"]["containers"][0]["volumeMount"]
    worker["maxReplica"] = 2
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_the_ray_job_runs_the_versions_that_we_install(manifest: dict[str, Any]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    version = manifest["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray[data,default]=={version}" in extras["teacher-base"]
    assert manifest["spec"]["entrypoint"].startswith("python3 -m teacher_dump ")


def test_pods_come_and_go_within_bounds_and_have_time_to_end(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    for group in cluster["workerGroupSpecs"]:
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 30
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "30"} in head["env"]
    ports = {port["name"]: str(port["containerPort"]) for port in head["ports"]}
    assert ports["metrics"] == cluster["headGroupSpec"]["rayStartParams"]["metrics-export-port"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_takes_what_exists(path: Path) -> None:
    text = path.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.M) for source in line.split()[:-1]]
    assert copied
    assert all((ROOT / source).exists() and source in kept for source in copied)
    named = [name for group in re.findall(r"'\.\[([\w,-]+)\]'", text) for name in group.split(",")]
    assert named
    assert set(named) <= set(extras)


def test_the_student_image_has_no_teacher_in_it() -> None:
    text = (ROOT / "docker" / "student.Dockerfile").read_text()
    assert "teacher" not in " ".join(re.findall(r"'\.\[(.+?)\]'", text))
