"Workbooks for tests: homes of their own, the console script, one finished smoke run that all share, made-up records."

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from promptnb import recipes, tasks
from promptnb.core import code_fingerprint
from promptnb.experiments import job
from promptnb.experiments.run import Run

ROOT = Path(__file__).resolve().parent.parent
PAPER, FAMILY = "prompt_tuning_dt", "cheetah-dir"
SMOKE = ("--scale", "smoke")
PRETRAIN, TUNE = (f"{PAPER}/table1/{FAMILY}/{kind}" for kind in ("pretrain", "tune"))
RUN = ("run", PAPER, "--exhibit", "table1", "--family", FAMILY, *SMOKE)
METHODS = [r.method for r in recipes.recipes_of(recipes.EXHIBITS[PAPER, "table1"]) if r.family == FAMILY]
DRAWN = ("table1", "fig3", "pdt_fig2")
# what collecting leaves: tests that need data take it from the finished home
DATA = ("data/minari", "data/runs/collect")


# ---- homes


def new_home(home, *more):
    "A workbook in the folder `home`: what is read at run time, and what `more` names in the finished one."
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", ".snakemake", ".lock", ".holder")
    for name in ("nbs", "workflow", "data/experts", "data/reported"):
        shutil.copytree(ROOT / name, home / name, ignore=ignore)
    shutil.copy(ROOT / "settings.ini", home)
    for name in more:
        shutil.copytree(finished_home() / name, home / name, ignore=ignore, dirs_exist_ok=True)
    return home


@functools.cache
def _finished():
    tmp = Path(tempfile.mkdtemp(prefix="promptnb-smoke-"))
    atexit.register(shutil.rmtree, tmp, ignore_errors=True)
    home = new_home(tmp / "home")
    return home, cli(home, *RUN, "--cores", 2)


def finished_home():
    "One unbroken smoke run of table1 on cheetah-dir, shared by all tests: read it, copy from it, do not write to it."
    home, p = _finished()
    went(p)
    return home


@functools.cache
def drawn_home():
    "A copy of it with three exhibits rendered: (folder of the exhibits' files, what was printed)."
    home = new_home(finished_home().parent / "drawn", "data/results")
    asked = [x for e in DRAWN for x in ("--exhibit", e)]
    p = went(cli(home, "render", PAPER, *SMOKE, "--partial", *asked))
    return home / "figures" / "yours" / PAPER / "smoke", p.stdout


def paths(home):
    "{file name: path} of the records in a home."
    return {p.name: p for p in (home / "data" / "results" / PAPER).glob("*.json")}


def runs(*job_ids, scale="smoke"):
    "The runs of jobs; by default, those of the finished home."
    return [run for j in job_ids or (PRETRAIN, TUNE) for run in job.runs_of(job.find_job(j), scale, 0)]


def expected(*job_ids, scale="smoke"):
    "The (recipe, run name) pairs that jobs leave; by default, those of the finished home."
    return [(run.recipe, run.id) for run in runs(*job_ids, scale=scale)]


# ---- the console script


@functools.cache
def scratch():
    "Where commands put temporary files, which a killed one leaves. A short name: sockets lie there."
    tmp = tempfile.mkdtemp(prefix="pnb")
    atexit.register(shutil.rmtree, tmp, ignore_errors=True)
    return tmp


def env_for(home, **more):
    "The environment of a command on that workbook: one thread, nothing of the user's."
    env = {k: v for k, v in os.environ.items() if k not in ("MINARI_DATASETS_PATH", "IN_TEST")}
    threads = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return {**env, "PROMPTNB_HOME": str(home), "TMPDIR": scratch(), **threads, **more}


def cli(home, *args, timeout=600, **env):
    "The console script, in a process of its own, to its end."
    script = str(Path(sys.executable).with_name("promptnb"))
    command = [script, *map(str, args)]
    return subprocess.run(command, cwd=home, env=env_for(home, **env), capture_output=True, text=True, timeout=timeout)


def kill_tree(run):
    "kill -9 of a process that was started, and of all below it."
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            os.kill(process.pid, signal.SIGKILL)
    run.wait()


def went(p):
    "The finished process, which must have succeeded."
    assert p.returncode == 0, p.stdout[-500:] + p.stderr[-1500:]
    return p


def one_line(p, *says):
    "A command that refused: status 2, and one line beginning with promptnb:, the last, which has all of `says`."
    lines = p.stderr.splitlines()
    assert p.returncode == 2 and "Traceback" not in p.stderr, p.stdout[-500:] + p.stderr[-1500:]
    assert [line.startswith("promptnb:") for line in lines].count(True) == 1, p.stderr[-1500:]
    assert lines[-1].startswith("promptnb:"), p.stderr[-1500:]
    assert all(s in lines[-1] for s in says), lines[-1]
    return lines[-1]


# ---- made-up records


def made_of(r):
    "What a record says of the code and facts behind it, as if today's had made it."
    facts = "" if r.online else tasks.facts(r.family)
    return dict(code=dict(modules=["core"], fingerprint=code_fingerprint("core")), facts=facts)


def ramp(r, seed, i):
    "A return that differs between seeds and tasks."
    return 100.0 * seed + i


def fabricate(home, e, scale, seeds, value=ramp, status="ok", rows=True, **changed):
    "Records of an exhibit as if it had been run: return `value` on each test task."
    for full in recipes.recipes_of(e):
        r = recipes.resolve(full, scale)
        for seed in seeds:
            name = Run(r, scale, seed).id
            known = dict(paper=e.paper, task=r.family, method=r.method, seed=seed, scale=scale, run_id=name)
            known |= dict(step=0, n_episodes=1, trainable=1, env_steps=0)
            own = []
            if rows:
                test = tasks.family(r.family).test
                own = [dict(known, task_id=i, metric="return", value=value(r, seed, i)) for i in test]
            record = dict(run_id=name, status=status, why="", recipe_digest=recipes.digest(r), **made_of(r))
            where = dict(commit="-", threads=1)
            record |= dict(recipe=dict(family=r.family), rows=own, seconds=1.0, where=where, **changed)
            path = home / "data" / "results" / e.paper / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
