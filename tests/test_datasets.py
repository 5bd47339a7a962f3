"What a family and its datasets promise: the expert that acts, the seed that decides, a kill in the middle, an engine or a network that is not there, parts of the data, columns on disk."

import math
import sys
import time
from dataclasses import fields, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_faults import refused
from test_papers import FAMILY, PRETRAIN, ROOT, cli, new_home, one_line
from test_project import run_python, settings
from test_resume import kill_group, mtimes, start, wait_for

from promptnb import cli as command
from promptnb import collect, data, experts, recipes, tasks
from promptnb.core import PromptnbError, read_json, results_dir
from promptnb.experiments import job, multitask, run

FAMILIES = [*tasks.FAMILIES.values()]
QUIET = dict(threads=1, say=lambda *_: None)


def families(which=FAMILIES):
    return pytest.mark.parametrize("fam", which, ids=lambda f: f.name)


def here(fam):
    if not tasks.installed(fam):
        pytest.skip(f"needs pip install 'promptnb[{fam.extra}]'")
    return fam


def card_of(fam):
    try:
        return experts.load_card(fam)
    except PromptnbError as e:
        pytest.skip(f"its behaviour policy is not made yet: {e}")


def same(a, b):
    "Two Stores, or Steps, of the same numbers in the same types."
    a, b = (x.columns if isinstance(x, data.Store) else {f.name: getattr(x, f.name) for f in fields(x)} for x in (a, b))
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items())


# ---- families


@families()
def test_facts(fam):
    "Ids, names, sizes and qualities agree with each other, with Gymnasium's registry and with settings.ini."
    train, test, qualities = {*fam.train}, {*fam.test}, (*fam.qualities, *dict(fam.remote))
    assert (
        (len(train), len(test)) == (len(fam.train), len(fam.test))
        and {*fam.task_ids} <= {*range(len(fam.goals))}
        and train & test in (set(), train)
    )
    assert all(tasks.parse_task(fam.task_name(i)) == (fam, i) for i in fam.task_ids)
    assert (
        math.prod(fam.state_shape) == fam.state_dim
        and min(fam.act_dim, fam.horizon, fam.rtg_scale, fam.chunk, fam.agents, *fam.episodes) > 0
        and 0 < fam.medium < 1
    )
    assert (
        len({*qualities}) == len(qualities)
        and list(fam.episodes) == sorted(fam.episodes)
        and fam.expert in ("", "script", *tasks.FAMILIES)
    )
    assert gym.spec(fam.env_id).max_episode_steps == fam.horizon and (
        not fam.extra or f"{fam.extra}_requirements" in settings(ROOT)
    )
    if fam.references:
        assert tasks.normalised(fam.references, fam.references).tolist() == [0, 100]


@families(
    [f for f in FAMILIES if f.kind != "smax" or f.name == "smax-3m"]
)  # compiling a map takes seconds: the others are test_smax's
def test_environment(fam):
    "Rows in lock step, and the registered id, are of the sizes that the facts say."
    vec, env = (
        tasks.lock_step(here(fam), np.repeat([fam.train[-1], fam.test[0]], fam.agents), threads=1),
        gym.make(fam.env_id, task=fam.test[-1]),
    )
    n = vec.num_envs
    obs, one = vec.reset(seed=[7] * n)[0], env.reset(seed=7)[0]
    for x, s, a in (
        (obs[0], vec.single_observation_space, vec.single_action_space),
        (one, env.observation_space, env.action_space),
    ):
        assert x in s and s.shape == fam.state_shape and x.dtype == (np.uint8 if fam.frames else np.float32)
        assert (
            a.n == fam.act_dim
            if fam.discrete
            else (a.shape == (fam.act_dim,) and (a.low == -1).all() and (a.high == 1).all())
        )
    act = vec.legal.argmax(-1) if hasattr(vec, "legal") else experts.act_random(fam, n, np.random.default_rng(0))(obs)
    obs, *out, _ = vec.step(act)
    env.step(env.action_space.sample())
    assert obs.shape == (n, *fam.state_shape) and all(x.shape == (n,) for x in out) and not (out[1] | out[2]).any()
    vec.close()
    env.close()


@families([f for f in FAMILIES if f.kind in ("control", "locomotion")])
def test_expert_beats_chance(fam):
    "8 episodes each, or 4 long ones, with the noise that datasets have: by the card's margin, and both of the card's returns lie within 35 % of the way between them of what is seen."
    card, n = card_of(fam), 4 if fam.horizon > 200 else 8
    vec = tasks.lock_step(fam, np.array(fam.task_ids)[np.linspace(0, fam.n_tasks - 1, n).astype(int)], threads=1)
    best, chance = (
        experts.play(vec, experts.acting(vec, q, np.random.default_rng(0)), 0)["r"].sum(-1).mean()
        for q in ("expert", "random")
    )
    vec.close()
    way = card["expert_mean_return"] - card["random_mean_return"]
    assert (
        best - chance > card["margin"] > 0
        and abs(best - card["expert_mean_return"]) < 0.35 * way
        and abs(chance - card["random_mean_return"]) < 0.35 * way
    )


# ---- collecting

SHORT = {
    "cheetah-vel": 30,
    "halfcheetah": 30,
    "ml1-reach": 20,
    "kitchen": 20,
    "pong": 60,
    "smax-3m": 100,
}  # one family a kind, and how long its episodes are here
each_kind = families([replace(tasks.family(n), horizon=h) for n, h in SHORT.items()])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "(the Store, the manifest's entry, the folder) of a short dataset of a family's second quality; made once."
    known, root = {}, tmp_path_factory.mktemp("made")

    def make(fam, episodes, **kw):
        key = (fam.name, episodes, *kw.values())
        at = root / "-".join(map(str, key))
        i, q = here(fam).test[0], fam.qualities[1]
        card_of(fam)
        if key not in known:
            known[key] = collect.collect(fam, q, episodes, task_ids=[i], root=at, **{**QUIET, **kw})
        return data.load(fam, q, [i], root=at), known[key][collect.dataset_id(fam, i, q)], at

    return make


@each_kind
def test_the_seed_decides(fam, made):
    "Every byte, with one thread or two; and both files hold the same steps."
    (store, one, at), (_, two, _), (_, other, _) = made(fam, 2), made(fam, 2, threads=2), made(fam, 2, seed=1)
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in two.items() if k != "seconds"
    } and not {one[k] for k in ("columns", "sha256")} & {other[k] for k in ("columns", "sha256")}
    assert one["episodes"] * fam.agents == len(store) == 2 * fam.agents and one["steps"] == len(store.s)
    assert same(store, data.from_minari(collect.dataset_id(fam, fam.test[0], fam.qualities[1]), [fam.test[0]], root=at))


@each_kind
def test_a_larger_dataset_begins_with_the_smaller(fam, made):
    assert same(data.cut(made(fam, 3)[0], 2 * fam.agents), made(fam, 2)[0])


def test_qualities_are_ordered(tmp_path):
    "Mean returns, and scores, rise from random over the mixed ones to the expert; every other episode of medium-expert is the expert's."
    fam = replace(tasks.family("halfcheetah"), horizon=200)
    r = {
        q: next(iter(collect.collect(fam, q, 8, root=tmp_path, **QUIET).values()))["mean_return"] for q in fam.qualities
    }
    assert r["random"] < r["medium-replay"] < r["medium"] < r["medium-expert"] < r["expert"]
    both = data.load(fam, "medium-expert", root=tmp_path).returns
    assert both[::2].max() < both[1::2].min()
    rows = {x["quality"]: x for x in collect.listed([fam], tmp_path)}
    assert rows.keys() == r.keys() and all(
        rows[q]["mean return"] == round(v, 1)
        and rows[q]["score, published references"] == round(float(tasks.normalised(v, fam.references)), 1)
        for q, v in r.items()
    )


def test_killed_collection(tmp_path):
    "kill -9 among 40 tasks: what was done stays untouched, the rest equals an unbroken collection, and nothing is left over."
    home, log = new_home(tmp_path / "home"), tmp_path / "log"
    fam = tasks.family("cheetah-vel")
    root = home / "data" / "minari"
    args = ("collect", "--family", fam.name, "--quality", "expert", "--episodes", "1")

    def done():
        return collect.manifest(fam, root)

    p = start(home, log, *args)
    wait_for(lambda: len(done()) >= 5, p, log)
    kill_group(p)
    first = done()
    k = len(first)
    assert 5 <= k < fam.n_tasks

    def kept():
        return mtimes(
            home, lambda f: f.name in ("columns.safetensors", "main_data.hdf5") and any(i in str(f) for i in first)
        )

    before = kept()
    assert len(before) == 2 * k
    assert start(home, log, *args).wait(timeout=300) == 0, log.read_text()[-2000:]
    assert (
        kept() == before
        and len(done()) == fam.n_tasks
        and {i: done()[i] for i in first} == first
        and not list(root.glob(".collect-*"))
    )
    whole = collect.collect(fam, "expert", 1, task_ids=fam.task_ids[k - 2 : k + 2], root=tmp_path / "whole", **QUIET)
    assert all(done()[i]["columns"] == e["columns"] and done()[i]["sha256"] == e["sha256"] for i, e in whole.items())


# ---- what is not there


@pytest.mark.parametrize(
    "kind, package", dict(metaworld="metaworld", kitchen="gymnasium_robotics", atari="ale_py", smax="jaxmarl").items()
)
def test_missing_extra(kind, package, tmp_home, monkeypatch, capsys):
    "One line that says what to install, before anything is written."
    fam = next(f for f in FAMILIES if f.kind == kind)
    says = [fam.name, package, f"pip install 'promptnb[{fam.extra}]'"]
    for m in [m for m in sys.modules if m.startswith((f"{package}.", f"promptnb.tasks.{kind}"))]:
        monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, package, None)
    refused(tasks.lock_step, fam, [fam.test[0]], says=says)
    refused(collect.collect, fam, says=says)
    assert not tasks.installed(fam)
    assert command.main(["collect", "--family", fam.name]) == 2
    said = capsys.readouterr().err
    assert said.startswith("promptnb: ") and said.count("\n") == 1 and all(s in said for s in says)
    assert says[-1] in collect.listed([fam])[0]["note"] and not (tmp_home / "data" / "minari").exists()


REMOTE = dict(tasks.family("hopper").remote)["minari-medium"]


def test_unreachable(tmp_home):
    "Without a network, one line, soon: which dataset, and what to do."
    begun = time.monotonic()
    p = cli(
        tmp_home,
        "collect",
        "--family",
        "hopper",
        "--quality",
        "minari-medium",
        HTTPS_PROXY="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
        MINARI_DATASETS_PATH=str(tmp_home / "minari"),
    )
    one_line(p, REMOTE, str(tmp_home / "minari"), f"minari download {REMOTE}")
    assert p.stderr.count("\n") == 1 and time.monotonic() - begun < 20, p.stderr


@pytest.fixture
def local(tmp_home, monkeypatch):
    "A Minari dataset of that id in Minari's folder, 3 episodes of 7 steps: (its trajectories, its file)."
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_home / "minari"))
    g = np.random.default_rng(0)
    fam = tasks.family("hopper")
    trajs = [
        dict(
            observations=g.normal(size=(8, fam.state_dim)),
            actions=g.uniform(-1, 1, (7, fam.act_dim)).astype(np.float32),
            rewards=g.normal(size=7),
        )
        for _ in range(3)
    ]
    with pytest.warns():
        minari.create_dataset_from_buffers(
            REMOTE,
            [
                EpisodeBuffer(id=i, **d, terminations=np.arange(7) == 6, truncations=np.zeros(7, bool))
                for i, d in enumerate(trajs)
            ],
            observation_space=Box(-np.inf, np.inf, (fam.state_dim,), np.float64),
            action_space=Box(-1, 1, (fam.act_dim,), np.float32),
        )
    return trajs, tmp_home / "minari" / REMOTE / "data" / "main_data.hdf5"


def test_local_copy(local):
    "A local copy is read instead, at most as many episodes as were asked for; what is listed is what is there."

    def read(*n):
        return collect.collect("hopper", "minari-medium", *n, **QUIET) and data.load("hopper", "minari-medium")

    assert same(read(2), data.from_arrays(local[0][:2])) and same(read(), data.from_arrays(local[0]))
    (row,) = collect.listed(["hopper"])
    assert (row["quality"], row["trajectories"], row["steps"]) == ("minari-medium", 3, 21)


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_damaged_local_copy(part, local, capsys):
    raw = local[1].read_bytes()
    local[1].write_bytes(raw[: int(part * len(raw))])
    assert command.main(["collect", "--family", "hopper", "--quality", "minari-medium"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("promptnb: ") and said.count("\n") == 1 and REMOTE in said


def test_list(tmp_home, capsys):
    "A row for each dataset that is here; for other families a row that says how to get one."
    collect.collect(FAMILY, "random", 2, **QUIET)
    assert command.main(["collect", "--list"]) == 0
    head, _, *rows = [[x.strip() for x in l.strip("|").split("|")] for l in capsys.readouterr().out.splitlines()]
    rows = {r[0]: dict(zip(head, r)) for r in rows}
    assert (
        rows.keys() == tasks.FAMILIES.keys()
        and (row := rows.pop(FAMILY))["quality"] == "random"
        and [row[k] for k in ("datasets", "trajectories", "steps", "note")] == ["2", "4", "800", ""]
    )
    assert all(r["quality"] == "-" and f"promptnb collect --family {k}" in r["note"] for k, r in rows.items())


# ---- a part of the data


def toy(task=0, lengths=(5, 3, 9, 4, 6, 7), S=3, A=2, hashes=("a",), pictures=False, legal=False):
    g = np.random.default_rng(task)
    see = (lambda T: g.integers(0, 256, (T, S, S), np.uint8)) if pictures else lambda T: g.normal(size=(T, S))
    return data.from_arrays(
        [
            dict(
                observations=see(T),
                actions=g.uniform(-1, 1, (T, A)),
                rewards=g.normal(size=T),
                **(dict(legal=g.random((T, A)) < 0.5) if legal else {}),
            )
            for T in lengths
        ],
        [task] * len(lengths),
        hashes,
    )


@pytest.mark.parametrize("ratio, n", [(0.5, 3), (0.34, 2), (0.001, 1), (1, 6)])
def test_share(ratio, n, tmp_path):
    "Whole trajectories, as many of each task and at least one, from the seed; the indices say which."
    store = data.join([toy(i, legal=True) for i in (3, 4, 8)], tmp_path)
    part, ids = data.subsample(store, ratio, 7)
    assert (
        part.task.tolist() == [3] * n + [4] * n + [8] * n == store.task[ids].tolist()
        and ids == sorted({*ids})
        and part.hashes == store.hashes
    )
    rows = [slice(f, f + l) for f, l in zip(store.first.tolist(), store.length.tolist())]
    assert all(
        torch.equal(getattr(part, k), torch.cat([getattr(store, k)[rows[i]] for i in ids]))
        for k in ("s", "a", "r", "rtg", "legal")
    )
    assert (
        data.subsample(store, ratio, 7)[1] == ids
        and (part is store) == (ratio == 1)
        and len({tuple(data.subsample(store, ratio, s)[1]) for s in range(20)}) == (1 if ratio == 1 else 20)
    )


@pytest.mark.parametrize("ratio", [0, 2, -1, math.nan])
def test_share_of_what(ratio):
    refused(data.share, toy(), ratio, says=[f"ratio is {ratio}", "above 0 and at most 1"])


def test_a_recipe_trains_on_its_share(tmp_home):
    "The trajectories that were drawn stand in the run's record; of the whole dataset, none need to."
    r = recipes.resolve(recipes.RECIPES[job.find_job(PRETRAIN).recipes[0]], "smoke")
    r = replace(r, pretrain=replace(r.pretrain, ratio=0.5, ratio_seed=3))
    p = r.pretrain
    collect.collect(FAMILY, p.quality, p.episodes, **QUIET)
    run.stored.cache_clear()
    whole = data.load(FAMILY, p.quality)
    store, _, hashes, drawn = multitask.train_store(p)
    assert (
        drawn == data.subsample(whole, 0.5, 3)[1]
        and same(store, data.subset(whole, drawn))
        and hashes == whole.hashes
        and multitask.train_store(replace(p, ratio=1.0))[3] is None
    )
    multitask.pretrain(r, "smoke", 0, torch.device("cpu"), 1)
    (path,) = results_dir(r.paper).iterdir()
    assert (rec := read_json(path))["trajectories"] == drawn and rec["recipe"]["pretrain"]["ratio"] == 0.5
    refused(multitask.train_store, replace(p, ratio=2.0), says=["ratio is 2.0"])


# ---- columns


@pytest.mark.parametrize(
    "kw", [{}, dict(legal=True), dict(pictures=True, A=1), dict(pictures=True, legal=True)], ids=",".join
)
def test_mapped_columns(kw, tmp_path):
    "A Store that lies in a file gives the batches of one in memory, whatever the sizes of its columns; the file is written once for the same data."
    parts = [toy(i, hashes=(str(i),), **kw) for i in range(3)]
    memory, disk = (data.join(parts, tmp_path, mapped=m) for m in (False, True))
    assert (
        same(memory, disk)
        and memory.hashes == disk.hashes == ("0", "1", "2")
        and (disk.legal is None) == ("legal" not in kw)
        and disk.s.dtype == (torch.uint8 if kw.get("pictures") else torch.float32)
    )
    a, b = (
        data.Sampler(st, *data.state_stats(st), 2.0, K=4, per_task=5, tasks_per_batch=2, H=2) for st in (memory, disk)
    )
    assert all(
        same(x, y) for t in range(5) for x, y in zip(*([s.batch(t).history, s.batch(t).prompt] for s in (a, b)))
    ) and same(*(data.subsample(st, 0.5)[0] for st in (memory, disk)))
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert same(data.join(parts, tmp_path, mapped=True), memory) and file.stat().st_mtime_ns == before
    assert (
        len(data.join(parts[:2], tmp_path, mapped=True)) == 12
        and data.join(parts[:1], tmp_path) is parts[0]
        and len([*tmp_path.iterdir()]) == 2
    )


MEMORY = """
import sys, torch
from dataclasses import replace
from promptnb import data
anonymous = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
one = data.Store(*(torch.randn(100_000, *d) for d in ((20,), (6,), (), ())), torch.full((100,), 1000), torch.zeros(100, dtype=torch.int64))
parts, before, kept = [replace(one, task=one.task + i, hashes=(str(i),)) for i in range(18)], anonymous(), []
for mapped in (True, False):
    kept.append(data.join(parts, FOLDER, mapped=mapped)); sampler = data.Sampler(kept[-1], *data.state_stats(kept[-1]), 1.)
    for t in range(10): sampler.batch(t)
    print((anonymous() - before) / kept[-1].nbytes)
print(kept[0].nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_mapped_columns_take_no_memory(tmp_path):
    "200 MB on disk are written, measured and trained on by a process that grows by less than a quarter of that; in memory they weigh what they weigh."
    mapped, memory, size = map(float, run_python(f"FOLDER = {str(tmp_path)!r}" + MEMORY, ROOT).split())
    next(tmp_path.iterdir()).unlink()
    assert size > 200e6 and mapped < 0.25 and memory > 0.9


GOOD = dict(observations=np.ones((3, 2)), actions=np.ones((3, 2)), rewards=np.ones(3), legal=np.ones((3, 2), bool))


@pytest.mark.parametrize(
    "more, ids, says",
    [
        ({}, [0], ["2 trajectories, but 1 task ids"]),
        ({}, [0, 1, 2], ["2 trajectories, but 3 task ids"]),
        (
            dict(observations=np.full((3, 2), np.nan)),
            [1, 0],
            ["trajectory 1", "step 0"],
        ),  # the index is the caller's, not the sorted one
        (dict(legal=np.ones((3, 5), bool)), None, ["trajectory 1", "legal"]),
        (dict(legal=np.ones((2, 2), bool)), None, ["trajectory 1", "legal"]),
        (dict(legal=[[1, 1], [1], [1, 1]]), None, ["trajectory 1", "legal"]),
        (dict(observations=np.ones((3, 2, 2), np.uint8)), None, ["trajectory 1", "2 x 2, 2, but 2, 2"]),
        (dict(observations=np.ones((3, 2, 2))), None, ["trajectory 1", "observations (3, 2, 2)"]),
    ],
    ids=["few-ids", "many-ids", "unsorted", "legal-wide", "legal-short", "legal-ragged", "picture", "3d"],
)
def test_bad_arrays(more, ids, says):
    refused(data.from_arrays, [GOOD, dict(GOOD, **more)], ids, says=says)


@pytest.mark.parametrize(
    "bad",
    [
        dict(actions=None),
        dict(actions=np.array([["x"] * 6] * 3)),
        dict(actions=[[1] * 6, [1], [1] * 6]),
        dict(observations=np.ones((0, 20)), actions=np.ones((0, 6)), rewards=np.ones(0)),
        dict(actions=np.full((3, 6), 2.0)),
    ],
    ids=["no-actions", "text", "ragged", "no-steps", "too-large"],
)
def test_bad_arrays_of_a_family(bad):
    good = dict(observations=np.ones((3, 20)), actions=np.ones((3, 6)), rewards=np.ones(3))
    refused(
        data.from_arrays,
        [good, {k: v for k, v in dict(good, **bad).items() if v is not None}],
        family=FAMILY,
        says=["trajectory 1"],
    )
