"One guided agent from recipe to record, at smoke scale: arms, metrics, kills in every stage, what is out of reach, keys that must not leak, and a real server that dies and comes back."

import contextlib
import http.server
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("crafter")
pytest.importorskip("trl")
pytest.importorskip("openai")
from homes import SMOKE, cli, new_home, went
from test_online import die, encode, forked

from promptnb import llm, online
from promptnb import recipes as rc
from promptnb.core import PromptnbError, Row, read_json, read_jsonl, sha256_file
from promptnb.experiments import guided, job
from promptnb.experiments.run import Run
from promptnb.llm import Guidance, adapter, exchanges
from promptnb.llm.backends import Cassette, Local, Server
from promptnb.online import PPOConfig, Trainer
from promptnb.recipes import rladapter as R
from promptnb.tasks.crafter import ACHIEVEMENTS, BEHAVIOURS, DEPTH

CPU, SECRET = torch.device("cpu"), "sk-no-file-may-hold-0123456789"
COST = ("queries", "calls", "cached", "tokens_in", "tokens_out", "llm_seconds", "invalid", "rejected", "failed", "kept")
VARY = {
    "seconds",
    "llm_seconds",
    "calls",
    "cached",
    "tokens_in",
    "tokens_out",
}  # in a run that was killed: replies come from the cassette
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# ---- helpers


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def models(shared):
    "Tiny language models, taught for seconds."
    return {
        k: adapter.tiny(k, shared / k, rows=300, steps=100, batch=4, lr=3e-3, layers=1, warm=10, held=2)
        for k in ("adapter", "decision")
    }


@pytest.fixture(autouse=True, scope="module")
def quick(models):
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(adapter, "tiny", lambda kind, *a, **k: models[kind])
        m.setattr(os, "fsync", lambda _: None)
        m.delenv("OPENAI_API_KEY", raising=False)
        yield
    torch.set_num_threads(n)


@pytest.fixture
def homes(tmp_path, monkeypatch):
    "new(name): an empty workbook, in use from then on."

    def new(name):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("PROMPTNB_HOME", str(tmp_path / name))
        return tmp_path / name

    return new


@pytest.fixture
def home(homes):
    return homes("home")


def at(arm, **kw):
    "The resolved smoke recipe of an arm, with fields of its online part changed."
    r = rc.resolve(R.ARMS[arm], "smoke")
    return replace(r, key=f"{arm}-test" if kw else arm, online=replace(r.online, **kw))


def made(r, seed=0):
    return read_json(guided.train(Run(r, "smoke", seed)))


def of(rec, metric):
    return {w["step"]: w["value"] for w in rec["rows"] if w["metric"] == metric}


def last(rec):
    return {w["metric"]: w["value"] for w in rec["rows"] if w["step"] == rec["protocol"]["steps"]}


def folder(home, rec):
    return home / rec["folder"]


def newest(home, rec):
    return read_json(max((folder(home, rec) / "ppo").glob("step-*.json")))


def but(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


def left(home, rec):
    "All that a run leaves which a kill must not change."
    meta, f = newest(home, rec), folder(home, rec)
    a = meta["envs"].pop("advise") or {}
    return dict(
        meta=but(meta, "own"),
        goals=a.get("envs"),
        lines=a.get("lines"),
        counts=but(a.get("counts", {}), *VARY),
        weights=sha256_file(f / "ppo" / f"step-{meta['step']:09d}.safetensors"),
        final=read_json(f / "final.json"),
        said=[but(e, "seconds", "cached", "tokens", "model") for e in exchanges(f / "exchanges.jsonl")],
        after=[but(e, "seconds", "cached", "tokens", "model") for e in exchanges(f / "final" / "exchanges.jsonl")],
        adapters={p.parent.name: sha256_file(p) for p in f.glob("adapter-*/model.safetensors")},
        rows=[w for w in rec["rows"] if w["metric"] not in VARY],
        guides=rec["guides"],
        texts=rec["texts"],
        counts_=rec["counts"],
        sft=[but(s, "seconds") for s in rec["sft"]],
    )


def same(a, b):
    assert not [k for k in a | b if a.get(k) != b.get(k)]


# ---- arms


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    "(home, {arm: record}) of all main arms and some switches, each through its job."
    home, out = tmp_path_factory.mktemp("arms"), {}
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PROMPTNB_HOME", str(home))
        for j in rc.jobs("rladapter").values():
            if j.part in {*R.MAIN, "released", "no-score"}:
                (out[j.part],) = [read_json(p) for p in job.run_job(j.id, 0, "smoke", "cpu", 1)]
    return home, out


ALL = [*R.MAIN, "released", "no-score"]
GUIDED = [k for k in ALL if k not in ("random-actions", "ppo")]


@pytest.mark.parametrize("arm", ALL)
def test_record(arm, arms):
    rec = arms[1][arm]
    r = at(arm)
    x = r.online
    assert (rec["status"], rec["why"], rec["recipe_digest"], rec["run_id"]) == (
        "ok",
        "",
        rc.digest(r),
        f"smoke.crafter.{arm}.s0",
    )
    assert rec["rows"] and all(
        set(w) == set(Row.__dataclass_fields__) and math.isfinite(w["value"]) for w in rec["rows"]
    )
    assert {
        (
            w["paper"],
            w["task"],
            w["task_id"],
            w["method"],
            w["seed"],
            w["scale"],
            w["env_steps"],
            w["run_id"],
            w["trainable"],
        )
        for w in rec["rows"]
    } == {("rladapter", "crafter", 0, r.method, 0, "smoke", x.steps, rec["run_id"], rec["counts"]["trainable"])}
    assert len({(w["metric"], w["step"]) for w in rec["rows"]}) == len(rec["rows"])
    want = (
        {k + end for k in ("score", "return", "length", "depth", "depth_max", "died") for end in ("", "_last")}
        | {f"{s}/{a}" for s in ("success", "success_last") for a in ACHIEVEMENTS}
        | {"seconds", "score_along"}
    )
    if arm != "random-actions":
        want |= {f"eval_{k}" for k in ("score", "return", "length", "depth", "depth_max", "died")} | {
            f"eval_success/{a}" for a in ACHIEVEMENTS
        }
    if arm in GUIDED:
        want |= {*COST}
    assert want <= {*last(rec)} and ("eval_score" in last(rec)) == (arm != "random-actions")
    assert {k for k in last(rec) if k.startswith("behaviour/")} >= {
        f"behaviour/{b}" for b in ("rests in time", "drinks in time", "eats in time", "keeps off lava")
    }
    assert (
        {k[10:] for k in last(rec) if k.startswith("behaviour/")} <= {*BEHAVIOURS}
        and {*of(rec, "score_along")} == {128, 256, 384, 512}
        and of(rec, "return_along").keys() <= {128, 256, 384, 512}
    )
    assert bool(of(rec, "comprehension")) == (arm in GUIDED) == bool(rec["texts"]) and all(
        0 < l < 1 for l in of(rec, "comprehension").values()
    )
    assert (
        rec["counts"]["total"]
        == rec["counts"]["trainable"]
        == {"random-actions": 0, "ppo": 807_090 - 385 * 512}.get(arm, 807_090)
    )
    assert (
        bool(rec["guides"]) == (arm in GUIDED)
        and len(rec["guides"]) <= 12
        and {s["stage"] for s in rec["sft"]} == ({1} if arm in ("adapter", "released", "no-score") else set())
    )
    assert rec["protocol"] == dict(
        steps=512, envs=2, episodes=len(episodes(arms, arm)), final=0 if arm == "random-actions" else 2
    ) and not list((arms[0] / "data" / "results").rglob("*.failed.json"))


def episodes(arms, arm):
    "The training episodes as they are on the disk, or played again."
    home, recs = arms
    return (
        online.play_random(PPOConfig(envs=2, length=at(arm).online.length), 512, 0)
        if arm == "random-actions"
        else newest(home, recs[arm])["log"]
    )


@pytest.mark.parametrize("arm", ["random-actions", "ppo", "adapter", "released"])
def test_metrics_follow_from_the_episodes(arm, arms):
    "Each row computed again, plainly."
    es, rec = episodes(arms, arm), arms[1][arm]
    rows = last(rec)
    final = [] if arm == "random-actions" else read_json(folder(arms[0], rec) / "final.json")
    for name, part in (("{}", es), ("{}_last", [e for e in es if e["step"] > 0.8 * 512]), ("eval_{}", final)):
        if not part:
            assert name == "eval_{}"
            continue
        rates = {a: 100 * sum(a in e["unlocked"] for e in part) / len(part) for a in ACHIEVEMENTS}
        n = len(part)
        want = dict(
            score=math.exp(sum(math.log(1 + s) for s in rates.values()) / 22) - 1,
            length=sum(e["length"] for e in part) / n,
            died=100 * sum(e["died"] for e in part) / n,
            depth=sum(max([DEPTH[a] for a in e["unlocked"]], default=0) for e in part) / n,
            depth_max=max(max([DEPTH[a] for a in e["unlocked"]], default=0) for e in part),
            **{"return": sum(e["ret"] for e in part) / n},
        )
        for k, v in want.items():
            assert rows[name.format(k)] == pytest.approx(v, abs=1e-9), k
        for a, v in rates.items():
            assert rows[
                {"{}": "success/", "{}_last": "success_last/", "eval_{}": "eval_success/"}[name] + a
            ] == pytest.approx(v)
        assert {
            w["n_episodes"] for w in rec["rows"] if w["metric"] in (name.format("score"), name.format("depth"))
        } == {n}
    late = [e for e in es if e["step"] > 0.8 * 512]
    for b in BEHAVIOURS:
        hit, of_ = (sum(e["behaviour"][b][k] for e in late) for k in (0, 1))
        row = [(w["value"], w["n_episodes"]) for w in rec["rows"] if w["metric"] == f"behaviour/{b}"]
        assert row == ([(pytest.approx(100 * hit / of_), of_)] if of_ else [])
    for step, v in of(rec, "score_along").items():
        rates = [100 * np.mean([a in e["unlocked"] for e in es if e["step"] <= step]) for a in ACHIEVEMENTS]
        assert v == pytest.approx(np.exp(np.mean(np.log1p(rates))) - 1)
    for step, v in of(rec, "return_along").items():
        assert v == pytest.approx(np.mean([e["ret"] for e in es if step - 128 < e["step"] <= step]))


@pytest.mark.parametrize("arm", GUIDED)
def test_queries_are_accounted_for(arm, arms):
    home, recs = arms
    rec, x = recs[arm], at(arm).online
    rows, said = last(rec), exchanges(folder(home, rec) / "exchanges.jsonl")
    assert (
        rows["queries"] == len(said)
        and rec["texts"] == len({e["sentence"] for e in said} - {""})
        and rows["failed"] == 0
    )
    for i in range(2):
        births = {*np.cumsum([e["length"] for e in episodes(arms, arm) if e["env"] == i]).tolist()}
        assert len(births) > 1
        assert [e["step"] for e in said if e["env"] == i] == [
            t
            for t in range(257)
            if t >= x.empty_each_rollout
            and (t - x.empty_each_rollout) % x.interval == 0
            or x.ask_on_reset
            and t in births
        ]  # as released: after the step
    tapes = [
        x["reply"]["tokens_out"]
        for p in folder(home, rec).glob("*.jsonl")
        if p.stem != "exchanges"
        for x in read_jsonl(p)
    ]
    assert all(n <= x.tokens for n in tapes)
    two = arm in ("untuned", "adapter", "released", "no-score")
    assert rows["calls"] == len(said) * (1 + two) and all(bool(e["response"]) <= two for e in said)
    f = folder(home, rec)
    assert (f / "decision.jsonl").exists() == (arm == "decision" or two) and (f / "adapter.jsonl").exists() == two
    for hi in (128, 256, 384, 512):
        ls = [e["l"] for e in said if hi - 128 <= 2 * e["step"] < hi and e["l"] is not None]
        assert of(rec, "comprehension").get(hi) == (pytest.approx(np.mean(ls)) if ls else None)
    if arm == "constant":
        assert {e["sentence"] for e in said} == {guided.SENTENCE} and rec["texts"] == 1
    if arm in ("random", "rules"):
        assert all(len(e["goals"]) == 3 for e in said) and rows["invalid"] == 0
    if two:
        assert all(("score:" in e["prompt"][1]["content"]) == (arm != "no-score") for e in said)


def test_arms_differ_where_they_say(arms):
    home, recs = arms
    meta = {k: newest(home, recs[k]) for k in ALL if k != "random-actions"}
    assert {k for k, m in meta.items() if m["restarts"]} == {"released"} and all(
        m["step"] == 512 for m in meta.values()
    )
    own = [meta[k]["sha256"] for k in ("ppo", "constant", "random", "rules", "decision", "adapter", "released")]
    assert len({*own}) == len(own)
    one, two = (exchanges(folder(home, recs[k]) / "exchanges.jsonl") for k in ("untuned", "adapter"))

    def first(es):
        return [but(e, "seconds", "l_after", "unlocked_after") for e in es if e["step"] * 2 < 256]

    assert (
        first(one) == first(two) != [] and not recs["untuned"]["sft"] and len(recs["adapter"]["sft"]) == 1
    )  # alike until the first tuning


def test_a_finished_run_is_not_run_again(arms, monkeypatch):
    home, recs = arms
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    path = Run(at("rules"), "smoke").path
    before = path.read_bytes()
    again = []
    monkeypatch.setattr(guided, "train", lambda run: again.append(run.seed))
    assert (
        [job.run_job("rladapter/main/crafter/online/rules", k, "smoke", "cpu", 1) for k in (0, 1)] == [[path], []]
        and again == [1]
        and path.read_bytes() == before
    )


def test_the_same_seed_gives_the_same_rows(homes, arms):
    home = homes("again")
    (path,) = job.run_job("rladapter/main/crafter/online/untuned", 0, "smoke", "cpu", 1)
    rec = read_json(path)
    first = arms[1]["untuned"]

    def strip(rec):
        return [w for w in rec["rows"] if w["metric"] not in ("seconds", "llm_seconds")]

    assert (
        strip(rec) == strip(first)
        and rec["guides"] == first["guides"]
        and newest(home, rec)["sha256"] == newest(arms[0], first)["sha256"]
    )
    (path,) = job.run_job("rladapter/main/crafter/online/rules", 1, "smoke", "cpu", 1)
    assert newest(home, read_json(path))["sha256"] != newest(arms[0], arms[1]["rules"])["sha256"]


# ---- kills

TUNED = dict(interval=10, steps=512)  # so many queries that there is something to tune on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    home = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PROMPTNB_HOME", str(home))
        rec = made(at("adapter", **TUNED))
    return home, rec


def at_step(n):
    "Die in the n-th step of the environments of this process."
    count, wait = [0], online.Guided.step_wait

    def step_wait(self):
        count[0] += 1
        if count[0] == n:
            die()
        return wait(self)

    online.Guided.step_wait = step_wait


def at_call(module, name):
    def f(*a, **k):
        die()

    setattr(module, name, f)


def test_kill_in_every_part(unbroken, homes):
    "In stage 1 before and after a checkpoint, while the adapter is tuned, in stage 2 before and after one, in the final episodes: it goes on, and is at last the unbroken run."
    r, home = at("adapter", **TUNED), homes("killed")

    def at_():
        return max([read_json(p)["step"] for p in home.rglob("step-*.json")], default=0)

    for where, step in (
        (lambda: at_step(30), 0),
        (lambda: at_step(100), 128),
        (lambda: at_call(adapter, "merged"), 256),
        (lambda: at_step(30), 256),
        (lambda: at_step(100), 384),
        (lambda: at_call(online, "play"), 512),
    ):
        assert (
            forked(lambda: (where(), made(r))) == signal.SIGKILL
            and at_() == step
            and not list(home.rglob("results/**/*.json"))
        )
        assert all(
            (p / "facts.json").exists() and (p / "model.safetensors").exists()
            for p in home.glob("data/runs/online/*/adapter-1")
        )  # whole or not there
    rec = made(r)
    same(left(*unbroken), left(home, rec))

    def total(rec):
        return last(rec)["calls"] + last(rec)["cached"]

    assert total(rec) == total(unbroken[1]) and last(rec)["cached"] > last(unbroken[1])["cached"]


def test_unbroken(unbroken):
    "What the run above is: tuned between its stages, with the tuned adapter in stage 2 and in the final episodes, and one policy."
    home, rec = unbroken
    f, (sft,) = folder(home, rec), rec["sft"]
    said = exchanges(f / "exchanges.jsonl")
    stage = [e for e in said if e["step"] * 2 < 256]
    assert (
        sft["stage"] == 1
        and sft["targets"] == "own"
        and sft["steps"] > 0
        and read_json(f / "adapter-1" / "facts.json")["rows"] + read_json(f / "adapter-1" / "facts.json")["held"]
        == len([e for e in stage if e["response"]])
    )
    names = [{x["name"] for x in read_jsonl(p)} for p in (f / "adapter.jsonl", f / "final" / "adapter.jsonl")]
    a, b = (Local(p).name for p in (adapter.tiny("adapter"), f / "adapter-1"))
    assert names == [{a, b}, {b}] and a != b
    by = {x["key"]: x["name"] for x in read_jsonl(f / "adapter.jsonl")}
    order = list(by.values())
    assert order == sorted(order, key=[a, b].index)
    tape = Cassette(f / "adapter.jsonl", name=a)
    assert {e["step"] for e in said if e["response"] and e["response"] in {x["text"] for x in tape.tape.values()}} >= {
        e["step"] for e in stage
    }
    assert (
        newest(home, rec)["restarts"] == 0
        and newest(home, rec)["updates"] == 4
        and len({e["env"] for e in read_json(f / "final.json")}) == rec["protocol"]["final"] == 2
    )


def test_what_the_tables_read_of_the_tuning(unbroken):
    assert {"stage", "rows", "steps", "seconds", "targets", "loss_before", "loss_after"} <= {*unbroken[1]["sft"][0]}


def test_rows_are_the_same_after_a_kill_in_the_next_stage(unbroken, tmp_path, monkeypatch):
    "A stage's exchanges must not depend on what the log says of the stage after it."
    home, rec = unbroken
    log, then, seen = folder(home, rec) / "exchanges.jsonl", tmp_path / "then.jsonl", []
    then.write_text(
        "".join(l for l in log.read_text().splitlines(True) if json.loads(l)["step"] * 2 <= 256)
    )  # as the log was when stage 1 ended
    monkeypatch.setattr(adapter, "sft_rows", lambda es, *a: seen.append(es) or [])
    for path in (then, log):
        guided.tuned(at("gain", interval=10).online, 1, "base", path, [0, 256, 512], tmp_path, 0)
    assert len(seen[0]) > 20 and seen[0] == seen[1]


def test_the_rows_of_a_stage(unbroken, tmp_path, monkeypatch):
    "Exchanges of the stage before, by steps of all environments; with `cumulative` of all stages before."
    log, seen = folder(*unbroken) / "exchanges.jsonl", []
    monkeypatch.setattr(adapter, "sft_rows", lambda es, *a: seen.append([e["step"] for e in es]) or [])
    for k, cumulative in ((1, False), (2, False), (2, True)):
        assert (
            guided.tuned(at("adapter", cumulative=cumulative).online, k, "base", log, [0, 200, 400, 512], tmp_path, 0)[
                0
            ]
            == "base"
        )
    assert (
        max(seen[0]) < 100 == min(seen[1])
        and max(seen[1]) < 200
        and sorted(seen[0] + seen[1]) == sorted(seen[2])
        and min(seen[0]) == 0
    )


def test_kill_after_a_new_policy(homes):
    "With `restart_policy` the second stage's policy begins once, also when the stage is cut."
    r = at("rules", restart_policy=True, steps=500)
    a = homes("a")
    one = made(r)
    b = homes("b")
    assert forked(lambda: (at_step(100 + 128), made(r))) == signal.SIGKILL
    two = made(r)
    same(left(a, one), left(b, two))
    meta = newest(b, two)
    assert (
        meta["restarts"] == 1 and meta["step"] == 512 and two["protocol"]["steps"] == 500
    )  # stages end with whole rollouts


def test_diverged(home, monkeypatch):
    "A loss that is not finite: a record that says so, and it is not tried again."

    def broken(self):
        raise FloatingPointError("loss is not finite at step 128")

    monkeypatch.setattr(Trainer, "note_losses", broken)
    (path,) = job.run_job("rladapter/main/crafter/online/rules", 0, "smoke", "cpu", 1)
    rec = read_json(path)
    monkeypatch.undo()
    assert (rec["status"], rec["why"], rec["rows"]) == ("diverged", "loss is not finite at step 128", [])


# ---- recipes to settings


def test_what_the_guide_is_told(home):
    "Each field of the recipe reaches the advisor."
    r = at(
        "adapter",
        interval=33,
        use_score=False,
        history="events",
        raw_replies=True,
        budget=(("calls", 7), ("seconds", 9.0)),
        tokens=11,
        temperature=0.3,
    )
    g = guided.guidance(r.online, 5, home, CPU, encode)
    assert (
        (
            g.K,
            g.use_score,
            g.history,
            g.raw,
            g.budget.calls,
            g.budget.seconds,
            g.max_tokens,
            g.temperature,
            g.seed,
            g.encode,
            g.adapter,
        )
        == (33, False, "events", True, 7, 9.0, 11, 0.3, 5, encode, None)
        and isinstance(g.decision, Cassette)
        and isinstance(g.decision.backend, Local)
    )
    kinds = {
        k: guided.guidance(at(k).online, 5, home, CPU, encode)
        for k in ("ppo", "constant", "random", "rules", "decision")
    }
    assert {k: g and (type(g.decision).__name__, g.raw) for k, g in kinds.items()} == dict(
        ppo=None,
        constant=("Constant", True),
        random=("RandomGoals", False),
        rules=("Rules", False),
        decision=("Cassette", False),
    )
    far = guided.guidance(
        at("decision", url="http://127.0.0.1:9/v1", decision="m").online, 5, home, CPU, encode
    ).decision.backend
    assert isinstance(far, Server) and (far.url, far.model) == ("http://127.0.0.1:9/v1", "m")


def test_whose_score_is_taken(home):
    "Of all environments where a prompt or a choice of rows reads it; else of one, for the curve."
    of = {
        k: guided.guidance(at(k).online, 5, home, CPU, encode).score_of
        for k in ("random", "rules", "adapter", "untuned", "gain", "no-score")
    }
    assert of == dict(random=(0,), rules=(0,), adapter=(), untuned=(), gain=(), **{"no-score": (0,)})
    assert guided.guidance(at("no-score", targets="gain").online, 5, home, CPU, encode).score_of == ()


def test_paper_sizes_are_the_released_ones():
    assert guided.ppo_config(rc.resolve(R.ARMS["adapter"], "paper").online, CPU) == PPOConfig() and guided.ppo_config(
        rc.resolve(R.ARMS["ppo"], "paper").online, CPU
    ) == PPOConfig(text=False)
    c = guided.ppo_config(rc.resolve(R.ARMS["released"], "paper").online, CPU)
    assert c == PPOConfig(text_after_step=True, empty_each_rollout=True, ask_on_reset=False)
    assert {
        k: guided.ppo_config(rc.resolve(R.ARMS[k], "paper").online, CPU).interval for k in ("K10", "K50", "K500")
    } == {"K10": 10, "K50": 50, "K500": 500}
    assert all(guided.ppo_config(rc.resolve(r, "laptop").online, CPU).net == "nature" for r in R.ARMS.values())


@pytest.mark.parametrize("reinit", [False, True])
def test_the_encoder_is_not_trained(reinit, home, monkeypatch):
    "Same weights before and after, none of them in the policy; with `reinit_encoder` the policy's is another, the score's is not."
    made_, real = [], llm.encoder

    def encoder(*a, **k):
        made_.append((e := real(*a, **k), e.weights_hash(), k))
        return e

    monkeypatch.setattr(llm, "encoder", encoder)
    rec = made(at("constant", encoder="minilm", steps=256, rollout=128, stages=1, reinit_encoder=reinit))
    assert (
        rec["status"] == "ok"
        and len(made_) == 1 + reinit
        and all(e.weights_hash() == h for e, h, _ in made_)
        and rec["counts"]["total"] == 807_090
    )
    assert len({h for _, h, _ in made_}) == 1 + reinit and (not reinit or all("reinit" in k for *_, k in made_[1:]))
    (own,) = [e for e, _, k in made_ if bool(k.get("reinit")) == reinit]
    table = newest(home, rec)
    assert table["envs"]["texts"] == ["", guided.SENTENCE] and guided.SENTENCE in own.known


def test_a_budget_ends_the_calls_and_not_the_run(home):
    rec = made(at("decision", interval=20, budget=(("calls", 5),), stages=1))
    rows = last(rec)
    said = exchanges(folder(home, rec) / "exchanges.jsonl")
    assert (
        rec["status"] == "ok"
        and rows["calls"] <= 5 < rows["queries"]
        and rows["failed"] == rows["queries"] - rows["calls"] - rows["cached"]
    )
    assert all("budget" in e["why"] and e["sentence"] == e["before"] for e in said[5:])


def test_unknown_names(home):
    for kw, says in (
        (dict(guide="rule"), "unknown guide 'rule': did you mean 'rules'?"),
        (dict(learner="pppo"), "unknown learner 'pppo': did you mean 'ppo'?"),
        (dict(net="nature2"), "unknown net 'nature2': did you mean 'nature'?"),
        (dict(encoder="hsh"), "unknown text encoder 'hsh': did you mean 'hash'?"),
    ):
        with pytest.raises(PromptnbError) as e:
            made(at("rules", **kw))
        assert str(e.value) == says


# ---- before work starts


@pytest.mark.parametrize(
    "arm,hidden,want",
    [
        ("ppo", "crafter", "crafter"),
        ("ppo", "numba", "crafter"),
        ("random-actions", "crafter", "crafter"),
        ("ppo", "trl", ""),
        ("ppo", "openai", ""),
        ("random-actions", "sentence_transformers", ""),
        ("rules", "crafter", "crafter"),
        ("adapter", "trl", "llm"),
        ("adapter", "openai", "llm"),
        ("adapter", "sentence_transformers", "llm"),
        ("adapter", "", ""),
    ],
)
def test_missing_packages(arm, hidden, want, monkeypatch):
    real = guided.importlib.util.find_spec
    monkeypatch.setattr(guided.importlib.util, "find_spec", lambda name, *a: None if name == hidden else real(name, *a))
    assert guided.out_of_reach(rc.resolve(R.ARMS[arm], "laptop")) == (
        f"needs the extra '{want}': pip install 'promptnb[{want}]'" if want else ""
    )


def test_missing_key_and_weights(monkeypatch):
    paper, small = ({k: rc.resolve(R.ARMS[k], s) for k in R.MAIN} for s in ("paper", "smoke"))

    def no(m):
        return False

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    key = "asks https://api.openai.com/v1 for 'gpt-4', which needs a key in the environment variable OPENAI_API_KEY (of a server of your own: any text)"
    assert {k: guided.out_of_reach(r) for k, r in paper.items()} == {
        k: key if k in ("decision", "untuned", "adapter") else "" for k in R.MAIN
    }
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    llama = "needs the weights of 'meta-llama/Llama-2-7b-chat-hf', which are not here and cannot be fetched"
    assert {k: guided.out_of_reach(r, no) for k, r in paper.items()} == {
        k: llama if k in ("untuned", "adapter") else "" for k in R.MAIN
    } and not any(guided.out_of_reach(r) for r in paper.values())
    assert not any(guided.out_of_reach(r, no) for r in small.values())  # tiny models are made here
    assert (
        guided.out_of_reach(at("decision", decision="org/model"), no)
        == "needs the weights of 'org/model', which are not here and cannot be fetched"
    )


def test_step_seconds():
    n = torch.get_num_threads()
    assert 1e-4 < guided.step_seconds(at("ppo"), "cpu") < 1 and torch.get_num_threads() == n


# ---- keys


class Echo(http.server.BaseHTTPRequestHandler):
    "A server that sends the key back: in replies, in errors, and in its own name."

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(key := self.headers["Authorization"])
        k = len(self.server.keys)
        body = (
            dict(error=dict(message=f"your key is {key}"))
            if k % 3 == 0
            else dict(
                id=key,
                object="chat.completion",
                created=0,
                model=f"m {key}",
                choices=[
                    dict(
                        index=0,
                        finish_reason="stop",
                        message=dict(role="assistant", content=f"{key} sleep, chop tree, mine coal"),
                    )
                ],
            )
        )
        data = json.dumps(body).encode()
        self.send_response(400 if k % 3 == 0 else 200)
        for name, v in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(data))),
            ("Set-Cookie", f"k={key}"),
        ):
            self.send_header(name, v)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *a):
        pass


@contextlib.contextmanager
def echo():
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    web.keys = []
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()


def holding(home, secret):
    return [p for p in home.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.mark.parametrize("raw", [False, True])
def test_the_key_is_in_no_file(raw, home, monkeypatch, capfd):
    "The server was sent the key and sent it back; it is in no file of the run, in no record, and not on the screen."
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with echo() as web:
        rec = made(
            at(
                "decision",
                interval=20,
                stages=1,
                url=f"http://127.0.0.1:{web.server_port}/v1",
                decision="m",
                raw_replies=raw,
            )
        )
    assert (
        rec["status"] == "ok" and {*web.keys} == {f"Bearer {SECRET}"} and len(web.keys) > 10 and last(rec)["failed"] > 2
    )
    said = capfd.readouterr()
    assert not holding(home, SECRET) and SECRET not in said.out + said.err and len(holding(home, "chop tree")) >= 2
    assert rec["texts"] >= 1 and (raw or rec["texts"] == 1)


def test_the_notebook_has_no_key(tmp_path):
    "Through papermill, with a key in the environment."
    home = new_home(tmp_path / "home")
    p = went(cli(home, "job", "rladapter/main/crafter/online/constant", "--seed", 0, *SMOKE, OPENAI_API_KEY=SECRET))
    rec = read_json(home / "data" / "results" / "rladapter" / "smoke.crafter.constant.s0.json")
    assert rec["status"] == "ok" and list(home.glob("data/runs/notebooks/*.ipynb"))
    assert not holding(home, SECRET) and SECRET not in p.stdout + p.stderr and len(holding(home, guided.SENTENCE)) >= 2


# ---- a real server


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Serve:
    "`transformers serve` on a tiny decision model, that can be killed and started again on its port."

    def __init__(self, model, folder):
        self.model, self.folder, self.port, self.process = model, folder, free_port(), None
        (folder / "hub").mkdir(parents=True)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.folder / "hub"), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("transformers")),
                    "serve",
                    str(self.model),
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--device",
                    "cpu",
                ],
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as r,
            ):
                if r.status == 200:
                    return self
            time.sleep(0.25)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def kill(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def served(models, shared):
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed: pip install 'promptnb[llm]'")
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed: pip install 'promptnb[llm]'")
    s = Serve(models["decision"], shared / "served").start()
    yield s
    s.kill()


def test_a_server_that_dies_and_comes_back(served, tmp_path):
    "Guided training with the decision LM behind a URL; the server is killed between two calls and later started again on its port."
    server = Server(
        served.url, str(served.model), timeout=20.0, deadline=30.0, retries=1, backoff=0.05, patience=2, rest=2
    )
    log = tmp_path / "exchanges.jsonl"
    guide = Guidance(decision=server, log=log, raw=True, max_tokens=12, K=16)
    seen = []

    class Advise:
        state, load = staticmethod(guide.state), staticmethod(guide.load)

        def __call__(self, scenes):
            if len(seen) == 3:
                served.kill()
            if len(seen) == 7:
                served.start()
            start = time.monotonic()
            out = guide(scenes)
            seen.append((out, dict(guide.counts), time.monotonic() - start))
            return out

    c = PPOConfig(net="nature", envs=2, rollout=16, batch=16, epochs=1, interval=16, length=10_000, ask_on_reset=False)
    t = Trainer(c, 0, tmp_path / "ppo", Advise(), encode, every=10**9).begin()
    t.go(11 * 32)
    said = exchanges(log)
    assert len(seen) == 12 and len(said) == 24 and t.step == 352

    def answered(es):
        return [bool(e["model"]) for e in es]

    alive, dead, back = said[:6], said[6:14], said[14:]
    assert all(answered(alive)) and len({e["sentence"] for e in alive}) > 1 and seen[2][1]["failed"] == 0
    for out, counts, seconds in seen[3:7]:
        assert out == seen[2][0] and seconds < 10  # the last goals stay, and nobody waits long
    assert not any(answered(dead)) and all(
        e["why"] and not e["decision"] and not e["ok"] and e["sentence"] == e["before"] != "" for e in dead
    )
    assert (
        seen[6][1]["failed"] == 8 and seen[6][1]["queries"] == 14 and 0 < seen[6][1]["unasked"] < 8
    )  # some were asked, then the server was left alone
    first = answered(back).index(True)
    assert first <= 4 and all(answered(back[first:])) and guide.counts["failed"] == 8 + first
    assert (
        {e["sentence"] for e in back} - {e["sentence"] for e in alive}
        and all(np.isfinite(list(x.values())).all() for x in t.losses)
        and len(t.envs.texts) > 4
    )


def test_the_server_answers_as_the_model_does(served):
    "The same weights behind the URL and in this process: greedy answers are the same."
    q = [
        llm.Request(llm.decision_prompt(llm.scene(("tree", "water"), dict(health=9, food=k)), ("sleep",)), 12, 0.0)
        for k in (2, 7)
    ]
    if served.process.poll() is not None:
        served.start()
    a, b = Server(served.url, str(served.model), timeout=20.0).complete(q), Local(served.model).complete(q)
    assert (
        all(r.ok for r in a)
        and [r.text.strip() for r in a] == [r.text for r in b]
        and [r.tokens_in for r in a] == [r.tokens_in for r in b]
    )
