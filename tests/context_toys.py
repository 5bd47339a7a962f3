"""What the tests of the Contextual Meta Transformer share: its formulas, plainly, and data without environments."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_parity import attention, linear, norm

from promptnb import recipes as rc
from promptnb import tasks
from promptnb.core import Batch, PromptnbError, Steps
from promptnb.data import demos, from_arrays
from promptnb.models.context import ContextConfig, ContextDT, ContextPolicy
from promptnb.models.dt import DTConfig, Policy

S, A, K, L, D = 4, 3, 5, 3, 16
TASKS = (2, 5, 7)
ALL = dict(w_state=0.3, w_return=0.7, w_nce=0.2, w_class=0.4)  # every loss of pre-training, each with its own weight
FIELDS = tuple(Steps.__dataclass_fields__)


def close(a, b, tol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tol, atol=tol)


def raises(text):
    return pytest.raises(PromptnbError, match=rf"^[^\n]*{text}[^\n]*$")  # one line


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


def squash(c, z):
    "After an embedding."
    return torch.tanh(z) if c.tanh else z


def bend(c, z):
    "Between the layers of an MLP."
    return z.clamp(min=0) if c.activation == "relu" else z * (1 + torch.erf(z / math.sqrt(2))) / 2


def plain_hidden(w, c, h, vectors=None):
    "Last block's outputs at the 3K history tokens (B, 3K, d)."
    t = w["embed.t.weight"][h.t.clamp(max=c.max_timestep - 1)]
    mask = h.mask.repeat_interleave(3, 1)
    each = [squash(c, linear(w, f"embed.{n}", x)) + t for n, x in (("rtg", h.rtg * c.use_rtg), ("s", h.s), ("a", h.a))]
    x = norm(w, "ln_in", torch.stack([each[j][:, i] for i in range(h.t.shape[1]) for j in range(3)], 1))
    if vectors is not None:
        x, mask = torch.cat([vectors, x], 1), torch.cat([torch.ones(vectors.shape[:2]).to(mask), mask], 1)
    for b in range(c.layers):
        n = f"blocks.{b}"
        x = x + attention(w, n, norm(w, f"{n}.ln1", x), mask, c.heads)
        x = x + linear(w, f"{n}.out", bend(c, linear(w, f"{n}.fc", norm(w, f"{n}.ln2", x))))
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
    """Mean over contexts i that have others of their task.

    Of each: mean over these others j of -log(exp(cos_ij / T) / sum over k != i of exp(cos_ik / T))."""

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
    out, vectors = {}, None
    if c.encoder == "one-hot":
        vectors = torch.stack([w["table"][k] for k in b.task.tolist()])
    elif c.encoder != "none":
        vectors, out = plain_context_losses(w, c, b)
    x = plain_hidden(w, c, b.history, vectors)
    out["action"] = plain_action_loss(c, plain_read(w, c, x[:, 1::3]), b.history)
    return out | plain_next_losses(w, c, norm(w, "ln_out", x), b.history)


def plain_context_losses(w, c, b):
    "(the context's vectors, {name: weighted loss} of contexts that say something)"
    some, out = [bool(r) for r in plain_transitions(b.prompt, 1.0)], {}
    z = plain_embedding(w, c, b.prompt)
    vectors = plain_vectors(w, c, z, some)
    z, task = z[some], b.task[some]
    if c.w_nce:
        out["nce"] = c.w_nce * plain_nce(z, task.tolist(), c.temperature)
    if c.w_class:
        chosen = plain_choices(linear(w, "classify", z), torch.eye(len(c.tasks))[task], torch.ones(len(z)))
        out["class"] = c.w_class * chosen.mean()
    return vectors, out


def plain_action_loss(c, pred, h):
    "Of real steps alone: nats of the chosen action, or the mean squared error."
    if c.discrete:
        return plain_choices(pred, h.a, h.mask).mean()
    real = map(tuple, h.mask.nonzero().tolist())
    return torch.stack([((pred[i] - h.a[i]) ** 2).mean() for i in real]).mean()


def plain_next_losses(w, c, y, h):
    "{name: weighted loss} of the next state and return-to-go, predicted at the action of each step with a next one."
    rows, n = h.t.shape
    pairs = [(b, i) for b in range(rows) for i in range(n - 1) if h.mask[b, i] and h.mask[b, i + 1]]
    out = {}
    for name, weight, target in (("state", c.w_state, h.s), ("return", c.w_return, h.rtg)):
        if weight:
            each = [((linear(w, f"next_{name}", y[b, 3 * i + 2]) - target[b, i + 1]) ** 2).mean() for b, i in pairs]
            out[name] = weight * torch.stack(each).mean()
    return out


def steps(B, n, seed=0, pad=0, dtype=torch.float64, discrete=False, segment=None):
    """Random steps (B, n, .), each row with up to `pad` steps of padding in front.

    With `segment`, they are segments of that length, each beginning 50 timesteps later."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(n) >= torch.randint(pad + 1, (B, 1), generator=g)).to(dtype)

    def r(*d):
        return torch.randn(B, n, *d, generator=g, dtype=dtype)

    a = torch.eye(A, dtype=dtype)[torch.randint(A, (B, n), generator=g)] if discrete else r(A).tanh()
    i = torch.arange(n)
    if segment is None:
        t = i.expand(B, n)
    else:
        t = i // segment * 50 + i % segment + torch.randint(40, (B, 1), generator=g)
    return Steps(r(S) * mask[..., None], a * mask[..., None], r(1) * mask[..., None], t * mask.long(), mask)


def net_and_batch(dtype=torch.float64, seed=0, B=8, empty=(), **kw):
    "A net with large random weights, and a batch of 3 tasks with padding; contexts `empty` say nothing."
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    sizes = dict(width=D, layers=2, heads=2, max_timestep=120, L=L, tasks=TASKS, reward_scale=3.0, temperature=0.5)
    net = ContextDT(ContextConfig(S, A, **{**sizes, **kw})).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    c = steps(B, 12, seed + 1, 3, dtype, segment=4)
    mask = c.mask.clone()
    mask[list(empty)] = 0
    history = steps(B, K, seed, K - 2, dtype, kw.get("discrete", False))
    return net.to(dtype), Batch(history, replace(c, mask=mask), torch.arange(B) % 3)


def made_up(family, quality, ids, episodes, T=12):
    """A Store of a family without its environments.

    The first four entries of a state tell task, quality, trajectory and agent."""
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


def recipe(key, family="cheetah-vel", scale="smoke"):
    return rc.resolve(rc.RECIPES[f"cmt/{family}/{key}"], scale)


def plain_policy(family="cheetah-vel", **kw):
    f = tasks.family(family)
    return ContextPolicy(
        asdict(ContextConfig(f.state_dim, f.act_dim, width=D, layers=1, **kw)), K=4, rtg_scale=f.rtg_scale
    )


def many(n=20, T=30, tasks=(3, 8)):
    """(policy, demonstrations): trajectory i of a task has actions i / n and rewards of i.

    States are random but for the task's id."""
    g = np.random.default_rng(0)
    torch.manual_seed(0)
    trajectories = [
        dict(
            observations=np.concatenate([np.full((T, 1), k), g.normal(size=(T, 2))], 1),
            actions=np.full((T, 2), i / n),
            rewards=np.full(T, float(i)),
        )
        for k in tasks
        for i in g.permutation(n)
    ]
    store = from_arrays(trajectories, np.repeat(tasks, n))
    policy = Policy(asdict(DTConfig(3, 2, width=D, layers=1, prompt=False)), K=4, rtg_scale=12.0).eval()
    return policy, demos(store, store, policy, n=0, K=4, batch=16, H=3)
