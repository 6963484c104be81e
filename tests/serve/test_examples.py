"""The configurations under examples/serving: they parse, and the options and routes they name exist."""

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import typer
import yaml

from trimtab.cli import app as cli
from trimtab.serve import app, guard, server
from trimtab.serve.vllm import engine

FOLDER = Path(__file__).parents[2] / "examples/serving"


def _options() -> tuple[set[str], set[str]]:
    command = typer.main.get_command(cli).commands["serve"]  # type: ignore[attr-defined]
    names = {option for parameter in command.params for option in parameter.opts}
    return names, {parameter.envvar for parameter in command.params if getattr(parameter, "envvar", None)}


def test_kubernetes() -> None:
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod: Any = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options, variables = _options()
    assert {arg for arg in container["args"] if arg.startswith("--")} <= options
    assert {one["name"] for one in container["env"]} - {"HF_HUB_OFFLINE"} <= variables
    paths = {route.path for route in app.routes.routes}  # type: ignore[attr-defined]
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} <= paths
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert pod["terminationGracePeriodSeconds"] > int(container["args"][container["args"].index("--grace") + 1])


def test_nginx() -> None:
    text = (FOLDER / "nginx.conf").read_text()
    commands = [shlex.split(line[1:]) for line in text.splitlines() if "trimtab serve" in line]
    assert {word for command in commands for word in command if word.startswith("--")} <= _options()[0]
    ports = [command[command.index("--port") + 1] for command in commands]
    assert re.findall(r"server 127\.0\.0\.1:(\d+);", text) == ports
    assert text.count("{") == text.count("}")


def test_ray_serve() -> None:
    tree = ast.parse((FOLDER / "ray_serve.py").read_text())
    known = {name: vars(module) for module in (app, guard, server, engine) for name in [module.__name__]}
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in known]
    assert len(imported) == 4
    assert all(alias.name in known[node.module or ""] for node in imported for alias in node.names)
    assert {"model", "folder"} <= set(inspect.signature(server.Settings).parameters)
