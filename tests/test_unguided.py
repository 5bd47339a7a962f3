"""Arms that never heard their model: refused before work, or recorded as unguided. None is recorded as ok.

A real server on this machine plays what servers do; the recipe that names it stands in a plug-in, as a user's would."""

import contextlib
import io
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("crafter")
pytest.importorskip("trl")
pytest.importorskip("openai")
from advisors import GOOD, Far, Scripted, chat, drip_body, echo, send
from homes import SMOKE, cli, new_home, one_line, went

from promptnb import recipes as rc
from promptnb.core import PromptnbError, read_jsonl, read_record
from promptnb.experiments import guided, job
from promptnb.experiments.run import Run
from promptnb.llm import Guidance, failure
from promptnb.llm.text import scene
from promptnb.recipes import rladapter as R
from promptnb.report import rladapter
from promptnb.report.view import View

SECRET = "sk-never-heard-0123456789"
QUICK = dict(retries=0, timeout=0.4, steps=256, rollout=128, stages=1, encoder="hash", interval=16)


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    far = Far()
    yield far
    far.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("PROMPTNB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def recipe(url, **kw):
    "The decision arm at smoke scale, asking a server."
    r = rc.resolve(R.ARMS["decision"], "smoke")
    asks = dict(url=url, decision="toy", key_env="MY_KEY")
    return replace(r, key="far", online=replace(r.online, **{**QUICK, **asks, **kw}))


def train(url, **kw):
    "The record that a run leaves, as its job would leave it."
    run = Run(recipe(url, **kw), "smoke")
    try:
        guided.train(run)
    except PromptnbError as e:
        job.record_failure(run, e)
    return read_record(run.path if run.path.exists() else run.failed_path)


def metrics(record):
    "{metric: value} of the whole run."
    return {w["metric"]: w["value"] for w in record["rows"] if w["step"] == 256}


# ---- refused before work

SILENT = dict(
    silent=lambda h: time.sleep(20),
    trickle=lambda h: drip_body(h, 200, 10**6),
    broken=lambda h: send(h, b"{}", 500),
    cut=lambda h: h.connection.close(),
    wrong_key=lambda h: echo(h, 401),
    forbidden=lambda h: echo(h, 403),
    no_model=lambda h: send(h, b'{"error": {"message": "no such model"}}', 404),
    bad_request=lambda h: send(h, b'{"error": {"message": "what?"}}', 400),
    thinks=lambda h: send(h, chat("", "length")),
    no_text=lambda h: send(h, chat(None)),
)


@pytest.mark.parametrize("what", SILENT)
def test_a_server_that_gives_no_answer_ends_the_run_before_work(far, home, what, capsys):
    far.answer = SILENT[what]
    record = train(far.url)
    assert record["status"] == "failed" and "'toy' at http://127.0.0.1" in record["why"] and not record["rows"]
    assert len(far.seen) == 1 and not list(home.rglob("*.safetensors"))
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and SECRET not in printed.err + json.dumps(record)


# ---- unguided


def after(n, fault):
    "A server that answers n requests, and from then on is at fault."

    def answer(far):
        return lambda h: send(h, chat(GOOD[len(far.seen) % 2])) if len(far.seen) <= n else fault(h)

    return answer


@dataclass
class Finished:
    "A run in a home of its own: its server, its record, what it printed."

    far: Far
    home: Path
    record: dict
    printed: str

    @property
    def folder(self):
        return self.home / self.record["folder"]

    @property
    def metrics(self):
        return metrics(self.record)


@contextlib.contextmanager
def finished(home, answer, **kw):
    "A run whose server answers as `answer(far)`."
    far, printed = Far(), io.StringIO()
    far.answer = answer(far)
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(printed):
        m.setenv("PROMPTNB_HOME", str(home))
        m.setenv("MY_KEY", SECRET)
        m.setattr(guided, "EVERY", 0.0)
        record = train(far.url, **kw)
    yield Finished(far, home, record, printed.getvalue())
    far.close()


@pytest.fixture(scope="module")
def deaf(tmp_path_factory):
    "A run whose server answers the first question and no other."
    with finished(tmp_path_factory.mktemp("deaf"), after(1, lambda h: send(h, b"{}", 500))) as run:
        yield run


def test_a_run_that_never_heard_its_model_is_unguided(deaf):
    record, m = deaf.record, deaf.metrics
    assert record["status"] == "unguided"
    assert record["why"].startswith("100% of the queries got no reply, more than 50%; the first: status 500")
    assert m["unheard"] == m["queries"] > 20 and m["calls"] == len(deaf.far.seen)


def test_a_table_says_so_where_the_score_would_stand(deaf, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(deaf.home))
    r = recipe(deaf.far.url)
    exhibit = rc.Exhibit("rladapter", "mine", "t", "-", "scoreboard", (r.id,), ("crafter",))
    monkeypatch.setitem(rc.RECIPES, r.id, r)
    monkeypatch.setattr(rc, "resolve", lambda r, scale: r)
    view = View(exhibit, "smoke", seeds=(0,))
    printed, t = rladapter.DRAW["scoreboard"](view)
    row = t[(t.kind == "ours") & (t.metric == "score")].iloc[0]
    assert (row.note, row["mean"]) == ("1 unguided", pytest.approx(float("nan"), nan_ok=True))
    assert printed.score.iloc[0] == "1 unguided"
    assert [run.state for run in view.runs] == ["unguided"] and not view.good


def test_an_unguided_run_is_not_finished_and_begins_anew(deaf, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(deaf.home))
    monkeypatch.setenv("MY_KEY", SECRET)
    run = Run(recipe(deaf.far.url), "smoke")
    assert not run.finished
    before = read_jsonl(deaf.folder / "exchanges.jsonl")
    deaf.far.answer = type(deaf.far).answer.__get__(deaf.far)  # it is well again
    again = train(deaf.far.url)
    assert again["status"] == "ok" and run.finished and metrics(again)["unheard"] == 0
    assert read_jsonl(deaf.folder / "unguided-0" / "exchanges.jsonl") == before  # nothing is lost


@pytest.mark.parametrize("share, status", [(0.4, "ok"), (0.6, "unguided")])
def test_the_bound_is_a_share_of_the_queries(far, home, share, status, monkeypatch):
    def answer(h):
        lost = 1 < len(far.seen) and len(far.seen) % 10 < 10 * share
        send(h, b"{}", 500) if lost else send(h, chat(GOOD[0]))

    far.answer = answer
    real = guided.language_model
    monkeypatch.setattr(guided, "language_model", lambda *a: replace(real(*a), patience=10**6))
    record = train(far.url)
    assert record["status"] == status
    assert metrics(record)["unheard"] / metrics(record)["queries"] == pytest.approx(share, abs=0.08)


def test_an_adapter_that_never_answers_leaves_no_good_record():
    g = Guidance(Scripted(failure("out of memory")), Scripted("sleep"))
    g([scene(step=1)])
    assert guided.heard(guided.Outcome([], counts=g.counts))[0] == "unguided"


def test_what_a_budget_withheld_is_no_silence(far, home):
    record = train(far.url, budget=(("calls", 5),))
    m = metrics(record)
    assert record["status"] == "ok" and m["withheld"] == m["queries"] - 4 and m["unheard"] == 0
    assert m["calls"] == len(far.seen) == 5  # training, final episodes and the first question together


# ---- what is counted and recorded


def sparing(far):
    "Answers of a server that takes little, and fails at times."
    refusals = dict(
        max_tokens="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        seed="seed: Extra inputs are not permitted",
    )

    def answer(h):
        body = h.request_body
        refusal = next((text for name, text in refusals.items() if name in body), "")
        if body["messages"][0]["role"] == "system":
            refusal = "System role not supported"
        if refusal:
            send(h, json.dumps(dict(error=dict(message=refusal))).encode(), 400)
        elif len(far.seen) % 7 == 0:
            send(h, b"{}", 500)
        else:
            send(h, chat(GOOD[len(far.seen) % 2]))

    return answer


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    "A run with that server."
    with finished(tmp_path_factory.mktemp("heard"), sparing, retries=2, extra=(("top_p", 0.5),)) as run:
        yield run


def test_what_a_server_takes_is_found_before_work_and_recorded(heard):
    server = heard.record["server"]
    assert heard.record["status"] == "ok" and server["model"] == "toy-2"
    assert server["takes"] == dict(limit="max_completion_tokens", system=False, temperature=True, seed=False)
    bodies = [body for _, body in heard.far.seen]
    assert not any({"max_tokens", "seed"} & {*body} for body in bodies[3:])  # the first three were refused
    assert {body["top_p"] for body in bodies} == {0.5}


def test_retries_and_final_queries_are_counted_and_logged(heard):
    training, final = (read_jsonl(heard.folder / part / "exchanges.jsonl") for part in (".", "final"))
    m, said, first = heard.metrics, training + final, heard.record["server"]["preflight"]
    assert training and final and m["queries"] == len(said)
    assert m["retried"] == sum(row["attempts"][0] - 1 for row in said) + first["attempts"] - 1 > 0
    assert all(row["retries"][0][0].startswith("status 500") for row in said if row["attempts"][0] > 1)
    assert m["calls"] == sum(not row["cached"][0] for row in said) + 1  # the first question


def test_a_line_says_what_was_asked_and_answered(heard):
    lines = [x for x in heard.printed.splitlines() if ": asked " in x]
    assert len(lines) > 5 and lines[0].startswith("smoke.crafter.far.s0: asked ")
    words = ("answered", "failed", "retried", "tokens in")
    assert all(word in line for line in lines for word in words)


def test_lines_come_once_a_minute(far):
    from promptnb.llm import Guidance
    from promptnb.llm.backends import Server
    from promptnb.llm.text import scene

    assert guided.EVERY == 60
    told = []
    g = Guidance(None, Server(far.url, "toy"), every=60.0)
    g.tally = lambda: told.append(1) or ""
    g([scene()])
    assert not told
    g.said -= 61
    g([scene(step=1)])
    g([scene(step=2)])
    assert len(told) == 1


def test_a_tape_is_played_without_its_server(heard, monkeypatch, capsys):
    "The policy is trained anew, on the same replies."
    monkeypatch.setenv("PROMPTNB_HOME", str(heard.home))
    monkeypatch.setenv("MY_KEY", SECRET)
    shutil.rmtree(heard.folder / "ppo")
    (heard.home / "data/results/rladapter/smoke.crafter.far.s0.json").unlink()
    heard.far.close()
    again = train(heard.far.url, retries=2, extra=(("top_p", 0.5),))
    assert again["status"] == "ok" and "going on with the replies that are on tape" in capsys.readouterr().out
    assert metrics(again)["score"] == heard.metrics["score"] and metrics(again)["cached"] > 20


# ---- recipes name servers


def test_fields_of_a_server_leave_older_digests_as_they_were():
    old = rc.digest(R.ARMS["decision"])
    server = dict(version="", key_env="OPENAI_API_KEY", timeout=10.0, retries=5, extra=())
    assert {k: getattr(R.ARMS["decision"].online, k) for k in server} == server
    for name, value in dict(version="2", key_env="K", timeout=9.0, retries=1, extra=(("top_p", 1),)).items():
        r = replace(R.ARMS["decision"], online=replace(R.ARMS["decision"].online, **{name: value}))
        assert rc.digest(r) != old, name
    assert old == "f165431d2c"


def test_a_recipe_s_server_is_the_one_that_is_asked():
    x = recipe("http://localhost:1/v1", version="2", timeout=120.0, retries=1, extra=(("top_p", 0.5),)).online
    s = guided.language_model(x)
    assert (s.key_env, s.timeout, s.retries, s.extra) == ("MY_KEY", 120.0, 1, dict(top_p=0.5))
    assert s.name.startswith("server:toy@2+")
    assert s.deadline >= s.timeout


def test_the_key_that_is_missing_is_the_recipe_s(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    assert "the environment variable MY_KEY" in guided.out_of_reach(recipe("http://localhost:1/v1"))


# ---- through the command line

STUDY = """
from dataclasses import replace
from promptnb import recipes as rc
from promptnb.recipes.core import Paper, Recipe
from promptnb.recipes import rladapter

x = rc.resolve(rladapter.ARMS["decision"], "smoke").online
x = replace(x, url="{url}", decision="toy", key_env="MY_KEY", preset="own", **{quick})
PAPER = Paper("mine", "A study of mine")
far = Recipe("mine", "crafter", "PPO + far LM", "far", None, eval_episodes=2, online=x, seeds=(0,))
PAPER.exhibit("main", "A table", "-", "scoreboard", [far])
rc.add(PAPER)
"""
JOB = ("job", "mine/main/crafter/online/far", *SMOKE)


@pytest.fixture
def study(far, tmp_path):
    "(home, environment) of a study of one's own, whose recipe names the server."
    (tmp_path / "mine.py").write_text(STUDY.format(url=far.url, quick=QUICK))
    return new_home(tmp_path / "home"), dict(PROMPTNB_PLUGINS=str(tmp_path / "mine.py"), MY_KEY=SECRET)


def left(home):
    "{status: why} of the records in a home."
    found = map(read_record, (home / "data/results/mine").glob("*.json"))
    return {record["status"]: record["why"] for record in found}


def test_a_wrong_key_is_one_line(study, far):
    home, env = study
    far.answer = lambda h: echo(h, 401)
    p = cli(home, *JOB, **env)
    one_line(p, "status 401", "MY_KEY")
    assert [*left(home)] == ["failed"] and SECRET not in p.stdout + p.stderr


def test_a_server_that_falls_silent_is_one_line_and_stands_in_the_table(study, far):
    home, env = study
    far.answer = after(1, lambda h: send(h, b"{}", 500))(far)
    one_line(cli(home, *JOB, **env), "unguided: 100% of the queries")
    assert [*left(home)] == ["unguided"]
    assert "1 unguided" in went(cli(home, "render", "mine", *SMOKE, **env)).stdout
