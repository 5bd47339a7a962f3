"""The batch engine: all papers as one graph, short jobs in one kernel, dry runs that time nothing, what a start costs,
the summary at the end, one log a run, one page of all exhibits."""

import resource
import shutil
import subprocess
import sys
import time

import pytest
from homes import (
    DATA,
    FAMILY,
    PAPER,
    PRETRAIN,
    ROOT,
    RUN,
    SMOKE,
    TUNE,
    cli,
    env_for,
    expected,
    finished_home,
    new_home,
    one_line,
    paths,
    runs,
    went,
)
from test_resume import SLOW, end, mtimes, same_records, shim, start, training, wait_for

from promptnb import cli as command
from promptnb import recipes, tasks
from promptnb.core import read_json, run_lock
from promptnb.experiments import multitask, plan
from promptnb.experiments.forecast import RATE
from promptnb.experiments.plan import Request

BOTH = (f"{PRETRAIN}@0", f"{TUNE}@0")
BROKEN = "lora"  # the recipe that a shim breaks
BREAK = f"""
    work = m.work_on
    def work_on(run):
        if run.recipe.key == {BROKEN!r}:
            print("about to break")
            raise ValueError("broken on purpose")
        return work(run)
    m.work_on = work_on
"""


def cpu_of(call):
    "(what a call of a command gave, the CPU seconds that it and its children took)."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return out, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ---- one graph of all papers


@pytest.fixture(scope="module")
def everything():
    "The tasks of all papers at smoke scale as if nothing had run, and what each waits for."
    tasks = plan.tasks_of(Request("all", scale="smoke"), done=lambda run: False)
    return tasks, plan.inputs_of(tasks, {})


def test_all_papers_are_one_graph(everything):
    tasks, _ = everything
    assert {task.job.paper for task in tasks} == set(recipes.PAPERS)
    assert len({task.stamp for task in tasks}) == len(tasks)


def test_a_policy_of_several_papers_is_trained_by_the_first(everything):
    "The others wait for it: at no time two processes train one policy."
    tasks, inputs = everything
    trainers = {}
    for task in (task for task in tasks if task.job.kind == "pretrain"):
        for run in task.runs:
            trainers.setdefault((run.recipe.pretrain, task.seed), []).append(task)
    shared = [found for found in trainers.values() if len(found) > 1]
    assert {found[0].job.paper for found in shared} == {PAPER, "cmt"}  # the grid has policies of both
    for first, *others in shared:
        assert all(first.stamp in inputs[other.stamp] for other in others)


def test_processes_wait_for_none_that_waits_for_them(everything):
    "Whatever the runs are forecast to take, the graph of processes has no circle."
    tasks, _ = everything
    for short in (0.1, 4.0):
        rules = plan.plan(
            Request("all", scale="smoke"),
            tasks=tasks,
            seconds=lambda run, short=short: short if len(run.recipe.key) % 2 else 1e6,
        )
        maker = {output: rule.name for rule in rules for output in rule.outputs}
        left = {rule.name: {maker[i] for i in rule.inputs if i in maker} for rule in rules}
        while ready := {name for name, needs in left.items() if not needs & set(left)}:
            left = {name: needs for name, needs in left.items() if name not in ready}
        assert not left


def test_exhibits_of_all_papers_are_refused(tmp_home):
    one_line(cli(tmp_home, "run", "all", "--exhibit", "table1"), "--exhibit table1 is of one paper")


def test_run_all_in_a_dry_run(tmp_home):
    p = went(cli(tmp_home, "run", "all", "--family", FAMILY, *SMOKE, "--dry-run"))
    assert "all papers at smoke scale" in p.stdout
    assert all(f"{paper}_cheetah_dir" in p.stdout for paper in (PAPER, "prompt_diffuser", "cmt"))
    assert p.stdout.count("collect_cheetah_dir") and not paths(tmp_home)


@pytest.mark.long
def test_run_all_on_one_family(tmp_path):
    "Policies that papers share are trained once; records of the flagship are those of its own run."
    home = new_home(tmp_path / "home")
    p = went(cli(home, "run", "all", "--family", FAMILY, *SMOKE, timeout=1800))
    assert p.stdout.count("prompt-dt-fbbfc578c2.s0: step 5,") == 1  # who finds a trained one plays its last point alone
    same_records(home, paths(finished_home()))
    again, seconds = cpu_of(lambda: went(cli(home, "run", "all", "--family", FAMILY, *SMOKE)))
    assert "nothing to do" in again.stdout and seconds < 10
    page = went(cli(home, "report", "all", *SMOKE, timeout=900)).stdout.split("report: ")[1].strip()
    text = open(page).read()
    assert all(title in text for title in ("Prompt-Tuning Decision Transformer", "Contextual Transformer"))


# ---- several jobs in one kernel


@pytest.fixture(scope="module")
def one_each(tmp_path_factory):
    "A workbook whose two jobs ran in processes of their own."
    home = new_home(tmp_path_factory.mktemp("engine") / "home", *DATA)
    for word in (PRETRAIN, TUNE):
        went(cli(home, "job", word, *SMOKE))
    return home


@pytest.mark.long
def test_jobs_of_one_kernel_make_what_they_make_alone(one_each):
    "`run` gave the jobs of the finished home to one process: a notebook for each, a log for each run."
    home = finished_home()
    same_records(one_each, [f"{name}.json" for _, name in expected()])
    notebooks = {p.name for p in (home / "data/runs/notebooks").glob("*.ipynb")}
    assert notebooks == {p.name for p in (one_each / "data/runs/notebooks").glob("*.ipynb")} and len(notebooks) == 2
    for _, name in expected(TUNE):
        assert f"{name}: " in (home / "data/runs/logs" / PAPER / f"{name}.log").read_text()


def test_a_kernel_that_dies_takes_no_other_job_along(tmp_path):
    home = new_home(tmp_path / "home", *DATA)
    body = """
        step = m.step_once
        def step_once(*a):
            if not (HERE / "died").exists():
                (HERE / "died").touch()
                os._exit(1)
            return step(*a)
        m.step_once = step_once
    """
    env = shim(tmp_path / "shim", body.replace("\n    ", "\n"))
    said = one_line(cli(home, "job", f"{PRETRAIN}@1", f"{PRETRAIN}@0", *SMOKE, **env), "3 of 3 runs of")
    assert "ernel died" in said
    assert {f"{name}.json" for _, name in expected(PRETRAIN)} < set(paths(home))
    assert len([name for name in paths(home) if name.endswith(".s1.failed.json")]) == 3


@pytest.mark.long
def test_told_to_stop_it_begins_no_other_job(tmp_path):
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    p = start(home, log, "job", f"{PRETRAIN}@1", f"{PRETRAIN}@0", *SMOKE, **shim(tmp_path / "slow", SLOW))
    try:
        wait_for(lambda: training(home), p, log)
        p.terminate()
        assert p.wait(timeout=40) == 75, log.read_text()[-4000:]
    finally:
        end(p)
    assert not paths(home) and not list(home.glob("data/runs/notebooks/*.s0.ipynb"))
    assert not list(home.glob("data/runs/policies/*.s0/step-*.json"))


def test_words_of_job_are_checked_before_the_first_runs(tmp_home):
    one_line(cli(tmp_home, "job", PRETRAIN, f"{PAPER}/table1/{FAMILY}/tuen", *SMOKE), f"did you mean '{TUNE}'?")
    one_line(cli(tmp_home, "job", f"{PRETRAIN}@x", *SMOKE), "has no seed behind its @")
    assert not (tmp_home / "data" / "runs").exists()


# ---- what failed, and why


@pytest.fixture(scope="module")
def one_broken(tmp_path_factory):
    "(a workbook in which one recipe broke, what `run` said)."
    tmp = tmp_path_factory.mktemp("broken")
    home = new_home(tmp / "home", *DATA)
    env = shim(tmp / "shim", BREAK, "promptnb.experiments.job")
    return home, cli(home, *RUN, **env)


def test_the_summary_names_what_failed_and_where_its_log_is(one_broken):
    home, p = one_broken
    name = f"smoke.{FAMILY}.{BROKEN}.s0"
    assert p.returncode == 2 and f"ran: {len(expected()) - 1} of {len(expected())} runs in" in p.stdout
    log = f"data/runs/logs/{PAPER}/{name}.log"
    assert f"failed: {PAPER} {name}: ValueError: broken on purpose (log: {log})" in p.stdout
    assert "tables and figures: promptnb report" in p.stdout
    text = (home / log).read_text()
    assert "about to break" in text and "Traceback" in text and f"{name}: failed: broken on purpose" in text
    same_records(home, [f"{n}.json" for _, n in expected() if n != name])


def test_the_next_run_does_what_failed_and_no_more(one_broken, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(one_broken[0], home)
    results = home / "data" / "results" / PAPER
    before = mtimes(home, lambda p: p.parent == results and ".failed." not in p.name)
    p = went(cli(home, *RUN))
    assert "ran: 1 of 1 run in" in p.stdout and "1 jobs" not in p.stdout
    after = mtimes(home, lambda p: p.parent == results)
    assert before.items() <= after.items() and len(after) == len(before) + 1
    same_records(home, paths(finished_home()))


def test_a_wider_set_of_exhibits_restarts_nothing(monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(finished_home()))
    wide = Request(PAPER, ("table1", "pdt_fig2", "controls"), "smoke", families=(FAMILY,))
    finished = {run.id for run in runs()}
    tasks = plan.tasks_of(wide)
    assert finished < {run.id for task in tasks for run in task.runs}
    left = {run.id for task in tasks for run in task.left}
    assert left and not left & finished
    rules = plan.plan(wide, tasks=tasks)
    stamps = {stamp for rule in rules for stamp in rule.outputs}
    assert not stamps & {task.stamp for task in tasks if not task.left}


# ---- what a start costs (CPU seconds: other work on the machine does not count)


def test_a_second_run_takes_no_3_seconds():
    home = finished_home()
    before = mtimes(home)
    p, seconds = cpu_of(lambda: went(cli(home, *RUN)))
    assert "nothing to do (17 of 17 runs finished)" in p.stdout and mtimes(home) == before
    assert seconds < 3


def test_a_job_with_nothing_to_do_takes_no_3_seconds(tmp_path):
    home = new_home(tmp_path / "home", "data/results")
    p, seconds = cpu_of(lambda: went(cli(home, "job", *BOTH, *SMOKE)))
    assert seconds < 3 and not list(home.glob("data/runs/notebooks/*"))
    assert len(list(home.glob("data/runs/jobs/*.json"))) == 2


def test_what_is_installed_is_asked_without_importing_it(tmp_home):
    code = """import sys
from promptnb.experiments.plan import Request, within_means, tasks_of
from promptnb import collect, tasks
tasks_of(within_means(Request("all", scale="smoke")))
for name in ("cheetah-vel", "ml1-reach", "kitchen", "breakout", "smax-3m"):
    collect.policy_of(tasks.family(name), "medium")
print([m for m in ("jax", "jaxmarl", "metaworld", "ale_py", "torch") if m in sys.modules])"""
    p = subprocess.run([sys.executable, "-c", code], env=env_for(tmp_home), capture_output=True, text=True)
    assert p.stdout.strip() == "[]", p.stdout + p.stderr


def test_kinds_with_a_script_are_named_without_importing_them():
    "The list says what the modules define."
    found = {p.stem for p in (ROOT / "promptnb" / "tasks").glob("*.py") if "\ndef script(" in p.read_text()}
    assert found == tasks.SCRIPTED


# ---- dry runs


@pytest.fixture
def nothing_timed(monkeypatch):
    "No training step may be timed."
    from promptnb.experiments import guided, offline

    for module in (multitask, offline, guided):
        monkeypatch.setattr(module, "step_seconds", lambda *a, **k: pytest.fail("a step was timed"))


@pytest.fixture
def with_times(tmp_home):
    "A workbook with the times that come with the project."
    shutil.copytree(ROOT / "data" / "seconds", tmp_home / "data" / "seconds")
    return tmp_home


def test_dry_runs_of_all_papers_and_scales(with_times, nothing_timed, no_snakemake, capsys, monkeypatch):
    "Each in at most 10 s, all in at most 60 s; none leaves anything, times a step or waits for a lock."
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before, begun = mtimes(with_times), time.process_time()
    with run_lock(with_times / "data" / "runs" / "graph"):
        for paper in recipes.PAPERS:
            for scale in recipes.SCALES:
                start = time.process_time()
                assert command.main(["run", paper, "--scale", scale, "--dry-run"]) == 0, capsys.readouterr()
                assert time.process_time() - start < 10, (paper, scale)
                said = capsys.readouterr().out
                assert "expected: " in said and "unknown" not in said, said
    assert time.process_time() - begun < 60
    assert mtimes(with_times) == before
    assert all("--dry-run" in cmd for cmd in no_snakemake if cmd[0] != "git")


def test_a_dry_run_to_its_end(with_times):
    p = went(cli(with_times, "run", "rladapter", "--scale", "paper", "--dry-run"))
    assert "This was a dry-run" in p.stdout + p.stderr
    assert p.stdout.count("expected: ") == 1 and "timed" not in p.stdout


def test_status_knows_the_time_of_every_exhibit(with_times, nothing_timed, capsys):
    for paper in recipes.PAPERS:
        for scale in recipes.SCALES:
            assert command.main(["status", paper, "--scale", scale]) == 0
            said = capsys.readouterr().out
            assert "expected" in said and "unknown (" not in said, said


def test_a_rate_is_measured_once_a_machine(tmp_home, no_snakemake, monkeypatch, capsys):
    timed = []
    monkeypatch.setattr(multitask, "step_seconds", lambda *a: timed.append(a) or 0.5)

    def call(*more):
        timed.clear()
        assert command.main(["run", PAPER, "--exhibit", "table1", "--family", FAMILY, "--scale", "paper", *more]) == 0
        return len(timed), RATE in capsys.readouterr().out

    assert call("--dry-run") == (0, False)
    assert call() == (2, True)  # two sizes: with prompt, without
    assert call() == (0, True)
    assert call("--dry-run") == (0, True)
    assert call("--dry-run", "--measure") == (2, True)


def test_a_damaged_file_of_rates_is_measured_anew(tmp_home, monkeypatch):
    from promptnb.experiments.forecast import Rates

    monkeypatch.setattr(multitask, "step_seconds", lambda *a: 0.5)
    run = runs(PRETRAIN)[0]
    rates = Rates()
    assert rates(run) == 0.5
    rates.path.write_text(rates.path.read_text().replace("0.5", "9.5"))
    assert Rates(measure="none")(run) is None
    assert Rates()(run) == 0.5


def test_arms_without_a_key_are_left_out_by_name(with_times, no_snakemake, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    names = []
    monkeypatch.setattr(command, "handed_over", lambda rules, *a, **k: names.extend(r.name for r in rules) or 0)
    assert command.main(["run", "rladapter", "--scale", "paper", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "left out: crafter: " in said and "PPO + adapter + decision LM" in said and "OPENAI_API_KEY" in said
    assert any(name.endswith("ppo_s0") for name in names) and not any("decision" in name for name in names)


def test_an_exhibit_of_which_nothing_is_left_is_refused(tmp_home, no_snakemake, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    lacking = [
        e.id
        for e in recipes.exhibits("rladapter")
        if (own := recipes.recipes_of(e, "paper")) and all(plan.lacks(recipes.resolve(r, "paper")) for r in own)
    ]
    for id in lacking:
        assert command.main(["run", "rladapter", "--exhibit", id, "--scale", "paper", "--dry-run"]) == 2
        assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert not no_snakemake


def test_an_empty_list_of_exhibits_means_all(tmp_home):
    "For who calls Snakemake by hand, too."
    asked = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--cores", "1", "-n", "--config"]
    asked += ["paper=rladapter", "scale=smoke", "exhibits="]
    p = subprocess.run(asked, cwd=tmp_home, env=env_for(tmp_home), capture_output=True, text=True)
    every = {rule.name for rule in plan.plan(Request("rladapter", scale="smoke"))}
    assert p.returncode == 0 and len(every) == 16, p.stderr[-2000:]
    assert all(name in p.stdout + p.stderr for name in every)


def test_seed_0_alone_is_not_all_seeds(tmp_home):
    asked = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--cores", "1", "-n", "--config"]
    asked += [f"paper={PAPER}", "scale=laptop", "exhibits=table1", f"families={FAMILY}", "seeds=0"]
    p = subprocess.run(asked, cwd=tmp_home, env=env_for(tmp_home), capture_output=True, text=True)
    said = p.stdout + p.stderr
    assert p.returncode == 0 and f"laptop.{PAPER}.table1.{FAMILY}.tune.s0" in said, said[-2000:]
    assert ".s1" not in said


# ---- one page of all exhibits


def test_report_is_one_page_of_what_has_run(tmp_path):
    home = new_home(tmp_path / "home", "data/results")
    p = went(cli(home, "report", PAPER, *SMOKE))
    page = home / "figures" / "yours" / f"{PAPER}.smoke.html"
    assert p.stdout.endswith(f"report: {page}\n")
    text = page.read_text()
    first = read_json(paths(finished_home())[f"{expected(TUNE)[0][1]}.json"])
    assert "data:image/png;base64" in text and first["rows"][0]["method"] in text
    assert "PARTIAL" in text and "cannot be made" in text
    assert "](../" not in text and 'href="../../nbs/06a_tuners.ranking.ipynb"' in text
    assert "Traceback" not in text
    assert (home / "figures/yours" / PAPER / "smoke/table1.md").exists()


def test_report_of_a_misspelt_paper(tmp_home):
    one_line(cli(tmp_home, "report", "prompt_tuning", *SMOKE), f"did you mean '{PAPER}'?")
