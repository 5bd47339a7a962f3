"Which tasks, trajectories and agents the contexts, prompts and windows of the Contextual Meta Transformer come from."

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from context_toys import FIELDS, L, close, made_up, many, plain_policy, raises, recipe, steps

from promptnb import data, evaluate, tasks
from promptnb import recipes as rc
from promptnb.core import Row
from promptnb.data import Sampler, in_order
from promptnb.evaluate import EvalTask, groups_of, rollout
from promptnb.experiments import multitask
from promptnb.experiments.run import Run
from promptnb.models.context import transitions
from promptnb.tuners.checks import same, snapshot

VEL = "cheetah-vel"


@pytest.fixture
def asked(monkeypatch):
    "Made-up data in place of collected ones; what was asked for, as (quality, task ids)."
    out = []

    def stored(family, quality, ids, episodes):
        out.append((quality, tuple(ids)))
        return made_up(family, quality, tuple(ids), episodes)

    monkeypatch.setattr(multitask, "stored", stored)
    return out


# ---- batches


@pytest.mark.parametrize("n", [None, 2, 3])
def test_batch_task(n):
    "Which of the sampler's tasks each row, and its context, is of; tasks that are not drawn are not there."
    ids = (3, 8, 20, 21)
    st = made_up(VEL, "expert", ids, 3)
    s = Sampler(st, torch.zeros(20), torch.ones(20), 1.0, 4, 5, n, 2, 3, "random", in_order(st, st.task))
    seen = set()
    for t in range(20):
        b = s.batch(t)
        assert b.task.dtype == torch.int64 and len(b.task) == 5 * (n or 4) and (b.history.mask > 0).any(1).all()
        assert set(Counter(b.task.tolist()).values()) == {5}
        for x in (b.history, b.prompt):
            assert torch.equal(x.s[..., 0], torch.tensor(ids)[b.task].float()[:, None] * x.mask)
        seen.update(b.task.tolist())
    assert seen == set(range(4))


def test_train_tasks_in_any_order():
    st = data.join([made_up(VEL, "expert", (i,), 2) for i in (7, 3)], None, mapped=False)
    s = Sampler(st, torch.zeros(20), torch.ones(20), 1.0, 4, 4, H=0)
    b = s.batch(0)
    assert torch.equal(b.history.s[..., 0].amax(1), s.ids[b.task].float())


@pytest.mark.parametrize("share, n", [(0.1, 2), (0.25, 5), (1.0, 20), (0.01, 1)])
def test_the_best_of_each_task(share, n):
    _, dem = many()
    st, best = dem.sampler.store, dem.best(share)
    got = best.sampler.store
    assert Counter(got.task.tolist()) == {3: n, 8: n} and best.task_ids == [3, 8]
    assert same(snapshot(best.prompt), snapshot(dem.prompt))
    for i in (3, 8):
        assert sorted(got.returns[got.task == i].tolist()) == sorted(st.returns[st.task == i].tolist())[-n:]
    for t in range(5):
        h = best.batch(t)
        assert torch.equal(h.s[..., 0], torch.tensor([3.0, 8])[:, None, None] * h.mask)


def test_in_order():
    "Trajectories of a new task stand together, in the order they had."
    st = many()[1].sampler.store
    new = in_order(st, torch.arange(40) % 4)
    assert new.task.tolist() == [k for k in range(4) for _ in range(10)]
    for k in range(4):
        own = [slice(st.first[i], st.first[i] + st.length[i]) for i in range(k, 40, 4)]
        assert torch.equal(torch.cat([st.s[at] for at in own]), new.s[300 * k : 300 * (k + 1)])
        assert torch.equal(new.rtg[new.first[new.task == k]], st.returns[k::4])


# ---- agents


def test_by_agent():
    "Each agent of a game is a task of its own, and games stay whole."
    st = made_up("smax-3m", "good", (0,), 4)
    of = multitask.by_agent(st, tasks.family("smax-3m"))
    assert of.task_ids == (0, 1, 2) and len(of) == 12 and of.s.shape == st.s.shape
    assert all((of.s[of.first[i] : of.first[i] + 12, 3] == of.task[i]).all() for i in range(12))
    assert [of.s[of.first[i], 2].item() for i in range(12)] == [0, 1, 2, 3] * 3


def test_prompts_and_windows_of_an_agent_are_its_own(asked):
    r = recipe("agent-good", "smax-3m")
    p, t = replace(r.pretrain, episodes=4), replace(r.tune, demos=0)
    dem = multitask.prompts_for(plain_policy("smax-3m", encoder="none"), p, t, 0)
    assert dem.task_ids == [0, 1, 2] and asked == [("good", (0,))]
    agents = torch.arange(3)
    for d in (dem, dem.best(0.25)):
        for x in (d.batch(0), d.batch(1)):
            assert (x.s[..., 3] == agents[:, None, None] * x.mask).all()
    assert set(dem.best(0.25).batch(0).s[..., 2].unique().tolist()) == {0.0, 3.0}
    assert (dem.prompt.s[..., 3] == agents[:, None] * dem.prompt.mask).all()


def test_by_agent_needs_one_game_of_several_agents():
    two_tasks = replace(made_up("smax-3m", "good", (0,), 4), task=torch.arange(12) // 6)
    for store, family in ((made_up(VEL, "expert", (3,), 2), VEL), (two_tasks, "smax-3m")):
        with raises("prompts for each agent need one task with several agents"):
            multitask.by_agent(store, tasks.family(family))


# ---- environments that tell what was done


class World:
    "Stands in for a family's environments: row i is rewarded i + t, and ends after its own number of steps."

    made = []

    def __init__(self, fam, ids, ends=None, **kw):
        self.fam, self.ids, self.n = fam, ids, len(ids)
        self.num_envs = self.n
        self.end = np.array(ends or [fam.horizon] * self.n)
        self.acts, self.seeds = [], None
        World.made.append(self)

    def obs(self):
        "The first three entries of a state: row, step and task."
        o = np.zeros((self.n, self.fam.state_dim), np.float32)
        o[:, 0], o[:, 1], o[:, 2] = np.arange(self.n), self.t, self.ids
        return o

    def reset(self, seed):
        self.t, self.seeds = 0, seed
        return self.obs(), {}

    def step(self, a):
        r = np.arange(self.n) + self.t + 0.5
        self.acts.append(a)
        self.t += 1
        return self.obs(), r, self.t >= self.end, np.zeros(self.n, bool), {}

    def close(self):
        pass


@pytest.fixture
def world(monkeypatch):
    "world(horizon, ends): environments of that length; returns those that are made."

    def start(horizon, ends=None, family=VEL):
        World.made = []
        monkeypatch.setitem(tasks.FAMILIES, family, replace(tasks.family(family), horizon=horizon))
        monkeypatch.setattr(tasks, "lock_step", lambda fam, ids, **kw: World(fam, ids, ends))
        return World.made

    return start


class Stub:
    "A policy that acts by its prompt's row."

    K = 1

    def begin(self, rows):
        self.rows = list(map(int, rows))
        return torch.tensor(self.rows)

    def act(self, window, rows):
        return torch.nn.functional.one_hot(rows, tasks.family("smax-3m").act_dim).float()


def test_a_row_for_each_agent(world):
    "In every episode agent k has prompt row k; a task with one row gives it to all agents."
    made = world(3, family="smax-3m")
    policy, other = Stub(), Stub()
    eval_tasks = [EvalTask(policy, 0, (0, 1, 2)), EvalTask(other, 0, 1), EvalTask(policy, 0, (2, 0, 1))]
    played = rollout(eval_tasks, "smax-3m", 4)
    assert policy.rows == [0, 1, 2] * 4 + [2, 0, 1] * 4 and other.rows == [1] * 12
    assert played.returns.shape == (3, 4)
    a = made[0].acts[0].argmax(-1).reshape(3, 4, 3)
    assert (a[0] == [0, 1, 2]).all() and (a[1] == 1).all() and (a[2] == [2, 0, 1]).all()


def test_agents_of_a_game_share_its_seed(world):
    made = world(3, family="smax-3m")
    rollout([EvalTask(Stub(), 0, (0, 1, 2)), EvalTask(Stub(), 0, 1), EvalTask(Stub(), 0, (2, 0, 1))], "smax-3m", 4)
    seeds = made[0].seeds
    assert all(len(set(seeds[i : i + 3])) == 1 for i in range(0, 36, 3))
    assert seeds[:12] == seeds[12:24]  # of all three the same four games


def test_groups_of_rows():
    policy = Stub()
    ((_, rows, prompt),) = groups_of([EvalTask(policy, 0, (5, 6)), EvalTask(policy, 0, 3)], 4)
    assert rows.tolist() == list(range(8)) and prompt.tolist() == [5, 6, 5, 6, 3, 3, 3, 3]


# ---- contexts and prompts of a recipe


@pytest.mark.parametrize("key", ["cmt", "cmt-middle-all"])
def test_contexts_are_of_the_train_tasks_alone(asked, key):
    "Of all the qualities, and of no test task; the middle goals' policy sees the middle goals alone."
    fam, p = tasks.family(VEL), recipe(key).pretrain
    middle = tuple(i for i in range(10, 30) if i not in fam.test)
    ids = fam.train if key == "cmt" else middle
    every = multitask.context_store(p)
    assert asked == [(q, ids) for q in ("expert", "medium", "random")]
    assert every.task_ids == ids and set(ids).isdisjoint(fam.test)
    assert len(every) == 3 * p.episodes * len(ids) and len(every.hashes) == 3
    assert all(every.s[every.first, 0] == every.task) and every.task.tolist() == sorted(every.task.tolist())
    for i in ids:
        assert set(every.s[every.first[every.task == i], 1].tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("key", ["cmt", "cmt-middle-all"])
def test_training_and_normalisation_are_of_the_train_tasks_alone(asked, key):
    p = recipe(key).pretrain
    ids = multitask.train_tasks(p)
    trained = multitask.train_data(p)
    assert asked == [("expert", ids)] and trained.store.task_ids == ids
    assert trained.stats[0][0] == pytest.approx(np.mean(ids)) and len(trained.hashes) == 1


@pytest.mark.parametrize("key, family", [("none-medium", "hopper"), ("pdt", VEL)])
def test_no_contexts_where_no_encoder_reads_them(asked, key, family):
    assert multitask.context_store(recipe(key, family).pretrain) is None


@pytest.fixture
def prompts_from(asked):
    "Prompts and demonstrations of the main recipe, with the prompts from somewhere."
    p, tune, policy = recipe("cmt").pretrain, rc.Tune(demos=2, demo_batch=4), plain_policy()

    def get(where, **kw):
        return multitask.prompts_for(policy, p, replace(tune, prompt_from=where, **kw), 0)

    return get


TEST = tasks.family(VEL).test
TEST_IDS = torch.tensor(TEST).float()[:, None]


def test_a_prompt_of_the_task_itself(prompts_from):
    own = prompts_from("test").prompt
    assert own.t.shape == (5, 28)  # 4 segments of 6 steps, an empty step after each
    assert (own.s[..., 0] == TEST_IDS * own.mask).all()


def test_a_prompt_of_another_task(prompts_from):
    own, other = prompts_from("test").prompt, prompts_from("other").prompt
    of = other.s[..., 0].amax(1)
    assert sorted(of.tolist()) == sorted(TEST) and (of[:, None] != TEST_IDS).all()
    assert same(snapshot(other), snapshot(own[[3, 4, 0, 1, 2]]))


def test_an_empty_prompt(prompts_from):
    none = prompts_from("none").prompt
    assert none.t.shape == (5, 28) and not any(getattr(none, n).any() for n in FIELDS)


def test_a_prompt_of_a_train_task(prompts_from):
    ids = prompts_from("train").prompt.s[..., 0].amax(1).tolist()
    assert set(ids) <= set(tasks.family(VEL).train)


@pytest.mark.parametrize("where", ["test", "other", "none", "train"])
def test_demonstrations_are_always_of_the_task_itself(prompts_from, where):
    x = prompts_from(where).batch(0)
    assert (x.s[..., 0] == TEST_IDS[..., None] * x.mask).all()


def test_all_tasks_have_prompts(prompts_from):
    every = prompts_from("test", play="all", demos=1, demo_batch=1)
    assert every.task_ids == list(range(40))
    assert (every.prompt.s[..., 0] == torch.arange(40.0)[:, None] * every.prompt.mask).all()


def test_misspelt_choices_of_prompts(prompts_from):
    with raises("unknown prompt_from 'othr': did you mean 'other'"):
        prompts_from("othr")
    with raises("unknown play 'al': did you mean 'all'"):
        prompts_from("test", play="al")


def test_another_context_of_one_task():
    with raises("another"):
        multitask.of_others(steps(1, 4))


def test_all_tasks_are_played(asked, world):
    made, r, policy = world(3), recipe("cmt-all"), plain_policy()
    dem = multitask.prompts_for(policy, r.pretrain, r.tune, 0)
    p = policy.prompted(dem.prompt, dem.task_ids)
    at, played = multitask.evaluate_policy(Run(r, "smoke"), [(p, g) for g in range(40)], range(40), 2, 0)
    assert [x.task for x in at] == [x.row for x in at] == list(range(40))
    assert played.returns.shape == (40, 2) and made[0].ids.tolist() == np.repeat(range(40), 2).tolist()


# ---- playing with contexts

ENDS = [3, 8, 1, 5, 8, 2, 8, 8, 6, 4]  # of the episodes of 5 tasks with 2 contexts each


@pytest.fixture
def play(world):
    "(policy, contexts, the score that plays, environments that are made)"
    made = world(8, ENDS)
    policy = plain_policy(L=L).eval()
    policy.mean.fill_(1.0)
    policy.std.fill_(2.0)
    c = steps(10, 6, 0, 2, torch.float32).map(lambda x: x.unflatten(0, (5, 2)))
    c = replace(c, s=torch.randn(5, 2, 6, 20), a=torch.randn(5, 2, 6, 6))
    return policy, c, multitask.EnvScore(Run(recipe("collect"), "smoke"), policy), made


def test_what_is_seen_ends_with_the_episode(play):
    _, c, score, _ = play
    _, seen = score.play(c)
    assert seen.t.shape == (5, 2, 8) and seen.s.shape == (5, 2, 8, 20)
    assert torch.equal(seen.mask.sum(-1).flatten().long(), torch.tensor(ENDS))
    assert (seen.mask.diff(dim=-1) <= 0).all() and (seen.t == torch.arange(8)).all()
    for rtg, n in zip(seen.rtg.flatten(0, 1), ENDS):
        assert not rtg[n:].any()


def test_what_is_seen_has_the_rewards_of_the_episode(play):
    _, c, score, _ = play
    returns, seen = score.play(c)
    scale = tasks.family(VEL).rtg_scale
    flat = seen.map(lambda x: x.flatten(0, 1))
    x, real = transitions(flat, scale)
    assert real.sum(1).tolist() == [n - 1 for n in ENDS]
    for i, n in enumerate(ENDS):
        rewards = [i + t + 0.5 for t in range(n)]
        close(x[i, : n - 1, 20 + 6], rewards[: n - 1], 1e-4)
        close(flat.rtg[i, 0, 0] * scale, sum(rewards), 1e-4)
        assert returns.flatten()[i] == pytest.approx(sum(rewards))


def test_what_is_seen_has_states_as_the_policy_reads_them(play):
    _, c, score, made = play
    _, seen = score.play(c)
    flat = seen.map(lambda x: x.flatten(0, 1))
    for i, n in enumerate(ENDS):
        row, t, task = (flat.s[i, :n, k] * 2 + 1 for k in range(3))
        close(row, torch.full((n,), float(i)))
        close(t, torch.arange(n).double())
        assert (task == TEST[i // 2]).all()
        close(flat.a[i, :n], np.stack([a[i] for a in made[0].acts[:n]]))


def test_the_policy_acts_on_its_own_context(play):
    policy, c, score, made = play
    _, seen = score.play(c)
    prompted = policy.with_prompt(c.map(lambda x: x.flatten(0, 1)))
    window = evaluate.Buffers(10, 8, 4, 20, 6, tasks.family(VEL).target_return, "cpu")
    first = np.stack([made[0].obs()[:, 0], np.zeros(10), np.repeat(TEST, 2), *np.zeros((17, 10))], 1)
    window.observe(0, first.astype(np.float32))
    close(seen.a.flatten(0, 1)[:, 0], prompted.act(window.window(0), prompted.begin(range(10))), 1e-5)


def test_each_step_is_paid_for_and_each_episode_starts_apart(play):
    "Replicas of a task start apart; so does the next call."
    _, c, score, made = play
    score.play(c)
    assert score.env_steps == sum(ENDS) and len(set(made[0].seeds)) == 10
    score.play(c)
    assert score.env_steps == 2 * sum(ENDS) and made[1].seeds != made[0].seeds


def test_scores_where_due():
    "The normalised return, or the share of games won, out of 100; nothing where neither is there."

    def row(task, metric, value):
        return Row("cmt", task, 0, "m", 0, "smoke", 0, metric, value, 1, 0, 0, "r")

    scored = [row("hopper", "return", 3234.3), row("smax-3m", "success", 0.25)]
    others = [
        row("hopper", "length", 9),
        row("smax-3m", "return", 1.0),
        row(VEL, "return", -5.0),
        row("ml1-reach", "success", 1.0),
        row(VEL, "length", 200),
    ]
    got = [(g.task, g.metric, round(g.value, 6)) for g in multitask.score_rows(scored + others)]
    assert got == [("hopper", "score", 100.0), ("smax-3m", "score", 25.0)]
