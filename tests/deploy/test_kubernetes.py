"""The manifests for Kubernetes, without a cluster: its schemas, and Prefect's own worker."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
from composed import ROOT
from ruamel.yaml import YAML

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.31", "1.35")


def documents(path: Path) -> list[dict[str, Any]]:
    found = YAML(typ="safe").load_all(path)
    return [one for one in found if one]


def manifests() -> list[dict[str, Any]]:
    """Every manifest that the kustomizations name, and no file that none names."""
    made = []
    for folder in (FOLDER, FOLDER / "pretrain"):
        (kustomization,) = documents(folder / "kustomization.yaml")
        named = {*kustomization["resources"], "kustomization.yaml"}
        assert {path.name for path in folder.glob("*.yaml")} == named
        for name in kustomization["resources"]:
            made += documents(folder / name)
    return made


def containers(manifest: dict[str, Any]) -> list[Any]:
    pod = manifest.get("spec", {}).get("template", {}).get("spec")
    return [(pod, one) for one in pod["containers"]] if pod else []


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_as_kubernetes_specifies(version: str) -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)
    broken = next(one for one in manifests() if one["kind"] == "Job")
    broken["spec"]["paralelism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def filled(**variables: Any) -> dict[str, Any]:
    """The job that Prefect's own worker makes of pool.json for a flow run."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((FOLDER / "pool.json").read_text())
    # Only a template with references to blocks would ask a server; without a name one is started.
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        made = asyncio.run(
            KubernetesWorkerJobConfiguration.from_template_and_values(template, variables)
        )
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="a run"))
    job: dict[str, Any] = made.job_manifest
    return job


def test_a_flow_run_becomes_a_job_that_kubernetes_takes() -> None:
    place = {"working_dir": "/workspace/other", "env": {"A": "b"}}
    for variables in ({}, place, place | {"gpus": "8", "node_selector": {"a/b": "c"}}):
        job = filled(**variables)
        for version in VERSIONS:
            kubernetes_validate.validate(job, version, strict=True)
        ((pod, container),) = containers(job)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == variables.get("gpus", "1")
        assert container["workingDir"] == variables.get("working_dir", "/workspace")
        assert pod["nodeSelector"] == variables.get("node_selector", {})
        assert "prefect flow-run execute" in " ".join(container["args"])


def test_a_flow_that_trains_nothing_asks_for_no_gpu() -> None:
    from flows import pool

    ((_, container),) = containers(filled(**pool.LIGHT))
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "0"


def test_nothing_runs_as_root_or_may_do_more_than_it_must() -> None:
    seen = 0
    for manifest in [*manifests(), filled()]:
        for pod, container in containers(manifest):
            seen += 1
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["image"].partition(":")[0] == "ringmo"
            starts_jobs = pod["serviceAccountName"] == "prefect-worker"
            assert starts_jobs or pod["automountServiceAccountToken"] is False
    assert seen == 4
    (role,) = [one for one in manifests() if one["kind"] == "Role"]
    assert not [rule for rule in role["rules"] if "secrets" in rule["resources"]]
    assert not [rule for rule in role["rules"] if "*" in str(rule)]


def test_no_secret_is_in_a_manifest_or_in_git() -> None:
    template = documents(FOLDER / "worker.yaml")[0]["spec"]["template"]["spec"]
    env = {one["name"]: one["value"] for one in template["containers"][0]["env"]}
    secret = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_"
    assert (env[f"{secret}NAME"], env[f"{secret}KEY"]) == ("ringmo", "PREFECT_API_AUTH_STRING")
    assert "/deploy/kubernetes/secrets.env" in (ROOT / ".gitignore").read_text().splitlines()
    # The example names what docker compose's .env calls them, all of which are there.
    from ringmo import compose_env

    for line in (FOLDER / "secrets.example.env").read_text().splitlines():
        if not line.startswith("#"):
            assert f"\n{line.partition('=')[2]}=" in compose_env.TEMPLATE


def test_the_several_nodes_agree_on_their_number() -> None:
    service, job = documents(FOLDER / "pretrain" / "pretrain.yaml")
    spec = job["spec"]
    env = {
        one["name"]: one.get("value") for one in spec["template"]["spec"]["containers"][0]["env"]
    }
    assert spec["completions"] == spec["parallelism"] == int(env["PET_NNODES"])
    name = job["metadata"]["name"]
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert env["PET_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert env["PET_MASTER_PORT"] == str(service["spec"]["ports"][0]["port"])
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    args = spec["template"]["spec"]["containers"][0]["args"][0]
    assert "dvc repro --single-item pretrain" in args and "exec ringmo pretrain" in args
