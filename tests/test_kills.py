"""Killed at random moments: the graph, `promptnb run`, Snakemake, the kernel; and a job that is told to stop.

After each, nothing that was started goes on, and the next `run` ends as an unbroken one and leaves nothing behind.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from homes import FAMILY, PRETRAIN, RUN, SMOKE, TUNE, finished_home, new_home, paths
from test_resume import same_records, start, weights

from promptnb.core import sha256_file

RUN_ALL = (*RUN, "--cores", "1")
JOB = ("job", PRETRAIN, TUNE, *SMOKE)
WORK = dict(run=12.0, job=8.0)  # seconds of a processor that they take, about
TIMES = 20  # of each kind, in the long test


# ---- a workbook in which a little is left to do


def unfinish(home, args):
    "Remove from a finished workbook one policy and what was tuned from it; for `run` a dataset too."
    if args[0] == "run":
        shutil.rmtree(home / "data" / "minari" / "promptnb" / f"{FAMILY}-00", ignore_errors=True)
    for path in home.glob("data/runs/policies/*mt-orl*"):
        shutil.rmtree(path)
    for name, path in paths(home).items():
        if "mt-orl" in name:
            path.unlink()


def unfinished_home(home, args):
    "A copy of the finished workbook in which that is left to do."
    new_home(home, "data")
    for name in ("jobs", "collect", "notebooks", "locks", "graph", "logs"):
        shutil.rmtree(home / "data" / "runs" / name, ignore_errors=True)
    unfinish(home, args)
    return home


def datasets(home):
    "{dataset: hash of what is read of it}."
    root = home / "data" / "minari"
    return {str(p.relative_to(root)): sha256_file(p) for p in root.rglob("columns.safetensors")}


def as_unbroken(home):
    "Its records, weights and datasets are those of the finished workbook, but for times and places."
    assert set(paths(home)) == set(paths(finished_home()))
    same_records(home, paths(home))
    assert weights(home) == weights(finished_home())
    assert datasets(home) == datasets(finished_home())


def litter(home, tmp):
    "What has no business to be there once all processes have ended."
    names = [p for p in home.rglob("*") if ".tmp" in p.name or p.name.startswith((".collect-", ".pnb", ".plan"))]
    # torch's cache is the user's, and empty: torch makes it wherever it is imported
    return names + [p for p in tmp.iterdir() if not p.name.startswith("torchinductor_")]


# ---- whom to kill


@dataclass
class Command:
    "A command under way in a workbook, with a folder of its own for temporary files."

    home: Path
    tmp: Path
    log: Path
    args: tuple
    process: object = None

    def __post_init__(self):
        self.tmp.mkdir(exist_ok=True)
        marked = dict(TMPDIR=str(self.tmp), PROMPTNB_TEST=str(self.home))
        self.process = start(self.home, self.log, *self.args, **marked)

    def alive(self):
        "All processes that it has started and that have not ended."
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                own = process.environ().get("PROMPTNB_TEST") == str(self.home)
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def find(self, word):
        "The process whose command line has a word, once it is there; None if the command ends without it."
        while self.process.poll() is None:
            for process in self.alive():
                with contextlib.suppress(psutil.Error):
                    if word in " ".join(process.cmdline()):
                        return process
            time.sleep(0.05)

    def spent(self):
        "Seconds that processors have worked on it: these do not depend on what else the machine does."
        times = [0.0]
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                times.append(sum(process.cpu_times()[:4]))
        return sum(times)

    def until(self, moment):
        "Wait until this share of the work that is left is done, or it has ended."
        begun = self.spent()
        goal = begun + moment * max(0, WORK[self.args[0]] - begun)
        while self.process.poll() is None and self.spent() < goal:
            time.sleep(0.1)


def kill_group(command, moment):
    command.until(moment)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command.process.pid, signal.SIGKILL)


def kill_run(command, moment):
    command.until(moment)
    command.process.kill()


def kill_found(word, command, moment):
    process = command.find(word)
    command.until(moment)
    if process:
        with contextlib.suppress(psutil.Error):
            process.kill()


def tell_to_stop(command, moment):
    command.until(moment)
    command.process.terminate()


KILLS = {  # name: (what is called, how it is killed)
    "group": (RUN_ALL, kill_group),
    "run": (RUN_ALL, kill_run),
    "snakemake": (RUN_ALL, functools.partial(kill_found, "-m snakemake")),
    "kernel": (JOB, functools.partial(kill_found, "ipykernel_launcher")),
    "job told to stop": (JOB, tell_to_stop),
}


def slowness():
    "How many processes share a core."
    return max(1.0, os.getloadavg()[0] / os.cpu_count())


@pytest.fixture
def where():
    "A folder for a workbook, its log, and temporary files: a short name, as sockets lie there."
    short = Path(tempfile.mkdtemp(prefix="pnb"))
    yield short
    shutil.rmtree(short)


def killed(kind, home, where, moment):
    "Start, kill at a moment (a share of the work), and wait until all has ended; returns the status."
    args, kill = KILLS[kind]
    said = (where / "log").stat().st_size if (where / "log").exists() else 0
    command = Command(home, where / "t", where / "log", args)
    kill(command, moment)
    status = command.process.wait(timeout=60 * slowness())
    late, begun = 5 * slowness(), time.monotonic()
    while left := command.alive():
        assert time.monotonic() - begun < late, f"{kind} at {moment:.2f}: {[p.cmdline() for p in left]}"
        time.sleep(0.1)
    ended = f"status {status}, all ended after {time.monotonic() - begun:.1f} s"
    print(f"{kind} at {moment:.2f}: {ended}", file=sys.stderr)
    if kind == "job told to stop":
        early = command.log.stat().st_size == said  # before it had read its own program
        late = len(paths(home)) == len(paths(finished_home()))  # all is done, and Python ends
        assert status in (75, 0) or ((early or late) and status == -signal.SIGTERM), command.log.read_text()[-3000:]
    return status


def goes_on(home, where):
    "The next run ends as an unbroken one, and nothing is left behind."
    command = Command(home, where / "t", where / "log", RUN_ALL)
    assert command.process.wait(timeout=900) == 0, command.log.read_text()[-3000:]
    as_unbroken(home)
    assert not litter(home, where / "t")


def moments(kind, n):
    draw = random.Random(kind)
    return [draw.random() for _ in range(n)]


@pytest.mark.fault(1)
@pytest.mark.fault(3)
@pytest.mark.fault(16)
@pytest.mark.fault(18)
def test_killed_in_every_way_one_after_the_other(where):
    "Each finds what the one before has left; the run after the last makes it whole."
    home = unfinished_home(where / "home", JOB)
    for kind, moment in zip(random.Random(0).sample(sorted(KILLS), len(KILLS)), moments("all", 5), strict=True):
        if not killed(kind, home, where, moment):
            unfinish(home, JOB)  # it had come to its end
    goes_on(home, where)


@pytest.mark.long
@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.parametrize("k", range(TIMES))
def test_killed_at_a_random_moment(where, kind, k):
    home = unfinished_home(where / "home", KILLS[kind][0])
    killed(kind, home, where, moments(kind, TIMES)[k])
    goes_on(home, where)
