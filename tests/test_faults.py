"""What goes wrong, made to go wrong: killed writes, damaged and hostile files, a full disk, a dead kernel, wrong names.

A test passes if there is one clear line, nothing is lost, and the same command goes on once the cause is gone.
Kills and resumes of whole runs: test_resume.
"""

import builtins
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from bombs import Bomb
from homes import (
    DATA,
    FAMILY,
    METHODS,
    PAPER,
    PRETRAIN,
    RUN,
    SMOKE,
    TUNE,
    cli,
    expected,
    fabricate,
    finished_home,
    new_home,
    one_line,
    paths,
    runs,
    went,
)
from test_resume import same_records, weights

from promptnb import cli as command
from promptnb import collect, core, data, experts, recipes, tasks, train
from promptnb.core import (
    Checkpoints,
    PromptnbError,
    read_json,
    results_dir,
    runs_dir,
    sha256_file,
    write_json,
    write_sealed,
)
from promptnb.experiments import job, multitask, run
from promptnb.experiments.run import Run
from promptnb.report import exhibits, tables, view
from promptnb.report.view import View

FAM, TABLE1 = tasks.family(FAMILY), recipes.EXHIBITS[PAPER, "table1"]

# ---- helpers


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A workbook of its own with cheetah-dir's datasets."
    home = new_home(tmp_path / "home", *DATA)
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    return home


@pytest.fixture
def one_policy(monkeypatch):
    "Jobs in this process do the first of their recipes only."
    real = job.runs_of
    monkeypatch.setattr(job, "runs_of", lambda *a: real(*a)[:1])
    return real(job.find_job(PRETRAIN), "smoke", 0)[0].id


def run_job(id=PRETRAIN):
    return job.run_job(id, 0, "smoke", "cpu")


def refused(f, *a, says=(), **k):
    "f must raise a PromptnbError of one line that has all of `says`."
    with pytest.raises(PromptnbError) as e:
        f(*a, **k)
    text = str(e.value)
    assert "\n" not in text and all(str(s) in text for s in says), text
    return text


class Crash(BaseException):
    "What kill -9 leaves: nothing after this line runs."


class Calls:
    """Every write, fsync, rename and removal below promptnb.core counts; call number `k` raises `error` instead.

    A write raises after half of its bytes.
    """

    def __init__(self, monkeypatch, k, error):
        self.m, self.k, self.n, self.error = monkeypatch, k, 0, error

    def hit(self, half=None):
        self.n += 1
        if self.n - 1 == self.k:
            if half:
                half()
            raise self.error() if isinstance(self.error, type) else self.error

    def counted(self, f):
        def g(*a, **k):
            self.hit()
            return f(*a, **k)

        return g

    def open(self, path, mode="r", *a, **k):
        f = builtins.open(path, mode, *a, **k)
        if "w" not in mode and "a" not in mode:
            return f
        write = f.write

        class File:
            def __enter__(s):
                return s

            def __exit__(s, *e):
                f.close()

            def __getattr__(s, n):
                return getattr(f, n)

            def write(s, b):
                self.hit(lambda: (write(b[: len(b) // 2]), f.flush()))
                return write(b)

        return File()

    def __enter__(self):
        m = self.m.setattr
        m(core, "open", self.open, raising=False)
        for name in ("fsync", "replace", "unlink", "rename"):
            m(os, name, self.counted(getattr(os, name)))
        m(Path, "unlink", self.counted(Path.unlink))
        return self

    def __exit__(self, *e):
        self.m.undo()


class Exits(Calls):
    "The same, but call number `k` ends the process with code 9."

    def hit(self, half=None):
        if self.n == self.k:
            if half:
                half()
            os._exit(9)
        self.n += 1


def exit_code_of(work):
    "Run `work` in a fork of this process; returns its exit code: 0 if it came to its end, 1 after an exception."
    if not (pid := os.fork()):
        signal.alarm(60)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tensors(k):
    return {
        "model.a": torch.full((7, 3), float(k)),
        "model.b": torch.arange(5.0) + k,
        "opt.0.step": torch.tensor(float(k)),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CONFIG = dict(fit=dict(lr=0.001, steps=20), weights=[[7, 3], [5]])


def three(folder, upto=15):
    ck = Checkpoints(folder, CONFIG)
    for t in range(5, upto + 1, 5):
        ck.save(t, tensors(t), losses=[(t, 0.5)], recent=[])
    return ck


def regions(path):
    "Name -> (begin, end) of each part of a safetensors file."
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + n])
    return {
        "size": (0, 8),
        "header": (8, 8 + n),
        **{k: tuple(8 + n + x for x in v["data_offsets"]) for k, v in head.items() if k != "__metadata__"},
    }


def flip(path, at, bit=0):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


@contextlib.contextmanager
def tiny_disk(path, size):
    """A file system of `size` bytes at `path`, with a copy of what is in that folder.

    The test is skipped where mounting is not permitted.
    """
    path.mkdir(parents=True, exist_ok=True)
    keep = path.with_name(path.name + ".keep")
    shutil.copytree(path, keep)
    if (
        os.name != "posix"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        shutil.copytree(keep, path, dirs_exist_ok=True)
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
        shutil.rmtree(keep)


def fill(disk, leave=0):
    "A file that leaves `leave` bytes free; remove it to free the space."
    free = os.statvfs(disk)
    n = max(0, free.f_bavail * free.f_frsize - leave)
    (disk / "filler").write_bytes(b"\0" * n)
    return disk / "filler"


def frozen(folder):
    return {
        p: (p.stat().st_mtime_ns, sha256_file(p))
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", ".holder", "filler")
    }


# ---- row 2: killed at each call of a write


def save_until_exception(ck, k, monkeypatch):
    "Save step 15; call `k` of the writing raises Crash. Says whether the saving came to its end."
    try:
        with Calls(monkeypatch, k, Crash):
            ck.save(15, tensors(15), losses=[(15, 0.5)], recent=[])
            return True
    except Crash:
        return False


def save_until_exit(ck, k, monkeypatch):
    "The same in a process of its own, which ends at call `k`."

    def save():
        with Exits(monkeypatch, k, Crash):
            ck.save(15, tensors(15), losses=[(15, 0.5)], recent=[])

    code = exit_code_of(save)
    assert code in (0, 9), f"call {k}"
    return code == 0


def files(folder):
    "Name -> bytes of every file that a reader sees."
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("save", [save_until_exception, save_until_exit], ids=["exception", "exit"])
def test_killed_at_every_call_of_a_checkpoint(save, tmp_path, monkeypatch):
    "The old checkpoint or the new one is whole, no file is half written, and the next saving clears up."
    three(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    for k in range(40):
        folder = tmp_path / str(k)
        three(folder, 10)
        whole |= files(folder)
        ck = Checkpoints(folder, CONFIG)
        done = save(ck, k, monkeypatch)
        t, meta = Checkpoints(folder, CONFIG).latest()
        step = meta["step"]
        assert step in ((15,) if done else (10, 15)) and same(t, tensors(step)), f"call {k}"
        assert files(folder).items() <= whole.items(), f"call {k} left half of a file"
        ck.save(20, tensors(20))
        assert same(ck.latest()[0], tensors(20))
        kept = {f"step-{at:09d}.{kind}" for at in (step, 20) for kind in ("json", "safetensors")}
        assert set(files(folder)) == kept, f"call {k}"
        assert not list(folder.glob(".*.tmp")), f"after call {k} rubbish stays"
        if done:
            break
    assert done and k >= 6


def test_killed_at_every_call_of_a_record(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    for k in range(20):
        write_json(path, dict(run="old", n=1))
        done = False
        try:
            with Calls(monkeypatch, k, Crash):
                write_json(path, dict(run="new", n=2))
                done = True
        except Crash:
            pass
        assert read_json(path) in (dict(run="old", n=1), dict(run="new", n=2)) and [
            p.name for p in tmp_path.iterdir() if not p.name.startswith(".")
        ] == ["r.json"]
        if done:
            break
    assert done and k >= 3 and read_json(path)["run"] == "new"


@pytest.mark.parametrize("place", ["write_minari", "sha256_file", "write_sealed"])
def test_killed_in_collect(place, home):
    """A dataset is there whole or not at all.

    What the killed process left is removed by the next one; what belongs to other families is not.
    """
    root = home / "data" / "minari"
    before = frozen(root)

    def killed_there():
        setattr(collect, place, lambda *a, **k: os._exit(9))
        collect.collect(FAMILY, "medium", 2, threads=1)

    assert exit_code_of(killed_there) == 9
    assert len(list(root.glob(".collect-cheetah-dir-00.*"))) == (place != "write_sealed")
    assert before.items() <= frozen(root).items()
    other = root / ".collect-cheetah-vel-00-x"
    other.mkdir()
    refused(data.load, FAMILY, "medium", says=["is not here", "promptnb collect"])
    collect.collect(FAMILY, "medium", 2, threads=1)
    assert len(data.load(FAMILY, "medium")) == 4 and list(root.glob(".collect-*")) == [other]


def test_killed_when_a_dataset_grows(home):
    "Between the old files and the new manifest: the same command makes it whole."

    def killed_before_the_manifest():
        collect.write_sealed = lambda *a, **k: os._exit(9)
        collect.collect(FAMILY, "random", 6, threads=1)

    assert exit_code_of(killed_before_the_manifest) == 9
    refused(data.load, FAMILY, "random", says=["damaged", "collect again"])
    collect.collect(FAMILY, "random", 6, threads=1)
    assert (
        len(data.load(FAMILY, "random", episodes=6)) == 12
        and len(data.from_minari(ID.replace("expert", "random"))) == 6
    )


# ---- row 5: damaged checkpoints


@pytest.mark.parametrize("part", ["safetensors", "json"])
@pytest.mark.parametrize("length", ["0", "1", "half", "n-1"])
def test_truncated_checkpoint(part, length, tmp_path, capsys):
    ck = three(tmp_path)
    path = tmp_path / f"step-000000015.{part}"
    raw = path.read_bytes()
    n = len(raw.rstrip())
    path.write_bytes(raw[: {"0": 0, "1": 1, "half": n // 2, "n-1": n - 1}[length]])
    t, meta = ck.latest()
    said = capsys.readouterr().err
    assert meta["step"] == 10 and same(t, tensors(10))
    assert "step-000000015" in said and "damaged" in said and "the one before" in said and said.count("\n") == 1
    refused(core.load_tensors, path.with_suffix(".safetensors"), says=["step-000000015", "damaged"])


def test_one_bit_in_every_region_of_a_checkpoint(tmp_path, capsys):
    ck = three(tmp_path)
    path = tmp_path / "step-000000015.safetensors"
    whole, rng = path.read_bytes(), random.Random(0)
    assert set(tensors(0)) < set(regions(path))
    for name, (a, b) in regions(path).items():
        flip(path, rng.randrange(a, b), rng.randrange(8))
        t, meta = ck.latest()
        said = capsys.readouterr().err
        assert meta["step"] == 10 and same(t, tensors(10)) and str(path) in said and "the one before" in said, name
        path.write_bytes(whole)
    assert ck.latest()[1]["step"] == 15


def test_one_bit_in_every_byte_of_its_json(tmp_path, capsys):
    "Step, losses and configuration are under a hash too: a flip is refused, or changes nothing."
    ck = three(tmp_path)
    path = tmp_path / "step-000000015.json"
    whole, rng = path.read_bytes(), random.Random(0)
    good = ck.latest()[1]
    for at in range(len(whole)):
        flip(path, at, rng.randrange(8))
        meta = ck.latest()[1]
        assert meta["step"] == 10 or meta == good, (at, path.read_bytes())
        path.write_bytes(whole)


def test_no_sound_checkpoint_left(tmp_path, capsys):
    ck = three(tmp_path)
    for p in tmp_path.glob("*.safetensors"):
        p.write_bytes(b"")
    assert ck.latest() is None
    said = capsys.readouterr().err
    assert "step-000000015" in said and "step-000000010" in said


def test_damaged_policy_is_made_again(home, one_policy, capsys):
    "The final weights of a finished run have a hash in its record; where it differs the policy is made again."
    run_job()
    (path,) = home.glob("data/runs/policies/*/policy/model.safetensors")
    whole = path.read_bytes()
    first = runs(PRETRAIN)[0]
    for damage in (
        lambda: flip(path, len(whole) - 9),
        lambda: path.write_bytes(whole[:99]),
        lambda: path.write_bytes(pickle.dumps(Bomb(home / "canary"))),
        path.unlink,
    ):
        damage()
        assert multitask.pretrain(first) is not None
        assert path.read_bytes() == whole and not (home / "canary").exists()


# ---- row 6: checkpoints of something else


def test_checkpoint_of_another_configuration(tmp_path):
    three(tmp_path)
    said = refused(
        Checkpoints(tmp_path, dict(CONFIG, fit=dict(lr=0.002, steps=20))).latest,
        says=["step-000000015", "another run", "fit.lr: 0.001 there, 0.002 here"],
    )
    assert "steps" not in said
    refused(
        Checkpoints(tmp_path, dict(CONFIG, weights=[[7, 4], [5]])).latest,
        says=["another run", "weights: [[7, 3], [5]] there, [[7, 4], [5]] here"],
    )
    refused(Checkpoints(tmp_path, dict(CONFIG, data="abc")).latest, says=["data: None there, 'abc' here"])


def test_checkpoint_of_other_shapes_in_fit(tmp_path):
    class Model(torch.nn.Linear):
        def loss(self, batch):
            return self(batch).pow(2).mean()

    class Draws:
        def __init__(self, n):
            self.n = n

        def batch(self, t):
            return torch.ones(2, self.n)

    def go(n, **kw):
        return train.fit(Model(n, 1), Draws(n), train.FitConfig(4, checkpoint_every=2, **kw), tmp_path)

    go(3)
    refused(go, 4, says=["step-000000004", "weights", "[[1, 3], [1]] there, [[1, 4], [1]] here"])
    refused(go, 3, lr=0.5, says=["lr: 0.0001 there, 0.5 here"])


def test_checkpoint_of_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "FORMAT", core.FORMAT + 1)
    ck = three(tmp_path)
    monkeypatch.undo()
    refused(ck.latest, says=["step-000000015", f"format {core.FORMAT + 1}", "newer"])


# ---- row 7: files that would run code if they were unpickled


def torch_bomb(canary):
    b = io.BytesIO()
    torch.save(Bomb(canary), b)
    return b.getvalue()


@pytest.mark.parametrize("raw", [lambda c: pickle.dumps(Bomb(c)), torch_bomb], ids=["pickle", "torch"])
def test_hostile_checkpoint(raw, tmp_path, capsys):
    canary = tmp_path / "canary"
    raw = raw(canary)
    ck = three(tmp_path)
    path = tmp_path / "step-000000015.safetensors"
    path.write_bytes(raw)
    assert ck.latest()[1]["step"] == 10 and str(path) in capsys.readouterr().err  # its hash is not the recorded one
    meta = {k: v for k, v in read_json(path.with_suffix(".json")).items() if k != "hash"}
    core.write_sealed(path.with_suffix(".json"), dict(meta, sha256=hashlib.sha256(raw).hexdigest()))
    assert ck.latest()[1]["step"] == 10 and str(path) in capsys.readouterr().err  # recorded: it is no safetensors
    refused(core.load_tensors, path, CONFIG, says=[path, "damaged"])
    path.with_suffix(".json").unlink()
    refused(core.load_tensors, path, says=[path, "not a finished checkpoint"])
    for other in (".pt", ".pkl", ".bin"):
        path.with_suffix(other).write_bytes(raw)
        refused(core.load_tensors, path.with_suffix(other), says=["nothing else is opened"])
    for text in ("[]", "3", "null", '"x"'):
        path.with_suffix(".json").write_text(text)
        path.write_bytes(raw)
        refused(core.load_tensors, path, says=["damaged"])
    assert not canary.exists()


def test_hostile_expert(home):
    path = experts.expert_path(FAMILY)
    card = read_json(path.with_suffix(".json"))
    path.write_bytes(pickle.dumps(Bomb(home / "canary")))
    refused(experts.load_expert, FAMILY, says=[path, "damaged"])
    write_json(path.with_suffix(".json"), dict(card, sha256=sha256_file(path)))
    refused(experts.load_expert, FAMILY, says=[path])
    assert not (home / "canary").exists()


ID = collect.dataset_id(FAM, 0, "expert")


def columns(home, i=0, quality="expert"):
    return home / "data" / "minari" / collect.dataset_id(FAM, i, quality) / "columns.safetensors"  # what training reads


def hdf5(home):
    return columns(home).parent / "data" / "main_data.hdf5"  # what Minari reads


def known_again(file, i=0):
    "Make the manifest say that the file is as it should be."
    path = collect.manifest_path(FAM)
    m = collect.manifest(FAM)
    m[collect.dataset_id(FAM, i, "expert")]["columns"] = sha256_file(file)
    write_sealed(path, m)


@pytest.mark.parametrize("raw", [lambda c: pickle.dumps(Bomb(c)), torch_bomb], ids=["pickle", "torch"])
def test_hostile_dataset(raw, home):
    raw = raw(home / "canary")
    for file in (columns(home), hdf5(home)):
        file.write_bytes(raw)
    refused(data.load, FAMILY, says=[columns(home), "damaged", "collect again"])
    refused(data.from_minari, ID, says=[ID])
    known_again(columns(home))
    refused(data.load, FAMILY, says=[columns(home), "damaged"])
    collect.manifest_path(FAM).write_bytes(raw)
    refused(data.load, FAMILY, says=["cheetah-dir.json", "damaged"])
    assert not (home / "canary").exists()


def test_hostile_arrays(tmp_path):
    good = dict(observations=np.zeros((3, 2)), actions=np.zeros((3, 1)), rewards=np.zeros(3))
    for k in good:
        bad = np.empty(good[k].shape, object)
        bad[:] = Bomb(tmp_path / "canary")
        refused(data.from_arrays, [good, dict(good, **{k: bad})], says=["trajectory 1", "Python objects"])
    assert not (tmp_path / "canary").exists()


# ---- rows 8 and 9: data that is not what it should be


@pytest.mark.parametrize("length", [0, 1, 0.5, -1])
def test_truncated_dataset(length, home):
    for file in (columns(home), hdf5(home)):
        raw = file.read_bytes()
        file.write_bytes(raw[: int(len(raw) * length) if length == 0.5 else length])
    refused(data.load, FAMILY, says=[columns(home), "damaged"])
    refused(data.from_minari, ID, says=[ID])
    known_again(columns(home))
    refused(data.load, FAMILY, says=[columns(home), "damaged"])


def test_one_bit_of_a_dataset(home):
    file = columns(home)
    whole, rng = file.read_bytes(), random.Random(0)
    assert {*data.COLUMNS} - {"legal"} < set(regions(file))
    for a, b in regions(file).values():
        flip(file, rng.randrange(a, b), rng.randrange(8))
        refused(data.load, FAMILY, says=[file, "its hash is not the one recorded"])
        file.write_bytes(whole)
    assert len(data.load(FAMILY)) == 8
    refused(
        data.load,
        FAMILY,
        episodes=5,
        says=["with 5 episodes is not here", "promptnb collect --family cheetah-dir --quality expert --episodes 5"],
    )


def test_the_damaged_dataset_can_be_mended_as_it_says(home):
    "`promptnb collect` makes a damaged dataset again, and leaves the whole ones alone."
    file = columns(home, quality="random")
    before = frozen(home / "data" / "minari")
    flip(file, 5000)
    said = refused(data.load, FAMILY, "random")
    assert "promptnb collect --family cheetah-dir --quality random" in said
    collect.collect(FAMILY, "random", 4, threads=1)
    assert len(data.load(FAMILY, "random")) == 8 and all(
        v == before[k]
        for k, v in frozen(home / "data" / "minari").items()
        if "cheetah-dir-00/random" not in str(k) and k.name != "cheetah-dir.json"
    )


@pytest.mark.parametrize("damage", [lambda x: x[:99], lambda x: "[]", lambda x: x.replace('"seed": 0', '"seed": 1')])
def test_a_damaged_manifest_is_set_aside(home, damage):
    path = collect.manifest_path(FAM)
    path.write_text(damage(path.read_text()))
    refused(data.load, FAMILY, says=[path, "damaged"])
    collect.collect(FAMILY, "expert", 4, threads=1)
    assert len(data.load(FAMILY)) == 8 and path.with_name(f"{path.name}.damaged-1").exists()


def test_dataset_that_is_not_there(home):
    refused(
        data.load,
        "cheetah-vel",
        says=["promptnb/cheetah-vel-00/expert-v0", "promptnb collect --family cheetah-vel --quality expert"],
    )
    columns(home).unlink()
    refused(data.load, FAMILY, says=[columns(home), "damaged"])
    shutil.rmtree(home / "data" / "minari")
    refused(data.load, FAMILY, says=["promptnb collect --family cheetah-dir"])


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda ep: ep["observations"].__setitem__((3, 1), np.nan), ["'observations' has NaN or infinity at step 3"]),
        (lambda ep: ep["actions"].__setitem__((0, 0), np.inf), ["'actions' has NaN or infinity at step 0"]),
        (lambda ep: ep["rewards"].__setitem__(199, np.nan), ["'rewards' has NaN or infinity at step 199"]),
        (lambda ep: ep.__delitem__("rewards"), ["rewards"]),
        (lambda ep: ep.__delitem__("observations"), ["observations"]),
        (lambda ep: ep.__delitem__("terminations"), ["terminations"]),
    ],
    ids=["nan-state", "inf-action", "nan-reward", "no-rewards", "no-observations", "no-terminations"],
)
def test_dataset_with_bad_contents(edit, says, home):
    import h5py

    with h5py.File(hdf5(home), "r+") as f:
        edit(f["episode_1"])
    refused(data.from_minari, ID, says=says)


def test_dataset_of_another_body(home):
    ant = dict(observations=np.zeros((200, 27)), actions=np.zeros((200, 8)), rewards=np.zeros(200))
    for i in (0, 1):
        known_again(data.write_columns(columns(home, i), [data.from_arrays([ant] * 4, [i] * 4)]), i)
    refused(data.load, FAMILY, says=["cheetah-dir", "27, 8", "20, 6"])


def test_arrays(tmp_path):
    good = dict(observations=np.ones((3, 2)), actions=np.ones((3, 1)), rewards=np.ones(3))

    def cut(**kw):
        return [good, dict(good, **kw)]

    s = data.from_arrays([good, {k: v.astype(np.float64) for k, v in good.items()}])
    assert s.s.dtype == s.a.dtype == s.r.dtype == s.rtg.dtype == torch.float32 and len(s) == 2
    assert len(data.from_arrays(cut(observations=np.ones((4, 2))))) == 2  # T + 1 observations
    for k in good:
        refused(data.from_arrays, [good, {n: x for n, x in good.items() if n != k}], says=["trajectory 1", f"no '{k}'"])
    for bad, says in (
        (dict(observations=np.ones((3, 5))), "state and action sizes 5, 1, but 2, 1"),
        (dict(actions=np.ones((3, 2))), "sizes 2, 2"),
        (dict(observations=np.ones(3)), "observations (3,)"),
        (dict(actions=np.ones((2, 1))), "actions (2, 1)"),
        (dict(observations=np.ones((7, 2))), "observations (7, 2)"),
        (dict(rewards=np.ones((3, 1))), ""),
        (dict(rewards=np.ones(0)), "no steps"),
        (dict(rewards=np.array([1, np.nan, 1])), "'rewards' has NaN or infinity at step 1"),
        (dict(observations=np.array([[1, 1], [1, -np.inf], [1, 1]])), "'observations' has NaN or infinity at step 1"),
        (dict(actions=np.array([["a"]] * 3)), "not numbers"),
        (dict(observations=[[1, 2], [1], [1, 2]]), "unequal length"),
        (dict(rewards=1.0), "a single number"),
    ):
        refused(data.from_arrays, cut(**bad), says=["trajectory 1", says])
    refused(data.from_arrays, [], says=["no trajectories"])
    refused(data.from_arrays, [{}], says=["trajectory 0", "nothing"])


@pytest.mark.fault(8)
def test_damaged_dataset_through_the_command_line(home):
    "The job says so, collects it again and goes on."
    flip(columns(home), 5000)
    p = went(cli(home, "job", PRETRAIN, *SMOKE))
    assert "damaged" in p.stderr + p.stdout and "Traceback" not in p.stderr
    same_records(home, [f"{name}.json" for _, name in expected(PRETRAIN)])
    assert columns(home).read_bytes() == columns(finished_home()).read_bytes()


DAMAGED_RECORDS = {
    "a value edited": lambda text: re.sub(r'"value": -?[0-9.]+', '"value": 9999.0', text, count=1),
    "a list": lambda text: "[]",
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "without its rows": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "rows"}),
}


def test_damaged_records_are_named_and_made_again(tmp_path):
    "`status` names each, no table shows one, and `run` sets them aside and makes them again."
    home = new_home(tmp_path / "home", "data/results", "data/runs", "data/minari")
    names = [name for name in paths(home) if "pretrain" not in name][: len(DAMAGED_RECORDS)]
    for name, harm in zip(names, DAMAGED_RECORDS.values(), strict=True):
        path = paths(home)[name]
        path.write_text(harm(path.read_text()))
    said = went(cli(home, "status", PAPER, *SMOKE))
    assert f"{len(names)} failed" in said.stdout and "damaged" in said.stdout and "Traceback" not in said.stderr
    one_line(cli(home, "render", PAPER, *SMOKE, "--exhibit", "table1"), "lacks", "damaged")
    went(cli(home, *RUN, "--cores", 2))
    same_records(home, names)
    assert len(list((home / "data" / "results" / PAPER).glob("*.damaged-1"))) == len(names)


# ---- row 10: the loss is not a number


@pytest.fixture(params=[float("nan"), float("inf")], ids=["nan", "inf"])
def diverged(request, home, one_policy, monkeypatch):
    "The record of a pre-training whose batch at step 12 holds NaN or infinity."
    real = train.step_once

    def step_once(model, opt, batch, t, *a):
        if t == 12:
            spoilt = dataclasses.replace(batch.history, a=batch.history.a * request.param)
            batch = core.Batch(spoilt, batch.prompt)
        return real(model, opt, batch, t, *a)

    monkeypatch.setattr(train, "step_once", step_once)
    (path,) = run_job()
    return path


def test_diverged(diverged, home):
    "The record says at which step, keeps what was measured before, and no policy is left to be tuned."
    rec = read_json(diverged)
    assert rec["status"] == "diverged" and "at step 12" in rec["why"] and json.loads(diverged.read_text())["why"]
    assert max(w["step"] for w in rec["rows"] if w["metric"] == "return") == 10
    assert all(np.isfinite(w["value"]) for w in rec["rows"])
    (folder,) = home.glob("data/runs/policies/*")
    t, meta = Checkpoints(folder, read_json(folder / "step-000000010.json")["config"]).latest()
    assert meta["step"] == 10 and all(x.isfinite().all() for x in t.values())
    assert not (folder / "policy").exists()


def test_tuning_of_a_diverged_policy(diverged):
    "Tuning is diverged too, with the reason, and the table prints that in the place of a number."
    (tuned,) = run_job(TUNE)  # its first recipe starts from this policy
    rec = read_json(tuned)
    assert rec["status"] == "diverged" and not rec["rows"] and "pre-training diverged" in rec["why"]
    r = runs(TUNE)[0].recipe
    t = tables.tidy_table(View(TABLE1, "smoke", partial=True))
    row = t[(t.method == r.method) & (t.family == FAMILY)].iloc[0]
    assert row.note == "1 diverged" and np.isnan(row["mean"]) and np.isnan(row.difference)
    assert tables.printed(t).loc[r.method, FAMILY].startswith("1 diverged")


def test_diverged_seed_in_a_full_table(tmp_home):
    fabricate(tmp_home, TABLE1, "laptop", (0, 1))
    fabricate(tmp_home, TABLE1, "laptop", (2,), status="diverged", rows=False)
    t = tables.tidy_table(View(TABLE1, "laptop"))
    assert (t.n == 2).all() and (t.note == "1 diverged").all()
    lines = tables.printed(t).iloc[0][FAMILY].splitlines()
    assert lines[1].startswith("n = 2 [") and lines[2] == "1 diverged"


# ---- row 11: no space


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_at_every_call_of_a_checkpoint(code, tmp_path, monkeypatch):
    for k in range(40):
        folder = tmp_path / str(k)
        ck = three(folder, 10)
        before = frozen(folder)
        done = False
        with Calls(monkeypatch, k, OSError(code, os.strerror(code))):
            try:
                ck.save(15, tensors(15))
                done = True
            except PromptnbError as e:
                assert "no space left on the disk for" in str(e) and "step-000000015" in str(e)
            except OSError:
                assert k >= 6  # removing an old file needs no space: nothing is promised
        if done:
            break
        assert ck.latest()[1]["step"] in (10, 15) and not list(folder.glob(".*.tmp")), f"call {k}"
        assert ck.latest()[1]["step"] == 15 or all(frozen(folder)[p] == v for p, v in before.items())
        ck.save(15, tensors(15))
        assert same(ck.latest()[0], tensors(15))
    assert done


def test_full_disk_in_training(home, one_policy, capfd):
    """The disk fills at one place after another, and each attempt goes on from the one before.

    The end is that of an unbroken run.
    """
    (whole,) = finished_home().glob(f"data/runs/policies/{FAMILY}.{runs(PRETRAIN)[0].recipe.pretrain.name}.*")
    need = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    with tiny_disk(home / "data" / "runs", 16 * need + 2**20) as disk:
        failed = 0
        for leave in [0, 4096, *(need * i // 8 for i in range(1, 13))]:
            filler = fill(disk, leave)
            before = {p: v for p, v in frozen(disk).items() if "step-" in p.name}
            made = run_job()
            filler.unlink()
            said = capfd.readouterr().err
            if made:
                break
            failed += 1
            why = read_json(results_dir(PAPER) / f"{one_policy}.failed.json")["why"]
            assert "no space left" in why and "\n" not in why and "Traceback" not in said, (leave, why, said)
            last = max(before, default=None)
            assert last is None or frozen(disk).get(last) == before[last]
        assert made and failed >= 3 and not (results_dir(PAPER) / f"{one_policy}.failed.json").exists()
        (name,) = weights(home)
        assert weights(home)[name] == weights(finished_home())[name]
        same_records(home, [f"{one_policy}.json"])
        assert not list(disk.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_disk_for_the_log(monkeypatch, capsys):
    "What does not fit in a log is still on the screen, and closing the log breaks nothing."
    monkeypatch.setattr(job, "log_path", lambda run: Path("/dev/full"))
    with job.logged(None):
        print("a line")
    assert capsys.readouterr().out == "a line\n"


def test_full_disk_for_records(home, one_policy):
    old = write_json(home / "data" / "results" / PAPER / "smoke.old.json", dict(status="ok"))
    with tiny_disk(home / "data" / "results", 2**16):
        filler = fill(home / "data" / "results")
        before = frozen(old.parent)
        refused(run_job, says=["no space left", one_policy])
        assert frozen(old.parent) == before
        filler.unlink()
        run_job()
        same_records(home, [f"{one_policy}.json"])
        assert read_json(old) == dict(status="ok")


def test_full_disk_in_collect(home):
    root = home / "data" / "minari"
    shutil.rmtree(root / "promptnb" / "cheetah-dir-01")
    m = collect.manifest(FAM)
    write_sealed(collect.manifest_path(FAM), {k: v for k, v in m.items() if "cheetah-dir-00" in k})
    with tiny_disk(root, 4 * 2**20) as disk:
        before, failed, ok = {p: v for p, v in frozen(disk).items() if "cheetah-dir-00" in str(p)}, 0, False
        for leave in (0, 8192, 40_000, 90_000, 130_000, 160_000, 190_000, 220_000, 260_000, 400_000, 2**20):
            filler = fill(disk, leave)
            try:
                collect.collect(FAMILY, "expert", 4, threads=1, say=lambda *_: None)
                ok = True
            except PromptnbError as e:
                assert "no space left" in str(e)
                failed += 1
            filler.unlink()
            assert all(frozen(disk)[p] == v for p, v in before.items()), leave
            assert not list(disk.glob(".collect-*")), leave
            if ok:
                break
            with pytest.raises(PromptnbError, match="cheetah-dir-01/expert-v0 with 1 episodes is not here"):
                data.load(FAMILY)
        assert ok and failed >= 2 and len(data.load(FAMILY)) == 8
        assert torch.equal(data.load(FAMILY).s, data.load(FAMILY, root=finished_home() / "data" / "minari").s)


def assert_whole_pictures(folder):
    "f.pdf and f.png begin and end as such files do; what else is there is text."
    pdf, png = (folder / "f.pdf").read_bytes(), (folder / "f.png").read_bytes()
    assert pdf[:4] == b"%PDF" and pdf.rstrip()[-5:] == b"%%EOF"
    assert png[:4] == b"\x89PNG" and png[-8:-4] == b"IEND"
    others = [p for p in folder.iterdir() if p.name not in ("f.pdf", "f.png", "filler", ".lock", ".holder")]
    assert all(p.suffix in (".csv", ".md", ".tex", ".txt") for p in others), others


def test_full_disk_for_figures_and_tables(tmp_home):
    import matplotlib.pyplot as plt
    import pandas as pd

    fig, ax = plt.subplots()
    ax.plot([1, 2])
    numbers = pd.DataFrame(dict(x=range(2000), y=range(2000)))
    folder = core.figures_dir(PAPER) / "smoke"
    table = tables.tidy_table(View(TABLE1, "smoke", partial=True))

    def save():
        return (
            tables.save_figure(fig, numbers, folder, "f", "-"),
            tables.save_table(tables.printed(table), table, folder, "t", "-"),
        )

    with tiny_disk(folder, 2**20) as disk:
        save()
        before = frozen(disk)
        assert len(before) == 7
        for leave in (0, 4096, 12_000, 24_000):
            filler = fill(disk, leave)
            ax.plot([2, 1])
            refused(save, says=["no space left"])
            filler.unlink()
            assert set(frozen(disk)) == set(before), leave
            assert_whole_pictures(folder)
        save()
        plt.close(fig)


@pytest.mark.fault(11)
def test_full_disk_through_the_command_line(home):
    "Nothing fits, not even the executed notebook."
    with tiny_disk(home / "data" / "runs", 4 * 2**20) as disk:
        filler = fill(disk)
        one_line(cli(home, "job", PRETRAIN, *SMOKE), "no space left")
        assert not list(disk.rglob("*.ipynb")) and not list(disk.rglob("*.tmp*"))
        filler.unlink()
        went(cli(home, "job", PRETRAIN, *SMOKE))
        assert weights(home) == weights(finished_home()) and not list(home.rglob("*.failed*"))


# ---- row 12: odd paths


@pytest.mark.fault(12)
def test_path_with_spaces_and_unicode(tmp_path):
    "The finished workbook elsewhere, one record lost: the graph makes that one again and nothing else."
    home = new_home(tmp_path / "my work (é, 提示)" / ("long " * 30), "data/minari", "data/runs", "data/results")
    before = frozen(home / "data" / "results")
    name = f"{runs(TUNE)[2].id}.json"
    paths(home)[name].unlink()
    went(cli(home, *RUN))
    same_records(home, [name])
    after = frozen(home / "data" / "results")
    assert after.keys() == before.keys() and {p.name for p in before if after[p] != before[p]} == {name}
    one_line(cli(home, "render", PAPER, *SMOKE, "--exhibit", "table1"), "table1 at smoke scale lacks")


COMMANDS = (
    ("job", PRETRAIN, *SMOKE),
    ("collect", "--family", FAMILY, "--episodes", "1", "--seed", "5"),
    RUN,
    ("render", PAPER, *SMOKE, "--partial"),
)


@pytest.mark.fault(12)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("args", COMMANDS, ids=lambda a: a[0])
def test_read_only_folder(args, code, home, monkeypatch, capsys, no_kernel):
    def no(*a, **k):
        raise OSError(code, os.strerror(code), str(a[0]))

    def writes(f):
        return lambda p, mode="r", *a, **k: no(p) if set(mode) & set("wax+") else f(p, mode, *a, **k)

    before = frozen(home)
    with monkeypatch.context() as m:
        for name in ("mkdir", "replace", "rename"):
            m.setattr(os, name, no)
        os_open = os.open
        m.setattr(
            os,
            "open",
            lambda p, flags, *a, **k: (
                no(p) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else os_open(p, flags, *a, **k)
            ),
        )
        m.setattr(builtins, "open", writes(open))
        m.setattr(io, "open", writes(io.open))
        assert command.main([*map(str, args)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("promptnb: cannot write ") and "\n" not in said and frozen(home) == before


def test_read_only_disk(home):
    with tiny_disk(home / "data", 16 * 2**20) as disk:
        if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
            pytest.skip("remounting is not permitted here")
        for args in COMMANDS[:3]:
            one_line(cli(home, *args), "cannot write", "read-only")


# ---- row 15: names and values that are wrong, refused before anything starts


@pytest.fixture
def no_kernel(monkeypatch):
    "Starting a kernel, a notebook or Snakemake fails the test."
    import papermill

    def no(*a, **k):
        pytest.fail("something was started")

    monkeypatch.setattr(papermill, "execute_notebook", no)
    real = subprocess.run
    monkeypatch.setattr(command.subprocess, "run", lambda cmd, *a, **k: real(cmd, *a, **k) if cmd[0] == "git" else no())


WRONG = [
    (("run", "promt_tuning_dt"), ["unknown paper", "'prompt_tuning_dt'"]),
    (("run", PAPER, "--exhibit", "tabel1"), ["unknown exhibit 'tabel1'", "did you mean 'table1'?"]),
    (("run", PAPER, "--exhibit", "fig1"), ["'fig1' cannot be made"]),
    (("run", PAPER, "--scale", "smok"), ["unknown scale 'smok'", "'smoke'"]),
    (("run", PAPER, "--family", "cheeta-dir"), ["unknown family 'cheeta-dir'", "'cheetah-dir'"]),
    (("run", PAPER, "--family", "hopper"), ["unknown family of these exhibits 'hopper'", "cheetah-dir"]),
    (("run", PAPER, "--exhibit", "fig5", "--family", "ant-dir"), ["unknown family of these exhibits 'ant-dir'"]),
    (("run", PAPER, "-p", "sclae=smoke"), ["unknown parameter", "'sclae'", "'scale'"]),
    (("run", PAPER, "-p", "scale=laptob"), ["unknown scale", "'laptop'"]),
    (("run", PAPER, *SMOKE, "-p", "scale=desk"), ["--scale is smoke, but -p scale=desk says otherwise"]),
    (("run", PAPER, "--seeds", "0,1", "-p", "seed=3"), ["--seeds is 0,1, but -p seed=3 says otherwise"]),
    (("run", PAPER, "--accelerator", "cuda", "-p", "accelerator=cpu"), ["-p accelerator=cpu says otherwise"]),
    (("run", PAPER, "-p", "accelerator=cudda"), ["unknown accelerator", "'cuda'"]),
    (("run", PAPER, "-p", "seed=zero"), ["parameter 'seed'", "is int, not 'zero'"]),
    (("run", PAPER, "-p", "seed=1.5"), ["parameter 'seed'", "is int, not 1.5"]),
    (("run", PAPER, "-p", "seed"), ["-p takes name=value"]),
    (("run", PAPER, "-p", "threads=0"), ["'threads'"]),
    (("run", PAPER, "--seeds", "a,b"), ["--seeds takes whole numbers"]),
    (("run", PAPER, "--seeds", "-1"), ["--seeds"]),
    (("run", PAPER, "--cores", "0"), ["--cores is 0"]),
    (("run", PAPER, "--profile", "slrum"), ["unknown profile 'slrum'", "'slurm'"]),
    (
        ("job", f"{PAPER}/table1/cheetah-dir/pretrian"),
        ["unknown job", f"did you mean '{PAPER}/table1/cheetah-dir/pretrain'?"],
    ),
    (("job", PRETRAIN, "--scale", "smoek"), ["unknown scale", "'smoke'"]),
    (("job", PRETRAIN, "--accelerator", "gpu"), ["unknown accelerator 'gpu'"]),
    (("job", PRETRAIN, "--threads", "0"), ["'threads' is 0, but must be at least 1"]),
    (("job", PRETRAIN, "-p", "sed=1"), ["unknown parameter", "'seed'"]),
    (("job", PRETRAIN, "-p", "seed=x"), ["parameter 'seed'", "is int"]),
    (("job", PRETRAIN, "-p", "seed"), ["-p takes name=value"]),
    (("job", PRETRAIN, "--seed", "-1"), ["seed"]),
    (("render", "prompt_tuning"), ["unknown paper", "'prompt_tuning_dt'"]),
    (("render", PAPER, "--exhibit", "tabel1"), ["unknown exhibit", "'table1'"]),
    (("render", PAPER, "--scale", "laptpo"), ["unknown scale", "'laptop'"]),
    (("render", PAPER, "--exhibit", "table1", "--shipped", "--scale", "paper"), ["table1 at paper scale lacks"]),
    (("verify", "prompt_tunning_dt"), ["unknown paper", "'prompt_tuning_dt'"]),
    (("verify", PAPER, "--exhibit", "tabel1"), ["unknown exhibit", "'table1'"]),
    (("verify", PAPER, "--scale", "laptpo"), ["unknown scale", "'laptop'"]),
    (("verify", PAPER), ["nothing to compare at laptop scale"]),
    (("records", "pack", "prompt_tunning_dt"), ["unknown paper", "'prompt_tuning_dt'"]),
    (("records", "pack", PAPER, "--scale", "laptpo"), ["unknown scale", "'laptop'"]),
    (("records", "pack", PAPER), ["has no record of laptop scale"]),
    (("status", "prompt_tunning_dt"), ["unknown paper", "'prompt_tuning_dt'"]),
    (("status", PAPER, "--scale", "papper"), ["unknown scale", "'paper'"]),
    (("collect", "--family", "ant-dri"), ["unknown family", "'ant-dir'"]),
    (("collect", "--family", "hoper"), ["unknown family 'hoper'", "did you mean 'hopper'?"]),
    (("collect",), ["which family?", "hopper"]),
    (("collect", "--list", "--family", "hoper"), ["unknown family 'hoper'"]),
    (("collect", "--family", FAMILY, "--quality", "exprt"), ["unknown quality", "'expert'"]),
    (
        ("collect", "--family", "halfcheetah", "--quality", "expert", "--quality", "medium-exprt"),
        ["unknown quality of halfcheetah", "did you mean 'medium-expert'?"],
    ),
    (("collect", "--family", "hopper", "--quality", "minari-exprt"), ["did you mean 'minari-expert'?"]),
    (("collect", "--family", FAMILY, "--quality", "zzz"), ["unknown quality", "expert, medium, random, replay"]),
    (("collect", "--family", FAMILY, "--episodes", "0"), ["episodes"]),
    (("collect", "--family", FAMILY, "--episodes", "-3"), ["episodes", "-3"]),
    (("collect", "--family", FAMILY, "--scale", "tiny"), ["unknown scale"]),
    (("film", f"{PAPER}/cheetah-vel/rankign"), ["unknown recipe", f"'{PAPER}/cheetah-vel/ranking'"]),
    (("film", f"{PAPER}/cheetah-vel/ranking", "--scale", "smokey"), ["unknown scale", "'smoke'"]),
    (("film", f"{PAPER}/cheetah-vel/lora"), ["tunes no prompt"]),
    (("film", f"{PAPER}/cheetah-vel/ranking", *SMOKE), ["has not been run", "promptnb run"]),
]


@pytest.mark.fault(15)
@pytest.mark.parametrize("args, says", WRONG, ids=lambda x: " ".join(x)[:60] if isinstance(x, tuple) else "")
def test_wrong_argument(args, says, tmp_home, capsys, no_kernel):
    before = frozen(tmp_home)
    assert command.main([*args]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("promptnb: ") and "\n" not in said and all(s in said for s in says), said
    assert frozen(tmp_home) == before, "something was written"


@pytest.mark.parametrize(
    "args", [("rnu", PAPER), ("run", PAPER, "--accelerator", "gpu"), ("job", PRETRAIN, "--seed", "x"), ("run",), ()]
)
def test_wrong_usage(args, capsys, no_kernel):
    with pytest.raises(SystemExit) as e:
        command.main([*args])
    assert e.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("promptnb")


def test_a_home_that_is_not_there_is_refused_and_not_made(tmp_path, monkeypatch, capsys):
    home = tmp_path / "wrokbook"
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    assert command.main(["status", PAPER]) == 2
    assert capsys.readouterr().err == f"promptnb: PROMPTNB_HOME is {home}, which is no folder\n"
    assert not home.exists()


@pytest.mark.fault(15)
def test_wrong_argument_through_the_command_line(tmp_home):
    one_line(cli(tmp_home, "run", PAPER, "--exhibit", "tabel1"), "did you mean 'table1'?")


def test_wrong_task_and_tuner():
    import gymnasium as gym

    from promptnb.tuners.core import make_tuner

    refused(tasks.parse_task, "cheeta-vel-07", says=["unknown family 'cheeta-vel'", "'cheetah-vel'"])
    refused(tasks.parse_task, "cheetah-vel-99", says=["cheetah-vel-99", "cheetah-vel-00 to cheetah-vel-39"])
    refused(tasks.parse_task, "cheetah-vel", says=["<family>-<number>"])
    refused(tasks.parse_task, "cheetah-vel-x", says=["unknown task"])
    refused(
        gym.make,
        "promptnb/cheetah-dir-v0",
        task=5,
        says=["unknown task 'cheetah-dir-5'", "cheetah-dir-00 to cheetah-dir-01"],
    )
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `cheetah-dir`"):
        gym.make("promptnb/cheetah-dri-v0")
    refused(make_tuner, "rankng", says=["unknown tuner 'rankng'", "'ranking'"])
    refused(make_tuner, "ranking", stpes=3, says=["hyper-parameter of tuner 'ranking' 'stpes'", "'steps'"])
    refused(train.autocast, "fp8", says=["unknown precision"])


@pytest.mark.fault(13)
def test_gpu_that_is_not_there(tmp_home, capsys, no_kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([*RUN, "--accelerator", "cuda"]) == 2
    assert "accelerator=cuda, but torch sees no GPU: use accelerator=auto or cpu" in capsys.readouterr().err


# ---- row 16: a notebook that does not come to its end


def broken(home, source):
    "Put a cell after the parameters of the job notebook; returns what undoes it."
    path = home / "nbs" / "papers" / "run.ipynb"
    whole = path.read_text()
    nb = json.loads(whole)
    at = next(i for i, c in enumerate(nb["cells"]) if "parameters" in c["metadata"].get("tags", []))
    nb["cells"].insert(
        at + 1, dict(cell_type="code", id="broken", metadata={}, outputs=[], execution_count=None, source=[source])
    )
    path.write_text(json.dumps(nb))
    return lambda: path.write_text(whole)


def assert_told_as_failed(this, why):
    "The record of the run `this`, the status page and the table all say that it failed, and the first two why."
    rec = read_json(results_dir(PAPER) / f"{this.id}.failed.json")
    assert rec["status"] == "failed" and why.lower() in rec["why"].lower() and rec["why"] and not rec["rows"]
    refused(lambda: View(TABLE1, "smoke").rows, says=["lacks", "promptnb run"])
    (line,) = view.status(View(TABLE1, "smoke"))["failed"]
    assert this.recipe.method in line and why.lower() in line.lower()
    t = tables.tidy_table(View(TABLE1, "smoke", partial=True))
    row = t[(t.method == this.recipe.method) & (t.family == FAMILY)].iloc[0]
    assert row.note == "1 failed" and np.isnan(row["mean"])


@pytest.mark.fault(16)
def test_notebook_that_breaks(tmp_path, monkeypatch):
    "A dead kernel, an exception and an exit are told as such; the mended notebook makes the one record that lacks."
    home = new_home(tmp_path / "home", "data/minari", "data/runs/policies", "data/results")
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    this = next(x for x in runs(TUNE) if x.recipe.key == "ranking")
    paths(home)[f"{this.id}.json"].unlink()
    before = frozen(home / "data" / "results")
    final = runs_dir() / "notebooks" / f"{run.run_id(TUNE, 'smoke', 0)}.ipynb"
    stamp = job.stamp(job.find_job(TUNE), 0, "smoke")
    for source, why in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "Kernel died"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", ""),
    ):
        mend = broken(home, source)
        one_line(cli(home, "job", TUNE, *SMOKE), f"1 of {len(METHODS)} runs", this.id, why)
        mend()
        assert not final.exists() and not stamp.exists() and not list(home.rglob("*.tmp*"))
        assert_told_as_failed(this, why)
    went(cli(home, "job", TUNE, *SMOKE))
    assert final.exists() and stamp.exists() and not list(home.rglob("*.failed.*"))
    same_records(home, [f"{this.id}.json"])
    after = frozen(home / "data" / "results")
    assert all(after[p] == v for p, v in before.items())


def test_one_recipe_that_breaks_leaves_the_others(home, monkeypatch, capfd):
    real, n = job.runs_of, []
    monkeypatch.setattr(job, "runs_of", lambda *a: real(*a)[:2])
    monkeypatch.setattr(
        multitask,
        "new_policy",
        lambda p, *a, new=multitask.new_policy: n.append(p) or (new(p, *a) if len(n) > 1 else 1 / 0),
    )
    made = run_job()
    a, b = (x.id for x in runs(PRETRAIN)[:2])
    assert [p.name for p in made] == [f"{b}.json"] and set(paths(home)) == {f"{a}.failed.json", f"{b}.json"}
    assert read_json(paths(home)[f"{a}.failed.json"])["why"] == "ZeroDivisionError: division by zero"
    assert len(run_job()) == 2 and set(paths(home)) == {f"{a}.json", f"{b}.json"}
    same_records(home, paths(home))


# ---- row 17: a seed is missing


@dataclasses.dataclass
class Gap:
    "A full Table 1, the recipe whose seed 0 was then removed, and what a refusal says of it."

    full: object
    recipe: object
    says: list


@pytest.fixture
def gap(tmp_home):
    "Three seeds of every run of Table 1 but one."
    fabricate(tmp_home, TABLE1, "laptop", (0, 1, 2))
    full = tables.tidy_table(View(TABLE1, "laptop"))
    r = recipes.resolve(recipes.RECIPES[TABLE1.recipes[3]], "laptop")
    Run(r, "laptop").path.unlink()
    says = [
        f"lacks 1 of {3 * len(TABLE1.recipes)} runs",
        r.method,
        "seed 0: missing",
        f"promptnb run {PAPER} --exhibit table1 --scale laptop",
        "--partial",
    ]
    return Gap(full, r, says)


def test_table_with_a_seed_missing(gap):
    "It is refused; a partial one counts the seeds of that cell only as two, and says so."
    full, r = gap.full, gap.recipe
    assert (full.n == 3).all() and (full.note == "").all()
    refused(tables.tidy_table, View(TABLE1, "laptop"), says=gap.says)
    refused(exhibits.make, View(TABLE1, "laptop"), says=gap.says)
    t = tables.tidy_table(View(TABLE1, "laptop", partial=True))
    mine = (t.method == r.method) & (t.family == r.family)
    row = t[mine].iloc[0]
    assert (row.n, row.note) == (2, "1 missing") and (t[~mine].n == 3).all()
    assert row["mean"] == full[mine]["mean"].iloc[0] + 50
    lines = tables.printed(t).loc[r.method, r.family].splitlines()
    assert lines[1].startswith("n = 2 [") and lines[2] == "1 missing"


@pytest.mark.fault(17)
def test_table_with_a_seed_missing_through_the_command_line(gap, tmp_home):
    "It writes nothing unless a partial one is asked for, which prints the same cell."
    one_line(cli(tmp_home, "render", PAPER, "--exhibit", "table1"), *gap.says)
    assert not list(tmp_home.rglob("table1.*"))
    assert not (tmp_home / "data" / "runs" / "notebooks" / f"laptop.{PAPER}.ipynb").exists()
    t = tables.tidy_table(View(TABLE1, "laptop", partial=True))
    cell = tables.printed(t).loc[gap.recipe.method, gap.recipe.family].replace("\n", "<br>")
    said = went(cli(tmp_home, "render", PAPER, "--exhibit", "table1", "--partial")).stdout
    assert f"| {cell}" in said and "PARTIAL: " in said


def test_verdicts_pair_the_same_seeds_only(tmp_home):
    "Of seeds 0, 1 of one method and 1, 2 of the other only seed 1 is compared, and one seed tests nothing."
    fabricate(tmp_home, TABLE1, "laptop", (0, 1, 2))
    for key, seed in (("pdt", 2), ("lora", 0)):
        Run(recipes.resolve(recipes.RECIPES[f"{PAPER}/{FAMILY}/{key}"], "laptop"), "laptop", seed).path.unlink()
    lora = "LoRA (control)"
    v = tables.verdicts(View(TABLE1, "laptop", partial=True)).query("family == @FAMILY").set_index("method")
    assert (v.loc[lora, "n"], v.loc[lora, "verdict"]) == (1, "not tested")
    assert set(v.drop(lora).n) == {2}
