"""One guided agent from recipe to record, at smoke scale.

Arms, metrics, kills in every stage, what is out of reach, keys that must not leak, and a real server that dies and
comes back."""

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("crafter")
pytest.importorskip("trl")
pytest.importorskip("openai")
from homes import SMOKE, cli, new_home, went
from test_online import die, encode, forked

from promptnb import online
from promptnb import recipes as rc
from promptnb.core import PromptnbError, Row, read_json, read_jsonl, sha256_file
from promptnb.experiments import guided, job
from promptnb.experiments.run import Run
from promptnb.llm import Guidance, Request, adapter, encoders, exchanges
from promptnb.llm.backends import Cassette, Local, Server
from promptnb.llm.text import decision_prompt, scene
from promptnb.online import PPOConfig, Trainer
from promptnb.recipes import rladapter as R
from promptnb.tasks.crafter import ACHIEVEMENTS, BEHAVIOURS, DEPTH

CPU, SECRET = torch.device("cpu"), "sk-no-file-may-hold-0123456789"
COST = ("queries", "calls", "cached", "tokens_in", "tokens_out", "llm_seconds", "invalid", "rejected", "failed", "kept")
# metrics that differ in a run that is played from its cassettes
VARY = {"seconds", "llm_seconds", "calls", "cached", "tokens_in", "tokens_out"}
PARAMETERS = 807_090  # of the policy that reads sentences
ALL = [*R.MAIN, "released", "no-score"]
GUIDED = [k for k in ALL if k not in ("random-actions", "ppo")]
TUNED_ARMS = ("adapter", "released", "no-score")
TWO_MODELS = ("untuned", *TUNED_ARMS)  # an adapter LM and a decision LM
QUARTERS = {128, 256, 384, 512}  # steps of the points of a curve
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
of_every_arm = pytest.mark.parametrize("arm", ALL)
of_guided_arms = pytest.mark.parametrize("arm", GUIDED)
of_two_models = pytest.mark.parametrize("arm", TWO_MODELS)

# ---- models, homes, runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def models(shared):
    "Tiny language models, taught for seconds."
    small = dict(rows=300, steps=100, batch=4, lr=3e-3, layers=1, warm=10, held=2)
    return {kind: adapter.tiny(kind, shared / kind, **small) for kind in ("adapter", "decision")}


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


@contextlib.contextmanager
def in_use(home):
    "That workbook is the one in use."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PROMPTNB_HOME", str(home))
        yield home


def at(arm, **kw):
    "The resolved smoke recipe of an arm, with fields of its online part changed."
    r = rc.resolve(R.ARMS[arm], "smoke")
    return replace(r, key=f"{arm}-test" if kw else arm, online=replace(r.online, **kw))


def made(r, seed=0):
    "The record of a training in the workbook in use."
    return read_json(guided.train(Run(r, "smoke", seed)))


def jobs_record(arm, seed=0):
    "The record that the job of an arm leaves in the workbook in use."
    (path,) = job.run_job(f"rladapter/main/crafter/online/{arm}", seed, "smoke", "cpu", 1)
    return read_json(path)


@dataclass
class Finished:
    "A finished run: its record, and what lies in its folder."

    home: Path
    rec: dict

    @property
    def folder(self):
        return self.home / self.rec["folder"]

    @property
    def newest(self):
        "The newest checkpoint's facts."
        return read_json(max((self.folder / "ppo").glob("step-*.json")))

    @property
    def said(self):
        return exchanges(self.folder / "exchanges.jsonl")

    @property
    def said_in_all(self):
        "The exchanges of training and of the final episodes."
        return [*self.said, *exchanges(self.folder / "final" / "exchanges.jsonl")]

    @property
    def final(self):
        return read_json(self.folder / "final.json")["episodes"]

    @property
    def last(self):
        "{metric: value} at the end."
        return {w["metric"]: w["value"] for w in self.rec["rows"] if w["step"] == self.rec["protocol"]["steps"]}

    def curve(self, metric):
        "{step: value}"
        return {w["step"]: w["value"] for w in self.rec["rows"] if w["metric"] == metric}


def finished(home, r):
    "That recipe's run, trained in a workbook of its own."
    with in_use(home):
        return Finished(home, made(r))


def but(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


def untimed(es):
    "Exchanges without what a repetition may change."
    return [but(e, "seconds", "cached", "tokens", "model") for e in es]


def left(run):
    "All that a run leaves which a kill must not change."
    meta, f = run.newest, run.folder
    advice = meta["envs"].pop("advise") or {}
    return dict(
        meta=but(meta, "hash", "seconds"),
        goals=advice.get("envs"),
        lines=advice.get("lines"),
        counts=but(advice.get("counts", {}), "seconds"),
        weights=sha256_file(f / "ppo" / f"step-{meta['step']:09d}.safetensors"),
        final=run.final,
        said=untimed(run.said),
        after=untimed(exchanges(f / "final" / "exchanges.jsonl")),
        adapters={p.parent.name: sha256_file(p) for p in f.glob("adapter-*/model.safetensors")},
        rows=[w for w in run.rec["rows"] if w["metric"] not in ("seconds", "llm_seconds")],
        guides=run.rec["guides"],
        texts=run.rec["texts"],
        counts_=run.rec["counts"],
        sft=[but(s, "seconds") for s in run.rec["sft"]],
    )


def differing(a, b):
    "Keys under which two dicts differ."
    return [k for k in a | b if a.get(k) != b.get(k)]


# ---- records of the arms


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    "{arm: finished run} of all main arms and some switches, each through its job."
    with in_use(tmp_path_factory.mktemp("arms")) as home:
        parts = {j.part: j.id for j in rc.jobs("rladapter").values() if j.part in ALL}
        out = {}
        for part, id in parts.items():
            (path,) = job.run_job(id, 0, "smoke", "cpu", 1)
            out[part] = Finished(home, read_json(path))
    return out


@pytest.fixture
def run(arm, arms):
    "The finished run of the test's arm."
    return arms[arm]


@pytest.fixture
def rec(run):
    "Its record."
    return run.rec


@pytest.fixture
def x(arm):
    "The online part of its recipe."
    return at(arm).online


@pytest.fixture
def episodes(arm, run):
    "Its training episodes as they are on the disk, or played again."
    if arm == "random-actions":
        return online.play_random(PPOConfig(envs=2, length=at(arm).online.length), 512, 0)[0]
    return run.newest["log"]


@of_every_arm
def test_a_record_names_its_run(arm, rec):
    facts = (rec["status"], rec["why"], rec["recipe_digest"], rec["run_id"])
    assert facts == ("ok", "", rc.digest(at(arm)), f"smoke.crafter.{arm}.s0")


@of_every_arm
def test_rows_are_whole_and_finite(arm, rec):
    assert rec["rows"]
    assert all(set(w) == set(Row.__dataclass_fields__) for w in rec["rows"])
    assert all(math.isfinite(w["value"]) for w in rec["rows"])


@of_every_arm
def test_rows_say_whose_they_are(arm, rec):
    r = at(arm)
    want = dict(paper="rladapter", task="crafter", task_id=0, method=r.method, seed=0, scale="smoke")
    want |= dict(env_steps=r.online.steps, run_id=rec["run_id"], trainable=rec["counts"]["trainable"])
    assert all({k: w[k] for k in want} == want for w in rec["rows"])


@of_every_arm
def test_no_row_stands_twice(arm, rec):
    assert len({(w["metric"], w["step"]) for w in rec["rows"]}) == len(rec["rows"])


@of_every_arm
def test_every_metric_of_training_is_there(arm, run):
    want = {"seconds", "score_along"}
    for k in ("score", "return", "length", "depth", "depth_max", "died"):
        want |= {k, f"{k}_last"}
    for a in ACHIEVEMENTS:
        want |= {f"success/{a}", f"success_last/{a}"}
    assert want <= set(run.last)


@of_every_arm
def test_final_episodes_are_measured_of_trained_arms(arm, run):
    want = {f"eval_{k}" for k in ("score", "return", "length", "depth", "depth_max", "died")}
    want |= {f"eval_success/{a}" for a in ACHIEVEMENTS}
    if arm == "random-actions":
        assert "eval_score" not in run.last
    else:
        assert want <= set(run.last)


@of_guided_arms
def test_the_cost_of_guidance_is_measured(arm, run):
    assert set(COST) <= set(run.last)


@of_every_arm
def test_behaviours_are_measured(arm, run):
    names = {k.removeprefix("behaviour/") for k in run.last if k.startswith("behaviour/")}
    assert {"rests in time", "drinks in time", "eats in time", "keeps off lava"} <= names <= set(BEHAVIOURS)


@of_every_arm
def test_curves_have_a_point_each_quarter(arm, run):
    assert set(run.curve("score_along")) == QUARTERS
    assert set(run.curve("return_along")) <= QUARTERS


@of_every_arm
def test_comprehension_is_measured_of_guided_arms(arm, run):
    levels = run.curve("comprehension")
    assert bool(levels) == bool(run.rec["texts"]) == (arm in GUIDED)
    assert all(0 < level < 1 for level in levels.values())


@of_every_arm
def test_parameters_are_counted(arm, rec):
    want = {"random-actions": 0, "ppo": PARAMETERS - 385 * 512}.get(arm, PARAMETERS)
    assert rec["counts"]["total"] == rec["counts"]["trainable"] == want


@of_every_arm
def test_examples_are_kept_of_guided_arms(arm, rec):
    assert bool(rec["guides"]) == (arm in GUIDED)
    assert len(rec["guides"]) <= 12


@of_every_arm
def test_adapters_are_tuned_after_the_first_stage(arm, rec):
    assert {s["stage"] for s in rec["sft"]} == ({1} if arm in TUNED_ARMS else set())


@of_every_arm
def test_a_record_says_how_much_was_played(arm, rec, episodes):
    final = 0 if arm == "random-actions" else 2
    assert rec["protocol"] == dict(steps=512, envs=2, episodes=len(episodes), final=final)


def test_no_arm_failed(arms):
    (home,) = {run.home for run in arms.values()}
    assert not list((home / "data" / "results").rglob("*.failed.json"))


# ---- metrics, each computed again, plainly

MEASURED = ["random-actions", "ppo", "adapter", "released"]
NAMES = dict(all=("{}", "success/{}"), last=("{}_last", "success_last/{}"), eval=("eval_{}", "eval_success/{}"))
of_measured_arms = pytest.mark.parametrize("arm", MEASURED)
of_parts = pytest.mark.parametrize(
    "arm, part", [(arm, part) for arm in MEASURED for part in NAMES if (arm, part) != ("random-actions", "eval")]
)


@pytest.fixture
def late(episodes):
    "Episodes of the last fifth of training."
    return [e for e in episodes if e["step"] > 0.8 * 512]


@pytest.fixture
def es(part, run, episodes, late):
    "The episodes of the part of the test."
    if part == "eval":
        return run.final
    return late if part == "last" else episodes


def percents(es):
    "{achievement: percent of episodes that unlocked it}."
    return {a: 100 * sum(a in e["unlocked"] for e in es) / len(es) for a in ACHIEVEMENTS}


def mean_of_logs(rates):
    "Crafter's score of success rates."
    return math.exp(sum(math.log(1 + s) for s in rates) / 22) - 1


def mean_of(es, key):
    return sum(e[key] for e in es) / len(es)


@of_parts
def test_metrics_follow_from_the_episodes(arm, part, run, es):
    depths = [max([DEPTH[a] for a in e["unlocked"]], default=0) for e in es]
    want = dict(score=mean_of_logs(percents(es).values()), length=mean_of(es, "length"))
    want |= dict(died=100 * mean_of(es, "died"), depth=sum(depths) / len(es), depth_max=max(depths))
    want |= {"return": mean_of(es, "ret")}
    name, _ = NAMES[part]
    assert {k: run.last[name.format(k)] for k in want} == pytest.approx(want, abs=1e-9)


@of_parts
def test_success_rates_follow_from_the_episodes(arm, part, run, es):
    _, name = NAMES[part]
    assert {a: run.last[name.format(a)] for a in ACHIEVEMENTS} == pytest.approx(percents(es))


@of_parts
def test_rows_say_of_how_many_episodes_they_are(arm, part, rec, es):
    names = [NAMES[part][0].format(k) for k in ("score", "depth")]
    assert {w["n_episodes"] for w in rec["rows"] if w["metric"] in names} == {len(es)}


@of_measured_arms
def test_behaviours_follow_from_the_late_episodes(arm, rec, late):
    for b in BEHAVIOURS:
        hits, chances = (sum(e["behaviour"][b][k] for e in late) for k in (0, 1))
        row = [(w["value"], w["n_episodes"]) for w in rec["rows"] if w["metric"] == f"behaviour/{b}"]
        assert row == ([(pytest.approx(100 * hits / chances), chances)] if chances else []), b


@of_measured_arms
def test_the_score_along_is_of_all_episodes_until_then(arm, run, episodes):
    for step, value in run.curve("score_along").items():
        rates = percents([e for e in episodes if e["step"] <= step])
        assert value == pytest.approx(mean_of_logs(rates.values())), step


@of_measured_arms
def test_the_return_along_is_of_the_quarter(arm, run, episodes):
    for step, value in run.curve("return_along").items():
        quarter = [e for e in episodes if step - 128 < e["step"] <= step]
        assert value == pytest.approx(mean_of(quarter, "ret")), step


# ---- queries


@of_guided_arms
def test_every_query_leaves_an_exchange(arm, run):
    assert (run.last["queries"], run.last["failed"]) == (len(run.said_in_all), 0)
    assert len(run.said_in_all) > len(run.said)


@of_guided_arms
def test_different_sentences_are_counted(arm, run):
    assert run.rec["texts"] == len({e["sentence"] for e in run.said} - {""})


@of_guided_arms
@pytest.mark.parametrize("env", [0, 1])
def test_advice_comes_when_it_is_due(arm, env, run, x, episodes):
    "Each interval, and as an episode begins; as released: after the step, and not as one begins."
    births = set(np.cumsum([e["length"] for e in episodes if e["env"] == env]).tolist())
    first = int(x.empty_each_rollout)
    due = {t for t in range(first, 257) if (t - first) % x.interval == 0}
    if x.ask_on_reset:
        due |= births & set(range(257))
    assert len(births) > 1
    assert [e["step"] for e in run.said if e["env"] == env] == sorted(due)


@of_guided_arms
def test_replies_are_no_longer_than_allowed(arm, run, x):
    tapes = [p for p in run.folder.glob("*.jsonl") if p.stem != "exchanges"]
    assert all(line["reply"]["tokens_out"] <= x.tokens for p in tapes for line in read_jsonl(p))


@of_guided_arms
def test_a_call_is_counted_for_each_model(arm, run):
    two = arm in TWO_MODELS
    assert run.last["calls"] == len(run.said_in_all) * (1 + two)
    assert all(bool(e["response"]) <= two for e in run.said)


@of_guided_arms
def test_each_language_model_has_its_tape(arm, run):
    assert (run.folder / "decision.jsonl").exists() == (arm == "decision" or arm in TWO_MODELS)
    assert (run.folder / "adapter.jsonl").exists() == (arm in TWO_MODELS)


@of_guided_arms
def test_comprehension_is_the_mean_of_the_quarter(arm, run):
    for end in sorted(QUARTERS):
        quarter = [e for e in run.said if end - 128 <= 2 * e["step"] < end]
        levels = [e["l"] for e in quarter if e["l"] is not None and e["did"] and e["before"]]
        want = pytest.approx(np.mean(levels)) if levels else None
        assert run.curve("comprehension").get(end) == want, end


def test_a_score_of_nothing_done_is_in_no_curve():
    x = replace(at("rules").online, steps=100, points=1, envs=1)
    first = dict(step=0, l=0.269, did="", before="")
    second = dict(step=20, l=0.7, did="do", before="sleep")
    assert guided.along(x, [], [first, second]) == [(100, "comprehension", 0.7, 1)]


def test_the_constant_guide_says_one_sentence(arms):
    run = arms["constant"]
    assert {e["sentence"] for e in run.said} == {guided.SENTENCE}
    assert run.rec["texts"] == 1


@pytest.mark.parametrize("arm", ["random", "rules"])
def test_guides_without_a_model_give_three_valid_goals(arm, run):
    assert all(len(e["goals"]) == 3 for e in run.said)
    assert run.last["invalid"] == 0


@of_two_models
def test_the_adapter_is_shown_the_score_where_it_is_used(arm, run):
    assert all(("score:" in e["prompt"][1]["content"]) == (arm != "no-score") for e in run.said)


# ---- arms beside one another


def test_every_training_goes_to_its_end(arms):
    assert {arms[k].newest["step"] for k in ALL if k != "random-actions"} == {512}


def test_only_the_released_agent_restarts_its_policy(arms):
    assert {k for k in ALL if k != "random-actions" and arms[k].newest["restarts"]} == {"released"}


def test_no_two_arms_learn_the_same_policy(arms):
    own = [arms[k].newest["sha256"] for k in ("ppo", "constant", "random", "rules", "decision", "adapter", "released")]
    assert len(set(own)) == len(own)


def test_tuning_changes_nothing_before_it(arms):
    def first(run):
        return [but(e, "seconds", "l_after", "unlocked_after") for e in run.said if e["step"] * 2 < 256]

    assert first(arms["untuned"]) == first(arms["adapter"]) != []


def test_only_one_of_the_two_is_tuned(arms):
    assert (len(arms["untuned"].rec["sft"]), len(arms["adapter"].rec["sft"])) == (0, 1)


def test_a_finished_run_is_not_run_again(arms, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(arms["rules"].home))
    trained, path = [], Run(at("rules"), "smoke").path
    monkeypatch.setattr(guided, "train", lambda run: trained.append(run.seed))
    before = path.read_bytes()
    paths = [job.run_job("rladapter/main/crafter/online/rules", seed, "smoke", "cpu", 1) for seed in (0, 1)]
    assert (paths, trained) == ([[path], []], [1])
    assert path.read_bytes() == before


def test_the_same_seed_gives_the_same_rows(homes, arms):
    first, again = arms["untuned"], Finished(homes("again"), jobs_record("untuned"))

    def untimed_rows(run):
        return [w for w in run.rec["rows"] if w["metric"] not in ("seconds", "llm_seconds")]

    assert untimed_rows(again) == untimed_rows(first)
    assert again.rec["guides"] == first.rec["guides"]
    assert again.newest["sha256"] == first.newest["sha256"]


def test_another_seed_gives_another_policy(homes, arms):
    other = Finished(homes("other"), jobs_record("rules", seed=1))
    assert other.newest["sha256"] != arms["rules"].newest["sha256"]


# ---- stages

TUNED = dict(interval=10, steps=512)  # so many queries that there is something to tune on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A run of two stages, with a tuning between them."
    return finished(tmp_path_factory.mktemp("unbroken"), at("adapter", **TUNED))


def in_stage_1(run):
    return [e for e in run.said if e["step"] * 2 < 256]


def adapter_names(run):
    "Names of the adapter that training begins with, and of the tuned one."
    return [Local(p).name for p in (adapter.tiny("adapter"), run.folder / "adapter-1")]


def test_the_adapter_is_tuned_between_the_stages(unbroken):
    (sft,) = unbroken.rec["sft"]
    assert (sft["stage"], sft["targets"]) == (1, "own")
    assert sft["steps"] > 0


def test_every_analysis_of_the_stage_is_a_row_of_the_tuning(unbroken):
    facts = read_json(unbroken.folder / "adapter-1" / "facts.json")
    assert facts["rows"] + facts["held"] == len([e for e in in_stage_1(unbroken) if e["response"]])


def test_what_the_tables_read_of_the_tuning(unbroken):
    want = {"stage", "rows", "steps", "seconds", "targets", "loss_before", "loss_after"}
    assert want <= set(unbroken.rec["sft"][0])


def test_the_final_episodes_are_advised_by_the_tuned_adapter(unbroken):
    first, tuned = adapter_names(unbroken)
    names = {line["name"] for line in read_jsonl(unbroken.folder / "final" / "adapter.jsonl")}
    assert names == {tuned} != {first}


def test_the_tuned_adapter_follows_the_first_one(unbroken):
    names = adapter_names(unbroken)
    lines = read_jsonl(unbroken.folder / "adapter.jsonl")
    order = list({line["key"]: line["name"] for line in lines}.values())
    assert {line["name"] for line in lines} == set(names)
    assert order == sorted(order, key=names.index)


def test_the_first_stage_is_advised_by_the_first_adapter(unbroken):
    first, _ = adapter_names(unbroken)
    tape = Cassette(unbroken.folder / "adapter.jsonl", name=first).tape
    replies = {line["text"] for line in tape.values()}
    theirs = {e["step"] for e in unbroken.said if e["response"] and e["response"] in replies}
    assert {e["step"] for e in in_stage_1(unbroken)} <= theirs


def test_one_policy_learns_through_both_stages(unbroken):
    assert (unbroken.newest["restarts"], unbroken.newest["updates"]) == (0, 4)


def test_each_environment_plays_a_final_episode(unbroken):
    assert len({e["env"] for e in unbroken.final}) == unbroken.rec["protocol"]["final"] == 2


def test_rows_are_the_same_after_a_kill_in_the_next_stage(unbroken, tmp_path, monkeypatch):
    "A stage's exchanges must not depend on what the log says of the stage after it."
    log, then, seen = unbroken.folder / "exchanges.jsonl", tmp_path / "then.jsonl", []
    lines = log.read_text().splitlines(True)
    # as the log was when stage 1 ended
    then.write_text("".join(line for line in lines if json.loads(line)["step"] * 2 <= 256))
    monkeypatch.setattr(adapter, "sft_rows", lambda es, *a: seen.append(es) or [])
    for path in (then, log):
        guided.tuned(at("gain", interval=10).online, 1, "base", path, [0, 256, 512], tmp_path, 0)
    assert len(seen[0]) > 20
    assert seen[0] == seen[1]


@pytest.fixture
def steps_of_rows(unbroken, tmp_path, monkeypatch):
    "steps_of_rows(k, cumulative): steps of the exchanges that the tuning before stage k is given; it tunes nothing."
    seen = []
    monkeypatch.setattr(adapter, "sft_rows", lambda es, *a: seen.append([e["step"] for e in es]) or [])

    def steps(k, cumulative=False):
        x, log = at("adapter", cumulative=cumulative).online, unbroken.folder / "exchanges.jsonl"
        kept, _ = guided.tuned(x, k, "base", log, [0, 200, 400, 512], tmp_path, 0)
        assert kept == "base"
        return seen.pop()

    return steps


def test_the_rows_of_a_stage_are_of_the_stage_before(steps_of_rows):
    "By steps of all environments, of which there are two."
    first, second = steps_of_rows(1), steps_of_rows(2)
    assert (min(first), min(second)) == (0, 100)
    assert max(first) < 100
    assert max(second) < 200


def test_cumulative_rows_are_of_all_stages_before(steps_of_rows):
    first, second, both = steps_of_rows(1), steps_of_rows(2), steps_of_rows(2, cumulative=True)
    assert sorted(first + second) == sorted(both)


@pytest.mark.parametrize("arm, twice", [("adapter", False), ("no-score", False), ("released", True)])
def test_the_released_arm_alone_is_tuned_on_markup_in_markup(unbroken, tmp_path, monkeypatch, arm, twice):
    "PKU-RL/AdaRefiner, sft.py: the logged prompt, which holds the markup, is put into the markup again."
    seen = []
    done = dict(eval_before=1, eval_after=1, steps=1, seconds=1)
    monkeypatch.setattr(adapter, "tune", lambda base, rows, out, config, device: seen.append(config) or done)
    guided.tuned(at(arm).online, 1, "base", unbroken.folder / "exchanges.jsonl", [0, 256, 512], tmp_path, 0)
    assert [config.markup_twice for config in seen] == [twice]


def test_the_field_of_the_markup_leaves_older_digests_as_they_were():
    "Results of the other arms were made before the field was there."
    x = R.ARMS["adapter"].online
    assert "markup_twice" in rc.core.LATER
    assert rc.digest(replace(x, markup_twice=True)) != rc.digest(x)


# ---- kills


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
    "Die where that function is called."

    def f(*a, **k):
        die()

    setattr(module, name, f)


def killed_in(where, r):
    "The signal that ended a training, in a process of its own that dies there."

    def train():
        where()
        made(r)

    return forked(train)


# where a process dies, one after the other: (how, step of the newest checkpoint then)
KILLS = {
    "stage 1, before a checkpoint": (partial(at_step, 30), 0),
    "stage 1, after a checkpoint": (partial(at_step, 100), 128),
    "tuning": (partial(at_call, adapter, "merged"), 256),
    "stage 2, before a checkpoint": (partial(at_step, 30), 256),
    "stage 2, after a checkpoint": (partial(at_step, 100), 384),
    "final episodes": (partial(at_call, online, "play"), 512),
}


@dataclass
class Death:
    "What a killed process leaves."

    signal: int
    step: int  # of the newest checkpoint
    records: list
    adapters: list  # (its facts are there, its weights are there) of each tuned one


def death(home, where, r):
    "Train in the workbook in use until killed there."
    signal = killed_in(where, r)
    steps = [read_json(p)["step"] for p in home.rglob("step-*.json")]
    folders = home.glob("data/runs/online/*/adapter-1")
    adapters = [((p / "facts.json").exists(), (p / "model.safetensors").exists()) for p in folders]
    return Death(signal, max(steps, default=0), list(home.rglob("results/**/*.json")), adapters)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "(deaths by name, the run at last) of one training that is killed in every part."
    r = at("adapter", **TUNED)
    with in_use(tmp_path_factory.mktemp("killed")) as home:
        deaths = {name: death(home, where, r) for name, (where, _) in KILLS.items()}
        return deaths, Finished(home, made(r))


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_has_got_further(name, killed):
    deaths, _ = killed
    _, step = KILLS[name]
    assert (deaths[name].signal, deaths[name].step) == (signal.SIGKILL, step)


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_leaves_no_record(name, killed):
    deaths, _ = killed
    assert not deaths[name].records


@pytest.mark.parametrize("name", KILLS)
def test_a_tuned_adapter_is_whole_or_not_there(name, killed):
    deaths, _ = killed
    assert all(facts and weights for facts, weights in deaths[name].adapters)


def test_a_killed_run_is_at_last_the_unbroken_one(killed, unbroken):
    _, run = killed
    assert differing(left(unbroken), left(run)) == []


def test_replies_are_not_asked_for_again_after_a_kill(killed, unbroken):
    _, run = killed

    for tape in ("decision.jsonl", "adapter.jsonl"):
        lengths = [len(read_jsonl(x.folder / tape)) for x in (run, unbroken)]
        assert lengths[0] == lengths[1] > 20


def test_the_seconds_of_a_record_are_of_all_processes(home, monkeypatch):
    out = guided.Outcome([], failed=[dict(why="the game raised")], earlier=1000.0)
    monkeypatch.setattr(guided, "staged", lambda run, folder: out)
    assert made(at("ppo"))["seconds"] >= 1000


def test_kill_after_a_new_policy(homes):
    "With `restart_policy` the second stage's policy begins once, also when the stage is cut."
    r = at("rules", restart_policy=True, steps=500)
    one = Finished(homes("a"), made(r))
    home = homes("b")
    assert killed_in(partial(at_step, 100 + 128), r) == signal.SIGKILL
    two = Finished(home, made(r))
    assert differing(left(one), left(two)) == []
    assert two.newest["restarts"] == 1


def test_stages_end_with_whole_rollouts(home):
    run = Finished(home, made(at("rules", restart_policy=True, steps=500)))
    assert (run.newest["step"], run.rec["protocol"]["steps"]) == (512, 500)


def test_diverged(home, monkeypatch):
    "A loss that is not finite: a record that says so, and it is not tried again."

    def broken(self):
        raise FloatingPointError("loss is not finite at step 128")

    monkeypatch.setattr(Trainer, "note_losses", broken)
    rec = jobs_record("rules")
    assert (rec["status"], rec["why"], rec["rows"]) == ("diverged", "loss is not finite at step 128", [])


# ---- recipes to settings


def guide_of(home, arm, **kw):
    "What advises an arm."
    return guided.guidance(at(arm, **kw).online, 5, home, CPU, encode)


def paper_config(arm):
    "PPO's settings of an arm at the paper's scale."
    return guided.ppo_config(rc.resolve(R.ARMS[arm], "paper").online, CPU)


def test_what_the_guide_is_told(home):
    "Each field of the recipe reaches the advisor."
    told = dict(interval=33, use_score=False, history="events", raw_replies=True, tokens=11, temperature=0.3)
    g = guide_of(home, "adapter", budget=(("calls", 7), ("seconds", 9.0)), **told)
    assert (g.K, g.use_score, g.history, g.raw) == (33, False, "events", True)
    assert (g.budget.calls, g.budget.seconds) == (7, 9.0)
    assert (g.max_tokens, g.temperature, g.seed) == (11, 0.3, 5)
    assert (g.encode, g.adapter) == (encode, None)


def test_replies_of_a_model_in_this_process_go_on_tape(home):
    decision = guide_of(home, "adapter").decision
    assert isinstance(decision, Cassette)
    assert isinstance(decision.backend, Local)


def test_an_agent_without_guidance_has_no_guide(home):
    assert guide_of(home, "ppo") is None


@pytest.mark.parametrize(
    "arm, kind, raw",
    [
        ("constant", "Constant", True),
        ("random", "RandomGoals", False),
        ("rules", "Rules", False),
        ("decision", "Cassette", False),
    ],
)
def test_each_arm_has_its_guide(arm, kind, raw, home):
    g = guide_of(home, arm)
    assert (type(g.decision).__name__, g.raw) == (kind, raw)


def test_a_url_is_asked_as_a_server(home):
    far = guide_of(home, "decision", url="http://127.0.0.1:9/v1", decision="m").decision.backend
    assert isinstance(far, Server)
    assert (far.url, far.model) == ("http://127.0.0.1:9/v1", "m")


@pytest.mark.parametrize("arm", ["adapter", "untuned", "gain"])
def test_scores_are_taken_of_all_environments_where_they_are_read(arm, home):
    assert guide_of(home, arm).score_of == ()


@pytest.mark.parametrize("arm", ["random", "rules", "no-score"])
def test_a_score_is_taken_of_one_environment_for_the_curve(arm, home):
    assert guide_of(home, arm).score_of == (0,)


def test_a_choice_of_rows_by_gain_reads_all_scores(home):
    assert guide_of(home, "no-score", targets="gain").score_of == ()


def test_paper_sizes_are_the_released_ones():
    assert paper_config("adapter") == PPOConfig()
    assert paper_config("ppo") == PPOConfig(text=False)


def test_the_released_code_s_habits_are_switches():
    assert paper_config("released") == PPOConfig(text_after_step=True, empty_each_rollout=True, ask_on_reset=False)


@pytest.mark.parametrize("interval", [10, 50, 500])
def test_an_arm_of_an_interval_has_it(interval):
    assert paper_config(f"K{interval}").interval == interval


@pytest.mark.parametrize("arm", list(R.ARMS))
def test_a_laptop_trains_the_net_of_nature(arm):
    small = rc.resolve(R.ARMS[arm], "laptop").online
    assert guided.ppo_config(small, CPU).net == "nature"
    assert guided.ppo_config(small, "cuda").apart and not guided.ppo_config(small, CPU).apart


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(guide="rule"), "unknown guide 'rule': did you mean 'rules'?"),
        (dict(learner="pppo"), "unknown learner 'pppo': did you mean 'ppo'?"),
        (dict(net="nature2"), "unknown net 'nature2': did you mean 'nature'?"),
        (dict(encoder="hsh"), "unknown text encoder 'hsh': did you mean 'hash'?"),
    ],
    ids=["guide", "learner", "net", "encoder"],
)
def test_unknown_names(kw, says, home):
    with pytest.raises(PromptnbError) as e:
        made(at("rules", **kw))
    assert str(e.value) == says


# ---- the encoder


@dataclass
class Encoded:
    "A training, and the encoders that it made: (encoder, its weights' hash then, its keywords)."

    run: Finished
    made: list
    reinit: bool


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "reinit"])
def encoded(request, tmp_path_factory):
    "A training with a real encoder; with `reinit_encoder` the policy has another one."
    made, real = [], encoders.encoder

    def encoder(*a, **k):
        e = real(*a, **k)
        made.append((e, e.weights_hash(), k))
        return e

    r = at("constant", encoder="minilm", steps=256, rollout=128, stages=1, reinit_encoder=request.param)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(encoders, "encoder", encoder)
        return Encoded(finished(tmp_path_factory.mktemp("encoded"), r), made, request.param)


def test_the_encoder_is_not_trained(encoded):
    assert encoded.run.rec["status"] == "ok"
    assert all(e.weights_hash() == before for e, before, _ in encoded.made)


def test_no_weight_of_the_encoder_is_the_policy_s(encoded):
    assert encoded.run.rec["counts"]["total"] == PARAMETERS


def test_a_new_encoder_is_the_policy_s_alone(encoded):
    assert len(encoded.made) == len({before for _, before, _ in encoded.made}) == 1 + encoded.reinit
    assert all("reinit" in k for _, _, k in encoded.made[1:])


def test_the_policy_reads_through_its_encoder(encoded):
    (own,) = [e for e, _, k in encoded.made if bool(k.get("reinit")) == encoded.reinit]
    assert encoded.run.newest["envs"]["texts"] == ["", guided.SENTENCE]
    assert guided.SENTENCE in own.known


# ---- a budget


@pytest.fixture(scope="module")
def thrifty(tmp_path_factory):
    "A run that may make five calls."
    r = at("decision", interval=20, budget=(("calls", 5),), stages=1)
    return finished(tmp_path_factory.mktemp("thrifty"), r)


def test_a_budget_ends_the_calls_and_not_the_run(thrifty):
    rows = thrifty.last
    assert thrifty.rec["status"] == "ok"
    assert rows["calls"] <= 5 < rows["queries"]
    assert rows["failed"] == rows["queries"] - rows["calls"] - rows["cached"]


def test_without_a_budget_the_last_goals_stay(thrifty):
    assert all("budget" in e["why"] and e["sentence"] == e["before"] for e in thrifty.said[5:])


# ---- before work starts


@pytest.mark.parametrize(
    "arm, hidden, extra",
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
def test_missing_packages(arm, hidden, extra, monkeypatch):
    real = guided.importlib.util.find_spec
    monkeypatch.setattr(guided.importlib.util, "find_spec", lambda name, *a: None if name == hidden else real(name, *a))
    want = f"needs the extra '{extra}': pip install 'promptnb[{extra}]'" if extra else ""
    assert guided.out_of_reach(rc.resolve(R.ARMS[arm], "laptop")) == want


NO_KEY = (
    "asks https://api.openai.com/v1 for 'gpt-4', which needs a key in the environment variable OPENAI_API_KEY "
    "(of a server of your own: any text)"
)
of_main_arms = pytest.mark.parametrize("arm", list(R.MAIN))


def no_weights(name):
    "No model's weights can be had."
    return False


def lacks_weights(name):
    return f"needs the weights of '{name}', which are not here and cannot be fetched"


@of_main_arms
def test_a_missing_key_is_named(arm, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    want = NO_KEY if arm in ("decision", "untuned", "adapter") else ""
    assert guided.out_of_reach(rc.resolve(R.ARMS[arm], "paper")) == want


@of_main_arms
def test_missing_weights_are_named(arm, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    want = lacks_weights("meta-llama/Llama-2-7b-chat-hf") if arm in ("untuned", "adapter") else ""
    assert guided.out_of_reach(rc.resolve(R.ARMS[arm], "paper"), no_weights) == want


@of_main_arms
def test_with_key_and_weights_every_arm_is_within_reach(arm, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert not guided.out_of_reach(rc.resolve(R.ARMS[arm], "paper"))


@of_main_arms
def test_tiny_models_are_made_here(arm, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert not guided.out_of_reach(rc.resolve(R.ARMS[arm], "smoke"), no_weights)


def test_missing_weights_of_a_decision_model_are_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert guided.out_of_reach(at("decision", decision="org/model"), no_weights) == lacks_weights("org/model")


def test_step_seconds():
    n = torch.get_num_threads()
    assert 1e-4 < guided.step_seconds(at("ppo"), "cpu") < 1
    assert torch.get_num_threads() == n


# ---- keys


def refusal(key):
    return dict(error=dict(message=f"your key is {key}"))


def completion(key):
    message = dict(role="assistant", content=f"{key} sleep, chop tree, mine coal")
    choice = dict(index=0, finish_reason="stop", message=message)
    return dict(id=key, object="chat.completion", created=0, model=f"m {key}", choices=[choice])


class Echo(http.server.BaseHTTPRequestHandler):
    "A server that sends the key back: in replies, in errors (each third call), and in its own name."

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        self.server.keys.append(key)
        refused = len(self.server.keys) % 3 == 0
        data = json.dumps(refusal(key) if refused else completion(key)).encode()
        self.send_response(400 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Set-Cookie", f"k={key}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *a):
        pass


@pytest.fixture
def echo():
    "That server, at work; its `keys` are those it was sent."
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    web.keys = []
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def holding(home, text):
    "Files that hold a text."
    return [p for p in home.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.mark.parametrize("raw", [False, True], ids=["goals", "raw"])
def test_the_key_is_in_no_file(raw, echo, home, monkeypatch, capfd):
    "The server was sent the key and sent it back; it is in no file of the run, in no record, and not on the screen."
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    url = f"http://127.0.0.1:{echo.server_port}/v1"
    run = Finished(home, made(at("decision", interval=20, stages=1, url=url, decision="m", raw_replies=raw)))
    printed = capfd.readouterr()

    assert run.rec["status"] == "ok"
    assert set(echo.keys) == {f"Bearer {SECRET}"}
    assert len(echo.keys) > 10 and run.last["failed"] > 2

    assert not holding(home, SECRET)
    assert SECRET not in printed.out + printed.err
    assert len(holding(home, "chop tree")) >= 2
    assert run.rec["texts"] >= 1 if raw else run.rec["texts"] == 1


@pytest.mark.fault(26)
def test_the_notebook_has_no_key(tmp_path):
    "Through papermill, with a key in the environment."
    home = new_home(tmp_path / "home")
    p = went(cli(home, "job", "rladapter/main/crafter/online/constant", "--seed", 0, *SMOKE, OPENAI_API_KEY=SECRET))
    rec = read_json(home / "data" / "results" / "rladapter" / "smoke.crafter.constant.s0.json")
    assert rec["status"] == "ok"
    assert list(home.glob("data/runs/notebooks/*.ipynb"))
    assert not holding(home, SECRET)
    assert SECRET not in p.stdout + p.stderr
    assert len(holding(home, guided.SENTENCE)) >= 2


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

    @property
    def alive(self):
        return self.process is not None and self.process.poll() is None

    def launch(self):
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.folder / "hub"), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def healthy(self):
        health = f"http://127.0.0.1:{self.port}/health"
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=2) as r:
            return r.status == 200
        return False

    def start(self):
        self.launch()
        end = time.monotonic() + 120
        while time.monotonic() < end and self.alive:
            if self.healthy():
                return self
            time.sleep(0.25)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def kill(self):
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def served(models, shared):
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed: pip install 'promptnb[llm]'")
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed: pip install 'promptnb[llm]'")
    s = Serve(models["decision"], shared / "served").start()
    yield s
    s.kill()


@dataclass
class Advice:
    "What came of one call for advice."

    goals: list
    counts: dict
    seconds: float


class Interrupted:
    "An advisor whose server is killed before the fourth call, and started again before the eighth."

    def __init__(self, guide, served):
        self.guide, self.served, self.seen = guide, served, []
        self.state, self.load = guide.state, guide.load

    def __call__(self, scenes):
        if len(self.seen) == 3:
            self.served.kill()
        if len(self.seen) == 7:
            self.served.start()
        start = time.monotonic()
        goals = self.guide(scenes)
        self.seen.append(Advice(goals, dict(self.guide.counts), time.monotonic() - start))
        return goals


@dataclass
class Outage:
    "A training through whose middle the server was dead: calls for advice, and the exchanges of two environments."

    trainer: Trainer
    seen: list
    said: list

    @property
    def alive(self):
        return self.said[:6]

    @property
    def dead(self):
        return self.said[6:14]

    @property
    def back(self):
        return self.said[14:]


@pytest.fixture(scope="module")
def outage(served, tmp_path_factory):
    folder, patience = tmp_path_factory.mktemp("outage"), dict(retries=1, backoff=0.05, patience=2, rest=2)
    server = Server(served.url, str(served.model), timeout=20.0, deadline=30.0, **patience)
    guide = Guidance(decision=server, log=folder / "exchanges.jsonl", raw=True, max_tokens=12, K=16)
    advise = Interrupted(guide, served)
    c = PPOConfig(net="nature", envs=2, rollout=16, batch=16, epochs=1, interval=16, length=10_000, ask_on_reset=False)
    t = Trainer(c, 0, folder / "ppo", advise, encode, every=10**9).begin()
    t.go(11 * 32)
    return Outage(t, advise.seen, exchanges(guide.log))


def answered(es):
    return [bool(e["model"]) for e in es]


def sentences(es):
    return {e["sentence"] for e in es}


def test_training_goes_on_without_its_server(outage):
    assert (len(outage.seen), len(outage.said), outage.trainer.step) == (12, 24, 352)
    assert all(np.isfinite(list(losses.values())).all() for losses in outage.trainer.losses)


def test_a_living_server_answers(outage):
    assert all(answered(outage.alive))
    assert len(sentences(outage.alive)) > 1
    assert outage.seen[2].counts["failed"] == 0


def test_without_a_server_the_last_goals_stay_and_nobody_waits_long(outage):
    for advice in outage.seen[3:7]:
        assert advice.goals == outage.seen[2].goals
        assert advice.seconds < 10


def test_queries_to_a_dead_server_are_logged_as_failed(outage):
    assert not any(answered(outage.dead))
    for e in outage.dead:
        assert e["why"] and not e["decision"] and not e["ok"]
        assert e["sentence"] == e["before"] != ""


def test_a_dead_server_is_left_alone_after_some_queries(outage):
    counts = outage.seen[6].counts
    assert (counts["failed"], counts["queries"]) == (8, 14)
    assert 0 < counts["unasked"] < 8


def test_a_server_that_comes_back_is_asked_again(outage):
    first = answered(outage.back).index(True)
    assert first <= 4
    assert all(answered(outage.back[first:]))
    assert outage.seen[-1].counts["failed"] == 8 + first


def test_a_server_that_comes_back_says_new_things(outage):
    assert sentences(outage.back) - sentences(outage.alive)
    assert len(outage.trainer.envs.texts) > 4


def test_the_server_answers_as_the_model_does(served):
    "The same weights behind the URL and in this process: greedy answers are the same."
    if not served.alive:
        served.start()
    scenes = [scene(("tree", "water"), dict(health=9, food=k)) for k in (2, 7)]
    requests = [Request(decision_prompt(s, ("sleep",)), 12, 0.0) for s in scenes]
    far = Server(served.url, str(served.model), timeout=20.0).complete(requests)
    near = Local(served.model).complete(requests)
    assert all(r.ok for r in far)
    assert [r.text.strip() for r in far] == [r.text for r in near]
    assert [r.tokens_in for r in far] == [r.tokens_in for r in near]
