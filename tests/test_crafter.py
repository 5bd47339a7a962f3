"Crafter: the quick rules are crafter's own bit for bit, a seed is a game in every process, numbers that are right."

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("crafter")

import gymnasium as gym
from gymnasium.utils.env_checker import check_env

from promptnb.core import PromptnbError
from promptnb.tasks import crafter as C
from promptnb.tasks.crafter import ACHIEVEMENTS, ACTIONS, BEHAVIOURS, KINDS, UPKEEP, Crafter, Vec

A = {a: i for i, a in enumerate(ACTIONS)}


def one_line(match):
    return pytest.raises(PromptnbError, match=f"^[^\n]*{match}[^\n]*$")


def both(seed, episode):
    games = C.Game(), C.Plain()
    for g in games:
        g.begin(seed, episode)
    return games


def same(fast, slow, at=None):
    "Both games are in one state: what is seen, what the player has, and the dice."
    assert (fast.semantic() == slow.semantic()).all(), at
    assert (fast.picture() == slow.picture()).all(), at
    assert fast.player.inventory == slow.player.inventory, at
    assert fast.player.achievements == slow.player.achievements, at
    a, b = fast.world.rng.get_state(), slow.world.random.get_state()
    assert (a[1] == b[1]).all(), at
    assert a[2] == b[2], at


def put(game, cell):
    "Move the player to a cell, wherever it is."
    world = game.world
    there = world[cell][1]
    if there is game.player:
        return
    if there:
        world.remove(there)
    world.move(game.player, Vec(cell))
    if isinstance(game, C.Plain):
        game.seen = game.env._sem_view()


# ---- the quick rules


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5])
def test_quick_rules_equal_crafters(seed):
    rng = np.random.default_rng(seed % 97)
    for episode in (1, 2):
        fast, slow = both(seed, episode)
        same(fast, slow, (episode, 0))
        while fast.player.health > 0:
            a = int(rng.integers(17))
            assert fast.step(a) == slow.step(a)
            same(fast, slow, (episode, fast.t))


def rich(games, rng, steps, every=lambda g: None):
    "Players that cannot starve or run out of things, so that they dig, craft, fight, plant and travel."
    fast, slow = games
    for t in range(steps):
        for g in games:
            for k, v in g.player.inventory.items():
                g.player.inventory[k] = v if k == "energy" else 9
            g.player._last_health = 9
            every(g)
        a = int(rng.choice([A["do"], *range(17), 1, 2, 3, 4, 1, 2, 3, 4]))
        assert fast.step(a) == slow.step(a)
        same(fast, slow, t)
    return {k for k, n in fast.player.achievements.items() if n}


SELDOM = {"make_iron_pickaxe", "make_stone_sword", "place_plant", "place_furnace"}
OFTEN = {"place_stone", "collect_stone", "collect_wood", "wake_up"}


def test_quick_rules_equal_crafters_when_all_is_done():
    "A day and part of the next, with the dark, its noise and sleep; then another world beside a skeleton's lair."
    done = rich(both(5, 1), np.random.default_rng(0), 420)
    games, arrows = both(8, 1), Counter()
    for g in games:
        put(g, beside_a_skeleton(games[0].world))

    def count(g):
        arrows.update(type(o).__name__ for o in games[0].world.live)

    done |= rich(games, np.random.default_rng(1), 250, count)
    assert arrows["Arrow"]
    assert done >= SELDOM | OFTEN, done


def beside_a_skeleton(world):
    "A cell of path next to the first skeleton, or next but one."
    x, y = next(o for o in world.live if type(o).__name__ == "Skeleton").pos
    moves = ((2, 0), (-2, 0), (0, 2), (0, -2), (1, 0), (-1, 0), (0, 1), (0, -1))
    return next((x + dx, y + dy) for dx, dy in moves if world[x + dx, y + dy][0] == "path")


def test_quick_rules_equal_crafters_in_the_corner():
    "A tired player in the corner, where nothing can be made."
    games = both(9, 1)
    for g in games:
        put(g, (1, 1))
        g.player.inventory["energy"] = 0
    rich(games, np.random.default_rng(2), 60)


@pytest.mark.parametrize("corner", [(0, 0), (0, 63), (63, 0), (63, 63), (0, 30), (63, 30), (30, 0), (30, 63)])
def test_sight_at_the_borders(corner):
    x, y = corner
    for fast in (True, False):
        env = Crafter(fast=fast, image=False)
        env.reset(seed=4)
        put(env.game, corner)
        window = env.game.semantic()[max(x - 4, 0) : x + 5, max(y - 3, 0) : y + 4]
        kinds = tuple(KINDS[k] for k in np.unique(window) if KINDS[k] not in ("none", "player"))
        assert env.seen() == kinds
        assert env.scene()["seen"] == kinds


def test_the_atlas_is_crafters_drawing():
    e = C.rules().engine
    textures = e.Textures(C.rules().constants.root / "assets")
    tiles, places, size = C.atlas().tiles.reshape(13, 15, 7, 7, 3), C.atlas().places, (7, 7)
    for m, material in enumerate(KINDS[1:13], 1):
        for name, i in [(None, 0), *places.items()]:
            cell = np.zeros((7, 7, 3), np.uint8)
            e._draw(cell, (0, 0), textures.get(material, size))
            if name:
                e._draw_alpha(cell, (0, 0), textures.get(name, size))
            assert (tiles[m, i] == cell.swapaxes(0, 1)).all(), (material, name)


MAP = """
import hashlib
from promptnb.tasks import crafter
game = crafter.Game()
game.begin(3, 1)
print(hashlib.sha256(game.semantic().tobytes()).hexdigest())
"""


def in_a_process(code, *args, **environment):
    "The words that a program prints, run in a process of its own."
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_terrain_is_the_same_without_numba():
    assert in_a_process(MAP, NUMBA_DISABLE_JIT="0") == in_a_process(MAP, NUMBA_DISABLE_JIT="1")


# ---- a seed is a game

GAME = """
import hashlib, sys
import numpy as np
render = sys.argv[1] == "render"
junk = [object() for _ in range(int(sys.argv[2]))]
del junk[::3]
from promptnb.tasks.crafter import Crafter
env, rng, digest = Crafter(fast=sys.argv[3] == "fast", length=300), np.random.default_rng(0), hashlib.sha256()
env.reset(seed=11)
ends = 0
for _ in range(int(sys.argv[4])):
    obs, r, dead, over, info = env.step(int(rng.integers(17)))
    if render:
        assert (env.render() == obs).all()
        env.render()
    for x in (obs, np.float64(r), np.array([dead, over]), info["semantic"], info["player_pos"]):
        digest.update(np.ascontiguousarray(x).tobytes())
    if dead or over:
        ends += 1
        digest.update(env.reset()[0].tobytes())
print(ends, digest.hexdigest())
"""


def game_in_a_process(seed_of_hashes, *args):
    "Number of episodes that ended, and a digest of all that was seen; args: render?, junk, code, steps."
    return in_a_process(GAME, *args, PYTHONHASHSEED=str(seed_of_hashes))


def test_processes_agree():
    plain = game_in_a_process(1, "no", 0, "fast", 1600)
    disturbed = game_in_a_process(2, "render", 123_457, "fast", 1600)
    assert plain == disturbed
    assert int(plain[0]) >= 3


def test_processes_agree_with_crafters_own_code():
    fast = game_in_a_process(1, "no", 0, "fast", 400)
    own = game_in_a_process(3, "render", 77_777, "plain", 400)
    assert fast[1] == own[1]


def test_neither_image_nor_render_changes_the_game():
    envs = Crafter(), Crafter(image=False), Crafter(fast=False, image=False)
    rng = np.random.default_rng(5)
    for e in envs:
        e.reset(seed=2)
    for t in range(330):
        a = int(rng.integers(17))
        (obs, r, dead, over, info), *others = [e.step(a) for e in envs]
        if t % 50 == 0 or 240 < t < 245:
            assert (envs[1].render() == obs).all()
            assert (envs[1].render() == obs).all()
        for o, r2, d2, over2, i2 in others:
            assert not o.any()
            assert (r, dead, over) == (r2, d2, over2)
            assert (info["semantic"] == i2["semantic"]).all()
            assert info["inventory"] == i2["inventory"]
        if dead:
            assert info["behaviour"] == others[0][4]["behaviour"] == others[1][4]["behaviour"]
            for e in envs:
                e.reset()


def test_a_seed_gives_the_same_episodes_in_the_same_order():
    env = Crafter()
    first, second = env.reset(seed=1)[0], env.reset()[0]
    assert (first != second).any()
    assert (env.reset(seed=1)[0] == first).all()
    assert (env.reset()[0] == second).all()
    assert env.state() == dict(seed=1, episode=2, actions=[])
    assert (Crafter().reset(seed=2)[0] != first).any()


# ---- the interface


def test_gymnasium_likes_it():
    env = gym.make("promptnb/crafter-v0")
    check_env(env.unwrapped)
    assert env.unwrapped.render_mode == "rgb_array"


def test_the_time_limit_truncates():
    env = Crafter(length=20, image=False)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]


def test_death_terminates_even_at_the_time_limit():
    env = Crafter(length=20, image=False)
    env.reset(seed=0)
    for _ in range(19):
        env.step(0)
    env.game.player.health = 0
    *_, dead, over, info = env.step(0)
    assert (dead, over, info["discount"]) == (True, False, 0.0)
    assert set(info["behaviour"]) == set(BEHAVIOURS)


def test_what_info_holds_is_a_copy():
    env = Crafter()
    _, info = env.reset(seed=0)
    info["player_pos"][:] = 0
    info["semantic"][:] = 0
    info["inventory"]["wood"] = 5
    info["achievements"]["wake_up"] = 1
    _, again = env.reset(seed=0)
    kept = again["semantic"].copy()
    env.step(1)
    assert tuple(again["player_pos"]) == (32, 32)
    assert env.game.semantic().any()
    assert env.scene()["unlocked"] == ()
    assert "wood" not in env.scene()["status"]
    assert (kept == again["semantic"]).all()


@pytest.mark.parametrize("image", [True, False])
def test_resume(image):
    env, rng = Crafter(image=image), np.random.default_rng(0)
    env.reset(seed=6)
    env.reset()
    for a in rng.integers(17, size=260):
        obs, _, dead, *_ = env.step(a)  # into the night
    state, other = env.state(), Crafter(image=image)
    assert (other.restore(state) == obs).all()
    assert state["episode"] == 2
    assert len(state["actions"]) == 260
    for a in rng.integers(17, size=40):
        x, y = env.step(a), other.step(a)
        assert (x[0] == y[0]).all()
        assert x[1:4] == y[1:4]
        assert (x[4]["semantic"] == y[4]["semantic"]).all()
    assert env.counts == other.counts
    assert env.scene() == other.scene()
    assert (env.reset()[0] == other.reset()[0]).all()


def test_a_state_needs_a_reset():
    with one_line("reset it first"):
        Crafter().state()


# ---- behaviour


@pytest.fixture
def meadow():
    "An awake player on grass everywhere, alone, facing south."
    env = Crafter(image=False)
    env.reset(seed=0)
    w = env.game.world
    for o in list(w.live)[1:]:
        w.remove(o)
    for x, y in np.argwhere(w.ground != KINDS.index("grass")).tolist():
        w[x, y] = "grass"
    return env


def zombie(env, dx, dy, kind="Zombie"):
    p = env.game.player
    o = getattr(C.rules().objects, kind)(env.game.world, (p.pos[0] + dx, p.pos[1] + dy), p)
    env.game.world.add(o)
    return o


def does(env, action, **bag):
    "Counts that one action changes, as {behaviour: (hits, chances)}; upkeep left out."
    env.game.player.inventory.update(bag)
    before = {b: tuple(c) for b, c in env.counts.items()}
    env.step(A[action])
    return {
        b: (c[0] - before[b][0], c[1] - before[b][1])
        for b, c in env.counts.items()
        if tuple(c) != before[b] and b not in UPKEEP
    }


def test_sleep(meadow):
    assert does(meadow, "sleep", energy=9) == {}
    assert does(meadow, "sleep", energy=4) == {"sleeps when tired": (1, 1), "sleeps safely": (1, 1)}
    assert does(meadow, "sleep") == does(meadow, "do") == {}  # asleep: nothing is begun
    meadow.game.player.sleeping = False
    zombie(meadow, 4, 3)
    assert does(meadow, "sleep", energy=5) == {"sleeps when tired": (0, 1), "sleeps safely": (0, 1)}


def test_a_zombie_out_of_sight_is_safe(meadow):
    zombie(meadow, 5, 0)
    assert does(meadow, "sleep", energy=1)["sleeps safely"] == (1, 1)


def test_drink(meadow):
    x, y = meadow.game.player.pos
    meadow.game.world[x, y + 1] = "water"
    assert [does(meadow, "do", drink=d) for d in (2, 3, 8, 9)] == [
        {"drinks before thirst": (h, 1)} for h in (0, 1, 1, 0)
    ]
    assert does(meadow, "move_left") == does(meadow, "do") == {} or meadow.game.player.facing == (-1, 0)


def test_plant(meadow):
    assert does(meadow, "place_plant", sapling=0) == {}
    assert does(meadow, "place_plant", sapling=2) == {"plants safely": (1, 1)}
    assert does(meadow, "place_plant") == {}  # the cell is taken
    zombie(meadow, -3, 0, "Skeleton")
    meadow.game.player.facing = (1, 0)
    assert does(meadow, "place_plant") == {"plants safely": (0, 1)}
    assert meadow.game.player.achievements["place_plant"] == 2


def test_fight(meadow):
    for bag, hit in ((dict(), 0), (dict(stone_sword=1), 1)):
        z = zombie(meadow, 0, 1)
        health = z.health
        assert does(meadow, "do", health=9, **bag) == {"fights armed": (hit, 1)}
        assert z.health < health
        meadow.game.world.remove(z)


def test_lava_and_upkeep(meadow):
    meadow.step(0)
    meadow.game.player.inventory.update(energy=2, food=3)
    meadow.step(0)
    x, y = meadow.game.player.pos
    meadow.game.world[x - 1, y] = "lava"
    *_, dead, over, info = meadow.step(A["move_left"])
    assert dead
    assert info["behaviour"]["keeps off lava"] == (0, 1)
    assert [info["behaviour"][b] for b in UPKEEP] == [(1, 3), (3, 3), (3, 3)]


def test_each_gulp_and_sapling_is_counted_once():
    env, rng = Crafter(image=False), np.random.default_rng(1)
    env.reset(seed=3)
    seen = Counter()
    for _ in range(8):
        done = False
        while not done:
            *_, dead, over, info = env.step(int(rng.integers(17)))
            done = dead or over
        b, n = info["behaviour"], info["achievements"]
        assert b["drinks before thirst"][1] == n["collect_drink"]
        assert b["plants safely"][1] == n["place_plant"]
        assert all(0 <= h <= m for h, m in b.values())
        assert b["eats in time"][1] == len(env.actions)
        seen.update({k: m for k, (h, m) in b.items()})
        env.reset()
    assert seen["plants safely"]
    assert seen["sleeps safely"]


# ---- score

RANDOM = dict(
    collect_drink=9.322,
    collect_sapling=50.185,
    collect_stone=0.013,
    collect_wood=24.378,
    defeat_skeleton=0.017,
    defeat_zombie=0.138,
    eat_cow=0.376,
    eat_plant=0.007,
    make_wood_pickaxe=0.322,
    make_wood_sword=0.319,
    place_plant=44.615,
    place_stone=0.010,
    place_table=4.362,
    wake_up=93.603,
)
HUMAN = dict(
    zip(ACHIEVEMENTS, (86, 12, 92, 53, 67, 100, 100, 31, 84, 89, 8, 26, 22, 78, 78, 100, 45, 32, 24, 90, 100, 73))
)


def test_score():
    assert C.score(np.zeros(22)) == 0
    assert abs(C.score(np.full(22, 100.0)) - 100) < 1e-9
    r = np.random.default_rng(0).uniform(0, 100, (3, 5, 22))
    assert np.allclose(C.score(r), np.exp(np.log(1 + r).mean(-1)) - 1)
    assert C.score(r).shape == (3, 5)
    with one_line("22 achievements"):
        C.score(np.zeros(21))


def test_published_scores():
    """The published scores, 1.550 and 50.53, are means over five runs; these are scores of the mean rates.

    The logarithm is concave, so a score of mean rates cannot be lower than exp(mean log) over the runs. The gap is
    about (1 + s) / 44 times the sum of (deviation / (1 + rate))^2: under 0.01 for the random policy, whose rates
    deviate by less than 1, and a few points for 20 human episodes a run, whose rare rates deviate by half of
    themselves.
    """

    def rates(d):
        return np.array([d.get(a, 0.0) for a in ACHIEVEMENTS])

    assert 1.54 <= C.score(rates(RANDOM)) <= 1.57
    assert 50.5 <= C.score(rates(HUMAN)) <= 54


def test_rates_and_depth():
    r = C.success_rates([("wake_up",), ("wake_up", "collect_wood"), (), ()])
    assert dict(zip(ACHIEVEMENTS, r))["wake_up"] == 50
    assert r.sum() == 75
    assert C.depth(()) == 0
    assert C.depth(("wake_up",)) == 1
    assert C.depth(ACHIEVEMENTS) == 8 == C.DEPTH["collect_diamond"]
    assert all(C.DEPTH[a] > C.DEPTH[p] for a in ACHIEVEMENTS for p in C.PARENTS[a])
    with one_line("did you mean 'wake_up'"):
        C.success_rates([("wakeup",)])
    with one_line("at least one"):
        C.success_rates([])
