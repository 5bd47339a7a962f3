"""Slurm, used: daemons of this test's own on this host, and the real command line.

Skipped where slurm-wlm or Snakemake's plug-in for it is not installed (apt-get install slurm-wlm; pip install
"promptnb[slurm]"). Every job here is of one small study, a plug-in: two policies on hopper."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import slurm_host
from homes import ROOT, cli, env_for, new_home, one_line, went
from test_resume import end, start, wait_for

from promptnb import cli as command_line
from promptnb.core import read_json

STUDY = """
import sys
import time
from pathlib import Path

from promptnb import recipes as rc

HERE = Path(__file__).parent
OFFLINE = rc.Offline(learner="bc", quality="medium", episodes=4, steps=60, points=2)
RECIPES = {r.id: r for r in (rc.Recipe("tiny", "hopper", key, key, None, seeds=(0,), offline=OFFLINE, eval_episodes=1)
                             for key in ("one", "two"))}
EXHIBIT = rc.Exhibit("tiny", "both", "Two small policies", "they end", "table", tuple(RECIPES), ("hopper",))
rc.add(rc.Paper("tiny", "A study for tests", {"both": EXHIBIT}, RECIPES))

if "ipykernel_launcher" in " ".join(sys.orig_argv):
    from promptnb import train

    step = train.step_once

    def step_once(*a):
        if (HERE / "fails").exists():
            raise RuntimeError("the card fell off the bus")
        time.sleep(1 if (HERE / "slow").exists() else 0)
        return step(*a)

    train.step_once = step_once
"""
OFTEN = """
import importlib.util, sys

class Hook:
    "Snakemake asks Slurm every second, where it would wait for longer and longer."
    def find_spec(self, name, path=None, target=None):
        if name != "snakemake_executor_plugin_slurm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(m):
            load(m)
            m.Executor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""
HIDDEN = """
import importlib.util

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.startswith("snakemake_executor_plugin_") else found(name, *a)
"""
RUN = ("run", "tiny", "--scale", "smoke", "--profile", "slurm")


# ---- profiles that cannot work


def without_plugins(tmp_path):
    "The environment of a machine that has none of Snakemake's plug-ins."
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    return dict(PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))


def test_a_profile_without_its_plugin_says_what_to_install(tmp_path):
    home = new_home(tmp_path / "home")
    p = cli(home, "run", "lamo", "--scale", "smoke", "--profile", "slurm", **without_plugins(tmp_path))
    one_line(p, 'pip install "promptnb[slurm]"')
    assert not (home / "data" / "runs").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("executor: kubernetes", 'pip install "promptnb[kubernetes]"'),
        ("executor: flux", "pip install snakemake-executor-plugin-flux"),
        (None, "profile 'mine' has no config.yaml"),
        ("executor: [", "mine/config.yaml cannot be read"),
        ("slurm", "holds no settings"),
    ],
)
def test_a_profile_that_cannot_work_is_refused(text, says, tmp_home, monkeypatch, capsys):
    folder = tmp_home / "workflow" / "profiles" / "mine"
    folder.mkdir()
    if text:
        (folder / "config.yaml").write_text(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    assert command_line.main(["run", "lamo", "--scale", "smoke", "--profile", "mine"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_slurm_without_its_commands_is_refused(tmp_home, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_home))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name)
    assert command_line.main(["run", "lamo", "--scale", "smoke", "--profile", "slurm"]) == 2
    assert "sbatch, which is not on the PATH" in capsys.readouterr().err


# ---- without a shared file system


def test_a_pod_hands_stamps_to_the_storage(tmp_path):
    "What Kubernetes runs in a pod: in a folder of its own, with the workbook on a volume."
    if importlib.util.find_spec("snakemake_storage_plugin_fs") is None or not shutil.which("rsync"):
        pytest.skip("needs rsync and Snakemake's storage plug-in fs")
    home, pod, plan = tmp_path / "home", tmp_path / "pod", tmp_path / "plan.json"
    (home / "data").mkdir(parents=True)
    (home / "data" / "one.json").write_text("1")
    command = 'cp "$PROMPTNB_HOME/data/one.json" "$PROMPTNB_HOME/data/two.json"'
    rule = dict(name="two", inputs=["data/one.json"], outputs=["data/two.json"], command=command, threads=1, priority=0)
    plan.write_text(json.dumps([dict(rule, resources={}, params={})]))
    pod.mkdir()
    settings = dict(snakefile=ROOT / "workflow" / "Snakefile", cores=1, mode="remote", config=f"plan={plan}")
    settings |= {"target-jobs": "two:", "allowed-rules": "two", "shared-fs-usage": "none"}
    settings |= {"default-storage-provider": "fs", "default-storage-prefix": home}
    options = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    p = subprocess.run(
        [sys.executable, "-m", "snakemake", *options, "--nolock", "--force", "--ignore-incomplete"],
        cwd=pod,
        env=env_for(home),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert p.returncode == 0, p.stderr
    assert (home / "data" / "two.json").read_text() == "1"
    assert "Storing in storage" in p.stderr


ASKED = dict(PROMPTNB_RETRAIN="1", PROMPTNB_TIME_LIMIT="600", MINARI_DATASETS_PATH="/data", MY_KEY="secret")


@pytest.mark.parametrize("shared", [True, False])
def test_a_pod_is_handed_what_was_asked_for_by_name(tmp_path, shared):
    command = "promptnb job rladapter/main --set online.key_env=MY_KEY"
    rule = dict(name="one", inputs=[], outputs=["one.json"], command=command, threads=1, priority=0, resources={})
    (tmp_path / "plan.json").write_text(json.dumps([rule]))
    ours = ROOT / "workflow" / "Snakefile"
    (tmp_path / "Snakefile").write_text(f'include: "{ours}"\nprint("handed over:", *sorted(workflow.envvars))\n')
    words = ["--cores", "1", "-n", "--config", f"plan={tmp_path / 'plan.json'}"]
    words += [] if shared else ["--shared-fs-usage", "persistence", "sources", "source-cache"]
    env = env_for(tmp_path, **ASKED, PROMPTNB_OWNER="host 1 1")
    p = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert p.returncode == 0, p.stderr
    (line,) = [line for line in p.stdout.splitlines() if line.startswith("handed over:")]
    names = set(line.split()[2:])
    assert (ASKED.keys() <= names) != shared and "PROMPTNB_HOME" in names and "PROMPTNB_OWNER" not in names
    assert "secret" not in p.stdout + p.stderr


# ---- Slurm on this host


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "The environment of commands that find Slurm, brought up from nothing."
    reason = slurm_host.lacking()
    if not reason and importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        reason = 'Snakemake\'s plug-in for Slurm is not installed: pip install "promptnb[slurm]"'
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        conf = slurm_host.up(folder)
        yield dict(SLURM_CONF=str(conf), PATH=os.pathsep.join((str(folder / "bin"), os.environ["PATH"])))
    finally:
        slurm_host.down(folder)


@pytest.fixture(scope="module")
def with_data(tmp_path_factory):
    "A workbook that has the study's data."
    home = new_home(tmp_path_factory.mktemp("slurm") / "home")
    went(cli(home, "collect", "--family", "hopper", "--scale", "smoke", "--quality", "medium", "--episodes", "4"))
    return home


class Cluster:
    "A workbook on Slurm, with the study as a plug-in."

    def __init__(self, folder, home, env):
        self.folder, self.log = folder, folder / "log"
        self.home = new_home(folder / "home")
        subprocess.run(["cp", "-r", home / "data" / "minari", self.home / "data"], check=True)
        (folder / "tiny.py").write_text(STUDY)
        (folder / "sitecustomize.py").write_text(OFTEN)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.env = dict(env, PROMPTNB_PLUGINS=str(folder / "tiny.py"), PYTHONPATH=path)

    def start(self):
        "`promptnb run` in the background."
        return start(self.home, self.log, *RUN, **self.env)

    def slurm(self, *command):
        "The output of a command of Slurm's."
        p = subprocess.run(command, env=env_for(self.home, **self.env), capture_output=True, text=True, timeout=60)
        return p.stdout.strip()

    def jobs(self):
        "{number of a job: its state}, of ours: other tests' jobs are over."
        lines = self.slurm("squeue", "-h", "--states=all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def running(self):
        "Number of the job that runs."
        (job,) = (job for job, state in self.jobs().items() if state == "RUNNING")
        return job

    def training(self):
        "Has a policy trained long enough to have a checkpoint?"
        return bool(list(self.home.glob("data/runs/offline/*/step-*.json")))

    def ends(self, p, seconds=300):
        "The status of the command, and all that it and its jobs have said."
        try:
            status = p.wait(timeout=seconds)
        finally:
            end(p)
        of_slurm, of_runs = (self.home.glob(x) for x in (".snakemake/slurm_logs/*/*.log", "data/runs/logs/*/*.log"))
        return status, "\n".join(path.read_text() for path in (self.log, *of_slurm, *of_runs))

    def records(self):
        "Status of each record of the study."
        return {p.name: read_json(p)["status"] for p in (self.home / "data" / "results" / "tiny").glob("*.json")}


@pytest.fixture
def cluster(tmp_path, with_data, slurm):
    return Cluster(tmp_path, with_data, slurm)


FINISHED = {"smoke.hopper.one.s0.json": "ok", "smoke.hopper.two.s0.json": "ok"}


def test_a_job_cancelled_midway_goes_on_from_its_checkpoint(cluster):
    "Through Slurm to finished records; scancel in the middle: submitted again, its log says from where it goes on."
    (cluster.folder / "slow").touch()
    p = cluster.start()
    wait_for(cluster.training, p, cluster.log)
    first = cluster.running()
    cluster.slurm("scancel", first)
    (cluster.folder / "slow").unlink()
    status, said = cluster.ends(p)
    assert status == 0, said
    assert cluster.records() == FINISHED
    assert cluster.jobs()[first] == "CANCELLED"
    assert re.search(r"going on from step [1-9]", said) and "Trying to restart job" in said


def test_a_job_that_fails_ends_the_run(cluster):
    "It does not hang: status 2, the reason as a record and on the screen, nothing left in the queue."
    (cluster.folder / "fails").touch()
    profile = cluster.home / "workflow" / "profiles" / "slurm" / "config.yaml"
    profile.write_text(re.sub("retries: .*", "retries: 0", profile.read_text()))
    p = cluster.start()
    status, said = cluster.ends(p)
    assert status == 2 and "the card fell off the bus" in said, said
    assert set(cluster.records().values()) == {"failed"}
    assert "RUNNING" not in cluster.jobs().values() and "PENDING" not in cluster.jobs().values()


@pytest.mark.long
@pytest.mark.fault(3)
def test_a_job_whose_time_is_up_goes_back_into_the_queue(cluster):
    "SIGTERM while Slurm still wants the job: a checkpoint, status 75, the same job again, which goes on."
    (cluster.folder / "slow").touch()
    p = cluster.start()
    wait_for(cluster.training, p, cluster.log)
    job = cluster.running()
    cluster.slurm("scancel", "--signal=TERM", job)
    wait_for(lambda: cluster.jobs()[job] != "RUNNING", p, cluster.log)
    (cluster.folder / "slow").unlink()
    status, said = cluster.ends(p)
    assert status == 0, said
    assert cluster.records() == FINISHED and list(cluster.jobs()).count(job) == 1
    assert re.search(r"going on from step [1-9]", said)
    assert "Restarts=1" in cluster.slurm("scontrol", "show", "job", job)


@pytest.mark.long
@pytest.mark.fault(18)
def test_a_run_that_dies_cancels_its_jobs(cluster):
    "kill -9 of `promptnb run` alone: nothing of it stays in the queue, and the same command goes on."
    (cluster.folder / "slow").touch()
    p = cluster.start()
    wait_for(cluster.training, p, cluster.log)
    job = cluster.running()
    psutil.Process(p.pid).kill()
    p.wait()
    late = time.monotonic() + 40
    while cluster.jobs()[job] != "CANCELLED" and time.monotonic() < late:
        time.sleep(0.2)
    assert cluster.jobs()[job] == "CANCELLED"
    (cluster.folder / "slow").unlink()
    status, said = cluster.ends(cluster.start())
    assert status == 0, said
    assert cluster.records() == FINISHED and "going on from step" in said


@pytest.mark.long
def test_what_a_job_asks_for_reaches_slurm(cluster):
    "Time and memory of the forecast, with their floors, and one core."
    p = cluster.start()
    wait_for(lambda: "RUNNING" in cluster.jobs().values(), p, cluster.log)
    shown = cluster.slurm("scontrol", "show", "job", cluster.running())
    status, said = cluster.ends(p)
    assert status == 0, said
    assert "TimeLimit=00:30:00" in shown and "MinMemoryNode=4000M" in shown and "NumCPUs=1" in shown, shown


@pytest.mark.long
def test_slurm_is_brought_up_and_taken_down(tmp_path):
    "The script by itself: from nothing to a node that takes jobs, and nothing left of it."
    if reason := slurm_host.lacking():
        pytest.skip(reason)
    script = [sys.executable, slurm_host.__file__]
    up = subprocess.run([*script, "up", tmp_path], capture_output=True, text=True, timeout=60)
    pids = [int((tmp_path / f"{name}.pid").read_text()) for name in slurm_host.DAEMONS]
    try:
        assert up.returncode == 0 and up.stdout.strip() == str(tmp_path / "slurm.conf"), up.stderr
        assert all(psutil.pid_exists(pid) for pid in pids)
    finally:
        subprocess.run([*script, "down", tmp_path], check=True, timeout=60)
    assert not any(psutil.pid_exists(pid) for pid in pids)
