"Jobs without a notebook, on a machine that has torch and little else, and in a given time."

import shutil
import subprocess
import sys
import time

import pytest
from homes import FAMILY, PAPER, SMOKE, env_for, went

from promptnb import bare, collect, core, train
from promptnb import cli as command
from promptnb.experiments import job, plain
from promptnb.experiments.notebook import Stopped

# jobs of one policy each
PRETRAIN, OTHER = (f"{paper}/{FAMILY}/pretrain" for paper in (f"{PAPER}/pdt_fig2", "prompt_diffuser/table1"))

# absent: what plans, shows and tests, and all that these bring along
ABSENT = """papermill snakemake fastcore nbdev execnb ghapi jupyter jupyter_core jupyter_client jupyterlab notebook
nbclient nbformat nbconvert IPython ipykernel ipywidgets traitlets pandas seaborn matplotlib scipy pytest""".split()
SITE = f"""
import importlib.machinery as machinery
absent, real = set({ABSENT}), machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else real(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.fixture
def home(tmp_home):
    "A workbook with what smoke policies are trained on."
    collect.collect(FAMILY, "expert", 4, say=lambda *a: None)
    return tmp_home


def runs(id=PRETRAIN, seed=0):
    return job.runs_of(job.find_job(id), "smoke", seed)


def weights():
    return [core.read_record(run.path)["weights"] for run in runs()]


def test_jobs_without_a_notebook_where_there_is_no_papermill_snakemake_jupyter_fastcore_nbdev(home, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    env = env_for(home)
    env["PYTHONPATH"] = f"{tmp_path}:{env.get('PYTHONPATH', '')}"
    for name in ("papermill", "fastcore", "pandas"):
        tried = subprocess.run([sys.executable, "-c", f"import {name}"], env=env, capture_output=True, text=True)
        assert f"No module named '{name}'" in tried.stderr, "it is not absent"
    words = [f"{PRETRAIN}@0", f"{OTHER}@1"]
    jobs = [sys.executable, "-m", "promptnb", "job", *words, *SMOKE, "--accelerator", "cpu", "--plain"]
    went(subprocess.run(jobs, env=env, cwd=home, capture_output=True, text=True, timeout=300))
    for seed, id in enumerate((PRETRAIN, OTHER)):
        assert all(run.finished for run in runs(id, seed)) and job.stamp(job.find_job(id), seed, "smoke").exists()
    by_plain = weights()
    forget(*runs())
    job.run_job(PRETRAIN, 0, "smoke", "cpu")
    assert weights() == by_plain


def forget(*runs):
    "Remove the records of runs, and all that was trained."
    for run in runs:
        run.path.unlink()
    shutil.rmtree(core.runs_dir() / "policies")


@pytest.mark.fault(3)
def test_minutes_end_at_a_checkpoint_and_the_same_command_goes_on(home, monkeypatch, capsys):
    real = train.step_once

    def slow(*a):
        time.sleep(0.05)
        return real(*a)

    job.run_job(PRETRAIN, 0, "smoke", "cpu")  # first: what it imports and reads does not use up the time
    unbroken = weights()
    forget(*runs())
    with monkeypatch.context() as m, pytest.raises(Stopped, match="goes on from the last checkpoint"):
        m.setattr(train, "step_once", slow)
        plain.plain_jobs([PRETRAIN], scale="smoke", accelerator="cpu", minutes=0.6 / 60)
    said = capsys.readouterr().out
    (run,) = runs()
    assert f"left: {PRETRAIN}@0: 1 of 1 runs\n" in said and not run.failed_path.exists()
    assert list((home / "data" / "runs" / "policies").rglob("step-*.safetensors"))
    plain.plain_jobs([PRETRAIN], scale="smoke", accelerator="cpu")
    assert "going on from step" in capsys.readouterr().out
    assert weights() == unbroken


def test_time_that_is_up_outside_of_a_fit_is_no_failure(home, monkeypatch, capsys):
    def playing(run):
        try:
            plain.os.kill(plain.os.getpid(), plain.signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")

    monkeypatch.setattr(job, "work_on", playing)
    with pytest.raises(Stopped):
        plain.plain_jobs([PRETRAIN], scale="smoke", accelerator="cpu")
    assert "1 of 1 runs" in capsys.readouterr().out and not any(run.failed_path.exists() for run in runs())


def test_what_breaks_every_run_of_a_job_is_said_once(tmp_home):
    "Of data that were never collected, the remedy; each run's log has it."
    id = f"{PAPER}/table1/{FAMILY}/tune"
    jobs = [sys.executable, "-m", "promptnb", "job", f"{id}@0", f"{id}@1", *SMOKE, "--accelerator", "cpu", "--plain"]
    done = subprocess.run(jobs, env=env_for(tmp_home), cwd=tmp_home, capture_output=True, text=True, timeout=300)
    said, remedy = done.stderr.partition("promptnb: ")[0], "is not here: promptnb collect"
    first, *others = runs(id)
    assert done.returncode == 2 and said.count(remedy) == 2  # once a seed, as each is a job
    assert f"{first.id}: failed: dataset" in said and len(others) > 3
    assert all(f"{run.id}: failed as {first.id} did\n" in said for run in others)
    for run in (first, *others):
        assert remedy in core.read_json(run.failed_path)["why"] and remedy in job.log_path(run).read_text()


def test_a_job_that_fails_does_not_keep_the_next(home, monkeypatch, refused, capsys):
    seen = []

    def breaks(run):
        seen.append(run.seed)
        raise ValueError("broken")

    monkeypatch.setattr(job, "work_on", breaks)
    words = [f"{PRETRAIN}@0", f"{PRETRAIN}@1"]
    refused(plain.plain_jobs, words, scale="smoke", accelerator="cpu", says=["1 of 1 runs", "broken"])
    assert sorted(set(seen)) == [0, 1]


@pytest.mark.parametrize(
    "args, says",
    [
        (("--minutes", "5"), "--minutes is of --plain"),
        (("--plain", "--minutes", "0"), "--minutes is 0, but must be above 0"),
        (("--plain", "-p", "seed=1"), "-p seed=1 is a notebook's parameter"),
        (("--plain", "--time-limit", "600"), "--time-limit is of a notebook's cells"),
        (("--plain", "--accelerator", "gpu"), "unknown accelerator 'gpu'"),
        (("--plain", "--threads", "0"), "'threads' is 0"),
    ],
)
def test_wrong_arguments_are_one_line(args, says, tmp_home, capsys):
    assert command.main(["job", PRETRAIN, *SMOKE, *args]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("promptnb: ") and said.count("\n") == 1


class Square:
    side = 3


def test_the_stand_in_patches_as_fastcore_does():
    from fastcore.basics import patch

    for own in (patch, bare.patch):

        @own
        def area(self: Square):
            return self.side**2

        @own(as_prop=True)
        def perimeter(self: Square):
            return 4 * self.side

        assert (Square().area(), Square().perimeter, area, perimeter) == (9, 12, None, None)
        del Square.area, Square.perimeter
