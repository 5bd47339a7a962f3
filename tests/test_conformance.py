"What every tuner promises, whatever it does: each property for each entry of TUNERS and each of its switches. A new entry is covered by being there."

import contextlib
import copy
import functools
import importlib
import json
import time
from collections import Counter
from dataclasses import asdict, fields, is_dataclass

import numpy as np
import pytest
import torch

from promptnb.core import PromptnbError, Steps, action_loss, seed_for
from promptnb.data import demos, from_arrays
from promptnb.models.context import ContextConfig, ContextPolicy
from promptnb.models.dt import DTConfig, Policy
from promptnb.tuners.context import TOWARDS
from promptnb.tuners.core import TUNERS, Tuner, WeightTuner, make_tuner, same_batch
from promptnb.tuners.ranking import NOISES

S, A, P, K, G = 3, 2, 3, 4, 2
SMALL = dict(steps=12, m=12, lr=1e-2, mu=0.3, eta=0.3)  # for the fields that a tuner has

# ---- a toy: an untrained policy with large weights, two tasks with nearly constant actions


def toy(prompt=True, T=40, context=False, **kw):
    "(policy, demonstrations); with `context`, the policy of the Contextual Meta Transformer, whose encoder writes 5 vectors."
    g = np.random.default_rng(0)
    st = from_arrays(
        [
            dict(
                observations=g.normal(size=(T, S)),
                actions=0.5 - i + 0.2 * g.normal(size=(T, A)),
                rewards=np.arange(T) % 3,
            )
            for i in range(G)
            for _ in range(3)
        ],
        np.repeat(np.arange(G), 3),
    )
    torch.manual_seed(0)
    if context:
        pi = ContextPolicy(
            asdict(
                ContextConfig(S, A, width=16, layers=2, encoder="mean" if prompt else "none", reward_scale=12.0, **kw)
            ),
            K=K,
            rtg_scale=12.0,
        )
    else:
        pi = Policy(asdict(DTConfig(S, A, width=16, layers=2, prompt=prompt, **kw)), K=K, rtg_scale=12.0)
    for p in pi.model.parameters():
        p.data.mul_(3)
    return pi.eval(), demos(st, st, pi, n=3, K=K, batch=8, H=P)


class Score:
    "A stand-in for the environment: the return is higher the nearer a prompt's actions are to 1; what is seen in an episode follows from the task alone."

    env_steps = 77

    def __call__(self, prompts):
        assert prompts.t.shape[0] == G and prompts.t.shape[2] == P
        self.env_steps += prompts.t[..., 0].numel() * 10
        return -(prompts.a - 1).square().mean((-1, -2))

    def play(self, contexts):
        G, m = contexts.t.shape[:2]
        self.env_steps += G * m * 6

        def r(*d):
            return torch.randn(G, 1, 6, *d, generator=torch.Generator().manual_seed(6)).expand(G, m, 6, *d)

        return torch.arange(G)[:, None].expand(G, m).float(), Steps(
            r(S), r(A).tanh(), r(1), torch.arange(6).expand(G, m, 6), torch.ones(G, m, 6)
        )


def kind(name):
    module, cls = TUNERS[name].split(":")
    return getattr(importlib.import_module(f"promptnb.tuners.{module}"), cls)


def has(name, field):
    return field in {f.name for f in fields(kind(name))}


def reads(name, kw):
    return name in ("encode", "collect") or kw.get("begin") == "encoded"  # the policy's context encoder


def plays(name, kw):
    return name == "collect" or bool(kw.get("online"))  # the environment


def hyper(name, **kw):
    return {k: v for k, v in {**SMALL, **kw}.items() if has(name, k) or k in kw}


@functools.cache
def adapted(name, rng=0, prompt=True, T=40, **kw):
    "(policy, demonstrations, what tuning gave, the score it was given); skipped where the tuner refuses."
    pi, dem = toy(prompt, T, reads(name, kw))
    score = Score()
    t = make_tuner(name, **hyper(name, **kw))
    with refusal():
        return pi, dem, t.prepare(pi, (), 0).adapt(pi, dem, rng, score), score


def begun(name, kw, pi, dem):
    "Where a tuner begins, as it says: with the prompt as drawn, with small random vectors, or with what was seen in episodes."
    if name == "context" and not reads(name, kw):
        x = 0.02 * torch.randn(G, kw.get("L", 5), 16, generator=torch.Generator().manual_seed(seed_for(0, "vectors")))
        p = pi.with_prompt((x, torch.ones(x.shape[:2])))
    elif name == "collect":
        p = pi.with_prompt(Score().play(dem.prompt[:, None])[1].map(lambda x: torch.cat([x[:, 0]] * 4, 1)))
    else:
        p = pi.prompted(dem.prompt, dem.task_ids)
    return [(p, g) for g in range(G)]


@contextlib.contextmanager
def refusal():
    try:
        yield
    except PromptnbError as e:
        pytest.skip(f"refused: {e}")


# ---- what is looked at


def history(seed=0, n=9):
    "Windows as an environment gives them."
    g = torch.Generator().manual_seed(seed)

    def r(*d):
        return torch.randn(n, K, *d, generator=g)

    return Steps(
        r(S),
        r(A).tanh(),
        5 * r(1),
        torch.arange(K).expand(n, K),
        (torch.arange(K) >= torch.arange(n)[:, None] % K).float(),
    )


def actions(placed):
    "Actions (G, n, A) of each task's policy and prompt."
    h = history()
    return torch.stack([p.act(h, p.begin([row] * len(h))) for p, row in placed])


@torch.no_grad()
def offline(placed, dem):
    "Action error (G,) on the fixed batch of demonstrations."
    out = []
    for (p, row), i in zip(placed, range(G)):
        h = same_batch(dem)[i]
        out.append(action_loss(p.eval().model(h, p.prefix(torch.tensor([row]))), h.a, h.mask, "none").mean().item())
    return np.array(out)


def photo(x):
    "All that a policy, or demonstrations, consist of, by name."
    if isinstance(x, torch.nn.Module):
        own = {
            f"{n} of {k}": v
            for k, m in x.named_modules()
            for n, v in dict(
                training=m.training, type=type(m), hooks=len(m._forward_hooks) + len(m._forward_pre_hooks)
            ).items()
        }
        return {
            **own,
            **{k: v.clone() for k, v in x.state_dict().items()},
            **{f"{k} wants": (p.requires_grad, p.grad) for k, p in x.named_parameters()},
            "config": copy.deepcopy(x._hub_mixin_config),
        }
    if is_dataclass(x):
        return {f"{f.name}.{k}": v for f in fields(x) for k, v in photo(getattr(x, f.name)).items()}
    return {"": copy.deepcopy(x)}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def merges(name):
    return getattr(kind(name), "release", None) is not getattr(WeightTuner, "release", None) and issubclass(
        kind(name), WeightTuner
    )


def moved(a, b):
    assert a.keys() == b.keys()
    return {k: v for k, v in b.items() if not torch.equal(v, a[k])}


# ---- the cases: each tuner as it is, with each of its switches on, and in bf16

CHOICES = dict(
    context=[
        *(dict(towards=t) for t in TOWARDS if t != "return"),
        dict(L=1, towards="return", lr=2e-3),
        *(dict(L=n, towards="return") for n in (10, 20)),
        dict(begin="encoded"),
        dict(begin="encoded", towards="shuffled"),
    ]
)
CASES = [
    (n, kw)
    for n in TUNERS
    for kw in [
        {},
        *({f.name: True} for f in fields(kind(n)) if f.default is False),
        *([dict(precision="bf16")] if has(n, "precision") else []),
        *CHOICES.get(n, []),
    ]
]
each = pytest.mark.parametrize(
    "name, kw",
    CASES,
    ids=lambda x: (
        x if isinstance(x, str) else ",".join(k if v is True or k == "precision" else f"{k}={v}" for k, v in x.items())
    ),
)
tuners = pytest.mark.parametrize("name", TUNERS)
searches = pytest.mark.parametrize("name", [n for n in TUNERS if has(n, "online")])


@tuners
def test_entry(name):
    "A registry line names a documented dataclass of hyper-parameters that all have defaults."
    c = kind(name)
    assert issubclass(c, Tuner) and is_dataclass(c) and c.__doc__ and not c.__doc__.startswith(c.__name__ + "(")
    assert make_tuner(name) == c() and isinstance(make_tuner(name), c)


@each
def test_result(name, kw):
    "One policy and prompt row for each task, finite numbers, a log by step and task."
    _, dem, out, score = adapted(name, **kw)
    assert len(out.assignments) == G and out.trainable >= 0 and torch.isfinite(actions(out.assignments)).all()
    assert all(
        {"step", "task"} <= l.keys() and l["task"] in range(G) and np.isfinite(l["score" if "score" in l else "loss"])
        for l in out.log
    )
    assert out.env_steps == score.env_steps - 77 and (out.env_steps > 0) == plays(name, kw)
    assert all(
        {"metric", "task", "value"} <= f.keys() and f["task"] in range(-1, G) and np.isfinite(f["value"])
        for f in out.facts
    ) and all(torch.isfinite(x).all() for x in out.look.values())


@each
@pytest.mark.parametrize("mode", ["eval", "train", "eval but for the model"])
def test_policy_and_demonstrations_are_left_alone(name, kw, mode):
    pi, dem = toy(context=reads(name, kw))
    pi.train(mode == "train")
    pi.model.train(mode != "eval")
    for p in list(pi.parameters())[::2]:
        p.requires_grad_(False)
    before, data = photo(pi), photo(dem)
    with refusal():
        out = make_tuner(name, **hyper(name, **dict(kw, steps=2) if has(name, "steps") else kw)).adapt(
            pi, dem, 0, Score()
        )
    assert same(photo(pi), before) and same(photo(dem), data)
    for p, _ in out.assignments:
        [b.zero_() for n, b in p.named_buffers() if n.startswith("prompt_")]  # nor are prompts shared
    assert same(photo(pi), before) and same(photo(dem), data)


@each
@pytest.mark.parametrize("prompt, T", [(True, 40), (False, 40), (True, P - 1)], ids=["", "no prompt", "padded prompt"])
def test_zero_steps_are_the_start(name, kw, prompt, T):
    "Without steps a tuner gives the policy with the prompt as drawn, or what it says it begins with."
    if has(name, "steps"):
        kw = dict(kw, steps=0)
    pi, dem, out, _ = adapted(name, prompt=prompt, T=T, **kw)
    if not has(name, "steps") and out.trainable:
        pytest.skip("has no steps")
    assert dem.prompt.mask.all() == (T > P)
    torch.testing.assert_close(actions(out.assignments), actions(begun(name, kw, pi, dem)), rtol=0, atol=2e-6)


@each
def test_only_the_declared_moves(name, kw, monkeypatch):
    "`trainable` is the size of the tensors that differ from zero steps, per task: of the generator where prompts are written by one; no other tensor differs in a bit."
    _, _, out, _ = adapted(name, **kw)
    extra = getattr(
        make_tuner(name, **kw), "extra", 0
    )  # prompt fields behind s, a, rtg: t, mask, and two that no policy keeps
    if not has(name, "steps"):
        assert not out.trainable
        return
    if merges(name):
        monkeypatch.setattr(kind(name), "release", lambda *_: None)
        out = adapted.__wrapped__(name, **kw)[2]
    zero = adapted.__wrapped__(name, **dict(kw, steps=0))[2]
    assert zero.trainable == (
        0 if name == "context" else out.trainable
    )  # there, without steps nothing is trained: a control
    if name == "context":
        assert out.trainable == kw.get("L", 5) * 16
    share = Counter(id(p) for p, _ in out.assignments)
    for (p, _), (q, _) in zip(out.assignments, zero.assignments):
        diff = moved(q.state_dict(), p.state_dict())
        n = sum(v.numel() for v in diff.values()) / share[id(p)]
        assert len({k.startswith("prompt_") for k in diff}) == 1, sorted(diff)  # weights or prompts, not both
        if out.generator is None:
            assert n + P * max(extra - 2, 0) == out.trainable, sorted(diff)
        else:
            assert all(k.startswith("prompt_") for k in diff)
    if out.generator is not None:
        assert (
            sum(v.numel() for v in moved(zero.generator.state_dict(), out.generator.state_dict()).values()) / G
            == out.trainable
        )


@tuners
def test_merging_changes_nothing(name, monkeypatch):
    "A tuner that folds its modules into the weights in the end leaves a plain policy that acts the same."
    if not merges(name):
        return
    pi, _, out, _ = adapted(name)
    assert all(p.model.state_dict().keys() == pi.model.state_dict().keys() for p, _ in out.assignments)
    monkeypatch.setattr(kind(name), "release", lambda *_: None)
    torch.testing.assert_close(
        actions(adapted.__wrapped__(name)[2].assignments), actions(out.assignments), rtol=0, atol=1e-5
    )


@each
def test_same_seed_same_result(name, kw):
    few = dict(kw, steps=3) if has(name, "steps") else kw

    def again(**k):
        return adapted.__wrapped__(name, **few, **k)[2]

    out = [again()]
    torch.manual_seed(999)
    np.random.seed(999)
    out += [again(), again(rng=1)]
    a, b, c = (actions(o.assignments) for o in out)
    assert (
        torch.equal(a, b)
        and out[0].log == out[1].log
        and (out[0].trainable, out[0].env_steps) == (out[1].trainable, out[1].env_steps)
    )
    assert all(same(p.state_dict(), q.state_dict()) for (p, _), (q, _) in zip(out[0].assignments, out[1].assignments))
    assert torch.equal(a, c) == (not out[0].trainable)


@each
def test_it_helps(name, kw):
    "The error on the demonstrations (online: minus the score) of each task falls; switches that add noise, bf16 included, may leave it where it was."
    pi, dem, out, _ = adapted(name, **kw)
    start = begun(name, kw, pi, dem)
    if kw.get("online"):

        def f(placed):
            return -Score()(placed[0][0].prompt.map(lambda x: x[:, None]))[:, 0].numpy()
    else:

        def f(placed):
            return offline(placed, dem)

    a, b = f(start), f(out.assignments)
    assert (
        (b < a * (1.05 if kw.keys() & {"noisy", "seven", "precision"} else 1)).all()
        if out.trainable
        else (b == a).all()
    )


@each
def test_the_log_tells_the_truth(name, kw):
    "It begins with the start's error on the fixed batch of demonstrations and ends with the result's, for each task (online: scores)."
    pi, dem, out, _ = adapted(name, **kw)
    tol = 2e-2 if "precision" in kw else 1e-5
    if not has(name, "steps"):
        assert not out.log
        return
    key = "score" if kw.get("online") else "loss"

    def at(step):
        return [l[key] for l in sorted(out.log, key=lambda l: l["task"]) if l["step"] == step]

    if key == "score":
        assert len(at(0)) == len(at(SMALL["steps"])) == G
        return
    np.testing.assert_allclose(at(0), offline(begun(name, kw, pi, dem), dem), rtol=tol)
    np.testing.assert_allclose(at(SMALL["steps"]), offline(out.assignments, dem), rtol=tol)


@each
def test_saved_and_loaded(name, kw, tmp_path):
    "A tuned policy and its clone act, bit for bit, as one that was saved and loaded."
    out = adapted(name, **kw)[2]
    want = actions(out.assignments)
    seen = {}
    for i, (p, _) in enumerate(out.assignments):
        if id(p) not in seen:
            p.save_pretrained(tmp_path / str(i))
            seen[id(p)] = type(p).from_pretrained(tmp_path / str(i))
    assert torch.equal(actions([(seen[id(p)], row) for p, row in out.assignments]), want)
    assert torch.equal(actions([(p.clone(), row) for p, row in out.assignments]), want)
    assert all(same(seen[id(p)].state_dict(), p.state_dict()) for p, _ in out.assignments)


@pytest.mark.parametrize("other", [dict(layers=1), dict(layers=3), dict(shared_embed=True)], ids=str)
def test_no_policy_is_loaded_in_part(other, tmp_path):
    "Weights too many or too few for the configuration are an error, never silently another policy."
    toy()[0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    c = json.loads(file.read_text())
    file.write_text(json.dumps(dict(c, model=dict(c["model"], **other))))
    with pytest.raises((RuntimeError, PromptnbError)):
        Policy.from_pretrained(tmp_path)


@tuners
def test_is_quick(name):
    t = time.perf_counter()
    adapted.__wrapped__(name)
    assert time.perf_counter() - t < 5


@tuners
def test_misspelt(name):
    for f in fields(kind(name)):
        with pytest.raises(PromptnbError, match=f"hyper-parameter of tuner '{name}'.*did you mean '{f.name}'"):
            make_tuner(name, **{f.name + "x": 1})
    with pytest.raises(PromptnbError, match="unknown hyper-parameter"):
        make_tuner(name, zzz=1)
    with pytest.raises(PromptnbError, match=f"unknown tuner.*did you mean '{name}'"):
        make_tuner(name + "_")


@tuners
def test_without_a_prompt(name):
    "On a policy that takes no prompt a tuner works, or says in one line that it needs one."
    pi, dem = toy(prompt=False, context=reads(name, {}))
    tuner = make_tuner(name, **hyper(name, **(dict(steps=2) if has(name, "steps") else {})))
    try:
        out = tuner.adapt(pi, dem, 0, Score())
    except PromptnbError as e:
        assert f"needs a policy with a {'context encoder' if reads(name, {}) else 'prompt'}" in str(
            e
        ) and "\n" not in str(e)
    else:
        assert len(out.assignments) == G and torch.isfinite(actions(out.assignments)).all()


# ---- searches, online and off


@searches
def test_online_needs_a_score(name):
    pi, dem = toy()
    with pytest.raises(PromptnbError, match="needs `score`"):
        make_tuner(name, **hyper(name, online=True)).adapt(pi, dem, 0)


@searches
def test_online_counts_its_steps(name):
    "Every query is paid for; a score that counts nothing costs nothing."
    pi, dem = toy()
    seen = []
    score = Score()

    def plain(prompts):
        seen.append(prompts.t[..., 0].numel())
        return score(prompts)

    assert make_tuner(name, **hyper(name, online=True)).adapt(pi, dem, 0, plain).env_steps == 0
    assert (
        make_tuner(name, **hyper(name, online=True)).adapt(pi, dem, 0, s := Score()).env_steps
        == s.env_steps - 77
        == 10 * sum(seen)
    )


@searches
@pytest.mark.parametrize("online", [False, True])
def test_the_best_is_never_worse(name, online):
    "With keep='best' the result is no worse than the start, even with absurd steps."
    pi, dem, out, _ = adapted(name, keep="best", online=online, mu=30.0, **(dict(eta=50.0) if has(name, "eta") else {}))
    f = (
        (lambda p: -Score()(p.prompt.map(lambda x: x[:, None]))[:, 0].numpy())
        if online
        else lambda p: offline([(p, g) for g in range(G)], dem)
    )
    assert (f(out.assignments[0][0]) <= f(pi.with_prompt(dem.prompt)) + 1e-6).all()


@searches
@pytest.mark.parametrize("distribution", NOISES)
def test_every_noise(name, distribution):
    pi, dem, out, _ = adapted(name, distribution=distribution)
    assert (offline(out.assignments, dem) <= offline([(pi.with_prompt(dem.prompt), g) for g in range(G)], dem)).all()


@searches
@pytest.mark.parametrize("bad", [dict(distribution="gausian"), dict(keep="bset")])
def test_bad_choice(name, bad):
    with pytest.raises(PromptnbError, match="did you mean '(gaussian|best)'"):
        make_tuner(name, **bad).adapt(*toy(), 0)
