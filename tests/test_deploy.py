"""The files below deploy/ and .github/: valid by their own schemas, and true to the server that they start."""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import kubernetes_validate
import pytest
import yaml
from fastapi.testclient import TestClient
from packaging.requirements import Requirement

import slideredit_rt
from slideredit_rt import cli
from slideredit_rt.serving.app import create_app
from slideredit_rt.serving.settings import ServeSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker/Dockerfile"
KUBERNETES = "1.37"
USER = 10001  # the image's
SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    "deploy/docker/compose.yaml": "compose-spec",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/feature.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/workflows/ci.yml": "github-workflows",
    ".github/workflows/publish.yml": "github-workflows",
}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


def serve_command(arguments: list[str]) -> argparse.Namespace:
    """Parse as the command does; an unknown option ends the test."""
    return cli._parser().parse_args(["serve", *arguments])


@pytest.fixture(scope="module")
def compose() -> Any:
    return documents("deploy/docker/compose.yaml")[0]


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """Kubernetes' own objects, by kind."""
    return {each["kind"]: each for each in documents("deploy/kubernetes/deployment.yaml")}


@pytest.fixture(scope="module")
def ray_service() -> Any:
    return documents("deploy/kubernetes/rayservice.yaml")[0]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items(), ids=list(SCHEMAS))
def test_files_for_other_tools_follow_their_schemas(name: str, schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    # GitHub's extension of YAML files does not tell the format of CITATION.cff.
    done = subprocess.run([*command, "--default-filetype", "yaml", ROOT / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    tool = shutil.which("hadolint", path=Path(sys.executable).parent)
    if tool is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([tool, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_the_image_serves_as_a_user_that_is_not_root(instructions: list[tuple[str, str]]) -> None:
    last = dict(instructions)
    assert last["USER"] == f"{USER}:{USER}"
    assert last["EXPOSE"] == str(ServeSettings().port)
    program, command, *options = ast.literal_eval(last["ENTRYPOINT"])
    assert (program, command) == ("slideredit-rt", "serve")
    assert serve_command(options).host == "0.0.0.0"
    bases = [rest for word, rest in instructions if word == "FROM"]
    assert bases == ["${BASE} AS build", "${BASE}"]


def test_images_are_built_with_extras_of_the_package() -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    files = (DOCKERFILE, DEPLOY / "docker/compose.yaml", DEPLOY / "kubernetes/rayservice.yaml")
    lists = re.findall(r"EXTRAS[=:] ?([\w,-]+)", "".join(file.read_text() for file in files))
    asked = set(",".join(lists).split(","))
    assert asked == {"serve", "ray", "tensorrt"}
    for extra in asked:
        assert re.search(rf"^{extra} = \[", metadata, re.MULTILINE)


def test_compose_serves_with_a_key_and_checks_health(compose: Any, instructions: list[tuple[str, str]]) -> None:
    builds = {word for _, rest in instructions for word in re.findall(r"^(\w+)=", rest)}
    for service in compose["services"].values():
        assert serve_command(service["command"]).api_key_file == Path("/run/secrets/api_key")
        assert service["secrets"] == ["api_key"]
        assert set(service["build"].get("args", {})) <= builds
        assert (DEPLOY / "docker" / service["build"]["context"]).resolve() == ROOT
        assert ROOT / service["build"]["dockerfile"] == DOCKERFILE
        _, health = dict(instructions)["HEALTHCHECK"].split("CMD")
        assert service["healthcheck"]["test"][1:] == ast.literal_eval(health.strip())
        assert int(service["stop_grace_period"].removesuffix("s")) > ServeSettings().drain_seconds
    assert compose["services"]["gpu"]["profiles"] == ["gpu"]


def test_manifests_follow_kubernetes_schemas(manifests: dict[str, Any], ray_service: Any) -> None:
    assert set(manifests) == {"Deployment", "Service"}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    # KubeRay's own fields have no schema here; the pods in them do.
    for spec in pod_specs(ray_service):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_misspelt_field_is_found(manifests: dict[str, Any]) -> None:
    spec = {**manifests["Service"]["spec"], "port": 80}
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate({**manifests["Service"], "spec": spec}, KUBERNETES, strict=True)


def pod_specs(manifest: Any) -> Iterator[Any]:
    """The pods that a Deployment or a RayService starts."""
    if manifest["kind"] == "Deployment":
        yield manifest["spec"]["template"]["spec"]
        return
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_pods_run_without_privileges(manifests: dict[str, Any], ray_service: Any) -> None:
    specs = [*pod_specs(manifests["Deployment"]), *pod_specs(ray_service)]
    assert len(specs) == 3
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        assert {spec["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (container,) = specs[0]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"/tmp", "/home/slideredit"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_deployment_starts_a_server_that_reads_its_key(manifests: dict[str, Any]) -> None:
    (spec,) = pod_specs(manifests["Deployment"])
    (container,) = spec["containers"]
    args = serve_command(container["args"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (secret,) = [volume for volume in spec["volumes"] if volume["name"] == mounts[str(args.api_key_file.parent)]]
    made = f"create secret generic {secret['secret']['secretName']} --from-literal={args.api_key_file.name}="
    assert made in (DEPLOY / "kubernetes/deployment.yaml").read_text()
    hook = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > args.drain_seconds + hook
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"].items() <= labels.items()
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert container["ports"][0]["containerPort"] == args.port


def test_probes_are_answered_by_address_and_without_a_key(
    manifests: dict[str, Any], compose: Any, instructions: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (spec,) = pod_specs(manifests["Deployment"])
    (container,) = spec["containers"]
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} == {container["ports"][0]["name"]}
    urls = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", f"{compose} {instructions}")
    assert set(urls) == {"/health"}
    asked = {*urls, *(probe["path"] for probe in probes)}
    assert asked == {"/health", "/v2/health/ready", "/v2/health/live"}
    monkeypatch.setattr("slideredit_rt.serving.app.Api", MagicMock(return_value=MagicMock(max_images=1)))
    for key in (None, "secret"):
        app = create_app(MagicMock(closed=False), model="shapes-st", api_key=key)
        client = TestClient(app, base_url="http://10.1.2.3:8000")
        assert {path: client.get(path).status_code for path in asked} == dict.fromkeys(asked, 200)


def test_ray_starts_the_servers_application_with_its_options(ray_service: Any) -> None:
    (config,) = documents("deploy/ray/serve.yaml")
    assert yaml.safe_load(ray_service["spec"]["serveConfigV2"]) == config
    (app,) = config["applications"]
    module, _, name = app["import_path"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    settings = ServeSettings.from_arguments(app["args"])
    assert (settings.min_replicas, settings.most_replicas) == (1, 4)
    paths = [str(settings.engine), str(settings.api_key_file)]
    # One constant, read without importing Ray.
    (variables,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CLUSTER_ENVIRONMENT"
    ]
    for spec in pod_specs(ray_service):
        (container,) = spec["containers"]
        assert {each["name"]: each["value"] for each in container["env"]} == variables
        for path in paths:
            assert any(path.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"])


def test_ray_has_the_version_that_is_tested(ray_service: Any) -> None:
    assert f"ray=={ray_service['spec']['rayClusterConfig']['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.slow
def test_ray_takes_its_configuration_file() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs pip install 'slideredit-rt[ray]'")
    (config,) = documents("deploy/ray/serve.yaml")
    parsed = schema.ServeDeploySchema.parse_obj(config)
    assert [app.name for app in parsed.applications] == ["slideredit"]


def test_workflows_run_what_the_repository_runs_itself() -> None:
    ci, publish = (documents(f".github/workflows/{name}.yml")[0] for name in ("ci", "publish"))
    commands = [step.get("run", "") for job in ci["jobs"].values() for step in job["steps"]]
    assert any(".ci/run" in command for command in commands)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for command in commands for target in re.findall(r"make ([\w-]+)", command)} <= targets
    # YAML reads the key `on` as true.
    assert publish[True] == {"push": {"tags": ["v*"]}}
    assert publish["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_the_version_is_written_down_once() -> None:
    files = [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "Makefile")]
    files += [file for folder in (DEPLOY, ROOT / ".github") for file in folder.rglob("*") if file.is_file()]
    version = re.compile(rf"(?<![\d.]){re.escape(slideredit_rt.__version__)}(?![\d.])")
    assert [str(file.relative_to(ROOT)) for file in files if version.search(file.read_text())] == []


def test_constraints_pin_one_version_of_each_package() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [Requirement(line).name.lower().replace("_", "-") for line in lines]
    assert sorted(set(pinned)) == sorted(pinned)
