"""Workflows, templates and the files for contributors refer to things that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hetero_fl import __version__
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job.get("steps", [])]


def test_workflows_exist() -> None:
    names = [path.stem for path in WORKFLOWS]

    assert names == ["release", "site", "slow_tests", "tests"]


@each_case("workflow", WORKFLOWS)
def test_commands_of_a_workflow_refer_to_existing_files(workflow: Path) -> None:
    commands = " ".join(step.get("run", "") for step in steps(workflow))

    for name in re.findall(r"\b(?:scripts|configs|tests|\.ci)/[\w/.]+", commands):
        assert (ROOT / name).exists(), name
    for extras in re.findall(r"'\.\[([\w,]+)\]'", commands):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra


def test_classifiers_and_workflow_name_the_same_versions_of_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]

    assert tested == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)


def test_only_publishing_jobs_have_a_permission_beyond_reading() -> None:
    publishing = {
        "release.yml": {"publish": {"id-token": "write"}},
        "site.yml": {"publish": {"contents": "write"}},
    }
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        granted = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
        assert {n: p for n, p in granted.items() if p} == publishing.get(path.name, {})


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert f'\nversion = "{__version__}"\n' in PYPROJECT
    assert citation["version"] == __version__
    assert f"\n## [{__version__}]" in changelog


def test_changelog_has_the_headings_of_the_deprecation_policy() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    policy = (ROOT / "docs" / "reference" / "versions.md").read_text(encoding="utf-8")

    headings = re.findall(r"under\s+\*(\w+)\*", policy)

    assert headings == ["Deprecated", "Removed"]
    assert all(f"\n### {heading}\n" in changelog for heading in headings)


def test_issue_templates_and_hooks_are_valid_yaml() -> None:
    for path in [
        *(ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"),
        ROOT / ".pre-commit-config.yaml",
    ]:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


def test_release_runs_the_tests_first() -> None:
    release, _, *called = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in WORKFLOWS)

    # YAML 1.1 reads the key `on` as true.
    assert all("workflow_call" in workflow[True] for workflow in called)
    used = {name: job["uses"] for name, job in release["jobs"].items() if "uses" in job}
    assert sorted(used.values()) == [
        "./.github/workflows/slow_tests.yml",
        "./.github/workflows/tests.yml",
    ]
    assert sorted(release["jobs"]["build"]["needs"]) == sorted(used)
