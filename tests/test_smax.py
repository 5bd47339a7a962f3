"SMAX in lock step: games that depend on their seeds alone, a legal script of known strength, plain arrays in."

import importlib.util
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

if not importlib.util.find_spec("jaxmarl"):
    pytest.skip("needs promptnb[smax]", allow_module_level=True)

from gymnasium.utils.env_checker import check_env

from promptnb import tasks
from promptnb.core import PromptnbError
from promptnb.tasks import smax

N, A, HORIZON = 3, 8, 100


def games(n, family="smax-3m"):
    "A lock step of n games."
    return tasks.lock_step(family, [0] * (n * tasks.family(family).agents))


def per_game(seeds):
    "One seed a row: all agents of a game have their game's."
    return [s for s in seeds for _ in range(N)]


def one_line(match):
    "Expects an error of one line."
    return pytest.raises(PromptnbError, match=f"^[^\n]*{match}[^\n]*$")


def play(vec, quality, seeds, rng=0, steps=HORIZON):
    "One game each: arrays (T, rows, ...), T the longest; what a step returns, and what was legal before it."
    act = smax.script(vec, quality, np.random.default_rng(rng))
    obs, info = vec.reset(seed=seeds)
    out = []
    for _ in range(steps):
        legal, a = vec.legal.copy(), act(obs)
        obs, r, term, trunc, info = vec.step(a)
        world = np.repeat(vec.world_state, vec.family.agents, 0)
        out.append(dict(obs=obs, a=a, r=r, term=term, trunc=trunc, won=info["success"], legal=legal, world=world))
        if (term | trunc).all():
            break
    return SimpleNamespace(**{k: np.stack([step[k] for step in out]) for k in out[0]})


@pytest.fixture(scope="module")
def played():
    "64 games by each quality, from the seeds 0 to 63."
    return {q: play(games(64), q, per_game(range(64))) for q in smax.NOISE}


# ---- rows


def test_rows_are_whole_games():
    for ids in ([0] * 4, []):
        with one_line("give a multiple of 3"):
            tasks.lock_step("smax-3m", ids)
    with one_line("unknown task 'smax-3m-1'"):
        tasks.lock_step("smax-3m", [1] * 3)
    with one_line("same for each 3"):
        games(2).reset(options=dict(reset_mask=np.arange(6) == 1))


def test_the_number_of_rows_can_change():
    vec = games(2)
    vec.reset(seed=0)
    vec.set_tasks([0] * 15)
    obs, info = vec.reset(seed=0)
    assert vec.num_envs == 15
    assert obs.shape == vec.observation_space.shape == (15, 75)
    assert obs.dtype == np.float32
    assert info["legal"].shape == (15, A)
    assert vec.world_state.shape == (5, 72)


def test_agents_of_a_game_share_it(played):
    "Their own views; one reward, one end, one victory."
    for p in played.values():
        for x in (p.r, p.term, p.trunc, p.won):
            assert (x.reshape(len(x), 64, N) == x.reshape(len(x), 64, N)[..., :1]).all()
        assert p.r.dtype == np.float64
        assert all(len(np.unique(p.obs[0][3 * g : 3 * g + 3], axis=0)) == 3 for g in range(64))


def start_of(vec, seed):
    return vec.reset(seed=seed)[0]


def test_a_game_takes_its_first_rows_seed():
    "An int counts rows; all 64 bits count."
    vec = games(2)
    a = start_of(vec, [5, 9, 9, 8, 1, 1])
    assert np.array_equal(a, start_of(vec, per_game([5, 8])))
    assert np.array_equal(a, start_of(vec, 5))
    assert np.array_equal(a[3:], start_of(vec, per_game([8, 8]))[3:])
    large = start_of(vec, per_game([2**40 + 1] * 2))
    assert np.array_equal(*np.split(large, 2))
    assert not np.array_equal(large, start_of(vec, per_game([1, 1])))


def test_without_a_seed_another_game_follows_always_the_same():
    vec = games(2)
    a, b, c = start_of(vec, 3), start_of(vec, None), start_of(vec, None)
    start_of(vec, 3)
    assert np.array_equal(b, start_of(vec, None))
    assert np.array_equal(c, start_of(vec, None))
    assert not np.array_equal(a, b)
    assert not np.array_equal(b, c)


def test_a_game_is_the_same_in_any_company():
    "Bit for bit: alone, among 7 and among 39 (another block), with the script's noise."
    many = play(games(40), "medium", per_game(range(40)))
    for n in (1, 8):
        few = play(games(n), "medium", per_game(range(n)))
        for k, x in vars(few).items():
            assert np.array_equal(x, getattr(many, k)[: len(few.obs), : 3 * n]), k


def course(n, at, mine, rng):
    "What game `at` of n shows and earns under scores `mine` (T, N, A), while the others get scores of `rng`."
    vec, out = games(n), []
    vec.reset(seed=per_game([7 if g == at else 50 + g for g in range(n)]))
    for s in mine:
        scores = rng.random((n, N, A))
        scores[at] = s
        scores[..., 1] += 1  # to the right, where the enemy is
        obs, r, *_ = vec.step(scores.reshape(-1, A))
        out.append(np.append(obs[N * at : N * at + N].ravel(), r[N * at]))
    return np.stack(out)


def test_a_game_is_the_same_in_any_place():
    rng = np.random.default_rng(0)
    mine = rng.random((30, N, A))
    alone = course(1, 0, mine, rng)
    for n, at in ((7, 5), (8, 2), (40, 37)):
        assert np.array_equal(course(n, at, mine, rng), alone), (n, at)


def test_reset_mask():
    "The games of the mask start as ever; the others go on as if nothing had been."
    vec = games(40)
    mask = np.repeat(np.isin(np.arange(40), (1, 35)), N)
    a = np.full(120, 1)
    vec.reset(seed=per_game(range(40)))
    straight = [vec.step(a)[0] for _ in range(6)]
    vec.reset(seed=per_game(range(40)))
    for _ in range(3):
        vec.step(a)
    obs, _ = vec.reset(seed=per_game(range(40)), options=dict(reset_mask=mask))
    assert np.array_equal(obs[~mask], straight[2][~mask])
    assert not np.array_equal(obs[mask], straight[2][mask])
    again = [vec.step(a)[0] for _ in range(3)]
    assert np.array_equal(again[2][~mask], straight[5][~mask])
    assert np.array_equal(again[2][mask], straight[2][mask])


def test_a_step_is_one_call(monkeypatch):
    "40 games are two blocks, in one call of the engine."
    vec, calls = games(40), []
    step = vec.engine.step
    monkeypatch.setattr(vec.engine, "step", lambda *x: calls.append(x[2].shape) or step(*x))
    vec.reset(seed=0)
    for a in (1, smax.STOP):
        vec.step(np.full(40 * N, a))
    assert calls == [(2, smax.BLOCK, N)] * 2


def test_a_number_of_blocks_is_compiled_once():
    "Whatever the number of games in them. No test here plays more than two blocks."
    for n in (1, smax.BLOCK, smax.BLOCK + 1, 2 * smax.BLOCK):
        vec = games(n)
        vec.step(np.full(n * N, 1))
    assert vec.engine.step._cache_size() == 2


# ---- the end


def test_an_ended_game_is_frozen(played):
    for p in played.values():
        over = p.term | p.trunc
        end = over.argmax(0)
        assert over.any(0).all()
        assert len(set(end.tolist())) > 3
        for i, t in enumerate(end):
            for x in (p.obs, p.term, p.trunc, p.world):
                assert (x[t:, i] == x[t, i]).all()
            assert not p.r[t + 1 :, i].any()
            assert not p.won[t + 1 :, i].any()
            assert (p.legal[t + 1 :, i] == p.legal[t + 1 : t + 2, i]).all()


def test_success_is_a_last_reward_of_one(played):
    for p in played.values():
        assert np.array_equal(p.won, p.r >= 1)
        assert (p.r >= 0).all()
        assert (p.r.sum(0) <= 2 + 1e-5).all()
        end = (p.term | p.trunc).argmax(0)
        rows = np.arange(len(end))
        last = p.r[end, rows]
        assert np.array_equal(p.won.any(0), last >= 1)
        assert p.term[end, rows][last >= 1].all()
        np.testing.assert_allclose(p.r.sum(0)[p.won.any(0)], 2, atol=1e-5)


def test_time_runs_out():
    "At the horizon with both sides standing a game is truncated, not terminated."
    vec = games(1)
    vec.reset(seed=0)
    s = vec._states
    vec._states = s.replace(state=s.state.replace(step=s.state.step + HORIZON - 2))
    for last in (False, True):
        _, _, term, trunc, _ = vec.step(np.full(N, smax.STOP))
        assert (trunc == last).all()
        assert not term.any()


def test_scores_give_the_best_legal_action():
    vec, by_score = games(2), games(2)
    vec.reset(seed=0)
    by_score.reset(seed=0)
    for want in (1, 1, 7, 0, 4):
        scores = np.zeros((6, A))
        scores[:, want] = 1
        scores[:, 2] = 0.5
        legal = want < 5
        a, b = by_score.step(scores), vec.step(np.full(6, want if legal else 2))
        assert np.array_equal(a[0], b[0])
    assert np.isfinite(vec.step(np.full((6, A), np.nan))[0]).all()
    assert np.isfinite(vec.step(np.full(6, 7))[0]).all()


# ---- the script


def test_script_is_legal(played):
    for p in played.values():
        assert np.take_along_axis(p.legal, p.a[..., None], -1).all()
        assert p.legal[..., smax.STOP].all()
    with one_line("unknown quality 'god'.*'good'"):
        smax.script(games(1), "god", np.random.default_rng(0))


def test_script_is_as_strong_as_said(played):
    won = {q: p.won.any(0).mean() for q, p in played.items()}
    ret = {q: p.r.sum(0).mean() for q, p in played.items()}
    assert won["good"] > 0.65, won
    assert won["good"] > won["medium"] + 0.12, won
    assert won["medium"] > won["poor"] + 0.12, won
    assert won["random"] < 0.05, won
    assert ret["good"] > ret["medium"] > ret["poor"] > ret["random"] + 0.3, ret


@pytest.fixture
def skirmish():
    "Two games of 2s3z with units put anywhere, hurt, reloading; one is dead: the lock step, places and health shares."
    vec = games(2, "smax-2s3z")
    vec.reset(seed=0)
    rng, states = np.random.default_rng(0), vec._states
    units = states.state
    place = rng.uniform(10, 20, units.unit_positions.shape).astype(np.float32)
    share = rng.uniform(0.1, 1, units.unit_health.shape).astype(np.float32)
    changed = units.replace(
        unit_positions=place,
        unit_health=units.unit_health * share,
        unit_weapon_cooldowns=units.unit_weapon_cooldowns + 0.7,
        unit_alive=units.unit_alive.at[..., 6].set(False),
    )
    vec._states = states.replace(state=changed)
    vec._begin(np.zeros((1, smax.BLOCK), bool))
    return vec, place[0, :2], share[0, :2]


def test_seen_is_what_is_there(skirmish):
    "On a map of two types of units: positions, health and cooldowns agree with the state of the map."
    (vec, place, share), n = skirmish, 5
    got = smax.seen(vec, vec._obs)
    at = place[:, None, n:] - place[:, :n, None]
    distance = np.linalg.norm(at, axis=-1)
    sight = np.where(np.arange(n) < 2, 10, 9)  # stalkers see farther than zealots
    gone = (distance >= sight[:, None]) | (np.arange(n) == 1)
    assert 0 < gone.mean() < 0.9
    assert np.array_equal(got.distance >= smax.FAR, gone)
    np.testing.assert_allclose(got.at[~gone], at[~gone], atol=1e-4)
    np.testing.assert_allclose(got.distance[~gone], distance[~gone], atol=1e-4)
    health = np.array([160, 160, 150, 150, 150]) * share[:, n:]
    np.testing.assert_allclose(got.health[~gone], np.broadcast_to(health[:, None], gone.shape)[~gone], rtol=1e-4)
    assert got.damage[0].tolist() == [13, 13, 8, 8, 8]
    assert not got.ready.any()


def three_marines(ready=True):
    "Three marines before two enemies of 9 and 20 health points; the second is nearer. A shot takes 9."
    return SimpleNamespace(
        health=np.array([[[9.0, 20.0]] * 3]),
        distance=np.array([[[4.0, 3.0]] * 3]),
        damage=np.full((1, 3), 9.0),
        ready=np.full((1, 3), ready),
    )


def test_volley_spends_no_shots_on_the_dead():
    in_range = np.ones((1, 3, 2), bool)
    assert smax.volley(three_marines(), in_range).tolist() == [[0, 1, 1]]
    in_range[0, 0, 0] = False
    assert smax.volley(three_marines(), in_range).tolist() == [[1, 0, 1]]


def test_volley_of_who_cannot_shoot_yet_spends_nothing():
    assert smax.volley(three_marines(ready=False), np.ones((1, 3, 2), bool)).tolist() == [[0, 0, 0]]


def test_direction():
    assert smax.direction(np.array([[0, 2.0], [2, 0], [0, -2], [-2, 0]])).tolist() == [0, 1, 2, 3]


def test_moves_go_where_the_script_thinks():
    vec = games(4)
    vec.reset(seed=0)

    def place():
        return np.stack([smax.units(w).position[0] for w in vec.world_state])

    before = place()
    vec.step(np.repeat(np.arange(4), N))
    assert smax.direction(place() - before).tolist() == [0, 1, 2, 3]


# ---- one agent, pictures


def test_agent_environment_passes_the_checker():
    env = gym.make("promptnb/smax-3m-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=4)
    assert env.render().shape == (240, 240, 3)
    assert env.render().dtype == np.uint8
    with one_line("unknown task 'smax-3m-1'"):
        gym.make("promptnb/smax-3m-v0", task=1)


def test_agent_environment_is_row_0_of_a_game(played):
    "The other rows follow the script."
    env, p, row = gym.make("promptnb/smax-3m-v0"), played["good"], 4 * N
    obs, info = env.reset(seed=4)
    t, over = 0, False
    while not over:
        assert np.array_equal(info["legal"], p.legal[t, row])
        obs, r, term, trunc, info = env.step(p.a[t, row])
        assert np.array_equal(obs, p.obs[t, row])
        assert (r, term, trunc, info["success"]) == (p.r[t, row], p.term[t, row], p.trunc[t, row], p.won[t, row])
        t, over = t + 1, term or trunc


def test_pictures(played):
    "Units in their team's colour, the fallen gone; a replay shows the game that was played."
    p = played["good"]
    end = int((p.term | p.trunc)[:, 0].argmax())
    film = smax.frames("smax-3m", p.a[:, :N], seed=0, every=3)
    assert len(film) == 1 + -(-(end + 1) // 3)
    assert np.array_equal(film[-1], smax.picture(p.world[end, 0]))
    for w, pic in ((p.world[0, 0], smax.picture(p.world[0, 0])), (p.world[end, 0], film[-1])):
        u = smax.units(w)
        assert u.enemy.tolist() == [False] * 3 + [True] * 3
        for team, c in enumerate(smax.COLOURS):
            assert (pic == c).all(-1).any() == (u.health[u.enemy == team] > 0).any()


# ---- real SMAC


@pytest.fixture
def arrays():
    "Two episodes of a map, of 5 and 3 steps."
    g = np.random.default_rng(0)
    legal = g.random((2, 5, N, 9)) < 0.7
    legal[..., 0] = True
    return dict(
        obs=g.normal(size=(2, 5, N, 30)),
        actions=(legal * g.random(legal.shape)).argmax(-1),
        legal=legal,
        rewards=g.random((2, 5)),
        length=np.array([5, 3]),
    )


def test_from_smac_takes_all_maps_in_order(tmp_path, arrays):
    np.savez(tmp_path / "3m.npz", **arrays)
    two = {k: v if k in ("rewards", "length") else v[:, :, :2] for k, v in arrays.items()}
    np.savez(tmp_path / "2m_vs_1z.npz", **two)
    trajs, ids = smax.from_smac(tmp_path)
    assert [t["map"] for t in trajs] == ["2m_vs_1z"] * 4 + ["3m"] * 6
    assert ids.tolist() == [0] * 4 + [1] * 6


def test_from_smac_gives_a_trajectory_for_each_agent(tmp_path, arrays):
    np.savez(tmp_path / "3m.npz", **arrays)
    trajs, ids = smax.from_smac(tmp_path, ["3m"])
    assert ids.tolist() == [0] * 6
    for k, d in enumerate(trajs):
        e, i = divmod(k, N)
        T = arrays["length"][e]
        assert d["agent"] == i
        assert np.array_equal(d["observations"], arrays["obs"][e, :T, i].astype(np.float32))
        assert np.array_equal(d["legal"], arrays["legal"][e, :T, i])
        assert np.allclose(d["rewards"], arrays["rewards"][e, :T])
        assert d["actions"].dtype == np.float32
        assert d["actions"].shape == (T, 9)
        assert np.array_equal(d["actions"].argmax(-1), arrays["actions"][e, :T, i])
        assert (d["actions"].sum(-1) == 1).all()


def test_from_smac_becomes_a_store(tmp_path, arrays):
    from promptnb.data import from_arrays

    np.savez(tmp_path / "3m.npz", **arrays)
    store = from_arrays(*smax.from_smac(tmp_path))
    assert len(store) == 6
    assert len(store.s) == 24


@pytest.fixture
def illegal(arrays):
    "What was legal, but for one action: the second episode's third step."
    legal = arrays["legal"].copy()
    legal[1, 2, 0, arrays["actions"][1, 2, 0]] = False
    return legal


@pytest.mark.parametrize(
    "match, change",
    {
        "lacks legal, length": lambda x: dict(legal=None, length=None),
        "pickled objects are not read": lambda x: dict(obs=np.array([{}, None], object)),
        "obs .* is not numbers with 4 dimensions": lambda x: dict(obs=x["obs"][0]),
        "rewards is .*, but legal wants \\(2, 5\\)": lambda x: dict(rewards=x["rewards"][:, :4]),
        "lengths must be 1 to 5": lambda x: dict(length=np.array([5, 6])),
        "episode 0 has an action": lambda x: dict(actions=x["actions"] + 9),
    }.items(),
    ids=["missing", "pickled", "dimensions", "shapes", "lengths", "unknown-action"],
)
def test_from_smac_refuses_broken_arrays(tmp_path, arrays, match, change):
    changed = {**arrays, **change(arrays)}
    np.savez(tmp_path / "3m.npz", **{k: v for k, v in changed.items() if v is not None})
    with one_line(match):
        smax.from_smac(tmp_path)


def test_from_smac_refuses_what_was_not_available(tmp_path, arrays, illegal):
    np.savez(tmp_path / "3m.npz", **dict(arrays, legal=illegal))
    with one_line("episode 1 has an action that was not available"):
        smax.from_smac(tmp_path)
    np.savez(tmp_path / "3m.npz", **dict(arrays, legal=illegal, length=np.array([5, 2])))
    assert len(smax.from_smac(tmp_path)[0]) == 6  # after the end nothing counts


def test_from_smac_needs_files(tmp_path):
    with one_line("has no <map>.npz"):
        smax.from_smac(tmp_path)
    with one_line("there is no"):
        smax.from_smac(tmp_path, ["8m"])
    (tmp_path / "3m.npz").write_bytes(b"\x80\x04N.")
    with one_line("is no .npz file"):
        smax.from_smac(tmp_path)
