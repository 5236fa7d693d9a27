"""Configs by name and by path."""

import sys
import types

import pytest
from oracles import refuses

import vaecf
from configs import blend
from vaecf import config as config_lib
from vaecf import config_files


def test_a_name_and_changes():
    changes = {"train.epochs": 7, "model": {"latent": 9}}
    config = vaecf.load_config("blend", changes)
    expected = config_lib.from_mapping(blend.get_config())
    changes = {"train.epochs": 7, "model.latent": 9}
    assert config == config_lib.replace(expected, changes)


def test_a_file_may_import_ours_and_its_neighbours(tmp_path, monkeypatch):
    """Whatever `configs` the user has imported, which stays imported."""
    theirs = types.ModuleType("configs")
    monkeypatch.setitem(sys.modules, "configs", theirs)
    before = {n: m for n, m in sys.modules.items() if n.startswith("configs")}
    (tmp_path / "size.py").write_text("LATENT = 11")
    (tmp_path / "mine.py").write_text(
        "from configs import default, size\n\n\ndef get_config():\n"
        "    config = default.get_config()\n"
        "    config.model.latent = size.LATENT\n    return config\n"
    )
    config = vaecf.load_config(tmp_path / "mine.py")
    assert config == config_lib.replace(
        config_lib.Config(), {"model.latent": 11}
    )
    after = {n: m for n, m in sys.modules.items() if n.startswith("configs")}
    assert after == before and sys.modules["configs"] is theirs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "mine.py: .*get_config"),
        ("def get_config(): return 3", "must return a ConfigDict"),
        ("\ndef get_config(): return 1 / 0", r"mine\.py, line 2: .*Zero"),
        ("def get_config(: pass", r"mine\.py, line 1: .*SyntaxError"),
        (
            "from configs import default\ndef get_config():\n"
            "    c = default.get_config()\n    c.sede = 1",
            r"line 4: .*did you mean .*seed",
        ),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with refuses(f"(?i){message}"):
        vaecf.load_config(tmp_path / "mine.py")


def test_mistakes_in_names():
    with refuses("did you mean ml20m"):
        vaecf.load_config("ml2m")
    with refuses("rec_vae.*did you mean mult_dae"):
        config_files.find("mult_da", folder="sweeps", setting="space")
    with refuses(r"config\.train\.epohcs.*did you mean train\.epochs"):
        vaecf.load_config("blend", {"train.epohcs": 3})
