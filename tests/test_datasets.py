"""What a family and its datasets promise.

The expert that acts, the seed that decides, a kill in the middle, an engine or a network that is not there, parts of
the data, columns on disk.
"""

import math
import platform
import sys
import time
from dataclasses import fields, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from homes import FAMILY, PRETRAIN, ROOT, cli, new_home, one_line, went
from test_faults import refused
from test_project import run_python, settings
from test_resume import kill_group, mtimes, start, wait_for

from promptnb import cli as command
from promptnb import collect, data, experts, recipes, tasks
from promptnb.core import PromptnbError, read_json, results_dir
from promptnb.experiments import job, multitask, run
from promptnb.tasks.wrapped import own

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


def tensors(x):
    "Name -> tensor, of a Store or of Steps."
    return x.columns if isinstance(x, data.Store) else {f.name: getattr(x, f.name) for f in fields(x)}


def same(a, b):
    "Two Stores, or Steps, of the same numbers in the same types."
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items())


# ---- families


@families()
def test_tasks_agree(fam):
    "Ids are unique and have goals; test tasks are all new or, with one split, the train tasks; names lead back to ids."
    train, test = {*fam.train}, {*fam.test}
    assert (len(train), len(test)) == (len(fam.train), len(fam.test))
    assert {*fam.task_ids} <= {*range(len(fam.goals))}
    assert train & test in (set(), train)
    assert all(tasks.parse_task(fam.task_name(i)) == (fam, i) for i in fam.task_ids)


@families()
def test_facts_agree(fam):
    "Sizes, qualities and references agree with each other."
    qualities = (*fam.qualities, *dict(fam.remote))
    assert math.prod(fam.state_shape) == fam.state_dim
    assert min(fam.act_dim, fam.horizon, fam.rtg_scale, fam.chunk, fam.agents, *fam.episodes) > 0
    assert 0 < fam.medium < 1
    assert len({*qualities}) == len(qualities)
    assert list(fam.episodes) == sorted(fam.episodes)
    assert fam.expert in ("", "script", *tasks.FAMILIES)
    if fam.references:
        assert tasks.normalised(fam.references, fam.references).tolist() == [0, 100]


@families()
def test_facts_agree_with_registries(fam):
    "Gymnasium knows the horizon, settings.ini the extra."
    assert gym.spec(fam.env_id).max_episode_steps == fam.horizon
    assert not fam.extra or f"{fam.extra}_requirements" in settings(ROOT)


# compiling a map of SMAX takes seconds: the other maps are test_smax's
ENGINES = [f for f in FAMILIES if f.kind != "smax" or f.name == "smax-3m"]


def check_spaces(fam, obs, observations, actions):
    "One observation and both spaces are as the family's facts say."
    assert obs in observations and observations.shape == fam.state_shape
    assert obs.dtype == (np.uint8 if fam.frames else np.float32)
    if fam.discrete:
        assert actions.n == fam.act_dim
    else:
        assert actions.shape == (fam.act_dim,) and (actions.low == -1).all() and (actions.high == 1).all()


@families(ENGINES)
def test_lock_step_environment(fam):
    "Rows in lock step have the sizes that the facts say, and one step ends no episode."
    vec = tasks.lock_step(here(fam), np.repeat([fam.train[-1], fam.test[0]], fam.agents), threads=1)
    n = vec.num_envs
    obs, _ = vec.reset(seed=[7] * n)
    check_spaces(fam, obs[0], vec.single_observation_space, vec.single_action_space)
    random = experts.act_random(fam, n, np.random.default_rng(0))
    obs, r, terminated, truncated, _ = vec.step(vec.legal.argmax(-1) if hasattr(vec, "legal") else random(obs))
    vec.close()
    assert obs.shape == (n, *fam.state_shape)
    assert r.shape == terminated.shape == truncated.shape == (n,)
    assert not (terminated | truncated).any()


@families(ENGINES)
def test_registered_environment(fam):
    "The id in Gymnasium's registry has the sizes that the facts say."
    env = gym.make(here(fam).env_id, task=fam.test[-1])
    obs, _ = env.reset(seed=7)
    check_spaces(fam, obs, env.observation_space, env.action_space)
    env.step(env.action_space.sample())
    env.close()


@families([f for f in FAMILIES if f.kind in ("control", "locomotion")])
def test_expert_beats_chance(fam):
    """By the card's margin, with the noise that datasets have; what is seen is near what the card says.

    8 episodes each, or 16 long ones, of which some end in a fall; near: within 35 % of the way between the card's
    two returns.
    """
    card, n = card_of(fam), 16 if fam.horizon > 200 else 8
    spread = np.array(fam.task_ids)[np.linspace(0, fam.n_tasks - 1, n).astype(int)]
    vec = tasks.lock_step(fam, spread, threads=1)
    seen = {}
    for quality in ("expert", "random"):
        act = experts.acting(vec, quality, np.random.default_rng(0))
        seen[quality] = experts.play(vec, act, 0)["r"].sum(-1).mean()
    vec.close()
    near = 0.35 * (card["expert_mean_return"] - card["random_mean_return"])
    assert seen["expert"] - seen["random"] > card["margin"] > 0
    assert abs(seen["expert"] - card["expert_mean_return"]) < near
    assert abs(seen["random"] - card["random_mean_return"]) < near


# ---- collecting

SHORT = {  # one family a kind, and how long its episodes are here
    "cheetah-vel": 30,
    "halfcheetah": 30,
    "ml1-reach": 20,
    "kitchen": 20,
    "pong": 60,
    "smax-3m": 100,
}
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


def but_seconds(entry):
    return {k: v for k, v in entry.items() if k != "seconds"}


@each_kind
def test_the_seed_decides(fam, made):
    "Every byte, with one thread or two."
    _, one, _ = made(fam, 2)
    _, two_threads, _ = made(fam, 2, threads=2)
    _, other_seed, _ = made(fam, 2, seed=1)
    assert but_seconds(one) == but_seconds(two_threads)
    assert not {one["columns"], one["sha256"]} & {other_seed["columns"], other_seed["sha256"]}


@each_kind
def test_both_files_hold_the_same_steps(fam, made):
    store, entry, root = made(fam, 2)
    assert entry["episodes"] == 2 and len(store) == 2 * fam.agents and entry["steps"] == len(store.s)
    id_ = collect.dataset_id(fam, fam.test[0], fam.qualities[1])
    assert same(store, data.from_minari(id_, [fam.test[0]], root=root))


@each_kind
def test_a_larger_dataset_begins_with_the_smaller(fam, made):
    assert same(data.cut(made(fam, 3)[0], 2 * fam.agents), made(fam, 2)[0])


def test_qualities_are_ordered(tmp_path):
    "Mean returns, and scores, rise from random over the mixed ones to the expert."
    fam = replace(tasks.family("halfcheetah"), horizon=200)
    mean = {}
    for quality in fam.qualities:
        (entry,) = collect.collect(fam, quality, 8, root=tmp_path, **QUIET).values()
        mean[quality] = entry["mean_return"]
    assert mean["random"] < mean["medium-replay"] < mean["medium"] < mean["medium-expert"] < mean["expert"]

    rows = {row["quality"]: row for row in collect.listed([fam], tmp_path)}
    assert rows.keys() == mean.keys()
    for quality, value in mean.items():
        assert rows[quality]["mean return"] == round(value, 1)
        score = round(float(tasks.normalised(value, fam.references)), 1)
        assert rows[quality]["score, published references"] == score

    mixed = data.load(fam, "medium-expert", root=tmp_path).returns  # every other episode is the expert's
    assert mixed[::2].max() < mixed[1::2].min()


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A collection of 40 tasks, killed after a few and run again.

    (home, the manifest when it was killed, the files of its datasets then and their times)
    """
    home, log = new_home(tmp_path_factory.mktemp("killed") / "home"), tmp_path_factory.mktemp("log") / "log"
    args = ("collect", "--family", "cheetah-vel", "--quality", "expert", "--episodes", "1")
    root = home / "data" / "minari"
    p = start(home, log, *args)
    wait_for(lambda: len(collect.manifest("cheetah-vel", root)) >= 5, p, log)
    kill_group(p)
    first = collect.manifest("cheetah-vel", root)
    files = files_of(home, first)
    assert start(home, log, *args).wait(timeout=300) == 0, log.read_text()[-2000:]
    return home, first, files


def files_of(home, entries):
    "The files of these datasets, and when they were written."
    names = ("columns.safetensors", "main_data.hdf5")
    return mtimes(home, lambda f: f.name in names and any(id_ in str(f) for id_ in entries))


def test_a_killed_collection_goes_on(broken_off):
    "What was done stays untouched, and nothing is left over."
    home, first, files = broken_off
    root = home / "data" / "minari"
    done = collect.manifest("cheetah-vel", root)
    assert 5 <= len(first) < 40 == len(done)
    assert len(files) == 2 * len(first)
    assert files_of(home, first) == files
    assert {id_: done[id_] for id_ in first} == first
    assert not list(root.glob(".collect-*"))


def test_a_killed_collection_ends_as_an_unbroken_one(broken_off, tmp_path):
    "The tasks around the kill have the bytes of a collection that nothing interrupted."
    home, first, _ = broken_off
    fam, k = tasks.family("cheetah-vel"), len(first)
    done = collect.manifest(fam, home / "data" / "minari")
    whole = collect.collect(fam, "expert", 1, task_ids=fam.task_ids[k - 2 : k + 2], root=tmp_path, **QUIET)
    for id_, entry in whole.items():
        assert (done[id_]["columns"], done[id_]["sha256"]) == (entry["columns"], entry["sha256"])


# ---- pictures


@pytest.mark.skipif(not tasks.gl_backend(), reason="needs EGL or OSMesa")
def test_a_runner_keeps_its_floor():
    "200 m on, where Gymnasium's floor has ended, the lower half of a film's picture still shows squares."
    fam = tasks.family("halfcheetah")
    spread = []
    for endless in (False, True):
        env = gym.make(fam.env_id, render_mode="rgb_array", **tasks._camera(fam, 64))
        env.reset(seed=0)
        body = env.unwrapped
        body.set_state(body.data.qpos + 200 * (np.arange(body.model.nq) == 0), body.data.qvel)
        if endless:
            tasks._endless_floor(body.model)
        spread.append(env.render()[48:].astype(float).std())
        env.close()
    assert spread[1] > 2 * spread[0]


def test_moments_follow_the_motion():
    "Of an arm that rests after 50 of 500 steps most pictures are of its motion; of even motion they are evenly spaced."
    resting = np.append(np.linspace(0, 1, 50), np.ones(450))[:, None]
    assert (collect.moments(resting, 6) < 60).sum() >= 5
    assert collect.moments(np.arange(101.0)[:, None], 6).tolist() == [0, 20, 40, 60, 80, 100]
    assert collect.moments(np.zeros((9, 2)), 3).tolist() == [0, 4, 8]  # nothing moves


def test_rows_of_a_histogram_say_their_scale():
    "The share of episodes in the highest bar stands beside each row; a quality has one colour in every family."
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2)
    half = np.repeat([0.0, 1.0, 2.0, 3.0], [5, 2, 2, 1])
    collect.ridges(axes[0], {"expert": np.full(4, 3.0), "random": half})
    collect.ridges(axes[1], {"expert": half, "medium": half, "random": half})
    assert [t.get_text() for t in axes[0].texts] == ["100%", "50%"]
    shades = [[tuple(c.get_facecolor()[0]) for c in ax.collections] for ax in axes]
    plt.close(fig)
    assert shades[0] == [shades[1][0], shades[1][2]] and len(set(shades[1])) == 3


# ---- what is not there


PACKAGES = dict(metaworld="metaworld", kitchen="gymnasium_robotics", atari="ale_py", smax="jaxmarl")


@pytest.mark.parametrize("kind, package", PACKAGES.items())
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
    assert says[-1] in collect.listed([fam])[0]["note"]
    assert not (tmp_home / "data" / "minari").exists()


def jumpy(observations, goals, quality, rng):
    "A behaviour of yours, which draws for all rows at once."
    return rng.uniform(-1, 1, (len(observations), 1))


def pendulum(env_id="Pendulum-v1", g=9.81, **more):
    "A family of yours."
    sizes = dict(horizon=5, chunk=3, qualities=("expert",)) | more
    return own("pendulum-of-data", env_id, [dict(g=g)], behaviour=jumpy, **sizes)


@pytest.fixture
def yours(monkeypatch):
    "What a test adds is gone after it."
    monkeypatch.setattr(tasks, "FAMILIES", dict(tasks.FAMILIES))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_larger_dataset_of_yours_begins_with_the_smaller(n, yours):
    smaller, larger = (list(collect.play_chunks(pendulum(), 0, "expert", k, seed=0)) for k in (n, 5))
    assert [d["game"] for d in smaller] == [*range(n)]
    for a, b in zip(smaller, larger):
        assert np.array_equal(a["actions"], b["actions"]) and np.array_equal(a["observations"], b["observations"])


@pytest.mark.parametrize("change", [dict(g=3.7), dict(horizon=6), dict(chunk=4), dict(env_id="Pendulum-v2")], ids=str)
def test_data_of_a_world_of_yours_that_has_changed_are_made_anew(change, yours, tmp_path, monkeypatch):
    monkeypatch.setitem(gym.registry, "Pendulum-v2", gym.spec("Pendulum-v1"))
    said = []
    for fam in (pendulum(), pendulum(target_return=7.0), pendulum(**change)):
        collect.collect(fam, "expert", 1, root=tmp_path, threads=1, say=said.append)
    assert [line.split(": ")[1].split()[0] for line in said] == ["1", "0", "1"], said


REMOTE = dict(tasks.family("hopper").remote)["minari-medium"]
COLLECT_REMOTE = ("collect", "--family", "hopper", "--quality", "minari-medium")


def test_unreachable(tmp_home):
    "Without a network, one line, soon: which dataset, and what to do."
    folder = str(tmp_home / "minari")
    offline = dict(HTTPS_PROXY="http://127.0.0.1:9", HF_HUB_OFFLINE="0", MINARI_DATASETS_PATH=folder)
    begun = time.monotonic()
    p = cli(tmp_home, *COLLECT_REMOTE, **offline)
    assert time.monotonic() - begun < 20, p.stderr
    one_line(p, REMOTE, folder, f"minari download {REMOTE}")
    assert p.stderr.count("\n") == 1


def write_remote(trajectories, fam):
    "A Minari dataset of that id in Minari's folder."
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    episodes = []
    for i, d in enumerate(trajectories):
        n = len(d["rewards"])
        last = np.arange(n) == n - 1
        episodes.append(EpisodeBuffer(id=i, **d, terminations=last, truncations=np.zeros(n, bool)))
    with pytest.warns():
        minari.create_dataset_from_buffers(
            REMOTE,
            episodes,
            observation_space=Box(-np.inf, np.inf, (fam.state_dim,), np.float64),
            action_space=Box(-1, 1, (fam.act_dim,), np.float32),
        )


@pytest.fixture
def local(tmp_home, monkeypatch):
    "A local copy of the remote dataset, 3 episodes of 7 steps: (its trajectories, its file)."
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_home / "minari"))
    g = np.random.default_rng(0)
    fam = tasks.family("hopper")
    trajectories = [
        dict(
            observations=g.normal(size=(8, fam.state_dim)),
            actions=g.uniform(-1, 1, (7, fam.act_dim)).astype(np.float32),
            rewards=g.normal(size=7),
        )
        for _ in range(3)
    ]
    write_remote(trajectories, fam)
    return trajectories, tmp_home / "minari" / REMOTE / "data" / "main_data.hdf5"


def test_local_copy(local):
    "A local copy is read instead, at most as many episodes as were asked for; what is listed is what is there."
    trajectories, _ = local
    collect.collect("hopper", "minari-medium", 2, **QUIET)
    assert same(data.load("hopper", "minari-medium"), data.from_arrays(trajectories[:2]))
    collect.collect("hopper", "minari-medium", **QUIET)
    assert same(data.load("hopper", "minari-medium"), data.from_arrays(trajectories))
    assert same(data.load("hopper", "minari-medium", episodes=100), data.from_arrays(trajectories))
    (row,) = collect.listed(["hopper"])
    assert (row["quality"], row["trajectories"], row["steps"]) == ("minari-medium", 3, 21)


def test_data_of_others_have_no_film(local, tmp_home):
    "Their actions, played from where an episode of ours begins, would be another episode."
    collect.collect("hopper", "minari-medium", 1, **QUIET)
    assert collect.strip(tasks.family("hopper"), 0, "minari-medium") is None
    collect.save_strip(tasks.family("hopper"), "minari-medium", tmp_home / "strip.png")
    assert not (tmp_home / "strip.png").exists()


@pytest.mark.fault(8)
@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_damaged_local_copy(part, local, capsys):
    "One line that names it."
    _, file = local
    raw = file.read_bytes()
    file.write_bytes(raw[: int(part * len(raw))])
    assert command.main([*COLLECT_REMOTE]) == 2
    said = capsys.readouterr().err
    assert said.startswith("promptnb: ") and said.count("\n") == 1 and REMOTE in said


def emptied(episode):
    "No step is left: one observation, no action."
    for name in ("actions", "rewards", "terminations", "truncations"):
        values = episode[name][:0]
        del episode[name]
        episode[name] = values


def narrowed(episode):
    "Observations of another body."
    values = episode["observations"][:, :5]
    del episode["observations"]
    episode["observations"] = values


CONTENTS = {
    "NaN in a state": (lambda e: e["observations"].__setitem__((3, 1), np.nan), ["trajectory 1", "at step 3"]),
    "infinity in an action": (lambda e: e["actions"].__setitem__((0, 0), np.inf), ["trajectory 1", "at step 0"]),
    "no rewards": (lambda e: e.__delitem__("rewards"), ["rewards"]),
    "no observations": (lambda e: e.__delitem__("observations"), ["observations"]),
    "no terminations": (lambda e: e.__delitem__("terminations"), ["terminations"]),
    "no steps": (emptied, ["no steps"]),
    "another body": (narrowed, ["5"]),
}


@pytest.mark.fault(8)
@pytest.mark.parametrize("edit, says", CONTENTS.values(), ids=CONTENTS)
def test_bad_contents_of_a_local_copy(edit, says, local, tmp_home, capsys):
    "One line that names the dataset or the trajectory, and nothing is written."
    import h5py

    with h5py.File(local[1], "r+") as f:
        edit(f["episode_1"])
    assert command.main([*COLLECT_REMOTE]) == 2
    said = capsys.readouterr().err
    assert said.startswith("promptnb: ") and said.count("\n") == 1 and all(s in said for s in says), said
    assert not list((tmp_home / "minari").rglob("columns.safetensors"))


def test_list(tmp_home, capsys):
    "A row for each dataset that is here; for other families a row that says how to get one."
    collect.collect(FAMILY, "random", 2, **QUIET)
    assert command.main(["collect", "--list"]) == 0
    head, _, *rows = [[x.strip() for x in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: dict(zip(head, row)) for row in rows}
    assert rows.keys() == tasks.FAMILIES.keys()
    own = rows.pop(FAMILY)
    assert [own[k] for k in ("quality", "datasets", "trajectories", "steps", "note")] == ["random", "2", "4", "800", ""]
    for name, row in rows.items():
        assert row["quality"] == "-" and f"promptnb collect --family {name}" in row["note"]


# ---- a part of the data


def toy(task=0, lengths=(5, 3, 9, 4, 6, 7), S=3, A=2, hashes=("a",), pictures=False, legal=False):
    "A Store of one task: a trajectory of each length."
    g = np.random.default_rng(task)
    trajectories = []
    for T in lengths:
        d = dict(
            observations=g.integers(0, 256, (T, S, S), np.uint8) if pictures else g.normal(size=(T, S)),
            actions=g.uniform(-1, 1, (T, A)),
            rewards=g.normal(size=T),
        )
        if legal:
            d["legal"] = g.random((T, A)) < 0.5
        trajectories.append(d)
    return data.from_arrays(trajectories, [task] * len(lengths), hashes)


@pytest.fixture
def three_tasks(tmp_path):
    "6 trajectories of each of tasks 3, 4 and 8."
    return data.join([toy(i, legal=True) for i in (3, 4, 8)], tmp_path)


@pytest.mark.parametrize("ratio, n", [(0.5, 3), (0.34, 2), (0.001, 1), (1, 6)])
def test_subsample(ratio, n, three_tasks):
    "As many trajectories of each task and at least one; the indices say which, in order."
    part, ids = data.subsample(three_tasks, ratio, 7)
    assert part.task.tolist() == [3] * n + [4] * n + [8] * n == three_tasks.task[ids].tolist()
    assert ids == sorted({*ids})
    assert part.hashes == three_tasks.hashes


@pytest.mark.parametrize("ratio", [0.5, 0.34, 0.001, 1])
def test_subsample_takes_whole_trajectories(ratio, three_tasks):
    part, ids = data.subsample(three_tasks, ratio, 7)
    spans = zip(three_tasks.first[ids].tolist(), three_tasks.length[ids].tolist())
    rows = torch.cat([torch.arange(first, first + n) for first, n in spans])
    for name in ("s", "a", "r", "rtg", "legal"):
        assert torch.equal(getattr(part, name), getattr(three_tasks, name)[rows])


@pytest.mark.parametrize("ratio", [0.5, 0.34, 0.001, 1])
def test_subsample_follows_its_seed(ratio, three_tasks):
    "The same seed, the same trajectories; 20 seeds, 20 subsamples, unless all are taken."
    part, ids = data.subsample(three_tasks, ratio, 7)
    assert data.subsample(three_tasks, ratio, 7)[1] == ids
    assert (part is three_tasks) == (ratio == 1)
    drawn = {tuple(data.subsample(three_tasks, ratio, seed)[1]) for seed in range(20)}
    assert len(drawn) == (1 if ratio == 1 else 20)


@pytest.mark.parametrize("ratio", [0, 2, -1, math.nan])
def test_subsample_of_what(ratio):
    refused(data.subsample, toy(), ratio, says=[f"ratio is {ratio}", "above 0 and at most 1"])


def test_a_recipe_trains_on_its_subsample(tmp_home):
    "The trajectories that were drawn stand in the run's record; of the whole dataset, none need to."
    r = recipes.resolve(recipes.RECIPES[job.find_job(PRETRAIN).recipes[0]], "smoke")
    r = replace(r, pretrain=replace(r.pretrain, ratio=0.5, ratio_seed=3))
    p = r.pretrain
    collect.collect(FAMILY, p.quality, p.episodes, **QUIET)
    run.stored.cache_clear()
    whole = data.load(FAMILY, p.quality)
    trained = multitask.train_data(p)
    assert trained.drawn == data.subsample(whole, 0.5, 3)[1]
    assert same(trained.store, data.subset(whole, trained.drawn)) and trained.hashes == whole.hashes
    assert multitask.train_data(replace(p, ratio=1.0)).drawn is None
    multitask.pretrain(run.Run(r, "smoke"))
    (path,) = results_dir(r.paper).iterdir()
    record = read_json(path)
    assert record["trajectories"] == trained.drawn and record["recipe"]["pretrain"]["ratio"] == 0.5
    refused(multitask.train_data, replace(p, ratio=2.0), says=["ratio is 2.0"])


# ---- columns


LAYOUTS = dict(
    plain={}, legal=dict(legal=True), pictures=dict(pictures=True, A=1), both=dict(pictures=True, legal=True)
)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mapped_columns(layout, tmp_path):
    "A Store that lies in a file is one in memory, whatever the sizes of its columns."
    parts = [toy(i, hashes=(str(i),), **layout) for i in range(3)]
    memory, disk = (data.join(parts, tmp_path, mapped=m) for m in (False, True))
    assert same(memory, disk) and memory.hashes == disk.hashes == ("0", "1", "2")
    assert (disk.legal is None) == ("legal" not in layout)
    assert disk.s.dtype == (torch.uint8 if layout.get("pictures") else torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mapped_columns_give_the_same_batches(layout, tmp_path):
    parts = [toy(i, hashes=(str(i),), **layout) for i in range(3)]
    memory, disk = (data.join(parts, tmp_path, mapped=m) for m in (False, True))
    assert same(data.subsample(memory, 0.5)[0], data.subsample(disk, 0.5)[0])
    a, b = (
        data.Sampler(store, *data.state_stats(store), 2.0, K=4, per_task=5, tasks_per_batch=2, H=2)
        for store in (memory, disk)
    )
    for t in range(5):
        assert same(a.batch(t).history, b.batch(t).history)
        assert same(a.batch(t).prompt, b.batch(t).prompt)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mapped_columns_are_written_once(layout, tmp_path):
    "For the same data; other data has a file of its own, and one Store needs none."
    parts = [toy(i, hashes=(str(i),), **layout) for i in range(3)]
    written = data.join(parts, tmp_path, mapped=True)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert same(data.join(parts, tmp_path, mapped=True), written) and file.stat().st_mtime_ns == before
    assert len(data.join(parts[:2], tmp_path, mapped=True)) == 12
    assert data.join(parts[:1], tmp_path) is parts[0]
    assert len([*tmp_path.iterdir()]) == 2


MEMORY = """
import torch
from dataclasses import replace
from promptnb import data

def anonymous():
    "Bytes of this process that lie in no file."
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

steps = [torch.randn(100_000, *d) for d in ((20,), (6,), (), ())]
one = data.Store(*steps, torch.full((100,), 1000), torch.zeros(100, dtype=torch.int64))
parts = [replace(one, task=one.task + i, hashes=(str(i),)) for i in range(18)]
before, kept = anonymous(), []
for mapped in (True, False):
    kept.append(data.join(parts, FOLDER, mapped=mapped))
    sampler = data.Sampler(kept[-1], *data.state_stats(kept[-1]), 1.0)
    for t in range(10):
        sampler.batch(t)
    print((anonymous() - before) / kept[-1].nbytes)
print(kept[0].nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_mapped_columns_take_no_memory(tmp_path):
    """200 MB on disk are written, measured and trained on by a process that grows by less than a quarter of that.

    In memory they weigh what they weigh.
    """
    mapped, memory, size = map(float, run_python(f"FOLDER = {str(tmp_path)!r}" + MEMORY, ROOT).split())
    next(tmp_path.iterdir()).unlink()
    assert size > 200e6 and mapped < 0.25 and memory > 0.9


GOOD = dict(observations=np.ones((3, 2)), actions=np.ones((3, 2)), rewards=np.ones(3), legal=np.ones((3, 2), bool))


BAD = {  # what is wrong with the second trajectory, the task ids, what the line says
    "few-ids": ({}, [0], ["2 trajectories, but 1 task ids"]),
    "many-ids": ({}, [0, 1, 2], ["2 trajectories, but 3 task ids"]),
    # the index is the caller's, not the sorted one
    "unsorted": (dict(observations=np.full((3, 2), np.nan)), [1, 0], ["trajectory 1", "step 0"]),
    "legal-wide": (dict(legal=np.ones((3, 5), bool)), None, ["trajectory 1", "legal"]),
    "legal-short": (dict(legal=np.ones((2, 2), bool)), None, ["trajectory 1", "legal"]),
    "legal-ragged": (dict(legal=[[1, 1], [1], [1, 1]]), None, ["trajectory 1", "legal"]),
    "picture": (dict(observations=np.ones((3, 2, 2), np.uint8)), None, ["trajectory 1", "2 x 2, 2, but 2, 2"]),
    "3d": (dict(observations=np.ones((3, 2, 2))), None, ["trajectory 1", "observations (3, 2, 2)"]),
}


@pytest.mark.parametrize("more, ids, says", BAD.values(), ids=BAD)
def test_bad_arrays(more, ids, says):
    refused(data.from_arrays, [GOOD, dict(GOOD, **more)], ids, says=says)


BAD_OF_A_FAMILY = {
    "no-actions": dict(actions=None),
    "text": dict(actions=np.array([["x"] * 6] * 3)),
    "ragged": dict(actions=[[1] * 6, [1], [1] * 6]),
    "no-steps": dict(observations=np.ones((0, 20)), actions=np.ones((0, 6)), rewards=np.ones(0)),
    "too-large": dict(actions=np.full((3, 6), 2.0)),
}


@pytest.mark.parametrize("bad", BAD_OF_A_FAMILY.values(), ids=BAD_OF_A_FAMILY)
def test_bad_arrays_of_a_family(bad):
    good = dict(observations=np.ones((3, 20)), actions=np.ones((3, 6)), rewards=np.ones(3))
    broken = {k: v for k, v in dict(good, **bad).items() if v is not None}
    refused(data.from_arrays, [good, broken], family=FAMILY, says=["trajectory 1"])


# ---- the same bits on every processor

KERNELS = ("Haswell", "SkylakeX", "Sandybridge")  # of OpenBLAS: with AVX2, with AVX-512, with AVX


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are of x86-64")
@pytest.mark.parametrize("family, quality", [("cheetah-dir", "expert"), ("reacher2d", "medium")])
def test_data_do_not_depend_on_the_processor_s_matrix_kernels(family, quality, tmp_path, monkeypatch):
    found = []
    for kernel in KERNELS:
        home = new_home(tmp_path / kernel)
        went(cli(home, "collect", "--family", family, "--quality", quality, "--episodes", 2, OPENBLAS_CORETYPE=kernel))
        monkeypatch.setenv("PROMPTNB_HOME", str(home))
        found.append([entry["columns"] for entry in collect.manifest(tasks.family(family)).values()])
    assert found[0] and found.count(found[0]) == len(KERNELS)
