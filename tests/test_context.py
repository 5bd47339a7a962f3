"Tuning context vectors, and tuners that read contexts: against formulas written out plainly, and what they promise."

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from context_toys import ALL, FIELDS, K, S, close, made_up, many, plain_policy, raises, steps
from toys import G, Judge, P, toy

from promptnb.core import Steps, seed_for
from promptnb.data import demos
from promptnb.models.context import ContextDT
from promptnb.tuners import checks
from promptnb.tuners.checks import PROMISES, Trial, actions, demo_error, same, snapshot
from promptnb.tuners.context import (
    TOWARDS,
    Collect,
    ContextVectors,
    Encode,
    Windows,
    advantages,
    components,
    order_of,
    shuffled,
    usual_return,
    weights,
)
from promptnb.tuners.core import make_tuner

# ---- advantages


def plain_usual(h, g, ridge):
    """Least squares of real steps' returns-to-go on (s, s^2, t / 100, 1).

    Mean squared error plus ridge times squared coefficients."""
    on = h.mask[g].numpy() > 0
    s, t, y = h.s[g].numpy()[on], h.t[g].numpy()[on], h.rtg[g, ..., 0].numpy()[on]
    f = np.concatenate([s, s**2, t[:, None] / 100, np.ones((len(s), 1))], 1)
    rows = np.concatenate([f / math.sqrt(len(y)), math.sqrt(ridge) * np.eye(f.shape[1])])
    values = np.concatenate([y / math.sqrt(len(y)), np.zeros(f.shape[1])])
    return np.linalg.lstsq(rows, values, rcond=None)[0]


def plain_advantage(h, coefficients):
    "Of one window: mean over real steps of the return-to-go minus the usual one."
    each = []
    for s, rtg, t, mask in zip(h.s, h.rtg[:, 0], h.t, h.mask):
        if mask:
            each.append(rtg.item() - np.concatenate([s, s**2, [t.item() / 100, 1.0]]) @ coefficients)
    return np.mean(each)


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_usual_return_and_advantages(ridge):
    h = steps(60, K, 0, K - 1).map(lambda x: x.unflatten(0, (2, 30)))
    h = replace(h, t=(h.t + torch.arange(30)[:, None] * 6) * h.mask.long())
    got = usual_return(h, ridge)
    assert got.dtype == torch.float64 and got.shape == (2, 2 * S + 2)
    for g, found in enumerate(advantages(h, got)):
        coefficients = plain_usual(h, g, ridge)
        close(got[g], coefficients, 1e-8)
        want = [plain_advantage(h[g][i], coefficients) for i in range(30)]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("beta, most", [(1.0, 20.0), (0.3, 20.0), (1.0, 2.0)])
def test_advantage_weights(beta, most):
    a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [50.0], [0.01]]) + 0.5
    got = weights(a, beta, most)
    for g in range(3):
        x = a[g].double().numpy()
        w = np.minimum(np.exp(x / x.std(ddof=1) / beta), most)
        close(got[g], w / w.mean(), 1e-5)


def test_weights_of_equal_advantages_are_one():
    assert (weights(torch.full((1, 5), 3.0)) == 1).all()
    assert (weights(torch.tensor([[3.0]])) == 1).all()


def test_weights_of_huge_advantages_are_finite():
    assert torch.isfinite(weights(torch.tensor([[-1e9, 0, 1e9]]))).all()


# ---- windows towards what is wanted


@pytest.fixture(scope="module")
def drawn():
    "(what is drawn towards something, the windows of step 3 as they are, the demonstrations)"
    policy, dem = many()

    def make(**kw):
        return ContextVectors(**kw).draws(policy, dem, 5)

    return make, dem.batch((5, 3)), dem


def first_actions(draws):
    "The first action entry of all windows of 30 steps."
    batches = [draws.batch(t) for t in range(30)]
    return torch.cat([(b[0] if isinstance(b, tuple) else b).a.flatten(0, 2)[:, 0] for b in batches])


def test_return_sees_all_as_they_are(drawn):
    make, h, _ = drawn
    assert same(snapshot(make(towards="return").batch(3)), snapshot(h))
    assert first_actions(make(towards="return")).min() == 0


def test_best_sees_the_best_alone(drawn):
    make, _, _ = drawn
    padding, best = 0.0, {float(np.float32(x)) for x in (0.9, 0.95)}
    assert set(first_actions(make(towards="best", top=0.1)).tolist()) == {padding, *best}
    assert len(set(first_actions(make(towards="best", top=0.5)).tolist())) == 11


def test_advantage_adds_weights_by_what_followed(drawn):
    make, h, dem = drawn
    got, w = make(towards="advantage").batch(3)
    seen = [dem.batch(("usual", 5, i)) for i in range(16)]
    usual = usual_return(Steps(*(torch.cat([getattr(x, n) for x in seen], 1) for n in FIELDS)))
    assert same(snapshot(got), snapshot(h))
    assert torch.equal(w, weights(advantages(h, usual), 1.0))
    assert not torch.equal(w, make(towards="advantage", beta=3.0).batch(3)[1])


def test_the_better_the_trajectory_the_more_it_counts(drawn):
    make, h, _ = drawn
    _, w = make(towards="advantage").batch(3)
    quality = (h.a[..., 0] * h.mask).sum(-1).div(h.mask.sum(-1))  # actions tell the trajectory
    assert np.corrcoef(w.flatten(), quality.flatten())[0, 1] > 0.5


def test_shuffled_has_the_actions_of_other_windows(drawn):
    make, h, _ = drawn
    draws = make(towards="shuffled")
    got = draws.batch(3)
    assert same(snapshot(draws.batch(3)), snapshot(got)) and not torch.equal(draws.batch(4).a, got.a)
    assert all(torch.equal(getattr(got, n), getattr(h, n)) for n in ("s", "rtg", "t", "mask"))
    for a, b in zip(got.a, h.a):
        assert torch.equal(a.flatten(0, 1).sort(0).values, b.flatten(0, 1).sort(0).values)
        assert (a != b).float().mean() > 0.5


def test_shuffled_in_another_order_each_step():
    _, dem = many()
    h = dem.batch(0)
    fixed = SimpleNamespace(batch=lambda t: h)
    a, b = (Windows(fixed, 0, "shuffled", 1.0).batch(t).a for t in (1, 2))
    assert not torch.equal(a, b)
    assert not torch.equal(a, Windows(fixed, 1, "shuffled", 1.0).batch(1).a)


def test_shuffled_keeps_actions_whole_and_padding_in_place():
    a = torch.arange(2 * 6 * 4).view(2, 6, 4, 1).expand(-1, -1, -1, 3).float()
    m = torch.ones(2, 6, 4)
    m[0, :2, 0] = 0
    real = m > 0
    x = shuffled(a, m, order_of((2, 24), 0))
    assert (x == x[..., :1]).all() and (x != a)[real].float().mean() > 0.8
    for g in range(2):
        for k in (real[g], ~real[g]):
            assert set(x[g][k].flatten().tolist()) == set(a[g][k].flatten().tolist())
    assert torch.equal(shuffled(a, m, order_of((2, 24), 0)), x) and not torch.equal(
        shuffled(a, m, order_of((2, 24), 1)), x
    )


@pytest.mark.parametrize("family, quality", [("smax-3m", "good"), ("cheetah-vel", "expert")])
def test_shuffled_actions_are_real(family, quality):
    st = made_up(family, quality, (0,), 4)
    policy = plain_policy(family, encoder="none")
    h = Windows(demos(st, st, policy, n=0, K=20, batch=16, H=1), 0, "shuffled", 1.0).batch(0)
    assert (h.mask == 0).any() and h.a[h.mask > 0].any(-1).all()


def test_prompts_are_drawn_from_the_best():
    _, dem = many()
    best = dem.best(0.1)
    for t in range(5):
        assert (best.draw(t, 8)[0].a > 0.89).all()


# ---- the tuner

SETTINGS = [
    *(dict(towards=t) for t in TOWARDS),
    dict(L=1, towards="return", lr=2e-3),
    *(dict(L=n, towards="return") for n in (10, 20)),
    dict(begin="encoded"),
    dict(begin="encoded", towards="best"),
    dict(begin="encoded", towards="shuffled"),
]
each_setting = pytest.mark.parametrize("kw", SETTINGS, ids=str)


def trial(kw, **toy_kw):
    tuner = ContextVectors(**{**dict(steps=12, lr=1e-2), **kw})
    return Trial(tuner, *toy(**toy_kw, context=tuner.needs_encoder), Judge)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.__name__)
@each_setting
def test_promise(kw, promise):
    "Each setting of it keeps what every tuner promises (test_conformance has its default)."
    promise(trial(kw))


@pytest.mark.parametrize("prompt, T", [(False, 40), (True, P - 1)], ids=["no prompt", "padded prompt"])
@pytest.mark.parametrize("kw", [kw for kw in SETTINGS if "begin" not in kw], ids=str)
def test_zero_steps_are_the_start_of_other_policies(kw, prompt, T):
    checks.starts_where_it_says(trial(kw, prompt=prompt, T=T))


@each_setting
def test_trainable_is_the_size_of_the_vectors(kw):
    "Without steps nothing is trained: a control."
    case = trial(kw)
    assert case.result.trainable == kw.get("L", 5) * 16
    assert case.idle.trainable == 0


def at_start(rng=0, **kw):
    "The policy of a tuner that takes no steps."
    policy, dem = toy(context=True)
    return make_tuner("context", steps=0, **kw).adapt(policy, dem, rng).assignments[0][0]


@pytest.mark.parametrize("n", [1, 4])
def test_random_start(n):
    "Random vectors of the seed, a fiftieth in size, of a length of one's own. All of them count."
    x = at_start(3, L=n)
    close(
        x.prompt_tokens, 0.02 * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(seed_for(3, "vectors")))
    )
    assert (x.prompt_mask == 1).all()
    close(at_start(3, scale=0.5, L=n).prompt_tokens, 25 * x.prompt_tokens)


def test_encoded_start():
    "What the encoder writes for each task's prompt."
    policy, dem = toy(context=True)
    close(at_start(begin="encoded").prompt_tokens, policy.model.prompt_tokens(dem.prompt)[0].detach())


@pytest.mark.parametrize(
    "bad, near",
    [
        (dict(towards="bets"), "did you mean 'best'"),
        (dict(begin="randm"), "did you mean 'random'"),
        (dict(L=0), "L = 0 and top = 0.1"),
        (dict(top=0.0), "top = 0.0"),
        (dict(top=1.5), "top = 1.5"),
        (dict(begin="encoded"), "needs a policy with a context encoder"),
    ],
    ids=str,
)
def test_refused(bad, near):
    with raises(near):
        make_tuner("context", **bad).adapt(*toy(), 0)


# ---- other tuners on a policy with an encoder

OTHERS = dict(
    none={},
    full=dict(steps=12, lr=1e-2),
    lora=dict(steps=12, lr=1e-2),
    adapter=dict(steps=12, lr=1e-2),
    soft=dict(steps=12, lr=1e-2),
    gradient=dict(steps=12, lr=1e-2),
    ranking=dict(steps=6),
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_tuners_on_such_a_policy(name):
    "They begin with the given context, help, and leave the policy alone."
    policy, dem = toy(context=True)
    before, tuner = snapshot(policy), make_tuner(name, **OTHERS[name])
    out = tuner.adapt(policy, dem, 0, Judge())
    assert same(snapshot(policy), before) and torch.isfinite(actions(out.assignments)).all()
    start = [(policy.prompted(dem.prompt, dem.task_ids), g) for g in range(G)]
    a, b = demo_error(start, dem), demo_error(out.assignments, dem)
    assert (b < a).all() if OTHERS[name] else (b == a).all()
    if out.log:
        np.testing.assert_allclose([e["loss"] for e in out.log if e["step"] == 0], a, rtol=1e-5)


def test_full_fine_tuning_counts_what_moves():
    policy, dem = toy(context=True, tasks=(0, 1), **ALL)
    out = make_tuner("full", steps=2).adapt(policy, dem, 0)
    a, b = policy.model.state_dict(), out.assignments[0][0].model.state_dict()
    assert out.trainable == sum(b[k].numel() for k in b if not torch.equal(a[k], b[k]))


# ---- tuners that read contexts


def principal(z, n=3):
    "Coordinates on the n main axes by an eigenvalue decomposition; signs are free."
    z = z - z.mean(0)
    _, vectors = np.linalg.eigh(z.T @ z)
    return z @ vectors[:, ::-1][:, :n]


def embedded(model, dem):
    "Embeddings (4 contexts a task, d) of what `Encode(contexts=4)` draws."
    contexts, _, _ = dem.draw(0, 4, seed="contexts")
    return model.embedding(contexts.map(lambda x: x.flatten(0, 1)))[0].detach()


def test_components():
    x = np.random.default_rng(0).normal(size=(30, 6)) * [9, 5, 2, 0.1, 0.1, 0.1] + 4
    np.testing.assert_allclose(np.abs(components(torch.tensor(x)).numpy()), np.abs(principal(x)), atol=1e-8)
    assert components(torch.tensor(x), 2).shape == (30, 2)


def test_encode_gives_the_context_as_the_prompt():
    policy, dem = toy(context=True)
    out = Encode(contexts=4).adapt(policy, dem, 0)
    assert same(snapshot(out.assignments[0][0].prompt), snapshot(dem.prompt))
    assert [row for _, row in out.assignments] == [0, 1] and out.trainable == out.env_steps == 0


def test_encode_embeds_train_and_test_tasks():
    "On the main axes of all, train tasks first."
    policy, dem = toy(context=True)
    store = dem.sampler.store
    other = replace(dem, sampler=replace(dem.sampler, store=replace(store, task=store.task + 5), prompts=None))
    look = Encode(contexts=4).prepare(policy, [other], 0).adapt(policy, dem, 0).look
    assert look["embedded"].tolist() == [5, 6, 0, 1] and look["unseen"] == 2
    assert look["embedding"].shape == (4, 4, 3)
    z = torch.cat([embedded(policy.model, d) for d in (other, dem)]).double().numpy()
    close(look["embedding"].flatten(0, 1).abs(), np.abs(principal(z)), 1e-4)
    assert (np.diff(look["embedding"].flatten(0, 1).var(0)) < 0).all()


def test_untrained_encoder():
    "Beside it the same contexts as a new model embeds them: the same one each time, whatever the policy has learnt."
    policy, dem = toy(context=True)
    other = policy.clone()
    for p in other.parameters():
        p.data.mul_(2)
    looks = []
    for pi, seed in ((policy, 1), (policy, 2), (other, 1)):
        torch.manual_seed(seed)
        looks.append(Encode(contexts=4).adapt(pi, dem, seed).look)
    a, b, c = looks
    assert a["untrained"].shape == a["embedding"].shape == (2, 4, 3)
    assert torch.equal(a["untrained"], b["untrained"]) and torch.equal(a["untrained"], c["untrained"])
    assert not torch.equal(a["embedding"], c["embedding"])
    torch.manual_seed(seed_for("untrained"))
    new = ContextDT(policy.config).eval()
    close(a["untrained"].flatten(0, 1), components(embedded(new, dem)), 1e-5)


class Place:
    "An environment of episodes of 3 steps: what is seen is marked with task, replica and the number of the call."

    def __init__(self):
        self.env_steps, self.given = 10, []

    def play(self, contexts):
        G, m = contexts.t.shape[:2]
        self.given.append(contexts)
        self.env_steps += G * m * 3
        task, replica, call = torch.arange(G)[:, None], torch.arange(m), len(self.given)
        mark = (10.0 * task + replica + 100 * call)[..., None, None]
        s, rtg = mark.expand(G, m, 3, 3), mark.expand(G, m, 3, 1)
        seen = Steps(s, torch.zeros(G, m, 3, 2), rtg, torch.arange(3).expand(G, m, 3), torch.ones(G, m, 3))
        return (task + replica / m + 10 * call).float(), seen


@pytest.fixture(scope="module")
def collected():
    "(policy, the place, what was collected there in three episodes by two replicas of each of two tasks)"
    policy, dem = toy(context=True)
    place = Place()
    return policy, place, Collect(episodes=3, replicas=2).adapt(policy, dem, 0, place)


def test_collect_begins_with_the_null_prompt(collected):
    policy, place, _ = collected
    first = place.given[0]
    assert not any(getattr(first, n).any() for n in FIELDS)
    assert not policy.model.prompt_tokens(first[:, 0])[0].any()


@pytest.mark.parametrize("episode", [1, 2, 3])
def test_collect_reads_all_that_its_own_replica_has_seen(collected, episode):
    _, place, _ = collected
    calls = torch.cat([torch.full((2, 2, 3), 100.0 * k) for k in range(1, episode + 1)], 2)
    task_and_replica = torch.tensor([[0.0, 1], [10, 11]])[..., None]
    assert torch.equal(place.given[episode].s[..., 0], calls + task_and_replica)


def test_collect_ends_with_the_first_replica(collected):
    _, place, out = collected
    assert torch.equal(out.assignments[0][0].prompt.s, place.given[3].s[:, 0])
    assert [row for _, row in out.assignments] == [0, 1] and out.trainable == 0


def test_collect_counts_steps_and_reports_episodes(collected):
    "Each episode's mean return over replicas is a fact."
    _, place, out = collected
    assert len(place.given) == 4 and out.env_steps == place.env_steps - 10 == 4 * 2 * 2 * 3
    episodes = [(e, g) for e in range(4) for g in range(2)]
    assert [(f["metric"], f["step"], f["task"]) for f in out.facts] == [("episode_return", *x) for x in episodes]
    assert [f["value"] for f in out.facts] == [10 * (e + 1) + g + 0.25 for e, g in episodes]


@pytest.mark.parametrize("score", [None, lambda p: 0], ids=["none", "one that does not play"])
def test_collect_needs_a_score_that_plays(score):
    with raises("needs `score.play`"):
        Collect().adapt(*toy(context=True), 0, score)


@pytest.mark.parametrize("tuner", [Collect(), Encode()], ids=["collect", "encode"])
def test_readers_need_an_encoder(tuner):
    with raises("needs a policy with a context encoder"):
        tuner.adapt(*toy(), 0, Place())


def test_collect_prepares_nothing():
    def untouchable():
        raise AssertionError("the train tasks were read")
        yield

    Collect().prepare(toy(context=True)[0], untouchable(), 0)
