"The fault list is whole, and its page says so; rows of it that need a command of their own."

import json
import os
import shutil
import subprocess
import sys

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
from test_resume import end, same_records, start, wait_for, weights

from promptnb import collect, tasks
from promptnb.core import read_json


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


def unrecorded_home(folder):
    "Trained policies with their checkpoints, but without what was made after the last one: weights and records."
    home = new_home(folder, *DATA, "data/runs/policies")
    for policy in home.glob("data/runs/policies/*/policy"):
        shutil.rmtree(policy)
    return home


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


# ---- row 19: an environment that misbehaves

FAULTY = """
    def step(self, action):
        self.t += 1
        what = os.environ.get("SLIDE", "sound")
        if what == "mixed":
            what = ("sound", "raises", "nan", "shape", "reward")[int(1e6 * abs(self.first)) % 5]
        if what == "raises" and self.t == 4:
            raise RuntimeError("the belt\\nbroke")
        state, reward, *others = self.sound_step(action)
        if what == "nan" and self.t == 5:
            state[0] = np.nan
        if what == "shape" and self.t == 6:
            state = np.zeros((2, 2), np.float32)
        return state, "much" if what == "reward" and self.t == 7 else reward, *others

    def sound_step(self, action):
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    "A study whose world never ends by itself, and misbehaves as the variable SLIDE says: (home, environment)."
    tmp = tmp_path_factory.mktemp("slide")
    home = new_home(tmp / "home")
    went(cli(home, "new", tmp / "slide"))
    world = tmp / "slide" / "world.py"
    text = world.read_text().replace("    def step(self, action):\n", FAULTY).replace(", max_episode_steps=30)", ")")
    text = text.replace(
        "        return np.float32(self.state), {}\n", "        self.t, self.first = 0, self.state[0]\n\\g<0>"
    )
    text = text.replace("\\g<0>", "        return np.float32(self.state), {}\n").replace(
        "import gym", "import os\n\nimport gym", 1
    )
    world.write_text(text.replace('    "Slide-v0",\n', '    "Slide-v0",\n    horizon=30,\n'))
    with open(tmp / "slide" / "__init__.py", "a") as f:
        f.write("from promptnb.recipes import scales\n\nscales.SMOKE['Recipe']['eval_episodes'] = 8\n")
    env = dict(PROMPTNB_PLUGINS=str(tmp / "slide"))
    went(cli(home, "collect", "--family", "slide", *SMOKE, **env))
    return home, env


def slide_records(home, seed):
    "The records of the study's two rows."
    return [read_json(home / f"data/results/slide/smoke.slide.{key}.s{seed}.json") for key in ("prompted", "nudged")]


@pytest.mark.fault(19)
def test_an_environment_that_misbehaves_fails_its_episodes(slide):
    "It raises, gives NaN, another shape, a reward that is no number: the other episodes are measured, and it is said."
    home, env = slide
    went(cli(home, "run", "slide", *SMOKE, "--cores", 1, **env, SLIDE="mixed"))
    for rec in slide_records(home, 0):
        returns = [w for w in rec["rows"] if w["metric"] == "return"]
        lengths = [w for w in rec["rows"] if w["metric"] == "length"]
        assert rec["status"] == "ok" and len(returns) == 2
        good = sum(w["n_episodes"] for w in returns)
        assert 2 <= good < 16 and all(np.isfinite(w["value"]) for w in returns)
        assert {w["value"] for w in lengths} == {30.0}  # an episode that never ends is capped
        assert rec["remarks"]["with failed episodes"].startswith(f"{16 - good} of 16: ")
    said = went(cli(home, "status", "slide", *SMOKE, **env)).stdout
    assert "2 with failed episodes" in said
    said = went(cli(home, "render", "slide", *SMOKE, **env)).stdout
    assert "1 with failed episodes" in said and "of the runs, 2 with failed episodes" in said


@pytest.mark.long
@pytest.mark.fault(19)
def test_an_environment_that_always_raises_fails_the_run_with_its_reason(slide):
    home, env = slide
    p = cli(home, "run", "slide", *SMOKE, "--seeds", 1, "--cores", 1, **env, SLIDE="raises")
    assert p.returncode == 2 and "not everything ran" in p.stderr.splitlines()[-1] and "Traceback" not in p.stderr
    why = read_json(home / "data/results/slide/smoke.slide.prompted.s1.failed.json")["why"]
    assert why.startswith("all episodes of a task failed: RuntimeError: the belt (world.py:")
    assert not list((home / "data/results/slide").glob("smoke.slide.*.s1.json"))


# ---- row 27: a clock that jumps back, two hosts on one folder


BACKWARDS = """
now = [time.time()]
def backwards():
    now[0] -= 100
    return now[0]
time.time = backwards
"""


@pytest.mark.fault(27)
def test_a_clock_that_jumps_back(tmp_path):
    "The newest checkpoint is that of the highest step, whatever the files' times; no time of a record is negative."
    home = unrecorded_home(tmp_path / "home")
    for path in home.glob("data/runs/policies/*/step-*"):
        step = int(path.stem.removeprefix("step-"))
        os.utime(path, (2e9 - step, 2e9 - step))
    env = patched(tmp_path / "shim", BACKWARDS)
    p = went(cli(home, "job", PRETRAIN, *SMOKE, **env))
    assert p.stdout.count(": step 20,") == 3 and ": step 5," not in p.stdout, p.stdout
    same_records(home, [f"{name}.json" for _, name in expected(PRETRAIN)])
    assert all(read_json(path)["seconds"] >= 0 for path in paths(home).values())


HOST = """
import platform
platform.node = lambda: {host!r}
"""
NAME = "m.process_name = lambda pid=None: '4242@' + m.HOST"
WAITS = """
    if IN_KERNEL:
        step = m.step_once
        def step_once(*a):
            (HERE / "standing").touch()
            while not (HERE / "go").exists():
                time.sleep(0.05)
            return step(*a)
        m.step_once = step_once
"""


@pytest.mark.fault(27)
def test_two_hosts_on_one_folder(tmp_path):
    "With the same process number on both: locks and temporary files name the host, and neither sweeps the other's."
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    a = patched(tmp_path / "a", HOST.format(host="node-a.x"), promptnb__core=NAME, promptnb__train=WAITS)
    b = patched(tmp_path / "b", HOST.format(host="node-b.x"), promptnb__core=NAME)
    p = start(home, log, "job", PRETRAIN, *SMOKE, **a)
    try:
        wait_for((tmp_path / "a" / "standing").exists, p, log)
        (mine,) = home.rglob("*.4242@node-a*.tmp.ipynb")
        one_line(cli(home, "job", PRETRAIN, *SMOKE, **b), "in use by process 4242@node-a.x-")
        went(cli(home, "job", PRETRAIN, *SMOKE, "--seed", 1, **b))
        assert mine.exists()
        (tmp_path / "a" / "go").touch()
        assert p.wait(timeout=200) == 0, log.read_text()[-3000:]
    finally:
        end(p)
    assert not mine.exists()
    same_records(home, [f"{name}.json" for _, name in expected(PRETRAIN)])
    assert len(weights(home)) == 6 and weights(finished_home()).items() <= weights(home).items()


# ---- row 20: the same seed twice, in processes of their own

PLAYED = """
import hashlib, json, sys, warnings
import gymnasium as gym
import numpy as np
from promptnb import collect, tasks
from promptnb.core import PromptnbError

warnings.simplefilter("ignore")
draw, names = sys.argv[1] == "draw", sys.argv[2].split(",")

def played(make, steps=12):
    env, digest = make(), hashlib.sha256()
    for episode in range(2):
        obs, _ = env.reset(seed=episode + 5)
        env.action_space.seed(episode)
        for t in range(steps):
            digest.update(np.ascontiguousarray(obs).tobytes())
            if draw and t % 4 == 1:
                env.render()
            obs, reward, ended, cut, _ = env.step(env.action_space.sample())
            digest.update(np.array([reward, ended, cut], float).tobytes())
            if ended or cut:
                break
    env.close()
    return digest.hexdigest()

def maker(name):
    if name == "crafter":
        from promptnb.tasks.crafter import Crafter
        return Crafter
    fam = tasks.family(name)
    return lambda: gym.make(fam.env_id, task=fam.test[0], render_mode="rgb_array", **tasks._camera(fam, 64))

for name in names:
    try:
        print(name, played(maker(name)))
    except (PromptnbError, ModuleNotFoundError) as e:
        print(name, "absent:", e)
"""


def played_in_a_process(what, names, hashes):
    "{family: digest of what two short episodes show} of a new process; what: 'draw' pictures between steps, or not."
    env = dict(os.environ, PYTHONHASHSEED=str(hashes))
    p = went(
        subprocess.run([sys.executable, "-c", PLAYED, what, ",".join(names)], env=env, capture_output=True, text=True)
    )
    return dict(line.split(" ", 1) for line in p.stdout.splitlines())


QUICK = [name for name, fam in tasks.FAMILIES.items() if fam.kind in ("control", "locomotion")]
SLOW = [name for name in tasks.FAMILIES if name not in QUICK]


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "names", [[*QUICK, "crafter"], pytest.param(SLOW, marks=pytest.mark.long)], ids=["quick ones", "the others"]
)
def test_two_processes_play_alike_with_and_without_pictures(names):
    drawn, plain = played_in_a_process("draw", names, 1), played_in_a_process("plain", names, 2)
    assert drawn == plain and drawn.keys() == {*names}
    assert len({*drawn.values()}) == len(names)


@pytest.mark.long
@pytest.mark.fault(20)
def test_two_commands_collect_the_same(tmp_path):
    "Datasets of two processes have the same hashes, though one of them has drawn its page before the second."
    found = []
    for k, page in enumerate(([], ["--page"])):
        home = new_home(tmp_path / str(k))
        for quality in ("expert", "random"):
            args = ("--family", "cheetah-dir", "--quality", quality, "--episodes", 2, *page)
            went(cli(home, "collect", *args, PYTHONHASHSEED=str(k)))
        manifest = collect.manifest("cheetah-dir", home / "data" / "minari")
        found.append({id_: (entry["columns"], entry["sha256"]) for id_, entry in manifest.items()})
    assert found[0] == found[1] and len(found[0]) == 4
