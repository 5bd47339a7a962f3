"Tests never touch the network, a display, or the user's own data."

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

# One thread: a toy on two busy threads waits for the slower one, and sums of floats depend on their number.
THREADS = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ.update(THREADS, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MPLBACKEND="Agg")
threadpool_limits(1)  # of libraries that a plugin of pytest has imported before

ROOT = Path(__file__).resolve().parent.parent
READ_AT_RUN_TIME = ("nbs", "workflow", "data/experts", "data/reported", "data/samples")


@pytest.fixture
def tmp_home(tmp_path, monkeypatch):
    "A workbook of its own: a copy of what is committed and read at run time, no datasets, runs or results."
    home = tmp_path / "home"
    for name in READ_AT_RUN_TIME:
        if (ROOT / name).exists():
            hidden = shutil.ignore_patterns(".ipynb_checkpoints", ".snakemake")
            shutil.copytree(ROOT / name, home / name, ignore=hidden)
    shutil.copy(ROOT / "settings.ini", home)
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    return home


@pytest.fixture(scope="session")
def refused():
    "refused(f, ..., says=...): f must raise a PromptnbError of one line that has all of `says`."
    from promptnb.core import PromptnbError

    def refused(f, *args, says=(), **kwargs):
        with pytest.raises(PromptnbError) as e:
            f(*args, **kwargs)
        text = str(e.value)
        assert "\n" not in text and all(s in text for s in says), text

    return refused


@pytest.fixture
def no_snakemake(monkeypatch):
    "`run` without what it hands over to; returns the list of its commands."
    from promptnb import cli

    asked = []

    def note(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cli.subprocess, "run", note)
    return asked


# Tests of these files need nothing of one another: any worker takes them. The others keep to one worker a file.
SPREAD = ("test_notebooks.py", "test_project.py")


def pytest_collection_modifyitems(items):
    "Files that fork come first: JAX, once another test has started it, has threads that do not survive a fork."
    items.sort(key=lambda i: i.path.name != "test_faults.py")
    for item in items:
        if item.path.name not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
