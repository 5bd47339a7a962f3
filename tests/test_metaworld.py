"Meta-World's families: seeds to the last bit, a goal that stays hidden, scripts that reach it."

import warnings

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("metaworld")
from gymnasium.utils.env_checker import check_env

from promptnb import tasks
from promptnb.core import PromptnbError
from promptnb.tasks import metaworld as mw

pytestmark = pytest.mark.filterwarnings("ignore:Constant")  # the scripts ask for more than 1 and are clipped


def walk(step, obs, seed, steps):
    "Observations and rewards under actions that depend on the seed alone; `step` takes one row's action."
    rng, seen, pay = np.random.default_rng(seed), [obs], []
    for _ in range(steps):
        o, r, *_ = step(rng.uniform(-1, 1, 4).astype(np.float32))
        seen.append(o)
        pay.append(r)
    return np.stack(seen), np.array(pay)


def walk_row(vec, row, seed, steps=80):
    "Row `row` of a lock step; the others start elsewhere and move at random."
    others = np.random.default_rng(1000 + seed + row)

    def step(a):
        every = others.uniform(-1, 1, (vec.num_envs, 4)).astype(np.float32)
        every[row] = a
        return [x[row] for x in vec.step(every)[:2]]

    obs, _ = vec.reset(seed=[seed if i == row else 50 + i for i in range(vec.num_envs)])
    return walk(step, obs[row], seed, steps)


def walk_alone(name, task, seed, steps=80):
    env = gym.make(f"promptnb/{name}-v0", task=task)
    return walk(env.step, env.reset(seed=seed)[0], seed, steps)


@pytest.mark.parametrize("name, task, other", [("ml1-pick-place", 3, 7), ("ml10", 6, 13), ("ml10", 3, 3)])
def test_an_episode_follows_from_its_seed(name, task, other):
    vec = tasks.lock_step(name, [task, other])
    fresh = walk_row(vec, 0, seed=5)
    vec.reset(seed=9)
    [vec.step(np.random.default_rng(i).uniform(-1, 1, (2, 4))) for i in range(137)]  # noise: pushes things about
    used = walk_row(vec, 0, seed=5)
    vec.set_tasks([other, task])
    moved = walk_row(vec, 1, seed=5)
    for again in (used, moved, walk_alone(name, task, seed=5)):
        assert all((a == b).all() for a, b in zip(fresh, again))
    assert np.isfinite(fresh[0]).all()
    assert fresh[1].dtype == np.float64


def test_a_mask_resets_some_rows():
    vec = tasks.lock_step("ml10", [0, 0, 0])
    first, _ = vec.reset(seed=[1, 2, 3])
    moved, *_ = vec.step(np.ones((3, 4)))
    again, _ = vec.reset(seed=[2, 2, 2], options=dict(reset_mask=np.array([True, False, False])))
    assert (again[0] == first[1]).all()
    assert (again[1:] == moved[1:]).all()


def test_the_goal_is_hidden():
    vec = tasks.lock_step("ml10", [0, 1, 6])
    seen = [vec.reset(seed=0)[0]]
    full = [vec.full_obs]
    for _ in range(5):
        seen.append(vec.step(vec.action_space.sample())[0])
        full.append(vec.full_obs)
    seen, full = np.stack(seen), np.stack(full)
    assert seen.dtype == np.float32
    assert (seen[..., 36:] == 0).all()
    assert (seen[..., :36] == full[..., :36].astype(np.float32)).all()
    assert (full[..., 36:] == full[0, :, 36:]).all()
    assert (full[..., 36:] != 0).any(-1).all()


def test_places_are_those_of_prompt_dt():
    """ML1('pick-place-v2', seed=1) of mxu34/prompt-dt: gen_env in prompt_utils.py.

    Version 2 of the package draws (puck, goal) uniformly from these boxes, once a reset, anew while the two are less
    than 0.15 m apart on the table: sawyer_pick_place_v2.py."""
    low, high = (-0.1, 0.6, 0.02, -0.1, 0.8, 0.05), (0.1, 0.7, 0.02, 0.1, 0.9, 0.3)
    numbers, plain = np.random.RandomState(1), []
    while len(plain) < 50:
        place = numbers.uniform(low, high)
        if np.linalg.norm(place[:2] - place[3:5]) >= 0.15:
            plain.append(place)
    assert (mw.places("pick-place-v3") == plain).all()


def test_version_3_of_the_package_holds_every_second_place():
    import pickle

    import metaworld

    today = [pickle.loads(t.data)["rand_vec"] for t in metaworld.ML1("pick-place-v3", seed=1).train_tasks]
    ours = mw.places("pick-place-v3")
    assert (today[:25] == ours[1::2]).all() and not np.isclose(today, ours).all(1).any()


def test_goals_show_where_the_places_are():
    vec = tasks.lock_step("ml1-reach", [1, 20])
    vec.reset(seed=0)
    assert (vec.full_obs[:, 36:] == mw.places("reach-v3")[[1, 20], 3:]).all()


def won_within(name, ids, quality, steps, seed=0):
    "Mean return of `steps` steps, and the share of rows that succeeded in them."
    vec = tasks.lock_step(name, ids)
    act = mw.script(vec, quality, np.random.default_rng(seed))
    obs, _ = vec.reset(seed=seed)
    total, won = np.zeros(len(ids)), np.zeros(len(ids), bool)
    for _ in range(steps):
        obs, r, term, trunc, info = vec.step(act(obs))
        total += r
        won |= info["success"]
    assert not term.any()
    assert trunc.all() == (steps == 500)
    return total.mean(), won.mean()


@pytest.mark.parametrize(
    "name, ids, steps", [("ml1-pick-place", [11, 17], 500), ("ml1-reach", [6, 20], 150), ("ml10", [7, 11], 150)]
)
def test_the_script_succeeds_and_random_does_not(name, ids, steps):
    expert, won = won_within(name, ids, "expert", steps)
    assert won == 1
    assert expert > 3 * steps  # rewards reach 10 a step
    random, _ = won_within(name, ids, "random", min(steps, 150))
    assert expert / steps > 2 * random / min(steps, 150) + 2, (expert, random)


def test_medium_lies_between():
    expert, medium, random = (
        won_within("ml1-reach", [6, 9, 15, 16], q, 200)[0] for q in ("expert", "medium", "random")
    )
    assert random + 200 < medium < expert - 100, (expert, medium, random)


@pytest.mark.parametrize("quality", ["expert", "medium", "random"])
def test_noise_does_not_depend_on_the_number_of_rows(quality):
    def actions(n):
        vec = tasks.lock_step("ml1-reach", [6] * n)
        act = mw.script(vec, quality, np.random.default_rng(4))
        obs, _ = vec.reset(seed=0)
        out = []
        for _ in range(60):
            out.append(act(obs)[0])
            obs, *_ = vec.step(np.tile(out[-1], (n, 1)))
        return np.stack(out)

    one = actions(1)
    assert (one == actions(3)).all()
    assert np.abs(one).max() <= 1
    assert one.dtype == np.float32


def test_gymnasiums_checker_and_names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("ml1-pick-place", "ml1-reach", "ml10"):
            check_env(gym.make(f"promptnb/{name}-v0").unwrapped, skip_render_check=True)
    with pytest.raises(
        PromptnbError, match="unknown task 'ml1-reach-0': ml1-reach has tasks ml1-reach-01 to ml1-reach-20"
    ):
        gym.make("promptnb/ml1-reach-v0", task=0)
    with pytest.raises(PromptnbError, match="did you mean 'expert'"):
        mw.script(tasks.lock_step("ml1-reach", [6]), "exprt", np.random.default_rng(0))


def test_film():
    if not tasks.gl_backend():
        pytest.skip("no EGL, no OSMesa")
    frames = tasks.film("ml1-reach", 6, np.zeros((2, 4), np.float32), seed=0, every=2, size=64)
    assert frames.shape == (2, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert frames[0][:16].std() < frames[0][16:48].std()  # head up: the empty background is above the table
