"The library's fast paths against the papers' formulas, written out with nothing of the library but its weights."

import itertools
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import chisquare, trim_mean

from promptnb import tasks
from promptnb.core import Batch, Steps
from promptnb.data import Demos, Sampler, from_arrays, state_stats
from promptnb.models.dt import DTConfig, Policy, PromptDT
from promptnb.report import stats
from promptnb.tuners.core import prompt_loss
from promptnb.tuners.ranking import PreferenceRanking, PromptVector, Resampling, rank_weights

S, A, K, P = 5, 3, 6, 4

# ---- Prompt-DT, plainly: one sequence, every token through every block, attention head by head


def linear(w, n, x):
    return x @ w[f"{n}.weight"].T + w[f"{n}.bias"]


def norm(w, n, x):
    d = x - x.mean(-1, keepdim=True)
    return d / (d.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{n}.weight"] + w[f"{n}.bias"]


def embedded(w, n, x, rows):
    "Tokens (B, 3K, d) in the order rtg, s, a; the timestep's embedding is added to all three."
    t = w[f"{n}.t.weight"][x.t.clamp(max=rows - 1)]
    each = [linear(w, f"{n}.rtg", x.rtg) + t, linear(w, f"{n}.s", x.s) + t, linear(w, f"{n}.a", x.a) + t]
    return torch.stack([each[j][:, i] for i in range(x.t.shape[1]) for j in range(3)], 1)


def attention(w, n, x, mask, heads):
    "Causal softmax attention; a padded key's logit is lowered by 1e4."
    T, d = x.shape[1:]
    v = d // heads
    q, (k, u) = linear(w, f"{n}.q", x), linear(w, f"{n}.kv", x).split(d, -1)
    later = torch.ones(T, T).triu(1).bool()
    out = []
    for h in range(heads):
        c = slice(h * v, (h + 1) * v)
        logits = (
            torch.stack([(q[:, i, None, c] * k[..., c]).sum(-1) for i in range(T)], 1) / math.sqrt(v)
            - 1e4 * (1 - mask)[:, None]
        )
        logits = logits.masked_fill(later, -math.inf)
        e = (logits - logits.amax(-1, keepdim=True)).exp()
        out.append((e / e.sum(-1, keepdim=True)) @ u[..., c])
    return linear(w, f"{n}.proj", torch.cat(out, -1))


def plain(w, c, b):
    "Actions at all state tokens (B, P + K, A), prompt first; their targets and mask."
    h, steps = b.history, [b.prompt, b.history] if c.prompt else [b.history]
    if not c.use_rtg:
        h = Steps(h.s, h.a, torch.zeros_like(h.rtg), h.t, h.mask)
    x = norm(w, "ln_in", embedded(w, "embed", h, c.max_timestep))
    if c.prompt:
        p = embedded(w, "embed" if c.shared_embed else "embed_prompt", b.prompt, c.max_timestep)
        x = torch.cat([norm(w, "ln_in", p) if c.prompt_norm else p, x], 1)
    mask = torch.cat([y.mask for y in steps], 1).repeat_interleave(3, 1)
    for i in range(c.layers):
        n = f"blocks.{i}"
        x = x + attention(w, n, norm(w, f"{n}.ln1", x), mask, c.heads)
        x = x + linear(w, f"{n}.out", linear(w, f"{n}.fc", norm(w, f"{n}.ln2", x)).clamp(min=0))
    return (
        torch.tanh(linear(w, "head", norm(w, "ln_out", x)))[:, 1::3],
        torch.cat([y.a for y in steps], 1),
        torch.cat([y.mask for y in steps], 1),
    )


def plain_loss(w, c, b):
    "Mean over the entries of real actions, of the history alone unless the paper's switch adds the prompt's."
    pred, target, mask = plain(w, c, b)
    if c.prompt and not c.loss_on_prompt:
        pred, target, mask = (z[:, b.prompt.t.shape[1] :] for z in (pred, target, mask))
    return ((pred - target) ** 2)[mask.bool()].mean()


def fake(g, B, n, dtype, most):
    "Random steps; row i starts with up to `most` steps of padding, at least one real step in each."
    pad = torch.randint(most + 1, (B, 1), generator=g)
    mask = (torch.arange(n) >= pad).to(dtype)

    def r(*d):
        return torch.randn(B, n, *d, generator=g, dtype=dtype)

    return Steps(
        r(S) * mask[..., None],
        r(A).tanh() * mask[..., None],
        r(1) * mask[..., None],
        torch.randint(12, (B, n), generator=g) * mask.long(),
        mask,
    )


def net_and_batch(dtype=torch.float64, seed=0, B=7, **switch):
    "A net with large random weights, biases and gains included, and a batch with padding in history and prompt."
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    net = PromptDT(DTConfig(S, A, width=16, max_timestep=10, **switch)).eval()  # some timesteps lie beyond the table
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return net.to(dtype), Batch(
        fake(g, B, K, dtype, K - 1), fake(g, B, P, dtype, P // 2) if net.config.prompt else None
    )


def computed(net, b, prompt=None):
    return net.prefix(*net.prompt_tokens(prompt or b.prompt)) if net.config.prompt else None


def close(a, b, tol):
    return torch.testing.assert_close(a, b, rtol=0, atol=tol)


SWITCHES = [
    dict(),
    dict(loss_on_prompt=True),
    dict(prompt_norm=True),
    dict(shared_embed=True),
    dict(prompt=False),
    dict(use_rtg=False),
    dict(prompt=False, use_rtg=False),
    dict(loss_on_prompt=True, prompt_norm=True, shared_embed=True),
]
SWITCHES = [dict(s, heads=h) for s in SWITCHES for h in (1, 2)]
switches = pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
precisions = pytest.mark.parametrize(
    "dtype, tol", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)


@precisions
@switches
def test_actions_and_loss(switch, dtype, tol):
    for seed in range(3):
        net, b = net_and_batch(dtype, seed, **switch)
        w = net.state_dict()
        pred, _, mask = plain(w, net.config, b)
        close(net(b.history, computed(net, b)), pred[:, -K:], tol)
        close(net(b.history, computed(net, b), last=True), pred[:, -1:], tol)
        close(net.loss(b).to(dtype), plain_loss(w, net.config, b), tol)
        if net.config.prompt:
            close(net.prefix(*net.prompt_tokens(b.prompt), predict=True)[1], pred[:, :P], tol)


@precisions
@switches
def test_gradients(switch, dtype, tol):
    net, b = net_and_batch(dtype, **switch)
    names, params = zip(*net.named_parameters())
    fast = torch.autograd.grad(net.loss(b), params)
    slow = torch.autograd.grad(plain_loss(dict(zip(names, params)), net.config, b), params)
    for n, x, y in zip(names, fast, slow):
        torch.testing.assert_close(x, y, rtol=10 * tol, atol=10 * tol, msg=f"{n}: {(x - y).abs().max()} apart")


def test_padding_is_never_read():
    net, b = net_and_batch()
    g = torch.Generator().manual_seed(1)
    real = b.history.mask.bool()

    def other(x):
        return Steps(
            *(
                torch.where(
                    x.mask.view(*x.mask.shape, *[1] * (v.dim() - 2)) > 0,
                    v,
                    v + torch.randint(1, 9, v.shape, generator=g),
                )
                for v in (x.s, x.a, x.rtg, x.t)
            ),
            x.mask,
        )

    c = Batch(other(b.history), other(b.prompt))
    close(net(c.history, computed(net, c))[real], net(b.history, computed(net, b))[real], 1e-12)


def test_a_shared_prompt_is_each_rows_prompt():
    net, b = net_and_batch()
    one, rows = b.prompt[2:3], torch.tensor([3, 0, 0, 6, 5, 1, 3])
    each = Batch(b.history, one.map(lambda x: x.expand(len(b), *x.shape[1:])))
    close(net(b.history, computed(net, b, one)), plain(net.state_dict(), net.config, each)[0][:, P:], 1e-12)
    close(
        net(b.history, computed(net, b)[rows]),
        plain(net.state_dict(), net.config, Batch(b.history, b.prompt[rows]))[0][:, P:],
        1e-12,
    )


def test_policy_normalises_and_acts_row_by_row():
    net, b = net_and_batch()
    rows = [3, 0, 0, 6, 5, 1, 3]
    pi = Policy(dict(state_dim=S, act_dim=A, width=16, max_timestep=10), K=K, rtg_scale=7.0).double()
    pi.model.load_state_dict(net.state_dict())
    pi.mean.copy_(torch.arange(S))
    pi.std.copy_(torch.arange(S) + 2.0)
    pi = pi.with_prompt(b.prompt)
    h = b.history
    raw = Steps(h.s * pi.std + pi.mean, h.a, h.rtg * 7, h.t, h.mask)
    want = plain(net.state_dict(), net.config, Batch(h, b.prompt[rows]))[0][:, -1]
    close(pi.act(raw, pi.begin(rows)), want.float(), 1e-6)
    for i, r in enumerate(rows):
        close(pi.act(raw[i : i + 1], pi.begin([r])), want[i : i + 1].float(), 1e-6)


@pytest.mark.parametrize("rows", [1, 20, 4096])
@pytest.mark.parametrize("switch", [dict(), dict(shared_embed=True, use_rtg=False, heads=2)], ids=str)
def test_many_prompts_in_one_forward(switch, rows):
    "Scores of m prompts of G tasks, in chunks or not: each is the mean of its task's windows' errors."
    net, _ = net_and_batch(torch.float32, **switch)
    g = torch.Generator().manual_seed(1)
    G, m, B = 2, 5, 4
    prompts = fake(g, G * m, P, torch.float32, P // 2).map(lambda x: x.unflatten(0, (G, m)))
    h = fake(g, G * B, K, torch.float32, K // 2).map(lambda x: x.unflatten(0, (G, B)))
    pi = Policy(dict(state_dim=S, act_dim=A, width=16, max_timestep=10, **switch)).eval()
    pi.model.load_state_dict(net.state_dict())

    def one(j, i):
        b = Batch(h[j], prompts[j, i : i + 1].map(lambda x: x.expand(B, *x.shape[1:])))
        return np.mean(
            [
                plain_loss(net.state_dict(), net.config, Batch(b.history[k : k + 1], b.prompt[k : k + 1])).item()
                for k in range(B)
            ]
        )

    np.testing.assert_allclose(
        prompt_loss(pi, prompts, h, rows=rows), [[one(j, i) for i in range(m)] for j in range(G)], rtol=1e-5
    )


def gpt2_of(net, heads):
    "transformers' GPT-2 of three blocks with the weights of `net`, and no positions."
    from transformers import GPT2Config, GPT2Model

    gpt = GPT2Model(
        GPT2Config(
            vocab_size=1,
            n_positions=64,
            n_embd=16,
            n_layer=3,
            n_head=heads,
            activation_function="relu",
            attn_implementation="eager",
        )
    ).eval()
    ours = net.state_dict()
    theirs = {"wte.weight": gpt.wte.weight, "wpe.weight": torch.zeros_like(gpt.wpe.weight)}
    for kind in ("weight", "bias"):
        theirs[f"ln_f.{kind}"] = ours[f"ln_out.{kind}"]
        for i in range(3):
            for name, own in (("ln_1", "ln1"), ("ln_2", "ln2")):
                theirs[f"h.{i}.{name}.{kind}"] = ours[f"blocks.{i}.{own}.{kind}"]
            # GPT-2's Conv1D holds the transpose, and queries, keys and values in one
            for name, own in (
                ("attn.c_attn", ["q", "kv"]),
                ("attn.c_proj", ["proj"]),
                ("mlp.c_fc", ["fc"]),
                ("mlp.c_proj", ["out"]),
            ):
                theirs[f"h.{i}.{name}.{kind}"] = torch.cat([ours[f"blocks.{i}.{o}.{kind}"] for o in own]).t()
    gpt.load_state_dict(theirs)
    return gpt


def whole_sequence(net, b):
    "Tokens of prompt and history in one row, and their mask."
    prompt, mask = net.prompt_tokens(b.prompt)
    x = torch.cat([prompt, net.ln_in(net.embed(b.history))], 1)
    return x, torch.cat([mask, b.history.mask.repeat_interleave(3, 1)], 1)


@pytest.mark.parametrize("heads", [1, 2])
def test_blocks_are_gpt2s(heads):
    "The same weights in transformers' GPT-2 give the same hidden states and actions."
    net, b = net_and_batch(torch.float32, heads=heads, layers=3)
    gpt = gpt2_of(net, heads)
    real = b.history.mask.bool()
    with torch.no_grad():
        x, mask = whole_sequence(net, b)
        hidden = gpt(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state[:, 1::3][:, P:]
        close(net(b.history, computed(net, b))[real], torch.tanh(net.head(hidden))[real], 1e-5)
        future = torch.full((x.shape[1],) * 2, -math.inf).triu(1)
        for block in net.blocks:
            x, _ = block(x, (1 - mask)[:, None, None] * -1e4 + future)
        close(net.ln_out(x)[:, 1::3][:, P:][real], hidden[real], 1e-5)


# ---- ranking


def pair_sum(x, xs, f, k):
    """Mean of (x_i - x) - (x_j - x) over the known preferences 'i is better than j'.

    Known are those with one of the two among the best k."""
    order = np.argsort(f)
    best = set(order[:k].tolist())
    E = [(i, j) for i, j in itertools.permutations(range(len(f)), 2) if f[i] < f[j] and {i, j} & best]
    assert len(E) == k * (k - 1) / 2 + k * (len(f) - k)
    return sum((xs[i] - x) - (xs[j] - x) for i, j in E) / len(E)


def search_state(m, G=3, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*d):
        return torch.randn(*d, generator=g, dtype=torch.float64)

    x = r(G, D)
    return x, x[:, None] + 0.1 * r(G, m, D), r(G, m)


def never(xs):
    raise AssertionError("no further query is wanted")


@pytest.mark.parametrize("m, k", [(2, None), (5, None), (15, None), (5, 1), (5, 2), (5, 4), (15, 7), (15, 15)])
def test_direction_is_the_pair_sum(m, k):
    x, xs, f = search_state(m)
    d = (PreferenceRanking(m=m, k=k, eta=1.0).update(x, xs, f, {}, never) - x).numpy()
    np.testing.assert_allclose(
        d, [pair_sum(*z, k or m) for z in zip(x.numpy(), xs.numpy(), f.numpy())], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("m", [2, 5, 15])
def test_the_authors_weights(m):
    x, xs, f = search_state(m)
    d = PreferenceRanking(m=m, eta=1.0, author_weights=True).update(x, xs, f, {}, never) - x
    for g in range(len(x)):
        want = sum((m - 2 * r) * (xs[g, i] - x[g]) for r, i in enumerate(f[g].argsort().tolist())) / (m * (m - 1) / 2)
        close(d[g], want, 1e-12)


@pytest.mark.parametrize("k", [None, 2])
def test_only_the_order_counts(k):
    f = search_state(9)[2]
    w = rank_weights(f, k)
    for g in (torch.exp, torch.atan, lambda x: x**3, lambda x: 1e6 * x - 5):
        assert torch.equal(rank_weights(g(f), k), w)
    turn = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rank_weights(f[:, turn], k), w[:, turn])
    assert not torch.equal(rank_weights(-f, k), w)


def test_momentum():
    tuner, state, want = PreferenceRanking(m=6, eta=0.3, momentum=0.5), {}, 0
    for t in range(4):
        x, xs, f = search_state(6, seed=t)
        want = 0.5 * want + np.array([pair_sum(*z, 6) for z in zip(x.numpy(), xs.numpy(), f.numpy())])
        np.testing.assert_allclose((tuner.update(x, xs, f, state, never) - x).numpy(), 0.3 * want, rtol=0, atol=1e-12)


def test_line_search():
    "It queries x + eta v / 2^j for j = 0 ... m-3 and x twice, keeps each task's best, and forgets the momentum."
    m, eta = 7, 0.4
    tuner, (x, xs, f), seen = PreferenceRanking(m=m, eta=eta, linesearch=True), search_state(7), []
    d = np.array([pair_sum(*z, m) for z in zip(x.numpy(), xs.numpy(), f.numpy())])
    steps = np.array([eta * 0.5**j for j in range(m - 2)] + [0, 0])
    ladder = x.numpy()[:, None] + steps[None, :, None] * d[:, None]
    best = [2, 0, 5]  # the last: nothing is better than x

    def query(c):
        seen.append(c.numpy())
        s = torch.ones(c.shape[:2])
        s[range(3), best] = 0
        return s

    for _ in range(2):
        state = {}
        new = tuner.update(x, xs, f, state, query)
        np.testing.assert_allclose(seen[-1], ladder, rtol=0, atol=1e-12)
        np.testing.assert_allclose(new.numpy(), ladder[range(3), best], rtol=0, atol=1e-12)
        tuner.update(x, xs, f, state, query)
        np.testing.assert_allclose(seen[-1], ladder, rtol=0, atol=1e-12)
    assert torch.equal(new[2], x[2])


# ---- the sampler

LENGTHS = {
    4: (9, 14, 3),
    7: (5, 6, 30),
    9: (1, 2, 11),
}  # task -> lengths of its trajectories: shorter and longer than K, H


def trajectories():
    "Whole-number rewards and states: sums are exact. The first state tells the trajectory, the second the step."
    g, out = np.random.default_rng(0), []
    for task, lengths in LENGTHS.items():
        for T in lengths:
            s = np.stack([np.full(T, len(out)), np.arange(T), g.integers(-9, 9, T)], 1)
            out.append(
                (
                    task,
                    dict(
                        observations=s.astype(np.float32),
                        actions=g.uniform(-1, 1, (T, A)).astype(np.float32),
                        rewards=g.integers(-5, 9, T).astype(np.float32),
                    ),
                )
            )
    return out


def sample(d, si, n, mean, std, scale):
    "One sample as the released code cuts it: up to n steps from si, then padding in front."
    s, a = (d["observations"][si : si + n] - mean) / std, d["actions"][si : si + n]
    rtg = np.array([d["rewards"][i:].sum() for i in range(si, si + len(s))], np.float32)[:, None] / np.float32(scale)

    def pad(x):
        return np.concatenate([np.zeros((n - len(s), *x.shape[1:]), x.dtype), x])

    return pad(s), pad(a), pad(rtg), pad(np.arange(si, si + len(s))), pad(np.ones(len(s), np.float32))


def equal(steps, samples):
    for x, y in zip((steps.s, steps.a, steps.rtg, steps.t, steps.mask), zip(*samples)):
        np.testing.assert_array_equal(x.numpy(), np.stack(y))


def sampler(**kw):
    trajs = trajectories()
    store = from_arrays([d for _, d in trajs], [i for i, _ in trajs])
    mean, std = (
        torch.tensor([0.0, 0.0, 1.5]),
        torch.tensor([1.0, 1.0, 4.0]),
    )  # the first two entries of a state stay readable
    return [d for _, d in trajs], Sampler(store, mean, std, 7.0, **{**dict(K=8, per_task=40, H=4), **kw})


@pytest.mark.parametrize("J, H", [(1, 4), (1, 1), (2, 4), (3, 8)])
def test_batches_are_the_released_codes(J, H):
    trajs, sam = sampler(J=J, H=H)
    b = sam.batch(5)
    mean, std = sam.mean.numpy(), sam.std.numpy()
    n = len(b)
    first = b.history.s[torch.arange(n), b.history.mask.argmax(1)]  # trajectory and step at which each row begins
    equal(b.history, [sample(trajs[int(i)], int(si), 8, mean, std, 7.0) for i, si, _ in first.tolist()])
    which = b.prompt.s.view(n, J, H, 3)[:, :, -1, 0]
    cut = [
        [sample(trajs[int(i)], max(0, len(trajs[int(i)]["rewards"]) - H - 1), H, mean, std, 7.0) for i in row]
        for row in which.tolist()
    ]
    equal(b.prompt, [[np.concatenate(x) for x in zip(*row)] for row in cut])
    task = np.repeat(list(LENGTHS), 3)
    of = task[first[:, 0].long().numpy()]
    assert (of == np.repeat(list(LENGTHS), 40)).all() and (task[which.long().numpy()] == of[:, None]).all()


def test_random_prompts_lie_inside_their_trajectory():
    trajs, sam = sampler(position="random", H=4)
    b = sam.batch(0)
    first = b.prompt.s[torch.arange(len(b)), b.prompt.mask.argmax(1)]
    equal(
        b.prompt,
        [sample(trajs[int(i)], int(si), 4, sam.mean.numpy(), sam.std.numpy(), 7.0) for i, si, _ in first.tolist()],
    )
    assert all(si <= max(0, len(trajs[int(i)]["rewards"]) - 4) for i, si, _ in first.tolist())


def test_resampled_prompts_are_segments():
    "What re-sampling tries is cut from the task's demonstrations as it is, timesteps included."
    trajs, sam = sampler(H=4)
    long = [i for i, d in enumerate(trajs) if len(d["rewards"]) > 4]
    store = from_arrays([trajs[i] for i in long], [list(LENGTHS)[i // 3] for i in long])
    dem = Demos(Sampler(store, sam.mean, sam.std, 7.0, H=0), sam.batch(0).prompt[::40])
    tuner, gen = Resampling(), torch.Generator().manual_seed(0)
    vec = PromptVector(dem.prompt, tuner.extra)
    got = vec.steps(tuner.fresh(vec.start, 9, vec, dem, gen))
    first = got.s[:, :, 0]
    for j in range(3):
        equal(
            got[j],
            [
                sample(trajs[int(i)], int(si), 4, sam.mean.numpy(), sam.std.numpy(), 7.0)
                for i, si, _ in first[j].tolist()
            ],
        )


def test_draws_are_uniform():
    "Histories begin uniformly over a task's steps, prompts come uniformly from its trajectories."
    trajs, sam = sampler(per_task=4000)
    b = sam.batch(0)
    first = b.history.s[torch.arange(len(b)), b.history.mask.argmax(1)].view(3, -1, 3)[..., :2].tolist()
    which = b.prompt.s[:, -1, 0].view(3, -1).tolist()
    for g in range(3):
        mine = range(3 * g, 3 * g + 3)
        steps = [(i, t) for i in mine for t in range(len(trajs[i]["rewards"]))]
        tally = {k: 0 for k in steps}
        for i, t in first[g]:
            tally[int(i), int(t)] += 1
        assert (
            chisquare(list(tally.values())).pvalue > 1e-3 and chisquare([which[g].count(i) for i in mine]).pvalue > 1e-3
        )


def test_some_tasks_a_batch():
    "With tasks_per_batch every task has its turn equally often, and no batch has one twice."
    trajs, sam = sampler(tasks_per_batch=2, per_task=1)
    task = np.repeat(list(LENGTHS), 3)
    seen = []
    for t in range(600):
        b = sam.batch(t)
        got = task[b.history.s[torch.arange(2), b.history.mask.argmax(1), 0].long().numpy()]
        assert len(set(got)) == 2
        seen += got.tolist()
    assert chisquare([seen.count(i) for i in LENGTHS]).pvalue > 1e-3


def test_batch_t_depends_on_seed_and_t_alone():
    def same(a, b):
        return all(
            torch.equal(getattr(x, n), getattr(y, n))
            for x, y in ((a.history, b.history), (a.prompt, b.prompt))
            for n in ("s", "a", "rtg", "t", "mask")
        )

    one, other = (sampler(seed=3, position="random", tasks_per_batch=2)[1] for _ in range(2))
    want = [one.batch(t) for t in range(4)]
    state = torch.random.get_rng_state()
    for t in (3, 1, 2, 0):
        torch.manual_seed(t)
        np.random.seed(t)
        assert same(other.batch(t), want[t])
    torch.random.set_rng_state(state)
    before = np.random.get_state()[1].copy()
    one.batch(9)
    assert torch.equal(torch.random.get_rng_state(), state) and (np.random.get_state()[1] == before).all()
    assert not same(want[0], want[1]) and not same(
        want[0], sampler(seed=4, position="random", tasks_per_batch=2)[1].batch(0)
    )


def test_state_stats():
    trajs = trajectories()
    store = from_arrays([d for _, d in trajs], [i for i, _ in trajs])
    for ids in (None, (4, 9)):
        s = np.concatenate([d["observations"] for i, d in trajs if ids is None or i in ids]).astype(np.float64)
        mean, std = state_stats(store, ids)
        np.testing.assert_allclose(mean, s.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(std, s.std(0) + 1e-6, rtol=1e-6)


# ---- lock step


@pytest.mark.parametrize("name", [f.name for f in tasks.FAMILIES.values() if f.kind in ("control", "locomotion")])
def test_lock_step_is_the_single_environment(name):
    """Bit for bit over 60 steps, past a horizon of 30, with two resets of some rows.

    One has new seeds, one goes on with the rows' own generators."""
    f = replace(tasks.family(name), horizon=30)
    ids = [f.test[0], f.test[-1], f.train[0], f.test[0]]
    g = np.random.default_rng(0)
    envs = [gym.make(f.env_id, task=i, max_episode_steps=30, disable_env_checker=True) for i in ids]
    vec = tasks.lock_step(f, ids, threads=2)
    obs, _ = vec.reset(seed=[11, 12, 13, 14])
    np.testing.assert_array_equal(obs, np.stack([e.reset(seed=11 + i)[0] for i, e in enumerate(envs)]))
    for t in range(60):
        if t in (20, 40):
            mask = np.array([t == 20, True, False, t == 40])
            seed = [100 + i for i in range(4)] if t == 20 else None
            new, _ = vec.reset(seed=seed, options=dict(reset_mask=mask))
            obs = np.stack([e.reset(seed=seed and seed[i])[0] if mask[i] else obs[i] for i, e in enumerate(envs)])
            np.testing.assert_array_equal(new, obs)
        a = g.uniform(-1, 1, (4, f.act_dim)).astype(np.float32)
        got, want = vec.step(a), [e.step(x) for e, x in zip(envs, a)]
        for i, x in enumerate(zip(*(w[:4] for w in want))):
            np.testing.assert_array_equal(
                got[i], np.stack(x), err_msg=f"step {t}: {('observation', 'reward', 'terminated', 'truncated')[i]}"
            )
        obs = got[0]
    vec.close()
    [e.close() for e in envs]


# ---- statistics


def test_iqm():
    assert stats.iqm([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5  # the mean of 2, 3, 4, 5
    assert stats.iqm([[5, 100], [-100, 7]]) == 6.0
    x = np.random.default_rng(0).normal(size=(3, 7))
    assert stats.iqm(x) == trim_mean(x, 0.25, axis=None)


def test_the_interval_of_the_iqm_redraws_seeds():
    "Equality with a loop over the same draws; no interval where seeds agree."
    x = np.random.default_rng(1).normal(size=(10, 4)) + 100 * np.arange(4)
    draw = np.random.default_rng(5).integers(10, size=(200, 10))
    boot = [trim_mean(x[seeds], 0.25, axis=None) for seeds in draw]
    assert stats.iqm_interval(x, reps=200, seed=5) == pytest.approx(np.quantile(boot, [0.025, 0.975]))
    same = np.tile([[1.0, 50.0, 7.0, 7.0]], (10, 1))
    assert stats.iqm_interval(same) == (7.0, 7.0)


def test_summary_and_verdict():
    x = np.array([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0]])
    s = stats.summary(x)
    assert (s["mean"], s["std"], s["n"], s["iqm"]) == (4.0, 2.0, 3, stats.iqm(x)) and s["lo"] < 4 < s["hi"]
    assert np.isnan(stats.summary(x[:1])["std"])
    c = stats.compare(x + 1, x)
    assert (c["difference"], c["lo"], c["hi"]) == (1.0, 1.0, 1.0)
    words = stats.judged([c, stats.compare(x, x + 1), stats.compare(x, x[::-1])]).verdict
    assert [*words] == ["better", "worse", "not resolved"]
