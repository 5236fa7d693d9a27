"""Who may import whom, and what an import may load."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import vaecf

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Package or module -> the parts of vaecf that it may know, besides itself.
LAYERS = {
    "vaecf.errors": set(),
    "vaecf.options": {"errors"},
    "vaecf.cli": {"errors", "compilation", "distributed"},
    "vaecf.distributed": {"errors"},
    "vaecf.compilation": set(),
    "vaecf.data": {"errors"},
    "vaecf.models": {"errors"},
    "vaecf.reporting": {"errors"},
    "vaecf.evaluation": {"errors", "distributed", "data", "models"},
    "vaecf.training": {
        *("errors", "options", "data", "models", "evaluation", "reporting"),
        "distributed",
    },
    "vaecf.serving": {
        *("errors", "options", "data", "models", "evaluation", "training"),
        "distributed",
    },
    "vaecf.held_out": {
        *("errors", "data", "models", "evaluation", "training", "serving"),
        "distributed",
    },
    "vaecf.baselines": {
        *("errors", "data", "evaluation", "serving", "held_out"),
        "distributed",
    },
    "vaecf.compare": {"errors", "options", "evaluation", "training"},
    "vaecf.run": {
        *("distributed", "baselines"),
        *("errors", "options", "data", "models", "evaluation", "training"),
        *("reporting", "serving", "held_out"),
    },
    "vaecf.tuning": {
        *("errors", "options", "data", "models", "evaluation", "training"),
        *("reporting", "compilation", "serving"),
    },
}
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
HEAVY = ACCELERATED | {"pandas", "polars", "matplotlib", "scipy", "optuna"}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(path: pathlib.Path) -> str:
    """'vaecf.data' of vaecf/data/ids.py, 'vaecf.cli' of vaecf/cli.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[:2])


@pytest.mark.parametrize(
    "path", modules("vaecf"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_module_knows_only_what_its_layer_may(path: pathlib.Path) -> None:
    part = part_of(path)
    if part == "vaecf.__init__":
        return  # lazy: the test of what is loaded is below
    known = {f"vaecf.{name}" for name in LAYERS[part]} | {part}
    for name in imports(path):
        top = name.split(".")[0]
        if top == "vaecf":
            where = ".".join(name.split(".")[:2])
            assert where in known or name == "vaecf", f"{path.name}: {name}"
        assert top not in ("experiments", "configs", "tests"), name
        if part in ("vaecf.data", "vaecf.reporting", "vaecf.options"):
            assert top not in ACCELERATED, f"{path.name}: {name}"


def test_every_layer_has_modules() -> None:
    assert {part_of(path) for path in modules("vaecf")} == {
        *LAYERS,
        "vaecf.__init__",
    }


def test_configs_import_only_ml_collections_and_configs() -> None:
    for path in modules("configs"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert tops <= {"ml_collections", "configs"}, path.name


def test_entry_points_are_short() -> None:
    """Parse, call one function of vaecf, exit."""
    for path in (ROOT / "experiments").glob("*.py"):
        names = imports(path)
        assert any(name.split(".")[0] == "vaecf" for name in names), path.name
        assert not {n.split(".")[0] for n in names} & HEAVY, path.name
        if path.name != "main_flags.py":
            assert len(path.read_text().splitlines()) <= 65, path.name


LOADS = """
import importlib, json, sys
def heavy():
    return sorted({m.split(".")[0] for m in sys.modules} & set(json.loads(sys.argv[1])))
loaded = {}
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded[name] = heavy()
print(json.dumps(loaded))
"""


def loaded_by(*names: str) -> dict[str, list[str]]:
    """Heavy packages loaded after each of the imports, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps(sorted(HEAVY)), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_importing_vaecf_loads_nothing_heavy() -> None:
    light = ("vaecf", "vaecf.errors", "vaecf.options", "vaecf.cli")
    after = loaded_by(*light, "vaecf.reporting", "jax")
    for name in (*light, "vaecf.reporting"):
        assert after[name] == [], name
    assert "jax" in after["jax"]


def test_importing_the_data_package_loads_no_jax() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules("vaecf/data")
        if path.stem != "__init__"
    ]
    after = loaded_by(*names)
    assert len(after) > 10
    for name, loaded in after.items():
        assert not set(loaded) & ACCELERATED, name


def test_public_names_are_found_when_used() -> None:
    for name in vaecf.__all__:
        assert getattr(vaecf, name).__name__ == name
        assert name in dir(vaecf)
    with pytest.raises(AttributeError, match="no attribute 'Recomender'"):
        _ = vaecf.Recomender
