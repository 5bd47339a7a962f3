"LaMo on pictures: the network written out, padding and memory that change nothing, learning, saving."

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("ale_py")

from promptnb import tasks
from promptnb.core import Batch, PromptnbError
from promptnb.data import Sampler, from_arrays
from promptnb.evaluate import Buffers, ImageBuffers, eval_tasks, rollout
from promptnb.models.lm import LamoBatch, counts
from promptnb.models.pixels import Eye, PixelConfig, PixelLamo
from promptnb.tasks import atari
from promptnb.train import FitConfig, fit

K, A, FRAMES = 6, 4, (4, 84, 84)
TINY = PixelConfig(28224, A, layers=2, heads=1, width=32, vocab=30, dropout=0.0)


def policy(**kw):
    "A policy whose LoRA has already moved."
    torch.manual_seed(0)
    pi = PixelLamo(asdict(replace(TINY, **kw)), K=K).eval()
    for n, p in pi.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    return pi


@pytest.fixture(scope="module")
def store():
    "Four games of the shipped policy, 250 steps of each."
    vec = atari.LockStep(replace(tasks.family("breakout"), horizon=250), [0] * 4, threads=1)
    act, out = atari.script(vec, "expert", np.random.default_rng(0)), []
    obs, _ = vec.reset(seed=[1, 2, 3, 4])
    for _ in range(250):
        a = act(obs)
        before = obs
        obs, r, *_ = vec.step(a)
        out.append((before[:, -1], np.eye(A, dtype=np.float32)[a], r))
    s, a, r = (np.stack(x, 1) for x in zip(*out))
    vec.close()
    return from_arrays([dict(observations=s[i], actions=a[i], rewards=r[i]) for i in range(4)], family="breakout")


@pytest.fixture(scope="module")
def sampler(store):
    return Sampler(store, torch.zeros(1), torch.ones(1), scale=1.0, K=K, per_task=8, H=0)


def played(steps, n=3, k=K, seed=0):
    "A game of noise: at each step, the step, and ImageBuffers and Buffers that have seen the same."
    g, targets = np.random.default_rng(seed), np.arange(n) * 10.0
    rings = ImageBuffers(n, steps, k, FRAMES, A, targets, "cpu")
    plain = Buffers(n, steps, k, 28224, A, targets, "cpu")
    for t in range(steps):
        x = g.integers(0, 256, (n, *FRAMES), np.uint8)
        a = F.one_hot(torch.from_numpy(g.integers(A, size=n)), A).float()
        r = g.random(n)
        rings.observe(t, x)
        plain.observe(t, x.reshape(n, -1))
        yield t, rings, plain
        rings.acted(t, a, r)
        plain.acted(t, a, r)


def windows(steps):
    "A copy of each step's window of a game of noise."
    for t, ring, _ in played(steps):
        yield ring.window(t).map(torch.clone)


# ---- evaluation


@pytest.mark.parametrize("k", [1, 2, K])
def test_the_ring_shows_what_buffers_show(k):
    for t, ring, plain in played(3 * k + 2, k=k):
        for rows in (slice(None), torch.tensor([2, 0])):
            a, b = ring.window(t, rows), plain.window(t, rows)
            assert a.s.dtype == torch.uint8
            assert torch.equal(a.s.flatten(2).float(), b.s)
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("a", "rtg", "t", "mask"))


def test_the_ring_does_not_grow_with_the_game():
    "27,000 steps: the pictures stay those of two windows, in one byte each."
    b = ImageBuffers(2, 27_000, K, FRAMES, A, 0.0, "cpu")
    assert b.s.nbytes == 2 * 2 * K * 28224
    assert b.window(26_999).s._base is b.s
    assert b.a.nbytes < 1e6


def test_acting_embeds_one_picture_a_row(monkeypatch):
    pi, seen = policy(), []
    pi.embed["s"].net.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    past = pi.begin([0, 1, 2])
    for t, ring, _ in played(2 * K):
        pi.act(ring.window(t), past)
    assert seen == [3] * 2 * K
    pi.act(ring.window(t))
    assert seen[2 * K :] == [3] * K  # without memory: all, but one a row at a time


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(use_positions=False, norm_before_time=True),
        dict(embed="linear", tanh=True, tanh_state=True),
        dict(split=True, bias=True),
    ],
)
def test_memory_changes_nothing(kw):
    pi = policy(**kw)
    past = pi.begin([0, 1, 2])
    for t, ring, _ in played(2 * K + 3):
        w = ring.window(t)
        whole = pi(replace(w, rtg=w.rtg / pi.rtg_scale))[:, -1].detach()
        torch.testing.assert_close(pi.act(w, past), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pi.act(w), whole, atol=1e-5, rtol=1e-5)


def test_memory_of_another_step_is_not_used():
    pi, ws = policy(), list(windows(9))
    past = pi.begin([0, 1, 2])
    for t in (0, 1, 5, 5, 2, 3, 0):
        torch.testing.assert_close(pi.act(ws[t], past), pi.act(ws[t]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kw", [{}, dict(use_positions=False)])
def test_padding_is_not_seen(kw):
    pi = policy(**kw)
    for t, padded in enumerate(windows(K)):
        torch.testing.assert_close(pi.act(padded), pi.act(padded[:, K - 1 - t :]), atol=1e-5, rtol=1e-5)


class Forgets(PixelLamo):
    "Embeds the whole window at each step."

    def begin(self, rows):
        self.eval()


def play(*policies):
    "Two games of 30 steps for each policy, with two targets."
    return rollout(
        [task for p in policies for task in eval_tasks(p, [0])],
        "breakout",
        episodes=2,
        target=[90.0, 120.0] * len(policies),
        limit=30,
        threads=1,
        keep=True,
    )


def test_plays_breakout():
    x = play(policy())
    assert x.returns.shape == (1, 2)
    assert (x.lengths == 30).all()
    assert not x.failed.any()
    assert x.trace["a"].shape == (2, 30, A)
    assert "s" not in x.trace


def test_plays_alike_without_memory_and_beside_another():
    pi = policy()
    forgetful = Forgets(asdict(TINY), K=K)
    forgetful.load_state_dict(pi.state_dict())
    alone, without_memory, second = play(pi), play(forgetful), play(policy(embed="linear"), pi)
    assert np.array_equal(alone.trace["a"], without_memory.trace["a"])
    assert np.array_equal(alone.trace["a"], second.trace["a"][2:])
    assert np.array_equal(alone.returns[0], second.returns[1])


def test_who_may_play():
    class Flat:
        def begin(self, rows):
            return None

    with pytest.raises(PromptnbError, match="breakout shows pictures"):
        rollout(eval_tasks(Flat(), [0]), "breakout", episodes=1)


def test_limit_ends_other_families_too():
    class Still:
        def begin(self, rows):
            return None

        def act(self, h, state):
            return torch.zeros(len(h), 6)

    x = rollout(eval_tasks(Still(), [0]), "cheetah-dir", episodes=2, limit=7, keep=True)
    y = rollout(eval_tasks(Still(), [0]), "cheetah-dir", episodes=2, limit=10**6)
    assert (x.lengths == 7).all()
    assert x.trace["s"].shape == (2, 8, 20)
    assert (y.lengths == 200).all()


# ---- the network


def test_eye_by_hand():
    torch.manual_seed(0)
    eye = Eye(FRAMES, 32)
    x = torch.randint(0, 256, (2, 3, *FRAMES), dtype=torch.uint8)
    p = list(eye.parameters())
    h = x.flatten(0, 1).float() / 255
    for w, b, stride in zip(p[0:6:2], p[1:6:2], (4, 2, 1)):
        h = F.conv2d(h, w, b, stride).relu()
    assert h.shape[1:] == (64, 7, 7)
    assert [tuple(w.shape[1:]) for w in p[0:6:2]] == [(4, 8, 8), (32, 4, 4), (64, 3, 3)]
    h = F.linear(h.flatten(1), p[6], p[7])
    h = F.linear(h, p[8], p[9])
    h = h + F.linear(F.gelu(h), p[10], p[11])
    torch.testing.assert_close(eye(x), h.unflatten(0, (2, 3)))
    assert torch.equal(eye(h), h)


@pytest.mark.parametrize("kw", [{}, dict(embed="linear"), dict(embed="linear", share_projection=True)])
def test_shapes_and_order(kw, sampler):
    "A score at each state; the later steps and the step's own action do not reach it."
    pi, x = policy(**kw), sampler.batch(0).history
    y = pi(x)
    assert x.s.shape == (8, K, *FRAMES)
    assert y.shape == (8, K, A)
    cut = replace(x, s=x.s.clone(), a=x.a.clone())
    cut.s[:, 4:] = 7
    cut.a[:, 3:] = 0
    torch.testing.assert_close(pi(cut)[:, :4], y[:, :4])
    assert not torch.allclose(pi(cut)[:, 4:], y[:, 4:])


def test_loss_by_hand(sampler):
    pi, x = policy(), sampler.batch(1).history
    mask = x.mask.clone()
    mask[0, :3] = 0
    x = replace(x, mask=mask)
    p = pi(x).softmax(-1).log()
    terms = [-p[i, j, x.a[i, j].argmax()] for i in range(len(x)) for j in range(K) if x.mask[i, j]]
    torch.testing.assert_close(pi.loss(Batch(x)), torch.stack(terms).mean())
    text = torch.randint(30, (2, 9))
    torch.testing.assert_close(
        pi.loss(LamoBatch(x, text)), torch.stack(terms).mean() + 0.1 * pi.lm.loss(LamoBatch(None, text))
    )


def test_squashed_scores_on_demand(sampler):
    x = sampler.batch(0).history
    assert policy(tanh=True)(x).abs().max() < 1
    torch.testing.assert_close(policy(tanh=True)(x), policy()(x).tanh())


def test_what_trains():
    "LoRA of the merged projection: r (d + 3d) numbers a block; no bias of it."
    pi = policy()
    c = counts(pi)
    assert c["lora"] == 2 * 32 * (32 + 96)
    assert not any("base_layer" in n for n, p in pi.named_parameters() if p.requires_grad)
    assert all(p.requires_grad for n, p in pi.named_parameters() if not n.startswith("lm."))


# ---- learning and saving


def test_learns(sampler):
    log = fit(policy(train="full"), sampler, FitConfig(steps=20, lr=1e-3, warmup=1, log_every=5))
    assert log.status == "ok", log.losses
    assert log.losses[-1][1] < log.losses[0][1] - 0.02, log.losses


def test_comes_back(tmp_path, sampler):
    pi = policy()
    pi.save_pretrained(tmp_path)
    back = PixelLamo.from_pretrained(tmp_path).eval()
    x = sampler.batch(0).history
    assert torch.equal(back(x), pi(x))
    assert back.config == pi.config
    assert (back.K, back.rtg_scale) == (K, 1.0)
    assert back.config.frames == FRAMES
    assert repr(back).startswith("PixelLamo(")


def test_sizes_must_agree():
    with pytest.raises(PromptnbError, match="state_dim is 17, but frames 4 x 84 x 84 have 28224 numbers"):
        PixelConfig(17, A)
