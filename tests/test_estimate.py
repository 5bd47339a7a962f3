"""The expected time, printed before work starts: where its seconds come from, how they are added up, and what is said
where they are unknown."""

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from promptnb import cli, core, recipes, train
from promptnb.core import PromptnbError, read_json, results_dir, write_json
from promptnb.experiments import forecast, multitask, plan
from promptnb.experiments.job import runs_of

PAPER, FAMILY = "prompt_tuning_dt", "cheetah-dir"
ASK = plan.Request(PAPER, ("table1",), seeds=(0,), families=(FAMILY,))
WANT = ["run", PAPER, "--exhibit", "table1", "--family", FAMILY]
N = sum(len(job.recipes) for job in ASK.jobs())  # runs of one seed

# ---- made-up records


def runs(seed=0, scale="laptop", kind=None):
    "The runs of one seed, of one kind or of all."
    return [run for job in ASK.jobs() if kind in (None, job.kind) for run in runs_of(job, scale, seed)]


def record(run, seconds, status="ok", fresh=False, device="a processor", threads=1):
    "A made-up record of a run; one that is not `fresh` is of older code."
    made_by = dict(code=run.code, facts=run.facts) if fresh else dict(code="older", facts="")
    known = dict(run_id=run.id, status=status, why="", recipe_digest=run.digest, rows=[])
    write_json(run.path, dict(known, seconds=seconds, where=dict(device=device, threads=threads), **made_by))


def record_all(pretrain=50.0, tune=30.0, seed=0, scale="laptop", **how):
    "A made-up record of every run of a seed: seconds by kind."
    for run in runs(seed, scale):
        record(run, dict(pretrain=pretrain, tune=tune)[run.kind], **how)


def said(cores=2, rules=(), **asked):
    "The line that is printed."
    return forecast.expected(replace(ASK, **asked), cores, rules=rules)


@pytest.fixture
def slow_steps(monkeypatch):
    "A training step takes half a second; returns the list of the recipes that were timed."
    asked = []

    def step_seconds(recipe, accelerator="auto", limit=3.0):
        asked.append(recipe)
        return 0.5

    monkeypatch.setattr(multitask, "step_seconds", step_seconds)
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


def longest_first(jobs, cores):
    "Seconds of a schedule that gives the longest job that is left to the core that is free first."
    load = [0.0] * cores
    for seconds in sorted(jobs, reverse=True):
        load[load.index(min(load))] += seconds
    return max(load)


def test_wall_is_a_bound_that_longest_first_comes_close_to():
    rng = random.Random(0)
    for _ in range(200):
        jobs, cores = [rng.uniform(1, 100) for _ in range(rng.randint(1, 30))], rng.randint(1, 8)
        least, taken = forecast.wall(dict(pretrain=jobs, tune=[]), cores), longest_first(jobs, cores)
        assert least <= taken + 1e-9
        assert taken <= 2 * least


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
    record_all()
    facts = f"{N} of {N} runs to do, 10 core-minutes; {N} runs measured on this machine"
    assert said() == f"expected: 10 min on 2 cores ({facts})"


def test_records_of_any_seed_serve(tmp_home):
    record_all(seed=0)
    n = 2 * N
    facts = f"{n} of {n} runs to do, 19 core-minutes; {n} runs measured on this machine"
    assert said(seeds=(1, 2)) == f"expected: 10 min on 2 cores ({facts})"
    assert said(seeds=(1, 2), cores=1).startswith("expected: 19 min on 1 core (")


def test_median_over_seeds(tmp_home):
    for seed, seconds in enumerate((10.0, 20.0, 600.0)):
        record_all(seconds, seconds, seed)
    assert said(cores=1).startswith(f"expected: {forecast.spell(20 * N)} on")


def test_another_scale_says_nothing(tmp_home, slow_steps):
    record_all(scale="smoke")
    assert "measured on this machine" not in said()


def test_failed_and_diverged_records_say_nothing(tmp_home, slow_steps):
    record_all(status="diverged")
    for run in runs(seed=1):
        write_json(run.failed_path, dict(status="failed", why="-", seconds=9.0))
    assert "measured on this machine" not in said()


def test_the_shipped_file_holds_the_median_of_each_run(tmp_home):
    record_all(threads=2)
    path = forecast.write_seconds(PAPER)
    known = read_json(path)
    assert path == tmp_home / "data" / "seconds" / f"{PAPER}.json"
    assert known["where"] == "a processor, 2 threads"
    assert len(known["seconds"]) == N
    assert list(known["seconds"]) == sorted(known["seconds"])
    assert known["seconds"]["laptop.pretrain.cheetah-dir.prompt-dt"] == 50
    assert known["seconds"]["laptop.cheetah-dir.pdt"] == 30


def test_shipped_seconds_serve_where_nothing_was_measured(tmp_home):
    record_all(threads=2)
    forecast.write_seconds(PAPER)
    shutil.rmtree(results_dir(PAPER))
    source = f"{N} runs measured on a processor, 2 threads, shipped with the project"
    assert said() == f"expected: 10 min on 2 cores ({N} of {N} runs to do, 10 core-minutes; {source})"


def test_own_records_come_before_shipped_ones(tmp_home):
    record_all()
    forecast.write_seconds(PAPER)
    shutil.rmtree(results_dir(PAPER))
    for run in runs(kind="pretrain"):
        record(run, 100.0)
    shipped = f"{N - 3} runs measured on a processor, 1 thread, shipped with the project"
    assert f"; 3 runs measured on this machine; {shipped})" in said()
    assert said(cores=1).startswith("expected: 12 min")


def test_seconds_of_several_machines_are_named(tmp_home):
    record_all(seed=0)
    record_all(seed=1, device="a GPU")
    assert read_json(forecast.write_seconds(PAPER))["where"] == "a GPU, 1 thread; a processor, 1 thread"


def test_a_policy_that_was_taken_took_what_its_training_took(tmp_home):
    "Its record has the seconds of unpacking; what training takes stands in what it came with."
    (run,) = runs(kind="pretrain")[:1]
    record(run, 0.0)
    made = dict(seconds=170.0, where=dict(device="another", threads=1))
    write_json(run.path, dict(read_json(run.path), shipped=made))
    (tuned,) = runs(kind="tune")[:1]
    record(tuned, 30.0)
    write_json(tuned.path, dict(read_json(tuned.path), shipped=True))  # tuned here, from what was taken
    assert forecast.run_seconds(run)[1] != forecast.HERE and forecast.run_seconds(tuned) == (30.0, forecast.HERE)
    known = read_json(forecast.write_seconds(PAPER))
    assert known["seconds"][forecast.time_name(run)] == 170.0 and "another, 1 thread" in known["where"]


def test_nothing_to_ship_is_said(tmp_home):
    with pytest.raises(PromptnbError, match=f"no good record: promptnb run {PAPER}"):
        forecast.write_seconds(PAPER)


def test_status_writes_the_shipped_file(tmp_home, capsys):
    record_all()
    assert cli.main(["status", PAPER, "--seconds"]) == 0
    path = forecast.seconds_file(PAPER)
    assert capsys.readouterr().out.strip() == str(path)
    assert path.exists()


def names_of_today(paper):
    "What the runs of a paper are called in its file of seconds, at all scales."
    jobs = recipes.jobs(paper).values()
    return {forecast.time_name(run) for s in recipes.SCALES for job in jobs for run in runs_of(job, s, 0)}


def test_committed_seconds_name_runs_of_today():
    "Every name in data/seconds is that of a recipe; none is left of one that has gone."
    for path in (core.root() / "data" / "seconds").glob("*.json"):
        known = read_json(path)
        assert known["where"], path
        assert set(known["seconds"]) <= names_of_today(path.stem), path
        assert all(seconds > 0 for seconds in known["seconds"].values()), path


# ---- what is left


def test_only_what_is_left_counts(tmp_home):
    record_all()
    for run in runs():
        if run.kind == "pretrain" or run.recipe.key != "ranking":
            record(run, 50.0, fresh=True)
    facts = f"1 of {N} runs to do, 0.5 core-minutes; 1 run measured on this machine"
    assert said() == f"expected: 30 s on 2 cores ({facts})"


def test_nothing_to_do(tmp_home, slow_steps):
    record_all(fresh=True)
    assert said() == f"expected: nothing to do ({N} of {N} runs finished)"
    assert not slow_steps


def test_collecting_is_named_where_data_are_absent(tmp_home):
    record_all()
    rules = plan.plan(ASK)
    assert said(rules=rules).startswith("expected: 10 min on 2 cores + collecting data (")


def test_collecting_is_not_named_where_it_is_done(tmp_home, monkeypatch):
    record_all()
    monkeypatch.setattr(plan.Collection, "is_there", lambda collection: True)
    rules = plan.plan(ASK)
    assert rules and "collecting" not in said(rules=rules)


def test_unknown_runs_are_counted(tmp_home):
    for run in runs(kind="pretrain"):
        record(run, 50.0)
    facts = f"2 core-minutes; 3 runs measured on this machine; {N - 3} runs of unknown length"
    assert said() == f"expected: at least 2 min on 2 cores ({N} of {N} runs to do, {facts})"


def test_all_unknown(tmp_home):
    assert forecast.forecast(ASK).span(2) == "unknown"


# ---- a rate


def test_rate_times_steps(tmp_home, slow_steps):
    assert {run.recipe.pretrain.steps for run in runs(scale="paper", kind="pretrain")} == {50_000}
    text = said(scale="paper")
    assert text.startswith("expected: at least 20.8 h on 2 cores")
    assert "3 runs extrapolated from a measured rate, evaluation along the way not in it" in text
    assert f"{N - 3} runs of unknown length" in text


def test_equal_sizes_are_timed_once(tmp_home, slow_steps, capsys):
    said(scale="paper")
    assert [r.pretrain.prompt for r in slow_steps].count(True) == 1
    assert [r.pretrain.prompt for r in slow_steps].count(False) == 1  # two policies without prompt are of one size
    assert capsys.readouterr().out.count("are timed") == 1


@pytest.mark.parametrize("key", ["pdt", "mt-orl"])
def test_rate_at_paper_scale(key):
    import torch

    recipe = recipes.resolve(recipes.RECIPES[f"{PAPER}/{FAMILY}/{key}"], "paper")
    threads, start = torch.get_num_threads(), time.time()
    assert 1e-4 < multitask.step_seconds(recipe, "cpu", limit=1.0) < 60
    assert time.time() - start < 20
    assert torch.get_num_threads() == threads


BIG = recipes.resolve(recipes.RECIPES[f"{PAPER}/cheetah-vel/pdt"], "paper")
BATCH = 16 * 35  # its windows


@pytest.fixture
def steps_taken(monkeypatch):
    "steps_taken(seconds a row): steps that take so long; gives the list of the rows of each."

    def begin(seconds):
        rows = []

        def step_once(model, opt, batch, *_):
            rows.append(len(batch))
            time.sleep(seconds * len(batch))

        monkeypatch.setattr(train, "step_once", step_once)
        return rows

    return begin


def test_a_quick_batch_is_timed_whole(steps_taken):
    rows = steps_taken(0.0)
    multitask.step_seconds(BIG, "cpu")
    assert set(rows[:2]) == {8}
    assert set(rows[2:]) == {multitask.size_of(BIG)[3]} == {BATCH}


def test_a_slow_batch_is_timed_in_part(steps_taken):
    rows = steps_taken(0.002)
    seconds = multitask.step_seconds(BIG, "cpu", limit=0.2)
    assert max(rows) < BATCH
    assert 1 < seconds < 2.5  # 0.002 x 560 and what the machine adds


# ---- the command line


def test_run_prints_it_before_snakemake(tmp_home, no_snakemake, capsys):
    record_all()
    assert cli.main([*WANT, "--seeds", "0", "--cores", "2", "--dry-run"]) == 0
    first, line = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{PAPER} at laptop scale")
    assert line.startswith("expected: 10 min on 2 cores + collecting data (")
    (command,) = no_snakemake
    assert "--dry-run" in command


@pytest.mark.parametrize(
    "wrong",
    [
        [*WANT, "--exhibit", "tabel1"],
        ["run", PAPER, "--scale", "papper"],
        [*WANT, "--family", "cheetah-dri"],
        [*WANT, "--cores", "0"],
        ["status", "prompt_tuning", "--seconds"],
    ],
    ids=lambda wrong: " ".join(wrong[-2:]),
)
def test_misspelt_words_come_first(wrong, tmp_home, no_snakemake, slow_steps, capsys):
    assert cli.main(wrong) == 2
    out, err = capsys.readouterr()
    assert err.startswith("promptnb: ")
    assert "expected" not in out
    assert not no_snakemake and not slow_steps


def test_status_shows_it(tmp_home, capsys):
    record_all()
    assert cli.main(["status", PAPER]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "expected at least" in lines["table1"]
    assert "expected unknown (24 runs to do)" in lines["pdt_fig4"]
    assert "cannot be made" in lines["fig1"]
    assert "expected" not in lines["fig1"]


def test_no_torch_where_nothing_is_measured(tmp_home):
    record_all()
    forecast.write_seconds(PAPER)
    shutil.rmtree(results_dir(PAPER))
    code = f"""import sys
from promptnb.experiments import forecast, plan
print(forecast.expected(plan.Request({PAPER!r}, ("table1",), families=({FAMILY!r},)), cores=2))
sys.exit("torch" in sys.modules)"""
    env = dict(os.environ, PROMPTNB_HOME=str(tmp_home))
    p = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    assert p.stdout.startswith("expected: ")


@pytest.mark.parametrize("share", [(0, 0), (30, 90)])
def test_jobs_that_take_no_time_share_a_process(share):
    tasks = plan.tasks_of(plan.Request(PAPER, ("table1",), scale="smoke"), done=lambda run: False)
    shared = plan.batches(tasks, lambda run: 0.0, share)
    assert sorted(task.word for batch in shared for task in batch) == sorted(task.word for task in tasks)
    assert len(shared) == len({task.job.family for task in tasks})


def test_who_others_wait_longest_for_goes_first(tmp_home):
    "A policy's priority is that of its own seconds and its tuned rows'; data come before what is trained from them."
    families = dict(zip(("cheetah-dir", "cheetah-vel"), (100.0, 7.0)))
    asked = replace(ASK, families=tuple(families))

    def seconds(run):
        return families[run.recipe.family] * (10 if run.kind == "pretrain" else 1)

    rules = plan.plan(asked, seconds=seconds)
    of = {name: [r.priority for r in rules if name in r.name] for name in ("collect", "pretrain", "tune")}
    rows = N - 3  # three policies of a family, and what is tuned from them
    assert sorted(of["tune"]) == [7 * rows, 100 * rows]
    assert sorted(of["pretrain"]) == sorted(of["collect"]) == [7 * (rows + 30), 100 * (rows + 30)]
