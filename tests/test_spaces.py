"""Data as people have them: each kind of input that went wrong for somebody, with two neighbours; then a fuzz of all.

An outcome is either what was meant, or one line of ours: never a raw exception, never another meaning.
"""

import os
import warnings
from collections import OrderedDict

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces as gs
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st

from promptnb import data, evaluate, tasks
from promptnb.core import PromptnbError
from promptnb.models.dt import DTConfig, Policy
from promptnb.models.lm import LamoPolicy
from promptnb.tasks import spaces
from promptnb.tasks.wrapped import own

CASES = int(os.environ.get("PROMPTNB_FUZZ", 1000))  # of each fuzz; by hand: PROMPTNB_FUZZ=20000
SEED = int(os.environ.get("PROMPTNB_FUZZ_SEED", 20))


class World(gym.Env):
    "Shows and takes what it is told; wants every action to be of its space, and remembers them."

    def __init__(self, observation, action, low=None):
        self.observation_space, self.action_space, self.taken = observation, action, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.taken = []
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.taken.append(action)
        return self.observation_space.sample(), 1.0, False, False, {}


gym.register("World-v0", World, max_episode_steps=3, disable_env_checker=True)
BOX = gs.Box(-np.inf, np.inf, (2,))


def world(observation=BOX, action=None, name="world", **more):
    "A family of that world."
    goal = dict(observation=observation, action=gs.Discrete(2) if action is None else action)
    return own(name, "World-v0", [goal], **more)


def recorded(observation, action, T=3, extra=1):
    "A trajectory as an environment of these spaces gave it: lists of T + 1 observations and T actions."
    observation.seed(0)
    action.seed(0)
    return dict(
        observations=[observation.sample() for _ in range(T + extra)],
        actions=[action.sample() for _ in range(T)],
        rewards=np.arange(T, dtype=float),
    )


def equal(a, b):
    "Are two values of a space the same, to the precision of float32?"
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind in "iub":
        return np.array_equal(a, b)
    scale = max(1.0, float(np.abs(a).max(initial=0)))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-5 * scale)


def played(fam, given):
    "The actions (as the world took them) of a policy that answers with the rows `given` (T, A), and the result."

    class Replay:
        t = -1

        def begin(self, rows):
            return 0

        def act(self, history, state):
            self.t += 1
            return torch.as_tensor(given[self.t]).float()[None]

    Replay.pictures = bool(fam.frames)
    made = []
    make = gym.make
    try:
        gym.make = lambda *a, **kw: made.append(make(*a, **kw)) or made[-1]
        result = evaluate.rollout([evaluate.EvalTask(Replay(), 0)], fam, episodes=1, limit=len(given))
    finally:
        gym.make = make
    return made[0].unwrapped.taken, result


def write_minari(id_, trajectories, observation, action):
    "A Minari dataset in Minari's own folder."
    import minari
    from minari.data_collector import EpisodeBuffer

    def columns(space, steps):
        return gym.vector.utils.concatenate(space, steps, gym.vector.utils.create_empty_array(space, len(steps)))

    episodes = []
    for d in trajectories:
        last = np.arange(len(d["rewards"])) == len(d["rewards"]) - 1
        s, a = columns(observation, d["observations"]), columns(action, d["actions"])
        episodes.append(
            EpisodeBuffer(observations=s, actions=a, rewards=d["rewards"], terminations=last, truncations=last)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            id_, episodes, observation_space=observation, action_space=action, data_format="hdf5", jpeg_encoding=False
        )
    return id_


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


# ---- rows 1 and 2: actions that are not a flat Box between -1 and 1

ACTIONS = {
    "multi-discrete": gs.MultiDiscrete([12, 385, 217]),
    "multi-binary": gs.MultiBinary(4),
    "discrete-from-minus-one": gs.Discrete(3, start=-1),
    "bounds-2": gs.Box(-2, 2, (3,)),
    "bounds-uneven": gs.Box(np.array([0, -5], np.float32), np.array([1, 10], np.float32)),
    "integers": gs.Box(0, 10, (2,), np.int64),
    "bytes": gs.Box(0, 255, (3,), np.uint8),
    "two-by-two": gs.Box(-2, 2, (2, 2)),
    "a-single-number": gs.Box(-3, 3, ()),
    "dict": gs.Dict(turn=gs.Discrete(3), speed=gs.Box(0, 10, (1,))),
    "multi-discrete-grid": gs.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [0, -2]]),
}
each_action = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)


@each_action
def test_recorded_actions_become_numbers_within_one_and_come_back(action):
    "What was recorded is what the environment gets again when a policy answers with the Store's rows."
    fam = world(action=action)
    d = recorded(BOX, action)
    store = data.from_arrays([d], family=fam)
    assert store.a.shape == (3, fam.act_dim) and store.a.abs().max() <= 1
    taken, result = played(fam, store.a)
    assert all(map(equal, d["actions"], taken)) and not result.failed.any()


@each_action
def test_any_answer_of_a_policy_is_an_action(action):
    fam = world(action=action)
    g = np.random.default_rng(0)
    for scale in (0, 0.3, 100):
        taken, result = played(fam, scale * g.normal(size=(3, fam.act_dim)))
        assert len(taken) == 3 and not result.failed.any()


@each_action
def test_minari_actions_follow_their_space(action, minari_home):
    "A dataset's own spaces say what its numbers mean, with a family and without."
    trajectories = [recorded(BOX, action), recorded(BOX, action, T=1)]
    id_ = write_minari("inputs/any-v0", trajectories, BOX, action)
    wanted = data.from_arrays(trajectories, family=world(action=action))
    for family in (None, "world"):
        got = data.from_minari(id_, family=family)
        assert got.s.equal(wanted.s) and got.a.sort().values.equal(wanted.a.sort().values)
    assert got.a.equal(wanted.a)  # without a family, parts of a dict are in the order of the file


def test_a_minari_dataset_of_other_actions_is_refused(minari_home, refused):
    d = recorded(BOX, gs.Box(-2, 2, (1,)))
    id_ = write_minari("inputs/two-v0", [d], BOX, gs.Box(-2, 2, (1,)))
    world(action=gs.Box(-1, 1, (1,)))
    refused(data.from_minari, id_, family="world", says=[id_, "Box(-2.0, 2.0", "world in Box(-1.0, 1.0"])


def test_minari_actions_without_bounds_must_lie_within_one(minari_home, refused):
    unbounded = gs.Box(-np.inf, np.inf, (1,))
    small, large = recorded(BOX, unbounded), recorded(BOX, unbounded)
    small["actions"] = [np.float32([0.5])] * 3
    large["actions"] = [np.float32([5])] * 3
    assert (data.from_minari(write_minari("inputs/small-v0", [small], BOX, unbounded)).a == 0.5).all()
    id_ = write_minari("inputs/large-v0", [large], BOX, unbounded)
    refused(data.from_minari, id_, says=["trajectory 0", "step 0", "no bounds to scale by"])


OUTSIDE = {
    "box": (gs.Box(-2, 2, (1,)), [[1], [2.5], [0]], "step 1 lies outside Box(-2.0, 2.0"),
    "choice": (gs.Discrete(3), [0, 3, 1], "is 3 at step 1: wanted whole numbers from 0 to 2"),
    "half-a-choice": (gs.Discrete(3), [0, 1.5, 1], "is 1.5 at step 1: wanted whole numbers from 0 to 2"),
    "scores": (gs.Discrete(3), np.full((3, 3), 0.3), "is (3, 3): wanted (T, 1)"),
    "bits": (gs.MultiBinary(1), [[0], [1], [2]], "is 2 at step 2: wanted whole numbers from 0 to 1"),
    "levels": (gs.MultiDiscrete([2, 3]), [[0, 0], [1, 2], [2, 2]], "is 2 at step 2: wanted whole numbers from 0 to 1"),
}


@pytest.mark.parametrize("action, values, says", OUTSIDE.values(), ids=OUTSIDE)
def test_actions_outside_their_space_are_refused(action, values, says, refused):
    d = dict(observations=np.zeros((3, 2)), actions=values, rewards=np.zeros(3))
    refused(data.from_arrays, [d], family=world(action=action), says=["trajectory 0: ", says])


def test_one_hot_choices_are_taken_too():
    fam, choices = world(action=gs.Discrete(3, start=5)), [5, 7, 6]
    d = dict(observations=np.zeros((3, 2)), actions=choices, rewards=np.zeros(3))
    one_hot = dict(d, actions=np.eye(3)[[0, 2, 1]])
    assert torch.equal(data.from_arrays([d], family=fam).a, data.from_arrays([one_hot], family=fam).a)


def test_actions_between_minus_one_and_one_keep_every_bit():
    a = np.random.default_rng(0).uniform(-1, 1, (99, 2)).astype(np.float32)
    d = dict(observations=np.zeros((99, 2)), actions=a, rewards=np.zeros(99))
    assert np.array_equal(data.from_arrays([d], family=world(action=gs.Box(-1, 1, (2,)))).a, a)


# ---- row 3: spaces of which no family can be made

NO_FAMILY = {
    "unbounded": (BOX, gs.Box(-np.inf, np.inf, (1,)), "entry 0 is between -inf and inf and needs a finite"),
    "half-bounded": (BOX, gs.Box(0, np.inf, (1,)), "entry 0 is between 0 and inf and needs a finite"),
    "constant": (BOX, gs.Box(np.float32([0, 1]), np.float32([1, 1])), "entry 1 is between 1 and 1 and cannot vary"),
    "constant-inside": (BOX, gs.Dict(a=gs.Tuple([gs.Box(1, 1, (1,))])), "actions['a'][0]: entry 0"),
    "too-wide": (BOX, gs.Box(-1e308, 1e308, (1,), np.float64), "needs a finite"),
    "too-many-integers": (BOX, gs.Box(0, 2**40, (1,), np.int64), "more than 8,388,608 integers"),
    "too-many-choices": (BOX, gs.Discrete(10**12), "would be 1,000,000,000,000 numbers"),
    "text": (gs.Text(5), gs.Discrete(2), "observations is a Text"),
    "sequence-inside": (
        gs.Dict(seen=gs.Sequence(gs.Discrete(3))),
        gs.Discrete(2),
        "observations['seen'] is a Sequence",
    ),
    "graph": (BOX, gs.Graph(gs.Discrete(2), None), "actions is a Graph"),
    "one-of": (BOX, gs.OneOf([gs.Discrete(2), gs.Box(0, 1)]), "actions is a OneOf"),
    "nothing": (gs.Box(0, 1, (0,)), gs.Discrete(2), "would be 0 numbers"),
    "no-parts": (gs.Tuple([gs.Dict(), gs.Discrete(2)]), gs.Discrete(2), "observations[0] is a Dict without parts"),
    "color": (gs.Box(0, 255, (96, 96, 3), np.uint8), gs.Discrete(2), "wanted the newest four gray ones"),
    "pictures-and-torques": (gs.Box(0, 255, (4, 84, 84), np.uint8), gs.Box(-1, 1, (2,)), "go with Discrete actions"),
}


@pytest.mark.parametrize("observation, action, says", NO_FAMILY.values(), ids=NO_FAMILY)
def test_a_space_that_no_policy_can_have_is_one_line_of_own(observation, action, says, refused):
    refused(world, observation, action, says=["World-v0", says])


def test_an_environment_that_cannot_be_made_is_one_line_of_own(refused):
    refused(own, "x", "Wrold-v0", says=["Wrold", "NameNotFound"])
    refused(own, "x", "World-v0", [dict(gaol=1)], says=["World-v0", "gaol=1", "TypeError"])
    refused(own, "x", "nowhere:World-v0", says=["nowhere"])


def test_a_task_with_other_spaces_than_the_first_is_refused(refused):
    goals = [dict(observation=BOX, action=gs.Box(-h, h, (1,))) for h in (1, 2)]
    fam = own("world", "World-v0", goals, (0, 1), (0,))
    refused(tasks.lock_step, fam, [0, 1], says=["task 1 of world acts in Box(-2.0"])
    goals = [dict(observation=gs.Box(0, 1, (n,)), action=gs.Discrete(2)) for n in (2, 3)]
    fam = own("world", "World-v0", goals, (0, 1), (0,))
    refused(tasks.lock_step, fam, [1], says=["task 1 of world observes 3 numbers, the first one 2"])


def test_an_action_outside_the_space_would_fail_the_episode():
    "The worlds here refuse what is not of their space: the tests of actions above rest on that."
    fam = world(action=gs.Box(-2, 2, (1,)))
    env = gym.make(fam.body, **fam.goals[0])
    env.reset(seed=0)
    with pytest.raises(AssertionError, match="is not in Box"):
        env.step(np.float32([3]))
    _, result = played(fam, np.full((2, 1), np.nan))
    assert result.failed.all()


# ---- row 4: a state number that hardly varies in the data


def store_of_states(s):
    return data.from_arrays([dict(observations=s, actions=np.zeros((len(s), 1)), rewards=np.zeros(len(s)))])


@pytest.mark.parametrize("value", [0.0, 0.3, -1e5], ids=str)
def test_a_constant_number_is_seen_as_it_is(value):
    "At play it may be 0.01 off: that reaches the policy as 0.01, not as 10,000."
    s = np.stack([np.arange(50.0), np.full(50, value)], 1)
    mean, std = data.state_stats(store_of_states(s))
    off = (torch.tensor([0.0, value + 0.01]) - mean) / std
    assert off[1].abs() < 0.05 and std[0] > 10


def test_numbers_that_vary_keep_their_scale_to_the_bit():
    s = np.random.default_rng(0).normal(size=(500, 3)) * [1e-3, 1, 1e4]
    store = store_of_states(s)
    x = store.s.double()
    wanted = (x - x.mean(0)).square().mean(0).sqrt().float() + 1e-6
    assert torch.equal(data.state_stats(store)[1], wanted)


def test_clipping_is_a_setting_of_the_model():
    "With clip_states, a state beyond it acts like one at it, in training, prompts and play; without, nothing changes."
    torch.manual_seed(0)
    sizes = dict(state_dim=2, act_dim=1, width=16, layers=1)
    clips = Policy(dict(sizes, clip_states=5.0)).eval()
    free = Policy(sizes).eval()
    free.load_state_dict(clips.state_dict())

    def window(x):
        table = data.Table(store_of_states(np.full((4, 2), x)), 0.0, 1.0, 1.0)
        return table.windows(torch.tensor([0]), 4)

    prompt = lambda p, x: p.with_prompt(window(x)).begin([0])  # noqa: E731
    at, beyond = window(5.0), window(5000.0)
    assert torch.equal(clips.act(at, prompt(clips, 5.0)), clips.act(beyond, prompt(clips, 5000.0)))
    assert torch.equal(clips.act(at, prompt(clips, 5.0)), free.act(at, prompt(free, 5.0)))
    assert not torch.equal(free.act(at, prompt(free, 5.0)), free.act(beyond, prompt(free, 5000.0)))


# ---- row 5: nested observations

NESTED = {
    "dict": gs.Dict(place=gs.Box(-9, 9, (2, 2)), goal=gs.Box(-9, 9, (2,))),
    "ordered": gs.Dict(OrderedDict(z=gs.Box(-9, 9, (1,)), a=gs.Discrete(3))),
    "nested": gs.Dict(a=gs.Tuple([gs.Discrete(2), gs.Dict(b=gs.MultiBinary(2), c=gs.Box(0, 9, (), int))])),
    "choice": gs.Discrete(5, start=2),
    "tuple": gs.Tuple([gs.Discrete(32), gs.Discrete(11), gs.Discrete(2)]),
    "grid": gs.Box(0, 9, (3, 3), np.uint8),
    "levels": gs.MultiDiscrete([2, 3]),
}
each_observation = pytest.mark.parametrize("observation", NESTED.values(), ids=NESTED)


@each_observation
def test_nested_observations_are_what_gymnasium_flattens(observation):
    d = recorded(observation, gs.Discrete(2))
    fam = world(observation)
    store = data.from_arrays([d], family=fam)
    wanted = np.stack([gs.flatten(observation, x) for x in d["observations"][:3]])
    assert np.array_equal(store.s, wanted.astype(np.float32)) and fam.state_dim == wanted.shape[1]
    vec = tasks.lock_step(fam, [0])
    seen, _ = vec.reset(seed=7)
    observation.seed(7)
    assert np.array_equal(seen[0], gs.flatten(observation, observation.sample()).astype(np.float32))


@each_observation
def test_nested_observations_in_minari(observation, minari_home):
    "Read by the dataset's own space; with a family in the family's order; and written back as they were."
    d = recorded(observation, gs.Discrete(2), extra=1)
    id_ = write_minari("inputs/nested-v0", [d], observation, gs.Discrete(2))
    fam = world(observation)
    wanted = data.from_arrays([d], family=fam)
    got = data.from_minari(id_, family=fam)
    assert torch.equal(got.s, wanted.s) and sorted(data.from_minari(id_).s[0].flatten()) == sorted(wanted.s[0])
    (again,) = got.to_minari("inputs/again-v0", family=fam)
    assert torch.equal(data.from_minari(again, family=fam).s, wanted.s)


def test_a_dict_of_arrays_needs_no_family():
    "Its arrays lie end to end, by key, as Gymnasium sorts a dict's keys; a list of dicts likewise."
    d = dict(b=np.arange(3.0), a=np.arange(6.0).reshape(3, 2))
    as_steps = [dict(b=d["b"][t], a=d["a"][t]) for t in range(3)]
    for observations in (d, as_steps):
        trajectory = dict(observations=observations, actions=np.zeros((3, 1)), rewards=np.zeros(3))
        assert data.from_arrays([trajectory]).s.tolist() == [[0, 1, 0], [2, 3, 1], [4, 5, 2]]


@pytest.mark.parametrize("container", [tuple, lambda x: np.array(x, object)], ids=["tuple", "objects"])
def test_steps_that_are_dicts_may_lie_in_any_row(container):
    "As a file of pickled steps gives them: an array of objects."
    d = recorded(NESTED["dict"], gs.Discrete(2))
    fam = world(NESTED["dict"])
    wanted = data.from_arrays([d], family=fam)
    given = dict(d, observations=container(d["observations"]))
    assert torch.equal(data.from_arrays([given], family=fam).s, wanted.s)
    unnamed = dict(given, actions=np.zeros((3, 1)))
    assert torch.equal(data.from_arrays([unnamed]).s, data.from_arrays([dict(d, actions=np.zeros((3, 1)))]).s)


def test_a_dict_that_does_not_fit_is_refused_by_key(refused):
    fam = world(NESTED["dict"])
    d = recorded(NESTED["dict"], gs.Discrete(2))
    lacks = dict(d, observations=[dict(place=x["place"]) for x in d["observations"]])
    refused(data.from_arrays, [lacks], family=fam, says=["trajectory 0", "entries place: wanted entries place, goal"])
    more = dict(d, observations=[dict(x, speed=1) for x in d["observations"]])
    refused(data.from_arrays, [more], family=fam, says=["trajectory 0", "wanted entries place, goal"])
    other = dict(d, observations=[dict(x, goal=np.zeros(3)) for x in d["observations"]])
    refused(data.from_arrays, [other], family=fam, says=["'observations' for world['goal'] is (4, 3): wanted (T, 2)"])
    ragged = dict(d, observations=dict(place=np.zeros((3, 2, 2)), goal=np.zeros((4, 2))))
    refused(data.from_arrays, [ragged], family=fam, says=["parts of unequal length: 3, 4 steps"])


# ---- row 6: containers

PLAIN = dict(observations=np.ones((3, 2)), actions=np.ones((3, 1)), rewards=np.ones(3))


def episode_data(**more):
    from minari import EpisodeData

    ends = np.zeros(3, bool)
    return EpisodeData(**(dict(id=0, **PLAIN, terminations=ends, truncations=ends, infos={}) | more))


TAKEN = {
    "tensors": lambda: [{k: torch.tensor(v) for k, v in PLAIN.items()}],
    "tensors-with-gradients": lambda: [{k: torch.tensor(v, requires_grad=True) for k, v in PLAIN.items()}],
    "bfloat16": lambda: [{k: torch.tensor(v, dtype=torch.bfloat16) for k, v in PLAIN.items()}],
    "list-of-tensors": lambda: [dict(PLAIN, actions=list(torch.ones(3, 1, requires_grad=True)))],
    "generator": lambda: (d for d in [PLAIN]),
    "tuple": lambda: (PLAIN,),
    "lists": lambda: [{k: v.tolist() for k, v in PLAIN.items()}],
    "episode-data": lambda: [episode_data()],
    "whole-mask": lambda: [dict(PLAIN, rewards=np.ma.masked_array(np.ones(3)))],
    "read-only": lambda: [{k: np.broadcast_to(v[:1], v.shape) for k, v in PLAIN.items()}],
    "backwards": lambda: [{k: v[::-1] for k, v in PLAIN.items()}],
    "big-endian": lambda: [{k: v.astype(">f8") for k, v in PLAIN.items()}],
}


@pytest.mark.parametrize("given", TAKEN.values(), ids=TAKEN)
def test_containers_with_a_plain_meaning_are_taken(given):
    store = data.from_arrays(given())
    assert len(store) == 1 and (store.s == 1).all() and (store.a == 1).all() and store.rtg.tolist() == [3, 2, 1]
    assert not store.a.requires_grad


REFUSED = {
    "none": (None, "wanted a list of dicts, not None"),
    "number": (7, "wanted a list of dicts, not 7"),
    "one-dict": (PLAIN, "wanted a list of dicts"),
    "empty-generator": ((d for d in []), "no trajectories"),
    "text": ("data.npz", "wanted a list of dicts"),
    "none-inside": ([None], "trajectory 0 is a NoneType: wanted a dict"),
    "arrays": ([np.ones((3, 2))], "trajectory 0 is a ndarray: wanted a dict"),
    "no-rewards": ([dict(PLAIN, rewards=None)], "trajectory 0: 'rewards' is None"),
    "masked": ([dict(PLAIN, rewards=np.ma.masked_less(np.arange(3), 1))], "masked array with masked entries"),
    "complex": ([dict(PLAIN, rewards=np.ones(3) * 1j)], "not numbers"),
    "dates": ([dict(PLAIN, rewards=np.array(["2020-01-01"] * 3, "M8[D]"))], "not numbers"),
    "too-large": ([dict(PLAIN, rewards=np.full(3, 1e300))], "'rewards' has NaN or infinity at step 0"),
    "too-large-a-return": ([dict(PLAIN, rewards=np.full(3, 3e38))], "a return is too large"),
    "sparse": ([dict(PLAIN, actions=torch.ones(3, 1).to_sparse())], "trajectory 0: 'actions'"),
    "meta": ([dict(PLAIN, rewards=torch.ones(3, device="meta"))], "trajectory 0: 'rewards'"),
    "legal-is-nan": ([dict(PLAIN, legal=np.full((3, 1), np.nan))], "'legal' has other values than 0 and 1"),
    "legal-is-a-score": ([dict(PLAIN, legal=np.full((3, 1), 0.3))], "'legal' has other values than 0 and 1"),
    "ragged-tensors": ([dict(PLAIN, actions=[torch.ones(1), torch.ones(2), torch.ones(1)])], "unequal length"),
    "dict-of-actions": ([dict(PLAIN, actions=dict(a=np.ones((3, 1))))], "trajectory 0: 'actions'"),
}


@pytest.mark.parametrize("given, says", REFUSED.values(), ids=REFUSED)
def test_containers_without_one_are_one_line(given, says, refused):
    refused(data.from_arrays, given, says=[says])


def test_a_minari_dataset_itself_is_shown_the_way(minari_home, refused):
    import minari

    id_ = write_minari("inputs/plain-v0", [recorded(BOX, gs.Discrete(2))], BOX, gs.Discrete(2))
    refused(data.from_arrays, minari.load_dataset(id_), says=["from_minari(its id)"])


def test_task_ids_may_come_one_by_one(refused):
    assert data.from_arrays([PLAIN, PLAIN], (i for i in (3, 1))).task.tolist() == [1, 3]
    refused(data.from_arrays, [PLAIN], 0, says=["1 trajectories, but not a list of task ids"])


@pytest.mark.parametrize("ids", [None, [], 5, [None], BOX, ["a/b-v0", 3]], ids=str)
def test_ids_of_minari_that_are_no_texts(ids, refused):
    refused(data.from_minari, ids, says=["Minari ids are texts"])
    refused(flat_store("plain").to_minari, ids, says=["Minari ids are texts"])


def test_what_is_asked_of_minari_is_checked(minari_home, refused):
    import minari

    id_ = write_minari("inputs/two-v0", [recorded(BOX, gs.Discrete(2))] * 2, BOX, gs.Discrete(2))
    assert len(data.from_minari(id_, episodes=1)) == 1 and data.from_minari(id_, iter([4])).task_ids == (4,)
    for episodes in (0, -1, 1.5, "all"):
        refused(data.from_minari, id_, episodes=episodes, says=["episodes is", "at least 1"])
    refused(data.from_minari, id_, task_ids=[0, 1], says=["1 Minari datasets, but 2 task ids"])
    refused(data.from_minari, id_, task_ids=0, says=["not a list of task ids"])
    refused(data.from_minari, minari.load_dataset(id_), says=["give its id"])


@pytest.mark.parametrize("id_", ["walker", "a/b", "../../out-v0", "/out-v0", "a b-v0", ""])
def test_an_id_that_minari_would_not_read_leaves_nothing(id_, minari_home, refused):
    refused(flat_store("plain").to_minari, ["out/first-v0", id_], says=[f"'{id_}' is no id", "with its version"])
    assert not list(minari_home.iterdir()) and not list(minari_home.parent.glob("out*"))


def test_stacked_pictures_give_their_newest_frame(refused):
    fam = world(gs.Box(0, 255, (4, 40, 40), np.uint8), gs.Discrete(2))
    frames = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 40, 40), np.uint8)
    stacks = np.stack([frames[np.maximum(np.arange(t - 3, t + 1), 0)] for t in range(5)])
    rest = dict(actions=[0, 1, 0, 1, 1], rewards=np.ones(5))
    single = data.from_arrays([dict(observations=frames, **rest)], family=fam)
    assert torch.equal(single.s, data.from_arrays([dict(observations=stacks, **rest)], family=fam).s)
    assert np.array_equal(data.Table(single, 0, 1, 1.0).windows(torch.tensor([0]), 5).s[0], stacks)
    shuffled = dict(observations=stacks[::-1], **rest)
    refused(data.from_arrays, [shuffled], family=fam, says=["trajectory 0", "frames do not follow one another"])
    _, result = played(fam, np.eye(2)[[0, 1, 0]])
    assert not result.failed.any()


class Speaking(World):
    "Says at its last step, and not before, whether it went well."

    def step(self, action):
        obs, reward, *over, info = super().step(action)
        return obs, reward, *over, info if len(self.taken) < 3 else dict(success=True)


gym.register("Speaking-v0", Speaking, max_episode_steps=3, disable_env_checker=True)


def test_success_is_reported_only_by_those_who_speak_of_it():
    silent = world()
    speaking = own("speaking", "Speaking-v0", silent.goals)
    choices = np.eye(2)[[0, 1, 0]]
    assert played(silent, choices)[1].success is None
    assert played(speaking, choices)[1].success.tolist() == [[True]]
    assert played(speaking, choices[:2])[1].success is None


# ---- row 7: sizes that do not fit each other

SIZES = {
    "heads": (lambda: Policy(dict(state_dim=2, act_dim=1, width=128, heads=3)), "128 is not a multiple of 3 heads"),
    "no-heads": (lambda: DTConfig(2, 1, heads=0), "heads is 0"),
    "half-a-layer": (lambda: DTConfig(2, 1, layers=1.5), "layers is 1.5"),
    "no-state": (lambda: DTConfig(0, 1), "state_dim is 0"),
    "no-window": (lambda: Policy(dict(state_dim=2, act_dim=1), K=0), "K is 0"),
    "no-scale": (lambda: Policy(dict(state_dim=2, act_dim=1), rtg_scale=0.0), "rtg_scale is 0.0"),
    "negative-clip": (lambda: DTConfig(2, 1, clip_states=-1.0), "clip_states is -1.0"),
    "lm-heads": (
        lambda: LamoPolicy(dict(state_dim=2, act_dim=1, width=64, heads=3)),
        "64 is not a multiple of 3 heads",
    ),
    "lm-positions": (
        lambda: LamoPolicy(dict(LM, use_positions=True), K=400),
        "1024 positions, but windows of K=400 steps are 1200 tokens: use K=341",
    ),
    "lm-no-window": (lambda: LamoPolicy(LM, K=0), "K is 0"),
}
LM = dict(state_dim=2, act_dim=1, layers=1, heads=2, width=16, vocab=50)


@pytest.mark.parametrize("make, says", SIZES.values(), ids=SIZES)
def test_sizes_that_do_not_fit_are_one_line_at_once(make, says, refused):
    refused(make, says=[says])


def test_the_longest_window_of_a_trunk_plays():
    policy = LamoPolicy(dict(LM, use_positions=True), K=341)
    window = data.Table(store_of_states(np.ones((341, 2))), 0.0, 1.0, 1.0).windows(torch.tensor([0]), 341)
    policy.begin([0])
    assert policy.act(window).isfinite().all()


# ---- a Store as Minari datasets, and back


def same_store(a, b):
    return a.columns.keys() == b.columns.keys() and all(torch.equal(x, b.columns[k]) for k, x in a.columns.items())


def flat_store(kind):
    g, trajectories = np.random.default_rng(0), []
    for T in (1, 3, 2, 4):
        d = dict(observations=g.normal(size=(T, 3)), actions=g.uniform(-1, 1, (T, 2)), rewards=g.normal(size=T))
        if kind == "pictures":
            d["observations"] = g.integers(0, 256, (T, 5, 6), np.uint8)
        if kind in ("choices", "legal"):
            d["actions"] = np.eye(4)[g.integers(0, 4, T)]
        if kind == "legal":
            d["legal"] = g.random((T, 4)) < 0.5
        trajectories.append(d)
    return data.from_arrays(trajectories, [5, 2, 2, 5])


@pytest.mark.parametrize("kind", ["plain", "pictures", "choices", "legal"])
def test_what_is_written_is_read_back(kind, minari_home):
    store = flat_store(kind)
    ids = store.to_minari(["out/two-v0", "out/five-v0"])
    assert same_store(data.from_minari(ids, [2, 5]), store)
    assert not list(minari_home.glob(".new*"))


@each_action
def test_what_is_written_in_the_environments_spaces_is_read_back(action, minari_home):
    import minari

    fam = world(action=action)
    store = data.from_arrays([recorded(BOX, action)], family=fam)
    (id_,) = store.to_minari("out/own-v0", family=fam)
    back = data.from_minari(id_, family=fam)
    assert torch.equal(back.s, store.s) and torch.allclose(back.a, store.a, atol=1e-6)
    assert minari.load_dataset(id_).action_space == action


def test_the_environment_is_recovered_from_what_was_written(minari_home):
    import minari

    fam = own("pendulum", "Pendulum-v1", (dict(g=9.81), dict(g=3.7)), train=(0, 1), test=(1,))
    d = dict(observations=np.zeros((3, 3)), actions=np.full((3, 1), 1.5), rewards=np.zeros(3))
    ids = data.from_arrays([d, d], [0, 1], family=fam).to_minari(["out/earth-v0", "out/mars-v0"], family=fam)
    dataset = minari.load_dataset(ids[1])
    assert dataset.recover_environment().unwrapped.g == 3.7
    assert np.allclose(dataset[0].actions, 1.5)


def test_nothing_is_written_that_should_not_be(minari_home, refused):
    store = flat_store("plain")
    refused(store.to_minari, ["out/a-v0"], says=["1 ids, but 2 tasks: 2, 5"])
    refused(store.to_minari, ["bad name", "out/b-v0"], says=["bad name"])
    refused(store.to_minari, ["out/a-v0", "out/b-v0"], family="hopper", says=["hopper"])
    assert not [f for f in minari_home.rglob("*") if f.is_file()]


# ---- the fuzz

DTYPES = ("f4", "f8", "f2", "i8", "i2", "u1", "u4", "i1")
TEXT, SEQUENCE = gs.Text(4), gs.Sequence(gs.Discrete(2))
GRAPH, ONE_OF = gs.Graph(gs.Box(0, 1, (2,)), None), gs.OneOf([gs.Discrete(2)])


def box(numbers):
    "A Box of any type and shape; one in four has infinite or equal bounds."
    g = np.random.default_rng(numbers)
    shape = tuple(g.integers(1, 4, g.integers(0, 3)))
    dtype = np.dtype(g.choice(DTYPES))
    low, wide = g.choice([0, 1, 2, 7, 100], shape), g.choice([1, 3, 20], shape)
    if dtype.kind != "u":
        low = low - g.choice([0, 2, 100], shape)
    low = low.astype(float)
    high = low + wide
    if g.random() < 0.25:
        high = np.where(g.random(shape) < 0.5, low if dtype.kind != "f" else g.choice([low, np.inf + low]), high)
        low = np.where((g.random(shape) < 0.3) & (dtype.kind == "f"), -np.inf, low)
    if g.random() < 0.1:
        shape = (0,)
        low, high = np.zeros(0), np.ones(0)
    return gs.Box(low.astype(dtype), high.astype(dtype), shape, dtype)


def leaf(numbers):
    "A space that is not nested; one in twenty is of no use."
    g = np.random.default_rng(numbers)
    sizes = g.integers(1, 5, g.integers(1, 4))
    kinds = [
        lambda: gs.Discrete(int(g.integers(1, 7)), start=int(g.integers(-3, 4))),
        lambda: gs.MultiDiscrete(sizes, start=sizes - 3),
        lambda: gs.MultiDiscrete([sizes, sizes[::-1]]),
        lambda: gs.MultiBinary(int(sizes[0])),
        lambda: gs.MultiBinary([int(n) for n in sizes]),
    ]
    if g.random() < 0.05:
        return (TEXT, SEQUENCE, GRAPH, ONE_OF, gs.Discrete(10**9), gs.Dict(), gs.Tuple([]))[g.integers(7)]
    return box(numbers) if g.random() < 0.4 else kinds[g.integers(len(kinds))]()


LEAVES = st.integers(0, 2**32).map(leaf)
KEYS = st.sampled_from(["b", "a", "goal", "état", "1", " "])


def containers(inner):
    some = st.lists(st.tuples(KEYS, inner), min_size=1, max_size=3)
    return (
        some.map(lambda x: gs.Dict(dict(x)))
        | some.map(lambda x: gs.Dict(OrderedDict(x)))
        | st.lists(inner, min_size=1, max_size=2).map(gs.Tuple)
    )


SPACES = st.recursive(LEAVES, containers, max_leaves=4)
fuzz = settings(
    max_examples=CASES, derandomize=CASES == 1000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@seed(SEED)
@fuzz
@given(SPACES, SPACES, st.integers(1, 3))
def test_fuzz_of_spaces(observation, action, T):
    "A family that plays what was recorded, or one line of ours."
    try:
        fam = world(observation, action, name="fuzz")
    except PromptnbError as e:
        assert "\n" not in str(e) and "World-v0" in str(e)
        return event("refused")
    event("a family")
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's samples of float16
        d = recorded(observation, action, T)
    store = data.from_arrays([d], family=fam)
    assert store.a.abs().max() <= 1 + 1e-5
    if not fam.frames:
        wanted = np.stack([gs.flatten(observation, x) for x in d["observations"][:T]]).astype(np.float32)
        assert np.array_equal(store.s, wanted)
        assert all(map(equal, d["observations"], nested_steps(observation, store.s.numpy())))
    taken, result = played(fam, store.a)
    assert not result.failed.any() and all(map(equal, d["actions"], taken))


def nested_steps(space, rows):
    "Flat rows as values of the space, one a step."
    columns = spaces.unflat_steps(space, rows)
    return list(gym.vector.utils.iterate(gym.vector.utils.batch_space(space, len(rows)), columns))


NO_ARRAYS = (None, "x", 3.0, object(), [], [[1], [1, 2]], {}, [None], {"a": 1}, np.array(["x"]))


def any_array(g, shape):
    "An array of usually this shape, of any type and in any container, with NaN, infinity or padding; or none."
    if g.random() < 0.1:
        return NO_ARRAYS[g.integers(len(NO_ARRAYS))]
    if g.random() < 0.3:
        shape = tuple(g.integers(0, 4, g.integers(1, 4)))
    kind = g.choice(
        ["f4", "f8", "f2", "i8", "u1", "?", ">f8", "c8", "O", "U1"], p=[0.2, 0.2, *[0.1] * 4, 0.05, *[0.05] * 3]
    )
    if kind in ("O", "U1"):
        return np.full(shape, "1", kind)
    x = g.choice([0, 1] if kind in ("u1", "?") else [0, 1, -1, 7], shape).astype(kind)
    if np.dtype(kind).kind == "f":
        x += g.choice([0.5, 0.25], shape).astype(kind)
        if g.random() < 0.2:
            x[len(x) // 2 :] = g.choice([np.nan, np.inf, 0])  # padding
    how = g.choice(["array", "list", "tensor", "gradient", "masked", "rows"])
    if how in ("list", "rows"):
        return x.tolist() if how == "list" else list(x)
    if how == "masked":
        return np.ma.masked_invalid(x) if x.dtype.kind == "f" else np.ma.masked_array(x)
    if how in ("tensor", "gradient") and kind in ("f4", "f8", "f2"):
        return torch.tensor(x, requires_grad=bool(how == "gradient"))
    return x


def trajectories(numbers):
    "0 to 3 trajectories of 0 to 3 steps; in one of them, something may be different."
    g = np.random.default_rng(numbers)
    S, A, out = g.integers(1, 4), g.integers(1, 3), []
    for _ in range(g.choice(4, p=[0.05, 0.35, 0.3, 0.3])):
        T = g.choice(4, p=[0.02, 0.3, 0.38, 0.3])
        d = dict(
            observations=g.normal(size=(T + g.integers(2), S)),
            actions=g.uniform(-1, 1, (T, A)),
            rewards=g.normal(size=T),
        )
        if g.random() < 0.4:
            name = g.choice([*d, "legal"])
            d[name] = any_array(g, (T, A) if name == "legal" else d[name].shape)
        if g.random() < 0.03:
            d.pop(g.choice(["observations", "actions", "rewards"]), None)
        out.append(d)
    ids = None if g.random() < 0.5 else g.integers(-1, 3, len(out) + (g.random() < 0.05)).tolist()
    return out, ids


def numbers(x):
    "What an array means, as float32."
    x = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    return x.astype(np.float32)


@seed(SEED)
@fuzz
@given(st.integers(0, 2**32), st.sampled_from([list, tuple, iter]))
def test_fuzz_of_arrays(numbers_of, container):
    "A Store that holds exactly these numbers in order of task, or one line of ours."
    kept, ids = trajectories(numbers_of)
    try:
        store = data.from_arrays(container(kept), ids)
    except PromptnbError as e:
        assert "\n" not in str(e) and ("trajector" in str(e) or "task ids" in str(e) or "return" in str(e)), e
        return event("refused")
    event("a Store")
    order = np.argsort(np.zeros(len(kept), int) if ids is None else ids, kind="stable")
    assert len(store) == len(kept) and all(x.isfinite().all() for x in (store.s, store.a, store.r, store.rtg))
    for at, i in enumerate(order):
        rows = slice(int(store.first[at]), int(store.first[at] + store.length[at]))
        T = rows.stop - rows.start
        assert np.array_equal(store.a[rows], numbers(kept[i]["actions"])) and T == len(kept[i]["rewards"])
        assert np.array_equal(store.s[rows], numbers(kept[i]["observations"])[:T])
        assert np.array_equal(store.r[rows], numbers(kept[i]["rewards"]))


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(state_dim=3, act_dim=2, hedas=2), ("hedas", "did you mean 'heads'")),
        (dict(state_dim=3), ("needs act_dim",)),
        (dict(state_dims=3, act_dim=2), ("state_dims", "state_dim")),
        (dict(state_dim=3, act_dim=2, dropout=1.5), ("dropout is 1.5", "below 1")),
    ],
)
def test_a_misspelt_or_missing_setting_of_a_model_is_one_line(given, says, refused):
    from promptnb.models.dt import Policy
    from promptnb.models.lm import LamoPolicy

    for kind in (Policy, LamoPolicy):
        refused(kind, given, says=says)
