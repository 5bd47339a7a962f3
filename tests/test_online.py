"Guided PPO: the environments against a plain loop, the sentence's way into the policy, kills, and what one switch each changes."

import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("crafter")
from promptnb import online as O
from promptnb.core import PromptnbError, plain, rng_for, seed_for
from promptnb.online import Guided, PPOConfig, Trainer, play, play_random
from promptnb.tasks import crafter

C = PPOConfig(net="nature", envs=2, rollout=16, batch=16, epochs=1, interval=7, length=40)


@pytest.fixture(autouse=True, scope="module")
def one_thread_no_disk():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda _: None)
        yield
    torch.set_num_threads(n)


# ---- helpers


class Advisor:
    "Sentences that depend on the scene and on how much it has said: an advisor with a state."

    def __init__(self, many=5):
        self.n, self.many, self.heard, self.calls = 0, many, [], 0

    def __call__(self, scenes):
        self.calls += 1
        return [self.one(s) for s in scenes]

    def one(self, s):
        self.n += 1
        self.heard.append(s)
        return f"{self.n % self.many} {len(s['seen'])} {s['env']}"

    def state(self):
        return dict(n=self.n)

    def load(self, m):
        self.n = m["n"]


def encode(texts):
    return np.stack([rng_for("sentence", s).standard_normal(384).astype(np.float32) / 20 for s in texts])


def zeros(texts):
    return np.zeros((len(texts), 384), np.float32)


def trainer(folder, c=C, seed=0, advise="own", encode=encode, **kw):
    return Trainer(c, seed, folder, Advisor() if advise == "own" else advise, encode, **kw)


def begun(*a, **kw):
    return trainer(*a, **kw).begin()


def went(folder, steps=32, *a, **kw):
    t = begun(folder, *a, **kw)
    t.go(steps)
    return t


def rollout(t):
    "One rollout into the buffer, without the update."
    torch.manual_seed(1)
    t.envs.begin_rollout()
    t.model.collect_rollouts(t.envs, t.quiet, t.model.rollout_buffer, t.c.rollout)
    return t.model.rollout_buffer


def weights(t, *parts):
    return {k: p.detach().clone() for k, p in t.policy.named_parameters() if not parts or any(x in k for x in parts)}


def whole(t):
    "All of a trainer that what follows depends on, and what it has noted."
    m, opt = t.model, t.policy.optimizer.state_dict()
    tensors = (
        weights(t)
        | {f"{i}.{k}": v.clone() for i, s in opt["state"].items() for k, v in s.items()}
        | dict(
            table=t.policy.features_extractor.table.clone(),
            obs=torch.tensor(m._last_obs["image"]),
            ids=torch.tensor(m._last_obs["text"]),
        )
    )
    return tensors, plain(
        dict(
            envs=t.envs.state(),
            starts=m._last_episode_starts,
            step=t.step,
            updates=m._n_updates,
            lr=opt["param_groups"][0]["lr"],
            eps=opt["param_groups"][0]["eps"],
            losses=t.losses,
            log=t.envs.episodes,
            restarts=t.restarts,
        )
    )


def same(a, b):
    "Bit for bit."
    (x, m), (y, n) = (whole(t) if isinstance(t, Trainer) else t for t in (a, b))
    assert x.keys() == y.keys() and m.keys() == n.keys()
    assert not [k for k in x if not torch.equal(x[k], y[k])] and not [k for k in m if m[k] != n[k]]


def forked(f):
    "f in a copy of this process; the signal that ended it (0: none, and f came to its end)."
    if not (pid := os.fork()):
        signal.alarm(100)
        try:
            f()
            os._exit(0)
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code <= 0
    return -code


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def batch(n=3, seed=0, ids=0):
    g = torch.Generator().manual_seed(seed)
    return dict(
        image=torch.randint(256, (n, 3, 64, 64), generator=g).float(),
        text=torch.randint(ids + 1, (n, 1), generator=g).float(),
    )


def outputs(policy, obs):
    "Logits (B, 17) and values (B, 1)."
    with torch.no_grad():
        return policy.get_distribution(obs).distribution.logits, policy.predict_values(obs)


# ---- environments, against a loop over single ones


def plain_guided(c, seed, actions, advise):
    "actions (steps, envs). One environment after the other, bookkeeping of its own: (per step: pictures, sentences, rewards, ends; episodes; scenes of each call)."
    games, text = [crafter.Crafter(c.length) for _ in range(c.envs)], [""] * c.envs
    now = [g.reset(seed=seed_for(seed, "env", i) % 2**31)[0] for i, g in enumerate(games)]
    done_so_far, life, ret, had, rose, number, calls, log, episodes = (
        [[] for _ in games],
        [0] * c.envs,
        [0.0] * c.envs,
        [{} for _ in games],
        [[] for _ in games],
        [1] * c.envs,
        [],
        [],
        [],
    )

    def ask(who, fresh):
        if not who:
            return
        scenes = [
            dict(
                env=i,
                step=len(done_so_far[i]),
                episode=number[i],
                **games[i].scene(),
                actions=tuple(done_so_far[i][-c.interval :]),
                events=tuple(rose[i]),
                fresh=i in fresh,
            )
            for i in who
        ]
        calls.append(scenes)
        for i, s in zip(who, advise(scenes)):
            text[i], rose[i] = s, []

    ask(list(range(c.envs)), set(range(c.envs)))
    log.append(([x.copy() for x in now], list(text), None, None))
    for row in actions:
        fresh, rewards, ends = set(), [], []
        for i, g in enumerate(games):
            now[i], r, dead, cut, info = g.step(row[i])
            life[i] += 1
            ret[i] += r
            done_so_far[i].append(crafter.ACTIONS[row[i]])
            for a in crafter.ACHIEVEMENTS:
                if info["achievements"][a] > had[i].get(a, 0):
                    rose[i].append(a)
            had[i] = info["achievements"]
            rewards.append(r)
            ends.append(dead or cut)
            if dead or cut:
                episodes.append(
                    dict(
                        env=i,
                        length=life[i],
                        ret=round(ret[i], 4),
                        died=dead,
                        unlocked=tuple(a for a in crafter.ACHIEVEMENTS if had[i][a]),
                        behaviour=info["behaviour"],
                    )
                )
                now[i], number[i], life[i], ret[i], had[i] = g.reset()[0], number[i] + 1, 0, 0.0, {}
                fresh.add(i)
        ask([i for i in range(c.envs) if len(done_so_far[i]) % c.interval == 0 or c.ask_on_reset and i in fresh], fresh)
        log.append(([x.copy() for x in now], list(text), rewards, ends))
    return log, episodes, calls


def guided(c, seed, actions, advise):
    "The same of `Guided`."
    calls, log = [], []

    def listen(scenes):
        calls.append(scenes)
        return advise(scenes)

    v = Guided(c, seed, listen, encode)

    def name(ids):
        return [next(s for s, j in v.texts.items() if j == k) for k in ids[:, 0]]

    obs = v.reset()
    log.append(([x.transpose(1, 2, 0) for x in obs["image"]], name(obs["text"]), None, None))
    for row in actions:
        v.step_async(row)
        obs, r, d, _ = v.step_wait()
        log.append(([x.transpose(1, 2, 0) for x in obs["image"]], name(obs["text"]), r.tolist(), d.tolist()))
    return log, v.episodes, calls, v


SCRIPTS = {
    "random": lambda rng, n, envs: rng.integers(17, size=(n, envs)),
    "busy": lambda rng, n, envs: rng.choice([1, 2, 3, 4, 5, 5, 5, 8, 11], size=(n, envs)),
    "idle": lambda rng, n, envs: np.zeros((n, envs), int),
}


@pytest.mark.parametrize("ask_on_reset", [True, False])
@pytest.mark.parametrize(
    "script,envs,length,steps", [("random", 3, 25, 120), ("busy", 2, 10_000, 400), ("idle", 1, 10_000, 420)]
)
def test_guided_equals_a_plain_loop(script, envs, length, steps, ask_on_reset):
    "Pictures, sentences, rewards, ends, episodes and scenes, with lives that end by death and by the time limit."
    c = replace(C, envs=envs, length=length, interval=10, ask_on_reset=ask_on_reset)
    actions = SCRIPTS[script](np.random.default_rng(0), steps, envs)
    (want, episodes, calls), (got, own, heard, v) = (
        plain_guided(c, 5, actions, Advisor(many=10**6)),
        guided(c, 5, actions, Advisor(many=10**6)),
    )
    for t, (a, b) in enumerate(zip(want, got, strict=True)):
        assert np.array_equal(a[0], b[0]) and a[1] == b[1] and a[3] == b[3], t
        assert a[2] is None or np.allclose(a[2], b[2], atol=1e-6), t
    assert calls == heard and all(len(c) for c in calls)
    assert episodes and [{k: x for k, x in e.items() if k != "step"} for e in own] == episodes
    assert {e["died"] for e in episodes} == {script != "random"}  # both ways to end are met
    assert (
        np.array_equal(v.table, np.concatenate([zeros([""]), encode(list(v.texts)[1:])]))
        and v.t.tolist() == [steps] * envs
    )
    assert all(e["step"] <= f["step"] for e, f in zip(own, own[1:])) and own[-1]["step"] <= steps * envs
    if script == "busy":
        assert any(
            len(s["events"]) > len(set(s["events"])) for call in calls for s in call
        )  # an achievement counts each time


def test_observations_are_channels_first():
    v = Guided(C, 0)
    obs = v.reset()
    assert v.observation_space.contains({k: x[0] for k, x in obs.items()})
    for a in range(17):
        v.step_async([a, 16 - a])
        obs = v.step_wait()[0]
        assert obs["image"].shape == (2, 3, 64, 64) and obs["image"].dtype == np.uint8 and obs["text"].shape == (2, 1)
        for i, e in enumerate(v.envs):
            assert np.array_equal(obs["image"][i].transpose(1, 2, 0), e.render())
    assert np.abs(obs["image"][0].astype(int) - obs["image"][1]).max() > 0  # two environments, two worlds


def test_events_of_a_short_life(monkeypatch):
    "What a life begins with is new, whatever the life before it had."

    class Short(crafter.Crafter):  # one step long; each step gives wood
        def step(self, a):
            out = super().step(a)
            out[-1]["achievements"]["collect_wood"] = 1
            return out

    monkeypatch.setattr(crafter, "Crafter", Short)
    a = Advisor()
    v = Guided(replace(C, envs=1, length=1), 0, a, encode)
    v.reset()
    for _ in range(3):
        v.step_async([0])
        v.step_wait()
    assert [s["events"] for s in a.heard] == [()] + 3 * [("collect_wood",)] and [
        e["unlocked"] for e in v.episodes
    ] == 3 * [("collect_wood",)]


def test_an_earlier_observation_stays_as_it_was():
    "stable-baselines3 stores the observation after the step is done."
    v = Guided(C, 0, Advisor(10**6), encode)
    obs = v.reset()
    kept = {k: x.copy() for k, x in obs.items()}
    for _ in range(7):
        v.step_async([1, 2])
        v.step_wait()
    assert all(np.array_equal(obs[k], kept[k]) for k in kept)


@pytest.mark.parametrize("steps,interval", [(20, 7), (21, 7), (22, 7), (5, 10), (30, 1)])
def test_number_of_queries(steps, interval):
    "ceil(steps / K) sentences are acted on by each environment; where K divides the steps one more was asked for, for the step to come."
    a = Advisor(10**6)
    c = replace(C, interval=interval, length=15, ask_on_reset=False)
    v = Guided(c, 0, a, encode)
    ids = [v.reset()["text"]]
    for _ in range(steps):
        v.step_async([0, 0])
        ids.append(v.step_wait()[0]["text"])
    for i in range(2):
        assert len({int(x[i, 0]) for x in ids[:-1]}) == -(-steps // interval)
        assert sum(s["env"] == i for s in a.heard) == steps // interval + 1
        assert [s["step"] for s in a.heard if s["env"] == i] == list(range(0, steps + 1, interval))
    assert a.calls == steps // interval + 1  # all environments in one call


def test_a_new_life_asks_at_once():
    a = Advisor(10**6)
    v = Guided(replace(C, interval=10, length=13), 0, a, encode)
    v.reset()
    for _ in range(40):
        v.step_async([0, 0])
        v.step_wait()
    at = [(s["step"], s["fresh"]) for s in a.heard if s["env"] == 1]
    assert at == [
        (0, True),
        (10, False),
        (13, True),
        (20, False),
        (26, True),
        (30, False),
        (39, True),
        (40, False),
    ]  # beside every K steps, on one clock for all
    assert [s["episode"] for s in a.heard if s["env"] == 1] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_without_an_advisor_nothing_is_asked():
    v = Guided(C, 0)
    v.reset()
    for _ in range(50):
        v.step_async([0, 0])
        obs = v.step_wait()[0]
    assert list(v.texts) == [""] and not obs["text"].any() and v.state()["advise"] is None


# ---- networks


def test_parameters():
    "The paper's net is counted without memory for it."
    from stable_baselines3.common.policies import MultiInputActorCriticPolicy

    v = Guided(C, 0)

    def count(net, text):
        with torch.device("meta"):
            p = MultiInputActorCriticPolicy(
                v.observation_space,
                v.action_space,
                lambda _: 1e-4,
                net_arch=[],
                features_extractor_class=O.Extractor,
                features_extractor_kwargs=dict(net=net, text=text),
                ortho_init=False,
            )
        assert {x.device.type for x in p.parameters()} == {"meta"}
        return sum(x.numel() for x in p.parameters())

    assert count("spcnn", True) == 134_736_850 and count("nature", True) == 807_090
    assert count("spcnn", False) == 134_736_850 - 385 * 512 and count("nature", False) == 807_090 - 385 * 512


def test_parameters_of_the_policy_that_is_trained(tmp_path):
    assert sum(p.numel() for p in trainer(tmp_path).policy.parameters()) == 807_090


@pytest.mark.parametrize("net", ["nature", "impala"])
def test_forward(net, tmp_path):
    t = trainer(tmp_path, replace(C, net=net))
    logits, value = outputs(t.policy, batch())
    assert logits.shape == (3, 17) and value.shape == (3, 1) and logits.isfinite().all() and value.isfinite().all()
    assert logits.exp().sum(-1).allclose(torch.ones(3)) and (logits[0] - logits[1]).abs().max() > 0


def test_the_image_is_scaled_once(tmp_path):
    "The net sees bytes / 255, and the feature is the image's plus the sentence's."
    t = trainer(tmp_path)
    ex, obs = t.policy.features_extractor, batch(ids=2)
    t.envs.add_sentences(["a", "b"])
    with torch.no_grad():
        want = (
            ex.image(obs["image"] / 255)
            + torch.as_tensor(t.envs.table)[obs["text"][:, 0].long()] @ ex.text.weight.T
            + ex.text.bias
        )
        x = t.policy.extract_features(obs, ex)
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        outputs(t.policy, obs)[1],
        x.detach() @ t.policy.value_net.weight.T.detach() + t.policy.value_net.bias.detach(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_half_precision_is_near(tmp_path):
    a, b = (outputs(trainer(tmp_path / str(k), replace(C, bf16=k)).policy, batch()) for k in (False, True))
    assert b[0].dtype == torch.float32 and 0 < (a[0] - b[0]).abs().max() < 0.02 and (a[1] - b[1]).abs().max() < 0.1


def test_unknown_net_and_batch(tmp_path):
    with pytest.raises(PromptnbError, match=r"^unknown net 'natur': did you mean 'nature'\?$"):
        trainer(tmp_path, replace(C, net="natur"))
    with pytest.raises(PromptnbError, match="^batch is 15, but must divide envs x rollout = 32$"):
        trainer(tmp_path, replace(C, batch=15))


def test_arms_begin_alike(tmp_path):
    "Image, action and value nets follow from the seed, with and without a text head."
    a, b, other = (
        trainer(tmp_path / "a"),
        trainer(tmp_path / "b", replace(C, text=False), advise=None),
        trainer(tmp_path / "c", seed=1),
    )
    x, y, z = weights(a), weights(b), weights(other)
    assert {*x} - {*y} == {"features_extractor.text.weight", "features_extractor.text.bias"} and not {*y} - {*x}
    assert all(torch.equal(x[k], y[k]) for k in y) and not any(
        torch.equal(x[k], z[k]) for k in x if k.endswith("weight")
    )
    assert all(not x[k].any() for k in x if k.endswith("bias"))
    for k, gain in (("action_net", 0.01), ("value_net", 1.0), ("features_extractor.text", 2**0.5)):
        w = x[f"{k}.weight"]
        m = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        torch.testing.assert_close(m, gain**2 * torch.eye(len(m)), rtol=1e-4, atol=1e-5)


def test_hyperparameters_reach_the_learner(tmp_path):
    c = replace(C, lr=3e-4, gamma=0.9, lam=0.5, clip=0.3, entropy=0.02, value=0.7, max_grad=0.4, epochs=3)
    m = trainer(tmp_path, c).model
    g = m.policy.optimizer.param_groups[0]
    assert (
        m.gamma,
        m.gae_lambda,
        m.clip_range(1.0),
        m.ent_coef,
        m.vf_coef,
        m.max_grad_norm,
        m.n_epochs,
        m.batch_size,
        m.n_steps,
        m.normalize_advantage,
    ) == (0.9, 0.5, 0.3, 0.02, 0.7, 0.4, 3, 16, 16, True)
    assert (
        g["lr"] == 3e-4
        and g["eps"] == 1e-5
        and g["weight_decay"] == 0
        and (m.rollout_buffer.gamma, m.rollout_buffer.gae_lambda) == (0.9, 0.5)
    )
    d = PPOConfig()
    assert (
        d.net,
        d.envs,
        d.rollout,
        d.batch,
        d.epochs,
        d.lr,
        d.gamma,
        d.lam,
        d.clip,
        d.entropy,
        d.value,
        d.max_grad,
        d.length,
        d.interval,
    ) == ("spcnn", 1, 4096, 128, 4, 1e-4, 0.95, 0.65, 0.2, 0.0, 0.5, 0.5, 10_000, 100)


# ---- the sentence's way into the policy


def pairs(t, obs):
    return outputs(t.policy, obs), outputs(t.policy, dict(obs, text=torch.zeros_like(obs["text"])))


def test_with_zero_embeddings_guided_equals_unguided(tmp_path):
    "E = 0: logits and values before training, and after it where the head's bias is zero."
    a, b = begun(tmp_path / "a", encode=zeros), trainer(tmp_path / "b", replace(C, text=False), advise=None)
    obs = batch(8, ids=4)
    a.envs.add_sentences(list("abcd"))
    for x, y in zip(outputs(a.policy, obs), outputs(b.policy, obs)):
        assert torch.equal(x, y)
    a.go(64)
    head = a.policy.features_extractor.text
    with torch.no_grad():
        assert head.bias.abs().max() > 0 and not torch.equal(outputs(a.policy, obs)[0], outputs(b.policy, obs)[0])
        for k, p in b.policy.named_parameters():
            p.copy_(dict(a.policy.named_parameters())[k])
        head.bias.zero_()
    for x, y in zip(outputs(a.policy, obs), outputs(b.policy, obs)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("how", ["embeddings", "head"])
def test_with_nothing_said_training_is_the_same(how, tmp_path):
    "E = 0 with the bias fixed, or the whole head zero and fixed: the same actions, episodes and weights as without a text head."
    a, b = (
        trainer(tmp_path / "a", encode=zeros if how == "embeddings" else encode),
        trainer(tmp_path / "b", replace(C, text=False), advise=None),
    )
    head = a.policy.features_extractor.text
    head.bias.requires_grad_(False)
    if how == "head":
        with torch.no_grad():
            head.weight.zero_()
        head.weight.requires_grad_(False)
    for t in (a, b):
        t.begin().go(96)
    assert len(a.envs.texts) > 3 and a.envs.episodes == b.envs.episodes != [] and a.losses == b.losses
    x, y = weights(a, "image", "action", "value"), weights(b)
    assert all(torch.equal(x[k], y[k]) for k in y)


def test_the_sentence_changes_the_policy(tmp_path):
    t = trainer(tmp_path)
    t.envs.add_sentences(["chop tree", "sleep"])
    obs = batch(4)
    one, two = ({**obs, "text": torch.full((4, 1), float(k))} for k in (1, 2))
    for x, y in zip(outputs(t.policy, one), outputs(t.policy, two)):
        assert (x - y).abs().max() > 1e-5


@pytest.mark.parametrize("size", [1, 7, 32])
def test_stored_ids_reproduce_the_log_probability(size, tmp_path):
    "Before the first update the ratio is 1 within 1e-5 (fp32), in batches of any size."
    t = begun(tmp_path, advise=Advisor(10**6))
    buf = rollout(t)
    flat = {k: torch.as_tensor(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])) for k, x in buf.observations.items()}
    act, old = (torch.as_tensor(x.swapaxes(0, 1).reshape(-1)) for x in (buf.actions, buf.log_probs))
    new = []
    with torch.no_grad():
        for i in range(0, 32, size):
            new.append(
                t.policy.evaluate_actions({k: x[i : i + size] for k, x in flat.items()}, act[i : i + size].long())[1]
            )
    assert len(flat["text"].unique()) >= 4 and ((torch.cat(new) - old).exp() - 1).abs().max() < 1e-5


def stored(c, folder, rollouts=1):
    "Ids of the sentences in the buffer (rollouts x rollout, envs), and the advisor."
    t = begun(folder, c, advise=Advisor(10**6))
    return np.concatenate([rollout(t).observations["text"][:, :, 0].copy() for _ in range(rollouts)]), t


def test_text_after_step(tmp_path):
    "As released, a step is stored with the sentence that came after it, and only the steps that ended in a query differ."
    c = replace(C, rollout=24, length=10_000, ask_on_reset=False)
    (a, _), (b, t) = (stored(replace(c, text_after_step=k), tmp_path / str(k)) for k in (False, True))
    assert a[:, 0].tolist() == [1] * 7 + [3] * 7 + [5] * 7 + [7] * 3  # two environments: 1 and 2, then 3 and 4
    assert np.array_equal(b[:-1], a[1:]) and np.flatnonzero((a != b).any(1)).tolist() == [6, 13, 20]
    buf = t.model.rollout_buffer
    flat = {k: torch.as_tensor(x.reshape(-1, *x.shape[2:])) for k, x in buf.observations.items()}
    with torch.no_grad():
        new = t.policy.evaluate_actions(flat, torch.as_tensor(buf.actions.reshape(-1)).long())[1].reshape(24, 2)
    off = np.abs(new.numpy() - buf.log_probs).max(1) > 1e-5
    assert np.flatnonzero(off).tolist() == [6, 13, 20]  # there the ratio of PPO is not 1


def test_empty_each_rollout(tmp_path):
    "As released, each rollout begins without a sentence and without a past; the counter of steps goes on, and the first query follows the first step."
    c = replace(C, rollout=16, length=10_000, ask_on_reset=False)
    (a, t), (b, u) = (stored(replace(c, empty_each_rollout=k), tmp_path / str(k), 2) for k in (False, True))
    assert a[16:, 0].tolist() == [5] * 5 + [7] * 7 + [9] * 4  # queries at 14, 21, 28
    assert (
        b[:, 0].tolist() == [0] + [1] * 7 + [3] * 7 + [5] + [0] * 6 + [7] * 7 + [9] * 3
    )  # queries after the steps 1, 8, 15, 22, 29

    def pasts(t):
        return [len(s["actions"]) for s in t.envs.advise.heard if s["env"] == 0]

    assert pasts(t) == [0, 7, 7, 7, 7] and pasts(u) == [1, 7, 7, 6, 7]


def test_time_limit_is_bootstrapped_and_death_is_not(tmp_path, monkeypatch):
    t = begun(tmp_path, replace(C, length=9))
    seen, wait = [], Guided.step_wait

    def step_wait(self):
        if len(seen) == 11:
            self.envs[1].game.player.health = -5
            self.envs[1].game.player._hunger = 0  # dies in this step
        out = wait(self)
        seen.append((out[1].copy(), out[2].copy(), out[3]))
        return out

    monkeypatch.setattr(Guided, "step_wait", step_wait)
    buf = rollout(t)
    ends = {(k, i): x[2][i] for k, x in enumerate(seen) for i in range(2) if x[1][i]}
    assert {k: (x["TimeLimit.truncated"]) for k, x in ends.items()} == {
        (8, 0): True,
        (8, 1): True,
        (11, 1): False,
    } and [e["died"] for e in t.envs.episodes] == [False, False, True]
    for k in range(16):
        for i in range(2):
            more = 0.0
            if (k, i) in ends and i != 1 or (k, i) == (8, 1):
                with torch.no_grad():
                    more = (
                        t.c.gamma
                        * t.policy.predict_values(t.policy.obs_to_tensor(ends[k, i]["terminal_observation"])[0])[
                            0, 0
                        ].item()
                    )
                assert (
                    abs(more) > 1e-3
                    and np.abs(
                        ends[k, i]["terminal_observation"]["image"].astype(int) - buf.observations["image"][k][i]
                    ).sum()
                    > 0
                )
            assert buf.rewards[k, i] == pytest.approx(seen[k][0][i] + more, abs=1e-5), (k, i)
    assert not [x[2][i] for k, x in enumerate(seen) for i in range(2) if (k, i) not in ends and x[2][i]]
    assert buf.episode_starts[9].tolist() == [1, 1] and buf.episode_starts[12].tolist() == [0, 1]


def test_a_life_that_ends_is_seen_to_its_end(tmp_path):
    "The last picture and sentence of a life go with the reward that follows them, the next life's first ones into the next step."
    c = replace(C, length=5)
    v = Guided(c, 0, Advisor(10**6), encode)
    v.reset()
    g = crafter.Crafter(5)
    g.reset(seed=v.seeds[0])
    for k in range(5):
        v.step_async([1, 1])
        obs, _, done, info = v.step_wait()
        last = g.step(1)[0]
    before = info[0]["terminal_observation"]
    assert (
        done.all()
        and np.array_equal(before["image"].transpose(1, 2, 0), last)
        and np.array_equal(obs["image"][0].transpose(1, 2, 0), g.reset()[0])
        and before["text"] == [1]
        and obs["text"][0] == [3]
    )


# ---- kills

ASK = dict(
    C=C,
    other=replace(C, envs=3, batch=24, interval=5, ask_on_reset=False, text_after_step=True, empty_each_rollout=True),
)


@pytest.mark.parametrize("c", ASK)
def test_stop_and_go_on(c, tmp_path):
    "In one piece, or in three objects with checkpoints between, inside lives: the same, bit for bit."
    c = ASK[c]
    unit = c.envs * c.rollout
    want = went(tmp_path / "one", 6 * unit, c)
    for part in (2, 3, 6):
        t = went(tmp_path / "more", part * unit, c)
        assert any(0 < len(e.actions) < c.length for e in t.envs.envs)
    same(want, t)
    assert len(want.envs.episodes) > 2 and want.envs.advise.n > 10
    assert sorted(p.name for p in (tmp_path / "more").iterdir()) == sorted(
        f"step-{k * unit:09d}.{x}" for k in (3, 6) for x in ("json", "safetensors")
    )  # two are kept


def test_rollouts_draw_afresh(tmp_path):
    "Each rollout's dice are its own, and a seed's."

    def draws(folder, seed):
        t, out = trainer(folder, seed=seed), []
        step = t.envs.step_async
        with torch.no_grad():
            t.policy.action_net.weight.zero_()  # all actions alike
        t.policy.action_net.requires_grad_(False)
        t.envs.step_async = lambda a: out.append(a.copy()) or step(a)
        t.begin().go(96)
        return np.array(out).reshape(3, -1)

    a, b = draws(tmp_path / "a", 0), draws(tmp_path / "b", 1)
    assert all((x != y).mean() > 0.7 for x, y in ((a[0], a[1]), (a[1], a[2]), (a[0], a[2]), (a[0], b[0])))


def test_unguided_stop_and_go_on(tmp_path):
    c = replace(C, text=False)
    want = went(tmp_path / "one", 96, c, advise=None)
    for k in (32, 96):
        t = went(tmp_path / "two", k, c, advise=None)
    same(want, t)


@pytest.mark.parametrize("where", ["step", "update", "save"])
def test_kill(where, tmp_path, monkeypatch):
    "SIGKILL in a rollout, in an update, and while a checkpoint is written; a checkpoint after each rollout."
    want = went(tmp_path / "one", 160)

    def killed(n=0):
        t = trainer(tmp_path / "killed", every=1)
        at = [0]

        def then(f, k):
            def g(*a, **kw):
                at[0] += 1
                die() if at[0] == k else None
                return f(*a, **kw)

            return g

        if where == "step":
            t.envs.step_wait = then(t.envs.step_wait, 41)
        if where == "update":
            t.policy.optimizer.step = then(t.policy.optimizer.step, 6)
        if where == "save":
            monkeypatch.setattr(
                "promptnb.core.write_json", then(O.Checkpoints.save.__globals__["write_json"], 3)
            )  # tensors are there, their JSON is not
        t.begin().go(160)

    assert forked(killed) == signal.SIGKILL
    t = begun(tmp_path / "killed", every=1)
    assert t.step == 64
    t.go(160)
    same(want, t)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    want = went(tmp_path / "one", 96)
    went(tmp_path / "two", 32)
    t = went(tmp_path / "two", 64)
    del t
    new = tmp_path / "two" / "step-000000064.safetensors"
    new.write_bytes(new.read_bytes()[:-5])
    t = begun(tmp_path / "two")
    assert t.step == 32 and "damaged" in capsys.readouterr().err
    t.go(96)
    same(want, t)


@pytest.mark.parametrize("other", [dict(c=replace(C, lr=1e-3)), dict(seed=1), dict(config=dict(recipe="b"))])
def test_the_checkpoint_of_another_run_is_refused(other, tmp_path):
    went(tmp_path, config=dict(recipe="a"))
    with pytest.raises(PromptnbError, match=r"is of another run: [^\n]*(lr|seed|recipe): [^\n]*$"):
        begun(tmp_path, **{"config": dict(recipe="a"), **other})


def test_environments_come_back_from_json():
    "Through JSON and into new objects, also where a life has just begun."
    a = Advisor()
    v = Guided(replace(C, length=60, interval=50), 3, a, encode)
    v.reset()
    rng = np.random.default_rng(0)
    busy = [1, 2, 3, 4, 5, 5, 5, 8, 11]
    events = 0
    for t in range(130):
        if t in (1, 60, 95, 129):
            w = Guided(v.c, 99, b := Advisor(), encode)
            obs = w.restore(json.loads(json.dumps(plain(v.state()))))
            assert all(np.array_equal(obs[k], v.observation()[k]) for k in obs) and np.array_equal(w.table, v.table)
            assert (
                w.had == v.had
                and w.total.tolist() == v.total.tolist()
                and [w.scene(i, False) for i in range(2)] == [v.scene(i, False) for i in range(2)]
                and plain(w.state()) == plain(dict(v.state(), episodes=0))
            )
            events += sum(map(len, v.events))
        v.step_async(rng.choice(busy, size=2))
        v.step_wait()
    assert events > 1
    w.restore(json.loads(json.dumps(plain(v.state()))))
    a.heard.clear()
    v.episodes.clear()
    for _ in range(70):
        x = rng.choice(busy, size=2)
        (o, r, d, _), (p, s, f, _) = [(e.step_async(x), e.step_wait())[1] for e in (v, w)]
        assert all(np.array_equal(o[n], p[n]) for n in o) and np.array_equal(r, s) and np.array_equal(d, f)
    assert a.heard == b.heard != [] and v.episodes == w.episodes != [] and plain(v.state()) == plain(w.state())


def test_restart(tmp_path):
    "A new policy and a new optimiser; the environments, steps and sentences go on, also after a kill."
    t = went(tmp_path / "a", 64)
    old, game = whole(t), plain(t.envs.state())
    t.restart()
    new = weights(t)
    assert (
        all(not torch.equal(new[k], old[0][k]) for k in new if k.endswith("weight"))
        and not t.policy.optimizer.state_dict()["state"]
        and t.policy.optimizer.param_groups[0]["lr"] == C.lr
        and t.policy.optimizer.param_groups[0]["eps"] == 1e-5
    )
    assert (
        all(not torch.equal(new[k], w) for k, w in weights(trainer(tmp_path / "b")).items() if k.endswith("weight"))
        and plain(t.envs.state()) == game
        and t.step == 64
    )
    t.go(96)
    t.go(128)
    u = begun(tmp_path / "a")
    same(t, u)
    assert u.restarts == 1
    v = went(tmp_path / "c", 64)
    v.restart()
    v.go(128)
    same(t, v)  # the same new weights each time


def test_a_stage_boundary_keeps_the_weights(tmp_path):
    t = went(tmp_path, 64)
    before = whole(t)
    t.go(64)
    same(before, t)
    u = begun(tmp_path)
    u.go(64)
    same(before, u)


# ---- what can go wrong


@pytest.mark.parametrize("size", [32, 16])  # with two minibatches the second one meets NaN weights first
def test_nan_loss(size, tmp_path, monkeypatch):
    "It raises, with the step; the checkpoint before stays the newest and is sound."
    c = replace(C, batch=size)
    t = went(tmp_path, 64, c, every=1)
    kept = whole(t)
    monkeypatch.setattr(
        crafter.Crafter, "_advance", lambda self, a, f=crafter.Crafter._advance: f(self, a) * float("nan")
    )
    with pytest.raises(FloatingPointError, match="not finite at step 96"):
        t.go(160)
    monkeypatch.undo()
    same(kept, begun(tmp_path, c, every=1))


def test_a_gradient_that_is_not_finite(tmp_path):
    "The loss of the last minibatch is finite and its gradient is not: such weights must not become the newest checkpoint."
    t = went(tmp_path, 32, every=1)
    n = [0]

    def spoil(g):
        n[0] += 1
        return g * float("inf") if n[0] == 2 else g  # two minibatches an update

    t.policy.value_net.bias.register_hook(spoil)
    with pytest.raises(FloatingPointError):
        t.go(64)
    assert all(p.isfinite().all() for p in begun(tmp_path, every=1).policy.parameters())


# ---- play


def test_play(tmp_path):
    "One episode an environment, the same each time; training does not notice."
    want, t = went(tmp_path / "one", 96), went(tmp_path / "two", 64)
    before = whole(t), list(t.envs.texts), t.envs.table.copy(), t.policy.features_extractor.table
    games = [play(t.policy, t.c, 5, 9, Advisor(10**6), encode) for _ in range(2)]
    assert (
        games[0] == games[1]
        and [e["env"] for e in games[0]] == [0, 1, 2, 3, 4]
        and all(e["length"] == C.length or e["died"] for e in games[0])
    )
    same(before[0], t)
    assert (
        list(t.envs.texts) == before[1]
        and np.array_equal(t.envs.table, before[2])
        and t.policy.features_extractor.table is before[3]
    )
    t.go(96)
    same(want, t)
    assert play(t.policy, t.c, 5, 10, Advisor(10**6), encode) != games[0]


def test_play_reads_its_own_sentences(tmp_path):
    "Live guidance: the played environments' sentences, not those of training under the same ids; an exception leaves the table as it was."
    t = went(tmp_path, 32)
    table, used = t.policy.features_extractor.table, []
    forward = t.policy.features_extractor.text.forward
    t.policy.features_extractor.text.forward = lambda x: used.append(x.clone()) or forward(x)
    a = Advisor(10**6)
    play(t.policy, replace(t.c, length=12), 2, 0, a, encode)
    del t.policy.features_extractor.text.forward
    said = [f"{k % 10**6} {len(s['seen'])} {s['env']}" for k, s in enumerate(a.heard, 1)]
    assert (
        torch.equal(used[0], torch.as_tensor(encode(said[:2])))
        and torch.equal(used[-1], torch.as_tensor(encode(said[2:4])))
        and len(used) == 12
        and len(said) == 4
    )  # nothing is asked after the end

    def broken(scenes):
        raise PromptnbError("no")

    with pytest.raises(PromptnbError):
        play(t.policy, t.c, 2, 0, broken, encode)
    assert t.policy.features_extractor.table is table


def test_play_draws_its_actions(tmp_path):
    "As in training: a sharp policy always does the same thing, a flat one does not."
    t = trainer(tmp_path)
    done = []
    with torch.no_grad():
        t.policy.action_net.weight.zero_()
        t.policy.action_net.bias[6] = 50.0
    a = Advisor(10**6)
    play(t.policy, replace(t.c, interval=30), 1, 0, a, encode)
    assert set(a.heard[1]["actions"]) == {crafter.ACTIONS[6]}
    with torch.no_grad():
        t.policy.action_net.bias.zero_()
    a = Advisor(10**6)
    play(t.policy, replace(t.c, interval=30), 1, 0, a, encode)
    assert len(set(a.heard[1]["actions"])) > 8


def test_play_random():
    "The random agent is a plain loop's, without pictures."
    c = replace(C, envs=3, length=60)
    got = play_random(c, 700, 4)
    rng = rng_for(4, "random")
    acts = np.array([rng.integers(17, size=3) for _ in range(233)])
    assert [{k: x for k, x in e.items() if k != "step"} for e in got] == plain_guided(
        c, 4, acts, lambda scenes: [""] * len(scenes)
    )[1] and got == play_random(c, 700, 4) != play_random(c, 700, 5)
    assert all(e["step"] <= 700 for e in got) and len(got) >= 9


# ---- time


@pytest.mark.parametrize(
    "kw",
    [
        dict(net="nature", envs=8, rollout=128, batch=256),
        dict(net="nature", envs=3, rollout=128, batch=128),
        dict(net="nature", envs=1, rollout=4, batch=4),
    ],
)
def test_a_rate_is_measured_for_any_size(kw):
    assert 1e-4 < O.seconds_a_step(PPOConfig(**kw), limit=0.05) < 1


def test_seconds_a_step():
    assert 1e-4 < O.seconds_a_step(C) < 1
