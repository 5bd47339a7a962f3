"Prompt Diffuser against the paper's formulas, written out plainly; what its preparation, choices and files promise."

import json
import math
import os
from collections import Counter
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from test_parity import plain
from toys import A, G, Judge, K, P, S, toy

from promptnb import train
from promptnb.core import Batch, Checkpoints, PromptnbError, seed_for
from promptnb.data import demos, from_arrays
from promptnb.models.dt import DTConfig, Policy, PromptDT
from promptnb.tuners.checks import actions, same, snapshot
from promptnb.tuners.core import TUNERS, Tuner, frozen, prompt_loss, same_batch, tuner_class
from promptnb.tuners.diffuser import (
    GUIDANCE,
    SCHEDULES,
    Diffuser,
    DirectPrompt,
    Guided,
    NoiseNet,
    PromptDiffuser,
    Regressor,
    combine,
    scheduler,
    transitions,
)

D = S + A + 1
SMALL = dict(steps=6, prepare_steps=6, N=4, width=16, prompts=6, tasks=2, log_every=2)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
both = pytest.mark.parametrize("Tuner", [PromptDiffuser, DirectPrompt])


def small(Tuner=PromptDiffuser, **kw):
    return Tuner(**{**SMALL, **kw})


def writer(T=40, nets=G, seed=0, **kw):
    "(policy, demonstrations, untrained diffuser); T < P: padded prompts."
    pi, dem = toy(T=T)
    return pi, dem, small(**kw).new(pi, dem, seed, nets)


def net_of(d, g):
    "Task g's net by itself."
    new = type(d)(**dict(d._hub_mixin_config, G=1))
    new.load_state_dict({k: v[g : g + 1] if k.startswith("net.") else v for k, v in d.state_dict().items()})
    return new


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def flat(tensors, n=1):
    return torch.cat([x.reshape(n, -1) for x in tensors], -1)


def raises(text):
    return pytest.raises(PromptnbError, match=rf"^[^\n]*{text}[^\n]*$")  # one line


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # processes are not killed here


# ---- the paper, plainly: noise levels, noise net, both losses


def betas(schedule, N):
    "Of steps 1 ... N, rounded as the scheduler keeps them."

    def bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    last = min(20 / N, 0.999)
    f = dict(
        vp=lambda i: 1 - math.exp(-0.1 / N - 0.5 * (10 - 0.1) * (2 * i - 1) / N**2),
        linear=lambda i: 0.1 / N + (last - 0.1 / N) * (i - 1) / max(N - 1, 1),
        cosine=lambda i: min(1 - bar(i / N) / bar((i - 1) / N), 0.999),
    )[schedule]
    return torch.tensor([f(i) for i in range(1, N + 1)]).double()


def levels(schedule, N):
    b = betas(schedule, N)
    return b, 1 - b, (1 - b).cumprod(0)


def mish(z):
    return z * torch.log1p(z.exp()).tanh()


def waves(z):
    "Eight sines and eight cosines of positions."
    angles = z.double()[..., None] / 10_000 ** (torch.arange(8).double() / 7)
    return torch.cat([angles.sin(), angles.cos()], -1)


def plain_noise(d, x, y, i):
    "Noise (n, m, P, D) in x, task by task; i (n, m, P) counts from 0."
    w = {k: v.double() for k, v in d.state_dict().items()}

    def linear(g, n, z):
        return z @ w[f"net.{n}.weight"][g % d.G] + w[f"net.{n}.bias"][g % d.G]

    out = []
    for g in range(len(x)):
        rtg = linear(g, "rtg", (y.rtg[g] - w["rtg_mean"]) / w["rtg_std"])
        step = linear(g, "step.2", mish(linear(g, "step.0", waves(i[g]))))
        h = torch.cat([x[g].double(), rtg, waves(y.t[g]), step], -1)
        for n in ("body.0", "body.2", "body.4"):
            h = mish(linear(g, n, h))
        out.append(linear(g, "body.6", h))
    return torch.stack(out)


def plain_dm(d, x, y, schedule, i, eps):
    "L_DM (n,): over real steps alone."
    bar = levels(schedule, d.N)[2][i][..., None]
    x0 = (x.double() - d.mean) / d.std
    err = (eps - plain_noise(d, bar.sqrt() * x0 + (1 - bar).sqrt() * eps, y, i)).square().mean(-1)
    return torch.stack([e[m > 0].mean() for e, m in zip(err, y.mask)])


@schedules
@pytest.mark.parametrize("N", [1, 10])
def test_noise_levels(schedule, N):
    s, (b, _, bar) = scheduler(schedule, N), levels(schedule, N)
    torch.testing.assert_close(s.betas.double(), b, rtol=0, atol=1e-7)
    torch.testing.assert_close(s.alphas_cumprod.double(), bar, rtol=0, atol=1e-6)
    assert (
        (0 < b).all() and (b < 1).all() and s.timesteps.tolist() == list(range(N))[::-1] and (N == 1 or bar[-1] < 0.05)
    )


@schedules
@pytest.mark.parametrize("nets, T", [(G, 40), (1, 40), (G, P - 1)], ids=["a net each", "one net", "padded prompts"])
def test_l_dm(schedule, nets, T):
    "Forward process x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) eps, and the squared error of the noise."
    _, dem, d = writer(T, nets, schedule=schedule, N=10)
    y, r, _ = dem.draw(3, 6)
    x = transitions(y, r)
    torch.manual_seed(5)
    got = d.loss(x, y)
    torch.manual_seed(5)
    i, eps = torch.randint(10, y.t.shape), torch.randn(x.shape)
    torch.testing.assert_close(got.double(), plain_dm(d, x, y, schedule, i, eps), rtol=1e-6, atol=1e-6)
    assert i.unique().numel() > 7 and got.shape == (G,)


@schedules
@pytest.mark.parametrize("N", [1, 4, 10])
def test_reverse(schedule, N):
    """x_(i-1) = (x_i - (1 - alpha_i) / sqrt(1 - abar_i) eps) / sqrt(alpha_i) + sigma_i z.

    sigma_i^2 = (1 - abar_(i-1)) / (1 - abar_i) beta_i; the last step adds no noise."""
    _, dem, d = writer(schedule=schedule, N=N, clip=0.0)
    y, _, _ = dem.draw(3, 6)
    b, alpha, bar = levels(schedule, N)
    with torch.no_grad():
        states = list(d.chain(y, seeded(3)))
    gen = seeded(3)
    assert len(states) == N + 1 and torch.equal(states[0], torch.randn(states[0].shape, generator=gen))
    for i, x, got in zip(range(N)[::-1], states, states[1:]):
        want = (
            x.double() - (1 - alpha[i]) / (1 - bar[i]).sqrt() * plain_noise(d, x, y, torch.full(y.t.shape, i))
        ) / alpha[i].sqrt()
        if i:
            want += ((1 - bar[i - 1]) / (1 - bar[i]) * b[i]).sqrt() * torch.randn(x.shape, generator=gen)
        assert (got - want).abs().max() <= 1e-6 * want.abs().max().clamp(min=1)
    assert torch.equal(d.sample(y, seeded(3)), states[-1] * d.std + d.mean)


def test_clip():
    "No predicted x_0, so no written entry, is farther than `clip` standard deviations; without a clip some are."
    last = {}
    for clip in (0.0, 0.5):
        _, dem, d = writer(clip=clip)
        y, _, _ = dem.draw(0, 6)
        for last[clip] in d.chain(y, seeded(0)):
            pass
    assert last[0.5].abs().max() <= 0.5 < 1 < last[0.0].abs().max()


def double(steps):
    return steps.map(lambda z: z.double() if z.is_floating_point() else z)


def plain_error(pi, prompt, h):
    "Mean over windows h (B, K, .) of the squared error that the policy makes with a prompt (1, P, .) in front."
    w = {k: v.double() for k, v in pi.model.state_dict().items()}
    prompts = prompt.map(lambda z: z.expand(len(h.t), *z.shape[1:]))
    pred = plain(w, pi.config, Batch(double(h), double(prompts)))[0][:, P:]
    return np.mean([(p - a)[m > 0].square().mean().item() for p, a, m in zip(pred, h.a, h.mask)])


@pytest.mark.parametrize("T", [40, P - 1], ids=["", "padded prompts"])
def test_l_dt(T):
    """The frozen policy's error on the windows, with the written states and actions.

    Returns-to-go and timesteps are the drawn prompt's."""
    pi, dem, d = writer(T)
    y, r, windows = dem.draw(3, 6)
    guided = Guided(d, frozen(pi.clone().model), "dt")
    torch.manual_seed(5)
    dm, got = guided.losses(y, r, windows)
    assert dm is None
    torch.manual_seed(5)
    x = d.sample(y[:, :1])[:, 0].detach() * y.mask[:, 0, :, None]
    written = replace(y[:, 0], s=x[..., :S], a=x[..., S : S + A])
    for g in range(G):
        assert got[g].item() == pytest.approx(plain_error(pi, written[g : g + 1], windows[g]), abs=1e-6)


# ---- guidance


@pytest.fixture(scope="module")
def gradients():
    "Random ones, of which some conflict: g_dm and g_dt (40, 30), and where they conflict (40,)."
    a, b = torch.randn(2, 40, 30, generator=seeded(0), dtype=torch.float64)
    conflict = (a * b).sum(-1) < 0
    assert 5 < conflict.sum() < 35
    return a, b, conflict


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_what_is_added_is_orthogonal(gradients, lam):
    "All of g_dt that is orthogonal to g_dm, scaled by lam."
    a, b, _ = gradients
    added = combine(a, b, lam, "always")[0] - a
    basis = torch.linalg.qr(a[..., None], "complete")[0][..., 1:]  # of what is orthogonal to g_dm
    torch.testing.assert_close(added, lam * (basis @ (basis.mT @ b[..., None]))[..., 0], rtol=0, atol=1e-12)
    assert ((added * a).sum(-1).abs() < 1e-12).all() and (added.norm(dim=-1) > 0.1).all()


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_projection_on_conflict_only(gradients, lam):
    a, b, conflict = gradients
    out = {k: combine(a, b, lam, k)[0] for k in GUIDANCE}
    assert torch.equal(out["conflict"][conflict], out["always"][conflict])
    assert torch.equal(out["conflict"][~conflict], out["sum"][~conflict])


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_plain_guidance(gradients, lam):
    a, b, _ = gradients
    for guidance, want in dict(sum=a + lam * b, dm=a, dt=lam * b).items():
        assert torch.equal(combine(a, b, lam, guidance)[0], want)


def test_cosine_of_the_gradients(gradients):
    a, b, _ = gradients
    torch.testing.assert_close(combine(a, b)[1], torch.cosine_similarity(a, b, dim=-1), rtol=0, atol=1e-12)


def test_misspelt_guidance(gradients):
    a, b, _ = gradients
    with raises("unknown guidance 'confict': did you mean 'conflict'"):
        combine(a, b, 1.0, "confict")


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_gradients_of_zero(guidance):
    v, o = torch.randn(2, 7, generator=seeded(0)), torch.zeros(2, 7)
    for a, b in ((o, v), (v, o), (o, o)):
        g, cos = combine(a, b, 1.0, guidance)
        assert torch.isfinite(g).all() and (cos == 0).all()
        assert torch.equal(g, dict(dt=b, dm=a).get(guidance, a + b))


def check_gradient(got, want, tol=1e-6):
    assert (got - want).abs().max() <= tol * want.abs().max()


@pytest.mark.parametrize("nets", [1, G])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_gradient_of_the_loss(guidance, nets):
    """It is `combine` of the two losses' own gradients, task by task where nets are stacked.

    The value is L_DM + lam L_DT, of what is used."""
    pi, dem, d = writer(nets=nets)
    batch, lam, params = dem.draw(3, 6), 0.7, list(d.parameters())
    guided = Guided(d, frozen(pi.clone().model), guidance, lam)
    torch.manual_seed(5)
    value = guided.loss(batch)
    value.backward()
    got = flat([p.grad for p in params], nets)
    torch.manual_seed(5)
    each = guided.losses(*batch)
    totals = [x if x is None else (x.mean() if nets == 1 else x.sum()) for x in each]
    own = [torch.zeros_like(got) if x is None else flat(torch.autograd.grad(x, params), nets) for x in totals]
    check_gradient(got, combine(*own, lam, guidance)[0])
    assert got.abs().max() > 1e-3
    used = sum(w * x.item() for w, x in zip((1, lam), totals) if x is not None)
    assert value.item() == pytest.approx(used, abs=1e-6)


@pytest.mark.parametrize("nets", [1, G])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_the_cosine_is_known_where_both_losses_are_used(guidance, nets):
    "The policy's model gets no gradient."
    pi, dem, d = writer(nets=nets)
    guided = Guided(d, frozen(pi.clone().model), guidance)
    guided.loss(dem.draw(3, 6)).backward()
    assert guided.cosine.isnan().all() == (guidance in ("dm", "dt"))
    assert all(p.grad is None for p in guided._model[0].parameters())


@pytest.fixture
def alone(monkeypatch):
    "`alone(g)`: from here on the random draws are rows g of those that all tasks get together."
    normal, whole, state = torch.randn, torch.randint, {}

    def rows(f, shape):
        state["n"] += 1
        return f((G, *shape[1:]), generator=seeded(state["n"]))[state["rows"]]

    def randn(*shape, **kw):
        return rows(normal, shape if isinstance(shape[0], int) else shape[0])

    def alone(at):
        state.update(rows=at, n=0)
        monkeypatch.setattr(torch, "randn", randn)
        monkeypatch.setattr(torch, "randn_like", lambda x: randn(x.shape))
        monkeypatch.setattr(torch, "randint", lambda high, shape, **kw: rows(lambda z, **k: whole(high, z, **k), shape))

    return alone


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_stacked_nets_do_not_meet(guidance, alone):
    "Each task gets the gradient that it would have alone, though all tasks are one batch."
    pi, dem, d = writer()
    batch = dem.draw(3, 6)
    ones = [net_of(d, g) for g in range(G)]

    def gradient(d, batch):
        guided = Guided(d, frozen(pi.clone().model), guidance)
        guided.loss(batch).backward()
        return flat([p.grad for p in d.parameters()], d.G)

    alone(slice(None))
    together = gradient(d, batch)
    for g, one in enumerate(ones):
        alone(slice(g, g + 1))
        check_gradient(together[g : g + 1], gradient(one, [x[g : g + 1] for x in batch]), 1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1 * together.abs().max()


@pytest.mark.parametrize(
    "first, lr", [((3.0, 1.0), 0.01), ((-4.0, 2.0), 0.01), ((0.0, -3.0), 0.01), ((0.0, -3.0), 0.004)]
)
def test_theorem(first, lr):
    """Two convex losses, a small step: projected updates end at the optimum of the first, within twice the step.

    There the gradients oppose each other; the plain sum's end is elsewhere."""
    H1, H2 = (torch.tensor(x, dtype=torch.float64) for x in ([[1.5, 0.4], [0.4, 0.8]], [[0.7, -0.3], [-0.3, 1.2]]))
    best, other = torch.tensor([[0.5, -1.0], [2.0, 1.0]], dtype=torch.float64)

    def end(guidance):
        x = torch.tensor(first, dtype=torch.float64)
        for _ in range(int(12 / lr)):
            g1, g2 = H1 @ (x - best), H2 @ (x - other)
            x = x - lr * combine(g1[None], g2[None], 1.0, guidance)[0][0]
        return (x - best).norm(), torch.cosine_similarity(g1, g2, dim=0)

    for guidance in ("always", "conflict"):
        far, cos = end(guidance)
        assert far < 2 * lr and cos < -0.99, guidance
    assert end("sum")[0] > 0.5


# ---- size, and many nets and prompts at once


def test_size():
    "Meta-World's transitions (39 + 4 + 1): the paper's 0.17M, 1.24 % of a Prompt-DT of 4 layers x 512."
    n = sum(p.numel() for p in Diffuser(39, 4).parameters())
    policy = sum(p.numel() for p in PromptDT(DTConfig(39, 4, width=512, layers=4)).parameters())
    assert (
        n
        == 167_804
        == sum(p.numel() for p in Regressor(39, 4).parameters())
        == sum(p.numel() for p in Diffuser(39, 4, G=3).parameters()) / 3
    )
    assert (
        f"{n / 1e6:.2f}" == "0.17"
        and f"{policy / 1e6:.1f}" == "13.7"
        and f"{0.17e6 / policy:.2%}" == "1.24%"
        and 0.0122 < n / policy < 0.0124
    )


@pytest.mark.parametrize("kind", [Diffuser, Regressor])
def test_spread(kind):
    "One net for all and the same net once a task write the same; later they are free of each other."
    torch.manual_seed(0)
    one = kind(S, A, P, width=16, N=4)
    _, dem = toy()
    y, r, _ = dem.draw(0, 6)
    one.fit_scale(transitions(y, r), y)
    three = one.spread(G)
    if kind is Regressor:
        torch.nn.init.normal_(one.net.body[-1].weight, std=0.1)
        three = one.spread(G)
    assert type(three) is kind and three.G == G and all(p.shape[0] == G for p in three.parameters())
    torch.testing.assert_close(three.sample(y, seeded(1)), one.sample(y, seeded(1)), rtol=0, atol=1e-6)
    before = snapshot(one)
    with torch.no_grad():
        for p in three.parameters():
            p[0].zero_()
    assert same(snapshot(one), before)
    a, b = three.sample(y, seeded(1)), one.sample(y, seeded(1))
    assert not torch.allclose(a[0], b[0]) and torch.allclose(a[1], b[1], atol=1e-5)


@pytest.fixture
def forwards(monkeypatch):
    "How often noise nets were run, by net."
    calls, forward = Counter(), NoiseNet.forward

    def counted(self, *a):
        calls[id(self)] += 1
        return forward(self, *a)

    monkeypatch.setattr(NoiseNet, "forward", counted)
    return calls


def plain_chain(one, y, noise):
    "The reverse chain of one prompt (1, 1, P, D) of a net, step of the prompt by step: no step sees another."
    b, alpha, bar = levels("vp", one.N)
    x = noise[0]
    for i in range(one.N)[::-1]:
        rows = [one.noise(x[:, :, p : p + 1], y[:, :, p : p + 1], i) for p in range(P)]
        x0 = ((x - (1 - bar[i]).sqrt() * torch.cat(rows, 2)) / bar[i].sqrt()).clamp(-3, 3)
        prev = bar[i - 1] if i else torch.tensor(1.0)
        x = (prev.sqrt() * b[i] * x0 + alpha[i].sqrt() * (1 - prev) * x) / (1 - bar[i])
        if i:
            x = x + ((1 - prev) / (1 - bar[i]) * b[i]).sqrt() * noise[one.N - i]
    return x.float()


def test_many_prompts_are_one_chain(forwards):
    "256 prompts for each of 5 tasks: N forwards of the net, and prompt by prompt the same."
    pi, dem, d = writer(nets=5, N=10)
    y = dem.prompt[[0, 1, 0, 1, 1]][:, None]
    made = small(N=10).write(d, y, 0, 256)
    assert made.s.shape == (5, 256, P, S) and sum(forwards.values()) == 10
    gen = seeded(seed_for(0, "sample"))
    z = [torch.randn(5, 256, P, D, generator=gen) for _ in range(10)]
    for g, j in ((0, 0), (0, 255), (2, 7), (4, 100), (4, 255)):
        own = [noise[g : g + 1, j : j + 1] for noise in z]
        want = plain_chain(net_of(d, g), y[g : g + 1], own) * d.std + d.mean
        got = torch.cat([made.s, made.a], -1)[g, j]
        torch.testing.assert_close(got, want[0, 0, :, : S + A], rtol=0, atol=2e-5)


# ---- learning


def clusters(T=30):
    "Two tasks; in each, half of the demonstrations stand at one place and half at another, with the same returns."
    g = np.random.default_rng(0)

    def one(i, c):
        return dict(
            observations=c * np.array([1.0, -1.0, 1.0]) + 3 * i + 0.1 * g.normal(size=(T, S)),
            actions=0.5 * c * np.array([1, -1]) + 0.05 * g.normal(size=(T, A)),
            rewards=np.ones(T),
        )

    st = from_arrays([one(i, c) for i in range(G) for c in (-1, 1) for _ in range(3)], np.repeat(np.arange(G), 6))
    torch.manual_seed(0)
    pi = Policy(asdict(DTConfig(S, A, width=16, layers=1)), K=K, rtg_scale=30.0)
    return pi.eval(), demos(st, st, pi, n=0, K=K, batch=8, H=P)


@pytest.fixture(scope="module")
def learned():
    "{tuner: (distance (G,) of written steps to the nearest demonstrated one, first actions, the fact of that name)}"
    pi, dem = clusters()
    shown, _, _ = dem.draw(0, 64, seed="test")

    def steps(p):
        return torch.cat([p.s, p.a], -1).flatten(1, 2)

    tuners = dict(
        ours=PromptDiffuser(steps=150),
        noise=PromptDiffuser(source="noise"),
        untrained=PromptDiffuser(source="untrained"),
        direct=DirectPrompt(steps=150),
    )
    out = {}
    for name, tuner in tuners.items():
        tuner = replace(tuner, width=64, log_every=200)
        adapted = tuner.adapt(pi, dem, 0)
        made = tuner.write(adapted.generator, dem.prompt[:, None], 0, 64)
        near = torch.cdist(steps(made), steps(shown)).amin(-1).mean(-1)
        fact = torch.tensor([f["value"] for f in adapted.facts if f["metric"] == "nearest_demo"])
        out[name] = near, made.a[..., 0].flatten(1), fact
    return out


@pytest.mark.parametrize("control", ["noise", "untrained"])
def test_written_steps_are_near_demonstrated_ones(learned, control):
    "Per task at most 0.4 times as far as those of pure noise or of an untrained diffuser."
    near, _, fact = learned["ours"]
    far, _, far_fact = learned[control]
    assert (near < 0.4 * far).all() and (fact < 0.8 * far_fact).all()


def test_both_places_are_written(learned):
    _, first, _ = learned["ours"]
    share = (first > 0).float().mean(1)
    assert (0.2 < share).all() and (share < 0.8).all() and first.abs().mean() > 0.35


def test_without_diffusion_only_what_lies_between_is_written(learned):
    assert learned["direct"][1].abs().max() < 0.25
    assert (learned["ours"][0] < 0.8 * learned["direct"][0]).all()


# ---- preparation


class Killed(BaseException):
    pass


def families(*seen):
    yield from seen


def weights(tuner):
    return {k: v.clone() for k, v in tuner.prepared.state_dict().items()}


def kill(monkeypatch, at=None):
    "Optimisation stops before step `at`; returns the steps that were done."
    step, done = KEEP, []

    def step_once(model, opt, batch, t, *a):
        if t == at:
            raise Killed
        done.append(t)
        return step(model, opt, batch, t, *a)

    monkeypatch.setattr(train, "step_once", step_once)
    return done


KEEP = train.step_once


@both
@pytest.mark.parametrize("at", [1, 17])
def test_preparation_goes_on_where_it_was_killed(Tuner, at, tmp_path, monkeypatch):
    "Weights and the reported conflict of gradients are those of an unbroken one; a finished one is read."
    pi, dem = toy()

    def make():
        return small(Tuner, prepare_steps=40)

    whole = make().prepare(pi, families(dem), 0)
    done = kill(monkeypatch, at)
    with pytest.raises(Killed):
        make().prepare(pi, families(dem), 0, tmp_path)
    assert done == list(range(at))
    done = kill(monkeypatch)
    again = make().prepare(pi, families(dem), 0, tmp_path)
    assert done == list(range(at // 2 * 2, 40))
    assert same(weights(again), weights(whole)) and again.history == whole.history
    assert [h["step"] for h in whole.history] == list(range(2, 41, 2))
    done = kill(monkeypatch)
    read = make().prepare(pi, families(dem), 0, tmp_path)
    assert not done and same(weights(read), weights(whole)) and read.history == whole.history
    assert not same(weights(make().prepare(pi, families(dem), 1)), weights(whole))


def test_preparation_killed_between_a_checkpoint_and_its_note(tmp_path, monkeypatch):
    "The conflict at that checkpoint is not lost."
    pi, dem = toy()

    def make():
        return small(prepare_steps=40)

    whole = make().prepare(pi, families(dem), 0)
    save = Checkpoints.save

    def saved(self, t, *a, **k):
        save(self, t, *a, **k)
        if t == 20:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", saved)
    with pytest.raises(Killed):
        make().prepare(pi, families(dem), 0, tmp_path)
    monkeypatch.setattr(Checkpoints, "save", save)
    again = make().prepare(pi, families(dem), 0, tmp_path)
    assert same(weights(again), weights(whole)) and again.history == whole.history


@pytest.mark.parametrize("guidance", ["always", "dm"])
def test_preparation_on_two_families(guidance, tmp_path, monkeypatch):
    "With a folder the same as without: no family's checkpoints are taken for another's."
    pi, dem = toy()
    other = replace(dem, sampler=replace(dem.sampler, seed=99))

    def make():
        return small(guidance=guidance)

    whole = make().prepare(pi, families(dem, other), 0)
    done = kill(monkeypatch)
    again = make().prepare(pi, families(dem, other), 0, tmp_path)
    assert done == [*range(6), *range(6)] and same(weights(again), weights(whole))


CHANGED = dict(
    steps=7,
    lr=0.1,
    prepare_steps=5,
    prepare_lr=0.1,
    N=5,
    schedule="linear",
    lam=0.5,
    guidance="sum",
    clip=0.5,
    condition="train",
    candidates=3,
    keep="demos",
    prompts=5,
    tasks=1,
    width=8,
    depth=2,
    precision="bf16",
    log_every=3,
)


def test_every_field_is_changed():
    "But `source`, whose controls prepare nothing, in a folder of their own."
    assert CHANGED.keys() == {f.name for f in fields(PromptDiffuser)} - {"source"}
    pi, dem = toy()
    assert "source" in PromptDiffuser.PREPARES
    assert small(source="noise").prepare(pi, families(dem), 0).prepared is None


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_preparation_depends_on(name, tmp_path, monkeypatch):
    """PREPARES names it: a change of what is named gives another preparation.

    After a change of anything else the finished one is read."""
    pi, dem = toy()
    named = name in PromptDiffuser.PREPARES
    folder = None if named else tmp_path
    first = small().prepare(pi, families(dem), 0, folder)
    done = kill(monkeypatch)
    second = small(**{name: CHANGED[name]}).prepare(pi, families(dem), 0, folder)
    assert bool(done) == named
    assert same(weights(second), weights(first)) != named


def test_preparation_on_other_data_is_refused(tmp_path):
    pi, dem = toy()

    def named(h):
        return replace(dem, sampler=replace(dem.sampler, store=replace(dem.sampler.store, hashes=(h,))))

    small().prepare(pi, families(named("a")), 0, tmp_path)
    with raises("is of another run: data"):
        small().prepare(pi, families(named("b")), 0, tmp_path)


def untouchable():
    raise AssertionError("the train tasks were read")
    yield


@pytest.mark.parametrize(
    "tuner",
    [
        small(source="untrained"),
        small(source="noise"),
        small(DirectPrompt, prepare_steps=0),
        *(tuner_class(n)() for n in TUNERS if not tuner_class(n).PREPARES),
    ],
    ids=["untrained", "noise", "no steps", *(n for n in TUNERS if not tuner_class(n).PREPARES)],
)
def test_train_tasks_are_not_read_in_vain(tuner):
    pi, dem = toy()
    assert tuner.prepare(pi, untouchable(), 0) is tuner and isinstance(tuner, Tuner)
    with pytest.raises(AssertionError, match="were read"):
        small().prepare(pi, untouchable(), 0)


@both
@pytest.mark.parametrize("T", [40, P - 1], ids=["", "padded prompts"])
def test_zero_shot(Tuner, T):
    """With condition='train', prompts are written under the train tasks' mean return-to-go and timestep, step by step.

    The test task's own do not enter."""
    pi, dem = toy(T=T)
    t = small(Tuner, steps=0, condition="train").prepare(pi, families(dem), 0)
    y, _, _ = dem.draw(0, 256, seed="scale")
    real = y.mask.sum((0, 1)).clamp(min=1)
    p = t.adapt(pi, dem, 0).assignments[0][0].prompt
    mask = dem.prompt.mask
    torch.testing.assert_close(
        p.rtg, (y.rtg.sum((0, 1)) / real[:, None]).expand_as(p.rtg) * mask[..., None], rtol=1e-6, atol=1e-6
    )
    assert torch.equal(p.t, ((y.t.sum((0, 1)) / real).round() * mask).long()) and torch.equal(p.mask, mask)
    shifted = replace(
        dem, prompt=replace(dem.prompt, s=dem.prompt.s + 1, a=-dem.prompt.a, rtg=dem.prompt.rtg + 5, t=dem.prompt.t + 3)
    )
    assert not torch.equal(p.rtg, shifted.prompt.rtg) and same(
        snapshot(t.adapt(pi, shifted, 0).assignments[0][0].prompt), snapshot(p)
    )


def test_mean_over_real_steps():
    "Prompts of unlike length: padding does not pull the train tasks' mean to zero."
    _, dem = toy()
    y, r, _ = dem.draw(0, 8)
    mask = torch.ones_like(y.mask)
    mask[:, ::2, 0] = 0
    y = replace(y, rtg=(y.rtg + 2) * mask[..., None], t=(y.t + 10) * mask.long(), mask=mask)
    d = Diffuser(S, A, P, width=8).fit_scale(transitions(y, r), y)
    torch.testing.assert_close(d.typical_rtg[:, 0], y.rtg[..., 0].sum((0, 1)) / mask.sum((0, 1)))
    assert torch.equal(d.typical_t, (y.t.sum((0, 1)) / mask.sum((0, 1))).round())


@both
def test_adapting_leaves_the_preparation_alone(Tuner):
    "Each adaptation starts at the prepared weights."
    pi, dem = toy()
    t = small(Tuner).prepare(pi, families(dem), 0)
    before = weights(t)
    a, b = t.adapt(pi, dem, 3), t.adapt(pi, dem, 3)
    assert (
        same(weights(t), before)
        and same(a.generator.state_dict(), b.generator.state_dict())
        and torch.equal(actions(a.assignments), actions(b.assignments))
    )
    zero = replace(t, steps=0)
    zero.prepared = t.prepared
    start = zero.adapt(pi, dem, 3).generator.state_dict()
    assert all(torch.equal(v, before[k].expand_as(v)) for k, v in start.items())
    assert all(not torch.equal(v, start[k]) for k, v in a.generator.state_dict().items() if k.startswith("net."))


def test_train_condition_needs_a_preparation():
    pi, dem = toy()
    empty = small(condition="train", prepare_steps=0).prepare(pi, families(dem), 0)
    for tuner in (small(condition="train"), empty):
        with raises("condition='train' needs `prepare` on train tasks"):
            tuner.adapt(pi, dem, 0)


# ---- choices


@pytest.mark.parametrize("seed", range(3))
def test_best_by_demonstrations(seed):
    "Never worse on the fixed batch than the first of the same candidates; the best of them."
    pi, dem = toy()
    out = {k: small(keep=k, candidates=8).adapt(pi, dem, seed) for k in ("first", "demos")}
    held = same_batch(dem)
    error = {k: prompt_loss(pi, o.assignments[0][0].prompt[:, None], held)[:, 0] for k, o in out.items()}
    assert (error["demos"] <= error["first"]).all() and (error["demos"] < error["first"]).any()
    made = small().write(out["demos"].generator, dem.prompt[:, None], seed, 8)
    torch.testing.assert_close(error["demos"], prompt_loss(pi, made, held).amin(1), rtol=1e-6, atol=0)
    assert same(out["demos"].generator.state_dict(), out["first"].generator.state_dict())


def test_best_by_score():
    "Of each task's candidates the one of the highest score; each query is paid for, once, after training."
    pi, dem = toy()
    t = small(keep="score", candidates=5)
    out = t.adapt(pi, dem, 0, score := Judge())
    made = t.write(out.generator, dem.prompt[:, None], 0, 5)
    best = Judge()(made).argmax(1)
    p = out.assignments[0][0].prompt
    assert (
        torch.equal(p.a, made.a[torch.arange(G), best])
        and torch.equal(p.s, made.s[torch.arange(G), best])
        and (best > 0).any()
    )
    assert (
        out.env_steps == score.env_steps - 77 == 10 * G * 5
        and small(candidates=5).adapt(pi, dem, 0, Judge()).env_steps == 0
    )
    with raises("keep='score' needs `score`"):
        t.adapt(pi, dem, 0)


@both
@pytest.mark.parametrize(
    "bad, near",
    [
        (dict(schedule="vpp"), "schedule 'vpp': did you mean 'vp'"),
        (dict(guidance="allways"), "guidance 'allways': did you mean 'always'"),
        (dict(condition="promt"), "condition 'promt': did you mean 'prompt'"),
        (dict(keep="frist"), "keep 'frist': did you mean 'first'"),
        (dict(source="difused"), "source 'difused': did you mean 'diffused'"),
        (dict(N=0), "N = 0 and candidates = 1.*at least 1"),
        (dict(candidates=0), "candidates = 0"),
    ],
    ids=str,
)
def test_refused(Tuner, bad, near):
    "In one line, before any work."
    pi, dem = toy()
    with raises(near):
        small(Tuner, **bad).adapt(pi, dem, 0, Judge())
    with raises(near):
        small(Tuner, **bad).prepare(pi, untouchable(), 0)


def test_best_by_score_of_a_prepared_one():
    "A score is for adapting: preparing does without it."
    pi, dem = toy()
    out = small(keep="score", candidates=2).prepare(pi, families(dem), 0).adapt(pi, dem, 0, Judge())
    assert out.env_steps == 10 * G * 2


# ---- what is left behind


@both
def test_generator_saved_and_loaded(Tuner, tmp_path):
    "The prompts it writes are the same, bit for bit, and the one that the policy got is among them."
    pi, dem = toy()
    t = small(Tuner).prepare(pi, families(dem), 0)
    out = t.adapt(pi, dem, 0)
    out.generator.save_pretrained(tmp_path)
    again = t.DIFFUSER.from_pretrained(tmp_path)
    y = dem.prompt[:, None]
    a, b = (t.write(d, y, 0, 3) for d in (out.generator, again))
    assert same(snapshot(a), snapshot(b)) and same(again.state_dict(), out.generator.state_dict())
    assert (
        same(snapshot(t.write(again, y, 0)[:, 0]), snapshot(out.assignments[0][0].prompt))
        and out.generator.N == again.N == 4
        and not any(p.requires_grad for p in out.generator.parameters())
    )


@pytest.mark.parametrize("other", [dict(depth=1), dict(depth=3)], ids=str)
def test_no_generator_is_loaded_in_part(other, tmp_path):
    "As for a policy: weights too many or too few for the configuration are an error, never silently another diffuser."
    Diffuser(S, A, P, width=D, depth=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **other}))
    with pytest.raises((RuntimeError, PromptnbError)):
        Diffuser.from_pretrained(tmp_path)


def test_no_generator_is_unpickled(tmp_path):
    "As for a policy: only safetensors are read; what a hub repository offers instead is refused."
    d = Diffuser(S, A, P, width=16)
    torch.save(d.state_dict(), file := tmp_path / "pytorch_model.bin")
    for thing in (toy()[0], d):
        with raises("only safetensors are read"):
            type(thing)._load_as_pickle(thing, str(file), "cpu", True)


@both
@pytest.mark.parametrize("T", [40, P - 1], ids=["", "padded prompts"])
def test_facts_and_look(Tuner, T):
    "Finite numbers for each task and each checkpoint of the preparation; eight prompts, one chain."
    pi, dem = toy(T=T)
    t = small(Tuner).prepare(pi, families(dem), 0)
    out = t.adapt(pi, dem, 0)
    cosines = [f for f in out.facts if f["metric"] == "cosine"]
    others = Counter((f["metric"], f["task"]) for f in out.facts if f["metric"] != "cosine")
    assert others == {(m, g): 1 for m in ("spread", "spread_demos", "nearest_demo") for g in range(G)}
    assert [(f["step"], f["task"]) for f in cosines] == [(t, -1) for t in range(1, 7)]
    assert all(math.isfinite(f["value"]) for f in out.facts) and all(abs(f["value"]) <= 1 for f in cosines)
    n = 2 if Tuner is DirectPrompt else SMALL["N"] + 1
    shapes = dict(written=(G, 8, P, S + A), demonstrated=(G, 8, P, S + A), chain=(n, P, D), chain_error=(G, n))
    assert {k: tuple(v.shape) for k, v in out.look.items()} == shapes
    assert all(torch.isfinite(v).all() for v in out.look.values())
    d, padding = out.generator, 1 - dem.prompt.mask[0, :, None]
    last = ((out.look["chain"][-1] - d.mean) / d.std).abs().max()
    assert Tuner is DirectPrompt or last <= 3 + 1e-5
    assert (out.look["written"] * padding).abs().max() == 0 or T > P


def by_hand(x, m=8):
    "Mean root mean squared difference of all pairs of different rows of x (m, n)."
    return np.mean([(x[i] - x[j]).square().mean().sqrt().item() for i in range(m) for j in range(m) if i != j])


def test_spread_by_hand():
    "In standard deviations of the demonstrations, an entry."
    pi, dem = toy()
    out = small().adapt(pi, dem, 0)
    d = out.generator
    made, shown = (((out.look[k] - d.mean[:-1]) / d.std[:-1]).flatten(2) for k in ("written", "demonstrated"))
    want = dict(
        spread=[by_hand(x) for x in made],
        spread_demos=[by_hand(x) for x in shown],
        nearest_demo=[
            np.mean([min((a - b).square().mean().sqrt().item() for b in shown[g]) for a in made[g]]) for g in range(G)
        ],
    )
    for metric, values in want.items():
        got = [f["value"] for f in out.facts if f["metric"] == metric]
        assert got == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize("source", ["untrained", "noise"])
def test_controls_move_nothing(source):
    pi, dem = toy()
    assert small(source=source).adapt(pi, dem, 0).trainable == 0


def test_direct_is_deterministic():
    "The control writes one prompt for a condition, whatever the seed, with as many parameters."
    pi, dem = toy()
    t = small(DirectPrompt)
    out = t.adapt(pi, dem, 0)
    made = t.write(out.generator, dem.prompt[:, None], 0, 9)
    other = t.write(out.generator, dem.prompt[:, None], 1, 9)
    assert (
        same(snapshot(made), snapshot(other))
        and (made.a == made.a[:, :1]).all()
        and [f["value"] for f in out.facts if f["metric"] == "spread"] == pytest.approx([0] * G, abs=1e-5)
    )
    ours = small().adapt(pi, dem, 0)
    assert out.trainable == ours.trainable > 0 and all(f["value"] > 0.1 for f in ours.facts if f["metric"] == "spread")


def test_direct_by_hand():
    """It starts at the mean demonstrated prompt.

    Its loss is the squared error, in standard deviations, of one forward from zeros at step 0."""
    pi, dem = toy(T=P - 1)
    t = small(DirectPrompt, source="untrained")
    d = t.adapt(pi, dem, 0).generator
    y, r, _ = dem.draw(3, 6)
    x, at = transitions(y, r), torch.zeros(y.t.shape).long()
    assert torch.equal(d.sample(y), d.mean.expand_as(x))
    torch.nn.init.normal_(d.net.body[-1].weight, std=0.1)
    out = plain_noise(d, torch.zeros_like(x), y, at)
    err = ((x - d.mean) / d.std - out).square().mean(-1)
    torch.testing.assert_close(
        d.loss(x, y).double(), torch.stack([e[m > 0].mean() for e, m in zip(err, y.mask)]), rtol=1e-6, atol=1e-6
    )


# ---- padded prompts


@both
@pytest.mark.parametrize(
    "kw", [{}, dict(source="untrained"), dict(source="noise"), dict(candidates=3, keep="demos")], ids=str
)
def test_padding_stays_empty(Tuner, kw):
    "Where a prompt is shorter than P, the written one has zeros there, and the same mask."
    pi, dem = toy(T=P - 1)
    p = small(Tuner, **kw).adapt(pi, dem, 0).assignments[0][0].prompt
    gap = dem.prompt.mask == 0
    assert (
        gap.any()
        and not gap.all()
        and torch.equal(p.mask, dem.prompt.mask)
        and all((x[gap] == 0).all() for x in (p.s, p.a, p.rtg, p.t))
        and (p.s[~gap] != 0).all()
    )


@pytest.mark.parametrize("kind", [Diffuser, Regressor])
def test_padding_is_not_learned(kind):
    "What stands at padded steps changes neither the statistics, nor L_DM, nor its gradient."
    _, dem = toy(T=P - 1)
    y, r, _ = dem.draw(0, 6)
    x, gap, out = transitions(y, r), y.mask[..., None] == 0, []
    for fill in (0.0, 50.0):
        z, c = x.masked_fill(gap, fill), replace(y, rtg=y.rtg.masked_fill(gap, fill))
        torch.manual_seed(0)
        d = kind(S, A, P, width=16).fit_scale(z, c)
        torch.manual_seed(1)
        loss = d.loss(z, c)
        loss.sum().backward()
        out.append([loss, d.mean, d.std, d.rtg_mean, d.rtg_std, *(p.grad for p in d.parameters())])
    assert gap.any() and all(torch.equal(a, b) for a, b in zip(*out)) and out[0][0].min() > 0
