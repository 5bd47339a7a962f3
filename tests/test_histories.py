"""Random histories of a workbook: recipe and code edited and reverted, files damaged and deleted, runs killed.

After each, `run` ends finished in at most two calls, and its records are those of a clean workbook."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from homes import ROOT
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from promptnb import collect, core, recipes
from promptnb.experiments import job, plan
from promptnb.experiments import run as runs
from promptnb.recipes import scales

PAPER, FAMILY = "prompt_tuning_dt", "cheetah-dir"
IDS = [f"{PAPER}/{FAMILY}/{key}" for key in ("pdt", "soft", "ranking")]
JOBS = {
    "pretrain": recipes.Job(PAPER, "table1", FAMILY, "pretrain", tuple(IDS[:1])),
    "tune": recipes.Job(PAPER, "table1", FAMILY, "tune", tuple(IDS)),
}
TINY = dict(scales.SMOKE["Pretrain"], steps=4, curve_points=2, width=8, layers=1)
EPISODES = TINY["episodes"]
HISTORIES = int(os.environ.get("HISTORIES", 20))


class Killed(BaseException):
    "Nothing catches it: the process is gone."


class Patches:
    "Attributes and items that are put back at the end."

    def __init__(self):
        self.undo = []

    def attribute(self, owner, name, value):
        self.undo.append((setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def item(self, owner, name, value):
        self.undo.append((dict.__setitem__, owner, name, owner[name]))
        owner[name] = value

    def stop(self):
        for put, owner, name, value in reversed(self.undo):
            put(owner, name, value)


class Home:
    "A workbook under a folder of its own, whose code and recipes can be edited."

    real = staticmethod(core.code_fingerprint)

    def __init__(self):
        self.patches, self.code = Patches(), 0
        self.path = Path(tempfile.mkdtemp(prefix="promptnb-history-"))
        shutil.copytree(ROOT / "data" / "experts", self.path / "data" / "experts")
        shutil.copy(ROOT / "settings.ini", self.path)
        self.before = os.environ.get("PROMPTNB_HOME")
        os.environ["PROMPTNB_HOME"] = str(self.path)
        for module in (core, runs):
            self.patches.attribute(module, "code_fingerprint", self.fingerprint)
        self.patches.attribute(job, "find_job", JOBS.get)
        self.edit(1, 4)

    def fingerprint(self, *modules):
        return core.fingerprint([self.code, self.real(*modules)])

    def edit(self, episodes, steps):
        self.variant = episodes, steps
        self.patches.item(scales.SMOKE, "Recipe", dict(eval_episodes=episodes, seeds=(0,)))
        self.patches.item(scales.SMOKE, "Pretrain", dict(TINY, steps=steps))

    def call(self):
        "What `promptnb run` does: data that are gone are collected, then every job."
        runs.stored.cache_clear()  # a process of its own remembers nothing
        needed = plan.collections(JOBS.values(), "smoke")[FAMILY]
        if not needed.is_there():
            for quality in needed.qualities:
                collect.collect(FAMILY, quality, EPISODES, threads=1, say=lambda text: None)
        for kind in JOBS:
            job.run_job(kind, 0, "smoke", "cpu")

    def runs(self):
        return [run for j in JOBS.values() for run in job.runs_of(j, "smoke", 0)]

    def records(self):
        "{run id: what does not depend on when and where it ran}."
        kept = {run.id: core.sound_record(run.path) for run in self.runs()}
        return {k: {f: r[f] for f in ("status", "why", "rows", "recipe_digest", "data")} for k, r in kept.items() if r}

    def close(self):
        self.patches.stop()
        if self.before is None:
            del os.environ["PROMPTNB_HOME"]
        else:
            os.environ["PROMPTNB_HOME"] = self.before
        shutil.rmtree(self.path)


CLEAN = {}  # variant of the recipes -> records of a workbook in which nothing ever went wrong


def clean(variant):
    if variant not in CLEAN:
        home = Home()
        home.edit(*variant)
        home.call()
        CLEAN[variant] = home.records()
        home.close()
    return CLEAN[variant]


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
        for variant in ((1, 4), (2, 4), (1, 6)):
            clean(variant)
        self.home = Home()

    def files(self):
        every = sorted(p for p in (self.home.path / "data").rglob("*") if p.is_file() and p.stat().st_size)
        return [p for p in every if "experts" not in p.parts]

    @initialize()
    def begin(self):
        self.run()

    @rule(variant=st.sampled_from([(1, 4), (2, 4), (1, 6)]))
    def edit_recipe(self, variant):
        self.home.edit(*variant)
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
            pass
        finally:
            patches.stop()

    @rule()
    def run(self):
        for _ in range(2):
            self.home.call()
            if all(run.finished for run in self.home.runs()):
                break
        left = [run.id for run in self.home.runs() if not run.finished]
        assert not left, f"not finished after two calls: {left}"
        assert self.home.records() == clean(self.home.variant)

    def teardown(self):
        self.run()
        self.home.close()


def histories(n):
    "Settings for so many histories, the same ones each time."
    return settings(
        max_examples=n,
        stateful_step_count=6,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_histories():
    run_state_machine_as_test(Histories, settings=histories(HISTORIES))


@pytest.mark.long
def test_many_histories():
    run_state_machine_as_test(Histories, settings=histories(200))
