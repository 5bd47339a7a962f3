"""Random histories of a workbook: recipes and code edited and reverted, files damaged and deleted, runs killed.

After each, `run` ends finished in at most two calls, and its records are those of a clean workbook."""

import dataclasses
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from homes import ROOT
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from promptnb import cli, core, recipes, tasks, train
from promptnb.experiments import job, notebook, plan
from promptnb.experiments import run as runs
from promptnb.recipes import scales

PAPER, FAMILY = "prompt_tuning_dt", "cheetah-dir"
IDS = [f"{PAPER}/{FAMILY}/{key}" for key in ("pdt", "soft", "ranking", "pdt-uniform")]
JOBS = {
    "pretrain": recipes.Job(PAPER, "table1", FAMILY, "pretrain", tuple(IDS[:1])),
    "tune": recipes.Job(PAPER, "table1", FAMILY, "tune", tuple(IDS[:3])),
    "more": recipes.Job(PAPER, "controls", FAMILY, "tune", tuple(IDS[3:])),  # it reads data of another quality too
}
TINY = dict(scales.SMOKE["Pretrain"], steps=4, curve_points=2, width=8, layers=1)
HISTORIES = int(os.environ.get("HISTORIES", 20))
SEED = os.environ.get("HISTORIES_SEED")  # (none: the same histories each time)


@dataclasses.dataclass(frozen=True)
class Variant:
    "What a user has edited, and what he asks for."

    eval_episodes: int = 1
    steps: int = 4
    episodes: int = TINY["episodes"]  # of each task's data
    seeds: tuple = (0,)
    more: bool = False  # a second exhibit


VARIANTS = [
    Variant(),
    Variant(eval_episodes=2),
    Variant(steps=6),
    Variant(episodes=TINY["episodes"] + 2),
    Variant(seeds=(0, 1)),
    Variant(more=True),
]


class Asked(plan.Request):
    "The jobs of these tests, in the place of an exhibit's."

    def jobs(self):
        return [JOBS[name] for name in ("pretrain", "tune", *self.exhibits)]


class Killed(BaseException):
    "Nothing catches it: the process is gone."


class Patches:
    "Attributes and items that are put back at the end."

    def __init__(self):
        self.undo = []

    def attribute(self, owner, name, value):
        self.undo.append((setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def everywhere(self, name, value):
        "In every module of ours that has it."
        for module in [m for key, m in sys.modules.items() if key.startswith("promptnb") and hasattr(m, name)]:
            self.attribute(module, name, value)

    def item(self, owner, name, value):
        self.undo.append((dict.__setitem__, owner, name, owner[name]))
        owner[name] = value

    def stop(self):
        for put, owner, name, value in reversed(self.undo):
            put(owner, name, value)


@functools.cache
def ended() -> int:
    "The number of a process that has ended."
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class Home:
    "A workbook under a folder of its own, whose code and recipes can be edited."

    real = staticmethod(core.code_fingerprint)

    def __init__(self, variant, like=None):
        self.patches, self.code = Patches(), 0
        self.path = Path(tempfile.mkdtemp(prefix="promptnb-history-"))
        if like:
            shutil.copytree(like.path, self.path, dirs_exist_ok=True)
        else:
            for name in ("nbs/papers", "data/experts"):
                shutil.copytree(ROOT / name, self.path / name)
            shutil.copy(ROOT / "settings.ini", self.path)
        self.patches.everywhere("code_fingerprint", self.fingerprint)
        known = {j.id: j for j in JOBS.values()}
        self.patches.everywhere("find_job", lambda id, *more: known.get(id))
        self.patches.attribute(notebook, "execute", self.execute)
        short = dataclasses.replace(tasks.FAMILIES[FAMILY], horizon=20)
        self.patches.item(tasks.FAMILIES, FAMILY, short)
        self.before = os.environ.get("PROMPTNB_HOME")
        os.environ["PROMPTNB_HOME"] = str(self.path)
        self.edit(variant)

    def fingerprint(self, *modules):
        return core.fingerprint([self.code, self.real(*modules)])

    def edit(self, variant):
        self.variant = variant
        pretrain = dict(TINY, steps=variant.steps, episodes=variant.episodes)
        self.patches.item(scales.SMOKE, "Recipe", dict(eval_episodes=variant.eval_episodes, seeds=variant.seeds))
        self.patches.item(scales.SMOKE, "Pretrain", pretrain)

    @property
    def asked(self):
        return Asked(PAPER, ("more",) if self.variant.more else (), "smoke")

    def execute(self, template, given, out, stream=True, kernel=None):
        "The job's notebook, without a kernel."
        job.run_job(given["job"], given["seed"], given["scale"], "cpu")

    def call(self):
        "What `promptnb run` does, with the rules followed in this process; returns whether one failed."
        runs.stored.cache_clear()  # a process of its own remembers nothing
        with cli.alone(self.asked):
            rules = plan.plan(self.asked, seconds=lambda run: 10.0)
            file, failed = plan.write_plan(rules), set()
            for rule in rules:
                if failed & set(rule.inputs) or self.follow(rule):
                    failed |= set(rule.outputs)
            file.unlink()
        return bool(failed)

    def follow(self, rule):
        "Its command, in the root folder, as Snakemake gives it; returns its status."
        before = os.getcwd()
        os.chdir(self.path)
        try:
            return cli.main(shlex.split(rule.command.removeprefix(plan.program())))
        finally:
            os.chdir(before)

    def runs(self):
        return [run for j, seed in self.asked.work() for run in job.runs_of(j, "smoke", seed)]

    def records(self):
        "{run id: what does not depend on when and where it ran}."
        kept = {run.id: core.sound_record(run.path) for run in self.runs()}
        return {k: {f: r[f] for f in ("status", "why", "rows", "recipe_digest")} for k, r in kept.items() if r}

    def temporary(self):
        "What it has left under temporary names."
        return [p for p in self.path.rglob(".*") if "@" in p.name or p.name.startswith(".collect-")]

    def died(self):
        "What is left under this process's name was left by one that has ended."
        for path in self.temporary():
            path.rename(path.with_name(path.name.replace(f".{os.getpid()}@", f".{ended()}@")))
        for path in self.path.rglob(".holder"):
            path.write_text(core.process_name(ended()))

    def leave(self):
        "It is no longer the workbook of this process; its files stay."
        self.patches.stop()
        if self.before is None:
            del os.environ["PROMPTNB_HOME"]
        else:
            os.environ["PROMPTNB_HOME"] = self.before

    def close(self):
        self.leave()
        shutil.rmtree(self.path)


CLEAN = {}  # variant of the recipes -> (records of a workbook in which nothing ever went wrong, that workbook)


def clean(variant):
    if variant not in CLEAN:
        home = Home(variant)
        assert not home.call()
        CLEAN[variant] = home.records(), home
        home.leave()
    return CLEAN[variant]


@pytest.fixture(scope="module", autouse=True)
def swept():
    "Clean workbooks are removed at the end."
    yield
    for _, home in CLEAN.values():
        shutil.rmtree(home.path)


def flipped(data, at):
    k = at % len(data)
    return data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :]


PLACE = st.integers(0, 10**6)
DAMAGE = {
    "one bit flipped": flipped,
    "cut off": lambda data, at: data[: at % len(data)],
    "another file": lambda data, at: b"[]",
    "longer": lambda data, at: data + b"}",
}


class Histories(RuleBasedStateMachine):
    "A workbook to which anything may happen between two calls of `run`."

    def __init__(self):
        super().__init__()
        for variant in VARIANTS:
            clean(variant)
        self.home = Home(VARIANTS[0], like=clean(VARIANTS[0])[1])

    def files(self):
        every = sorted(p for p in (self.home.path / "data").rglob("*") if p.is_file() and p.stat().st_size)
        return [p for p in every if "experts" not in p.parts]

    @rule(variant=st.sampled_from(VARIANTS), run_after=st.booleans())
    def edit_recipe(self, variant, run_after):
        "Also: ask for more seeds, more exhibits, more data; and for fewer again."
        self.home.edit(variant)
        if run_after:
            self.run()

    @rule(run_after=st.booleans())
    def edit_code(self, run_after):
        "There and back: what was made before is still there."
        self.home.code = 1 - self.home.code
        if run_after:
            self.run()

    @rule(places=st.lists(PLACE, min_size=1, max_size=4), how=st.sampled_from(sorted(DAMAGE)), at=PLACE)
    def damage(self, places, how, at):
        if not (files := self.files()):
            return
        for path in {files[k % len(files)] for k in places}:
            if data := path.read_bytes():
                path.write_bytes(DAMAGE[how](data, at))

    @rule(at=PLACE)
    def flip_a_policy(self, at):
        "A bit of the weights, where the record of what was tuned from them is gone."
        for path in self.home.path.glob("data/runs/policies/*/policy/model.safetensors"):
            path.write_bytes(flipped(path.read_bytes(), at))
        for path in self.home.path.glob("data/results/*/smoke.cheetah-dir.*.json"):
            path.unlink()

    @rule(which=PLACE, folder=st.booleans())
    def delete(self, which, folder):
        if files := self.files():
            path = files[which % len(files)]
            if folder:
                shutil.rmtree(path.parent)
            else:
                path.unlink()

    @rule(which=st.sampled_from(["data/minari", "data/runs", "data/results", "data/runs/jobs", "data/runs/collect"]))
    def delete_a_whole_folder(self, which):
        shutil.rmtree(self.home.path / which, ignore_errors=True)

    @rule(after=st.integers(0, 40))
    def kill(self, after):
        "The process is gone at its k-th file."
        left, replace = [after], os.replace

        def dying(*a, **k):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return replace(*a, **k)

        patches = Patches()
        patches.attribute(os, "replace", dying)
        try:
            self.home.call()
        except Killed:
            self.home.died()
        finally:
            patches.stop()

    @rule(after=st.integers(0, 8), seen=st.booleans())
    def tell_to_stop(self, after, seen):
        "SIGTERM at the k-th update; its process comes to its end, or is killed meanwhile."
        left, step, save = [after], train.step_once, train.Checkpoints.save

        def told(*a):
            left[0] -= 1
            if left[0] == -1:
                if not isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), train.Stop):
                    raise Killed  # this fit does not listen, and its kernel ends
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*a)

        def gone(*a, **k):
            if left[0] < 0:
                raise Killed
            return save(*a, **k)

        patches = Patches()
        patches.attribute(train, "step_once", told)
        if not seen:
            patches.attribute(train.Checkpoints, "save", gone)
        try:
            self.home.call()
        except (train.Interrupted, Killed):
            self.home.died()
        finally:
            patches.stop()

    @rule(which=PLACE)
    def leave_a_lock(self, which):
        "As a process does that has ended: the files of a lock, held by nobody."
        folders = sorted(
            {p.parent for p in self.home.path.rglob(".lock")} | {self.home.path / "data/runs/graph" / PAPER}
        )
        folder = folders[which % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
        (folder / ".holder").write_text(core.process_name(ended()))

    @rule()
    def run(self):
        for _ in range(2):
            if not self.home.call():
                break
        left = [run.id for run in self.home.runs() if not run.finished]
        assert not left, f"not finished after two calls: {left}"
        assert self.home.records() == clean(self.home.variant)[0]
        assert not self.home.temporary()

    def teardown(self):
        self.run()
        self.home.close()


def histories(n):
    "Settings for so many histories."
    return settings(
        max_examples=n,
        stateful_step_count=6,
        deadline=None,
        phases=[Phase.generate] if SEED else list(Phase),  # shrinking takes minutes
        derandomize=SEED is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_histories():
    machine = Histories if SEED is None else seed(int(SEED))(Histories)
    run_state_machine_as_test(machine, settings=histories(HISTORIES))


@pytest.mark.long
def test_many_histories():
    run_state_machine_as_test(Histories, settings=histories(200))


def test_the_environment_is_as_it_was():
    assert "promptnb-history" not in os.environ.get("PROMPTNB_HOME", "")
