"""Every model's updates as a graph, a call in its place: the same losses as one by one, resumed in the same bits, and
nothing in them that a GPU's graph cannot hold."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from test_gpu import CHUNKY, Stuck, dropping, graphs, lamo, same_bits, small  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toys import K, toy

from promptnb import captured, data, train
from promptnb.models import context, lm, pixels
from promptnb.models import value as V
from promptnb.models.lm import LanguageModel, WithText, new_gpt2
from promptnb.tuners import core as tuners
from promptnb.tuners.context import TOWARDS, Windows
from promptnb.tuners.diffuser import GUIDANCE, Draws, Guided, PromptDiffuser
from promptnb.tuners.diffuser import DirectPrompt as Direct

# ---- models with what they train on: new ones at each call, always the same


def noise(steps=40, discrete=False, frames=(), episodes=3):
    "A store of random trajectories."
    g = np.random.default_rng(0)
    n = steps * episodes
    s = torch.as_tensor(g.integers(256, size=(n, *frames)).astype(np.uint8) if frames else g.normal(size=(n, 3)))
    a = np.eye(3)[g.integers(3, size=n)] if discrete else np.tanh(g.normal(size=(n, 2)))
    r, length = torch.as_tensor(g.normal(size=n)).float(), torch.full((episodes,), steps)
    s = s if frames else s.float()
    return data.Store(s, torch.as_tensor(a).float(), r, r, length, torch.zeros(episodes, dtype=torch.long))


def contextual(null=0.0):
    "A Contextual Meta Transformer with all of its losses; the prompts of some rows say nothing."
    weights = dict(w_nce=0.1, w_class=0.2, w_state=0.1, w_return=0.1, tasks=(0, 1), dropout=0.0)
    policy, demos = toy(context=True, null=null, **weights)
    sampler = data.Sampler(demos.sampler.store, policy.mean, policy.std, 12.0, K=K, per_task=6, H=3, position="random")
    return policy.model, Emptied(sampler)


class Emptied:
    "The batches of a sampler; of every third row the prompt is empty."

    def __init__(self, sampler):
        self.draw, self.sampler = sampler.draw, sampler

    def take(self, d):
        batch = self.sampler.take(d)
        keep = torch.arange(len(batch.history), device=d.rows.device)[:, None].remainder(3).clamp(max=1)
        return dataclasses.replace(batch, prompt=dataclasses.replace(batch.prompt, mask=batch.prompt.mask * keep))

    def batch(self, t):
        return self.take(self.draw(t))


def learner(name, **fields):
    "A baseline on random transitions."
    discrete = V.LEARNERS[name].discrete
    store = noise(discrete=discrete)
    torch.manual_seed(0)
    model = V.make_learner(name, 3, 3 if discrete else 2, hidden=16, **fields)
    return model, V.Transitions(store, *data.state_stats(store), size=16)


def sighted():
    "LaMo for games, on random pictures."
    store = noise(12, True, (84, 84), 2)
    shape = dict(width=16, layers=1, heads=1, vocab=30, dropout=0.0, train="full", use_positions=False, lam=0.0)
    torch.manual_seed(0)
    model = pixels.PixelLamo(dict(state_dim=4 * 84 * 84, act_dim=3, max_timestep=40, **shape), 4, 1.0, [4, 84, 84])
    return model, data.Sampler(store, torch.zeros(1), torch.ones(1), 1.0, K=4, per_task=2, H=0)


def writer(kind=PromptDiffuser, **fields):
    "A diffuser as it prepares: one net for all tasks, one of which is drawn at a time."
    policy, demos = toy(dropout=0.0)
    demos = dataclasses.replace(demos, position="random")
    tuner = kind(width=8, depth=1, prompts=4, tasks=1, **fields)
    guided = Guided(tuner.new(policy, demos, 0), tuners.frozen(policy.model), tuner.guidance)
    return guided, Draws(demos, 4, 1, 0)


def vectors(towards):
    "Context vectors, one task each, on windows towards something."
    policy, demos = toy(context=True, dropout=0.0)
    tuner = tuners.make_tuner("context", towards=towards)
    x, prefix_of, _ = tuner.start(policy, demos, tuners.frozen(policy.model), 0)
    return tuners._Prompts(policy.model, x, prefix_of), Windows(demos, 0, towards, 1.0)


def trunk(dropout=0.0):
    "A small language model, before it becomes a trunk, and its text."
    net = LanguageModel(new_gpt2(30, 12, 0, 1, 1, 16, dropout=dropout))
    return net, WithText(None, torch.arange(90).remainder(30).view(3, 30), 4, 12)


MODELS = {
    "context, all losses": contextual,
    "bc": lambda: learner("bc"),
    "td3+bc": lambda: learner("td3+bc", noise=0.0, delay=3),
    "iql": lambda: learner("iql"),
    "discrete-bc": lambda: learner("discrete-bc"),
    "discrete-cql": lambda: learner("discrete-cql", sync=7),
    "bcq": lambda: learner("bcq", sync=7),
    "nfq": lambda: learner("nfq"),
    "pixels": sighted,
    "direct": lambda: writer(Direct),
    "trunk": trunk,
    **{f"vectors towards {towards}": lambda towards=towards: vectors(towards) for towards in TOWARDS[1:]},
}
RANDOM = {  # which draw random numbers on the device: not those of updates one by one
    "context, some forgotten": lambda: contextual(null=0.5),
    "td3+bc with noise": lambda: learner("td3+bc"),
    "cql": lambda: learner("cql"),
    "trunk with dropout": lambda: trunk(0.2),
    **{f"diffuser, guidance {g}": lambda g=g: writer(guidance=g, N=3) for g in GUIDANCE},
}
SHORT = dataclasses.replace(CHUNKY, steps=45)


@pytest.fixture
def masking(monkeypatch):
    "Losses mask rows, as on a GPU."
    for module in (context, pixels, lm):
        monkeypatch.setattr(module, "picks", lambda x: False)


def tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", MODELS)
def test_updates_of_a_graph_are_those_of_one_by_one(name, graphs, masking, monkeypatch, capsys):
    model, sampler = MODELS[name]()
    log = train.fit(model, sampler, SHORT)
    assert "launched" not in capsys.readouterr().out
    monkeypatch.undo()
    eager, sampler = MODELS[name]()
    wanted = train.fit(eager, sampler, SHORT)
    assert [v for _, v in log.losses] == pytest.approx([v for _, v in wanted.losses], rel=1e-4)
    for a, b in zip(tensors(model), tensors(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, equal_nan=True)


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", [*MODELS, *RANDOM])
def test_a_killed_run_of_any_model_ends_in_the_same_bits(name, graphs, masking, monkeypatch, tmp_path):
    new = {**MODELS, **RANDOM}[name]
    unbroken, sampler = new()
    train.fit(unbroken, sampler, SHORT)

    def update(self, real=captured.Captured.update):
        if getattr(self, "replay", None) and self.fit.step + int(self.at) >= 31:
            raise Stuck
        real(self)

    with monkeypatch.context() as m, pytest.raises(Stuck):
        m.setattr(captured.Captured, "update", update)
        train.fit(*new(), SHORT, tmp_path)
    again, sampler = new()
    train.fit(again, sampler, SHORT, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors(unbroken), tensors(again)))


# ---- without values: on the "meta" device tensors have shapes alone, so what looks at a value is an error there


class Watch(TorchDispatchMode):
    "While inside, it is an error to bring something from the processor to the device, which a graph cannot hold."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        brought = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        given = [x for x in args if isinstance(x, torch.Tensor)]
        if brought and out.is_meta and any(not x.is_meta for x in given):
            raise AssertionError(f"{func} brings {tuple(out.shape)} to the device")
        return out


class WatchNumbers(TorchFunctionMode):
    "The same of what is made of Python's numbers, which lie on the processor."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.is_meta and not isinstance(args[0], torch.Tensor):
            raise AssertionError(f"{args[0]} is brought to the device")
        return out


@contextlib.contextmanager
def watching():
    "While inside, nothing may be brought to the device."
    with Watch(), WatchNumbers():
        yield


def without_autocast(monkeypatch):
    "The meta device has none."
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: False)


def as_meta(x):
    "A copy of a sampler, and of all that it holds, on the meta device."
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if not hasattr(x, "__dict__") or not type(x).__module__.startswith(("promptnb", "test_capture")):
        return x
    new = copy.copy(x)
    for name, value in vars(x).items():
        object.__setattr__(new, name, "meta" if name == "device" else as_meta(value))
    return new


def without_values(name):
    "(what does an update's forward and backward on the meta device, its kinds): of a model by name."
    model, sampler = GRAPHED[name]()
    kinds = {model.kind(t) for t in range(45)} if hasattr(model, "kinds") else {None}
    there = as_meta(sampler)
    if hasattr(model, "_model"):
        model._model[0].to("meta")
    if isinstance(model, tuners._Prompts):
        model._prefix_of = dict(zip(model._prefix_of.__code__.co_freevars, model._prefix_of.__closure__))
        ones = model._prefix_of["ones"].cell_contents.to("meta")
        model._prefix_of = lambda x: model._model[0].prefix(x, ones)
    model.to("meta").train()

    def gradients(t, kind):
        drawn = sampler.draw(t).map(lambda x: x.to("meta"))
        model.now = kind
        with watching() if t else contextlib.nullcontext():  # what is brought once may stay
            model.zero_grad(set_to_none=True)
            return train.add_gradients(model.loss, [(None, there.take(drawn))], "fp32", "meta")

    return gradients, kinds


GRAPHED = {**MODELS, **RANDOM, "Prompt-DT": small, "Prompt-DT with dropout": dropping, "lamo with text": lamo}


@pytest.mark.parametrize("name", GRAPHED)
def test_an_update_neither_looks_at_values_nor_brings_any(name, monkeypatch):
    without_autocast(monkeypatch)
    gradients, kinds = without_values(name)
    for kind in kinds:
        assert [gradients(t, kind).shape for t in range(2)] == [(), ()]


@pytest.mark.parametrize("name", ["context, all losses", "pixels", "trunk"])
def test_losses_as_on_a_processor_do_look(name, monkeypatch):
    without_autocast(monkeypatch)
    for module in (context, pixels, lm):
        monkeypatch.setattr(module, "picks", lambda x: True)
    gradients, _ = without_values(name)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradients(0, None)


def test_what_is_brought_is_noticed():
    for bring in (lambda x: x + torch.tensor([1.0], device="meta"), lambda x: x.copy_(torch.ones(1))):
        with watching(), pytest.raises(AssertionError, match="to the device"):
            bring(torch.ones(1, device="meta"))


def test_what_happens_now_and_then_has_a_graph_of_its_own(graphs):
    def kinds(name, **fields):
        model, sampler = learner(name, **fields)
        fit = train.Trainer(model, SHORT)
        graph = captured.recorded(fit, sampler, model.loss)
        assert model.now is None and int(model.step) == 0
        return {graph.kind(t): t for t in reversed(range(45))}

    assert kinds("bc") == {(False,): 0} and kinds("iql") == {(False,): 0, (True,): 1}
    assert kinds("discrete-cql", sync=7) == {(False,): 0, (True,): 7}
    assert kinds("td3+bc") == {(False, False): 0, (False, True): 1, (True, False): 2}


def test_kinds_go_on_where_a_learner_has_been_trained_before(graphs, monkeypatch):
    "Its own count of steps, and not the fit's, says when the targets move."
    c = dataclasses.replace(SHORT, steps=10)

    def twice():
        model, sampler = learner("discrete-cql", sync=7)
        train.fit(model, sampler, c)
        train.fit(model, sampler, c)
        return tensors(model)

    chunked = twice()
    monkeypatch.undo()
    for a, b in zip(chunked, twice(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_targets_are_put_back_after_a_recording(graphs):
    model, sampler = learner("iql")
    before = [x.clone() for x in tensors(model)]
    captured.recorded(train.Trainer(model, SHORT), sampler, model.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(model), strict=True))


def test_masked_losses_are_those_of_the_rows_that_are_picked(monkeypatch):
    for new, module in ((contextual, context), (sighted, pixels)):
        model, sampler = new()
        batch = sampler.batch(0)
        if module is pixels:
            batch = dataclasses.replace(
                batch, history=dataclasses.replace(batch.history, mask=batch.history.mask.clone())
            )
            batch.history.mask[0, :3] = 0
        gradients = []
        for picks in (True, False):
            monkeypatch.setattr(module, "picks", lambda x, picks=picks: picks)
            model.zero_grad(set_to_none=True)
            loss = model.loss(batch)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_with_one_context_alone_has_no_contrast():
    z, task = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 0, 1, 1])
    loss = context.info_nce(z, task, 0.1, torch.tensor([True, False, False, False]))
    loss.backward()
    assert loss == 0 and torch.equal(z.grad, torch.zeros_like(z))
