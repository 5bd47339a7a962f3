"""What a GPU needs, tested without one: cards for jobs, memory that runs out, updates captured as one graph.

Cards are pretended, memory errors injected, and a graph is a call of what it would have recorded.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from homes import FAMILY, PRETRAIN, RUN, SMOKE
from toys import K, toy

from promptnb import cli as command
from promptnb import collect, core, data, train
from promptnb.experiments import cards, job
from promptnb.models.dt import PromptDT
from promptnb.tuners.core import make_tuner, prompt_loss, same_batch

# ---- row 14: cards and jobs

WORKER = """
import os, sys
from promptnb.experiments import cards
cards.cards = lambda: ["0", "1"]
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


def test_a_job_on_the_processor_takes_no_card(monkeypatch):
    monkeypatch.setattr(cards, "cards", lambda: pytest.fail("it looked for cards"))
    with cards.own_card("cpu") as card:
        assert card is None


def test_the_graph_runs_as_many_jobs_as_there_are_slots(tmp_home, monkeypatch, capsys):
    given = []

    def owned(c):
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
        ((*RUN, "--per-gpu", "0"), "--per-gpu is 0, but must be at least 1"),
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
