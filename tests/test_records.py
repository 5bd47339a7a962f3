"Shipped records: what goes in comes out, a damaged file is refused, yours come first, and verify says what agrees."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from homes import FAMILY, METHODS, PAPER, ROOT, fabricate, made_of

from promptnb import cli as command
from promptnb import recipes as rc
from promptnb.core import PromptnbError, read_json, results_dir, write_json
from promptnb.experiments import forecast
from promptnb.experiments.plan import Request, tasks_of
from promptnb.experiments.run import Run
from promptnb.recipes import EXHIBITS
from promptnb.report import records, verify
from promptnb.report import view as view_module
from promptnb.report.view import RunState, View, flaws, headline, lacks, makers, seeds_shown

SCALE, SEEDS = "laptop", (0, 1, 2)
TABLE1 = EXHIBITS[PAPER, "table1"]


@pytest.fixture
def packed(tmp_home):
    "A workbook with shipped records of table1 and none of its own: its home."
    fabricate(tmp_home, TABLE1, SCALE, SEEDS)
    records.pack(PAPER, SCALE)
    shutil.move(results_dir(PAPER), tmp_home / "own")
    return tmp_home


def own_again(home, change=lambda record: None):
    "Put the records back as the user's own, each changed by `change`."
    results_dir(PAPER).mkdir(parents=True)
    for path in (home / "own").glob("*.json"):
        record = read_json(path)
        change(record)
        write_json(results_dir(PAPER) / path.name, record)


def shifted(by):
    "Adds to every return a number that depends on the seed."

    def change(record):
        for row in record["rows"]:
            row["value"] += by[row["seed"]]

    return change


# ---- files


def test_every_field_of_every_record_comes_back(packed):
    there = records.shipped(PAPER, SCALE)
    made = {p.name: json.loads(p.read_text()) for p in (packed / "own").glob("*.json")}
    assert len(made) == len(there) > 50 and there == made


def test_packing_twice_gives_the_same_bytes(packed):
    own_again(packed)
    first = records.shipped_file(PAPER, SCALE).read_bytes()
    assert records.pack(PAPER, SCALE).read_bytes() == first


def test_packing_adds_to_what_is_shipped(packed):
    before = records.shipped(PAPER, SCALE)
    name, record = next(iter(before.items()))
    write_json(results_dir(PAPER) / name, dict(record, seconds=12345))
    records.pack(PAPER, SCALE)
    after = records.shipped(PAPER, SCALE)
    assert after[name]["seconds"] == 12345 and set(after) == set(before)


def test_failed_runs_are_not_packed(packed):
    own_again(packed)
    name, record = next(iter(records.shipped(PAPER, SCALE).items()))
    write_json(results_dir(PAPER) / name.replace(".json", ".failed.json"), dict(record, status="failed"))
    records.pack(PAPER, SCALE)
    assert {r["status"] for r in records.shipped(PAPER, SCALE).values()} == {"ok"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "of another paper", "no manifest"])
def test_a_file_that_is_not_the_manifest_s_is_refused(packed, damage, capsys):
    path = records.shipped_file(PAPER, SCALE)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-9])
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if damage == "of another paper":
        path.write_bytes(records.packed({}))
    if damage == "no manifest":
        write_json(path.with_name("manifest.json"), {})
    assert command.main(["status", PAPER, "--scale", SCALE]) == 2
    err = capsys.readouterr().err
    assert path.name in err and "manifest" in err and err.count("\n") == 1


def test_a_file_that_is_too_large_is_refused(packed, monkeypatch):
    own_again(packed)
    monkeypatch.setattr(records, "LIMIT", 1000)
    before = records.shipped_file(PAPER, SCALE).read_bytes()
    with pytest.raises(PromptnbError, match="more than"):
        records.pack(PAPER, SCALE)
    assert records.shipped_file(PAPER, SCALE).read_bytes() == before


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(recipe_digest="0123456789"), "is of a recipe that has changed"),
        (dict(status="diverged", why="loss nan", rows=[]), "is diverged, the shipped one is not"),
        (dict(shipped=dict(seconds=1.0, where={}, code={})), "repeats the shipped one"),
    ],
    ids=["stale", "diverged", "taken"],
)
def test_what_is_not_worth_it_replaces_no_shipped_record(packed, change, why, capsys):
    own_again(packed, shifted([1, 1, 1]))
    for path in sorted(results_dir(PAPER).glob("*.json"))[1:]:
        write_json(path, dict(read_json(path), **change))
    before, (first, *_) = records.shipped(PAPER, SCALE), sorted(p.name for p in results_dir(PAPER).glob("*.json"))
    records.pack(PAPER, SCALE)
    after = records.shipped(PAPER, SCALE)
    assert [name for name in before if before[name] != after[name]] == [first] and list(after) == list(before)
    assert capsys.readouterr().out.splitlines() == [f"left out: {n} {why}" for n in sorted(before) if n != first]


def test_nothing_to_pack_is_one_line(tmp_home, capsys):
    assert command.main(["records", "pack", PAPER]) == 2
    assert f"promptnb run {PAPER}" in capsys.readouterr().err


# ---- back again


def left():
    "How many runs of table1 `promptnb run` would make, but for its policies."
    tasks = tasks_of(Request(PAPER, (TABLE1.id,), SCALE))
    return sum(not run.policy for task in tasks for run in task.left)


def unpack(*more):
    "The exit status of `promptnb records unpack`."
    return command.main(["records", "unpack", PAPER, "--scale", SCALE, *more])


def test_what_is_unpacked_need_not_be_run(packed, capsys):
    n = len(records.shipped(PAPER, SCALE))
    assert left() == n
    assert not unpack()
    assert f"{n} shipped records of {PAPER} laid among yours" in capsys.readouterr().out
    assert left() == 0


def test_unpacking_twice_changes_nothing(packed, capsys):
    unpack()
    before = {p.name: p.read_bytes() for p in results_dir(PAPER).iterdir()}
    unpack()
    assert {p.name: p.read_bytes() for p in results_dir(PAPER).iterdir()} == before
    assert f"{len(before)} not, as you have a record of your own there" in capsys.readouterr().out.splitlines()[-1]


def test_unpacking_replaces_no_record_of_yours(packed):
    own_again(packed, shifted([1, 1, 1]))
    first = min(results_dir(PAPER).glob("*.json"))
    first.unlink()
    before = {p: p.read_bytes() for p in results_dir(PAPER).iterdir()}
    unpack()
    assert first.exists() and all(path.read_bytes() == was for path, was in before.items())


@pytest.mark.parametrize(
    "change",
    [
        dict(recipe_digest="0123456789"),
        dict(code=dict(modules=["core"], fingerprint="old")),
        dict(facts="of another body"),
    ],
    ids=["recipe", "code", "facts"],
)
def test_what_a_run_would_not_keep_is_not_unpacked(packed, change, capsys):
    theirs = records.shipped(PAPER, SCALE)
    name = min(theirs)
    records.write(PAPER, SCALE, theirs | {name: theirs[name] | change})
    unpack()
    assert {p.name for p in results_dir(PAPER).iterdir()} == set(theirs) - {name}
    assert "1 not, as recipe, facts or code have changed since" in capsys.readouterr().out


def test_what_is_unpacked_is_still_shipped(packed, capsys):
    unpack()
    assert {run.whose for run in View(TABLE1, SCALE).good} == {"shipped"}
    assert command.main(["verify", PAPER, "--exhibit", "table1", "--scale", SCALE]) == 2
    assert command.main(["records", "pack", PAPER, "--scale", SCALE]) == 2  # nothing of yours is there
    assert "nothing to compare" in capsys.readouterr().err


def test_a_forecast_takes_no_seconds_of_another_machine(packed):
    unpack()
    run = Run(rc.resolve(rc.RECIPES[f"{PAPER}/{FAMILY}/pdt"], SCALE), SCALE, 0)
    assert run.path.exists() and not forecast.good_records(run)


def test_nothing_to_unpack_is_one_line(tmp_home, capsys):
    assert unpack() == 2
    assert capsys.readouterr().err == (
        f"promptnb: no records of {PAPER} are shipped at {SCALE} scale: promptnb status {PAPER}\n"
    )


# ---- views


def test_shipped_records_stand_in(packed):
    view = View(TABLE1, SCALE)
    view.require()
    assert {run.whose for run in view.good} == {"shipped"}
    assert seeds_shown(view) == "n = 3 seeds" and makers(view).startswith("All runs are shipped with the workbook")


def test_yours_come_first(packed):
    own_again(packed, shifted([1000, 1000, 1000]))
    assert {run.whose for run in View(TABLE1, SCALE).good} == {"yours"}
    assert makers(View(TABLE1, SCALE)) == ""
    difference = View(TABLE1, SCALE).rows.value.mean() - View(TABLE1, SCALE, whose="shipped").rows.value.mean()
    assert difference == pytest.approx(1000)


def test_a_table_says_that_its_rows_read_different_data(packed):
    assert view_module.other_data(View(TABLE1, SCALE)) == ""
    first = rc.resolve(rc.RECIPES[f"{PAPER}/{FAMILY}/pdt"], SCALE)
    own_again(packed, lambda record: record.update(data=["there"]))
    assert view_module.other_data(View(TABLE1, SCALE)) == ""
    path = Run(first, SCALE, 0).path
    write_json(path, dict(read_json(path), data=["here"]))
    said = f"On {FAMILY}, rows read different collections of the data."
    assert view_module.other_data(View(TABLE1, SCALE)) == said and makers(View(TABLE1, SCALE)) == said


def test_a_stale_record_of_yours_gives_way_to_a_shipped_one(packed):
    own_again(packed, lambda record: record.update(recipe_digest="0123456789"))
    assert {run.whose for run in View(TABLE1, SCALE).good} == {"shipped"}
    assert {run.state for run in View(TABLE1, SCALE, whose="yours").runs} == {"stale"}


def test_shipped_records_of_older_code_are_shown_and_said(tmp_home):
    fabricate(tmp_home, TABLE1, SCALE, SEEDS)
    names = [p.name for p in results_dir(PAPER).iterdir()]
    old = {n: dict(read_json(results_dir(PAPER) / n), code=dict(modules=["core"], fingerprint="old")) for n in names}
    records.write(PAPER, SCALE, old)
    shutil.rmtree(results_dir(PAPER))
    view = View(TABLE1, SCALE)
    assert not view.lacking
    assert makers(view).endswith(f"{len(view.runs)} of them made before a change of the code.")


def test_shipped_records_of_another_recipe_are_stale(tmp_home):
    fabricate(tmp_home, TABLE1, SCALE, SEEDS)
    names = [p.name for p in results_dir(PAPER).iterdir()]
    other = {n: dict(read_json(results_dir(PAPER) / n), recipe_digest="0123456789") for n in names}
    records.write(PAPER, SCALE, other)
    shutil.rmtree(results_dir(PAPER))
    assert {run.state for run in View(TABLE1, SCALE).runs} == {"stale"}


def test_a_partial_view_says_so(packed):
    shutil.rmtree(packed / "data" / "records")
    own_again(packed)
    first = next(results_dir(PAPER).glob(f"{SCALE}.{FAMILY}.*.json"))
    first.unlink()
    view = View(TABLE1, SCALE, partial=True)
    assert lacks(view) == f"PARTIAL: {len(view.runs) - 1} of {len(view.runs)} runs"
    assert seeds_shown(view) == "n = 2 to 3 seeds"


def test_runs_without_a_number_are_said_and_lack_nothing(packed):
    shutil.rmtree(packed / "data" / "records")
    own_again(packed)
    paths = sorted(results_dir(PAPER).glob("*.s2.json"))
    for path, state in zip(paths, ("diverged", "diverged", "unguided")):
        write_json(path, dict(read_json(path), status=state, rows=[]))
    view = View(TABLE1, SCALE)
    assert not view.lacking and flaws(view) == "of the runs, 2 diverged, 1 unguided"


def test_a_shared_pretraining_is_as_old_as_its_own_digest_says():
    "Its record has the digest of the pre-training, not that of the recipe that shows it."
    r = rc.resolve(rc.RECIPES[f"{PAPER}/{FAMILY}/pdt"], SCALE)
    record = dict(recipe_digest=rc.digest(r.pretrain), **made_of(r))
    new, old = (RunState("a", r, 0, "ok", "", record, "shipped", shared) for shared in (True, False))
    assert old.older and not new.older


def test_yours_and_shipped_are_drawn_into_different_folders(tmp_home):
    assert View(TABLE1, SCALE).folder == tmp_home / "figures" / "yours" / PAPER / SCALE
    assert View(TABLE1, SCALE, whose="shipped").folder == tmp_home / "figures" / PAPER / SCALE


def test_status_counts_yours_and_shipped(packed, capsys):
    command.main(["status", PAPER, "--scale", SCALE])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("table1 "))
    n = len(View(TABLE1, SCALE).runs)
    tasks = tasks_of(Request(PAPER, (TABLE1.id,), SCALE))
    policies = {run.id for task in tasks for run in task.runs if run.policy}
    total = n + len(policies)  # yours are to be made with their policies
    assert policies and f"0/{total} runs, {n} shipped" in line and f"({total} runs to do)" in line


# ---- verify


def verified(*more):
    "The exit status of `promptnb verify` on table1, and its table."
    status = command.main(["verify", PAPER, "--exhibit", "table1", *more])
    return status, verify.verified([TABLE1], SCALE)


def test_equal_runs_are_equal(packed, capsys):
    own_again(packed)
    status, t = verified()
    assert status == 0 and set(t.agrees) == {verify.EQUAL}
    assert len(t) == len(METHODS) * len(TABLE1.families)
    assert f"equal: {len(t)}" in capsys.readouterr().out


def test_runs_that_differ_as_seeds_do_agree(packed):
    own_again(packed, shifted([20, -30, 10]))
    status, t = verified()
    assert status == 0 and set(t.agrees) == {verify.AGREES}


def test_runs_that_lie_elsewhere_do_not_agree(packed):
    own_again(packed, shifted([500.0, 500.1, 500.2]))
    status, t = verified()
    assert status == 1 and set(t.agrees) == {verify.DIFFERS}


def test_one_row_that_does_not_agree_is_enough(packed):
    def change(record):
        row = record["rows"][0]
        if (row["method"], row["task"]) == ("LoRA (control)", FAMILY):
            shifted([500.0, 500.001, 500.002])(record)

    own_again(packed, change)
    status, t = verified()
    (row,) = t[t.agrees != verify.EQUAL].itertuples()
    assert status == 1 and (row.where, row.method, row.agrees) == (FAMILY, "LoRA (control)", verify.DIFFERS)


def test_a_run_shown_twice_is_compared_once(packed):
    "Holm's correction is over comparisons, not over pictures of them."
    own_again(packed)
    once = verify.verified([TABLE1], SCALE)
    assert len(verify.verified([TABLE1, EXHIBITS[PAPER, "fig3"], TABLE1], SCALE)) == len(once)


def test_verify_says_where_the_data_were_others(packed, capsys):
    own_again(packed)
    verified()
    assert "other data" not in capsys.readouterr().out
    for path in results_dir(PAPER).glob(f"{SCALE}.{FAMILY}.*.json"):
        write_json(path, dict(read_json(path), data=["other"]))
    verified()
    assert f"On {FAMILY}, your runs read other data than the shipped ones" in capsys.readouterr().out


def test_two_seeds_are_too_few(packed):
    own_again(packed, shifted([5, 6, 7]))
    for path in results_dir(PAPER).glob("*.s2.json"):
        path.unlink()
    status, t = verified()
    assert status == 1 and set(t.agrees) == {verify.FEW} and set(t.n) == {2}


def test_a_run_of_yours_that_diverged_does_not_agree(packed, capsys):
    "Two equal seeds beside a third that diverged, and a method that has no number at all."

    def change(record):
        row = record["rows"][0]
        if (row["task"], row["method"]) in {(FAMILY, "LoRA (control)"), (FAMILY, "Adaptor")}:
            if row["method"] == "Adaptor" or row["seed"] == 2:
                record.update(status="diverged", why="loss nan", rows=[])

    own_again(packed, change)
    status, t = verified()
    lost = t[t.agrees == verify.NO_NUMBER].set_index("method")
    assert status == 1 and lost.lost.to_dict() == {"LoRA (control)": "1 diverged", "Adaptor": "3 diverged"}
    assert lost.n.to_dict() == {"LoRA (control)": 2, "Adaptor": 0}
    said = capsys.readouterr().out
    assert "yours has no number: 3 diverged" in said and "yours has no number: 2 (" in said


@pytest.mark.parametrize("lacks", ["yours", "shipped"])
def test_nothing_to_compare_is_one_line(packed, lacks, capsys):
    if lacks == "shipped":
        own_again(packed)
        shutil.rmtree(packed / "data" / "records")
    assert command.main(["verify", PAPER]) == 2
    assert "nothing to compare at laptop scale" in capsys.readouterr().err


def test_the_headline_is_the_score_else_the_return_at_the_end():
    rows = [dict(metric=m, step=s, value=v) for m, s, v in (("return", 0, 1.0), ("return", 5, 2.0), ("return", 5, 4.0))]
    assert headline(dict(rows=rows)) == 3
    assert headline(dict(rows=[*rows, dict(metric="score", step=1, value=7.0, n_episodes=2)])) == 7
    assert np.isnan(headline(dict(rows=[])))


def test_what_a_search_was_told_is_not_its_result():
    "PTDT-online logs the returns of its candidates as scores of no episodes."
    told = dict(metric="score", step=9, value=300.0, n_episodes=0)
    assert headline(dict(rows=[told, dict(metric="return", step=9, value=500.0, n_episodes=6)])) == 500
    scored = dict(metric="score", step=9, value=70.0, n_episodes=6)
    assert headline(dict(rows=[scored, dict(metric="return", step=9, value=500.0, n_episodes=6)])) == 70


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_reading_shipped_records_starts_no_thread():
    "A thread of Arrow's that is still at work when a short command ends aborts it (status 134)."
    code = """import os, pyarrow.parquet
from promptnb.report import records
before = len(os.listdir("/proc/self/task"))
assert records.shipped("prompt_tuning_dt", "laptop")
print(len(os.listdir("/proc/self/task")) - before)"""
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert p.stdout.strip() == "0", p.stdout + p.stderr
