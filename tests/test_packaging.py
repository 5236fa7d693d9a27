"""Promises of pyproject.toml, the Makefile, CI and the README."""

import re
import shutil
import subprocess
import tomllib

from oracles import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(texts):
    return {Requirement(text).name: Requirement(text) for text in texts}


REQUIRED = requirements(PROJECT["dependencies"])


def test_python_and_jax():
    assert (ROOT / "vaecf" / "py.typed").is_file()
    python = SpecifierSet(PROJECT["requires-python"])
    assert "3.11.0" in python and "3.13.0" in python and "3.10.9" not in python
    jax = REQUIRED["jax"].specifier
    assert all(version in jax for version in ("0.10.0", "0.11.1", "0.12.0.1"))
    assert "0.9.2" not in jax and "0.13.0" not in jax


def test_cuda_only_on_request():
    for name, requirement in REQUIRED.items():
        assert not re.search("cuda|nvidia|tensorflow|torch", name)
        assert not requirement.extras
    for extra in ("cuda12", "cuda13"):
        (jax,) = requirements(EXTRAS[extra]).values()
        assert (jax.name, jax.extras) == ("jax", {extra})
        assert jax.specifier == REQUIRED["jax"].specifier


def test_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = {}
    for document in ("README.md", ".ci/run", "pyproject.toml"):
        text = (ROOT / document).read_text()
        named[document] = re.findall(r"(?:^\s*|`)make ([a-z-]+)", text, re.M)
        assert set(named[document]) <= targets
    assert named[".ci/run"] == ["test"] and "demo" in named["README.md"]


def test_files_and_extras_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    folders = "configs|experiments|docs|tests|vaecf"
    named = re.findall(rf"`((?:{folders})/[\w./]*)`", text)
    named += re.findall(r"\]\((docs/[\w./]+)\)", text)
    named += re.findall(r"(experiments/\w+\.py)", text)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name
    extras = re.findall(r"'\.\[(\w+)\]'", text)
    assert set(extras) <= set(EXTRAS)


def test_the_image():
    """CPU and CUDA targets, a pinned base, and a user without rights."""
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM (\S+) AS (\w+)$", text, re.M))
    [base] = set(stages) - {"base"}
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-[\w-]+", base)
    python = base.partition(":")[2].partition("-")[0]
    assert python in SpecifierSet(PROJECT["requires-python"])
    targets = re.findall(r"^FROM base AS (\w+)$", text, re.M)
    assert targets == ["cpu", "cuda"]  # the last one is built by default
    users = re.findall(r"^USER (\S+)$", text, re.M)
    assert users and users[-1] == "1000"
    for name in re.findall(r"'\.\[(\w+)\]'", text):
        assert name in EXTRAS
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "data", "runs"} <= {*ignored}
    # `make test` needs these.
    assert not {"tests", "Makefile", "docs", "configs", ".ci"} & {*ignored}
    if hadolint := shutil.which("hadolint"):
        done = subprocess.run([hadolint, ROOT / "Dockerfile"], text=True)
        assert done.returncode == 0


def test_every_promise_has_its_test():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | test |"]
    assert len(promises) > 40
    for promise in promises:
        named = re.findall(r"`([\w/]+\.py)`", promise)
        assert named or "`make fuzz`" in promise, promise
        for path in named:
            assert (ROOT / "tests" / path).is_file(), promise
