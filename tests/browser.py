"""JupyterLab in a real browser: started, opened at a notebook, run.

Needs chromium and playwright (pip install promptnb[browser]); tests that import this are skipped without.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROME = shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OPTIONS = ("--no-browser", "--allow-root", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True")

# What the page is asked, in its own language.
NOTEBOOK = "window.jupyterapp.shell.currentWidget.content"
CODE_CELLS = f"{NOTEBOOK}.widgets.filter(w => w.model.type === 'code')"
OUTPUTS = f"{CODE_CELLS}.flatMap(w => w.model.outputs.toJSON())"
DONE = f"{CODE_CELLS}.filter(w => w.model.executionCount && w.model.executionState !== 'running').length"
ERRORS = f"{OUTPUTS}.filter(o => o.output_type === 'error').length"
PROGRESS = f"() => [{DONE}, {ERRORS}]"


def free_port():
    "A TCP port of this machine that nothing listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, port, cwd=ROOT, **env):
    "A command that starts JupyterLab on a port, until it answers: its address. It is ended at the end."
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    p = subprocess.Popen(command, cwd=cwd, env={**os.environ, **env}, start_new_session=True, **quiet)
    try:
        for _ in range(240):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        p.wait()


def laboratory(folder, **env):
    "This Python's JupyterLab on a folder, on a free port."
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", f"--port={port}", f"--notebook-dir={folder}", *OPTIONS]
    return serving(command, port, folder, **env)


@contextlib.contextmanager
def opened(address, notebook, width, height):
    "The page of a notebook, ready to run."
    with sync_api.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROME, args=FLAGS)
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.goto(f"{address}/lab/tree/{notebook}?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        page.wait_for_timeout(3000)
        yield page
        browser.close()


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
