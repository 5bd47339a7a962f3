"Runs, recipes and exhibits of the Contextual Meta Transformer: what its jobs leave behind, and what a control changes."

import hashlib
import json
import math
import os
import re
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from context_toys import made_up, raises, recipe

from promptnb import cli, core, tasks, train
from promptnb import recipes as rc
from promptnb.core import read_json
from promptnb.experiments import multitask, plan, run
from promptnb.experiments.run import Run
from promptnb.models.context import ContextDT
from promptnb.report import exhibits
from promptnb.tuners.checks import same
from promptnb.tuners.core import make_tuner

ROOT = core.root()
VEL = "cheetah-vel"
CPU = torch.device("cpu")
T_SHORT = 12  # steps of an episode
KEYS = ("cmt", "null", "wrong", "collect", "tuned", "random", "one-hot")


# ---- runs at smoke scale


def workbook(home, monkeypatch):
    "A workbook of its own with made-up data and short episodes."
    (home / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # processes are not killed here
    monkeypatch.setattr(multitask, "stored", lambda f, q, ids, n: made_up(f, q, tuple(ids), n))
    monkeypatch.setattr(run, "provenance", lambda d="cpu": dict(device="-", threads=1, commit="-"))
    monkeypatch.setitem(tasks.FAMILIES, VEL, replace(tasks.family(VEL), horizon=T_SHORT))
    return home


def tuned(key):
    return read_json(multitask.tune(Run(recipe(key), "smoke")))


def pretraining(key):
    "The record of a recipe's pre-training."
    return read_json(Run(recipe(key), "smoke").pretraining().path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Smoke runs that share a workbook: records of tuning and of pre-training, and the policies, by key."
    with pytest.MonkeyPatch.context() as m:
        home = workbook(tmp_path_factory.mktemp("home"), m)
        records = {k: tuned(k) for k in KEYS}
        pre = {k: pretraining(k) for k in ("cmt", "one-hot")}
        policies = {k: multitask.load_policy(home / x["folder"] / "policy", recipe(k).pretrain) for k, x in pre.items()}
    return SimpleNamespace(records=records, pre=pre, policies=policies)


def of(record, metric):
    "{(task id, step): value}"
    return {(w["task_id"], w["step"]): w["value"] for w in record["rows"] if w["metric"] == metric}


@pytest.mark.parametrize("key", KEYS)
def test_record(finished, key):
    "Good, of this very recipe, with a finite return of each test task; a run on these tasks has no score."
    r = finished.records[key]
    assert (r["status"], r["why"]) == ("ok", "") and r["recipe_digest"] == rc.digest(recipe(key))
    assert {i for i, _ in of(r, "return")} == set(tasks.family(VEL).test) and not of(r, "score")
    assert all(math.isfinite(w["value"]) for w in r["rows"]) and r["floor"] is None
    assert {w["paper"] for w in r["rows"]} == {"cmt"}


@pytest.mark.parametrize("key", KEYS)
def test_counts(finished, key):
    r, policy = finished.records[key], finished.policies["one-hot" if key == "one-hot" else "cmt"]
    assert r["counts"]["total"] == sum(x.numel() for x in policy.model.parameters())
    assert r["counts"]["trainable"] == (5 * 16 if key == "tuned" else 0)
    assert {w["trainable"] for w in r["rows"]} == {r["counts"]["trainable"]}
    # five tasks, four replicas, four episodes and the null prompt's
    assert {w["env_steps"] for w in r["rows"]} == {5 * 5 * 4 * T_SHORT if key == "collect" else 0}
    assert bool(r["look"]) == (key == "cmt")


def test_a_record_keeps_all_hyper_parameters(finished):
    "Of a recipe that names only some of them."
    assert finished.records["collect"]["tuner"] == dict(episodes=4, replicas=4)
    assert {"L", "lr", "towards", "scale"} <= finished.records["tuned"]["tuner"].keys()


def test_episodes_of_collecting(finished):
    test = tasks.family(VEL).test
    assert of(finished.records["collect"], "episode_return").keys() == {(i, s) for i in test for s in range(5)}
    assert not of(finished.records["cmt"], "episode_return")


def test_steps_of_tuning(finished):
    tuned, random = finished.records["tuned"], finished.records["random"]
    assert {s for _, s in of(tuned, "demo_loss")} == {0, 2}
    assert {s for _, s in of(random, "demo_loss")} == {0}
    assert {s for _, s in of(tuned, "return")} == {2}


def test_each_acts_in_its_own_way(finished):
    returns = {k: tuple(of(r, "return").values()) for k, r in finished.records.items()}
    assert len(set(returns.values())) == len(KEYS), returns
    assert len({r["run_id"] for r in finished.records.values()}) == len(KEYS)


def test_record_of_pretraining(finished):
    "Data of the policy and of three qualities of contexts; losses to the end, returns along the way."
    r = finished.pre["cmt"]
    assert r["status"] == "ok" and len(r["data"]) == 4
    assert [s for _, s in of(r, "loss")][-1] == 20
    assert {s for i, s in of(r, "return") if i != -1} == {5, 10, 15, 20}


def test_what_is_looked_at(finished):
    "The figure's numbers: all train tasks, then the test tasks, with their goals."
    look, fam = finished.records["cmt"]["look"], tasks.family(VEL)
    ids = [int(i) for i in look["embedded"]]
    assert ids == [*fam.train, *fam.test] and look["unseen"] == 5
    assert look["goals"] == [fam.goals[i] for i in ids]
    assert np.array(look["embedding"]).shape == (40, 8, 3) and np.isfinite(look["embedding"]).all()


def test_policy_with_an_encoder(finished):
    "It has the family's reward scale, train tasks and sizes; heads where they are trained."
    policy, fam = finished.policies["cmt"], tasks.family(VEL)
    c = policy.config
    assert (c.encoder, c.tasks, c.reward_scale, c.L, c.width) == ("mean", fam.train, fam.rtg_scale, 5, 16)
    assert (c.null, c.w_state, c.w_return, c.w_nce, c.w_class) == (0.1, 0.1, 0.1, 0.1, 0.0)
    assert c.shared_embed and c.prompt and not c.discrete
    assert policy.model.classify is None and policy.model.next_state is not None
    assert policy.rtg_scale == fam.rtg_scale and policy.K == 20


def test_policy_of_the_upper_bound(finished):
    "A row for each of the 40 tasks."
    policy = finished.policies["one-hot"]
    assert policy.config.encoder == "one-hot" and policy.config.tasks == tuple(range(40))
    assert policy.model.table.shape == (40, 5, 16)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [7, 19])
def test_killed_in_pretraining(at, finished, tmp_path, monkeypatch):
    "The run that goes on ends with the weights and the rows of an unbroken one, forgotten contexts and all."
    home, whole, r = workbook(tmp_path, monkeypatch), train.step_once, recipe("cmt")

    def broken(model, opt, batch, t, *a):
        if t == at:
            raise Killed
        return whole(model, opt, batch, t, *a)

    monkeypatch.setattr(train, "step_once", broken)
    with pytest.raises(Killed):
        multitask.pretrain(Run(r, "smoke"))
    assert not (home / "data" / "results").exists()

    monkeypatch.setattr(train, "step_once", whole)
    torch.manual_seed(99)
    policy = multitask.pretrain(Run(r, "smoke"))
    assert same(policy.state_dict(), finished.policies["cmt"].state_dict())
    again, unbroken = pretraining("cmt"), finished.pre["cmt"]
    assert all(again[k] == unbroken[k] for k in ("rows", "data", "weights", "status", "recipe_digest"))

    monkeypatch.setattr(train, "step_once", broken)  # nothing is trained again
    assert same(multitask.pretrain(Run(r, "smoke")).state_dict(), policy.state_dict())


def test_diverged(tmp_path, monkeypatch):
    "A NaN in pre-training: both records say so, and the run counts as finished."
    workbook(tmp_path, monkeypatch)
    losses = ContextDT.losses

    def nan_in_pretraining(self, b):
        factor = float("nan") if b.task is not None else 1
        return {k: v * factor for k, v in losses(self, b).items()}

    monkeypatch.setattr(ContextDT, "losses", nan_in_pretraining)
    record, pre = tuned("null"), pretraining("null")
    assert (record["status"], record["why"], record["rows"]) == ("diverged", "its pre-training diverged", [])
    assert pre["status"] == "diverged" and "loss is nan at step 0" in pre["why"] and pre["weights"] == ""
    assert Run(recipe("null"), "smoke").finished


# ---- recipes

EXHIBITS = [e for e in rc.exhibits("cmt") if not e.unknown]
each_exhibit = pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)


def test_no_published_number():
    "Only the abstract is known: nothing stands beside ours."
    lines = (ROOT / "data" / "reported" / "cmt.csv").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("exhibit,method,family,value")
    assert not any(e.reported for e in rc.exhibits("cmt"))
    for text in (rc.PAPERS["cmt"], *(e.protocol for e in EXHIBITS)):
        assert "reconstruction" in text.lower() or "could not be had" in text
    assert {e.id for e in rc.exhibits("cmt")} - {e.id for e in EXHIBITS} == {"tables", "figures"}


def test_no_published_number_on_the_page():
    cells = json.loads((ROOT / "nbs" / "papers" / "cmt.ipynb").read_text())["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    shown = "".join(str(o.get("text", "")) + str(o.get("data", "")) for o in outputs)
    assert "| reported" not in shown and ": reported" not in shown


@each_exhibit
def test_families_and_labels_of_an_exhibit(e):
    assert e.recipes and set(e.families) == {rc.RECIPES[i].family for i in e.recipes}
    assert set(e.labels) <= {i for x in EXHIBITS for i in x.recipes}


@each_exhibit
@pytest.mark.parametrize("scale", rc.SCALES)
def test_recipes_of_an_exhibit(e, scale):
    "Hyper-parameters are known, qualities are collected, tasks exist."
    for r in (rc.resolve(rc.RECIPES[i], scale) for i in e.recipes):
        fam, train_ids, context = tasks.family(r.family), r.pretrain.train, r.pretrain.context
        make_tuner(r.tune.tuner, **dict(r.tune.hyper))
        assert r.paper == "cmt"
        qualities = {q for q, _ in plan.data_needs(r)}
        assert qualities <= set(fam.qualities)
        assert set(train_ids) <= set(fam.task_ids) and list(train_ids) == sorted(train_ids)
        if context:
            assert context.encoder == "none" or set(context.qualities) <= qualities
            assert (context.encoder == "none") == (not r.pretrain.prompt)


def test_every_recipe_has_one_job():
    jobs = rc.jobs("cmt").values()
    assert {j.kind for j in jobs} == {"pretrain", "tune"}
    tuning = [i for j in jobs if j.kind == "tune" for i in j.recipes]
    assert sorted(tuning) == sorted({i for e in EXHIBITS for i in e.recipes}) and len(tuning) == len(set(tuning))
    policies = [rc.RECIPES[i].pretrain for j in jobs if j.kind == "pretrain" for i in j.recipes]
    assert len(policies) == len(set(policies)) and set(policies) == {rc.RECIPES[i].pretrain for i in tuning}


# ---- what is assumed

PAPER = rc.PAPER_OF["cmt"]
FIELDS = [f"pretrain.context.{name}" for name in rc.Context.__dataclass_fields__]
FIELDS += ["pretrain.K", "pretrain.J", "pretrain.H", "pretrain.steps", "pretrain.lr", "pretrain.position"]


def assumed_of(what):
    "Our values of a field that neither paper nor code gives, in the table of differences."
    t = exhibits.differences("cmt")
    return t[(t.what == what) & (t.paper == "not said") & (t.code == "not said")].ours.tolist()


def test_the_abstract_gives_no_value():
    "numbers/cmt_known_unknown.csv: full text and code are not known."
    own = [r for r in PAPER.recipes.values() if r.pretrain.context]
    noted = [p for p in PAPER.published if any(p.covers(r) for r in own)]
    assert len(noted) > 40
    assert not [p.field for p in noted if p.paper is not None]
    assert {p.source for p in noted if p.code is not None} == {"MADT's released code"}


def test_rows_of_other_papers_stand_beside_what_those_give():
    "Prompt-DT: 8 windows a task in Table 2, 16 in its code, which ours follow."
    t = exhibits.differences("cmt")
    row = t[(t.what == "pretrain.per_task") & t.source.str.startswith("Prompt-DT")].iloc[0]
    assert (row.ours, row.paper, row.code) == ("16", "8", "16")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_main_recipe_is_listed_as_assumed(field):
    assert str(rc.value_of(rc.RECIPES[f"cmt/{VEL}/cmt"], field)) in assumed_of(field)


@pytest.mark.parametrize("change", [dict(lr=0.5), dict(context=rc.Context(L=7))], ids=["lr", "L"])
def test_another_value_at_paper_scale_shows(change, monkeypatch):
    r = rc.RECIPES[f"cmt/{VEL}/cmt"]
    monkeypatch.setitem(PAPER.recipes, r.id, replace(r, pretrain=replace(r.pretrain, **change)))
    field, value = ("pretrain.lr", "0.5") if "lr" in change else ("pretrain.context.L", "7")
    assert value in assumed_of(field)


MADT = dict(layers=2, heads=2, width=32, mlp_ratio=2, activation="gelu", tanh=True, dropout=0, lr=5e-4)
MADT |= dict(weight_decay=0.1, per_task=128, clip=0.5)


@pytest.mark.parametrize("field", MADT)
def test_the_backbone_of_several_agents_is_madts(field):
    "numbers/madt_config.csv: ReinholdM/Offline-Pre-trained-Multi-Agent-Decision-Transformer @c87a7ca."
    r = rc.resolve(rc.RECIPES["cmt/smax-3m/map-good"], "paper")
    (entry,) = [p for p in PAPER.published if p.field == f"pretrain.{field}" and p.covers(r) and p.code is not None]
    assert getattr(r.pretrain, field) == entry.code == MADT[field]


@pytest.mark.parametrize("field, madt", [("K", "1"), ("episodes", "200"), ("steps", "10 epochs")])
def test_where_the_backbone_of_several_agents_is_not_madts_is_listed(field, madt):
    t = exhibits.differences("cmt")
    assert madt in t[t.what == f"pretrain.{field}"].code.tolist()


def test_standing_differences_are_true_of_the_tuners():
    from promptnb.tuners.context import Collect, ContextVectors

    stands = {s.what: s.ours for s in PAPER.standing}
    tuned, collect, given = ContextVectors(), Collect(), rc.RECIPES[f"cmt/{VEL}/cmt"].pretrain
    assert f"rate {tuned.lr}; a random start has a deviation of {tuned.scale}" in stands["tuning of the vectors"]
    assert f"{collect.replicas} replicas" in stands["the collected context"]
    assert f"up to {collect.episodes} episodes" in stands["the collected context"]
    assert f"{given.J * (given.H - 1)} transitions" in stands["the given context"]
    assert {"data", "bodies", "several agents", "loss of pre-training"} <= stands.keys()


# ---- the one thing that a control changes


@pytest.fixture(scope="module")
def controls():
    keys = ("cmt", "null", "wrong", "collect", "tuned", "random", "shuffled", "full", "lora")
    return {k: rc.RECIPES[f"cmt/{VEL}/{k}"] for k in keys}


def test_controls_share_a_policy(controls):
    assert len({r.pretrain for r in controls.values()}) == 1


def test_controls_of_tuning(controls):
    "Random vectors take no step, at any scale; shuffled ones are tuned towards other windows' actions."
    hyper = {k: dict(controls[k].tune.hyper) for k in ("tuned", "random", "shuffled")}
    assert hyper["tuned"] == dict(hyper["random"], steps=100, begin="encoded")
    assert hyper["shuffled"] == dict(hyper["tuned"], towards="shuffled")
    for scale in rc.SCALES:
        assert dict(rc.resolve(controls["random"], scale).tune.hyper)["steps"] == 0


def test_controls_of_the_context(controls):
    "Whose context it is, at every scale."
    want = dict(cmt="test", null="none", wrong="other", collect="none", tuned="test")
    for scale in rc.SCALES:
        assert {k: rc.resolve(controls[k], scale).tune.prompt_from for k in want} == want


@pytest.mark.parametrize("exhibit, family", [("single", "hopper"), ("skirmish", "smax-3m")])
def test_one_policy_and_all_its_data_for_a_data_set(exhibit, family):
    of_family = [r for r in rc.recipes_of(rc.EXHIBITS["cmt", exhibit]) if r.family == family]
    medium = [r for r in of_family if r.pretrain.quality == "medium"]
    assert len({r.pretrain for r in medium}) == 1
    assert all(r.tune.demo_quality == r.tune.prompt_quality == "medium" and r.tune.demos == 0 for r in medium)


def test_an_ablation_changes_the_context_or_its_length():
    e = rc.EXHIBITS["cmt", "ablation"]
    ablated = {i: rc.RECIPES[i].pretrain for i in e.recipes}
    base = asdict(ablated[f"cmt/{VEL}/cmt"])
    assert len(ablated) == len(set(ablated.values())) == 11 and set(e.labels) == set(ablated)
    for p in ablated.values():
        changed = {k for k, v in asdict(p).items() if v != base[k]}
        assert changed in (set(), {"name", "context"}, {"name", "J"}), p.name


def test_the_middle_goals_are_the_only_change_of_their_policy():
    middle, base = (rc.RECIPES[f"cmt/{VEL}/{k}"].pretrain for k in ("cmt-middle-all", "cmt"))
    assert middle.train and set(middle.train).isdisjoint(tasks.family(VEL).test)
    assert replace(middle, train=(), name="cmt") == base


@pytest.mark.parametrize("word", ["ContextVectors", "Collect", "Encode", '"encode"'])
def test_its_tuners_are_named_in_three_places(word):
    "The registry, their module, and recipe rows; the model names its method."
    allowed = {"tuners/core.py", "tuners/context.py", "recipes/cmt.py", "recipes/grid.py", "models/context.py"}
    package = ROOT / "promptnb"
    for file in package.rglob("*.py"):
        if file.name != "_modidx.py" and re.search(rf"(?<![\w.]){word}(?![\w])", file.read_text()):
            assert str(file.relative_to(package)) in allowed


def test_misspelt_tuners():
    with raises("unknown tuner 'encod': did you mean 'encode'"):
        make_tuner("encod")
    with raises("hyper-parameter of tuner 'collect'.*did you mean 'replicas'"):
        make_tuner("collect", replica=1)


# ---- digests

ADDED = ("ratio", "ratio_seed", "context", "train", "activation", "mlp_ratio", "tanh", "decay_to", "times")


def test_fields_that_came_later_say_nothing_where_they_are_not_used():
    p = rc.RECIPES["prompt_tuning_dt/cheetah-dir/lora"].pretrain
    before = {k: v for k, v in asdict(p).items() if k not in ADDED}
    assert rc.digest(p) == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:10]


def test_fields_that_came_later_count_where_they_are_used():
    r = rc.RECIPES["prompt_tuning_dt/cheetah-dir/lora"]
    for changed in (
        replace(r, pretrain=replace(r.pretrain, train=(1,))),
        replace(r, pretrain=replace(r.pretrain, context=rc.Context())),
        replace(r, tune=replace(r.tune, play="all")),
        replace(r, tune=replace(r.tune, per_agent=True)),
    ):
        assert rc.digest(changed) != rc.digest(r)


# ---- without SMAX


@pytest.fixture
def command(tmp_home, monkeypatch, capsys):
    "command(*args) -> (exit status, stdout, stderr, commands that were started), where SMAX is not installed."
    for m in [m for m in sys.modules if m.startswith(("jaxmarl.", "promptnb.tasks.smax"))]:
        monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, "jaxmarl", None)
    started = []

    def start(cmd, **kw):
        started.append(cmd)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(cli.subprocess, "run", start)
    monkeypatch.setattr(cli, "expected", lambda *a, **kw: "expected: -")

    def call(*args):
        status = cli.main(["run", "cmt", *args])
        return status, *capsys.readouterr(), started

    return call


def test_skirmishes_are_left_out_with_the_line_that_installs_them(command):
    status, out, err, started = command("--dry-run", "--scale", "smoke")
    assert status == 0 and err.startswith("left out: smax-3m: ") and err.count("\n") == 1
    assert "needs the package jaxmarl, which is not installed: pip install 'promptnb[smax]'" in err
    assert "skirmish" not in out and all(e.id in out for e in EXHIBITS if e.id != "skirmish")
    assert "--dry-run" in started[-1]


def test_skirmishes_asked_for_by_name_are_refused_in_one_line(command):
    status, _, err, started = command("--exhibit", "skirmish", "--dry-run")
    assert status == 2 and not started
    assert err.startswith("promptnb: skirmish needs the package jaxmarl") and err.count("\n") == 1
    assert "pip install 'promptnb[smax]'" in err


def test_an_exhibit_that_cannot_be_made_says_why(command):
    status, _, err, _ = command("--exhibit", "tables")
    assert status == 2 and "could be had" in err
