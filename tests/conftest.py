"Tests never touch the network, a display, or the user's own data."

import os
import shutil
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a toy on two busy threads waits for the slower one
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tmp_home(tmp_path, monkeypatch):
    "A workbook of its own: a copy of what is committed and read at run time, no datasets, runs or results."
    home = tmp_path / "home"
    for name in ("nbs", "workflow", "data/experts", "data/reported"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".snakemake"))
    shutil.copy(ROOT / "settings.ini", home)
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    return home


def pytest_collection_modifyitems(items):
    "Tests that fork come first: JAX, once another test has started it, has threads that do not survive a fork."
    items.sort(key=lambda i: i.path.name != "test_faults.py")
