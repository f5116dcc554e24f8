"""Dockerfile and compose.yaml, checked without Docker: files and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "FROM",
    "RUN",
    "STOPSIGNAL",
    "USER",
    "WORKDIR",
}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace(
        "\\\n", " "
    )
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"])


def test_image_contains_the_package() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= INSTRUCTIONS and names.count("FROM") == 2
    copied = [
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and {f"!{source}" for source in copied} == {
        line for line in ignored if line.startswith("!")
    }
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    needed += [
        pattern.rstrip("*")
        for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    assert all(any(fnmatch(name, f"{source}*") for source in copied) for name in needed)
    assert (
        "flower" in project["project"]["optional-dependencies"]
        and '".[flower,tables]"' in (ROOT / "Dockerfile").read_text()
    )


def test_image_runs_the_command_as_non_root() -> None:
    last = dict(instructions())
    assert last["ENTRYPOINT"] == '["hetero-fl"]' and last["USER"] not in ("root", "0")


@each_case("name", ["north", "south", "east"])
def test_containers_of_sites_use_their_folders(name: str) -> None:
    service = services()[name]

    assert service["entrypoint"] == ["flower-supernode"]
    assert service["volumes"] == [f"./net/{name}:{service['working_dir']}"]
    assert f'site="{service["working_dir"]}/site.yaml"' in service["command"][-1]
    assert service["image"] == services()["superlink"]["image"]
    assert service["user"].startswith("${OWNER:?")


@each_case(
    ("program", "arguments"),
    [
        ("flower-superlink", services()["superlink"]["command"]),
        ("flower-supernode", services()["north"]["command"]),
    ],
)
def test_containers_use_options_of_flower(program: str, arguments: list[str]) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    command = [str(Path(sys.executable).with_name(program)), "--help"]

    options = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert all(argument.partition("=")[0] in options for argument in arguments)


def test_only_the_proxy_is_reachable() -> None:
    assert "--host=127.0.0.1" in services()["superlink"]["command"]
    assert services()["superlink"]["ports"] == ["9092:9092"]
    assert services()["proxy"]["network_mode"] == "service:superlink"
    config = (ROOT / "examples" / "deployment" / "nginx.conf").read_text()
    assert re.findall(r"location (\S+)", config) == ["/v1/fleet/", "/"]
