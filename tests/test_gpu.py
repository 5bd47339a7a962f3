"""What a GPU needs, tested without one: cards for jobs, memory that runs out, updates captured as one graph.

Cards are pretended, memory errors injected, and a graph is a call of what it would have recorded.
"""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from homes import FAMILY, PRETRAIN, RUN, SMOKE
from test_lm import A, S
from test_lm import K as LM_K
from test_lm import policy as language_policy
from toys import K, toy

from promptnb import captured, collect, core, data, train
from promptnb import cli as command
from promptnb.experiments import cards, job
from promptnb.models.dt import PromptDT
from promptnb.models.lm import WithText
from promptnb.tuners.core import make_tuner, prompt_loss, same_batch

# ---- row 14: cards and jobs

WORKER = """
import os, sys, types
cuda = types.SimpleNamespace(device_count=lambda: 1 if "CUDA_VISIBLE_DEVICES" in os.environ else 2)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)  # the real one takes seconds to import
from promptnb.experiments import cards
with cards.own_card() as card:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == card
    print("has", card, flush=True)
    sys.stdin.read()
print("done", flush=True)
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    "workers(n) starts n processes that want a card of two and keep it until their input ends; all are ended."
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started = []

    def start(n):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        new = [subprocess.Popen([sys.executable, "-c", WORKER], **pipes) for _ in range(n)]
        started.extend(new)
        return new

    yield start
    for p in started:
        p.kill()
        p.wait()
        p.stdout.close()


def sorted_out(processes):
    "({process: its card} of those that have one, those that wait), once each has said which."
    said = {p: p.stdout.readline().strip() for p in processes}
    having = {p: line.removeprefix("has ") for p, line in said.items() if line.startswith("has ")}
    waiting = [p for p, line in said.items() if line.startswith("waiting for a GPU: 2 here")]
    assert len(having) + len(waiting) == len(said), said
    return having, waiting


@pytest.mark.fault(14)
def test_three_jobs_on_two_cards_one_of_them_killed(workers):
    having, waiting = sorted_out(workers(3))
    assert sorted(having.values()) == ["0", "1"] and len(waiting) == 1
    killed, card = having.popitem()
    killed.send_signal(signal.SIGKILL)
    assert waiting[0].stdout.readline() == f"has {card}\n"
    ((other, _),) = having.items()
    assert other.poll() is None, "the other job was disturbed"


@pytest.mark.fault(14)
def test_two_jobs_share_a_card_when_told_to(workers, monkeypatch):
    monkeypatch.setenv(cards.PER_GPU, "2")
    having, waiting = sorted_out(workers(5))
    assert sorted(having.values()) == ["0", "0", "1", "1"] and len(waiting) == 1
    first = next(iter(having))
    first.stdin.close()  # it ends by itself
    assert first.stdout.readline() == "done\n"
    assert waiting[0].stdout.readline() == f"has {having[first]}\n"


def test_a_card_is_known_by_its_uuid(tmp_path, monkeypatch):
    monkeypatch.setattr(cards.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cards, "uuids", lambda: {"0": "GPU-a", "1": "GPU-b"})
    assert [(path.name, card) for path, card in cards.slots(["1", "GPU-c"]).items()] == [
        ("GPU-b.0.lock", "1"),
        ("GPU-c.0.lock", "GPU-c"),
    ]


def test_cards_are_those_that_the_user_leaves_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert cards.cards() == ["3", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cards.cards() == ["0", "1"]


@pytest.mark.parametrize("visible, chosen", [(1, None), (2, 1)])
def test_a_process_that_used_cuda_before_goes_to_its_card_by_number(visible, chosen, monkeypatch):
    went_to = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", went_to.append)
    cards.pin(["GPU-a", "GPU-b"], 1)
    assert cards.os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b" and went_to == ([] if chosen is None else [chosen])


def test_a_job_on_the_processor_takes_no_card(monkeypatch):
    monkeypatch.setattr(cards, "cards", lambda: pytest.fail("it looked for cards"))
    with cards.own_card("cpu") as card:
        assert card is None


def test_the_graph_runs_as_many_jobs_as_there_are_slots(tmp_home, monkeypatch, capsys):
    given = []

    def owned(c, *last_word):
        given.extend([" ".join(c), cards.per_gpu(), Path(c[-1].removeprefix("plan=")).read_text()])
        return 0

    monkeypatch.setenv(cards.PER_GPU, "1")
    monkeypatch.setattr(command, "cards", lambda: ["0", "1"])
    monkeypatch.setattr(train, "pick_device", torch.device)
    monkeypatch.setattr(command, "expected", lambda request, cores, *a, **k: f"{cores} at a time")
    monkeypatch.setattr(command, "owned", owned)
    assert command.main([*RUN, "--profile", "gpu", "--per-gpu", "3", "--cores", "16"]) in (None, 0)
    line, share, plan = given
    assert "--resources card=6 --config" in line and "--cores 6" in line and "profiles/gpu" in line
    assert share == 3 and "--accelerator cuda" in plan and "6 at a time" in capsys.readouterr().out


# ---- row 13: no GPU, too little memory


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "args, says",
    [
        ((*RUN, "--accelerator", "cuda"), "accelerator=cuda, but torch sees no GPU: use accelerator=auto or cpu"),
        ((*RUN, "--profile", "gpu"), "accelerator=cuda, but torch sees no GPU: use accelerator=auto or cpu"),
        ((*RUN, "--profile", "gpu", "--accelerator", "cpu"), "use --profile local"),
        ((*RUN, "--per-gpu", "0"), "is 0, but must be a whole number of at least 1"),
        (("job", PRETRAIN, *SMOKE, "--accelerator", "cuda"), "torch sees no GPU: use accelerator=auto or cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line_before_anything_starts(args, says, tmp_home, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = sorted(tmp_home.rglob("*"))
    assert command.main([*args]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("promptnb: ") and says in said.err and said.err.count("\n") == 1 and not said.out
    assert sorted(tmp_home.rglob("*")) == before


def small(**kw):
    "A Decision Transformer without dropout, and a sampler of 12 rows with prompts and padding."
    policy, demos = toy(dropout=0.0, **kw)
    sampler = data.Sampler(demos.sampler.store, policy.mean, policy.std, 12.0, K=K, per_task=6, H=3)
    return policy.model, sampler


class Full:
    "In place of a loss: no memory for batches above `most` rows; `times` counts how often it said so."

    def __init__(self, model, monkeypatch, most, until=10**9):
        self.loss, self.most, self.until, self.times = model.loss, most, until, 0
        monkeypatch.setattr(model, "loss", self)

    def __call__(self, batch):
        if len(batch) > self.most and self.times < self.until:
            self.times += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB.")
        return self.loss(batch)


# eps: gradients that are zero but for rounding (of keys' biases) must not become steps
FIVE = train.FitConfig(steps=5, lr=1e-3, warmup=1, eps=1e-4)


@pytest.mark.fault(13)
@pytest.mark.parametrize("on_prompt", [False, True])
def test_a_batch_that_memory_does_not_hold_is_computed_in_parts_with_the_same_result(monkeypatch, capsys, on_prompt):
    whole, sampler = small(loss_on_prompt=on_prompt)
    log = train.fit(whole, sampler, FIVE)
    model, _ = small(loss_on_prompt=on_prompt)
    full = Full(model, monkeypatch, most=3)
    capsys.readouterr()
    in_parts = train.fit(model, sampler, FIVE)
    lines = [x for x in capsys.readouterr().out.splitlines() if "out of memory" in x]
    assert full.times == len(lines) == 2 and "in 4, with the same result" in lines[1]
    assert all("--per-gpu" in line for line in lines)
    assert in_parts.losses[-1][1] == pytest.approx(log.losses[-1][1], rel=1e-6)
    for a, b in zip(whole.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.fault(13)
def test_memory_for_not_even_one_row_is_one_line(monkeypatch, refused):
    model, sampler = small()
    Full(model, monkeypatch, most=0)
    refused(train.fit, model, sampler, FIVE, desc="toy", says=["toy: step 0", "out of memory", "--per-gpu 1"])


class Stuck(Exception):
    "The run was killed."


@pytest.mark.fault(1, 13)
def test_a_run_that_went_on_in_parts_resumes_in_parts(monkeypatch, tmp_path):
    c = train.FitConfig(steps=6, lr=1e-3, warmup=1, checkpoint_every=2)
    unbroken, sampler = small()
    Full(unbroken, monkeypatch, most=6, until=1)
    train.fit(unbroken, sampler, c)
    model, _ = small()
    Full(model, monkeypatch, most=6, until=1)
    with monkeypatch.context() as m, pytest.raises(Stuck):
        m.setattr(sampler, "batch", lambda t, draw=sampler.batch: draw(t) if t < 3 else (_ for _ in ()).throw(Stuck))
        train.fit(model, sampler, c, tmp_path)
    again, _ = small()
    train.fit(again, sampler, c, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), again.parameters()))


@pytest.mark.fault(13)
def test_candidate_prompts_are_tried_in_smaller_groups(monkeypatch, capsys, refused):
    policy, demos = toy()
    held = same_batch(demos)
    prompts = demos.segments(6, 3, torch.Generator().manual_seed(0))
    wanted = prompt_loss(policy, prompts, held)
    forward, sizes, most = policy.model.forward, [], [2 * 2 * 8]  # two prompts of two tasks, eight windows each

    def limited(history, prefix=None, **kw):
        sizes.append(len(history))
        if len(history) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(history, prefix, **kw)

    monkeypatch.setattr(policy.model, "forward", limited)
    torch.testing.assert_close(prompt_loss(policy, prompts, held), wanted, rtol=1e-6, atol=0)
    assert sizes == [6 * 16, 3 * 16, *[16] * 6]
    assert capsys.readouterr().out.count("rows=") == 2
    most[0] = 0
    refused(prompt_loss, policy, prompts, held, says=["one at a time already, rows=", "--per-gpu 1"])


@pytest.mark.fault(13)
@pytest.mark.parametrize("tuner", ["soft", "gradient", "full"])
def test_tuners_by_gradients_go_on_in_parts(tuner, monkeypatch):
    def tuned():
        policy, demos = toy(dropout=0.0)
        return make_tuner(tuner, steps=3).adapt(policy, demos, 0).log

    whole = tuned()
    real, refusals = train.step_once, []

    def step_once(*a):
        if a[-1] == 1:
            refusals.append(a)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*a)

    monkeypatch.setattr(train, "step_once", step_once)
    assert [e["loss"] for e in tuned()] == pytest.approx([e["loss"] for e in whole], rel=1e-5) and refusals


def test_a_loss_that_compares_rows_is_not_divided():
    policy, demos = toy(context=True, w_nce=0.1)
    batch = core.Batch(demos.batch(0)[0], demos.prompt[:1], torch.zeros(8).long())
    assert policy.model.parts(batch, 4) == [(None, batch)]
    assert len(policy.model.parts(core.Batch(batch.history, batch.prompt), 4)) == 4


@pytest.mark.fault(13)
def test_a_job_that_memory_does_not_hold_fails_in_one_line(tmp_home, monkeypatch, capsys):
    collect.collect(FAMILY, "expert", 4, say=lambda *a: None)
    real = job.runs_of
    monkeypatch.setattr(job, "runs_of", lambda *a: real(*a)[:1])

    def no(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB.")

    monkeypatch.setattr(PromptDT, "loss", no)
    assert job.run_job(PRETRAIN, 0, "smoke", "cpu") == []
    said = capsys.readouterr().err
    assert "Traceback" not in said and "--per-gpu 1" in said and said.count("\n") == 1
    assert "--per-gpu 1" in core.read_record(real(job.find_job(PRETRAIN), "smoke", 0)[0].failed_path)["why"]


# ---- updates captured as one graph: a call in place of the graph

UPDATES = 90
CHUNKY = train.FitConfig(steps=UPDATES, lr=1e-3, warmup=10, checkpoint_every=25, log_every=30, eps=1e-4)


def by_calls(update):
    "What stands in for a graph: updates run before a recording, and a recording runs none."
    update()
    update()
    return update


@pytest.fixture
def graphs(monkeypatch):
    "The processor has graphs too, of chunks of 20 updates, however few updates there are."
    monkeypatch.setitem(captured.GRAPHS, "cpu", by_calls)
    monkeypatch.setattr(captured, "CHUNK", 20)
    monkeypatch.setattr(captured, "LEAST", 1)


def dropping(**kw):
    "A Decision Transformer with dropout, and a sampler of 12 rows whose prompts lie anywhere."
    policy, demos = toy(**kw)
    how = dict(K=K, per_task=6, H=3, position="random")
    return policy.model, data.Sampler(demos.sampler.store, policy.mean, policy.std, 12.0, **how)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


SAMPLERS = {
    "prompts anywhere": (dict(position="random", J=2, gap=True), 1000),
    "prompts at the tail": (dict(), 60),
    "without prompts": (dict(H=0), 60),
    "windows at the tail": (dict(windows="tail"), 60),
    "one task of two": (dict(tasks_per_batch=1), 60),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chunk_holds_what_the_sampler_draws(name, graphs):
    more, steps = SAMPLERS[name]
    policy, demos = toy()
    sampler = data.Sampler(
        demos.sampler.store, policy.mean, policy.std, 12.0, **{"K": K, "per_task": 4, "H": 3, "seed": 7, **more}
    )
    c = train.FitConfig(steps=steps, checkpoint_every=70)
    chunk = captured.Captured(train.Trainer(policy.model, c), sampler, None)
    first = seen = 0
    while first < steps:
        chunk.fill(chunk.drawn(first), first)
        for t in range(first, first := captured.chunk_end(c, first)):
            got, wanted = sampler.take(chunk.draws.map(chunk.read)), sampler.batch(t)
            for x, y in ((got.history, wanted.history), (got.prompt, wanted.prompt)):
                if y is not None:
                    assert all(torch.equal(getattr(x, n), getattr(y, n)) for n in core.Steps.__dataclass_fields__)
            assert torch.equal(got.task, wanted.task) and (got.prompt is None) == (wanted.prompt is None)
            chunk.at.add_(1)
            seen += 1
    assert seen == steps


@pytest.mark.parametrize("kind", ["Prompt-DT", "context"])
def test_captured_updates_are_the_eager_ones(kind, graphs, monkeypatch):
    def made():
        return small(context=kind == "context")

    model, sampler = made()
    log = train.fit(model, sampler, CHUNKY)
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    eager, _ = made()
    wanted = train.fit(eager, sampler, CHUNKY)
    assert [t for t, _ in log.losses] == [t for t, _ in wanted.losses]
    assert [v for _, v in log.losses] == pytest.approx([v for _, v in wanted.losses], rel=1e-4)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_updates_are_counted_without_the_pauses(graphs):
    model, sampler = small()
    updates = list(train.Trainer(model, CHUNKY).updates(sampler))
    assert len(updates) == UPDATES and [t for t, (_, whole) in enumerate(updates, 1) if whole] == [
        20,
        25,
        40,
        50,
        60,
        75,
        80,
        90,
    ]


def test_the_processor_has_no_graphs_and_says_nothing_of_it(capsys):
    model, sampler = small()
    assert captured.captured(train.Trainer(model, train.FitConfig()), sampler) is None
    assert list(captured.GRAPHS) == ["cuda"] and not capsys.readouterr().out


def test_a_short_run_is_not_worth_a_recording(graphs, monkeypatch, capsys):
    model, sampler = small()
    monkeypatch.setattr(captured, "LEAST", UPDATES + 1)
    assert captured.captured(train.Trainer(model, CHUNKY), sampler) is None and not capsys.readouterr().out


@pytest.mark.fault(1)
@pytest.mark.parametrize("at", [3, 27, 49, 61, 88])
def test_a_captured_run_that_was_killed_ends_in_the_same_bits(at, graphs, monkeypatch, tmp_path):
    unbroken, sampler = dropping()
    points = {}
    log = train.fit(unbroken, sampler, CHUNKY, callback=lambda t: points.setdefault(t, float(t)))

    def update(self, real=captured.Captured.update):
        if self.fit.step + int(self.at) >= at and getattr(self, "replay", None):
            raise Stuck
        real(self)

    model, _ = dropping()
    with monkeypatch.context() as m, pytest.raises(Stuck):
        m.setattr(captured.Captured, "update", update)
        train.fit(model, sampler, CHUNKY, tmp_path, callback=float)
    again, _ = dropping()
    resumed = train.fit(again, sampler, CHUNKY, tmp_path, callback=float)
    assert same_bits(unbroken, again) and resumed.losses == log.losses and resumed.points == log.points


@pytest.mark.fault(3)
def test_a_captured_run_told_to_stop_ends_its_chunk_first(graphs, monkeypatch, tmp_path):
    unbroken, sampler = dropping()
    train.fit(unbroken, sampler, CHUNKY)

    def update(self, real=captured.Captured.update):
        real(self)
        if self.fit.step + int(self.at) == 33 and getattr(self, "replay", None):
            signal.raise_signal(signal.SIGTERM)

    model, _ = dropping()
    with monkeypatch.context() as m, pytest.raises(train.Interrupted, match="told to stop at step 40"):
        m.setattr(captured.Captured, "update", update)
        train.fit(model, sampler, CHUNKY, tmp_path)
    again, _ = dropping()
    train.fit(again, sampler, CHUNKY, tmp_path)
    assert same_bits(unbroken, again)


class Poisoned:
    "Prompts' numbers are NaN in the draws of step t."

    def __init__(self, sampler, t):
        self.sampler, self.at = sampler, t

    def draw(self, t):
        d = self.sampler.draw(t)
        return dataclasses.replace(d, place=d.place + (float("nan") if t == self.at else 0.0))

    def take(self, d):
        batch = self.sampler.take(dataclasses.replace(d, place=d.place.nan_to_num()))
        return dataclasses.replace(batch, history=batch.history.map(lambda x: x + d.place.sum().mul(0).to(x.dtype)))


@pytest.mark.fault(10)
def test_nan_in_a_chunk_stops_at_its_step_and_keeps_what_was_good(graphs, tmp_path):
    model, sampler = small()
    sampler = dataclasses.replace(sampler, position="random")
    log = train.fit(model, Poisoned(sampler, 47), CHUNKY, tmp_path)
    assert (log.status, log.step) == ("diverged", 47)
    assert log.why == "loss is nan at step 47; the last good checkpoint is kept"
    assert core.Checkpoints(tmp_path, {}).paths()[0].stem == "step-000000025"
    before, _ = small()
    train.fit(before, sampler, dataclasses.replace(CHUNKY, steps=47))
    assert same_bits(model, before), "an update after the NaN moved the weights"


def test_what_a_recording_moves_is_put_back(graphs):
    "Weights and moments, those of a resumed run too."
    model, sampler = dropping()
    fit = train.Trainer(model, CHUNKY)
    for t in range(3):
        fit.update(sampler.batch(t))
    before = {k: v.clone() for k, v in train.state_of(model, fit.opt).items()}
    captured.recorded(fit, sampler, model.loss)
    after = train.state_of(model, fit.opt)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def cannot_record(update):
    update()
    raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


class NoDraws:
    def __init__(self, sampler):
        self.batch = sampler.batch


@pytest.mark.parametrize("what", ["loss", "sampler", "recording"])
def test_what_cannot_be_captured_is_eager_and_says_why(what, graphs, monkeypatch, capsys):
    model, sampler = dropping()
    why = {
        "loss": "PromptDT does not say that its loss is made of tensors alone",
        "sampler": "NoDraws draws in Python",
        "recording": "operation not permitted when stream is capturing",
    }[what]
    if what == "loss":
        monkeypatch.delattr(PromptDT, "uncaptured")
    if what == "recording":
        monkeypatch.setitem(captured.GRAPHS, "cpu", cannot_record)
    train.fit(model, NoDraws(sampler) if what == "sampler" else sampler, CHUNKY, desc="toy")
    said = [line for line in capsys.readouterr().out.splitlines() if "launched one by one" in line]
    assert len(said) == 1 and why in said[0] and said[0].startswith("toy: ")
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    eager, _ = dropping()
    train.fit(eager, sampler, CHUNKY)
    assert same_bits(model, eager)


@pytest.mark.fault(13)
def test_a_recording_that_memory_does_not_hold_is_of_parts(graphs, monkeypatch, capsys):
    c = dataclasses.replace(CHUNKY, steps=10)
    whole, sampler = small()
    train.fit(whole, sampler, c)
    model, _ = small()
    full = Full(model, monkeypatch, most=6)
    train.fit(model, sampler, c)
    assert full.times == 1 and "computed in 2" in capsys.readouterr().out
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "setting, steps, used", [("off", 10**6, False), ("on", 10, True), ("auto", 10, False), ("auto", 10**6, True)]
)
def test_torch_compile_is_used_where_it_pays(setting, steps, used, monkeypatch):
    monkeypatch.setenv(captured.COMPILE, setting)
    monkeypatch.setattr(torch, "compile", lambda f, **options: ("compiled", f))
    losses = captured.losses_of(small()[0], steps)
    assert list(losses) == (["compiled", "plain"] if used else ["plain"])


def test_a_loss_that_does_not_compile_is_captured_as_it_is(graphs, monkeypatch, capsys, refused):
    def fails(batch):
        raise RuntimeError("no compiler here")

    model, sampler = dropping()
    monkeypatch.setenv(captured.COMPILE, "on")
    monkeypatch.setattr(torch, "compile", lambda f, **options: fails)
    train.fit(model, sampler, CHUNKY, desc="toy")
    assert "toy: no graph of the compiled update: no compiler here" in capsys.readouterr().out
    monkeypatch.setenv(captured.COMPILE, "off")
    plain, _ = dropping()
    train.fit(plain, sampler, CHUNKY)
    assert same_bits(model, plain)
    monkeypatch.setenv(captured.COMPILE, "offf")
    refused(captured.compile_setting, says=["PROMPTNB_COMPILE", "did you mean 'off'?"])


def test_the_command_line_sets_torch_compile(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "job_command", lambda **given: seen.append(captured.compile_setting()))
    assert command.main(["job", PRETRAIN, *SMOKE, "--compile", "off"]) in (None, 0)
    assert seen == ["off"] and captured.compile_setting() == "auto"


@pytest.mark.parametrize("tuner", ["soft", "gradient", "full", "adapter", "lora"])
def test_tuners_by_gradients_can_be_captured(tuner, graphs, monkeypatch, capsys):
    def tuned():
        policy, demos = toy(dropout=0.0)
        return [e["loss"] for e in make_tuner(tuner, steps=30).adapt(policy, demos, 0).log]

    losses = tuned()
    assert "launched" not in capsys.readouterr().out
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    assert losses == pytest.approx(tuned(), rel=1e-3)


# ---- the same of LaMo, whose batches have text


def lamo(**kw):
    "A LaMo policy without dropout, and batches of 6 windows with 4 rows of text."
    g = torch.Generator().manual_seed(0)
    n = 60
    trajectories = [
        dict(
            observations=torch.randn(n, S, generator=g).numpy(),
            actions=torch.randn(n, A, generator=g).tanh().numpy(),
            rewards=torch.rand(n, generator=g).numpy(),
        )
    ]
    store = data.from_arrays(trajectories)
    model = language_policy(dropout=0.0, lora_dropout=0.0, lam=0.1, **kw)
    sampler = data.Sampler(store, *data.state_stats(store), 2.0, K=LM_K, per_task=6, H=0)
    stream = torch.randint(30, (3, 40), generator=g)
    return model, WithText(sampler, stream, seqs=4, length=9)


def test_lamo_with_text_can_be_captured(graphs, monkeypatch, capsys):
    c = dataclasses.replace(CHUNKY, steps=45)
    model, sampler = lamo()
    log = train.fit(model, sampler, c)
    assert "launched" not in capsys.readouterr().out
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    eager, _ = lamo()
    assert [v for _, v in log.losses] == pytest.approx([v for _, v in train.fit(eager, sampler, c).losses], rel=1e-4)


def test_a_chunk_holds_the_text_too(graphs):
    model, sampler = lamo()
    chunk = captured.Captured(train.Trainer(model, CHUNKY), sampler, None)
    chunk.fill(chunk.drawn(0), 0)
    for t in range(20):
        got, wanted = sampler.take(chunk.draws.map(chunk.read)), sampler.batch(t)
        assert torch.equal(got.text, wanted.text) and torch.equal(got.history.s, wanted.history.s)
        chunk.at.add_(1)


@pytest.mark.fault(13)
def test_lamo_goes_on_in_parts_its_text_apart(monkeypatch):
    model, sampler = lamo()
    batch = sampler.batch(0)
    parts = model.parts(batch, 4)
    assert [len(b.history) if b.history else -len(b.text) for _, b in parts] == [1, 2, 1, 2, -1, -1, -1, -1]
    total = sum(share * model.loss(part) for share, part in parts)
    torch.testing.assert_close(total, model.loss(batch), rtol=1e-5, atol=1e-6)
