"The fault list is whole, and its page says so; rows of it that need a command of their own."

import json

import faults
import numpy as np
import psutil
import pytest
from homes import (
    DATA,
    METHODS,
    PAPER,
    PRETRAIN,
    RUN,
    SMOKE,
    TUNE,
    cli,
    expected,
    finished_home,
    new_home,
    one_line,
    paths,
    runs,
    went,
)
from shims import patched
from test_resume import same_records, start, wait_for

from promptnb.core import read_json


@pytest.mark.xfail(strict=True)  # until all are here
def test_every_row_has_a_test():
    assert faults.wrong(faults.tests_of_rows()) == []


def test_the_page_is_up_to_date():
    page = json.loads(faults.PAGE.read_text("utf-8"))
    assert "".join(faults.table_cell(page)["source"]) == faults.table(faults.tests_of_rows()), "run make fix"


def test_a_row_without_a_test_is_named(tmp_path):
    (tmp_path / "test_x.py").write_text("@pytest.mark.fault(3)\n@pytest.mark.long\ndef test_three():\n    pass\n")
    found = faults.tests_of_rows(tmp_path)
    assert found == {3: [("test_x.py", "test_three")]}
    lacking = faults.wrong(found)
    assert len(lacking) == len(faults.FAULTS) - 1 and lacking[0].startswith("row 1 has no test: kill -9")
    (tmp_path / "test_y.py").write_text("@pytest.mark.fault(2, 99)\ndef test_unknown():\n    pass\n")
    assert "test_y.py: test_unknown names row 99" in faults.wrong(faults.tests_of_rows(tmp_path))


# ---- row 9: a dataset that is not the manifest's


def changed_dataset(home):
    "One float of the data that training reads is another; the file is as sound as before."
    path = home / "data" / "minari" / "promptnb" / "cheetah-dir-00" / "expert-v0" / "columns.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100:-96] = np.float32(0.5).tobytes()
    path.write_bytes(raw)
    return path


@pytest.mark.fault(9)
def test_changed_data_are_made_again_or_accepted_and_said(tmp_path):
    "Without the flag they are collected again; with it the runs say so, in records, status, tables and captions."
    home = new_home(tmp_path / "home", *DATA)
    path = changed_dataset(home)
    ours = path.read_bytes()
    p = went(cli(home, *RUN, "--cores", 2, "--accept-changed-data"))
    assert path.read_bytes() == ours, p.stdout + p.stderr
    for name in paths(home):
        remarks = read_json(paths(home)[name])["remarks"]
        assert remarks == {"on changed data": "promptnb/cheetah-dir-00/expert-v0"}, name
    assert f"{len(METHODS)} on changed data" in went(cli(home, "status", PAPER, *SMOKE)).stdout
    said = went(cli(home, "render", PAPER, *SMOKE, "--exhibit", "table1", "--partial")).stdout
    assert "<br>1 on changed data" in said and f"of the runs, {len(METHODS)} on changed data" in said

    for made in (home / "data" / "results" / PAPER).iterdir():
        made.unlink()
    p = went(cli(home, "job", PRETRAIN, *SMOKE))
    assert "is damaged" in p.stdout + p.stderr
    assert path.read_bytes() == (finished_home() / path.relative_to(home)).read_bytes()
    same_records(home, [f"{name}.json" for _, name in expected(PRETRAIN)])


# ---- row 16: a cell that takes too long, a job that is killed


@pytest.fixture
def one_missing(tmp_path):
    "A finished workbook without the record of one tuned run: (home, that run)."
    home = new_home(tmp_path / "home", *DATA, "data/runs/policies", "data/results")
    this = next(run for run in runs(TUNE) if run.recipe.key == "ranking")
    paths(home)[f"{this.id}.json"].unlink()
    return home, this


STAND = """
    if IN_KERNEL:
        def tune(run):
            (HERE / "standing").write_text(str(os.getpid()))
            time.sleep(600)
        m.tune = tune
"""


def said_as_failed(home, this, why):
    "The failed record, status and the table's refusal all say so."
    rec = read_json(home / "data" / "results" / PAPER / f"{this.id}.failed.json")
    assert rec["status"] == "failed" and why in rec["why"] and not rec["rows"], rec["why"]
    assert (
        f"1 failed: {this.recipe.family} {this.recipe.method} seed 0: failed: "
        in went(cli(home, "status", PAPER, *SMOKE)).stdout
    )
    one_line(cli(home, "render", PAPER, *SMOKE, "--exhibit", "fig5"), "lacks")


@pytest.mark.fault(16)
def test_a_cell_that_takes_too_long(one_missing, tmp_path):
    home, this = one_missing
    env = patched(tmp_path / "shim", promptnb__experiments__multitask=STAND)
    said = one_line(cli(home, "job", TUNE, *SMOKE, "--time-limit", 15, **env), this.id, "a cell took longer than 15 s")
    assert "--time-limit" in said
    kernel = int((tmp_path / "shim" / "standing").read_text())
    assert not psutil.pid_exists(kernel)
    said_as_failed(home, this, "a cell took longer than 15 s")
    one_line(cli(home, "job", TUNE, *SMOKE, "--time-limit", 0), "PROMPTNB_TIME_LIMIT is '0'", "at least 1")
    went(cli(home, "job", TUNE, *SMOKE, "--time-limit", 600))
    same_records(home, [f"{this.id}.json"])


@pytest.mark.fault(16)
def test_a_job_that_is_killed_alone(one_missing, tmp_path):
    "kill -9 of papermill's process: nobody is left to write a record; `run` does once Snakemake has noticed."
    home, this = one_missing
    log = tmp_path / "log"
    env = patched(tmp_path / "shim", promptnb__experiments__multitask=STAND)
    p = start(home, log, *RUN, "--cores", "1", **env)
    wait_for((tmp_path / "shim" / "standing").exists, p, log)
    kernel = int((tmp_path / "shim" / "standing").read_text())
    parent = psutil.Process(kernel).parent()
    parent.kill()
    assert p.wait(timeout=60) == 2
    assert "not everything ran" in log.read_text().splitlines()[-1]
    said_as_failed(home, this, f"its process, {parent.pid}@")
    went(cli(home, *RUN))
    same_records(home, [f"{this.id}.json"])
    assert not list(home.rglob("*.failed.json"))
