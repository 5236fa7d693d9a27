"""Who may import whom, and what an import may load."""

import ast
import json
import re
import sys
import tomllib

import pytest
from oracles import ROOT, process
from packaging.requirements import Requirement

import vaecf

# The floors of the house, from the ground up. A part may import the parts of
# lower floors, and those of its own floor that `SAME_FLOOR` names.
FLOORS = (
    {
        *("errors", "files", "interrupts", "setting", "baseline_config"),
        *("config", "config_files", "workdir"),
    },
    {"data", "parallel", "reporting"},
    {"models"},
    {"evaluation"},
    {"training"},
    {"serving"},
    {"experiment", "tuning", "cli", "cli_flags"},
    {"api"},
    {"commands"},
    {"__main__"},
)
SAME_FLOOR = {
    ("setting", "errors"),
    ("config", "errors"),
    ("baseline_config", "setting"),
    ("config", "setting"),
    ("config", "baseline_config"),
    ("files", "errors"),
    ("workdir", "errors"),
    ("workdir", "files"),
    ("workdir", "config"),
    ("config_files", "errors"),
    ("config_files", "files"),
    ("config_files", "config"),
    ("data", "reporting"),
    ("tuning", "experiment"),
    ("cli_flags", "cli"),
}
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
HEAVY = ACCELERATED | {"pandas", "polars", "matplotlib", "scipy", "optuna"}
HEAVY |= {"jinja2", "tensorboardX", "tqdm"}


# Distributions of packages with another name. MarkupSafe comes with Jinja2.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "markupsafe": "jinja2",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
}


def imports(path):
    """Dotted names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(path):
    """'data' for vaecf/data/id_table.py, 'cli' for vaecf/cli.py."""
    return path.relative_to(ROOT).with_suffix("").parts[1]


@pytest.mark.parametrize(
    "path", modules("vaecf"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_module_imports_only_from_lower_floors(path):
    part = part_of(path)
    if part == "__init__":
        return  # imports lazily: see the test of what an import loads
    # Every part has a floor.
    [floor] = [n for n, parts in enumerate(FLOORS) if part in parts]
    allowed = {part}.union(*FLOORS[:floor])
    allowed |= {below for above, below in SAME_FLOOR if above == part}
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "vaecf" and rest not in ("", "__version__"):
            assert rest.split(".")[0] in allowed, f"{path.name}: {name}"
        assert top not in ("experiments", "configs", "tests"), name
        if part in ("data", "reporting", "files", "config", "workdir"):
            assert top not in ACCELERATED, f"{path.name}: {name}"


def test_every_import_of_the_package_is_a_dependency():
    found = {
        name.split(".")[0] for p in modules("vaecf") for name in imports(p)
    }
    extras = {"optuna": "tune", "mlflow": "mlflow", "wandb": "wandb"}
    found -= {*sys.stdlib_module_names, "vaecf", *extras}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {Requirement(text).name for text in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in found} <= required
    for package, extra in extras.items():
        (needed,) = project["optional-dependencies"][extra]
        assert Requirement(needed).name.startswith(package)


def test_only_the_command_line_names_flags():
    named = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in modules("vaecf")
        if part_of(path) not in ("cli", "cli_flags", "commands")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"[\"' (]--[a-z][a-z_]+", line)
    ]
    assert named == []


def test_configs_import_only_ml_collections_and_the_settings():
    for path in modules("configs"):
        names = imports(path) - {"vaecf.config"}
        tops = {name.split(".")[0] for name in names}
        assert tops <= {"ml_collections", "configs", "dataclasses"}, path.name


def test_entry_points_are_short():
    """Parse, call one function of vaecf, exit."""
    commands = {p.stem for p in modules("vaecf/commands")} - {"__init__"}
    for path in (ROOT / "experiments").glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= (12 if path.stem in commands else 80), path.name
        if path.stem in commands:
            assert f'    start("{path.stem}")' in lines
    for path in modules("vaecf/commands"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & HEAVY, path.name
        if path.name != "main_flags.py":
            assert len(path.read_text().splitlines()) <= 120, path.name


# Prints the heavy packages that are loaded after each of some imports.
LOADS = """
import importlib, json, sys
heavy, loaded = set(sys.argv[1].split()), {}
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded[name] = sorted({m.split(".")[0] for m in sys.modules} & heavy)
print(json.dumps(loaded))
"""


def test_what_an_import_loads():
    reporting = ("plots", "progress", "report", "writers")
    light = ("vaecf", "vaecf.config", "vaecf.cli", "vaecf.commands")
    # What --help imports.
    names = ("main_flags", "main", "recommend", "sweep", "compare")
    light += tuple(f"vaecf.commands.{name}" for name in names)
    light += tuple(f"vaecf.reporting.{name}" for name in reporting)
    serving = "vaecf.serving.batch_scoring", "vaecf.serving.latency"
    exported = "vaecf.serving.exported"
    names = (*light, exported, *serving, "vaecf.training.step")
    words = (sys.executable, "-c", LOADS, " ".join(HEAVY))
    done = process(*words, *names, cwd=ROOT)
    after = json.loads(done.stdout)
    assert {name: after[name] for name in light} == {name: [] for name in light}
    assert not {"flax", "optax", "orbax"} & {*after[exported]}
    for name in serving:  # no optimiser, and so no training loop
        assert "jax" in after[name] and "optax" not in after[name]
    assert "optax" in after["vaecf.training.step"]


def test_public_names_are_found_when_used():
    for name in vaecf.__all__:
        assert getattr(vaecf, name).__name__ == name
        assert name in dir(vaecf)
    assert not {"Any", "annotations", "importlib"} & {*dir(vaecf)}
    with pytest.raises(AttributeError, match="no attribute 'Recomender'"):
        _ = vaecf.Recomender
