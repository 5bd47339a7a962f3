"Episodes whose policy steps are a graph, a call in its place: the returns are those of steps launched one by one."

import dataclasses

import numpy as np
import pytest
import torch
from test_capture import learner, watching, without_autocast
from test_gpu import by_calls
from test_lm import policy as language_policy
from toys import A, S, toy

from promptnb import captured, evaluate, tasks
from promptnb.evaluate import EvalTask, rollout

MAZE = tasks.Family("maze", "maze", "", (0, 1, 2), (0,), (1, 2), S, A, horizon=30, target_return=5.0)
GAME = dataclasses.replace(MAZE, name="game", discrete=True, act_dim=3, agents=2)


class Maze:
    "An environment whose states follow from seeds and actions; a row ends after 10 to 29 steps."

    order = []  # of what happens, with the first row's task

    def __init__(self, fam, task_rows, threads=None):
        self.fam, self.tasks, self.num_envs = fam, task_rows, len(task_rows)

    @property
    def legal(self):
        if not self.fam.discrete:
            return None
        return np.roll(np.array([True, True, False]), self.at) & np.ones((self.num_envs, 1), bool)

    def reset(self, seed):
        g = [np.random.default_rng(s) for s in seed]
        self.s = np.array([x.normal(size=self.fam.state_dim) for x in g])
        self.ends = np.array([x.integers(10, 30) for x in g])
        self.at = 0
        return self.s.astype(np.float32), {}

    def step(self, a):
        Maze.order.append(("step", int(self.tasks[0])))
        self.at += 1
        self.s = 0.9 * self.s + 0.3 * a.sum(1, keepdims=True) + self.tasks[:, None] / 10
        r = (self.s[:, 0] - (a * self.s[:, : a.shape[1]]).sum(1)).astype(float)
        over = self.at >= self.ends
        return self.s.astype(np.float32), r, over, np.zeros_like(over), {"success": over & (r > 0)}

    def close(self):
        pass


@pytest.fixture
def maze(monkeypatch):
    monkeypatch.setattr(tasks, "lock_step", lambda fam, rows, **kw: Maze(fam, rows, **kw))
    Maze.order.clear()
    evaluate.say_unrecorded.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    "The processor has graphs too."
    monkeypatch.setitem(captured.GRAPHS, "cpu", by_calls)


def prompted(**kw):
    policy, demos = toy(**kw)
    return policy.prompted(demos.prompt, demos.task_ids)


POLICIES = {
    "Prompt-DT": prompted,
    "context": lambda: prompted(context=True),
    "no prompt": lambda: toy(prompt=False)[0],
    "lamo": lambda: language_policy(state_dim=S, act_dim=A),
    "bc": lambda: learner("bc")[0],
    "iql": lambda: learner("iql")[0],
}
SCORES = {"choices": lambda: prompted(discrete=True), "bcq": lambda: learner("bcq")[0]}


def play(policy, fam=MAZE, **kw):
    "Two tasks with a prompt each, three episodes, all steps kept."
    if fam.discrete and hasattr(policy, "prompt_a"):
        policy.prompt_a = torch.nn.functional.one_hot(policy.prompt_a.argmax(-1), 3).float()
    return rollout([EvalTask(policy, 1, 0), EvalTask(policy, 2, 1)], fam, 3, keep=True, **kw)


def same(a, b):
    "Are two results equal, up to where each row ended?"
    assert np.array_equal(a.lengths, b.lengths) and np.array_equal(a.failed, b.failed) and a.why == b.why
    np.testing.assert_allclose(a.returns, b.returns, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(a.success, b.success)
    live = np.arange(a.trace["r"].shape[1]) < a.lengths.repeat(len(a.trace["r"]) // a.lengths.size)[:, None]
    for name in ("a", "r"):
        np.testing.assert_allclose(a.trace[name][live], b.trace[name][live], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(a.trace["tasks"], b.trace["tasks"])


@pytest.mark.parametrize("name", POLICIES)
def test_recorded_episodes_are_those_of_steps_launched_one_by_one(name, maze, monkeypatch, capsys):
    policy = POLICIES[name]()
    wanted = play(policy)
    monkeypatch.setitem(captured.GRAPHS, "cpu", by_calls)
    same(play(policy), wanted)
    assert "launched" not in capsys.readouterr().out


@pytest.mark.parametrize("name", SCORES)
def test_choices_are_legal_ones_in_recorded_episodes_too(name, maze, monkeypatch):
    policy = SCORES[name]()
    if name == "choices":
        policy = prompted(discrete=True)
        policy.model.head = torch.nn.Linear(16, 3)
        policy.model.embed.a = policy.model.embed_prompt.a = torch.nn.Linear(3, 16)
        policy.prompt_a = torch.zeros(*policy.prompt_a.shape[:2], 3)
    wanted = play(policy, GAME)
    monkeypatch.setitem(captured.GRAPHS, "cpu", by_calls)
    recorded = play(policy, GAME)
    same(recorded, wanted)
    taken = recorded.trace["a"][:, :10].argmax(-1)
    for t in range(10):
        assert not (taken[:, t] == (2 + t) % 3).any()


@pytest.mark.parametrize("where", ["launched", "recorded"])
def test_a_policy_sees_as_many_steps_beside_one_that_reads_more(where, maze, monkeypatch):
    if where == "recorded":
        monkeypatch.setitem(captured.GRAPHS, "cpu", by_calls)
    short, long = prompted(), prompted()
    short.K = 2
    alone = rollout([EvalTask(short, 1)], MAZE, 4)
    beside = rollout([EvalTask(short, 1), EvalTask(long, 1)] * 2, MAZE, 4)  # each of two halves has both
    np.testing.assert_allclose(beside.returns[0], alone.returns[0], rtol=1e-5)
    assert not np.allclose(beside.returns[1], alone.returns[0], rtol=1e-3), "the longer history changes nothing"


def test_one_half_computes_while_the_other_steps(maze, graphs, monkeypatch):
    launch = evaluate.Recorded.launch

    def noted(self, t, obs, alive):
        Maze.order.append(("launch", int(self.vec.tasks[0])))
        launch(self, t, obs, alive)

    monkeypatch.setattr(evaluate.Recorded, "launch", noted)
    play(prompted())
    a, b = 1, 2  # the halves are the two tasks
    first = [("launch", a), ("launch", b), ("step", a), ("launch", a), ("step", b), ("launch", b), ("step", a)]
    assert Maze.order[: len(first)] == first


@pytest.mark.parametrize("episodes, agents, sizes", [(1, 1, [1]), (5, 1, [2, 3]), (3, 2, [2, 4])])
def test_halves_are_of_whole_episodes(episodes, agents, sizes):
    fam = dataclasses.replace(MAZE, agents=agents)
    n = episodes * agents
    (group,) = evaluate.groups_of([EvalTask("policy", 1)], n)
    share = evaluate.Share(fam, [group], np.full(n, 1), np.arange(n, dtype=object), list(range(n)), 30)
    parts = evaluate.halves(share)
    assert [len(p.task_rows) for p in parts] == sizes
    assert [int(x) for p in parts for x in p.target] == [*range(n)] == [x for p in parts for x in p.seeds]
    assert all(p.groups[0].rows.tolist() == [*range(len(p.task_rows))] for p in parts)


class Nowhere:
    K = 1

    def __init__(self, value=0.1):
        self.value = value

    def begin(self, rows):
        return None

    def act(self, history, state):
        return torch.full((len(history), A), self.value)


class Somewhere(Nowhere):
    unrecorded = ""


def test_nan_of_one_policy_marks_its_own_rows_in_recorded_episodes(maze, graphs):
    good, bad = EvalTask(Somewhere(), 1), EvalTask(Somewhere(float("nan")), 2)
    out = rollout([good, bad, good], MAZE, 2)
    assert out.failed.all(1).tolist() == [False, True, False] and out.why == "the policy gave NaN"
    assert np.array_equal(out.returns[0], rollout([good], MAZE, 2).returns[0])


def test_a_policy_that_says_nothing_of_its_act_is_launched_and_that_is_said_once(maze, graphs, capsys):
    for _ in range(2):
        rollout([EvalTask(Nowhere(), 1)], MAZE, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert "launched one by one" in line and "Nowhere does not say" in line


def test_a_recording_that_fails_leaves_no_trace(maze, monkeypatch, capsys):
    policy = prompted()
    wanted = play(policy)

    def fails(step):
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setitem(captured.GRAPHS, "cpu", fails)
    same(play(policy), wanted)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "operation not permitted" in said


def test_short_episodes_are_not_worth_a_recording(maze, graphs, monkeypatch):
    monkeypatch.setattr(evaluate, "Recorded", lambda *a: pytest.fail("recorded"))
    play(prompted(), limit=evaluate.LEAST_STEPS - 1)


@pytest.mark.parametrize("name", [*POLICIES, "bcq"])
def test_a_policy_neither_looks_at_values_nor_brings_any(name, monkeypatch):
    without_autocast(monkeypatch)
    policy = {**POLICIES, **SCORES}[name]().to("meta")
    steps = evaluate.Buffers(4, 30, getattr(policy, "K", 1), S, A if name != "bcq" else 3, 1.0, "meta")
    state = policy.prefix() if hasattr(policy, "model") and policy.config.prompt else None
    state = state and type(state)([(k[:1], v[:1]) for k, v in state.kv], state.mask[:1])
    with torch.no_grad(), watching():
        assert policy.act(steps.window(3), state).shape[0] == 4
    assert policy.unrecorded == ""
