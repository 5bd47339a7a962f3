"""explore.ipynb in a real browser, 1280 x 800: each of its four panels is used, and what it answers is read.

Needs chromium and playwright (pip install promptnb[browser]); skipped without. LAB_SCREENSHOTS=folder keeps pictures.
"""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")

from browser import CHROME, NOTEBOOK, laboratory, opened, run_all_cells  # noqa: E402
from homes import DATA, new_home  # noqa: E402

from promptnb import recipes  # noqa: E402
from promptnb.experiments.guided import train  # noqa: E402
from promptnb.experiments.run import Run  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.skipif(not CHROME, reason="no chromium on this machine")]
CELL = "source => P.scrollToItem(P.widgets.findIndex(w => w.model.sharedModel.source.startsWith(source)), 'start')"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a workbook with a finished policy and a guided run."
    pytest.importorskip("crafter")
    home = new_home(tmp_path_factory.mktemp("lab") / "home", *DATA, "data/results", "data/runs/policies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTNB_HOME", str(home))
        train(Run(recipes.resolve(recipes.RECIPES["rladapter/crafter/rules"], "smoke"), "smoke"))
    with laboratory(home, PROMPTNB_HOME=str(home)) as address:
        yield address


@pytest.fixture(scope="module")
def page(lab):
    "explore.ipynb after Run All."
    with opened(lab, "nbs/explore.ipynb", 1280, 800) as page:
        page.keyboard.press("Control+b")  # the files' list makes room
        assert run_all_cells(page, 5) == (5, 0)
        yield page


@pytest.fixture
def panel(page, tmp_path):
    "panel(call) scrolls to a panel; panel(call, name) keeps a picture of the page too; with call='' it stays."
    folder = Path(os.environ.get("LAB_SCREENSHOTS", tmp_path))

    def show(call, name=""):
        if call:
            page.evaluate(CELL.replace("P", NOTEBOOK), f"explore.{call}")
        page.wait_for_timeout(1500)
        if name:
            page.screenshot(path=folder / f"{name}.png")

    return show


def said(page, pattern, seconds=60):
    "The text of the page that matches, once it is there."
    found = page.locator(f"text=/{pattern}/").first
    found.wait_for(timeout=1000 * seconds)
    return found.inner_text()


def picture(page, call):
    "The picture that a panel shows now, as its address."
    page.evaluate(CELL.replace("P", NOTEBOOK), f"explore.{call}")
    cell = page.locator(".jp-CodeCell").filter(has_text=f"explore.{call}")
    return cell.locator("img").first.get_attribute("src")


def choose(page, has, label):
    "Choose an option, by its text, in the first menu that has another one."
    page.locator("select").filter(has_text=has).first.select_option(label=label)


def press(page, name):
    "Press the button of that name."
    page.get_by_role("button", name=name, exact=True).click()


def test_a_prompt_is_dragged_replaced_blurred_and_played(page, panel):
    panel("prompt_bench")
    steps, drawn = page.locator(".jupyter-widget-tag"), picture(page, "prompt_bench")
    steps.nth(4).drag_to(steps.nth(0))
    assert steps.nth(0).inner_text() == "step 5"
    choose(page, "all steps", "step 3")
    choose(page, "medium demonstrations", "medium demonstrations")
    press(page, "replace")
    page.get_by_role("slider").nth(1).press("ArrowRight")
    press(page, "play 16 episodes")
    line = said(page, "2 x 16 episodes in")
    panel("prompt_bench", "bench")
    assert picture(page, "prompt_bench") != drawn
    assert re.fullmatch(r"2 x 16 episodes in \d+\.\d s", line)


@pytest.mark.parametrize("tuner, by_play", [("full", False), ("ranking", True)])
def test_a_tuner_is_watched_and_stopped(page, panel, tuner, by_play):
    panel("tuning_panel")
    before = picture(page, "tuning_panel")
    page.get_by_label("judged by playing").set_checked(by_play)
    page.get_by_role("slider").nth(2).press("End")  # of steps: 200, which take longer than it takes to press stop
    press(page, tuner)
    said(page, f"{tuner}: step [0-9]+ of 200")
    said(page, f"{tuner}: step [1-9]")
    press(page, "stop")
    assert "stopped" in said(page, f"{tuner}: (stopped|done) after step")
    panel("tuning_panel", f"tuning-{tuner}")
    assert picture(page, "tuning_panel") != before


def test_records_are_filtered_and_two_are_compared(page, panel):
    panel("results_panel")
    choose(page, "any method", "PTDT-offline, expert prompt")
    assert said(page, "^1 of [0-9]+ records")
    panel("results_panel", "filtered")
    choose(page, "any method", "any method")
    said(page, "^([0-9]+) of \\1 records")
    pair = page.locator("select").filter(has_text="PTDT-offline, random prompt on")
    for menu, quality in zip((pair.nth(0), pair.nth(1)), ("expert", "random"), strict=True):
        menu.select_option(label=f"PTDT-offline, {quality} prompt on cheetah-dir, smoke, seed 0 (prompt_tuning_dt)")
    fields = page.locator("tr").filter(has_text="tune.prompt_quality")
    fields.wait_for()
    assert fields.locator("td").all_inner_texts() == ["tune.prompt_quality", "highest", "lowest"]
    fields.scroll_into_view_if_needed()
    panel("", "compared")


def test_an_exchange_is_stepped_to(page, panel):
    panel("guidance_panel")
    before = picture(page, "guidance_panel")
    page.get_by_role("slider").last.press("ArrowRight")
    said(page, "environment 1, its step 0")
    panel("guidance_panel", "exchange")
    assert picture(page, "guidance_panel") != before
