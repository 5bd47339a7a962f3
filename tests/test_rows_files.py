"Rows of the fault list about files, met by the commands that read and write them: kills, damage, bombs, full disks."

import builtins
import errno
import io
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from bombs import Bomb
from homes import (
    DATA,
    FAMILY,
    PAPER,
    PRETRAIN,
    SMOKE,
    TUNE,
    cli,
    expected,
    finished_home,
    new_home,
    one_line,
    paths,
    went,
)
from shims import patched
from test_faults import flip, frozen, regions
from test_resume import same_records, start, weights
from test_rows import unrecorded_home

from promptnb import cli as command
from promptnb import core, recipes
from promptnb.core import FORMAT, read_json, write_sealed
from promptnb.experiments import job, notebook
from promptnb.experiments import run as runs
from promptnb.recipes import scales

# ---- row 2: kill -9 at each call that writes a checkpoint

KILL_AT_CALL = """
todo, save, left = HERE / "todo", m.Checkpoints.save, [None]

def hit(half=None):
    if left[0] is None:
        return
    if left[0] == 0:
        if half:
            half()
        kill_all()
    left[0] -= 1

def counted(f):
    @functools.wraps(f)
    def g(*a, **k):
        hit()
        return f(*a, **k)
    return g

def opened(path, mode="r", *a, **k):
    f = open(path, mode, *a, **k)
    if "w" in mode:
        write = f.write
        class File:
            __enter__ = lambda self: self
            __exit__ = lambda self, *e: f.close()
            __getattr__ = lambda self, name: getattr(f, name)
            def write(self, b):
                hit(lambda: (write(b[: len(b) // 2]), f.flush()))
                return write(b)
        return File()
    return f

def saved(self, t, *a, **k):
    words = todo.read_text().split()
    if words and t > 5:
        todo.write_text(" ".join(words[1:]))
        left[0] = int(words[0])
    save(self, t, *a, **k)
    left[0] = None

if IN_KERNEL:
    m.open = opened
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    m.Checkpoints.save = saved
"""


@pytest.mark.fault(2)
@pytest.mark.parametrize("calls", [(2,), pytest.param(range(14), marks=pytest.mark.long)], ids=["one", "all"])
def test_killed_at_calls_of_a_checkpoint(calls, tmp_path):
    "The job goes on from the checkpoint before, or from the new one, to the end of an unbroken run."
    home, log = new_home(tmp_path / "home", *DATA), tmp_path / "log"
    env = patched(tmp_path / "shim", promptnb__core=KILL_AT_CALL)
    todo = tmp_path / "shim" / "todo"
    todo.write_text(" ".join(map(str, calls)))
    killed = 0
    while (code := start(home, log, "job", PRETRAIN, *SMOKE, **env).wait(timeout=300)) == -signal.SIGKILL:
        killed += 1
        visible = [p for p in home.glob("data/runs/policies/*/step-*") if not p.name.startswith(".")]
        assert all(read_json(p)["hash"] for p in visible if p.suffix == ".json")
    assert code == 0 and killed >= min(len(calls), 8), log.read_text()[-4000:]
    assert "going on from step 5" in log.read_text()
    assert weights(home) == weights(finished_home())
    same_records(home, [f"{name}.json" for _, name in expected(PRETRAIN)])
    assert not list(home.glob("data/runs/policies/**/.*.tmp"))


# ---- rows 5, 6 and 7: checkpoints that are damaged, hostile, or of something else


def newest(home):
    "The newest checkpoint of each policy."
    return [max(folder.glob("step-*.safetensors")) for folder in sorted(home.glob("data/runs/policies/*"))]


def cut(length):
    def damage(path, home):
        raw = path.read_bytes()
        path.write_bytes(raw[: dict(nothing=0, byte=1, half=len(raw) // 2, last=-1)[length]])

    return damage


def one_bit_of_each_tensor(path, home):
    for name, (begin, _) in regions(path).items():
        if name not in ("size", "header"):
            flip(path, begin)


def bomb(path, home):
    "A pickle, which its JSON says is as it should be."
    raw = pickle.dumps(Bomb(home / "canary"))
    path.write_bytes(raw)
    meta = {k: v for k, v in read_json(path.with_suffix(".json")).items() if k != "hash"}
    write_sealed(path.with_suffix(".json"), dict(meta, sha256=core.sha256_file(path)))


@pytest.mark.fault(5, 7)
@pytest.mark.parametrize(
    "damages",
    [
        (cut("half"), one_bit_of_each_tensor, bomb),
        pytest.param((cut("nothing"), cut("byte"), cut("last")), marks=pytest.mark.long),
    ],
    ids=["half, bits, bomb", "nothing, a byte, all but one"],
)
def test_damaged_checkpoints(damages, tmp_path):
    "Each is named, the one before is used, and nothing in it is run; the end is that of an unbroken run."
    home = unrecorded_home(tmp_path / "home")
    for path, damage in zip(newest(home), damages, strict=True):
        damage(path, home)
    p = went(cli(home, "job", PRETRAIN, *SMOKE))
    said = (p.stdout + p.stderr).splitlines()
    assert len([s for s in said if "step-000000020" in s and "damaged" in s and "using the one before" in s]) == 3
    assert len([s for s in said if "going on from step 15" in s]) == 3 and "Traceback" not in p.stderr
    assert not (home / "canary").exists()
    assert weights(home) == weights(finished_home())
    same_records(home, [f"{name}.json" for _, name in expected(PRETRAIN)])


@pytest.mark.fault(6)
def test_checkpoints_of_something_else(tmp_path):
    "Of another learning rate, of other shapes, of a newer format: each refused with what differs."
    home = unrecorded_home(tmp_path / "home")
    changes = [
        lambda meta: meta["config"]["fit"].update(lr=0.5),
        lambda meta: meta["config"]["weights"].pop(),
        lambda meta: meta.update(format=FORMAT + 1),
    ]
    for path, change in zip(newest(home), changes, strict=True):
        meta = {k: v for k, v in read_json(path.with_suffix(".json")).items() if k != "hash"}
        change(meta)
        write_sealed(path.with_suffix(".json"), meta)
    one_line(cli(home, "job", PRETRAIN, *SMOKE), "3 of 3 runs", "step-000000020", "is of another run")
    whys = sorted(read_json(path)["why"] for name, path in paths(home).items() if ".failed" in name)
    assert len(whys) == 3
    assert any("lr: 0.5 there, 0.001 here" in why for why in whys)
    assert any("is of another run: weights" in why for why in whys)
    assert any(f"format {FORMAT + 1}, newer than this promptnb reads" in why for why in whys)


@pytest.mark.long
@pytest.mark.fault(7)
def test_bombs_in_the_place_of_data_and_prompts(tmp_path):
    "Neither is run: a dataset, and a tuned policy with its prompts, are named and made again."
    home = new_home(tmp_path / "home", *DATA, "data/runs/tuned", "data/results")
    raw = pickle.dumps(Bomb(home / "canary"))
    for path in home.glob("data/minari/promptnb/cheetah-dir-00/expert-v0/**/*"):
        if path.suffix in (".safetensors", ".hdf5"):
            path.write_bytes(raw)
    for path in paths(home).values():
        if "pretrain" in path.name:
            path.unlink()
    went(cli(home, "job", PRETRAIN, *SMOKE))
    assert weights(home) == weights(finished_home())
    for path in home.glob("data/runs/tuned/*/*/model.safetensors"):
        path.write_bytes(raw)
    p = went(cli(home, "film", f"{PAPER}/{FAMILY}/ranking", *SMOKE))
    assert "model.safetensors is damaged" in p.stderr and "Traceback" not in p.stderr
    assert not (home / "canary").exists()


# ---- row 10: a loss that is not a number

SPOILT = """
if IN_KERNEL:
    step = m.step_once
    def step_once(model, opt, batch, t, *a):
        if t == 12 and batch.prompt is not None:
            batch.history.a.fill_(float(os.environ["SPOILT"]))
        return step(model, opt, batch, t, *a)
    m.step_once = step_once
"""


@pytest.mark.fault(10)
@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.long)])
def test_a_loss_that_is_not_a_number(value, tmp_path):
    "The run stops there and keeps its last good checkpoint; what is tuned from it, status and table say diverged."
    home = new_home(tmp_path / "home", *DATA)
    env = patched(tmp_path / "shim", promptnb__train=SPOILT)
    went(cli(home, "job", PRETRAIN, TUNE, *SMOKE, SPOILT=value, **env))
    found = {name: read_json(path) for name, path in paths(home).items()}
    diverged = {name for name, rec in found.items() if rec["status"] == "diverged"}
    (policy,) = [name for name in diverged if ".pretrain." in name]
    assert "at step 12" in found[policy]["why"] and len(diverged) > 1
    (folder,) = [f for f in home.glob("data/runs/policies/*") if not (f / "policy").exists()]
    assert max(p.name for p in folder.glob("step-*")).startswith("step-000000010")
    assert "diverged" in went(cli(home, "status", PAPER, *SMOKE)).stdout
    said = went(cli(home, "render", PAPER, *SMOKE, "--exhibit", "table1", "--partial")).stdout
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    assert sum("1 diverged" in line for line in lines) == len(diverged) - 1
    assert not any(np.isfinite(w["value"]) for name in diverged - {policy} for w in found[name]["rows"])


# ---- row 11: no space left, at every write


class Disk:
    "A disk that is full at write number `k`: an opening for writing, a new folder, a sync or a rename under a folder."

    def __init__(self, monkeypatch, folder, k):
        self.m, self.folder, self.k, self.n, self.mkdir = monkeypatch, str(folder), k, 0, os.mkdir

    def hit(self, path):
        if isinstance(path, int) or str(path).startswith(self.folder):
            self.n += 1
            if self.n - 1 == self.k:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if isinstance(path, int) else str(path))

    def before(self, f):
        def g(path, *a, **k):
            if f is not self.mkdir or not os.path.isdir(path):  # what is there needs no space
                self.hit(path)
            return f(path, *a, **k)

        return g

    def opener(self, f):
        def g(path, mode="r", *a, **k):
            if set(mode) & set("wax+"):
                self.hit(path)
            return f(path, mode, *a, **k)

        return g

    def __enter__(self):
        for name in ("mkdir", "fsync", "replace"):
            self.m.setattr(os, name, self.before(getattr(os, name)))
        self.m.setattr(builtins, "open", self.opener(builtins.open))
        self.m.setattr(io, "open", self.opener(io.open))
        return self

    def __exit__(self, *e):
        self.m.undo()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A workbook whose smoke runs are one policy of four steps and one tuned recipe, made in this process."
    home = new_home(tmp_path / "home", *DATA)
    keys = [f"{PAPER}/{FAMILY}/{key}" for key in ("pdt", "soft")]
    jobs = {
        PRETRAIN: recipes.Job(PAPER, "table1", FAMILY, "pretrain", tuple(keys[:1])),
        TUNE: recipes.Job(PAPER, "table1", FAMILY, "tune", tuple(keys)),
    }
    small = dict(scales.SMOKE["Pretrain"], steps=4, curve_points=2, width=8, layers=1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PROMPTNB_HOME", str(home))
        m.delenv("MINARI_DATASETS_PATH", raising=False)
        m.setitem(scales.SMOKE, "Pretrain", small)
        for module in (job, notebook):
            m.setattr(module, "find_job", lambda id, *more: jobs[id])
        m.setattr(notebook, "run_notebook", run_here)
        yield home


def run_here(nb_path, params, out, stream, kernel):
    "The compute template's work, in this process."
    runs.stored.cache_clear()
    job.run_job(params["job"], params["seed"], params["scale"], "cpu", 1)
    shutil.copy(nb_path, out)


def attempts(home, args, monkeypatch, capsys, stride, made):
    """Give the command with the disk full at write 0, then 1 (or `stride` further on) and so on: how often it failed.

    made: what is removed where a write did not matter, so that the next attempt has all to do."""
    failed = 0
    for k in range(0, 2000, stride):
        with Disk(monkeypatch, home / "data", k) as disk:
            code = command.main([*map(str, args)])
        said = capsys.readouterr().err
        if code == 0 and disk.n <= k:
            return failed
        failed += code != 0
        if code == 0:
            for path in home.glob(made):
                shutil.rmtree(path)
            continue
        assert code == 2 and "Traceback" not in said, (k, said)
        assert "no space left" in said.splitlines()[-1], (k, said)
        assert not list((home / "data").rglob("*.tmp*")), (k, said)
    raise AssertionError("it never succeeds")


def untimed(home):
    "What the records of a workbook say, but for times and places."
    found = {path.name: read_json(path) for path in sorted((home / "data" / "results" / PAPER).glob("*.json"))}
    leave = ("seconds", "spent", "where", "hash")
    return {name: {k: v for k, v in rec.items() if k not in leave} for name, rec in found.items()}


@pytest.mark.fault(11)
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)], ids=["each fifth", "each"])
def test_no_space_at_each_write_of_a_job(tiny, stride, monkeypatch, capsys):
    "One line each time, no half file, nothing lost: the last attempt ends as if there had been space."
    for id in (PRETRAIN, TUNE):
        assert command.main(["job", id, *SMOKE]) == 0
    whole = untimed(tiny)
    for name in ("results", "runs"):
        shutil.rmtree(tiny / "data" / name)
    capsys.readouterr()
    for id in (PRETRAIN, TUNE):
        assert attempts(tiny, ("job", id, *SMOKE), monkeypatch, capsys, stride, "data/r*s") >= 3
    assert untimed(tiny) == whole
    assert len(whole) == 3 and not list(tiny.rglob("*.failed.*"))


@pytest.mark.fault(11)
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)], ids=["each fifth", "each"])
def test_no_space_at_each_write_of_a_dataset(tiny, stride, monkeypatch, capsys):
    args = ("collect", "--family", FAMILY, "--quality", "medium", "--episodes", 2)
    before = frozen(tiny / "data" / "minari")
    assert attempts(tiny, args, monkeypatch, capsys, stride, "data/minari/promptnb/*/medium-v0") >= 3
    after = frozen(tiny / "data" / "minari")
    kept = {p: v for p, v in before.items() if p.name != f"{FAMILY}.json"}
    assert kept.items() <= after.items()
    assert not [p for p in tiny.rglob(".collect-*")] and len(list(tiny.rglob("medium-v0"))) == 2


@pytest.mark.fault(12)
def test_a_name_that_is_too_long_for_the_disk(tmp_path):
    "One line, and nothing is made."
    home = Path(tmp_path / ("x" * 300))
    p = cli(tmp_path, "status", PAPER, PROMPTNB_HOME=str(home))
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and p.stderr.endswith(": file name too long\n")
