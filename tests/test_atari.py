"Atari: rows that depend on their own seed, the protocol, the shipped policies, data from elsewhere."

import gzip
import shutil
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("ale_py")

from promptnb import collect, data, tasks
from promptnb.core import PromptnbError
from promptnb.tasks import atari

GAMES = ("breakout", "qbert", "pong")  # that policies of ours play


def rows(name, n, **kw):
    return atari.LockStep(replace(tasks.family(name), **kw), [0] * n, threads=1)


def follow(vec, row, seed, others, steps=25):
    "Frames and rewards of one row that starts from `seed` while the others do something else."
    vec.reset(seed=others)
    mask = np.arange(vec.num_envs) == row
    obs, _ = vec.reset(seed=[seed] * vec.num_envs, options=dict(reset_mask=mask))
    mine, noise, out = np.random.default_rng(0), np.random.default_rng(others), [(obs[row], 0.0)]
    for _ in range(steps):
        a = noise.integers(vec.single_action_space.n, size=vec.num_envs)
        a[row] = mine.integers(vec.single_action_space.n)
        obs, r, *_ = vec.step(a)
        out.append((obs[row], r[row]))
    return np.stack([o for o, _ in out]), np.array([r for _, r in out])


@pytest.mark.parametrize("name", (*GAMES, "freeway", "asterix"))
def test_family_and_emulator_agree(name):
    vec, fam = rows(name, 1), tasks.family(name)
    obs, _ = vec.reset(seed=0)
    assert obs.shape == (1, *fam.state_shape)
    assert obs.dtype == np.uint8
    assert int(np.prod(obs.shape)) == fam.state_dim
    assert vec.ale.single_action_space.n == vec.single_action_space.n == fam.act_dim
    obs, r, term, trunc, info = vec.step(np.eye(fam.act_dim)[[1]])
    assert obs in vec.observation_space
    assert r.dtype == np.float64
    assert term.dtype == trunc.dtype == bool
    assert info["lives"].shape == (1,)


def test_protocol_is_the_standard_one():
    p = atari.PROTOCOL
    assert not p["episodic_life"]
    assert not p["reward_clipping"]
    assert p["repeat_action_probability"] == 0
    assert (p["frameskip"], p["noop_max"]) == (4, 30)
    assert all(tasks.family(n).horizon * p["frameskip"] == atari.FRAMES for n in GAMES)


def test_a_row_depends_on_its_own_seed_alone():
    frames, rewards = follow(rows("breakout", 1), 0, 7, 1)
    beside_others = follow(rows("breakout", 3), 2, 7, 5)
    other_frames, _ = follow(rows("breakout", 1), 0, 8, 1)
    assert (beside_others[0] == frames).all()
    assert (beside_others[1] == rewards).all()
    assert (other_frames != frames).any()


def test_resets_without_a_seed_go_on_reproducibly():
    vec, seen = rows("pong", 2), []
    for _ in range(2):
        vec.reset(seed=3)
        vec.step([0, 0])
        seen.append(vec.reset(options=dict(reset_mask=np.array([True, False])))[0])
    assert (seen[0] == seen[1]).all()


def test_ended_rows_are_frozen_until_reset():
    vec = rows("breakout", 2, horizon=3)
    obs, _ = vec.reset(seed=0)
    vec.step([1, 1])
    vec.reset(seed=[9, 9], options=dict(reset_mask=np.array([False, True])))
    for _ in range(2):
        last, *_ = vec.step([1, 2])
    obs, r, term, trunc, _ = vec.step([2, 2])
    assert trunc.tolist() == [True, True]
    assert not term.any()
    assert r[0] == 0
    assert (obs[0] == last[0]).all()
    assert not (obs[1] == last[1]).all()
    fresh, _ = vec.reset(seed=[5, 5], options=dict(reset_mask=np.array([True, False])))
    assert (fresh[1] == obs[1]).all()
    assert vec.step([0, 0])[3].tolist() == [False, True]


def test_a_lost_game_terminates_and_earns_nothing_more():
    vec = rows("breakout", 1)
    vec.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        obs, r, term, trunc, info = vec.step(rng.integers(4, size=1))
        if term[0]:
            break
    assert term[0]
    again, r, term, *_ = vec.step([1])
    assert info["lives"][0] == 0
    assert term[0]
    assert r[0] == 0
    assert (again == obs).all()


@pytest.mark.filterwarnings("ignore")  # the checker remarks that images are not (H, W, 3)
def test_the_single_environment_is_the_same_game():
    from gymnasium.utils.env_checker import check_env

    env = gym.make("promptnb/breakout-v0", render_mode="rgb_array")
    vec = rows("breakout", 1)
    a, b = env.reset(seed=4)[0], vec.reset(seed=4)[0][0]
    for k in (1, 2, 2, 3, 0):
        assert (a == b).all()
        a, b = env.step(k)[0], vec.step([k])[0][0]
    assert env.render().shape == (210, 160, 3)
    assert env.spec.max_episode_steps == 27_000
    check_env(env.unwrapped)


def shipped():
    return [n for n in GAMES if atari.policy_path(n).exists()]


@pytest.mark.parametrize("name", shipped())
def test_cards_are_measured(name):
    p = atari.load(name)
    c = p.card
    assert c["family"] == name
    assert c["bytes"] < 1_000_000
    assert c["margin"] == pytest.approx((c["expert_mean_return"] - c["random_mean_return"]) / 2)
    assert p.snapshots[-1]["mean_return"] == c["expert_mean_return"]
    assert len(p.layers[0][0]) == len(p.snapshots)


def test_the_expert_beats_random_play_by_its_margin():
    card = atari.load("breakout").card
    vec = rows("breakout", 3)
    returns, _ = atari.play(
        vec, atari.script(vec, "expert", np.random.default_rng(0)), seed=77, cap=2500
    )  # agent steps: whole games, or most of them
    assert returns.mean() > card["random_mean_return"] + card["margin"]


@pytest.mark.parametrize("quality", tasks.family("breakout").qualities)
def test_a_scripted_row_does_not_see_its_neighbours(quality):
    few, many = rows("breakout", 1), rows("breakout", 3)
    act1, act3 = (atari.script(v, quality, np.random.default_rng(2)) for v in (few, many))
    a, b = few.reset(seed=[6])[0], many.reset(seed=[6, 1, 2])[0]
    for _ in range(15):
        x, y = act1(a), act3(b)
        assert x[0] == y[0]
        a, b = few.step(x)[0], many.step(y)[0]


def test_damaged_or_missing_policies_are_one_line(tmp_path):
    for f in (atari.policy_path("breakout"), atari.policy_path("breakout").with_suffix(".json")):
        shutil.copy(f, tmp_path)
    path = tmp_path / "breakout.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PromptnbError, match="is damaged"):
        atari.load("breakout", path)
    path.with_suffix(".json").unlink()
    with pytest.raises(PromptnbError, match=r"no policy .*breakout.json: train it with .*train_dqn\('breakout'\)"):
        atari.load("breakout", path)
    with pytest.raises(PromptnbError, match="did you mean 'expert'"):
        atari.script(rows("breakout", 1), "exprt", np.random.default_rng(0))


def test_frames_of_any_source_become_what_the_agent_sees():
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 84, 84), np.uint8)
    assert (atari.gray84(x) == x[:, -1]).all()
    assert (atari.gray84(x[:, 0]) == x[:, 0]).all()
    assert (atari.gray84(np.full((1, 210, 160, 3), 90, np.uint8)) == 90).all()
    assert (atari.gray84(np.kron(x[:, 0], np.ones((2, 2), np.uint8))) == x[:, 0]).all()  # exact halves
    with pytest.raises(PromptnbError, match=r"frames are float64 \(2, 84\)"):
        atari.gray84(np.zeros((2, 84)))


@pytest.fixture
def minari_game(tmp_path, monkeypatch):
    "A Minari dataset of one made-up game of Pong, of three steps."
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episode = EpisodeBuffer(
        id=0,
        observations=np.random.default_rng(0).integers(0, 256, (4, 210, 160, 3), np.uint8),
        actions=np.array([0, 5, 2]),
        rewards=np.array([0.0, -1.0, 1.0]),
        terminations=np.array([False, False, True]),
        truncations=np.zeros(3, bool),
    )
    spaces = dict(
        observation_space=gym.spaces.Box(0, 255, (210, 160, 3), np.uint8), action_space=gym.spaces.Discrete(6)
    )
    who = dict(algorithm_name="-", author="-", author_email="-", code_permalink="-", description="-")
    return minari.create_dataset_from_buffers("atari/pong/test-v0", [episode], jpeg_encoding=False, **spaces, **who)


def test_minari_episodes(minari_game):
    (one,) = atari.from_minari_atari(minari_game, "pong")
    assert one["observations"].shape == (3, 84, 84)
    assert one["observations"].dtype == np.uint8
    assert one["actions"].tolist() == [0, 5, 2]
    assert one["rewards"].tolist() == [0, -1, 1]
    with pytest.raises(PromptnbError, match="6 actions, but breakout has 4"):
        atari.from_minari_atari(minari_game, "breakout")


def write_part(folder, part=0, n=10, terminal=(3, 7), **over):
    x = (
        dict(
            observation=np.full((n, 84, 84), part, np.uint8),
            action=np.arange(n, dtype=np.int32),
            reward=np.ones(n, np.float32),
            terminal=np.isin(np.arange(n), terminal).astype(np.uint8),
        )
        | over
    )
    for k, v in x.items():
        with gzip.open(folder / f"$store$_{k}_ckpt.{part}.gz", "wb") as f:
            np.save(f, v)


def test_dqn_replay_is_split_at_terminals(tmp_path):
    write_part(tmp_path)
    write_part(tmp_path, 10, terminal=(9,))
    write_part(tmp_path, 2, terminal=())
    eps = atari.from_dqn_replay(tmp_path)
    assert [len(e["actions"]) for e in eps] == [4, 4, 2, 10, 10]
    assert [int(e["observations"][0, 0, 0]) for e in eps] == [0, 0, 0, 2, 10]
    assert eps[1]["actions"].tolist() == [4, 5, 6, 7]
    assert eps[0]["rewards"].dtype == np.float64
    assert [len(e["actions"]) for e in atari.from_dqn_replay(tmp_path, parts=[0], steps=6)] == [4, 2]


@pytest.fixture
def replay(tmp_path):
    "A replay folder of one whole part."
    write_part(tmp_path)
    return tmp_path


def test_an_empty_replay_folder(tmp_path):
    with pytest.raises(PromptnbError, match="no DQN-replay data"):
        atari.from_dqn_replay(tmp_path)


def test_a_replay_part_needs_its_four_files(replay):
    (replay / "$store$_reward_ckpt.0.gz").unlink()
    with pytest.raises(PromptnbError, match="reward_ckpt.0.gz"):
        atari.from_dqn_replay(replay)


def test_replay_arrays_have_one_length(replay):
    write_part(replay, action=np.zeros(9, np.int32))
    with pytest.raises(PromptnbError, match="lengths 10, 9, 10, 10"):
        atari.from_dqn_replay(replay)


def test_damaged_replay_files(replay):
    file = replay / "$store$_observation_ckpt.0.gz"
    whole = file.read_bytes()
    for bad in (whole[:-30], b"nonsense", whole[:40] + b"x" * 40 + whole[80:]):
        file.write_bytes(bad)
        with pytest.raises(PromptnbError, match="is damaged"):
            atari.from_dqn_replay(replay)


def test_pickled_replay_files_are_refused(replay):
    with gzip.open(replay / "$store$_observation_ckpt.0.gz", "wb") as f:
        np.save(f, np.array([{}] * 10), allow_pickle=True)
    with pytest.raises(PromptnbError, match="not a plain array"):
        atari.from_dqn_replay(replay)


REPLAYED = dict(tasks.family("freeway").remote)["medium"]  # d4rl-atari's medium: part 10 of the first run


@pytest.fixture
def freeway(tmp_path, monkeypatch):
    "The folder of Freeway's first run, below $PROMPTNB_DQN_REPLAY, with part 10 of 10 steps."
    monkeypatch.setenv("PROMPTNB_DQN_REPLAY", str(tmp_path))
    folder = tmp_path / "Freeway" / "1" / "replay_logs"
    folder.mkdir(parents=True)
    write_part(folder, 10, action=np.arange(10, dtype=np.int32) % 3)
    write_part(folder, 11, terminal=())
    return folder


def test_a_game_of_the_users_files(freeway):
    "Part 10 alone is read, at most as many trajectories as were asked for."
    assert REPLAYED == "dqn-replay/Freeway/1/10"
    assert [len(e["actions"]) for e in atari.replayed(tasks.family("freeway"), REPLAYED)] == [4, 4, 2]
    assert len(atari.replayed(tasks.family("freeway"), REPLAYED, episodes=2)) == 2


def test_the_users_files_are_collected_like_other_data(freeway, tmp_home):
    quiet = dict(threads=1, say=lambda *_: None)
    entry = collect.collect("freeway", episodes=10_000, **quiet)["promptnb/freeway-00/medium-v0"]
    assert (entry["episodes"], entry["steps"], entry["asked"]) == (3, 10, 10_000)
    store = data.load("freeway", "medium", episodes=10_000)  # as many as were asked for, or all that there are
    assert store.s.shape == (10, 84, 84)
    assert store.a.argmax(-1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_the_users_files_have_the_games_actions(freeway):
    write_part(freeway, 10)
    with pytest.raises(PromptnbError, match="action 9, but freeway has 3 actions"):
        atari.replayed(tasks.family("freeway"), REPLAYED)


def test_absent_files_of_the_user_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTNB_DQN_REPLAY", str(tmp_path))
    with pytest.raises(PromptnbError, match="_ckpt.10.gz of gs://atari-replay-datasets/dqn/Freeway/1/replay_logs"):
        atari.replayed(tasks.family("freeway"), REPLAYED)
