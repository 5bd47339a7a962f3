"The value learners: each loss against its formula, who gets a gradient, target copies, resuming, what they learn."

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from promptnb import data
from promptnb.core import PromptnbError, Steps
from promptnb.models import value as V
from promptnb.train import FitConfig, fit

FRAMES = (4, 36, 36)
S, A, B = 3, 2, 16
CONTINUOUS, DISCRETE = (
    [n for n, c in V.LEARNERS.items() if not c.discrete],
    [n for n, c in V.LEARNERS.items() if c.discrete],
)
COPIES = [n for n, c in V.LEARNERS.items() if c.copies]


def new(name, frames=(), seed=0, **kw):
    "A small learner whose target copies differ from their sources and whose biases are not zero."
    torch.manual_seed(seed)
    m = V.make_learner(name, S, A, frames, **dict(dict(hidden=8) | (dict(features=8) if frames else {}), **kw))
    for n, p in m.named_parameters():
        if n.endswith(("bias", "log_std", "log_temp")) or "_target" in n or "q.nets" in n:
            p.data.add_(0.2 * torch.randn_like(p))
    return m


def batch(discrete=False, frames=(), seed=1, n=B):
    g = torch.Generator().manual_seed(seed)

    def s():
        return (
            torch.randint(0, 256, (n, *frames), generator=g, dtype=torch.uint8)
            if frames
            else torch.randn(n, S, generator=g)
        )

    a = (
        F.one_hot(torch.randint(0, A, (n,), generator=g), A).float()
        if discrete
        else torch.rand(n, A, generator=g) * 1.8 - 0.9
    )
    return V.TransitionBatch(s(), a, torch.randn(n, generator=g), s(), (torch.rand(n, generator=g) < 0.3).float())


def of(m):
    return batch(m.discrete)


def history(s):
    n = len(s)
    return Steps(
        s[:, None], torch.zeros(n, 1, A), torch.zeros(n, 1, 1), torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1)
    )


def close(a, b):
    a, b = (float(torch.as_tensor(x).detach()) for x in (a, b))
    assert abs(a - b) < 1e-6 * max(1, abs(b)), (a, b)


# ---- the formulas, written out row by row


def lin(x, m):
    return m.weight @ x + m.bias


def net(m, x):
    "An MLP of ReLU applied to one vector."
    *inner, last = [k for k in m.modules() if isinstance(k, torch.nn.Linear)]
    for k in inner:
        x = lin(x, k).clamp(min=0)
    return lin(x, last)


def q_of(twin, s, a):
    return [net(k, torch.cat([s, a]))[0] for k in twin.nets]


def rows(b):
    return list(zip(b.s, b.a, b.r, b.s2, b.done))


def mean(xs):
    return sum(xs) / len(xs)


def bc(m, b):
    return dict(actor=mean([((net(m.actor, s).tanh() - a) ** 2).mean() for s, a, *_ in rows(b)]))


def td3(m, b):
    e = (0.2 * torch.randn(B, A)).clamp(-0.5, 0.5)
    critic = 0
    for (s, a, r, s2, d), n in zip(rows(b), e):
        y = r + 0.99 * (1 - d) * min(q_of(m.q_target, s2, (net(m.actor_target, s2).tanh() + n).clamp(-1, 1)))
        critic += sum((q - y) ** 2 for q in q_of(m.q, s, a)) / B
    pi = [net(m.actor, s).tanh() for s in b.s]
    q = [q_of(m.q, s, a)[0] for s, a in zip(b.s, pi)]
    return dict(
        critic=critic,
        actor=-2.5 * mean(q) / mean([abs(x) for x in q]) + mean([((p - a) ** 2).mean() for p, a in zip(pi, b.a)]),
    )


def squashed(m, s, e):
    "One action and its log-density from a draw e (A,) of the unit Gaussian."
    mu, log_std = net(m.actor.net, s).chunk(2)
    log_std = (m.actor.scale * log_std + m.actor.offset).clamp(-20, 2)
    a = (mu + log_std.exp() * e).tanh()
    return a, (-(e**2) / 2 - log_std - math.log(2 * math.pi) / 2 - torch.log(1 - a**2)).sum()


def cql(m, b):
    n = m.n_actions
    e2 = torch.randn(B, A)
    uniform = torch.empty(B, n, A).uniform_(-1, 1)
    at, at2, e = torch.randn(B, n, A), torch.randn(B, n, A), torch.randn(B, A)
    critic = gap = actor = temp = 0
    for i, (s, a, r, s2, d) in enumerate(rows(b)):
        next_a, next_p = squashed(m, s2, e2[i])
        y = r + 0.99 * (1 - d) * (
            min(q_of(m.q_target, s2, next_a)) - (m.log_temp.exp() * next_p if m.backup_entropy else 0)
        )
        others = (
            [(u, torch.tensor(A * math.log(0.5))) for u in uniform[i]]
            + [squashed(m, s, x) for x in at[i]]
            + [squashed(m, s2, x) for x in at2[i]]
        )
        for k, q in enumerate(q_of(m.q, s, a)):
            values = torch.stack(
                [q_of(m.q, s, x)[k] - (p if m.importance else 0) for x, p in others] + ([] if m.importance else [q])
            ).double()
            critic += (q - y) ** 2 / B
            gap += (m.temperature * torch.log(torch.exp(values / m.temperature).sum()) - q) / B
        mine, p = squashed(m, s, e[i])
        actor += (m.log_temp.exp() * p - min(q_of(m.q, s, mine))) / B
        temp += -m.log_temp * (p - A) / B
    return dict(critic=critic, conservative=m.alpha * gap, actor=actor, temperature=temp)


def iql(m, b):
    value = critic = actor = 0
    for s, a, r, s2, d in rows(b):
        u = min(q_of(m.q_target, s, a)) - net(m.v, s)[0]
        y = r + 0.99 * (1 - d) * net(m.v, s2)[0]
        mu = net(m.actor, s).tanh()
        copy_ = (
            ((mu - a) ** 2).sum()
            if m.deterministic
            else -torch.distributions.Normal(mu, m.log_std.exp()).log_prob(a).sum()
        )
        value += (0.7 if u > 0 else 0.3) * u**2 / B
        critic += mean([(q - y) ** 2 for q in q_of(m.q, s, a)]) / B
        actor += min(math.exp(3 * u.item()), 100) * copy_ / B
    return dict(value=value, critic=critic, actor=actor)


def huber(x):
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


def logits(z, a, beta):
    return -mean([torch.log(torch.exp(x)[k] / torch.exp(x).sum()) for x, k in zip(z, a.argmax(-1))]) + beta * mean(
        [x**2 for x in z.flatten()]
    )


def discrete(m, b):
    name, k = type(m).__name__, b.a.argmax(-1)
    if name == "DiscreteBC":
        return dict(actor=logits(torch.stack([net(m.actor, s) for s in b.s]), b.a, 0.5))
    q, critic = [net(m.q, s) for s in b.s], 0

    def imitator(s):
        return lin(net(m.q[:-1], s).clamp(min=0), m.imitator)

    for i, (_, _, r, s2, d) in enumerate(rows(b)):
        q2 = net(m.q, s2)
        if name == "NFQ":
            v = max(q2)
        else:
            p = torch.softmax(imitator(s2), 0) if name == "BCQ" else torch.ones(A)
            best = max((x.item(), j) for j, x in enumerate(q2) if p[j] > 0.3 * max(p))[1]
            v = net(m.q_target, s2)[best]
        critic += huber(q[i][k[i]] - (r + 0.99 * (1 - d) * v)) / B
    out = dict(critic=critic)
    if name == "DiscreteCQL":
        out["conservative"] = 4 * mean([torch.log(torch.exp(x).sum()) - x[j] for x, j in zip(q, k)])
    if name == "BCQ":
        out["imitator"] = logits(torch.stack([imitator(s) for s in b.s]), b.a, 0.01)
    return out


FORMULAS = {"bc": bc, "td3+bc": td3, "cql": cql, "iql": iql}
CASES = [(n, {}) for n in V.LEARNERS] + [
    ("cql", dict(importance=False, temperature=2.0, backup_entropy=True, n_actions=3)),
    ("iql", dict(deterministic=True)),
]


@pytest.mark.parametrize("name, kw", CASES)
def test_losses_are_the_formulas(name, kw):
    m = new(name, **kw).double().eval()
    b = V.TransitionBatch(*(x.double() for x in vars(of(m)).values()))
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(5)
        got = m.losses(b)
        torch.manual_seed(5)
        want = FORMULAS.get(name, discrete)(m, b)
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(got) == set(want)
    for k in want:
        close(got[k], want[k])
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    try:
        close(m.loss(b), sum(want.values()))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- who gets a gradient from which loss

OWN = {
    "bc": dict(actor="actor"),
    "td3+bc": dict(critic="q", actor="actor"),
    "cql": dict(critic="q", conservative="q", actor="actor", temperature="log_temp"),
    "iql": dict(value="v", critic="q", actor="actor log_std"),
    "discrete-bc": dict(actor="actor"),
    "discrete-cql": dict(critic="q", conservative="q"),
    "nfq": dict(critic="q"),
}


@pytest.mark.parametrize("name", OWN)
def test_each_loss_moves_its_own_part(name):
    m = new(name).eval()
    for k, parts in OWN[name].items():
        m.zero_grad()
        m.losses(of(m))[k].backward()
        assert {
            n.split(".")[0] for n, p in m.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        } == set(parts.split()), k


def test_lambda_is_a_constant():
    """TD3+BC: the scale of the critic's term gives no gradient.

    With one, that term would have none where all values have one sign."""
    m = new("td3+bc").eval()
    b = of(m)
    w = m.actor[0][0].weight
    (got,) = torch.autograd.grad(m.losses(b)["actor"], w)
    a = m.actor(b.s)
    q = m.q(b.s, a)[0]
    lam = 2.5 / q.abs().mean().item()
    (want,) = torch.autograd.grad(-lam * q.mean() + ((a - b.a) ** 2).mean(), w)
    assert torch.allclose(got, want, atol=1e-6)


def test_bcq_shares_features():
    m = new("bcq").eval()
    m.losses(batch(True))["imitator"].backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None} == {
        f"{n}.{w}" for n in ("q.0", "q.2", "imitator") for w in ("weight", "bias")
    }  # and not q.4, the values


@pytest.mark.parametrize("name", COPIES)
def test_targets_get_no_gradient_and_are_not_trained(name):
    m = new(name)
    m.loss(of(m)).backward()
    targets = [p for n, p in m.named_parameters() if "_target" in n]
    assert targets and all(p.grad is None and not p.requires_grad for p in targets)


# ---- target copies and counts


@pytest.mark.parametrize("name", COPIES)
def test_targets_move_by_tau_each_so_many_steps(name):
    m = new(name, **({"sync": 3} if "sync" in V.LEARNERS[name].fields() else {})).train()
    part = {
        n: (dict(m.named_parameters())[n.replace("_target", "")], p) for n, p in m.named_parameters() if "_target" in n
    }
    for call in range(1, 8):
        want = {
            n: t.clone().lerp(p, m.tau) if call > 1 and (call - 1) % m.every == 0 else t.clone()
            for n, (p, t) in part.items()
        }
        m.loss(of(m))
        assert m.step == call and all(torch.equal(want[n], t) for n, (p, t) in part.items()), call
    m.eval()
    before = copy.deepcopy(m.state_dict())
    m.loss(of(m))
    assert all(torch.equal(x, before[n]) for n, x in m.state_dict().items())


def test_the_move_is_polyak():
    m = new("iql")
    t, p = (dict(m.named_parameters())[n].detach().clone() for n in ("q_target.nets.0.0.weight", "q.nets.0.0.weight"))
    m.step += 1
    m.follow()
    assert torch.allclose(m.q_target.nets[0][0].weight, 0.995 * t + 0.005 * p, atol=1e-7)


def test_the_actor_is_delayed():
    "Without its loss the actor gets no gradient at all, so that AdamW does not touch it."
    m, moved = new("td3+bc", delay=3), []
    for _ in range(6):
        m.zero_grad(set_to_none=True)
        m.loss(of(m)).backward()
        moved.append(m.actor[0][0].weight.grad is not None)
    assert moved == [False, False, True] * 2


# ---- data


def trajectories(lengths, pictures=False):
    rng, out = np.random.default_rng(0), []
    for n in lengths:
        o = rng.integers(0, 256, (n, 36, 36), dtype=np.uint8) if pictures else rng.normal(size=(n, S))
        out.append(dict(observations=o, actions=rng.uniform(-1, 1, (n, A)), rewards=rng.normal(size=n) * 3))
    return data.from_arrays(out)


def test_transitions_by_hand():
    st = trajectories([4, 2, 1, 4])
    mu, sd = data.state_stats(st)
    b = V.Transitions(st, mu, sd, horizon=4).take(V.RowDraw(torch.arange(11)))
    assert torch.equal(b.s, (st.s - mu) / sd) and torch.equal(b.a, st.a) and torch.equal(b.r, st.r)
    assert torch.equal(b.s2, b.s[[1, 2, 3, 3, 5, 5, 6, 8, 9, 10, 10]])
    assert b.done.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]  # those of four steps were cut
    assert V.Transitions(st, mu, sd, horizon=5).take(V.RowDraw(torch.arange(11))).done.tolist() == [
        0,
        0,
        0,
        1,
        0,
        1,
        1,
        0,
        0,
        0,
        1,
    ]


def test_pictures_are_stacked_as_in_table():
    st = trajectories([6, 3], True)
    tab = data.Table(st, torch.zeros(1), torch.ones(1), 1.0)
    r = torch.arange(9)
    b = V.Transitions(st, *data.state_stats(st)).take(V.RowDraw(r))
    assert (
        b.s.dtype == torch.uint8
        and torch.equal(b.s, tab.windows(r, 1).s[:, 0])
        and torch.equal(b.s2, b.s[[1, 2, 3, 4, 5, 5, 7, 8, 8]])
    )


def test_batches_follow_from_seed_and_t():
    st = trajectories([50, 50])

    def tr(**kw):
        return V.Transitions(st, *data.state_stats(st), 64, **kw)

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))

    assert (
        same(tr().batch(3), tr().batch(3))
        and not same(tr().batch(3), tr().batch(4))
        and not same(tr().batch(3), tr(seed=1).batch(3))
    )
    assert len(tr().batch(0)) == 64
    x, y = tr().batch(0).r, tr(reward_scale=2.0, reward_clip=1.0).batch(0).r
    assert torch.equal(y, 2 * x.clamp(-1, 1))
    assert len(torch.cat([tr().batch(t).r for t in range(20)]).unique()) == 100  # every row is drawn


def test_return_scale():
    st = trajectories([5, 5, 5])
    ret = torch.stack([x.sum() for x in st.r.split(5)])
    close(V.return_scale(st, 1000), 1000 / (ret.max() - ret.min()))
    with pytest.raises(PromptnbError, match="same return"):
        V.return_scale(trajectories([5]))


# ---- through train.fit, save and load


class Killed(V.Transitions):
    "Dies at step `at`."

    at: int = 0

    def batch(self, t):
        if t == self.at:
            raise KeyboardInterrupt
        return super().batch(t)


@pytest.mark.parametrize("name, every, at", [(n, 3, 8) for n in V.LEARNERS] + [("td3+bc", 1, 1)])
def test_resumes_bit_identical(name, every, at, tmp_path):
    m = V.LEARNERS[name]
    st = trajectories([30, 30])
    st = data.Store(**dict(st.columns, a=F.one_hot((st.a[:, 0] > 0).long(), 2).float())) if m.discrete else st

    def run(cls, folder):
        m = new(name, **({"sync": 2} if "sync" in V.LEARNERS[name].fields() else {}))
        tr = cls(st, *data.state_stats(st), 32, horizon=30)
        tr.at = at
        fit(m, tr, FitConfig(steps=12, lr=1e-2, warmup=1, checkpoint_every=every), folder, desc="")
        return m

    one = run(V.Transitions, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        run(Killed, tmp_path / "two")
    two = run(V.Transitions, tmp_path / "two")
    start = new(name)
    assert all(torch.equal(x, two.state_dict()[n]) for n, x in one.state_dict().items()) and one.step == 12
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), start.parameters()))


@pytest.mark.parametrize("name, frames", [(n, ()) for n in V.LEARNERS] + [(n, FRAMES) for n in DISCRETE])
def test_saved_and_loaded(name, frames, tmp_path):
    m = new(name, frames, **({"gamma": 0.5} if "gamma" in V.LEARNERS[name].fields() else {}))
    m.mean.fill_(0.3), m.std.fill_(2.0), m.step.fill_(7)
    m.save_pretrained(tmp_path)
    again = type(m).from_pretrained(tmp_path)
    s = batch(frames=frames, n=5).s
    m.begin([0])
    assert torch.equal(again.act(history(s)), m.act(history(s))) and again.step == 7 and again.frames == m.frames
    assert all(getattr(again, f) == getattr(m, f) for f in m.fields()) and sorted(
        p.suffix for p in tmp_path.iterdir() if p.suffix != ".md"
    ) == [".json", ".json", ".safetensors"]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in m.parameters()]


@pytest.mark.parametrize("name", V.LEARNERS)
def test_acts_on_raw_states(name):
    m = new(name)
    m.mean.copy_(torch.tensor([1.0, 2, 3]))
    m.std.fill_(2.0)
    s = torch.randn(6, S) * 3
    m.train()
    m.begin([0])
    out = m.act(history(s))
    m2 = copy.deepcopy(m)
    m2.mean.zero_()
    m2.std.fill_(1.0)
    assert (
        not m.training
        and out.shape == (6, A)
        and torch.equal(out, m2.act(history((s - m.mean) / m.std)))
        and torch.isfinite(out).all()
    )
    assert m.discrete or out.abs().max() <= 1
    older = Steps(
        *(torch.cat([torch.randn_like(x) if x.is_floating_point() else x, x], 1) for x in vars(history(s)).values())
    )
    assert torch.equal(m.act(older), out)  # the last step alone


@pytest.mark.parametrize("name", DISCRETE)
def test_reads_pictures(name):
    m = new(name, FRAMES)
    loss = m.loss(batch(True, FRAMES))
    loss.backward()
    convs = [k for k in m.modules() if isinstance(k, torch.nn.Conv2d)][:3]
    assert (
        torch.isfinite(loss)
        and [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
        and convs[0].weight.grad.abs().sum() > 0
    )
    s = batch(frames=FRAMES, n=3).s
    m.begin([0])
    assert torch.equal(m.act(history(s)), m.act(history(s.flatten(1).float())))  # flat, as an environment may give them


def test_bcq_never_takes_what_the_data_would_not():
    m = V.make_learner("bcq", S, 6, hidden=8)
    m.begin([0])
    with torch.no_grad():
        m.imitator.weight.mul_(20)
    s = torch.randn(200, S)
    scores = m.act(history(s))
    q, z = m.both(s)
    p = z.softmax(-1)
    ok = p > 0.3 * p.amax(-1, keepdim=True)
    assert 1 < ok.sum(-1).float().mean() < 4 and ok.gather(1, scores.argmax(-1, keepdim=True)).all()
    assert (
        torch.equal(scores[ok], q[ok])
        and scores.masked_fill(ok, -torch.inf).amax(-1).lt(scores.masked_fill(~ok, torch.inf).amin(-1)).all()
    )
    left = scores.masked_fill(ok, -torch.inf).argmax(-1)
    likely = p.masked_fill(ok, -1).argmax(-1)
    assert torch.equal(left[~ok.all(-1)], likely[~ok.all(-1)])  # if all those are forbidden, the likeliest of the rest


def test_sizes_are_the_published_ones():
    def n(name, S, A):
        return round(sum(p.numel() for p in V.make_learner(name, S, A).parameters() if p.requires_grad) / 1e6, 2)

    assert [n("td3+bc", 60, 9), n("iql", 60, 9), n("cql", 11, 3)] == [0.25, 0.33, 0.41]  # LaMo, Table 14


# ---- what they learn: 40 % of the actions go to 0, where the reward is, 60 % go away from it


def pay(s, a):
    s2 = np.clip(s + 0.3 * a, -1, 1)
    return s2, -3 * np.abs(s2)


def world(discrete, n=200, T=10):
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        s, o, acts, r = rng.uniform(-1, 1), [], [], []
        for _ in range(T):
            a = np.clip(-s / 0.3 + rng.normal(0, 0.2), -1, 1) * (1 if rng.random() < 0.4 else -1)
            a = np.round(a) if discrete else a
            o.append([s])
            acts.append(np.eye(3)[int(a) + 1] if discrete else [a])
            s, x = pay(s, a)
            r.append(x)
        out.append(dict(observations=np.array(o), actions=np.array(acts), rewards=np.array(r)))
    return data.from_arrays(out)


def played(move, n=100, T=10):
    s, total = np.linspace(-1, 1, n), 0
    for _ in range(T):
        s, r = pay(s, move(s))
        total += r.mean()
    return total


def learned(name, store, steps=400):
    c = V.LEARNERS[name]
    own = {k: v for k, v in dict(hidden=32, depth=2, gamma=0.8, sync=50).items() if k in c.fields()} | {
        "cql": dict(alpha=2.0),
        "discrete-cql": dict(alpha=0.5),
    }.get(name, {})
    torch.manual_seed(0)
    m = V.make_learner(name, 1, store.a.shape[1], **own)
    mu, sd = data.state_stats(store)
    m.mean.copy_(mu)
    m.std.copy_(sd)
    assert (
        fit(
            m, V.Transitions(store, mu, sd, 128, horizon=10), FitConfig(steps, 3e-3, 0.0, warmup=1, clip=1e9), desc=""
        ).status
        == "ok"
    )
    m.begin([0])

    def act(s):
        return m.act(history(torch.as_tensor(s, dtype=torch.float32)[:, None])).numpy()

    return played(lambda s: act(s).argmax(-1) - 1.0 if m.discrete else act(s)[:, 0])


@pytest.mark.parametrize(
    "discrete, copycat, learners",
    [(False, "bc", ("td3+bc", "cql", "iql")), (True, "discrete-bc", ("discrete-cql", "bcq", "nfq"))],
)
def test_values_beat_copying_and_chance(discrete, copycat, learners):
    store, rng = world(discrete), np.random.default_rng(0)
    chance = np.mean(
        [played(lambda s: rng.integers(-1, 2, len(s)) if discrete else rng.uniform(-1, 1, len(s))) for _ in range(10)]
    )
    copied = learned(copycat, store)
    for n in learners:
        assert learned(n, store, 800 if n == "nfq" else 400) > max(chance, copied) + 5, n


# ---- errors, each one line


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: V.make_learner("td3", S, A), "unknown learner 'td3': did you mean 'td3\\+bc'\\?"),
        (
            lambda: V.make_learner("cql", S, A, n_action=3),
            "unknown field of CQL 'n_action': did you mean 'n_actions'\\?",
        ),
        (lambda: V.make_learner("bc", S, A, gamma=0.9), "unknown field of BC 'gamma'"),
        (lambda: V.make_learner("iql", S, A, deterministic=1), "deterministic is 1, but IQL wants bool"),
        (lambda: V.make_learner("iql", S, A, hidden=2.5), "hidden is 2.5, but IQL wants int"),
        (lambda: V.make_learner("cql", S, A, FRAMES), "CQL reads flat states"),
        (lambda: V.make_learner("nfq", S, A, (4, 20, 20)), "at least 36 x 36"),
    ],
)
def test_errors_are_one_line(make, says):
    with pytest.raises(PromptnbError, match=says) as e:
        make()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", V.LEARNERS)
def test_any_depth(name):
    assert sum(isinstance(k, torch.nn.Linear) for n, k in new(name, depth=1).named_modules() if "_target" not in n) == {
        "bc": 2,
        "td3+bc": 6,
        "cql": 6,
        "iql": 8,
        "bcq": 3,
    }.get(name, 2)


def test_a_whole_number_is_a_number():
    assert V.make_learner("td3+bc", S, A, alpha=2).alpha == 2


def test_pickles_are_refused(tmp_path):
    m = new("bc")
    m.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(m.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((PromptnbError, FileNotFoundError, OSError)):
        V.BC.from_pretrained(tmp_path)
