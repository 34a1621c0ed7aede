"""Files around the package agree with it and with each other: versions, workflows, templates, the guide."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

import pathnet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")]


def commands_of(workflow: Path) -> list[str]:
    """Return the shell commands of a workflow, line by line."""
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    return [line for step in steps for line in step.get("run", "").splitlines()]


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    return set(phony.split())


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pathnet.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == PROJECT["project"]["authors"]


def test_the_changelog_ends_at_this_version() -> None:
    """Sections go from later to earlier ones; `Unreleased` is always there, for the next change."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(released), f"expected VERSION - DATE, got {headings[1:]}"
    assert released[0] is not None and released[0][1] == pathnet.__version__
    kinds = set(re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_commands_that_there_are(workflow: Path) -> None:
    commands = commands_of(workflow)
    assert commands
    for command in commands:
        program, *arguments = command.split()
        if program == "make":
            assert set(arguments) <= make_targets()
        if program.startswith("."):
            assert os.access(ROOT / program, os.X_OK)


def test_workflows_run_all_checks_and_build_all_wheels() -> None:
    commands = [command for workflow in WORKFLOWS for command in commands_of(workflow)]
    assert {".ci/run", "make docs"} <= set(commands)
    versions = {line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    tags = {f"cp{version.replace('.', '')}" for version in versions}
    assert {build.partition("-")[0] for build in PROJECT["tool"]["cibuildwheel"]["build"]} == tags
    packages = yaml.safe_load((ROOT / ".github" / "workflows" / "packages.yml").read_text())
    assert set(packages["jobs"]["wheels"]["strategy"]["matrix"]["python"]) == tags
    assert PROJECT["project"]["requires-python"] == f">={min(versions)}"


def test_wheels_are_built_with_the_oldest_torch() -> None:
    """The native library is compiled against the headers of the torch whose ABI it needs: later ones have more."""
    (target,) = re.findall(r"TORCH_TARGET 0x(\w\w)(\w\w)0+\)", (ROOT / "CMakeLists.txt").read_text())
    oldest = ".".join(str(int(part, 16)) for part in target)
    assert f"torch>={oldest}" in PROJECT["project"]["dependencies"]
    assert any(f"torch=={oldest}.0" in step for step in PROJECT["tool"]["cibuildwheel"]["before-build"])


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_has_fields_of_distinct_names(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    names = [field["id"] for field in content["body"]]
    assert content["name"] and content["description"] and len(set(names)) == len(names) > 0


def test_the_form_for_bugs_asks_for_what_can_be_had_without_the_extra() -> None:
    (program,) = re.findall(r'`python -c "(.*?)"`', " ".join(FORMS[0].read_text().split()))
    names = {node.id for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Name)}
    assert names == {"torch", "pathnet", "print"}
    exec(program, {})


def test_the_guide_names_targets_and_files_that_there_are() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"`?\bmake ([\w-]+)(?=[`\s])", guide)) - {"what"}
    assert targets <= make_targets(), targets - make_targets()
    files = {name for name in re.findall(r"`([\w/.-]+/[\w/.-]*|[\w-]+\.(?:md|toml|txt|cff))`", guide)}
    generated = ("build/", "dist/", ".venv")
    for file in files - {"isa/", "conv/", "walk/", "cpu/", "cuda/", "helpers/", "interop/", "results/"}:
        places = (ROOT / file, ROOT / "pathnet" / file)
        assert file.startswith(generated) or any(place.exists() for place in places), file
