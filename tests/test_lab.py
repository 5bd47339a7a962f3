"JupyterLab in a real browser: runs the paper's notebook top to bottom. Needs chromium and playwright (pip install promptnb[browser]); skipped without."

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


@pytest.fixture(scope="module")
def lab():
    "JupyterLab by `make lab`, on a free port."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    p = subprocess.Popen(
        [
            "make",
            "lab",
            f"LAB_ARGS=--no-browser --allow-root --port={port} --IdentityProvider.token= --LabApp.expose_app_in_browser=True",
        ],
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


def test_paper_notebook_runs_in_the_browser(lab, tmp_path):
    "Run All on nbs/papers/prompt_tuning_dt.ipynb: no error, a table and a figure on the page."
    with sync_api.sync_playwright() as pw:
        page = pw.chromium.launch(executable_path=CHROME, args=FLAGS).new_page(viewport=dict(width=1500, height=1300))
        page.goto(f"{lab}/lab/tree/nbs/papers/prompt_tuning_dt.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        page.wait_for_timeout(3000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Restart Kernel and Run All Cells…").click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()
        cells = len(
            [
                c
                for c in __import__("json").loads((ROOT / "nbs/papers/prompt_tuning_dt.ipynb").read_text())["cells"]
                if c["cell_type"] == "code"
            ]
        )
        page.wait_for_timeout(3000)
        run = "() => { const n = window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code'); return [n.filter(w => w.model.executionCount && w.model.executionState !== 'running').length, n.flatMap(w => w.model.outputs.toJSON()).filter(o => o.output_type === 'error').length] }"
        for _ in range(120):
            done, errors = page.evaluate(run)
            if done >= cells or errors:
                break
            page.wait_for_timeout(1000)
        page.evaluate("() => { const n = window.jupyterapp.shell.currentWidget.content; n.scrollToItem(4, 'start') }")
        page.wait_for_timeout(1500)
        shot = Path(os.environ.get("LAB_SCREENSHOT", tmp_path / "lab.png"))
        page.screenshot(path=shot)
        assert errors == 0 and done == cells, (done, cells, errors)
        kinds = page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code').flatMap(w => w.model.outputs.toJSON()).flatMap(o => Object.keys(o.data || {}))"
        )
        if any((ROOT / "data/results/prompt_tuning_dt").glob("laptop.*")):
            assert "image/png" in kinds
        assert (
            page.evaluate(
                "() => window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code').flatMap(w => w.model.outputs.toJSON()).filter(o => o.data && o.data['text/html']).length"
            )
            > 2
        )
    assert shot.stat().st_size > 20_000
