"Every library notebook runs from top to bottom: its assertions are the library's unit tests."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p.name
    for p in (ROOT / "nbs").glob("*.ipynb")
    if not p.name.startswith("_") and p.name not in ("index.ipynb", "benchmarks.ipynb")
)


def run(path, cwd):
    "nbdev's tester on one notebook, in a process of its own."
    code = f"from nbdev.test import nbdev_test; nbdev_test(path={str(path)!r})"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tmp_home):
    for part in ("seconds", "benchmarks"):  # pages forecast what the papers take
        shutil.copytree(ROOT / "data" / part, tmp_home / "data" / part)
    p = run(ROOT / "nbs" / name, ROOT)
    assert p.returncode == 0 and "Success." in p.stdout, p.stdout[-2000:] + p.stderr[-6000:]


def test_a_failing_notebook_fails(tmp_home):
    bad = tmp_home / "nbs" / "99_bad.ipynb"
    cell = dict(cell_type="code", id="a", metadata={}, outputs=[], execution_count=None, source=["assert 1 == 2"])
    bad.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    p = run(bad, tmp_home)
    assert p.returncode == 1 and "99_bad.ipynb" in p.stderr, p.stdout + p.stderr
