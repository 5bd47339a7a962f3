"""JupyterLab in a real browser: runs the paper's notebook top to bottom.

Needs chromium and playwright (pip install promptnb[browser]); skipped without.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")

from browser import CHROME, NOTEBOOK, OPTIONS, OUTPUTS, ROOT, free_port, opened, run_all_cells, serving  # noqa: E402

pytestmark = pytest.mark.skipif(not CHROME, reason="no chromium on this machine")
PAGE = "nbs/papers/prompt_tuning_dt.ipynb"
KINDS = f"() => {OUTPUTS}.flatMap(o => Object.keys(o.data || {{}}))"
TABLES = f"() => {OUTPUTS}.filter(o => o.data && o.data['text/html']).length"
SCROLL = f"() => {{ {NOTEBOOK}.scrollToItem(4, 'start') }}"


@pytest.fixture(scope="module")
def lab():
    "JupyterLab by `make lab`, on a free port."
    port = free_port()
    arguments = f"LAB_ARGS={' '.join(OPTIONS)} --port={port}"
    with serving(["make", "lab", arguments], port) as address:
        yield address


def screenshot(page, path):
    "Save a picture of the page, scrolled to its fifth cell."
    page.evaluate(SCROLL)
    page.wait_for_timeout(1500)
    page.screenshot(path=path)


def test_paper_notebook_runs_in_the_browser(lab, tmp_path):
    "Run All on the paper's notebook: no error, a table and a figure on the page."
    cells = sum(c["cell_type"] == "code" for c in json.loads((ROOT / PAGE).read_text())["cells"])
    shot = Path(os.environ.get("LAB_SCREENSHOT", tmp_path / "lab.png"))
    with opened(lab, PAGE, 1500, 1300) as page:
        done, errors = run_all_cells(page, cells)
        screenshot(page, shot)
        assert errors == 0 and done == cells, (done, cells, errors)
        if any((ROOT / "data/results/prompt_tuning_dt").glob("laptop.*")):
            assert "image/png" in page.evaluate(KINDS)
        assert page.evaluate(TABLES) > 2
    assert shot.stat().st_size > 20_000
