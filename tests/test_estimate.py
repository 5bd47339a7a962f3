"The expected time, printed before work starts: where its seconds come from, how they are added up, what is said where they are unknown."

import os
import shutil
import subprocess
import sys
import time

import pytest

from promptnb import cli, core, recipes
from promptnb.core import PromptnbError, read_json, results_dir, write_json
from promptnb.experiments import forecast, job, multitask, plan, run

PAPER, FAMILY = "prompt_tuning_dt", "cheetah-dir"
ASK = dict(exhibit_ids=["table1"], families=[FAMILY], cores=2)
WANT = ["run", PAPER, "--exhibit", "table1", "--family", FAMILY]
JOBS = plan.wanted_jobs(PAPER, ["table1"], [FAMILY])
N = sum(len(j.recipes) for j in JOBS)  # runs of one seed


def record(
    kind, seconds, seed=0, scale="laptop", status="ok", fresh=False, only=lambda r: True, where="a processor", threads=1
):
    "Made-up records of a kind of job; one that is not `fresh` is of older code."
    for j in JOBS:
        for r, x in job.runs_of(j, scale, seed) if j.kind == kind else ():
            if only(r):
                write_json(
                    run.record_path(PAPER, x),
                    dict(
                        run_id=x,
                        status=status,
                        why="",
                        recipe_digest=recipes.digest(r),
                        code=run.code_of_run(r, x) if fresh else "older",
                        rows=[],
                        seconds=seconds,
                        where=dict(device=where, threads=threads),
                    ),
                )


def both(seconds=(50.0, 30.0), **kw):
    for kind, s in zip(("pretrain", "tune"), seconds):
        record(kind, s, **kw)


def said(**kw):
    return forecast.expected(PAPER, **{**ASK, "seeds": [0], **kw})


@pytest.fixture
def no_snakemake(monkeypatch):
    "`run` without what it hands over to; returns the list of its commands."
    asked = []
    monkeypatch.setattr(
        cli.subprocess, "run", lambda cmd, **kw: asked.append(cmd) or subprocess.CompletedProcess(cmd, 0)
    )
    return asked


@pytest.fixture
def slow_steps(monkeypatch):
    "A training step takes half a second; returns the list of the recipes that were timed."
    asked = []
    monkeypatch.setattr(forecast, "step_seconds", lambda p, accelerator="auto", limit=3.0: asked.append(p) or 0.5)
    return asked


# ---- the formula


@pytest.mark.parametrize(
    "pretrain, tune, cores, seconds",
    [
        ([], [], 4, 0),
        ([60], [], 1, 60),
        ([60], [], 8, 60),
        ([60, 60, 60], [], 2, 90),
        ([60, 60, 60, 300], [], 2, 300),
        ([60, 60, 60, 300], [], 1, 480),
        ([100, 100], [40], 2, 140),
        ([100, 20], [10, 10], 2, 110),
        ([10] * 100, [1] * 100, 50, 22),
    ],
)
def test_wall(pretrain, tune, cores, seconds):
    assert forecast.wall(dict(pretrain=pretrain, tune=tune), cores) == seconds


def test_wall_is_a_bound_that_longest_first_comes_close_to():
    import random

    rng = random.Random(0)
    for _ in range(200):
        ts, c = [rng.uniform(1, 100) for _ in range(rng.randint(1, 30))], rng.randint(1, 8)
        load = [0.0] * c
        for t in sorted(ts, reverse=True):
            load[load.index(min(load))] += t
        least = forecast.wall(dict(pretrain=ts, tune=[]), c)
        assert least <= max(load) + 1e-9 and max(load) <= 2 * least


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (840, "14 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172_799, "48.0 h"),
        (172_800, "2.0 days"),
        (1e8, "1157.4 days"),
    ],
)
def test_spell(seconds, text):
    assert forecast.spell(seconds) == text


# ---- where the seconds come from


def test_this_machines_records(tmp_home):
    both()
    assert (
        said()
        == f"expected: 8 min on 2 cores ({N} of {N} runs to do, 8 core-minutes; {N} runs measured on this machine)"
    )
    assert (
        said(seeds=[1, 2])
        == f"expected: 8 min on 2 cores ({2 * N} of {2 * N} runs to do, 16 core-minutes; {2 * N} runs measured on this machine)"
    )  # any seed's
    assert said(seeds=[1, 2], cores=1).startswith("expected: 16 min on 1 core (")


def test_median_over_seeds(tmp_home):
    for seed, s in enumerate((10.0, 20.0, 600.0)):
        both((s, s), seed=seed)
    assert said(cores=1).startswith(f"expected: {forecast.spell(20 * N)} on")


def test_another_scale_says_nothing(tmp_home, slow_steps):
    both(scale="smoke")
    assert "measured on this machine" not in said()


def test_failed_and_diverged_records_say_nothing(tmp_home, slow_steps):
    both(status="diverged")
    for j in JOBS:
        for r, x in job.runs_of(j, "laptop", 1):
            write_json(results_dir(PAPER) / f"{x}.failed.json", dict(status="failed", why="-", seconds=9.0))
    assert "measured on this machine" not in said()


def test_shipped_seconds(tmp_home):
    both(threads=2)
    path = forecast.write_seconds(PAPER)
    known = read_json(path)
    assert (
        path == tmp_home / "data" / "seconds" / f"{PAPER}.json"
        and known["where"] == "a processor, 2 threads"
        and len(known["seconds"]) == N
    )
    assert (
        known["seconds"]["laptop.pretrain.cheetah-dir.pdt"] == 50
        and known["seconds"]["laptop.cheetah-dir.pdt"] == 30
        and list(known["seconds"]) == sorted(known["seconds"])
    )
    shutil.rmtree(results_dir(PAPER))
    assert (
        said()
        == f"expected: 8 min on 2 cores ({N} of {N} runs to do, 8 core-minutes; {N} runs measured on a processor, 2 threads, shipped with the project)"
    )


def test_own_records_come_before_shipped_ones(tmp_home):
    both()
    forecast.write_seconds(PAPER)
    shutil.rmtree(results_dir(PAPER))
    record("pretrain", 100.0)
    assert (
        f"; 3 runs measured on this machine; {N - 3} runs measured on a processor, 1 thread, shipped with the project)"
        in said()
        and said(cores=1).startswith("expected: 10 min")
    )


def test_seconds_of_several_machines_are_named(tmp_home):
    both(seed=0)
    both(seed=1, where="a GPU")
    assert read_json(forecast.write_seconds(PAPER))["where"] == "a GPU, 1 thread; a processor, 1 thread"


def test_nothing_to_ship_is_said(tmp_home):
    with pytest.raises(PromptnbError, match=f"no good record: promptnb run {PAPER}"):
        forecast.write_seconds(PAPER)


def test_status_writes_the_shipped_file(tmp_home, capsys):
    both()
    assert cli.main(["status", PAPER, "--seconds"]) == 0
    assert (
        capsys.readouterr().out.strip() == str(forecast.seconds_file(PAPER)) and forecast.seconds_file(PAPER).exists()
    )


def test_committed_seconds_name_runs_of_today():
    "Every name in data/seconds is that of a recipe; none is left of one that has gone."
    for path in (core.root() / "data" / "seconds").glob("*.json"):
        paper, known = path.stem, read_json(path)
        names = {
            forecast.time_name(j, r, s)
            for j in recipes.jobs(paper).values()
            for s in recipes.SCALES
            for r in job.job_recipes(j, s)
        }
        assert known["where"] and set(known["seconds"]) <= names and all(s > 0 for s in known["seconds"].values()), path


# ---- what is left


def test_only_what_is_left_counts(tmp_home):
    both()
    record("pretrain", 50.0, fresh=True)
    record("tune", 30.0, fresh=True, only=lambda r: r.key != "ranking")
    assert (
        said() == f"expected: 30 s on 2 cores (1 of {N} runs to do, 0.5 core-minutes; 1 run measured on this machine)"
    )


def test_nothing_to_do(tmp_home, slow_steps):
    both(fresh=True)
    assert said() == f"expected: nothing to do ({N} of {N} runs finished)" and not slow_steps


def test_collecting_is_named_where_the_stamp_is_absent(tmp_home):
    both()
    rules = plan.plan(PAPER, ["table1"], "laptop", [0], [FAMILY])
    stamps = [tmp_home / r.outputs[0] for r in rules if r.name.startswith("collect_")]
    assert said(rules=rules).startswith("expected: 8 min on 2 cores + collecting data (")
    for p in stamps:
        write_json(p, {})
    assert stamps and "collecting" not in said(rules=rules)


def test_unknown_runs_are_counted(tmp_home):
    record("pretrain", 50.0)
    assert (
        said()
        == f"expected: at least 2 min on 2 cores ({N} of {N} runs to do, 2 core-minutes; 3 runs measured on this machine; {N - 3} runs of unknown length)"
    )


def test_all_unknown(tmp_home):
    assert forecast.span(*forecast.forecast(PAPER, ["table1"], "laptop", [0], [FAMILY])[:2], 2) == "unknown"


# ---- a rate


def test_rate_times_steps(tmp_home, slow_steps, capsys):
    steps = {
        recipes.resolve(recipes.RECIPES[i], "paper").pretrain.steps
        for j in JOBS
        if j.kind == "pretrain"
        for i in j.recipes
    }
    assert steps == {50_000}
    text = said(scale="paper")
    assert (
        text.startswith("expected: at least 20.8 h on 2 cores")
        and "3 runs extrapolated from a measured rate, evaluation along the way not in it" in text
        and f"{N - 3} runs of unknown length" in text
    )
    assert len(slow_steps) == 2 and {bool(p.prompt) for p in slow_steps} == {
        True,
        False,
    }  # the two without prompt are of one size
    assert capsys.readouterr().out.count("are timed") == 1


@pytest.mark.parametrize("key", ["pdt", "mt-orl"])
def test_rate_at_paper_scale(key):
    import torch

    p, threads, start = (
        recipes.resolve(recipes.RECIPES[f"{PAPER}/{FAMILY}/{key}"], "paper").pretrain,
        torch.get_num_threads(),
        time.time(),
    )
    assert (
        1e-4 < multitask.step_seconds(p, "cpu", limit=1.0) < 60
        and time.time() - start < 20
        and torch.get_num_threads() == threads
    )


def test_a_big_batch_is_timed_in_part(monkeypatch):
    from promptnb import train

    p, rows = recipes.resolve(recipes.RECIPES[f"{PAPER}/cheetah-vel/pdt"], "paper").pretrain, []
    monkeypatch.setattr(train, "step_once", lambda model, opt, batch, *_: rows.append(len(batch)))
    multitask.step_seconds(p, "cpu")
    assert set(rows[:2]) == {8} and set(rows[2:]) == {multitask.size_of(p)[3]} == {16 * 35}
    monkeypatch.setattr(
        train, "step_once", lambda model, opt, batch, *_: rows.append(len(batch)) or time.sleep(0.002 * len(batch))
    )
    rows.clear()
    s = multitask.step_seconds(p, "cpu", limit=0.2)
    assert max(rows) < 16 * 35 and 1 < s < 2.5


# ---- the command line


def test_run_prints_it_before_snakemake(tmp_home, no_snakemake, capsys):
    both()
    assert cli.main([*WANT, "--seeds", "0", "--cores", "2", "--dry-run"]) == 0
    first, line = capsys.readouterr().out.splitlines()
    assert (
        first.startswith(f"{PAPER} at laptop scale")
        and line.startswith("expected: 8 min on 2 cores + collecting data (")
        and len(no_snakemake) == 1
        and "--dry-run" in no_snakemake[0]
    )


def test_misspelt_words_come_first(tmp_home, no_snakemake, slow_steps, capsys):
    for wrong in (
        [*WANT, "--exhibit", "tabel1"],
        ["run", PAPER, "--scale", "papper"],
        [*WANT, "--family", "cheetah-dri"],
        [*WANT, "--cores", "0"],
        ["status", "prompt_tuning", "--seconds"],
    ):
        assert cli.main(wrong) == 2
        out, err = capsys.readouterr()
        assert "expected" not in out and err.startswith("promptnb: ") and not no_snakemake and not slow_steps


def test_status_shows_it(tmp_home, capsys):
    both()
    assert cli.main(["status", PAPER]) == 0
    lines = {l.split()[0]: l for l in capsys.readouterr().out.splitlines()}
    assert (
        "expected at least" in lines["table1"]
        and "expected unknown (18 runs to do)" in lines["pdt_fig4"]
        and "cannot be made" in lines["fig1"]
        and "expected" not in lines["fig1"]
    )


def test_no_torch_where_nothing_is_measured(tmp_home):
    both()
    forecast.write_seconds(PAPER)
    shutil.rmtree(results_dir(PAPER))
    code = f"import sys; from promptnb.experiments import forecast; print(forecast.expected({PAPER!r}, ['table1'], families=[{FAMILY!r}], cores=2)); sys.exit('torch' in sys.modules)"
    p = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, PROMPTNB_HOME=str(tmp_home)), capture_output=True, text=True
    )
    assert p.returncode == 0 and p.stdout.startswith("expected: "), p.stdout + p.stderr
