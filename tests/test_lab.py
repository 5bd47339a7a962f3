"""JupyterLab in a real browser: runs the paper's notebook top to bottom.

Needs chromium and playwright (pip install promptnb[browser]); skipped without.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROME = shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not CHROME, reason="no chromium on this machine")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NOTEBOOK = "nbs/papers/prompt_tuning_dt.ipynb"

# What the page is asked, in its own language.
CODE_CELLS = "window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code')"
OUTPUTS = f"{CODE_CELLS}.flatMap(w => w.model.outputs.toJSON())"
DONE = f"{CODE_CELLS}.filter(w => w.model.executionCount && w.model.executionState !== 'running').length"
ERRORS = f"{OUTPUTS}.filter(o => o.output_type === 'error').length"
PROGRESS = f"() => [{DONE}, {ERRORS}]"
KINDS = f"() => {OUTPUTS}.flatMap(o => Object.keys(o.data || {{}}))"
TABLES = f"() => {OUTPUTS}.filter(o => o.data && o.data['text/html']).length"
SCROLL = "() => { window.jupyterapp.shell.currentWidget.content.scrollToItem(4, 'start') }"


def free_port():
    "A TCP port of this machine that nothing listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab():
    "JupyterLab by `make lab`, on a free port."
    port = free_port()
    options = (
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
    )
    p = subprocess.Popen(
        ["make", "lab", f"LAB_ARGS={' '.join(options)}"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(240):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    os.killpg(p.pid, signal.SIGTERM)
    p.wait()


def open_notebook(browser, lab):
    "The page of the paper's notebook, ready to run."
    page = browser.new_page(viewport=dict(width=1500, height=1300))
    page.goto(f"{lab}/lab/tree/{NOTEBOOK}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
    page.wait_for_timeout(3000)
    return page


def run_all_cells(page, cells):
    "Choose Run All in the menu and wait for all `cells`, or the first error; returns how many ran and how many failed."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…").click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    page.wait_for_timeout(3000)
    for _ in range(120):
        done, errors = page.evaluate(PROGRESS)
        if done >= cells or errors:
            break
        page.wait_for_timeout(1000)
    return done, errors


def screenshot(page, path):
    "Save a picture of the page, scrolled to its fifth cell."
    page.evaluate(SCROLL)
    page.wait_for_timeout(1500)
    page.screenshot(path=path)


def test_paper_notebook_runs_in_the_browser(lab, tmp_path):
    "Run All on the paper's notebook: no error, a table and a figure on the page."
    cells = sum(c["cell_type"] == "code" for c in json.loads((ROOT / NOTEBOOK).read_text())["cells"])
    shot = Path(os.environ.get("LAB_SCREENSHOT", tmp_path / "lab.png"))
    with sync_api.sync_playwright() as pw:
        page = open_notebook(pw.chromium.launch(executable_path=CHROME, args=FLAGS), lab)
        done, errors = run_all_cells(page, cells)
        screenshot(page, shot)
        assert errors == 0 and done == cells, (done, cells, errors)
        if any((ROOT / "data/results/prompt_tuning_dt").glob("laptop.*")):
            assert "image/png" in page.evaluate(KINDS)
        assert page.evaluate(TABLES) > 2
    assert shot.stat().st_size > 20_000
