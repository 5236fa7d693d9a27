"""What an installation, the Makefile and CI promise."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vaecf

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(texts: list[str]) -> dict[str, Requirement]:
    return {Requirement(text).name: Requirement(text) for text in texts}


def test_types_are_shipped() -> None:
    assert (ROOT / "vaecf" / "py.typed").is_file()


def test_python_and_jax() -> None:
    python = SpecifierSet(PROJECT["requires-python"])
    assert "3.11.0" in python and "3.13.0" in python and "3.10.9" not in python
    jax = requirements(PROJECT["dependencies"])["jax"].specifier
    assert all(version in jax for version in ("0.10.0", "0.11.1", "0.12.0.1"))
    assert "0.9.2" not in jax and "0.13.0" not in jax


def test_cuda_only_on_request() -> None:
    for name, requirement in requirements(PROJECT["dependencies"]).items():
        assert not re.search("cuda|nvidia|tensorflow|torch", name)
        assert not requirement.extras
    for extra in ("cuda12", "cuda13"):
        (jax,) = requirements(EXTRAS[extra]).values()
        assert (jax.name, jax.extras) == ("jax", {extra})
        base = requirements(PROJECT["dependencies"])["jax"]
        assert jax.specifier == base.specifier


def test_every_import_of_the_package_is_a_dependency() -> None:
    """Imports of vaecf/, as distributions, are all asked for."""
    import ast
    import sys

    distributions = {
        "absl": "absl-py",
        "ml_collections": "ml-collections",
        "orbax": "orbax-checkpoint",
    }
    found = set()
    for path in (ROOT / "vaecf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    found -= {*sys.stdlib_module_names, "vaecf"}
    wanted = {distributions.get(name, name) for name in found}
    # Sweeps have an extra of their own.
    assert "optuna" in requirements(EXTRAS["tune"])
    assert wanted - {"optuna"} <= set(requirements(PROJECT["dependencies"]))


def test_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", vaecf.__version__)
    assert PROJECT["dynamic"] == ["version"]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z-]+):", makefile, re.M))


@pytest.mark.parametrize("document", ["README.md", ".ci/run", "pyproject.toml"])
def test_targets_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"^\s*make ([a-z-]+)|`make ([a-z-]+)`", text, re.M)
    named = {a or b for a, b in named}
    assert named <= targets()
    if document == "README.md":
        assert {"demo", "test"} <= named
    if document == ".ci/run":
        assert named == {"test"}


def test_make_prints_what_it_would_do() -> None:
    for target in ("test", "demo"):
        done = subprocess.run(
            ["make", "--dry-run", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        wanted = {"test": "-m pytest", "demo": "experiments/demo.py"}[target]
        assert wanted in done.stdout


def test_files_that_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(
        r"`((?:configs|experiments|docs|tests|vaecf)/[\w./]*)`", text
    )
    named += re.findall(r"\]\((docs/[\w./]+)\)", text)
    named += re.findall(r"(experiments/\w+\.py)", text)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_extras_that_readme_names_exist() -> None:
    named = re.findall(r"'\.\[(\w+)\]'", (ROOT / "README.md").read_text())
    assert named and set(named) <= set(EXTRAS)
