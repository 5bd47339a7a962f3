"The kitchen: seeds, D4RL's rule, the script against its card, and the reader of Minari's human data."

import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics")
import gymnasium as gym
from gymnasium.utils.env_checker import check_env

from promptnb import tasks
from promptnb.core import PromptnbError, data_dir, read_json
from promptnb.tasks import kitchen
from promptnb.tasks.kitchen import JOINTS, SUBTASKS, Kitchen, from_minari_kitchen


def play(vec, seeds, act, steps):
    "Lock-step play: observations s (steps + 1, N, 59), actions a and rewards r (steps, N, ...), and the rows `vec`."
    obs, _ = vec.reset(seed=seeds)
    s, a, r = [obs], [], []
    for _ in range(steps):
        a.append(act(obs))
        obs, reward, term, trunc, _ = vec.step(a[-1])
        s.append(obs)
        r.append(reward)
        if (term | trunc).all():
            break
    return SimpleNamespace(s=np.stack(s), a=np.stack(a), r=np.stack(r), vec=vec)


@pytest.fixture(scope="module")
def played():
    "Two whole episodes of the script."
    vec = tasks.lock_step("kitchen", [0, 0])
    return play(vec, [5, 6], kitchen.script(vec, "expert", np.random.default_rng(0)), 280)


def test_environment_passes_the_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(gym.make("promptnb/kitchen-v0").unwrapped, skip_render_check=True)


def test_equals_the_package_bit_for_bit():
    ours, theirs = Kitchen(), kitchen.kitchen_env.KitchenEnv(list(SUBTASKS))
    rng = np.random.default_rng(0)
    assert np.array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0]["observation"].astype(np.float32))
    for _ in range(40):
        a = rng.uniform(-1, 1, 9).astype(np.float32)
        o, r, *_ = ours.step(a)
        o2, r2, *_ = theirs.step(a.astype(float))
        assert np.array_equal(o, o2["observation"].astype(np.float32))
        assert r == r2


def test_an_episode_is_the_same_in_rows_that_have_moved(played):
    script = kitchen.Script(played.vec.envs[0].unwrapped, 2, kitchen.NOISE, np.random.default_rng(0))
    again = play(played.vec, [5, 6], script, 60)
    assert np.array_equal(again.s, played.s[:61])
    assert np.array_equal(again.a, played.a[:60])


def test_an_episode_is_the_same_in_another_row_beside_others(played):
    three, actions = tasks.lock_step("kitchen", [0] * 3), iter(played.a)
    moved = play(three, [9, 6, 5], lambda obs: np.stack([np.ones(9, np.float32), *next(actions)[::-1]]), 60)
    assert np.array_equal(moved.s[:, 1], played.s[:61, 1])
    assert np.array_equal(moved.s[:, 2], played.s[:61, 0])
    assert not np.array_equal(moved.s[1, 0], moved.s[1, 1])


def test_rows_are_reset_by_a_mask(played):
    vec = played.vec
    vec.reset(seed=[5, 6])
    vec.step(np.ones((2, 9)))
    kept, _ = vec.reset(seed=[7, 8], options=dict(reset_mask=np.array([True, False])))
    fresh, _ = vec.reset(seed=[7, 6])
    assert np.array_equal(kept[0], fresh[0])
    assert not np.array_equal(kept[1], fresh[1])


def test_d4rl_pays_once_and_ends_when_all_are_done():
    env = gym.make("promptnb/kitchen-v0")
    env.reset(seed=0)

    def put(subtask, angles):
        "Put a thing somewhere: reward, terminated, info of the step after."
        env.unwrapped.data.qpos[JOINTS[subtask]] = angles
        _, reward, ended, _, info = env.step(np.zeros(9))
        return reward, ended, info

    microwave, *others = SUBTASKS
    assert put(microwave, kitchen.GOALS[microwave])[:2] == (1, False)
    assert put(microwave, 0)[:2] == (0, False)
    assert put(microwave, kitchen.GOALS[microwave])[:2] == (0, False)  # it was paid before
    *first, last = [put(k, kitchen.GOALS[k]) for k in others]
    assert [x[:2] for x in first] == [(1, False), (1, False)]
    assert last[:2] == (1, True)
    assert last[2]["success"]
    assert last[2]["finished"] == SUBTASKS


def test_the_other_protocol_pays_on_and_never_ends():
    env = Kitchen("gymnasium")
    env.reset(seed=0)
    env.data.qpos[JOINTS["microwave"]] = -0.75
    assert [env.step(np.zeros(9))[1] for _ in range(3)] == [1, 1, 1]
    for k in SUBTASKS:
        env.data.qpos[JOINTS[k]] = kitchen.GOALS[k]
    _, r, ended, _, info = env.step(np.zeros(9))
    assert (r, ended, info["success"]) == (4, False, True)
    assert gym.make("promptnb/kitchen-v0", protocol="gymnasium", max_episode_steps=450).spec.max_episode_steps == 450


def test_rule_on_arrays():
    d = np.full((6, 2), 0.8)
    assert kitchen.d4rl_rule(d).tolist() == [0] * 6
    d[2:, 0] = 0.29
    d[4, 1] = 0.1
    assert kitchen.d4rl_rule(d).tolist() == [0, 0, 1, 0, 1]
    d[4, 1], d[5, 1] = 0.8, 0.3
    assert kitchen.d4rl_rule(d).tolist() == [0, 0, 1, 0, 0, 0]  # 0.3 is not below 0.3
    assert kitchen.d4rl_rule(np.full((3, 4), 0.1)).tolist() == [4]


def test_script_beats_random_by_the_cards_margin(played):
    card = read_json(data_dir() / "experts" / "kitchen.json")
    expert = played.r.sum(0)
    vec = tasks.lock_step("kitchen", [0])
    random = play(vec, [5], kitchen.script(vec, "random", np.random.default_rng(0)), 280).r.sum(0)
    assert expert.mean() - random.mean() > card["margin"] > 0.5
    assert played.vec.finished.shape == (2, 4)
    assert card["expert_mean_return"] <= 4
    with pytest.raises(PromptnbError, match="unknown quality of kitchen 'medium'"):
        kitchen.script(vec, "medium", np.random.default_rng(0))


def test_script_begins_anew_after_a_reset(played):
    vec = played.vec
    act = kitchen.script(vec, "expert", np.random.default_rng(1))
    act.noise = 0 * act.noise
    a = play(vec, [5, 6], act, 30).a
    vec.reset(seed=[1, 2])
    assert act.place[:, 1].min() > 0
    assert np.array_equal(play(vec, [5, 6], act, 30).a, a)


def test_noise_of_a_row_does_not_depend_on_the_others():
    vec = tasks.lock_step("kitchen", [0, 0])
    obs, _ = vec.reset(seed=[1, 1])
    env = vec.envs[0].unwrapped
    one, two = (kitchen.Script(env, n, 0.1, np.random.default_rng(4)) for n in (1, 2))
    assert np.array_equal(one(obs[:1])[0], two(obs)[0])
    assert not np.array_equal(*two(obs))


# ---- Minari


def dict_episode(T=30, done=(3, 9, 9, 20), extra=0):
    "A made-up FrankaKitchen episode of T steps: sub-task k is near its goal in steps done[k] and done[k] + 1 alone."
    rng = np.random.default_rng(0)
    goals = kitchen.GOALS
    achieved = {
        k: np.stack([goals[k] + (0 if t - 1 in (n, n + 1) else 1) for t in range(T + 1)])
        for k, n in zip(SUBTASKS, done)
    }
    desired = {k: np.repeat(goals[k][None], T + 1, 0) for k in SUBTASKS}
    rewards = sum(np.isin(np.arange(T), (n, n + 1)).astype(float) for n in done)
    return (
        dict(observation=rng.normal(size=(T + 1, 59)), achieved_goal=achieved, desired_goal=desired),
        rng.uniform(-1, 1, (T, 9)).astype(np.float32),
        rewards,
    )


def write(id_, episodes, observation_space, env):
    "A Minari dataset of (observations, actions, rewards)."
    import minari
    from minari.data_collector import EpisodeBuffer

    who = dict(algorithm_name="made up", author="-", author_email="-", code_permalink="-")
    buffers = []
    for i, (o, a, r) in enumerate(episodes):
        ends = dict(terminations=np.zeros(len(r), bool), truncations=np.arange(len(r)) == len(r) - 1)
        buffers.append(EpisodeBuffer(id=i, observations=o, actions=a, rewards=r, **ends))
    spaces = dict(observation_space=observation_space, action_space=env.action_space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(id_, buffers, **spaces, **who, description="a test", data_format="hdf5")


@pytest.fixture
def human(tmp_path, monkeypatch):
    "Three made-up demonstrations in Minari's folder: whole, one sub-task short, the last one too late."
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = Kitchen("gymnasium").inner
    episodes = [dict_episode(), dict_episode(done=(3, 9, 40, 20)), dict_episode(T=300, done=(3, 9, 290, 20))]
    write("D4RL/kitchen/complete-v2", episodes, env.observation_space, env)
    return episodes


def test_minari_by_d4rls_rule(human):
    one, two, three = from_minari_kitchen("D4RL/kitchen/complete-v2")
    assert one["rewards"].tolist() == [{3: 1, 9: 2, 20: 1}.get(t, 0) for t in range(21)]
    assert one["terminated"]
    assert one["success"]
    assert [x.shape for x in (one["observations"], one["actions"])] == [(21, 59), (21, 9)]
    assert one["observations"].dtype == np.float32
    assert np.array_equal(one["observations"], human[0][0]["observation"][:21].astype(np.float32))
    assert np.array_equal(one["actions"], human[0][1][:21])
    assert two["rewards"].sum() == 3
    assert len(two["rewards"]) == 30
    assert not two["terminated"]
    assert three["rewards"].sum() == 3
    assert len(three["rewards"]) == 280  # the fourth comes after D4RL's last step


def test_minari_as_stored(human):
    trajs = from_minari_kitchen("D4RL/kitchen/complete-v2", rule="gymnasium", episodes=2)
    assert [t["rewards"].tolist() for t in trajs] == [e[2].tolist() for e in human[:2]]
    assert trajs[0]["rewards"].sum() == 8


def test_minari_absent_is_one_line_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    start = time.time()
    for download in (False, True):
        with pytest.raises(PromptnbError) as e:
            from_minari_kitchen("D4RL/kitchen/partial-v2", download=download)
        assert "\n" not in str(e.value)
        assert "minari download D4RL/kitchen/partial-v2" in str(e.value)
        assert "MINARI_DATASETS_PATH" in str(e.value)
        assert ("does not answer" in str(e.value)) == download
    assert time.time() - start < 5


def test_minari_faults(human, tmp_path):
    env = Kitchen().inner
    flat = gym.spaces.Box(-np.inf, np.inf, (59,), np.float64)
    write("own/flat-v0", [(human[0][0]["observation"], *human[0][1:])], flat, env)
    with pytest.raises(PromptnbError, match="'own/flat-v0' is not FrankaKitchen's"):
        from_minari_kitchen("own/flat-v0")
    with pytest.raises(PromptnbError, match="unknown rule 'd4lr': did you mean 'd4rl'"):
        from_minari_kitchen("D4RL/kitchen/complete-v2", rule="d4lr")
    for f in (tmp_path / "D4RL/kitchen/complete-v2/data").glob("metadata.json"):
        f.write_text("{")
    with pytest.raises(PromptnbError, match="cannot load Minari dataset 'D4RL/kitchen/complete-v2'"):
        from_minari_kitchen("D4RL/kitchen/complete-v2")


@pytest.mark.skipif(not tasks.gl_backend(), reason="nothing renders here")
def test_film():
    frames = tasks.film("kitchen", 0, np.zeros((4, 9), np.float32), seed=0, every=2, size=64)
    assert frames.shape == (3, 64, 64, 3)
    assert frames.std() > 5
