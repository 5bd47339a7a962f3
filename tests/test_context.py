"The Contextual Meta Transformer against formulas written out plainly here; what its contexts forget, where its data come from, what its jobs leave behind."

import json
import math
import os
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_parity import attention, linear, norm
from toys import Judge, toy

from promptnb import cli, core, evaluate, tasks, train
from promptnb import recipes as rc
from promptnb.core import Batch, PromptnbError, Row, Steps, choice_loss, read_json, seed_for
from promptnb.data import Sampler, demos, from_arrays, in_order
from promptnb.evaluate import EvalTask, groups_of, rollout
from promptnb.experiments import multitask, plan, run
from promptnb.models.context import ContextConfig, ContextDT, ContextPolicy, info_nce, transitions
from promptnb.models.dt import DTConfig, Policy, PromptDT
from promptnb.tuners.checks import actions, demo_error, same, snapshot
from promptnb.tuners.context import (
    Collect,
    ContextVectors,
    Encode,
    Windows,
    advantages,
    components,
    shuffled,
    usual_return,
    weights,
)
from promptnb.tuners.core import make_tuner, windows_loss

ROOT = core.root()
S, A, K, L, D = 4, 3, 5, 3, 16
TASKS = (2, 5, 7)
ALL = dict(w_state=0.3, w_return=0.7, w_nce=0.2, w_class=0.4)
encoders = pytest.mark.parametrize("encoder", ["mean", "transformer"])


def close(a, b, tol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tol, atol=tol)


def raises(text):
    return pytest.raises(PromptnbError, match=rf"^[^\n]*{text}[^\n]*$")  # one line


@pytest.fixture(autouse=True, scope="module")
def no_disk():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda _: None)
        yield  # processes are not killed here


# ---- the model, plainly: one sequence, context vectors first, every token through every block


def plain_transitions(x, scale):
    "For each context the list of its (s, a, r, s'): neighbouring real steps, one timestep apart."
    return [
        [
            torch.cat([x.s[m, i], x.a[m, i], (x.rtg[m, i] - x.rtg[m, i + 1]) * scale, x.s[m, i + 1]])
            for i in range(x.t.shape[1] - 1)
            if x.mask[m, i] and x.mask[m, i + 1] and x.t[m, i + 1] - x.t[m, i] == 1
        ]
        for m in range(len(x.t))
    ]


def plain_embedding(w, c, x):
    "Mean over transitions of a two-layer net; 'transformer': they look at each other first, without positions."
    out = []
    for rows in plain_transitions(x, c.reward_scale):
        if not rows:
            out.append(torch.zeros(c.width).to(x.s.dtype))
            continue
        h = linear(w, "encode.embed.2", linear(w, "encode.embed.0", torch.stack(rows)).clamp(min=0))
        if c.encoder == "transformer":
            n = norm(w, "encode.mix.norm1", h)
            q, k, v = (n @ w["encode.mix.self_attn.in_proj_weight"].T + w["encode.mix.self_attn.in_proj_bias"]).split(
                c.width, -1
            )
            parts, e = [], c.width // c.heads
            for i in range(c.heads):
                at = slice(i * e, (i + 1) * e)
                p = (q[:, at] @ k[:, at].T / math.sqrt(e)).exp()
                parts.append(p / p.sum(-1, keepdim=True) @ v[:, at])
            h = h + linear(w, "encode.mix.self_attn.out_proj", torch.cat(parts, -1))
            h = h + linear(
                w, "encode.mix.linear2", linear(w, "encode.mix.linear1", norm(w, "encode.mix.norm2", h)).clamp(min=0)
            )
        out.append(h.mean(0))
    return torch.stack(out)


def plain_vectors(w, c, z, some):
    return (
        linear(w, "vectors.1", norm(w, "vectors.0", z)).view(len(z), c.L, c.width)
        * torch.as_tensor(some).to(z.dtype)[:, None, None]
    )


def plain_hidden(w, c, h, vectors=None):
    "Last block's outputs at the 3K history tokens (B, 3K, d)."
    squash = torch.tanh if c.tanh else lambda z: z
    bend = (lambda z: z.clamp(min=0)) if c.activation == "relu" else lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2
    t = w["embed.t.weight"][h.t.clamp(max=c.max_timestep - 1)]
    mask = h.mask.repeat_interleave(3, 1)
    each = [squash(linear(w, f"embed.{n}", x)) + t for n, x in (("rtg", h.rtg * c.use_rtg), ("s", h.s), ("a", h.a))]
    x = norm(w, "ln_in", torch.stack([each[j][:, i] for i in range(h.t.shape[1]) for j in range(3)], 1))
    if vectors is not None:
        x, mask = torch.cat([vectors, x], 1), torch.cat([torch.ones(vectors.shape[:2]).to(mask), mask], 1)
    for b in range(c.layers):
        n = f"blocks.{b}"
        x = x + attention(w, n, norm(w, f"{n}.ln1", x), mask, c.heads)
        x = x + linear(w, f"{n}.out", bend(linear(w, f"{n}.fc", norm(w, f"{n}.ln2", x))))
    return x[:, -3 * h.t.shape[1] :]


def plain_read(w, c, x):
    x = linear(w, "head", norm(w, "ln_out", x))
    return x if c.discrete else torch.tanh(x)


def plain_choices(scores, target, mask):
    "Nats of the chosen action at each real step."
    return torch.stack(
        [-(scores[i] - scores[i].exp().sum().log())[target[i].argmax()] for i in map(tuple, mask.nonzero().tolist())]
    )


def plain_nce(z, task, temperature):
    "Mean over contexts i that have others of their task: mean over these j of -log(exp(cos_ij / T) / sum over k != i of exp(cos_ik / T))."

    def cos(i, j):
        return (z[i] @ z[j] / z[i].norm() / z[j].norm() / temperature).exp()

    n, out = range(len(z)), []
    for i in n:
        of = [j for j in n if j != i and task[j] == task[i]]
        if of:
            out.append(sum(-(cos(i, j) / sum(cos(i, k) for k in n if k != i)).log() for j in of) / len(of))
    return sum(out) / len(out) if out else torch.tensor(0.0)


def plain_parts(w, c, b):
    "{name: weighted loss}"
    h, z, vectors, out = b.history, None, None, {}
    if c.encoder == "one-hot":
        vectors = torch.stack([w["table"][k] for k in b.task.tolist()])
    elif c.encoder != "none":
        some = [bool(r) for r in plain_transitions(b.prompt, 1.0)]
        z = plain_embedding(w, c, b.prompt)
        vectors = plain_vectors(w, c, z, some)
        z, of = z[some], b.task[some]
        if c.w_nce:
            out["nce"] = c.w_nce * plain_nce(z, of.tolist(), c.temperature)
        if c.w_class:
            out["class"] = (
                c.w_class
                * plain_choices(linear(w, "classify", z), torch.eye(len(c.tasks))[of], torch.ones(len(z))).mean()
            )
    x = plain_hidden(w, c, h, vectors)
    pred, y = plain_read(w, c, x[:, 1::3]), norm(w, "ln_out", x)
    out["action"] = (
        plain_choices(pred, h.a, h.mask).mean()
        if c.discrete
        else torch.stack([((pred[i] - h.a[i]) ** 2).mean() for i in map(tuple, h.mask.nonzero().tolist())]).mean()
    )
    both = [(b, i) for b in range(len(h.t)) for i in range(h.t.shape[1] - 1) if h.mask[b, i] and h.mask[b, i + 1]]
    for name, k, target in (("state", c.w_state, h.s), ("return", c.w_return, h.rtg)):
        if k:
            out[name] = (
                k
                * torch.stack(
                    [((linear(w, f"next_{name}", y[b, 3 * i + 2]) - target[b, i + 1]) ** 2).mean() for b, i in both]
                ).mean()
            )
    return out


def steps(B, n, seed=0, pad=0, dtype=torch.float64, discrete=False, segment=None):
    "Random steps, row i with up to `pad` steps of padding in front; with `segment`, segments of that length, each beginning 50 timesteps later."
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(n) >= torch.randint(pad + 1, (B, 1), generator=g)).to(dtype)

    def r(*d):
        return torch.randn(B, n, *d, generator=g, dtype=dtype)

    a = torch.eye(A, dtype=dtype)[torch.randint(A, (B, n), generator=g)] if discrete else r(A).tanh()
    t = (
        torch.arange(n).expand(B, n)
        if segment is None
        else (torch.arange(n) // segment * 50 + torch.arange(n) % segment + torch.randint(40, (B, 1), generator=g))
    )
    return Steps(r(S) * mask[..., None], a * mask[..., None], r(1) * mask[..., None], t * mask.long(), mask)


def net_and_batch(dtype=torch.float64, seed=0, B=8, empty=(), **kw):
    "A net with large random weights, and a batch of 3 tasks with padding; the contexts `empty` say nothing."
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    net = ContextDT(
        ContextConfig(
            S,
            A,
            **{
                **dict(
                    width=D, layers=2, heads=2, max_timestep=120, L=L, tasks=TASKS, reward_scale=3.0, temperature=0.5
                ),
                **kw,
            },
        )
    ).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    c = steps(B, 12, seed + 1, 3, dtype, segment=4)
    mask = c.mask.clone()
    mask[list(empty)] = 0
    return net.to(dtype), Batch(
        steps(B, K, seed, K - 2, dtype, kw.get("discrete", False)), replace(c, mask=mask), torch.arange(B) % 3
    )


LOSSES = [
    dict(),
    ALL,
    dict(ALL, encoder="transformer"),
    dict(ALL, discrete=True),
    dict(ALL, activation="gelu", mlp_ratio=2, tanh=True),
    dict(ALL, use_rtg=False),
    dict(ALL, encoder="one-hot", w_nce=0.0, w_class=0.0),
    dict(w_state=1.0, w_return=0.5, encoder="none"),
    dict(w_state=1.0, encoder="none", discrete=True, activation="gelu", mlp_ratio=2, tanh=True),
    dict(w_nce=1.0),
    dict(w_class=1.0),
    dict(w_return=2.0),
]


@pytest.mark.parametrize("kw", LOSSES, ids=lambda kw: ",".join(f"{k}={v}" for k, v in kw.items()))
def test_losses(kw):
    "Each part, and their sum, against the formulas; contexts that say nothing have no part in InfoNCE and classification."
    net, b = net_and_batch(empty=(2, 3), **kw)
    w = net.state_dict()
    got, want = net.losses(b), plain_parts(w, net.config, b)
    assert got.keys() == want.keys() and got["action"] > 0
    for k in want:
        close(got[k], want[k])
    close(net.loss(b), sum(want.values()))
    close(got["action"], want["action"], 1e-10)
    if kw.get("encoder") != "one-hot":
        assert net.losses(replace(b, task=None)).keys() == {"action"}
        close(net.loss(replace(b, task=None)), want["action"], 1e-10)  # fine-tuning


@encoders
def test_context_vectors(encoder):
    net, b = net_and_batch(encoder=encoder, empty=(4,))
    w, c = net.state_dict(), net.config
    some = [bool(r) for r in plain_transitions(b.prompt, 3.0)]
    assert some.count(False) == 1
    z, got = net.embedding(b.prompt)
    assert got.tolist() == some
    close(z[got], plain_embedding(w, c, b.prompt)[some], 1e-9)
    x, mask = net.prompt_tokens(b.prompt)
    assert x.shape == (8, L, D) and mask.shape == (8, L) and (mask == 1).all()
    close(x, plain_vectors(w, c, plain_embedding(w, c, b.prompt), some), 1e-9)
    with torch.no_grad():
        close(net(b.history, net.prefix(x, mask)), plain_read(w, c, plain_hidden(w, c, b.history, x)[:, 1::3]), 1e-9)


def test_transitions():
    x = steps(6, 12, 3, 5, segment=4)
    got, real = transitions(x, 7.0)
    want = plain_transitions(x, 7.0)
    assert (
        got.shape == (6, 11, 2 * S + A + 1)
        and real.sum(1).tolist() == [len(r) for r in want]
        and {len(r) for r in want} > {9}
    )
    for g, r, w in zip(got, real, want):
        close(g[r > 0], torch.stack(w), 1e-12)
        assert not g[r == 0].any()
    close(transitions(x, 14.0)[0][..., S + A], 2 * got[..., S + A], 1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(
    "task", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [3] * 6, [0, 0, 0, 0, 0, 1]], ids=str
)
def test_info_nce(task, temperature):
    z = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    got = info_nce(z, torch.tensor(task), temperature)
    close(got, plain_nce(z, task, temperature), 1e-5)
    got.backward()
    assert torch.isfinite(z.grad).all() and bool(z.grad.abs().max() > 0) == (len(set(task)) < 6)


@pytest.mark.parametrize("n", [0, 1])
def test_info_nce_of_almost_nothing(n):
    "One context, or none: no loss and no NaN."
    z = torch.randn(n, D, requires_grad=True)
    loss = info_nce(z, torch.zeros(n).long())
    loss.backward()
    assert loss == 0 and not z.grad.any() and torch.isfinite(z.grad).all()


def test_choice_loss():
    g = torch.Generator().manual_seed(0)
    scores, target, mask = (
        torch.randn(4, K, A, generator=g),
        torch.eye(A)[torch.randint(A, (4, K), generator=g)],
        (torch.rand(4, K, generator=g) < 0.6).float(),
    )
    mask[:, -1] = 1
    close(choice_loss(scores, target, mask), plain_choices(scores, target, mask).mean())
    close(
        choice_loss(scores, target, mask, "none"),
        torch.stack([plain_choices(scores[i], target[i], mask[i]).mean() for i in range(4)]),
    )


@pytest.mark.parametrize(
    "kw",
    [
        dict(activation="gelu"),
        dict(mlp_ratio=2),
        dict(tanh=True),
        dict(activation="gelu", mlp_ratio=2, tanh=True, discrete=True),
        dict(discrete=True),
    ],
    ids=str,
)
def test_switches_of_madt(kw):
    "Of the plain Decision Transformer too: gelu by the error function, narrower MLPs, tanh before the timestep is added; choices are scores."
    torch.manual_seed(0)
    net = PromptDT(DTConfig(S, A, width=D, layers=2, heads=2, max_timestep=120, prompt=False, **kw)).eval().double()
    h = steps(8, K, 0, K - 2, discrete=kw.get("discrete", False))
    for p in net.parameters():
        p.data.add_(0.15 * torch.randn_like(p))
    w, c = net.state_dict(), net.config
    pred = plain_read(w, c, plain_hidden(w, c, h)[:, 1::3])
    assert w["blocks.0.fc.weight"].shape == (kw.get("mlp_ratio", 4) * D, D)
    with torch.no_grad():
        close(net(h), pred, 1e-10)
        close(net(h, last=True), pred[:, -1:], 1e-10)
        close(
            net.loss(Batch(h)),
            plain_choices(pred, h.a, h.mask).mean() if c.discrete else ((pred - h.a) ** 2)[h.mask > 0].mean(),
            1e-10,
        )


def test_bad_switches():
    with raises("unknown activation 'gelo': did you mean 'gelu'"):
        PromptDT(DTConfig(S, A, activation="gelo"))
    with raises("unknown encoder 'meen': did you mean 'mean'"):
        ContextDT(ContextConfig(S, A, encoder="meen"))
    with raises("L is 0, but a prompt has at least 1"):
        ContextDT(ContextConfig(S, A, L=0))


# ---- the prompt in front of a frozen backbone


@pytest.mark.parametrize(
    "kw",
    [
        dict(encoder="none"),
        dict(encoder="mean"),
        dict(encoder="none", discrete=True, activation="gelu", mlp_ratio=2, tanh=True),
        dict(encoder="one-hot"),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 5, 20])
def test_vectors_in_front(kw, n):
    "A policy with n vectors acts as the same model on [vectors; tokens], each row with its own; states normalised, returns scaled."
    net, b = net_and_batch(**kw)
    pi = ContextPolicy(asdict(net.config), K=K, rtg_scale=7.0).double()
    pi.model.load_state_dict(net.state_dict())
    pi.mean.copy_(torch.arange(S))
    pi.std.copy_(torch.arange(S) + 2.0)
    x, rows = torch.randn(3, n, D, generator=torch.Generator().manual_seed(1)).double(), [2, 0, 0, 1, 2, 2, 1, 0]
    p = pi.with_prompt((x, torch.ones(3, n).double()))
    h = b.history
    got = p.act(replace(h, s=h.s * pi.std + pi.mean, rtg=h.rtg * 7), p.begin(rows))
    close(
        got,
        plain_read(net.state_dict(), net.config, plain_hidden(net.state_dict(), net.config, h, x[rows])[:, -2:-1])[
            :, 0
        ],
    )


def test_weighted_error():
    "What is minimised: of each task, the mean over its windows of weight times the window's error."
    net, _ = net_and_batch(encoder="none")
    w, c = net.state_dict(), net.config
    g = torch.Generator().manual_seed(2)
    h = steps(6, K, 5, K - 2).map(lambda x: x.unflatten(0, (2, 3)))
    x, k = torch.randn(2, n := 4, D, generator=g).double(), torch.rand(2, 3, generator=g).double()

    def one(t, i):
        pred = plain_read(w, c, plain_hidden(w, c, h[t][i : i + 1], x[t : t + 1])[:, 1::3])[0]
        return ((pred - h.a[t, i]) ** 2).mean(-1)[h.mask[t, i] > 0].mean()

    e = torch.stack([torch.stack([one(t, i) for i in range(3)]) for t in range(2)])
    pre = net.prefix(x, torch.ones(2, n).double())
    with torch.no_grad():
        close(windows_loss(net, pre, h)[:, 0], e.mean(1), 1e-10)
        close(windows_loss(net, pre, h, k)[:, 0], (k * e).mean(1), 1e-10)


# ---- advantages


def plain_usual(h, g, ridge):
    "Least squares of real steps' returns-to-go on (s, s^2, t / 100, 1), mean error plus ridge times squared coefficients."
    on = h.mask[g].numpy() > 0
    s, t, y = h.s[g].numpy()[on], h.t[g].numpy()[on], h.rtg[g, ..., 0].numpy()[on]
    f = np.concatenate([s, s**2, t[:, None] / 100, np.ones((len(s), 1))], 1)
    return np.linalg.lstsq(
        np.concatenate([f / math.sqrt(len(y)), math.sqrt(ridge) * np.eye(f.shape[1])]),
        np.concatenate([y / math.sqrt(len(y)), np.zeros(f.shape[1])]),
        rcond=None,
    )[0]


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_usual_return(ridge):
    h = steps(60, K, 0, K - 1).map(lambda x: x.unflatten(0, (2, 30)))
    h = replace(h, t=(h.t + torch.arange(30)[:, None] * 6) * h.mask.long())
    got = usual_return(h, ridge)
    assert got.dtype == torch.float64 and got.shape == (2, 2 * S + 2)
    for g in range(2):
        c = plain_usual(h, g, ridge)
        close(got[g], c, 1e-8)
        for i, a in enumerate(advantages(h, got)[g].tolist()):
            each = [
                h.rtg[g, i, k, 0].item()
                - np.concatenate([h.s[g, i, k], h.s[g, i, k] ** 2, [h.t[g, i, k].item() / 100, 1.0]]) @ c
                for k in range(K)
                if h.mask[g, i, k]
            ]
            assert a == pytest.approx(np.mean(each), abs=1e-8)


@pytest.mark.parametrize("beta, most", [(1.0, 20.0), (0.3, 20.0), (1.0, 2.0)])
def test_advantage_weights(beta, most):
    a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [50.0], [0.01]]) + 0.5
    got = weights(a, beta, most)
    for g in range(3):
        x = a[g].double().numpy()
        w = np.minimum(np.exp(x / x.std(ddof=1) / beta), most)
        close(got[g], w / w.mean(), 1e-5)
    assert (weights(torch.full((1, 5), 3.0)) == 1).all() and torch.isfinite(
        weights(torch.tensor([[-1e9, 0, 1e9]]))
    ).all()


def many(n=20, T=30, tasks=(3, 8), seed=0):
    "(policy, demonstrations): trajectory i of a task has actions i / n, states that are random but for the task's id, rewards of i."
    g = np.random.default_rng(seed)
    torch.manual_seed(0)
    S = 3
    st = from_arrays(
        [
            dict(
                observations=np.concatenate([np.full((T, 1), k), g.normal(size=(T, S - 1))], 1),
                actions=np.full((T, 2), i / n),
                rewards=np.full(T, float(i)),
            )
            for k in tasks
            for i in g.permutation(n)
        ],
        np.repeat(tasks, n),
    )
    pi = Policy(asdict(DTConfig(S, 2, width=D, layers=1, prompt=False)), K=4, rtg_scale=12.0).eval()
    return pi, demos(st, st, pi, n=0, K=4, batch=16, H=3)


def test_draws():
    "'best' sees the best trajectories alone, 'return' all as they are; 'advantage' adds weights by what followed; 'shuffled' other actions."
    pi, dem = many()

    def make(**kw):
        return ContextVectors(**{"towards": "best", **kw}).draws(pi, dem, 5)

    h = dem.batch((5, 3))

    def all_of(d):
        return torch.cat([(x[0] if isinstance(x := d.batch(t), tuple) else x).a.flatten(0, 2)[:, 0] for t in range(30)])

    assert same(snapshot(make(towards="return").batch(3)), snapshot(h)) and all_of(make(towards="return")).min() == 0
    assert (
        set(all_of(make(top=0.1)).tolist()) == {0.0, float(np.float32(0.9)), float(np.float32(0.95))}
        and len(set(all_of(make(top=0.5)).tolist())) == 11
    )  # 0: padding
    got, w = make(towards="advantage").batch(3)
    usual = usual_return(
        Steps(
            *(
                torch.cat([getattr(dem.batch(("usual", 5, i)), n) for i in range(16)], 1)
                for n in Steps.__dataclass_fields__
            )
        )
    )
    assert (
        same(snapshot(got), snapshot(h))
        and torch.equal(w, weights(advantages(h, usual), 1.0))
        and not torch.equal(w, make(towards="advantage", beta=3.0).batch(3)[1])
    )
    assert (
        np.corrcoef(w.flatten(), (h.a[..., 0] * h.mask).sum(-1).div(h.mask.sum(-1)).flatten())[0, 1] > 0.5
    )  # the better the trajectory, the more it counts
    x = make(towards="shuffled")
    got = x.batch(3)
    assert (
        same(snapshot(x.batch(3)), snapshot(got))
        and not torch.equal(x.batch(4).a, got.a)
        and all(torch.equal(getattr(got, n), getattr(h, n)) for n in ("s", "rtg", "t", "mask"))
    )
    for g in range(2):
        assert (
            torch.equal(got.a[g].flatten(0, 1).sort(0).values, h.a[g].flatten(0, 1).sort(0).values)
            and (got.a[g] != h.a[g]).float().mean() > 0.5
        )


def test_start():
    "Random vectors of the seed, a fiftieth in size and a length of one's own; or what the encoder writes for each task's prompt. All of them count."
    pi, dem = toy(context=True)

    def at(rng=0, **kw):
        return make_tuner("context", steps=0, **kw).adapt(pi, dem, rng).assignments[0][0]

    for n in (1, 4):
        x = at(3, L=n)
        want = 0.02 * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(seed_for(3, "vectors")))
        close(x.prompt_tokens, want)
        assert (x.prompt_mask == 1).all()
    close(at(begin="encoded").prompt_tokens, pi.model.prompt_tokens(dem.prompt)[0].detach())
    close(at(scale=0.5, L=4).prompt_tokens, 25 * at(L=4).prompt_tokens)


def test_another_order_each_step():
    pi, dem = many()
    h = dem.batch(0)
    fixed = SimpleNamespace(batch=lambda t: h)
    a, b = (Windows(fixed, 0, "shuffled", 1.0).batch(t).a for t in (1, 2))
    assert not torch.equal(a, b) and not torch.equal(a, Windows(fixed, 1, "shuffled", 1.0).batch(1).a)


def test_shuffled_keeps_actions_whole():
    a = torch.arange(2 * 6 * 4).view(2, 6, 4, 1).expand(-1, -1, -1, 3).float()
    m = torch.ones(2, 6, 4)
    m[0, :2, 0] = 0
    x = shuffled(a, m, 0)
    real = m > 0
    assert (
        (x == x[..., :1]).all()
        and all(
            set(x[g][k[g]].flatten().tolist()) == set(a[g][k[g]].flatten().tolist())
            for g in range(2)
            for k in (real, ~real)
        )
        and (x != a)[real].float().mean() > 0.8
    )
    assert torch.equal(shuffled(a, m, 0), x) and not torch.equal(shuffled(a, m, 1), x)


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


# ---- what a context forgets


@encoders
def test_order_and_number(encoder):
    "Transitions in any order, segments in any order, everything twice, padding in front or between: the same vectors."
    net, b = net_and_batch(encoder=encoder)
    x, g = b.prompt, torch.Generator().manual_seed(3)
    want, some = net.embedding(x)

    def keep(y):
        return (close(net.embedding(y)[0], want, 1e-9), close(net.prompt_tokens(y)[0], net.prompt_tokens(x)[0], 1e-9))

    rows, real = transitions(x, 3.0)
    order = torch.randperm(rows.shape[1], generator=g)
    close(net.encode(rows[:, order], real[:, order]), want, 1e-9)
    for turn in ([2, 0, 1], [1, 2, 0], [0, 2, 1]):
        keep(x[:, torch.arange(12).view(3, 4)[turn].flatten()])
    keep(x[:, torch.arange(12).repeat(2)])
    keep(x[:, torch.arange(12).repeat(3)])
    gap = Steps(
        *(torch.cat([f[:, :4], torch.zeros_like(f[:, :3]), f[:, 4:]], 1) for f in (x.s, x.a, x.rtg, x.t, x.mask))
    )
    keep(gap)

    def wild(f):
        return torch.where(x.mask.view(*x.mask.shape, *[1] * (f.dim() - 2)) > 0, f, 99 * torch.ones_like(f))

    assert (x.mask == 0).any()
    keep(Steps(wild(x.s), wild(x.a), wild(x.rtg), wild(x.t), x.mask))
    assert (
        some.all() and (net.embedding(x.map(lambda f: f[:, 4:]))[0] - want).abs().max() > 1e-3
    )  # but what is not there is missed
    net = net.float()
    y = x.map(lambda f: f.float() if f.is_floating_point() else f)
    with torch.no_grad():
        fast = net.embedding(y)[0]  # inference may take another kernel
    close(fast, net.embedding(y)[0], 1e-5)


@encoders
def test_null_prompt(encoder):
    "Zeros, whatever lies under the mask; also where single steps make no transition."
    net, b = net_and_batch(encoder=encoder)
    x = b.prompt
    none = replace(x, mask=0 * x.mask)
    lone = replace(x, mask=x.mask * (torch.arange(12) % 2))
    one = x.map(lambda f: f[:, -1:])
    for y in (
        none,
        replace(none, s=none.s + 9, a=none.a - 3, rtg=none.rtg * 5),
        lone,
        *([one] if encoder == "mean" else []),
        none.map(lambda f: f[:, :2]),
    ):
        z, some = net.embedding(y)
        tokens, mask = net.prompt_tokens(y)
        assert not z.any() and not some.any() and not tokens.any() and (mask == 1).all() and tokens.shape == (8, L, D)
    with torch.no_grad():
        close(
            net(b.history, net.prefix(*net.prompt_tokens(none))),
            plain_read(
                net.state_dict(),
                net.config,
                plain_hidden(net.state_dict(), net.config, b.history, torch.zeros(8, L, D).double())[:, 1::3],
            ),
            1e-9,
        )


def test_segments_that_meet():
    "Two segments of unlike trajectories, the second beginning a timestep after the first ends, hold no transition between them."
    st = made_up("cheetah-vel", "expert", (0, 1), 8, T=60)
    s = Sampler(st, torch.zeros(20), torch.ones(20), 1.0, 4, 32, None, 4, 6, "random", in_order(st, st.task), gap=True)
    for t in range(20):
        x, real = transitions(s.batch(t).prompt)
        assert not real[:, 5::7].any() and not real[:, 6::7].any()


def test_forgotten():
    "Of the rows, that share; a forgotten one keeps nothing; the same seed forgets the same."
    net, _ = net_and_batch(null=0.3)
    x = steps(4000, 2, 1)
    torch.manual_seed(0)
    y = net.forgotten(x)
    gone = y.mask.sum(1) == 0
    assert abs(gone.double().mean() - 0.3) < 0.03 and (y.mask[~gone] == 1).all() and torch.equal(y.s, x.s)
    torch.manual_seed(0)
    assert torch.equal(net.forgotten(x).mask, y.mask) and not torch.equal(net.forgotten(x).mask, y.mask)


@pytest.mark.parametrize("null", [0.0, 0.5, 1.0])
def test_training_without_context(null):
    "The loss is that of the batch with some contexts zero_prompt; fine-tuning forgets none."
    net, b = net_and_batch(null=null, **ALL)
    torch.manual_seed(4)
    got = net.losses(b)
    torch.manual_seed(4)
    keep = (torch.rand(8) >= null).double() if null else torch.ones(8)
    some = replace(b, prompt=replace(b.prompt, mask=b.prompt.mask * keep[:, None]))
    want = (
        plain_parts(net.state_dict(), net.config, some)
        if keep.any()
        else dict(action=net.losses(replace(some, task=None))["action"])
    )
    assert keep.sum() in ({0.0: [8], 1.0: [0]}.get(null, range(2, 7)))
    for k in want:
        close(got[k], want[k])
    if not keep.any():
        assert got["nce"] == 0 and got["class"] == 0 and torch.isfinite(net.loss(b))
    tuned = replace(b, task=None)
    close(
        net.loss(tuned),
        plain_parts(net.state_dict(), replace(net.config, w_state=0.0, w_return=0.0, w_nce=0.0, w_class=0.0), b)[
            "action"
        ],
    )


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        ALL,
        dict(encoder="transformer", w_nce=0.1),
        dict(encoder="none", w_state=0.1, w_return=0.1),
        dict(encoder="one-hot", w_state=0.1),
        dict(w_state=1.0),
        dict(w_return=1.0),
        dict(w_class=1.0),
        dict(encoder="none"),
    ],
    ids=str,
)
def test_no_idle_parameters(kw):
    "Heads are there where their losses are; every parameter gets a gradient."
    net, b = net_and_batch(**kw)
    net.loss(b).backward()
    c = net.config
    for name, there in (("next_state", c.w_state), ("next_return", c.w_return), ("classify", c.w_class)):
        assert (
            (getattr(net, name) is not None)
            == bool(there)
            == any(n.startswith(f"{name}.") for n, _ in net.named_parameters())
        )
    reads = c.encoder in ("mean", "transformer")
    assert (
        hasattr(net, "table") == (c.encoder == "one-hot")
        and [hasattr(net, n) for n in ("encode", "vectors")] == [reads, reads]
        and net.embed_prompt is None
    )
    assert not [n for n, p in net.named_parameters() if p.grad is None] and all(
        len(getattr(net, k).weight) == n
        for k, n in (("next_state", S), ("next_return", 1), ("classify", len(TASKS)))
        if getattr(net, k) is not None
    )


def test_one_hot():
    "Rows in the order of `tasks`; other tasks are refused, and there is no context to read."
    net, b = net_and_batch(encoder="one-hot")
    pi = ContextPolicy(asdict(net.config), K=K).with_prompt((torch.zeros(1, L, D), torch.ones(1, L)))
    p = pi.prompted(None, [7, 2, 2, 5])
    assert (
        torch.equal(p.prompt_tokens, pi.model.table[[2, 0, 0, 1]].detach())
        and not p.prompt_tokens.requires_grad
        and (p.prompt_mask == 1).all()
        and p.prompt_tokens.shape == (4, L, D)
    )
    with raises("unknown task of this one-hot policy '4'"):
        pi.prompted(None, [2, 4])
    with raises("encoder 'one-hot' reads no context"):
        pi.model.prompt_tokens(b.prompt)


@encoders
def test_saved_and_loaded(encoder, tmp_path):
    pi = (
        ContextPolicy(
            asdict(ContextConfig(S, A, width=D, layers=1, encoder=encoder, tasks=TASKS, L=L, **ALL)), K=K, rtg_scale=3.0
        )
        .with_prompt(steps(2, 12, segment=4, dtype=torch.float32))
        .eval()
    )
    pi.save_pretrained(tmp_path)
    again = ContextPolicy.from_pretrained(tmp_path)
    assert (
        again.config == pi.config
        and again.config.tasks == TASKS
        and same(again.state_dict(), pi.state_dict())
        and type(again.model) is ContextDT
    )
    h = steps(4, K, 2, dtype=torch.float32)
    assert torch.equal(again.act(h, again.begin([0, 1, 1, 0])), pi.act(h, pi.begin([0, 1, 1, 0])))
    file = tmp_path / "config.json"
    c = json.loads(file.read_text())
    for other in (dict(w_class=0.0), dict(L=L + 1), dict(encoder="none")):
        file.write_text(json.dumps(dict(c, model=dict(c["model"], **other))))
        with pytest.raises((RuntimeError, PromptnbError)):
            ContextPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["none", "full", "lora", "adapter", "soft", "gradient", "ranking"])
def test_other_tuners_on_such_a_policy(name):
    "They begin with the given context, help, and leave the policy alone."
    pi, dem = toy(context=True)
    before = snapshot(pi)
    own = {"steps": 12, "lr": 1e-2} if name not in ("none", "ranking") else {"steps": 6} if name == "ranking" else {}
    out = make_tuner(name, **own).adapt(pi, dem, 0, Judge())
    start = make_tuner(name).starting_point(pi, dem, 0)
    assert same(snapshot(pi), before) and torch.isfinite(actions(out.assignments)).all()
    a, b = demo_error(start, dem), demo_error(out.assignments, dem)
    assert (b < a).all() if name != "none" else (b == a).all()
    if out.log:
        np.testing.assert_allclose([l["loss"] for l in out.log if l["step"] == 0], a, rtol=1e-5)


# ---- tuners that read contexts


def test_encode():
    "The prompt is the given context; contexts of train and test tasks are embedded on the encoder's axes."
    pi, dem = toy(context=True)
    other = replace(
        dem,
        sampler=replace(dem.sampler, store=replace(dem.sampler.store, task=dem.sampler.store.task + 5), prompts=None),
    )
    t = Encode(contexts=4).prepare(pi, [other], 0)
    out = t.adapt(pi, dem, 0)
    look = out.look
    assert (
        same(snapshot(out.assignments[0][0].prompt), snapshot(dem.prompt))
        and out.trainable == out.env_steps == 0
        and [r for _, r in out.assignments] == [0, 1]
    )
    assert look["embedded"].tolist() == [5, 6, 0, 1] and look["unseen"] == 2 and look["embedding"].shape == (4, 4, 3)
    z = (
        torch.cat(
            [
                pi.model.embedding(d.draw(0, 4, seed="contexts")[0].map(lambda x: x.flatten(0, 1)))[0]
                for d in (other, dem)
            ]
        )
        .detach()
        .double()
        .numpy()
    )
    z = z - z.mean(0)
    val, vec = np.linalg.eigh(z.T @ z)
    want = z @ vec[:, ::-1][:, :3]
    close(look["embedding"].flatten(0, 1).abs(), np.abs(want), 1e-4)
    assert (np.diff(look["embedding"].flatten(0, 1).var(0)) < 0).all()


def test_untrained_encoder():
    "Beside it the same contexts as a new model embeds them, the same one each time, whatever the policy has learnt."
    pi, dem = toy(context=True)

    def look(p, seed):
        return (torch.manual_seed(seed), Encode(contexts=4).adapt(p, dem, seed).look)[1]

    a, b = look(pi, 1), look(pi, 2)
    other = pi.clone()
    [p.data.mul_(2) for p in other.parameters()]
    c = look(other, 1)
    assert (
        a["untrained"].shape == a["embedding"].shape == (2, 4, 3)
        and torch.equal(a["untrained"], b["untrained"])
        and torch.equal(a["untrained"], c["untrained"])
        and not torch.equal(a["embedding"], c["embedding"])
    )
    torch.manual_seed(seed_for("untrained"))
    new = ContextDT(pi.config).eval()
    z = new.embedding(dem.draw(0, 4, seed="contexts")[0].map(lambda x: x.flatten(0, 1)))[0].detach()
    close(a["untrained"].flatten(0, 1), components(z), 1e-5)


def test_components():
    g = np.random.default_rng(0)
    x = g.normal(size=(30, 6)) * [9, 5, 2, 0.1, 0.1, 0.1] + 4
    got = components(torch.tensor(x)).numpy()
    z = x - x.mean(0)
    val, vec = np.linalg.eigh(z.T @ z)
    np.testing.assert_allclose(np.abs(got), np.abs(z @ vec[:, ::-1][:, :3]), atol=1e-8)
    assert components(torch.tensor(x), 2).shape == (30, 2)


class Place:
    "An environment of episodes of 3 steps: what is seen is marked with task, replica and the number of the call."

    def __init__(self):
        self.env_steps, self.given = 10, []

    def play(self, c):
        G, m = c.t.shape[:2]
        self.given.append(c)
        self.env_steps += G * m * 3
        mark = (10.0 * torch.arange(G)[:, None] + torch.arange(m) + 100 * len(self.given))[..., None, None]
        return (torch.arange(G)[:, None] + torch.arange(m) / m + 10 * len(self.given)).float(), Steps(
            mark.expand(G, m, 3, 3),
            torch.zeros(G, m, 3, 2),
            mark.expand(G, m, 3, 1),
            torch.arange(3).expand(G, m, 3),
            torch.ones(G, m, 3),
        )


def test_collect():
    "The first episode has the null prompt; each later one everything its own replica has seen; the last context is the first replica's; each episode's mean return is a fact."
    pi, dem = toy(context=True)
    place = Place()
    out = Collect(episodes=3, replicas=2).adapt(pi, dem, 0, place)
    seen = [c.s[..., 0] for c in place.given]
    assert (
        len(seen) == 4
        and not any(getattr(place.given[0], n).any() for n in Steps.__dataclass_fields__)
        and not pi.model.prompt_tokens(place.given[0][:, 0])[0].any()
    )
    for e in (1, 2, 3):
        assert torch.equal(
            seen[e],
            torch.cat([torch.full((2, 2, 3), 100.0 * k) for k in range(1, e + 1)], 2)
            + torch.tensor([[0.0, 1], [10, 11]])[..., None],
        )
    assert (
        torch.equal(out.assignments[0][0].prompt.s, place.given[3].s[:, 0])
        and [r for _, r in out.assignments] == [0, 1]
        and out.trainable == 0
        and out.env_steps == place.env_steps - 10 == 4 * 2 * 2 * 3
    )
    assert [(f["metric"], f["step"], f["task"]) for f in out.facts] == [
        ("episode_return", e, g) for e in range(4) for g in range(2)
    ] and [f["value"] for f in out.facts] == [10 * (e + 1) + g + 0.25 for e in range(4) for g in range(2)]


def test_collect_needs():
    pi, dem = toy(context=True)
    for score in (None, lambda p: 0):
        with raises("needs `score.play`"):
            Collect().adapt(pi, dem, 0, score)
    for t in (Collect(), Encode()):
        with raises("needs a policy with a context encoder"):
            t.adapt(toy()[0], dem, 0, Place())


def test_context_of_one_step():
    net, b = net_and_batch(encoder="transformer")
    assert not net.prompt_tokens(b.prompt.map(lambda f: f[:, -1:]))[0].any()


def test_collect_prepares_nothing():
    def untouchable():
        raise AssertionError("the train tasks were read")
        yield

    Collect().prepare(toy(context=True)[0], untouchable(), 0)


def test_draw_from_the_best():
    _, dem = many()
    best = dem.best(0.1)
    for t in range(5):
        assert (best.draw(t, 8)[0].a > 0.89).all()


@pytest.mark.parametrize("family, quality", [("smax-3m", "good"), ("cheetah-vel", "expert")])
def test_shuffled_actions_are_real(family, quality):
    st = made_up(family, quality, (0,), 4)
    pi = plain_policy(family, encoder="none")
    h = Windows(demos(st, st, pi, n=0, K=20, batch=16, H=1), 0, "shuffled", 1.0).batch(0)
    assert (h.mask == 0).any() and h.a[h.mask > 0].any(-1).all()


def test_another_context_of_one_task():
    with raises("another"):
        multitask.of_others(steps(1, 4))


def test_weight_of_one_window():
    assert (weights(torch.tensor([[3.0]])) == 1).all()


def test_full_fine_tuning_counts_what_moves():
    pi, dem = toy(context=True, tasks=(0, 1), **ALL)
    out = make_tuner("full", steps=2).adapt(pi, dem, 0)
    a, b = pi.model.state_dict(), out.assignments[0][0].model.state_dict()
    assert out.trainable == sum(b[k].numel() for k in b if not torch.equal(a[k], b[k]))


def test_info_nce_in_full_precision():
    z, task = torch.randn(32, D, generator=torch.Generator().manual_seed(0)), torch.arange(32) // 4
    want = info_nce(z, task)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(info_nce(z, task), want)


def test_train_tasks_in_any_order():
    from promptnb import data

    st = data.join([made_up("cheetah-vel", "expert", (i,), 2) for i in (7, 3)], None, mapped=False)
    s = Sampler(st, torch.zeros(20), torch.ones(20), 1.0, 4, 4, H=0)
    b = s.batch(0)
    assert torch.equal(b.history.s[..., 0].amax(1), s.ids[b.task].float())


@pytest.mark.parametrize(
    "kw",
    [
        dict(encoder="one-hot", w_class=1.0),
        dict(encoder="none", w_class=1.0),
        dict(loss_on_prompt=True),
        dict(prompt_norm=True),
    ],
    ids=str,
)
def test_switches_without_effect_are_refused(kw):
    with pytest.raises(PromptnbError):
        ContextDT(ContextConfig(S, A, width=D, tasks=TASKS, **kw))


# ---- data: which tasks, which trajectories, which agents


def made_up(family, quality, ids, episodes, T=12):
    "A Store of a family without its environments: state 0 is the task, state 1 the quality, state 2 the trajectory, state 3 the agent; action j of agent i is its number."
    fam = tasks.family(family)
    q = (*fam.qualities, "").index(quality)
    n = episodes * fam.agents
    g = np.random.default_rng([q, *ids])
    out = []
    for i in ids:
        for e in range(n):
            s = g.normal(size=(T, fam.state_dim))
            s[:, :4] = i, q, e // fam.agents, e % fam.agents
            a = np.tanh(g.normal(size=(T, fam.act_dim)))
            out.append(
                dict(
                    observations=s,
                    actions=np.eye(fam.act_dim)[a.argmax(-1)] if fam.discrete else a,
                    rewards=np.full(T, float(e // fam.agents) - 10 * q),
                )
            )
    return from_arrays(out, np.repeat(ids, n), (f"{family}-{quality}-{'.'.join(map(str, ids))}",))


@pytest.fixture
def asked(monkeypatch):
    "Made-up data in place of collected ones; what was asked for, as (quality, task ids)."
    out = []
    monkeypatch.setattr(
        multitask, "stored", lambda f, q, ids, n: out.append((q, tuple(ids))) or made_up(f, q, tuple(ids), n)
    )
    return out


def recipe(key, family="cheetah-vel", scale="smoke"):
    return rc.resolve(rc.RECIPES[f"cmt/{family}/{key}"], scale)


def plain_policy(family="cheetah-vel", **kw):
    f = tasks.family(family)
    return ContextPolicy(
        asdict(ContextConfig(f.state_dim, f.act_dim, width=D, layers=1, **kw)), K=4, rtg_scale=f.rtg_scale
    )


@pytest.mark.parametrize("n", [None, 2, 3])
def test_batch_task(n):
    "Which of the sampler's tasks each row, and its context, is of; tasks that are not drawn are not there."
    ids = (3, 8, 20, 21)
    st = made_up("cheetah-vel", "expert", ids, 3)
    every = in_order(st, st.task)
    s = Sampler(st, torch.zeros(20), torch.ones(20), 1.0, 4, 5, n, 2, 3, "random", every)
    seen = Counter()
    for t in range(20):
        b = s.batch(t)
        assert b.task.dtype == torch.int64 and len(b.task) == 5 * (n or 4) and (b.history.mask > 0).any(1).all()
        seen.update(b.task.unique().tolist())
        for x in (b.history, b.prompt):
            assert torch.equal(x.s[..., 0], torch.tensor(ids)[b.task].float()[:, None] * x.mask)
        assert set(Counter(b.task.tolist()).values()) == {5}
    assert set(seen) == set(range(4))


def test_best_and_in_order():
    _, dem = many()
    st = dem.sampler.store
    for share, n in ((0.1, 2), (0.25, 5), (1.0, 20), (0.01, 1)):
        b = dem.best(share)
        got = b.sampler.store
        assert (
            Counter(got.task.tolist()) == {3: n, 8: n}
            and b.task_ids == [3, 8]
            and same(snapshot(b.prompt), snapshot(dem.prompt))
        )
        for i in (3, 8):
            assert sorted(got.returns[got.task == i].tolist()) == sorted(st.returns[st.task == i].tolist())[-n:]
        assert all(
            (b.batch(t).s[g, ..., 0] == torch.tensor([3.0, 8])[g] * b.batch(t).mask[g]).all()
            for t in range(5)
            for g in range(2)
        )
    new = in_order(st, torch.arange(40) % 4)
    assert new.task.tolist() == sorted(new.task.tolist()) == sum(([k] * 10 for k in range(4)), [])
    for k in range(4):
        want = [(st.first[i].item(), st.length[i].item()) for i in range(k, 40, 4)]
        assert torch.equal(
            torch.cat([st.s[f : f + n] for f, n in want]), new.s[300 * k : 300 * (k + 1)]
        ) and torch.equal(new.rtg[new.first[new.task == k]], st.returns[k::4])


def test_by_agent(asked):
    "Agent k's prompt and windows are of agent k's trajectories; games stay whole numbers of rows."
    fam = tasks.family("smax-3m")
    st = made_up("smax-3m", "good", (0,), 4)
    of = multitask.by_agent(st, fam)
    assert of.task_ids == (0, 1, 2) and len(of) == 12 and of.s.shape == st.s.shape
    assert (
        all((of.s[of.first[i] : of.first[i] + 12, 3] == of.task[i]).all() for i in range(12))
        and [of.s[of.first[i], 2].item() for i in range(12)] == [0, 1, 2, 3] * 3
    )
    p = replace(recipe("agent-good", "smax-3m").pretrain, episodes=4)
    t = replace(recipe("agent-good", "smax-3m").tune, demos=0)
    dem = multitask.prompts_for(plain_policy("smax-3m", encoder="none"), p, t, 0)
    assert dem.task_ids == [0, 1, 2] and asked == [("good", (0,))]
    for d in (dem, dem.best(0.25)):
        for x in (d.batch(0), d.batch(1)):
            assert (x.s[..., 3] == torch.arange(3)[:, None, None] * x.mask).all()
    assert (
        set(dem.best(0.25).batch(0).s[..., 2].unique().tolist()) == {0.0, 3.0}
        and (dem.prompt.s[..., 3] == torch.arange(3)[:, None] * dem.prompt.mask).all()
    )
    for store, f in (
        (made_up("cheetah-vel", "expert", (3,), 2), tasks.family("cheetah-vel")),
        (replace(st, task=torch.arange(12) // 6), fam),
    ):
        with raises("prompts for each agent need one task with several agents"):
            multitask.by_agent(store, f)


class World:
    "Stands in for a family's environments: row i is rewarded i + t, and ends after its own number of steps."

    made = []

    def __init__(self, fam, ids, ends=None, **kw):
        self.fam, self.ids, self.n = fam, ids, len(ids)
        self.end = np.array(ends or [fam.horizon] * self.n)
        self.acts, self.seeds = [], None
        World.made.append(self)

    def obs(self):
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

    def start(horizon, ends=None, family="cheetah-vel"):
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
    "In every episode agent k has prompt row k; a seat with one row gives it to all."
    made = world(3, family="smax-3m")
    pol, other = Stub(), Stub()
    played = rollout([EvalTask(pol, 0, (0, 1, 2)), EvalTask(other, 0, 1), EvalTask(pol, 0, (2, 0, 1))], "smax-3m", 4)
    assert pol.rows == [0, 1, 2] * 4 + [2, 0, 1] * 4 and other.rows == [1] * 12 and played.returns.shape == (3, 4)
    a = made[0].acts[0].argmax(-1).reshape(3, 4, 3)
    assert (a[0] == [0, 1, 2]).all() and (a[1] == 1).all() and (a[2] == [2, 0, 1]).all()
    assert (
        all(len(set(made[0].seeds[i : i + 3])) == 1 for i in range(0, 36, 3))
        and made[0].seeds[:12] == made[0].seeds[12:24]
    )
    ((_, rows, prompt),) = groups_of([EvalTask(pol, 0, (5, 6)), EvalTask(pol, 0, 3)], 4)
    assert rows.tolist() == list(range(8)) and prompt.tolist() == [5, 6, 5, 6, 3, 3, 3, 3]


def test_contexts_of_train_tasks_alone(asked):
    "Of all the qualities, and of no test task; the middle goals' policy sees the middle goals alone; normalisation as well."
    fam = tasks.family("cheetah-vel")
    for key, ids in (("cmt", fam.train), ("cmt-middle-all", tuple(i for i in range(10, 30) if i not in fam.test))):
        asked.clear()
        p = recipe(key).pretrain
        every = multitask.context_store(p)
        assert (
            asked == [(q, ids) for q in ("expert", "medium", "random")]
            and every.task_ids == ids
            and set(ids).isdisjoint(fam.test)
        )
        assert (
            len(every) == 3 * p.episodes * len(ids)
            and len(every.hashes) == 3
            and all(every.s[every.first, 0] == every.task)
            and every.task.tolist() == sorted(every.task.tolist())
        )
        assert all(set(every.s[every.first[every.task == i], 1].tolist()) == {0.0, 1.0, 2.0} for i in ids)
        asked.clear()
        st, (mean, _), hashes, _ = multitask.train_store(p)
        assert (
            asked == [("expert", ids)]
            and st.task_ids == ids
            and mean[0] == pytest.approx(np.mean(ids))
            and len(hashes) == 1
        )
    assert (
        multitask.context_store(recipe("none-medium", "hopper").pretrain) is None
        and multitask.context_store(recipe("pdt").pretrain) is None
    )


def test_prompt_from(asked):
    "The task's own, another's, or nothing; demonstrations are always the task's own."
    p, t, pi = recipe("cmt").pretrain, rc.Tune(demos=2, demo_batch=4), plain_policy()
    fam = tasks.family("cheetah-vel")

    def get(k, **kw):
        return multitask.prompts_for(pi, p, replace(t, prompt_from=k, **kw), 0)

    ids = torch.tensor(fam.test).float()[:, None]
    own = get("test").prompt
    P = p.J * (p.H + 1)  # an empty step after each segment
    assert own.t.shape == (5, P) == (5, 28) and (own.s[..., 0] == ids * own.mask).all()
    other = get("other").prompt
    of = other.s[..., 0].amax(1)
    assert (
        sorted(of.tolist()) == sorted(fam.test)
        and (of[:, None] != ids).all()
        and same(snapshot(other), snapshot(own[[3, 4, 0, 1, 2]]))
    )
    none = get("none").prompt
    assert none.t.shape == own.t.shape and not any(getattr(none, n).any() for n in Steps.__dataclass_fields__)
    for k in ("test", "other", "none", "train"):
        x = get(k).batch(0)
        assert (x.s[..., 0] == ids[..., None] * x.mask).all()
    train_ids = get("train").prompt.s[..., 0].amax(1).tolist()
    assert set(train_ids) <= set(fam.train)
    with raises("unknown prompt_from 'othr': did you mean 'other'"):
        get("othr")
    every = get("test", play="all", demos=1, demo_batch=1)
    assert (
        every.task_ids == list(range(40))
        and (every.prompt.s[..., 0] == torch.arange(40.0)[:, None] * every.prompt.mask).all()
    )
    with raises("unknown play 'al': did you mean 'all'"):
        get("test", play="al")


def test_all_tasks_are_played(asked, world):
    made = world(3)
    r = recipe("cmt-all")
    pi = plain_policy()
    dem = multitask.prompts_for(pi, r.pretrain, r.tune, 0)
    p = pi.prompted(dem.prompt, dem.task_ids)
    at, played = multitask.evaluate_policy([(p, g) for g in range(40)], r, 2, 0, 1, "cpu")
    assert (
        [s.task for s in at] == list(range(40)) == [s.row for s in at]
        and played.returns.shape == (40, 2)
        and made[0].ids.tolist() == np.repeat(range(40), 2).tolist()
    )


def test_play(world):
    "Each context plays an episode; what is seen has the episode's own rewards, states as the policy reads them, no step after its end; each step is paid for."
    fam = tasks.family("cheetah-vel")
    G, m, T = 5, 2, 8
    ends = [3, 8, 1, 5, 8, 2, 8, 8, 6, 4]
    made = world(T, ends)
    pi = plain_policy(L=L).eval()
    pi.mean.fill_(1.0)
    pi.std.fill_(2.0)
    score = multitask.EnvScore(pi, recipe("collect"), 0, 1, "cpu")
    c = steps(G * m, 6, 0, 2, torch.float32).map(lambda x: x.unflatten(0, (G, m)))
    c = replace(c, s=torch.randn(G, m, 6, 20), a=torch.randn(G, m, 6, 6))
    returns, seen = score.play(c)
    e = torch.tensor(ends)
    assert (
        seen.t.shape == (G, m, T)
        and torch.equal(seen.mask.sum(-1).flatten().long(), e)
        and (seen.mask.diff(dim=-1) <= 0).all()
        and (seen.t == torch.arange(T)).all()
        and score.env_steps == sum(ends)
        and seen.s.shape == (G, m, T, 20)
    )
    x, real = transitions(seen.map(lambda x: x.flatten(0, 1)), fam.rtg_scale)
    flat = seen.map(lambda x: x.flatten(0, 1))
    S_, A_ = 20, 6
    assert real.sum(1).tolist() == [n - 1 for n in ends]
    for i, n in enumerate(ends):
        close(x[i, : n - 1, S_ + A_], [i + t + 0.5 for t in range(n - 1)], 1e-4)
        close(flat.rtg[i, 0, 0] * fam.rtg_scale, sum(i + t + 0.5 for t in range(n)), 1e-4)
        assert returns.flatten()[i] == pytest.approx(sum(i + t + 0.5 for t in range(n)))
        close(flat.s[i, :n, 0] * 2 + 1, torch.full((n,), float(i)))
        close(flat.s[i, :n, 1] * 2 + 1, torch.arange(n).double())
        assert (flat.s[i, :n, 2] * 2 + 1 == fam.test[i // m]).all()
        close(flat.a[i, :n], np.stack([a[i] for a in made[0].acts[:n]]))
        assert not flat.rtg[i, n:].any()
    p = pi.with_prompt(c.map(lambda x: x.flatten(0, 1)))
    w = evaluate.Buffers(10, T, 4, 20, 6, fam.target_return, "cpu")
    w.observe(
        0,
        np.stack([made[0].obs()[:, 0], np.zeros(10), np.repeat(fam.test, m), *np.zeros((17, 10))], 1).astype(
            np.float32
        ),
    )
    close(flat.a[:, 0], p.act(w.window(0), p.begin(range(10))), 1e-5)
    score.play(c)
    assert (
        score.env_steps == 2 * sum(ends) and made[1].seeds != made[0].seeds and len(set(made[0].seeds)) == G * m
    )  # replicas of a task start apart; so does the next call


def test_scores_where_due():
    def row(task, metric, value):
        return Row("cmt", task, 0, "m", 0, "smoke", 0, metric, value, 1, 0, 0, "r")

    got = list(
        multitask.score_rows(
            [
                row("hopper", "return", 3234.3),
                row("hopper", "length", 9),
                row("smax-3m", "success", 0.25),
                row("smax-3m", "return", 1.0),
                row("cheetah-vel", "return", -5.0),
                row("ml1-reach", "success", 1.0),
                row("cheetah-vel", "length", 200),
            ]
        )
    )
    assert [(g.task, g.metric, round(g.value, 6)) for g in got] == [
        ("hopper", "score", 100.0),
        ("smax-3m", "score", 25.0),
    ]


# ---- jobs, at smoke scale

T_SHORT, KEYS = 12, ("cmt", "null", "wrong", "collect", "tuned", "random", "one-hot")


def workbook(tmp, m):
    "A workbook of its own with made-up data and short episodes."
    (tmp / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    m.setenv("PROMPTNB_HOME", str(tmp))
    m.delenv("MINARI_DATASETS_PATH", raising=False)
    m.setattr(os, "fsync", lambda _: None)
    m.setattr(multitask, "stored", lambda f, q, ids, n: made_up(f, q, tuple(ids), n))
    m.setattr(run, "provenance", lambda d="cpu": dict(device="-", threads=1, commit="-"))
    m.setitem(tasks.FAMILIES, "cheetah-vel", replace(tasks.family("cheetah-vel"), horizon=T_SHORT))
    return tmp


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "{key: record} of smoke runs that share a workbook."
    with pytest.MonkeyPatch.context() as m:
        home = workbook(tmp_path_factory.mktemp("home"), m)
        out = {k: read_json(multitask.tune(recipe(k), "smoke", 0, torch.device("cpu"), 1)) for k in KEYS}
        pre = {
            k: read_json(run.record_path("cmt", run.pretrain_run(recipe(k).pretrain, "smoke", 0)))
            for k in ("cmt", "one-hot")
        }
        policy = {k: multitask.load_policy(home / v["folder"] / "policy", recipe(k).pretrain) for k, v in pre.items()}
    return out, pre, policy


def of(rec, metric):
    return {(w["task_id"], w["step"]): w["value"] for w in rec["rows"] if w["metric"] == metric}


def test_records(finished):
    recs, pre, policy = finished
    fam = tasks.family("cheetah-vel")
    for k, r in recs.items():
        assert (
            r["status"] == "ok"
            and r["why"] == ""
            and r["recipe_digest"] == rc.digest(recipe(k))
            and {i for i, _ in of(r, "return")} == set(fam.test)
            and not of(r, "score")
            and all(math.isfinite(w["value"]) for w in r["rows"])
        ), k
        assert (
            r["counts"]["total"]
            == sum(x.numel() for x in policy["one-hot" if k == "one-hot" else "cmt"].model.parameters())
            and r["floor"] is None
            and all(w["trainable"] == r["counts"]["trainable"] and w["paper"] == "cmt" for w in r["rows"])
        )
        assert (
            r["counts"]["trainable"] == (5 * 16 if k == "tuned" else 0)
            and {w["env_steps"] for w in r["rows"]} == {5 * 5 * 4 * T_SHORT if k == "collect" else 0}
            and bool(r["look"]) == (k == "cmt")
        )
    assert {(i, s) for i, s in of(recs["collect"], "episode_return")} == {
        (i, s) for i in fam.test for s in range(5)
    } and not of(recs["cmt"], "episode_return")
    assert (
        {s for _, s in of(recs["tuned"], "demo_loss")} == {0, 2}
        and {s for _, s in of(recs["random"], "demo_loss")} == {0}
        and {w["step"] for w in recs["tuned"]["rows"] if w["metric"] == "return"} == {2}
    )
    ret = {k: tuple(of(r, "return").values()) for k, r in recs.items()}
    assert len(set(ret.values())) == len(KEYS), ret  # each acts in its own way
    assert (
        len(pre["cmt"]["data"]) == 4
        and pre["cmt"]["status"] == "ok"
        and [s for _, s in of(pre["cmt"], "loss")][-1] == 20
        and {s for i, s in of(pre["cmt"], "return") if i != -1} == {5, 10, 15, 20}
    )
    assert len(set(r["run_id"] for r in recs.values())) == len(KEYS)


def test_what_is_looked_at(finished):
    "The figure's numbers: all train tasks, then the test tasks, with their goals."
    look, fam = finished[0]["cmt"]["look"], tasks.family("cheetah-vel")
    ids = look["embedded"]
    assert (
        [int(i) for i in ids] == [*fam.train, *fam.test]
        and look["unseen"] == 5
        and np.array(look["embedding"]).shape == (40, 8, 3)
        and look["goals"] == [fam.goals[int(i)] for i in ids]
        and np.isfinite(look["embedding"]).all()
    )


def test_policies(finished):
    "The encoder's policy has the family's reward scale, train tasks and sizes; the upper bound a row for each of the 40 tasks; heads where they are trained."
    _, _, p = finished
    fam = tasks.family("cheetah-vel")
    a, b = p["cmt"].config, p["one-hot"].config
    assert (
        (a.encoder, a.tasks, a.reward_scale, a.L, a.null, a.w_state, a.w_return, a.w_nce, a.w_class, a.width)
        == ("mean", fam.train, fam.rtg_scale, 5, 0.1, 0.1, 0.1, 0.1, 0.0, 16)
        and a.shared_embed
        and a.prompt
        and not a.discrete
    )
    assert (
        b.encoder == "one-hot"
        and b.tasks == tuple(range(40))
        and p["one-hot"].model.table.shape == (40, 5, 16)
        and p["cmt"].model.classify is None
        and p["cmt"].model.next_state is not None
        and p["cmt"].rtg_scale == fam.rtg_scale
        and p["cmt"].K == 20
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [7, 19])
def test_killed_in_pretraining(at, finished, tmp_path, monkeypatch):
    "The run that goes on ends with the weights and the rows of an unbroken one, forgotten contexts and all."
    home = workbook(tmp_path, monkeypatch)
    step, r, dev = train.step_once, recipe("cmt"), torch.device("cpu")

    def step_once(model, opt, batch, t, *a):
        if t == at:
            raise Killed
        return step(model, opt, batch, t, *a)

    monkeypatch.setattr(train, "step_once", step_once)
    with pytest.raises(Killed):
        multitask.pretrain(r, "smoke", 0, dev, 1)
    assert not (home / "data" / "results").exists()
    monkeypatch.setattr(train, "step_once", step)
    torch.manual_seed(99)
    p = multitask.pretrain(r, "smoke", 0, dev, 1)
    rec = read_json(run.record_path("cmt", run.pretrain_run(r.pretrain, "smoke", 0)))
    assert same(p.state_dict(), finished[2]["cmt"].state_dict()) and {
        k: rec[k] for k in ("rows", "data", "weights", "status", "recipe_digest")
    } == {k: finished[1]["cmt"][k] for k in ("rows", "data", "weights", "status", "recipe_digest")}
    monkeypatch.setattr(train, "step_once", step_once)
    assert same(multitask.pretrain(r, "smoke", 0, dev, 1).state_dict(), p.state_dict())  # nothing is trained again


def test_diverged(tmp_path, monkeypatch):
    "A NaN in pre-training: both records say so, and the job goes on to the next."
    workbook(tmp_path, monkeypatch)
    losses = ContextDT.losses
    r = recipe("null")
    monkeypatch.setattr(
        ContextDT,
        "losses",
        lambda self, b: {k: v * (float("nan") if b.task is not None else 1) for k, v in losses(self, b).items()},
    )
    rec = read_json(multitask.tune(r, "smoke", 0, torch.device("cpu"), 1))
    pre = read_json(run.record_path("cmt", run.pretrain_run(r.pretrain, "smoke", 0)))
    assert (
        (rec["status"], rec["why"], rec["rows"]) == ("diverged", "its pre-training diverged", [])
        and pre["status"] == "diverged"
        and "loss is nan at step 0" in pre["why"]
        and pre["weights"] == ""
        and run.finished(r, rec["run_id"])
    )


# ---- recipes

EXHIBITS = [e for e in rc.exhibits("cmt") if not e.unknown]


def test_no_published_number():
    lines = (ROOT / "data" / "reported" / "cmt.csv").read_text().splitlines()
    assert (
        len(lines) == 1
        and lines[0].startswith("exhibit,method,family,value")
        and not any(e.reported for e in rc.exhibits("cmt"))
    )
    assert all(
        "reconstruction" in x.lower() or "could not be had" in x
        for x in (rc.PAPERS["cmt"], *(e.protocol for e in EXHIBITS))
    ) and {e.id for e in rc.exhibits("cmt")} - {e.id for e in EXHIBITS} == {"tables", "figures"}
    if (nb := ROOT / "nbs" / "papers" / "cmt.ipynb").exists():
        out = "".join(
            str(o.get("text", "")) + str(o.get("data", ""))
            for c in json.loads(nb.read_text())["cells"]
            if c["cell_type"] == "code"
            for o in c["outputs"]
        )
        assert "| reported" not in out and ": reported" not in out


@pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)
def test_exhibits(e):
    "Families exist, hyper-parameters are known, qualities are collected, and at every scale each recipe is run by one job."
    assert (
        e.recipes
        and set(e.families) == {rc.RECIPES[i].family for i in e.recipes}
        and set(e.labels) <= {i for x in EXHIBITS for i in x.recipes}
    )
    for scale in rc.SCALES:
        for r in (rc.resolve(rc.RECIPES[i], scale) for i in e.recipes):
            fam = tasks.family(r.family)
            make_tuner(r.tune.tuner, **dict(r.tune.hyper))
            assert (
                {q for q, _ in plan.data_needs(r)} <= set(fam.qualities)
                and set(r.pretrain.train) <= set(fam.task_ids)
                and r.paper == "cmt"
            )
            if x := r.pretrain.context:
                assert x.encoder == "none" or set(x.qualities) <= {q for q, _ in plan.data_needs(r)}
                assert (x.encoder == "none") == (not r.pretrain.prompt)
            if r.pretrain.train:
                assert list(r.pretrain.train) == sorted(r.pretrain.train)


def test_every_recipe_has_one_job():
    js = rc.jobs("cmt").values()
    tuned = [i for j in js if j.kind == "tune" for i in j.recipes]
    assert (
        sorted(tuned) == sorted({i for e in EXHIBITS for i in e.recipes})
        and len(tuned) == len(set(tuned))
        and {j.kind for j in js} == {"pretrain", "tune"}
    )
    pre = [rc.RECIPES[i].pretrain for j in js if j.kind == "pretrain" for i in j.recipes]
    assert len(pre) == len(set(pre)) and set(pre) == {rc.RECIPES[i].pretrain for i in tuned}


def test_controls():
    "The one thing that a control changes."
    own = {
        k: rc.RECIPES[f"cmt/cheetah-vel/{k}"]
        for k in ("cmt", "null", "wrong", "collect", "tuned", "random", "shuffled", "full", "lora")
    }
    assert len({r.pretrain for r in own.values()}) == 1
    hyper = {k: dict(r.tune.hyper) for k, r in own.items()}
    assert hyper["tuned"] == dict(hyper["random"], steps=100, begin="encoded")
    assert hyper["random"]["steps"] == 0 and hyper["shuffled"] == dict(hyper["tuned"], towards="shuffled")
    assert [own[k].tune.prompt_from for k in ("cmt", "null", "wrong", "collect", "tuned")] == [
        "test",
        "none",
        "other",
        "none",
        "test",
    ] and all(rc.resolve(r, s).tune.prompt_from == r.tune.prompt_from for r in own.values() for s in rc.SCALES)
    assert all(dict(rc.resolve(own["random"], s).tune.hyper)["steps"] == 0 for s in rc.SCALES)
    for e, f in (("single", "hopper"), ("skirmish", "smax-3m")):
        rs = [r for r in rc.recipes_of(rc.EXHIBITS["cmt", e]) if r.family == f and r.pretrain.quality in ("medium",)]
        assert len({r.pretrain for r in rs}) == 1 and all(
            r.tune.demo_quality == r.tune.prompt_quality == "medium" and r.tune.demos == 0 for r in rs
        )
    ablated = {i: rc.RECIPES[i].pretrain for i in rc.EXHIBITS["cmt", "ablation"].recipes}
    base = ablated["cmt/cheetah-vel/cmt"]
    assert (
        len(ablated) == len(set(ablated.values())) == 11
        and all(
            p == base
            or {k for k in asdict(p) if asdict(p)[k] != asdict(base)[k]} in ({"name", "context"}, {"name", "J"})
            for p in ablated.values()
        )
        and set(rc.EXHIBITS["cmt", "ablation"].labels) == set(ablated)
    )
    middle = rc.RECIPES["cmt/cheetah-vel/cmt-middle-all"].pretrain
    assert (
        middle.train
        and set(middle.train).isdisjoint(tasks.family("cheetah-vel").test)
        and replace(middle, train=(), name="cmt") == replace(base, name="cmt")
    )


def test_three_touch_points():
    "A tuner is a line of the registry, its module, and recipe rows: no other module names one of ours."
    import re

    files = {
        str(p.relative_to(ROOT / "promptnb")): p.read_text()
        for p in (ROOT / "promptnb").rglob("*.py")
        if p.name != "_modidx.py"
    }
    for word in ("ContextVectors", "Collect", "Encode", '"encode"'):
        assert {f for f, x in files.items() if re.search(rf"(?<![\w.]){word}(?![\w])", x)} <= {
            "tuners/core.py",
            "tuners/context.py",
            "recipes/cmt.py",
            "models/context.py",
        }, word
    with raises("unknown tuner 'encod': did you mean 'encode'"):
        make_tuner("encod")
    with raises("hyper-parameter of tuner 'collect'.*did you mean 'replicas'"):
        make_tuner("collect", replica=1)


def test_old_results_stay_valid():
    "Fields that came with this paper say nothing where they are not used."
    import hashlib

    r = rc.RECIPES["prompt_tuning_dt/cheetah-dir/lora"]
    old = {
        k: v
        for k, v in asdict(r.pretrain).items()
        if k not in ("ratio", "ratio_seed", "context", "train", "activation", "mlp_ratio", "tanh")
    }
    assert rc.digest(r.pretrain) == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()[:10]
    for new in (
        replace(r, pretrain=replace(r.pretrain, train=(1,))),
        replace(r, pretrain=replace(r.pretrain, context=rc.Context())),
        replace(r, tune=replace(r.tune, play="all")),
        replace(r, tune=replace(r.tune, per_agent=True)),
    ):
        assert rc.digest(new) != rc.digest(r)


@pytest.fixture
def without_smax(monkeypatch):
    import sys

    for m in [m for m in sys.modules if m.startswith(("jaxmarl.", "promptnb.tasks.smax"))]:
        monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, "jaxmarl", None)


def test_without_the_extra(without_smax, tmp_home, monkeypatch, capsys):
    "Skirmishes are left out with the line that installs them; asked for by name they are refused in one line."
    seen = []
    monkeypatch.setattr(
        cli.subprocess, "run", lambda cmd, **kw: seen.append(cmd) or SimpleNamespace(returncode=0, stdout="")
    )
    monkeypatch.setattr(cli, "expected", lambda *a, **kw: "expected: -")
    assert cli.main(["run", "cmt", "--dry-run", "--scale", "smoke"]) == 0
    out, err = capsys.readouterr()
    assert (
        err.strip() == "skirmish is left out: pip install 'promptnb[smax]'"
        and "skirmish" not in out
        and "--dry-run" in seen[-1]
        and any(x == "exhibits=" + ",".join(e.id for e in EXHIBITS if e.id != "skirmish") for x in seen[-1])
    )
    assert cli.main(["run", "cmt", "--exhibit", "skirmish", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("promptnb: smax-3m needs the package jaxmarl")
        and err.count("\n") == 1
        and "pip install 'promptnb[smax]'" in err
        and len(seen) == 1
    )
    assert cli.main(["run", "cmt", "--exhibit", "tables"]) == 2 and "could not be had" in capsys.readouterr().err
