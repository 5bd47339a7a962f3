"Kill -9 anywhere, run the same command again: the same weights, the same records, and nothing done twice."

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from homes import (
    DATA,
    PAPER,
    PRETRAIN,
    RUN,
    SMOKE,
    cli,
    env_for,
    expected,
    finished_home,
    new_home,
    one_line,
    paths,
    went,
)
from shims import patched

from promptnb import recipes
from promptnb.core import PromptnbError, read_json, run_lock, sha256_file
from promptnb.experiments import job, multitask
from promptnb.experiments.run import Run

OTHER = "prompt_diffuser"  # it starts from the same policies

# ---- helpers: a process that is killed at a chosen place is a process with one function patched from outside

KILL_AT = """
    todo, step, save = HERE / "todo", m.step_once, m.Checkpoints.save
    def at(point):
        left = todo.read_text().split()
        if left and left[0] == point:
            todo.write_text(" ".join(left[1:]))
            kill_all()
    def step_once(model, opt, batch, t, *a):
        at(str(t))
        return step(model, opt, batch, t, *a)
    def saved(self, t, *a, **k):
        save(self, t, *a, **k)
        at("saved")
    m.step_once, m.Checkpoints.save = step_once, saved
"""
SLOW = """
    step = m.step_once
    def step_once(*a):
        time.sleep(0.1)
        return step(*a)
    m.step_once = step_once
"""
STAND = """
    step = m.step_once
    def step_once(*a):
        (HERE / "standing").write_text(str(os.getpid()))
        while not (HERE / "go").exists():
            time.sleep(0.05)
        return step(*a)
    m.step_once = step_once
"""


def shim(folder, body, module="promptnb.train"):
    "The environment that puts `body` after the module's own code, in kernels."
    return patched(folder, **{module: f"if IN_KERNEL:\n{body}"})


def start(home, log, *args, **env):
    "A command in a process group of its own."
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("promptnb")), *args],
        cwd=home,
        env=env_for(home, **env),
        stdout=open(log, "ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill_group(p):
    "kill -9 of a process and of all that it started in its group."
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()


def end(p):
    "At the end of a test: nothing that it started goes on. (A kernel notices within a second that its parent is gone.)"
    if p.poll() is None:
        kill_group(p)


def wait_for(seen, p, log, seconds=300):
    "Until `seen` says so; the test fails if the process ends before, or takes too long."
    late = time.monotonic() + seconds
    while not seen():
        if p.poll() is not None or time.monotonic() > late:
            end(p)
            pytest.fail(Path(log).read_text()[-4000:])
        time.sleep(0.02)


def weights(home):
    "Policy -> hash of its weights."
    return {p.parent.parent.name: sha256_file(p) for p in home.glob("data/runs/policies/*/policy/model.safetensors")}


def mtimes(home, keep=lambda p: True):
    "File -> when it was written, of the data of a workbook, locks apart."
    return {
        p: p.stat().st_mtime_ns
        for p in (home / "data").rglob("*")
        if p.is_file() and p.name not in (".lock", ".holder") and p.suffix != ".tmp" and keep(p)
    }


def same_records(home, names):
    "The records of a workbook are those of the unbroken run, but for times and places."
    for name in names:
        a, b = (read_json(paths(h)[name]) for h in (finished_home(), home))
        for k in a | b:
            assert k in ("seconds", "spent", "where", "hash") or a.get(k) == b.get(k), f"{name}: {k}"


# ---- one optimisation, killed in 20 places (in process: the exception is no Exception, nothing may catch it)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def small():
    """fit(folder, callback) of the smoke policy of cheetah-dir: 20 steps, a checkpoint each 5, a loss each 3.

    It returns (weights, losses).
    """
    from promptnb import data
    from promptnb.train import FitConfig, fit

    r = recipes.resolve(recipes.RECIPES[job.find_job(PRETRAIN).recipes[-1]], "smoke")
    p = r.pretrain
    store = data.load("cheetah-dir", p.quality, None, p.episodes, root=finished_home() / "data" / "minari")
    stats = data.state_stats(store)

    def run(folder, callback=None):
        policy = multitask.new_policy(p, stats, 0)
        sampler = data.Sampler(
            store, *stats, policy.rtg_scale, p.K, p.per_task, p.tasks_per_batch, p.J, p.H, p.position, seed=1
        )
        log = fit(
            policy.model,
            sampler,
            FitConfig(20, p.lr, p.weight_decay, p.warmup, p.clip, 2, checkpoint_every=5, log_every=3),
            folder,
            store.hashes,
            callback=callback,
        )
        return [x.tolist() for x in policy.model.state_dict().values()], [tuple(x) for x in log.losses]

    return run


def before_step(monkeypatch, at, do):
    "Let `do` happen before update `at`."
    from promptnb import train

    step = train.step_once

    def step_once(model, opt, batch, t, *a):
        if t == at:
            do()
        return step(model, opt, batch, t, *a)

    monkeypatch.setattr(train, "step_once", step_once)


def die():
    raise Killed


def test_killed_at_20_random_steps(small, tmp_path, monkeypatch):
    whole, rng = small(tmp_path / "whole"), random.Random(0)
    for k in range(20):
        at = rng.randrange(20)
        with monkeypatch.context() as m, pytest.raises(Killed):
            before_step(m, at, die)
            small(tmp_path / str(k))
        assert small(tmp_path / str(k)) == whole, f"killed at step {at}"


@pytest.mark.parametrize("at", [5, 20])
def test_killed_between_a_checkpoint_and_what_follows_it(small, tmp_path, at):
    "What the callback does at a checkpoint is done, at least once, however the run was broken."
    done, alive = [], True

    def callback(t):
        nonlocal alive
        if t == at and alive:
            alive = False
            raise Killed  # before anything is done
        done.append(t)

    with pytest.raises(Killed):
        small(tmp_path / "run", callback)
    assert done == list(range(5, at, 5))
    small(tmp_path / "run", callback)
    assert set(done) == {5, 10, 15, 20}


@pytest.mark.parametrize("at", [4, 7])
def test_told_to_stop(small, tmp_path, monkeypatch, at):
    "SIGTERM writes a checkpoint; the run that goes on ends as an unbroken one."
    from promptnb import train

    whole = small(tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(train.Interrupted, match=f"at step {at + 1}"):
        before_step(m, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        small(tmp_path / "run")
    points = []
    assert small(tmp_path / "run", points.append) == whole
    assert set(points) >= {10, 15, 20}


# ---- the job, killed inside its kernel


@pytest.mark.fault(1)
def test_job_killed_at_random_steps(tmp_path):
    "And once after a checkpoint was written: weights and records are those of an unbroken run."
    home, log, rng = new_home(tmp_path / "home", *DATA), tmp_path / "log", random.Random(7)
    pretrain = recipes.SCALES["smoke"]["Pretrain"]
    steps, every = pretrain["steps"], pretrain["steps"] // pretrain["curve_points"]
    assert every < steps, "smoke runs need a checkpoint before the last one"
    points = [str(rng.randrange(every, steps)), "saved", str(rng.randrange(1, steps)), str(rng.randrange(1, steps))]
    env = shim(tmp_path / "shim", KILL_AT)
    todo = tmp_path / "shim" / "todo"
    todo.write_text(" ".join(points))

    def one_try():
        return start(home, log, "job", PRETRAIN, "--seed", "0", *SMOKE, **env).wait(timeout=300)

    assert [one_try() for _ in points] == [-signal.SIGKILL] * len(points), log.read_text()[-4000:]
    assert not todo.read_text()
    assert one_try() == 0, log.read_text()[-4000:]
    assert "going on from step" in log.read_text()
    assert weights(home) == weights(finished_home()) and len(weights(home)) == 3
    same_records(home, [f"{n}.json" for _, n in expected(PRETRAIN)])


# ---- the graph, killed from outside


@pytest.mark.fault(18)
def test_run_killed_as_a_group(tmp_path):
    """Twice: while policies are trained, while they are tuned.

    What was finished stays untouched; the end is that of an unbroken run.
    """
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    command = (*RUN, "--cores", "1")

    def finished():
        return mtimes(home, lambda p: p.parent == home / "data" / "results" / "prompt_tuning_dt")

    def killed_once(seen, **env):
        p = start(home, log, *command, **env)
        wait_for(seen, p, log)
        kill_group(p)
        return finished()

    def trains():
        return len(finished()) >= 1 and len(list(home.glob("data/runs/policies/*/step-*.json"))) >= 3

    first = killed_once(trains, **shim(tmp_path / "slow", SLOW))
    assert 1 <= len(first) < 3
    second = killed_once(lambda: len(finished()) >= 6)
    assert first.items() <= second.items() and len(second) < len(expected())
    log.write_text("")
    assert start(home, log, *command).wait(timeout=600) == 0, log.read_text()[-4000:]
    third = finished()
    assert second.items() <= third.items() and len(third) == len(expected())
    assert "pretrain" not in log.read_text()
    assert weights(home) == weights(finished_home())
    same_records(home, paths(finished_home()))
    assert not [p for p in home.rglob("*.failed.*")]


def test_second_run_does_nothing():
    home = finished_home()
    before = mtimes(home)
    p = went(cli(home, *RUN))
    assert "nothing to do" in p.stdout and mtimes(home) == before


def training(home):
    "Has a policy trained long enough to have a checkpoint?"
    return bool(list(home.glob("data/runs/policies/*/step-*.json")))


def of_owner(pid):
    "The processes that a `promptnb run` of this number has started and that still live."
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            owner = process.environ().get("PROMPTNB_OWNER", "")
            if owner.rsplit(" ", 2)[1:2] == [str(pid)] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def none_left(pid, seconds):
    "Whether all of them end within so many seconds."
    late = time.monotonic() + seconds
    while time.monotonic() < late and of_owner(pid):
        time.sleep(0.1)
    return not of_owner(pid)


@pytest.mark.fault(3)
def test_a_job_told_to_stop_writes_a_checkpoint(tmp_path):
    "SIGTERM to `promptnb job`: a checkpoint, status 75, no failed record; then it goes on from there."
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    p = start(home, log, "job", PRETRAIN, *SMOKE, **shim(tmp_path / "slow", SLOW))
    wait_for(lambda: training(home), p, log)
    p.terminate()
    assert p.wait(timeout=40) == 75, log.read_text()[-4000:]
    assert "the same command goes on from the last checkpoint" in log.read_text()
    assert not list(home.rglob("*.failed.*")) and not list(home.rglob("*.tmp*"))
    log.write_text("")
    assert start(home, log, "job", PRETRAIN, *SMOKE).wait(timeout=300) == 0, log.read_text()[-4000:]
    assert "going on from step" in log.read_text()
    assert weights(home) == weights(finished_home())
    same_records(home, [f"{n}.json" for _, n in expected(PRETRAIN)])


@pytest.mark.fault(18)
@pytest.mark.parametrize("who", ["run", pytest.param("snakemake", marks=pytest.mark.long)])
def test_one_of_the_graph_killed_alone(tmp_path, who):
    "What it had started writes a checkpoint and ends; the same command then goes on to the end of an unbroken run."
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    p = start(home, log, *RUN, "--cores", "1", **shim(tmp_path / "slow", SLOW))
    wait_for(lambda: training(home), p, log)
    (snakemake,) = psutil.Process(p.pid).children()
    (psutil.Process(p.pid) if who == "run" else snakemake).kill()
    p.wait(timeout=60)
    assert none_left(p.pid, 10), of_owner(p.pid)
    log.write_text("")
    assert start(home, log, *RUN, "--cores", "1").wait(timeout=600) == 0, log.read_text()[-4000:]
    assert "going on from step" in log.read_text()
    assert weights(home) == weights(finished_home())
    same_records(home, paths(finished_home()))


# ---- two at once


def test_two_jobs_at_once(tmp_path):
    "Two kernels started in the same moment in the same folder do not meet, and leave no sockets behind."
    home, logs = new_home(tmp_path / "home", *DATA), [tmp_path / "0", tmp_path / "1"]
    files = set(home.iterdir())
    ps = [start(home, log, "job", PRETRAIN, "--seed", str(seed), *SMOKE) for seed, log in enumerate(logs)]
    try:
        codes = [p.wait(timeout=180) for p in ps]
    finally:
        for p in ps:
            end(p)
    assert codes == [0, 0], "".join(log.read_text()[-1500:] for log in logs)
    assert len(weights(home)) == 6 and weights(finished_home()).items() <= weights(home).items()
    assert set(home.iterdir()) == files


@pytest.mark.fault(4)
def test_second_process_on_the_same_job_is_refused(tmp_path):
    "It names the holder and writes nothing; when the holder is killed, the lock is gone with it."
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    env = shim(tmp_path / "shim", STAND)
    p = start(home, log, "job", PRETRAIN, *SMOKE, **env)
    try:
        wait_for((tmp_path / "shim" / "standing").exists, p, log)
        kernel = int((tmp_path / "shim" / "standing").read_text())
        before = mtimes(home)
        said = one_line(cli(home, "job", PRETRAIN, *SMOKE), "in use by process")
        assert any(f"process {x}" in said for x in (p.pid, kernel))
        assert mtimes(home) == before and not paths(home)
    finally:
        end(p)
    went(cli(home, "job", PRETRAIN, *SMOKE))
    assert weights(home) == weights(finished_home())


@pytest.mark.fault(4)
def test_second_graph_is_refused(tmp_path):
    home = new_home(tmp_path / "home")
    with run_lock(home / "data" / "runs" / "graph" / PAPER):
        one_line(cli(home, *RUN), f"in use by process {os.getpid()}")


@pytest.mark.parametrize("args", [("status", PAPER, *SMOKE), (*RUN, "--dry-run"), ("run", OTHER, *SMOKE, "--dry-run")])
def test_others_may_look_while_a_graph_runs(tmp_path, args):
    home = new_home(tmp_path / "home")
    with run_lock(home / "data" / "runs" / "graph" / PAPER):
        before = mtimes(home)
        went(cli(home, *args))
        assert mtimes(home) == before


def test_two_papers_train_a_policy_that_both_want_once(tmp_path, monkeypatch):
    "At the same time: the second waits for the first, and each has its record."
    from promptnb import train

    monkeypatch.setenv("PROMPTNB_HOME", str(new_home(tmp_path / "home", *DATA)))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    step, updates = train.step_once, []

    def step_once(*a):
        updates.append(a)
        return step(*a)

    monkeypatch.setattr(train, "step_once", step_once)
    first, second = (recipes.resolve(recipes.RECIPES[f"{paper}/cheetah-dir/pdt"], "smoke") for paper in (PAPER, OTHER))
    runs = [Run(r, "smoke").pretraining() for r in (first, second)]
    assert first.pretrain == second.pretrain and runs[0].path != runs[1].path
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(multitask.pretrain, runs))
    assert len(updates) == first.pretrain.steps
    a, b = (read_json(run.path) for run in runs)
    assert a["weights"] == b["weights"] and a["folder"] == b["folder"] and all(run.finished for run in runs)


@pytest.mark.long
def test_two_papers_run_at_once(tmp_path):
    "From nothing: data and a policy that both want are made once, and both end as they would alone."
    home, logs = new_home(tmp_path / "home"), [tmp_path / "0", tmp_path / "1"]
    other = ("run", OTHER, "--exhibit", "conflict", "--family", "cheetah-dir", *SMOKE)
    ps = [start(home, log, *args, "--cores", "1") for log, args in zip(logs, (RUN, other), strict=True)]
    try:
        codes = [p.wait(timeout=900) for p in ps]
    finally:
        for p in ps:
            end(p)
    said = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], said[-4000:]
    assert said.count("cheetah-dir expert: 2 of 2 datasets written") == 1
    assert weights(home).items() >= weights(finished_home()).items()
    same_records(home, paths(finished_home()))
    alone = new_home(tmp_path / "alone", *DATA)
    went(cli(alone, *other))
    for path in (alone / "data" / "results" / OTHER).glob("*.json"):
        assert read_json(path)["rows"] == read_json(home / "data" / "results" / OTHER / path.name)["rows"]


def test_a_dead_holder_is_taken_over(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".holder").write_text("999999")
    with run_lock(tmp_path):
        with pytest.raises(PromptnbError, match=f"process {os.getpid()}"), run_lock(tmp_path):
            pass
