"Guided PPO: the environments against a plain loop, the sentence's way into the policy, kills, one switch each."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("crafter")
from promptnb import online as O
from promptnb.core import PromptnbError, plain, rng_for, seed_for
from promptnb.online import Guided, PPOConfig, Trainer, play, play_random
from promptnb.tasks import crafter

C = PPOConfig(net="nature", envs=2, rollout=16, batch=16, epochs=1, interval=7, length=40)
MANY = 10**6  # sentences before an advisor repeats itself


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
    "Sentences that depend on the scene and on how many it has given: an advisor with a state."

    def __init__(self, many=5):
        self.n, self.many, self.scenes, self.calls = 0, many, [], 0

    def __call__(self, scenes):
        self.calls += 1
        return [self.one(s) for s in scenes]

    def one(self, s):
        self.n += 1
        self.scenes.append(s)
        return f"{self.n % self.many} {len(s['seen'])} {s['env']}"

    def of(self, env):
        "The scenes of one environment."
        return [s for s in self.scenes if s["env"] == env]

    def state(self):
        return dict(n=self.n)

    def load(self, m):
        self.n = m["n"]


def encode(texts):
    return np.stack([rng_for("sentence", s).standard_normal(384).astype(np.float32) / 20 for s in texts])


def zeros(texts):
    return np.zeros((len(texts), 384), np.float32)


def step(envs, actions):
    envs.step_async(actions)
    return envs.step_wait()


def trainer(folder, c=C, seed=0, advise="own", encode=encode, **kw):
    return Trainer(c, seed, folder, Advisor() if advise == "own" else advise, encode, **kw)


def begun(*a, **kw):
    return trainer(*a, **kw).begin()


def went(folder, steps=32, *a, **kw):
    "A trainer that has trained for so many steps."
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
    "All of a trainer that what follows depends on, and what it has noted: (tensors, JSON)."
    m, optimizer = t.model, t.policy.optimizer.state_dict()
    group = optimizer["param_groups"][0]
    tensors = weights(t)
    tensors |= {f"{i}.{k}": v.clone() for i, s in optimizer["state"].items() for k, v in s.items()}
    tensors["table"] = t.policy.features_extractor.table.clone()
    tensors["obs"], tensors["ids"] = torch.tensor(m._last_obs["image"]), torch.tensor(m._last_obs["text"])
    rest = dict(
        envs=t.envs.state(),
        starts=m._last_episode_starts,
        step=t.step,
        updates=m._n_updates,
        lr=group["lr"],
        eps=group["eps"],
        losses=t.losses,
        log=t.envs.episodes,
        restarts=t.restarts,
    )
    return tensors, plain(rest)


def same(a, b):
    "Two trainers (or what `whole` says of them) must be the same, bit for bit."
    (x, m), (y, n) = (whole(t) if isinstance(t, Trainer) else t for t in (a, b))
    assert x.keys() == y.keys() and m.keys() == n.keys()
    assert not [k for k in x if not torch.equal(x[k], y[k])] and not [k for k in m if m[k] != n[k]]


def same_weights(x, y):
    return all(torch.equal(x[k], y[k]) for k in y)


def forked(f):
    "Run f in a copy of this process; the signal that ended it (0: none, and f came to its end)."
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
    image = torch.randint(256, (n, 3, 64, 64), generator=g).float()
    return dict(image=image, text=torch.randint(ids + 1, (n, 1), generator=g).float())


def outputs(policy, obs):
    "Logits (B, 17) and values (B, 1)."
    with torch.no_grad():
        return policy.get_distribution(obs).distribution.logits, policy.predict_values(obs)


def log_probs(t, buffer):
    "Log-probabilities (steps, envs) of a rollout's actions, anew."
    flat = {k: torch.as_tensor(x.reshape(-1, *x.shape[2:])) for k, x in buffer.observations.items()}
    actions = torch.as_tensor(buffer.actions.reshape(-1)).long()
    with torch.no_grad():
        return t.policy.evaluate_actions(flat, actions)[1].reshape(buffer.log_probs.shape).numpy()


# ---- environments, against a loop over single ones


class Plain:
    "`Guided` once more, one environment after the other, with bookkeeping of its own."

    def __init__(self, c, seed, advise):
        n = c.envs
        self.c, self.advise = c, advise
        self.games = [crafter.Crafter(c.length) for _ in range(n)]
        self.images = [g.reset(seed=seed_for(seed, "env", i) % 2**31)[0] for i, g in enumerate(self.games)]
        self.text, self.actions, self.had = [""] * n, [[] for _ in range(n)], [{} for _ in range(n)]
        self.life, self.ret, self.number = [0] * n, [0.0] * n, [1] * n
        self.rose = [[] for _ in range(n)]  # achievements since the last query
        self.asked = [0] * n  # actions before the last query
        self.calls, self.episodes = [], []

    def ask(self, who, fresh):
        if not who:
            return
        scenes = [
            dict(
                env=i,
                step=len(self.actions[i]),
                episode=self.number[i],
                **self.games[i].scene(),
                actions=tuple(self.actions[i][self.asked[i] :][-self.c.interval :]),
                events=tuple(self.rose[i]),
                fresh=i in fresh,
            )
            for i in who
        ]
        self.calls.append(scenes)
        for i, s in zip(who, self.advise(scenes)):
            self.text[i], self.rose[i], self.asked[i] = s, [], len(self.actions[i])

    def step_one(self, i, action):
        self.images[i], reward, dead, cut, info = self.games[i].step(action)
        self.life[i] += 1
        self.ret[i] += reward
        self.actions[i].append(crafter.ACTIONS[action])
        for a in crafter.ACHIEVEMENTS:
            if info["achievements"][a] > self.had[i].get(a, 0):
                self.rose[i].append(a)
        self.had[i] = info["achievements"]
        if dead or cut:
            self.end(i, dead, info)
        return reward, dead or cut

    def end(self, i, dead, info):
        unlocked = tuple(a for a in crafter.ACHIEVEMENTS if self.had[i][a])
        facts = dict(env=i, length=self.life[i], ret=round(self.ret[i], 4), died=dead, unlocked=unlocked)
        self.episodes.append(dict(facts, behaviour=info["behaviour"]))
        self.images[i] = self.games[i].reset()[0]
        self.life[i], self.ret[i], self.had[i] = 0, 0.0, {}
        self.number[i] += 1

    def now(self, rewards=None, ends=None):
        return [x.copy() for x in self.images], list(self.text), rewards, ends

    def run(self, actions):
        "actions (steps, envs) -> for each step: pictures, sentences, rewards, ends."
        everybody = range(self.c.envs)
        self.ask(list(everybody), set(everybody))
        log = [self.now()]
        for row in actions:
            rewards, ends = zip(*(self.step_one(i, row[i]) for i in everybody))
            fresh = {i for i in everybody if ends[i]}
            due = {i for i in everybody if len(self.actions[i]) % self.c.interval == 0}
            self.ask(sorted(due | fresh if self.c.ask_on_reset else due), fresh)
            log.append(self.now(list(rewards), list(ends)))
        return log


def run_guided(envs, actions):
    "The same of `Guided`."

    def now(obs, rewards=None, ends=None):
        sentence_of = {i: s for s, i in envs.texts.items()}
        pictures = [x.transpose(1, 2, 0) for x in obs["image"]]
        return pictures, [sentence_of[i] for i in obs["text"][:, 0]], rewards, ends

    log = [now(envs.reset())]
    for row in actions:
        obs, rewards, ends, _ = step(envs, row)
        log.append(now(obs, rewards.tolist(), ends.tolist()))
    return log


def without_step(episodes):
    return [{k: x for k, x in e.items() if k != "step"} for e in episodes]


SCRIPTS = {  # name -> (actions to draw from, envs, length, steps)
    "random": (range(17), 3, 25, 120),
    "busy": ([1, 2, 3, 4, 5, 5, 5, 8, 11], 2, 10_000, 400),
    "idle": ([0], 1, 10_000, 420),
}


@pytest.fixture(scope="module", params=[(script, ask) for script in SCRIPTS for ask in (True, False)], ids=str)
def both(request):
    "A script, and what a plain loop and `Guided` made of it."
    script, ask_on_reset = request.param
    choices, envs, length, steps = SCRIPTS[script]
    actions = np.random.default_rng(0).choice(choices, size=(steps, envs))
    c = replace(C, envs=envs, length=length, interval=10, ask_on_reset=ask_on_reset)
    advisor, calls = Advisor(MANY), []

    def listen(scenes):
        calls.append(scenes)
        return advisor(scenes)

    plain, guided = Plain(c, 5, Advisor(MANY)), Guided(c, 5, listen, encode)
    want, got = plain.run(actions), run_guided(guided, actions)
    return SimpleNamespace(script=script, steps=steps, plain=plain, guided=guided, want=want, got=got, calls=calls)


def test_guided_steps_like_a_plain_loop(both):
    "Pictures, sentences, rewards and ends."
    for t, (want, got) in enumerate(zip(both.want, both.got, strict=True)):
        pictures, sentences, rewards, ends = want
        assert np.array_equal(pictures, got[0]) and (sentences, ends) == (got[1], got[3]), t
        assert rewards is None or np.allclose(rewards, got[2], atol=1e-6), t


def test_guided_asks_like_a_plain_loop(both):
    assert both.plain.calls == both.calls and all(both.calls)
    sentences = list(both.guided.texts)[1:]
    assert np.array_equal(both.guided.table, np.concatenate([zeros([""]), encode(sentences)]))
    if both.script == "busy":  # an achievement counts each time
        assert any(len(s["events"]) > len(set(s["events"])) for call in both.calls for s in call)


def test_guided_notes_the_episodes_of_a_plain_loop(both):
    "Some end by death, some by the time limit."
    own, envs = both.guided.episodes, both.guided.num_envs
    assert both.plain.episodes and without_step(own) == both.plain.episodes
    assert {e["died"] for e in own} == {both.script != "random"}  # both ways to end are met
    assert both.guided.t.tolist() == [both.steps] * envs
    assert all(e["step"] <= f["step"] for e, f in zip(own, own[1:])) and own[-1]["step"] <= both.steps * envs


def test_observations_are_channels_first():
    v = Guided(C, 0)
    obs = v.reset()
    assert v.observation_space.contains({k: x[0] for k, x in obs.items()})
    for a in range(17):
        obs = step(v, [a, 16 - a])[0]
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
        step(v, [0])
    assert [s["events"] for s in a.scenes] == [()] + 3 * [("collect_wood",)]
    assert [e["unlocked"] for e in v.episodes] == 3 * [("collect_wood",)]


def test_an_earlier_observation_stays_as_it_was():
    "stable-baselines3 stores the observation after the step is done."
    v = Guided(C, 0, Advisor(MANY), encode)
    obs = v.reset()
    kept = {k: x.copy() for k, x in obs.items()}
    for _ in range(7):
        step(v, [1, 2])
    assert all(np.array_equal(obs[k], kept[k]) for k in kept)


@pytest.mark.parametrize("steps,interval", [(20, 7), (21, 7), (22, 7), (5, 10), (30, 1)])
def test_number_of_queries(steps, interval):
    "Each environment acts on ceil(steps / K) sentences; where K divides the steps, one is for the step to come."
    a = Advisor(MANY)
    v = Guided(replace(C, interval=interval, length=15, ask_on_reset=False), 0, a, encode)
    ids = [v.reset()["text"]]
    ids += [step(v, [0, 0])[0]["text"] for _ in range(steps)]
    for i in range(2):
        assert len({int(x[i, 0]) for x in ids[:-1]}) == -(-steps // interval)
        assert [s["step"] for s in a.of(i)] == list(range(0, steps + 1, interval))
    assert a.calls == steps // interval + 1  # all environments in one call


def test_a_new_life_asks_at_once():
    "Beside every K steps, on one clock for all."
    a = Advisor(MANY)
    v = Guided(replace(C, interval=10, length=13), 0, a, encode)
    v.reset()
    for _ in range(40):
        step(v, [0, 0])
    assert [s["step"] for s in a.of(1)] == [0, 10, 13, 20, 26, 30, 39, 40]
    assert [s["fresh"] for s in a.of(1)] == [True, False] * 4
    assert [s["episode"] for s in a.of(1)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_scene_says_what_was_done_since_the_query_before():
    "Not what was done under earlier advice, or in an earlier life: queries at 0, 10, 13, 20, 26."
    a = Advisor(MANY)
    v = Guided(replace(C, envs=1, interval=10, length=13), 0, a, encode)
    v.reset()
    for action in [1] * 10 + [2] * 3 + [3] * 7 + [4] * 6:
        step(v, [action])
    names = crafter.ACTIONS
    done = [10 * (names[1],), 3 * (names[2],), 7 * (names[3],), 6 * (names[4],)]
    assert [s["actions"] for s in a.scenes] == [(), *done]


def test_without_an_advisor_nothing_is_asked():
    v = Guided(C, 0)
    v.reset()
    for _ in range(50):
        obs = step(v, [0, 0])[0]
    assert list(v.texts) == [""] and not obs["text"].any() and v.state()["advise"] is None


# ---- networks


@pytest.mark.parametrize("net, n", [("spcnn", 134_736_850), ("nature", 807_090)])
def test_parameters(net, n):
    "The paper's net is counted without memory for it; a text head has 385 x 512."
    from stable_baselines3.common.policies import MultiInputActorCriticPolicy

    v = Guided(C, 0)

    def count(text):
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

    assert (count(True), count(False)) == (n, n - 385 * 512)


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
    ex, obs, near = t.policy.features_extractor, batch(ids=2), dict(rtol=1e-5, atol=1e-5)
    t.envs.add_sentences(["a", "b"])
    embedded = torch.as_tensor(t.envs.table)[obs["text"][:, 0].long()]
    with torch.no_grad():
        x = t.policy.extract_features(obs, ex)
        want = ex.image(obs["image"] / 255) + embedded @ ex.text.weight.T + ex.text.bias
        value = x @ t.policy.value_net.weight.T + t.policy.value_net.bias
    torch.testing.assert_close(x, want, **near)
    torch.testing.assert_close(outputs(t.policy, obs)[1], value, **near)


def test_half_precision_is_near(tmp_path):
    policies = (trainer(tmp_path / str(k), replace(C, bf16=k)).policy for k in (False, True))
    (logits, values), (half_logits, half_values) = (outputs(p, batch()) for p in policies)
    assert half_logits.dtype == torch.float32
    assert 0 < (logits - half_logits).abs().max() < 0.02 and (values - half_values).abs().max() < 0.1


def test_unknown_net_and_batch(tmp_path):
    with pytest.raises(PromptnbError, match=r"^unknown net 'natur': did you mean 'nature'\?$"):
        trainer(tmp_path, replace(C, net="natur"))
    with pytest.raises(PromptnbError, match="^batch is 15, but must divide envs x rollout = 32$"):
        trainer(tmp_path, replace(C, batch=15))


def test_arms_begin_alike(tmp_path):
    "Image, action and value nets follow from the seed, with and without a text head."
    guided = weights(trainer(tmp_path / "a"))
    unguided = weights(trainer(tmp_path / "b", replace(C, text=False), advise=None))
    other = weights(trainer(tmp_path / "c", seed=1))
    assert {*guided} - {*unguided} == {"features_extractor.text.weight", "features_extractor.text.bias"}
    assert not {*unguided} - {*guided} and same_weights(guided, unguided)
    assert not any(torch.equal(guided[k], other[k]) for k in guided if k.endswith("weight"))


@pytest.mark.parametrize("part, gain", [("action_net", 0.01), ("value_net", 1.0), ("features_extractor.text", 2**0.5)])
def test_weights_begin_orthogonal_and_biases_zero(part, gain, tmp_path):
    x = weights(trainer(tmp_path))
    w = x[f"{part}.weight"]
    m = w @ w.T if len(w) <= w.shape[1] else w.T @ w
    torch.testing.assert_close(m, gain**2 * torch.eye(len(m)), rtol=1e-4, atol=1e-5)
    assert all(not x[k].any() for k in x if k.endswith("bias"))


def test_hyperparameters_reach_the_learner(tmp_path):
    c = replace(C, lr=3e-4, gamma=0.9, lam=0.5, clip=0.3, entropy=0.02, value=0.7, max_grad=0.4, epochs=3)
    m = trainer(tmp_path, c).model
    optimizer, buffer = m.policy.optimizer.param_groups[0], m.rollout_buffer
    assert (m.gamma, m.gae_lambda, m.clip_range(1.0), m.ent_coef, m.vf_coef) == (0.9, 0.5, 0.3, 0.02, 0.7)
    assert (m.max_grad_norm, m.n_epochs, m.batch_size, m.n_steps, m.normalize_advantage) == (0.4, 3, 16, 16, True)
    assert (optimizer["lr"], optimizer["eps"], optimizer["weight_decay"]) == (3e-4, 1e-5, 0)
    assert (buffer.gamma, buffer.gae_lambda) == (0.9, 0.5)


def test_defaults_are_those_of_the_released_code():
    d = PPOConfig()
    assert (d.net, d.envs, d.rollout, d.batch, d.epochs, d.lr) == ("spcnn", 1, 4096, 128, 4, 1e-4)
    assert (d.gamma, d.lam, d.clip, d.entropy, d.value, d.max_grad) == (0.95, 0.65, 0.2, 0.0, 0.5, 0.5)
    assert (d.length, d.interval) == (10_000, 100)


# ---- the sentence's way into the policy


def equal_outputs(a, b, obs):
    return all(torch.equal(x, y) for x, y in zip(outputs(a.policy, obs), outputs(b.policy, obs)))


def test_with_zero_embeddings_guided_equals_unguided(tmp_path):
    "E = 0: logits and values before training, and after it where the head's bias is zero."
    a, b = begun(tmp_path / "a", encode=zeros), trainer(tmp_path / "b", replace(C, text=False), advise=None)
    obs = batch(8, ids=4)
    a.envs.add_sentences(list("abcd"))
    assert equal_outputs(a, b, obs)
    a.go(64)
    head = a.policy.features_extractor.text
    assert head.bias.abs().max() > 0 and not torch.equal(outputs(a.policy, obs)[0], outputs(b.policy, obs)[0])
    with torch.no_grad():
        for k, p in b.policy.named_parameters():
            p.copy_(dict(a.policy.named_parameters())[k])
        head.bias.zero_()
    assert equal_outputs(a, b, obs)


@pytest.mark.parametrize("how", ["embeddings", "head"])
def test_with_nothing_said_training_is_the_same(how, tmp_path):
    "E = 0 and the bias fixed, or the whole head zero and fixed: the same training as without a text head."
    a = trainer(tmp_path / "a", encode=zeros if how == "embeddings" else encode)
    b = trainer(tmp_path / "b", replace(C, text=False), advise=None)
    head = a.policy.features_extractor.text
    head.bias.requires_grad_(False)
    if how == "head":
        with torch.no_grad():
            head.weight.zero_()
        head.weight.requires_grad_(False)
    for t in (a, b):
        t.begin().go(96)
    assert len(a.envs.texts) > 3 and a.envs.episodes == b.envs.episodes != [] and a.losses == b.losses
    assert same_weights(weights(a, "image", "action", "value"), weights(b))


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
    t = begun(tmp_path, advise=Advisor(MANY))
    buf = rollout(t)
    flat = {k: torch.as_tensor(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])) for k, x in buf.observations.items()}
    act, old = (torch.as_tensor(x.swapaxes(0, 1).reshape(-1)) for x in (buf.actions, buf.log_probs))
    new = []
    with torch.no_grad():
        for i in range(0, 32, size):
            part = slice(i, i + size)
            new.append(t.policy.evaluate_actions({k: x[part] for k, x in flat.items()}, act[part].long())[1])
    assert len(flat["text"].unique()) >= 4 and ((torch.cat(new) - old).exp() - 1).abs().max() < 1e-5


def stored(c, folder, rollouts=1):
    "Ids of the sentences in the buffer (rollouts x rollout, envs), and the trainer."
    t = begun(folder, c, advise=Advisor(MANY))
    return np.concatenate([rollout(t).observations["text"][:, :, 0].copy() for _ in range(rollouts)]), t


def test_text_after_step(tmp_path):
    "As released, a step is stored with the sentence that came after it: only steps that ended in a query differ."
    c = replace(C, rollout=24, length=10_000, ask_on_reset=False)
    before, _ = stored(c, tmp_path / "before")
    after, t = stored(replace(c, text_after_step=True), tmp_path / "after")
    assert before[:, 0].tolist() == [1] * 7 + [3] * 7 + [5] * 7 + [7] * 3  # two environments: 1 and 2, then 3 and 4
    assert np.array_equal(after[:-1], before[1:])
    assert np.flatnonzero((before != after).any(1)).tolist() == [6, 13, 20]
    buf = t.model.rollout_buffer
    off = np.abs(log_probs(t, buf) - buf.log_probs).max(1) > 1e-5
    assert np.flatnonzero(off).tolist() == [6, 13, 20]  # there the ratio of PPO is not 1


def test_empty_each_rollout(tmp_path, monkeypatch):
    """As released, a rollout of 4,096 steps (here 16) begins without a sentence and without a past.

    The counter of steps goes on, and the first query follows the first step."""
    monkeypatch.setattr(O, "EMPTIED", 16)
    c = replace(C, rollout=16, length=10_000, ask_on_reset=False)
    kept, t = stored(c, tmp_path / "kept", 2)
    emptied, u = stored(replace(c, empty_each_rollout=True), tmp_path / "emptied", 2)
    # queries at 14, 21, 28; and after the steps 1, 8, 15, 22, 29
    assert kept[16:, 0].tolist() == [5] * 5 + [7] * 7 + [9] * 4
    assert emptied[:, 0].tolist() == [0] + [1] * 7 + [3] * 7 + [5] + [0] * 6 + [7] * 7 + [9] * 3
    pasts = [[len(s["actions"]) for s in x.envs.advise.of(0)] for x in (t, u)]
    assert pasts == [[0, 7, 7, 7, 7], [1, 7, 7, 6, 7]]


def test_shorter_rollouts_empty_no_more_often(monkeypatch):
    "Of rollouts of 12 steps those begin without advice that follow a multiple of 32: at 36, 72 and 96."
    monkeypatch.setattr(O, "EMPTIED", 32)
    v = Guided(replace(C, rollout=12, empty_each_rollout=True), 0, Advisor(), encode)
    v.add_sentences(["sleep"])
    emptied = []
    for t in range(12, 109, 12):
        v.t[:], v.ids[:] = t, 1
        v.begin_rollout()
        emptied += [] if v.ids.any() else [t]
    assert emptied == [36, 72, 96]


# ---- the ends of episodes


class Watched:
    "A rollout of 16 steps, lives of 9; the player of environment 1 dies in step 11. What each step gave is kept."

    def __init__(self, folder, monkeypatch):
        self.steps, wait = [], Guided.step_wait

        def step_wait(envs):
            if len(self.steps) == 11:
                player = envs.envs[1].game.player
                player.health, player._hunger = -5, 0
            out = wait(envs)
            self.steps.append((out[1].copy(), out[2].copy(), out[3]))
            return out

        monkeypatch.setattr(Guided, "step_wait", step_wait)
        self.t = begun(folder, replace(C, length=9))
        self.buffer = rollout(self.t)
        self.ends = {(k, i): infos[i] for k, (_, dones, infos) in enumerate(self.steps) for i in range(2) if dones[i]}

    def bootstrap(self, k, i):
        "The discounted value of the last observation, if the life ended by the time limit."
        if not self.ends.get((k, i), {}).get("TimeLimit.truncated"):
            return 0.0
        obs = self.t.policy.obs_to_tensor(self.ends[k, i]["terminal_observation"])[0]
        with torch.no_grad():
            return self.t.c.gamma * self.t.policy.predict_values(obs)[0, 0].item()


@pytest.fixture
def watched(tmp_path, monkeypatch):
    return Watched(tmp_path, monkeypatch)


def test_time_limit_and_death_are_told_apart(watched):
    truncated = {k: info["TimeLimit.truncated"] for k, info in watched.ends.items()}
    assert truncated == {(8, 0): True, (8, 1): True, (11, 1): False}
    assert [e["died"] for e in watched.t.envs.episodes] == [False, False, True]
    for _, dones, infos in watched.steps:
        assert [bool(info) for info in infos] == dones.tolist()


def test_time_limit_is_bootstrapped_and_death_is_not(watched):
    buf = watched.buffer
    for k, (rewards, _, _) in enumerate(watched.steps):
        for i in range(2):
            assert buf.rewards[k, i] == pytest.approx(rewards[i] + watched.bootstrap(k, i), abs=1e-5), (k, i)
    for k, i in ((8, 0), (8, 1)):
        last = watched.ends[k, i]["terminal_observation"]["image"].astype(int)
        assert abs(watched.bootstrap(k, i)) > 1e-3
        assert np.abs(last - buf.observations["image"][k][i]).sum() > 0
    assert buf.episode_starts[9].tolist() == [1, 1] and buf.episode_starts[12].tolist() == [0, 1]


def test_a_life_that_ends_is_seen_to_its_end(tmp_path):
    "A life's last picture and sentence go with the reward that follows them, the next life's first with the next step."
    v = Guided(replace(C, length=5), 0, Advisor(MANY), encode)
    v.reset()
    g = crafter.Crafter(5)
    g.reset(seed=v.seeds[0])
    for _ in range(5):
        obs, _, done, info = step(v, [1, 1])
        last = g.step(1)[0]
    before = info[0]["terminal_observation"]
    assert done.all()
    assert np.array_equal(before["image"].transpose(1, 2, 0), last) and before["text"] == [1]
    assert np.array_equal(obs["image"][0].transpose(1, 2, 0), g.reset()[0]) and obs["text"][0] == [3]


# ---- kills

CONFIGS = dict(
    C=C,
    other=replace(C, envs=3, batch=24, interval=5, ask_on_reset=False, text_after_step=True, empty_each_rollout=True),
)


@pytest.mark.parametrize("c", CONFIGS)
def test_stop_and_go_on(c, tmp_path):
    "In one piece, or in three objects with checkpoints between, inside lives: the same, bit for bit."
    c = CONFIGS[c]
    unit = c.envs * c.rollout
    want = went(tmp_path / "one", 6 * unit, c)
    for part in (2, 3, 6):
        t = went(tmp_path / "more", part * unit, c)
        assert any(0 < len(e.actions) < c.length for e in t.envs.envs)
    same(want, t)
    assert len(want.envs.episodes) > 2 and want.envs.advise.n > 10
    two = sorted(f"step-{k * unit:09d}.{x}" for k in (3, 6) for x in ("json", "safetensors"))
    assert sorted(p.name for p in (tmp_path / "more").iterdir()) == two  # two are kept


def test_the_seconds_of_a_training_are_of_all_its_processes(tmp_path):
    "An older checkpoint does not have them."
    a = begun(tmp_path)
    a.earlier = 100.0
    a.save()
    b = begun(tmp_path)
    assert b.earlier >= 100 and b.seconds > b.earlier
    tensors, meta = b.checkpoints.latest()
    del meta["seconds"]
    b.resume(tensors, meta)
    assert b.earlier == 0


def test_unguided_stop_and_go_on(tmp_path):
    c = replace(C, text=False)
    want = went(tmp_path / "one", 96, c, advise=None)
    for k in (32, 96):
        t = went(tmp_path / "two", k, c, advise=None)
    same(want, t)


def test_rollouts_draw_afresh(tmp_path):
    "Each rollout's dice are its own, and a seed's."

    def draws(folder, seed):
        t, actions = trainer(folder, seed=seed), []
        step_async = t.envs.step_async
        with torch.no_grad():
            t.policy.action_net.weight.zero_()  # all actions alike
        t.policy.action_net.requires_grad_(False)

        def listen(a):
            actions.append(a.copy())
            return step_async(a)

        t.envs.step_async = listen
        t.begin().go(96)
        return np.array(actions).reshape(3, -1)

    a, b = draws(tmp_path / "a", 0), draws(tmp_path / "b", 1)
    for x, y in ((a[0], a[1]), (a[1], a[2]), (a[0], a[2]), (a[0], b[0])):
        assert (x != y).mean() > 0.7


class DieAt:
    "A function that dies, instead of its k-th call."

    def __init__(self, f, k):
        self.f, self.left = f, k

    def __call__(self, *a, **kw):
        self.left -= 1
        if self.left == 0:
            die()
        return self.f(*a, **kw)


@pytest.mark.parametrize("where", ["step", "update", "save"])
def test_kill(where, tmp_path, monkeypatch):
    "SIGKILL in a rollout, in an update, and while a checkpoint is written; a checkpoint after each rollout."
    want = went(tmp_path / "one", 160)

    def killed():
        t = trainer(tmp_path / "killed", every=1)
        if where == "step":
            t.envs.step_wait = DieAt(t.envs.step_wait, 41)
        if where == "update":
            t.policy.optimizer.step = DieAt(t.policy.optimizer.step, 6)
        if where == "save":  # tensors are there, their JSON is not
            write_json = O.Checkpoints.save.__globals__["write_json"]
            monkeypatch.setattr("promptnb.core.write_json", DieAt(write_json, 3))
        t.begin().go(160)

    assert forked(killed) == signal.SIGKILL
    t = begun(tmp_path / "killed", every=1)
    assert t.step == 64
    t.go(160)
    same(want, t)


# ---- games in processes of their own


def test_games_in_other_processes_are_the_same(tmp_path):
    "Every number of a training, and it may stop in one way and go on in the other."
    want = went(tmp_path / "one", 96)
    apart = went(tmp_path / "two", 32, replace(C, apart=True))
    apart.envs.close()
    t = went(tmp_path / "two", 64)
    t = begun(tmp_path / "two", replace(C, apart=True))
    t.go(96)
    same(want, t)
    t.envs.close()
    assert not any(e.process.is_alive() for e in t.envs.envs)


def test_what_a_game_raises_elsewhere_ends_its_episode(tmp_path):
    envs = Guided(replace(C, apart=True), 0)
    envs.reset()
    step(envs, [0, 0])
    _, _, dones, infos = step(envs, [0, 99])  # there is no such action
    assert dones.tolist() == [False, True] and infos[1]["TimeLimit.truncated"]
    (failed,) = envs.failed
    assert failed["env"] == 1 and "IndexError" in failed["why"]
    assert not step(envs, [0, 0])[2].any()
    envs.envs[0].process.kill()
    envs.envs[0].process.join()
    with pytest.raises(PromptnbError, match="process of a Crafter environment has died"):
        envs.envs[0].step(0)
    envs.close()


def test_games_die_with_the_process_that_trains(tmp_path):
    program = f"""
import os, signal
from promptnb.tasks.crafter import Apart
games = [Apart(image=False) for _ in range(2)]
[g.reset(seed=0) for g in games]
open({str(tmp_path / "pids")!r}, "w").write(" ".join(str(g.process.pid) for g in games))
os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "train.py").write_text(f"if __name__ == '__main__':\n    exec({program!r})")
    assert subprocess.run([sys.executable, tmp_path / "train.py"]).returncode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    until = time.monotonic() + 60
    while (alive := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(pids) == 2 and not alive


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    want = went(tmp_path / "one", 96)
    went(tmp_path / "two", 32)
    went(tmp_path / "two", 64)
    new = tmp_path / "two" / "step-000000064.safetensors"
    new.write_bytes(new.read_bytes()[:-5])
    t = begun(tmp_path / "two")
    assert t.step == 32 and "damaged" in capsys.readouterr().err
    t.go(96)
    same(want, t)


@pytest.mark.parametrize(
    "other", [dict(c=replace(C, lr=1e-3)), dict(seed=1), dict(config=dict(recipe="b"))], ids=["lr", "seed", "recipe"]
)
def test_the_checkpoint_of_another_run_is_refused(other, tmp_path):
    went(tmp_path, config=dict(recipe="a"))
    with pytest.raises(PromptnbError, match=r"is of another run: [^\n]*(lr|seed|recipe): [^\n]*$"):
        begun(tmp_path, **{"config": dict(recipe="a"), **other})


def copied(v, advisor):
    "The environments' state through JSON and into new objects."
    w = Guided(v.c, 99, advisor, encode)
    return w, w.restore(json.loads(json.dumps(plain(v.state()))))


@pytest.fixture
def busy_pair():
    "Two environments with lives of 60 steps and a query every 50, and their dice."
    v = Guided(replace(C, length=60, interval=50), 3, Advisor(), encode)
    v.reset()
    rng = np.random.default_rng(0)
    return v, lambda: rng.choice([1, 2, 3, 4, 5, 5, 5, 8, 11], size=2)


def test_environments_come_back_from_json(busy_pair):
    "At the beginning, where a life has just begun, and between."
    v, dice = busy_pair
    events = 0
    for t in range(130):
        if t in (1, 60, 95, 129):
            w, obs = copied(v, Advisor())
            assert all(np.array_equal(obs[k], v.observation()[k]) for k in obs) and np.array_equal(w.table, v.table)
            assert w.had == v.had and w.total.tolist() == v.total.tolist()
            assert [w.scene(i, False) for i in range(2)] == [v.scene(i, False) for i in range(2)]
            assert plain(w.state()) == plain(dict(v.state(), episodes=0))
            events += sum(map(len, v.events))
        step(v, dice())
    assert events > 1


def test_environments_go_on_alike_after_coming_back(busy_pair):
    v, dice = busy_pair
    for _ in range(130):
        step(v, dice())
    w, _ = copied(v, Advisor())
    v.advise.scenes.clear()
    v.episodes.clear()
    for _ in range(70):
        actions = dice()
        (obs, rewards, ends, _), (obs_, rewards_, ends_, _) = step(v, actions), step(w, actions)
        assert all(np.array_equal(obs[k], obs_[k]) for k in obs)
        assert np.array_equal(rewards, rewards_) and np.array_equal(ends, ends_)
    assert v.advise.scenes == w.advise.scenes != [] and v.episodes == w.episodes != []
    assert plain(v.state()) == plain(w.state())


# ---- stages


def test_a_restart_is_a_new_policy_in_the_same_game(tmp_path):
    t = went(tmp_path / "a", 64)
    old, game = weights(t), plain(t.envs.state())
    t.restart()
    new, first = weights(t), weights(trainer(tmp_path / "b"))
    for k in new:
        if k.endswith("weight"):
            assert not torch.equal(new[k], old[k]) and not torch.equal(new[k], first[k])
    optimizer = t.policy.optimizer
    assert not optimizer.state_dict()["state"]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]) == (C.lr, 1e-5)
    assert plain(t.envs.state()) == game and t.step == 64


def test_a_restart_survives_a_kill_and_repeats_itself(tmp_path):
    t = went(tmp_path / "a", 64)
    t.restart()
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
    kept, step = whole(t), Guided.step_wait

    def spoilt(self):
        obs, rewards, *rest = step(self)
        return obs, rewards * np.float32("nan"), *rest

    monkeypatch.setattr(Guided, "step_wait", spoilt)  # an environment's own NaN only fails its episode
    with pytest.raises(FloatingPointError, match="not finite at step 96"):
        t.go(160)
    monkeypatch.undo()
    same(kept, begun(tmp_path, c, every=1))


def test_a_gradient_that_is_not_finite(tmp_path):
    "The last minibatch has a finite loss and an infinite gradient: such weights must not become a checkpoint."
    t = went(tmp_path, 32, every=1)
    minibatches = []

    def spoil(gradient):
        minibatches.append(gradient)
        return gradient * float("inf") if len(minibatches) == 2 else gradient  # two minibatches an update

    t.policy.value_net.bias.register_hook(spoil)
    with pytest.raises(FloatingPointError):
        t.go(64)
    assert all(p.isfinite().all() for p in begun(tmp_path, every=1).policy.parameters())


# ---- play


def test_play_is_an_episode_an_environment_and_the_same_each_time(tmp_path):
    t = went(tmp_path, 64)
    games = [play(t.policy, t.c, 5, 9, Advisor(MANY), encode) for _ in range(2)]
    assert games[0] == games[1] != play(t.policy, t.c, 5, 10, Advisor(MANY), encode)
    assert [e["env"] for e in games[0]] == [0, 1, 2, 3, 4]
    assert all(e["length"] == C.length or e["died"] for e in games[0])


def test_training_does_not_notice_that_its_policy_plays(tmp_path):
    want, t = went(tmp_path / "one", 96), went(tmp_path / "two", 64)
    before, texts, rows, table = whole(t), list(t.envs.texts), t.envs.table.copy(), t.policy.features_extractor.table
    play(t.policy, t.c, 5, 9, Advisor(MANY), encode)
    same(before, t)
    assert list(t.envs.texts) == texts and np.array_equal(t.envs.table, rows)
    assert t.policy.features_extractor.table is table
    t.go(96)
    same(want, t)


def test_play_reads_its_own_sentences(tmp_path):
    "Live guidance: the played environments' sentences, not those of training under the same ids."
    t = went(tmp_path, 32)
    head, embedded = t.policy.features_extractor.text, []
    hook = head.register_forward_pre_hook(lambda module, args: embedded.append(args[0].clone()))
    a = Advisor(MANY)
    play(t.policy, replace(t.c, length=12), 2, 0, a, encode)
    hook.remove()
    sentences = [f"{k} {len(s['seen'])} {s['env']}" for k, s in enumerate(a.scenes, 1)]
    assert len(embedded) == 12 and len(sentences) == 4  # nothing is asked after the end
    assert torch.equal(embedded[0], torch.as_tensor(encode(sentences[:2])))
    assert torch.equal(embedded[-1], torch.as_tensor(encode(sentences[2:])))


def test_an_exception_in_play_leaves_the_table_as_it_was(tmp_path):
    t = went(tmp_path, 32)
    table = t.policy.features_extractor.table

    def broken(scenes):
        raise PromptnbError("no")

    with pytest.raises(PromptnbError):
        play(t.policy, t.c, 2, 0, broken, encode)
    assert t.policy.features_extractor.table is table


@pytest.mark.parametrize("sharp", [True, False])
def test_play_draws_its_actions(sharp, tmp_path):
    "As in training: a sharp policy always does the same thing, a flat one does not."
    t = trainer(tmp_path)
    with torch.no_grad():
        t.policy.action_net.weight.zero_()
        t.policy.action_net.bias[6] = 50.0 if sharp else 0.0
    a = Advisor(MANY)
    play(t.policy, replace(t.c, interval=30), 1, 0, a, encode)
    done = set(a.scenes[1]["actions"])
    assert done == {crafter.ACTIONS[6]} if sharp else len(done) > 8


def test_play_random():
    "The random agent is a plain loop's, without pictures."
    c = replace(C, envs=3, length=60)
    got, failed = play_random(c, 700, 4)
    rng = rng_for(4, "random")
    plain = Plain(c, 4, lambda scenes: [""] * len(scenes))
    plain.run(np.array([rng.integers(17, size=3) for _ in range(233)]))
    assert without_step(got) == plain.episodes
    assert not failed and got == play_random(c, 700, 4)[0] != play_random(c, 700, 5)[0]
    assert all(e["step"] <= 700 for e in got) and len(got) >= 9


# ---- time


@pytest.mark.parametrize("envs, rollout, batch", [(8, 128, 256), (3, 128, 128), (1, 4, 4)])
def test_a_rate_is_measured_for_any_size(envs, rollout, batch):
    c = PPOConfig(net="nature", envs=envs, rollout=rollout, batch=batch)
    assert 1e-4 < O.seconds_a_step(c, limit=0.05) < 1


def test_seconds_a_step():
    assert 1e-4 < O.seconds_a_step(C) < 1


# ---- minibatches as one graph, which here is a call


def by_calls(update):
    update()  # as a recording is preceded by updates
    return update


@pytest.mark.parametrize("advise", ["own", None])
def test_minibatches_as_a_graph_learn_what_stable_baselines3_learns(advise, tmp_path, monkeypatch, capsys):
    c = replace(C, epochs=2, entropy=0.01)
    usual = went(tmp_path / "a", 64, c, advise=advise)
    monkeypatch.setitem(O.GRAPHS, "cpu", by_calls)
    graphed = went(tmp_path / "b", 64, c, advise=advise)
    assert graphed.graph is not None and usual.graph is None and "one by one" not in capsys.readouterr().out
    assert graphed.model._n_updates == usual.model._n_updates
    for a, b in zip(usual.policy.parameters(), graphed.policy.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for a, b in zip(usual.losses, graphed.losses, strict=True):
        assert b == pytest.approx(a, rel=1e-2, abs=1e-4)


def test_a_graph_of_minibatches_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(O.GRAPHS, "cpu", by_calls)
    whole = went(tmp_path / "a", 96)
    went(tmp_path / "b", 32)
    again = went(tmp_path / "b", 96)
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True))


def test_minibatches_that_cannot_be_recorded_are_left_to_stable_baselines3(tmp_path, monkeypatch, capsys):
    def cannot_record(update):
        update()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    usual = went(tmp_path / "a", 64)
    monkeypatch.setitem(O.GRAPHS, "cpu", cannot_record)
    alone = went(tmp_path / "b", 64)
    said = [line for line in capsys.readouterr().out.splitlines() if "one by one" in line]
    assert len(said) == 1 and said[0].endswith("operation not permitted when stream is capturing")
    for a, b in zip(usual.policy.parameters(), alone.policy.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
