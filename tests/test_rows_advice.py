"Rows of the fault list that a language model's server is at fault for, met by `promptnb job` of an agent with advice."

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("crafter")
pytest.importorskip("openai")
pytest.importorskip("trl")
from advisors import FAULTS, GOOD, Far, chat, echo, send
from homes import SMOKE, cli, new_home, went
from shims import patched
from test_backends import BAD_TEXTS
from test_llm import ATTACKS
from test_stages import VARY, holding

from promptnb.core import Row, read_json
from promptnb.llm import exchanges
from promptnb.llm.text import GOALS

JOB, SECRET = "rladapter/main/crafter/online/decision", "sk-no-file-may-hold-9876543210"
# smoke recipes that ask a server, impatiently: a query every five steps
RECIPES = """
for online in m.SMOKE["Online"].values():
    online.update(url=os.environ["FAR"], decision=os.environ.get("MODEL", "toy-2"), interval=5, steps=512, stages=1)
    online.update(budget=(("calls", int(os.environ["CALLS"])),) if "CALLS" in os.environ else ())
"""
HURRY = """
real = m.language_model
def language_model(x, device="cpu"):
    server = real(x, device)
    server.retries, server.backoff, server.patience = 1, 0.02, 99
    asked = server.preflight
    def preflight(*a):
        reply = asked(*a)
        server.timeout, server.deadline = 0.4, 1.5
        return reply
    server.preflight = preflight
    return server
m.language_model = language_model
"""


@dataclass
class Advised:
    "A job that was advised: its home, record, exchanges, what it printed, and seconds."

    home: object
    rec: dict
    said: list
    printed: str
    seconds: float

    @property
    def last(self):
        "{metric: value} at the end."
        return {w["metric"]: w["value"] for w in self.rec["rows"] if w["step"] == self.rec["protocol"]["steps"]}


def advised(home, url, **env):
    "Run the job with the server at that URL."
    shim = patched(home.parent / "shim", promptnb__recipes__scales=RECIPES, promptnb__experiments__guided=HURRY)
    start = time.monotonic()
    p = went(cli(home, "job", JOB, *SMOKE, FAR=url, OPENAI_API_KEY=SECRET, **shim, **env))
    rec = read_json(home / "data/results/rladapter/smoke.crafter.decision.s0.json")
    said = exchanges(home / rec["folder"] / "exchanges.jsonl")
    return Advised(home, rec, said, p.stdout + p.stderr, time.monotonic() - start)


def says(text):
    "A reply with that text."
    return lambda h: send(h, chat(text))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "Advised by a server that breaks each of its requests in another way, each twice, and says what it should not."
    home, far = new_home(tmp_path_factory.mktemp("hostile") / "home"), Far()
    far.faults = [says(GOOD[0])]  # the first question, before work
    far.faults += [fault for fault in FAULTS.values() for _ in range(2)]
    far.faults += [says(text) for text in (*BAD_TEXTS.values(), *ATTACKS)]
    far.faults += [lambda h: echo(h, 200), lambda h: echo(h, 401), lambda h: echo(h, 401)]
    many = len(far.faults)
    out = advised(home, far.url)
    assert len(far.seen) > many and not far.faults
    far.close()
    return out, far.url


def in_force(e):
    "The goals of an exchange's sentence."
    return {goal for goal in e["sentence"].split(", ") if goal}


@pytest.mark.fault(21)
def test_a_server_at_fault_costs_its_advice_and_not_the_run(hostile):
    "Every way to fail is met, counted and survived in bounded time; the goals before stay in force."
    run, _ = hostile
    failed = [e for e in run.said if not e["ok"]]
    assert run.rec["status"] == "ok" and run.last["failed"] >= len(FAULTS) - 3
    assert failed and all(e["why"] and e["sentence"] == e["before"] for e in failed if not e["decision"])
    assert run.last["kept"] >= len(failed)
    assert run.seconds < 120


@pytest.mark.fault(22)
def test_replies_that_are_none_are_counted_and_give_no_goal(hostile):
    run, _ = hostile
    assert run.last["invalid"] > 5
    assert all(in_force(e) <= {*GOALS} for e in run.said)
    assert (run.home / run.rec["folder"] / "exchanges.jsonl").stat().st_size < 1e6


@pytest.mark.fault(23)
def test_attacks_are_quoted_and_give_goals_of_the_list_or_none(hostile):
    "What the world and earlier goals say is a quoted line of the prompt, and nothing that was sent is run."
    run, _ = hostile
    for e in run.said:
        lines = e["prompt"][1]["content"].split("\n")
        assert all(line.count('"') == 2 and line.endswith('"') for line in lines[:4])
        assert in_force(e) <= {*GOALS}
    assert not Path("/tmp/pwned").exists()
    assert set(run.rec["rows"][0]) == set(Row.__dataclass_fields__)


@pytest.mark.fault(26)
def test_a_key_that_the_server_sends_back_is_nowhere(hostile):
    run, _ = hostile
    assert not holding(run.home, SECRET) and SECRET not in run.printed
    assert holding(run.home, "(key)")


@pytest.mark.fault(24)
def test_a_budget_of_calls_is_kept(tmp_path):
    "In training and in the final episodes together; the last goals stay, and the run goes on."
    far = Far()
    run = advised(new_home(tmp_path / "home"), far.url, CALLS="7")
    far.close()
    assert run.rec["status"] == "ok" and len(far.seen) <= 8 and run.last["calls"] <= 7
    assert run.last["kept"] > 20
    assert {e["sentence"] for e in run.said[10:]} <= {e["sentence"] for e in run.said[:10]}


def forget(run):
    "Take all away but the tapes."
    folder = run.home / run.rec["folder"]
    shutil.rmtree(folder / "ppo")
    for path in (folder / "exchanges.jsonl", folder / "final.json", folder / "final" / "exchanges.jsonl"):
        path.unlink()
    (run.home / "data/results/rladapter/smoke.crafter.decision.s0.json").unlink()


@pytest.mark.fault(25)
def test_tapes_give_the_same_run_without_the_server(hostile):
    "And those of one model are not played for another."
    run, url = hostile
    forget(run)
    again = advised(run.home, url)
    assert again.last["cached"] > 20
    told = {*VARY, "failed", "unasked", "retried", "unheard", "withheld"}  # what the server's absence changes
    assert [w for w in again.rec["rows"] if w["metric"] not in told] == [
        w for w in run.rec["rows"] if w["metric"] not in told
    ]
    assert [e["sentence"] for e in again.said] == [e["sentence"] for e in run.said]
    with pytest.raises(AssertionError, match="runs of .* failed"):
        advised(run.home, url, MODEL="toy-9")
