"Minutes on a card: what `promptnb gpu` measures, leaves out, trains and packs, and the forecast that reads it."

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from homes import FAMILY, PAPER, ROOT, env_for
from test_plain import ABSENT, SITE

from promptnb import cli as command
from promptnb.core import PromptnbError, write_json
from promptnb.experiments import gpu, pace
from promptnb.experiments.run import Run
from promptnb.train import FitConfig

WITHOUT = [*ABSENT, "gymnasium", "mujoco", "minari", "stable_baselines3", "crafter"]
NO_VERSION = f"""
import importlib.metadata as metadata
told = metadata.version
def version(name):
    if name.replace("-", "_") in {WITHOUT}:
        raise metadata.PackageNotFoundError(name)
    return told(name)
metadata.version = version
"""

# ---- on a machine that has torch and little else


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "(what was said, the file, the archive) of half a minute on a processor without what plays, plans, shows and tests."
    home = tmp_path_factory.mktemp("bare")
    (home / "sitecustomize.py").write_text(SITE.replace(str(ABSENT), str(WITHOUT)) + NO_VERSION)
    for name in ("nbs/papers", "data"):
        (home / name).mkdir(parents=True)
    (home / "nbs/papers/run.ipynb").write_text("{}")
    env = env_for(home)
    env["PYTHONPATH"] = f"{home}:{env.get('PYTHONPATH', '')}"
    words = ["gpu", "--device", "cpu", "--minutes", "0.1", "--scale", "smoke"]
    asked = [sys.executable, "-m", "promptnb", *words]
    p = subprocess.run(asked, env=env, cwd=home, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    (file,) = (home / "data/benchmarks").glob("*.json")
    return p.stdout, json.loads(file.read_text()), home / "data/benchmarks/policies.zip"


def test_where_nothing_can_be_played_the_rest_is_measured(bare):
    said, found, _ = bare
    assert found["device"] == "cpu" and found["seconds"] < 90
    assert found["parity"] and all(x["ok"] for x in found["parity"])
    first = found["steps"][0]  # of each part, that much is always done
    assert first["what"] == "Prompt-DT, 32 windows" and "peer" in first
    assert first["ratio"] == pytest.approx(first["ours_ms"] / first["peer_ms"])
    assert found["rates"] and found["probe"].keys() == {"small", "large"} and found["policy_step_ms"] > 0


def test_what_needs_episodes_is_one_line(bare):
    said, found, archive = bare
    lines = [line for line in found["left_out"] if "needs gymnasium, mujoco, minari" in line]
    assert len(lines) == 2 and "play of episodes, and policies" in lines[1] and lines[1] in said
    assert "play" not in found and "policies" not in found
    with zipfile.ZipFile(archive) as whole:
        assert [name.split("/")[1] for name in whole.namelist()] == ["benchmarks"]


def test_a_processor_is_no_card(tmp_home, bare):
    write_json(pace.folder() / "cpu.json", bare[1])
    assert pace.measured_cards() == []


# ---- parity that does not hold


def here(tmp_path, minutes=1.0):
    return gpu.Visit(torch.device("cpu"), minutes, tmp_path, small=True)


def test_parity_that_does_not_hold_is_said(tmp_path, monkeypatch, capsys):
    real, calls = gpu.loss_and_gradients, []

    def drifts(run):
        calls.append(run)
        (loss,), gradients = real(run)
        return [loss + (len(calls) == 2) * 1e-3], gradients

    kinds = gpu.kinds_of_model("smoke")
    monkeypatch.setattr(gpu, "loss_and_gradients", drifts)
    monkeypatch.setattr(gpu, "kinds_of_model", lambda scale: {k: kinds[k] for k in ("Decision Transformer", "bc")})
    monkeypatch.setattr(gpu, "kinds_of_tuner", dict)
    visit = here(tmp_path)
    visit.parity()
    assert [x["ok"] for x in visit.found["parity"]] == [False, True]
    assert "parity: 1 of 2 within 0.0001; not: model Decision Transformer" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_card_that_computes_no_number_does_not_pass(broken):
    good, bad = [torch.ones(2)], [torch.tensor([1.0, broken])]
    assert gpu.difference(good, good) == 0
    assert gpu.difference(good, bad) == gpu.difference(bad, good) == gpu.difference(bad, bad) == float("inf")


def test_a_pretraining_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    def plain_jobs(words, **options):
        trained.extend(words)
        if len(trained) == 1:
            raise PromptnbError("its data cannot be fetched")

    trained, tasks = [], [SimpleNamespace(word=word, job=SimpleNamespace(id=word)) for word in "abc"]
    monkeypatch.setattr(gpu, "kept_together", lambda tasks, beside: [[task] for task in tasks])
    monkeypatch.setattr(gpu, "collections", lambda jobs, scale: {})
    monkeypatch.setattr(gpu, "plain_jobs", plain_jobs)
    visit = here(tmp_path)
    visit.train(tasks, "smoke")
    assert trained == ["a", "b", "c"]
    assert visit.found["left_out"] == ["policy of a: PromptnbError: its data cannot be fetched"]


@pytest.mark.parametrize("tuner", ["full", "soft", "ranking"])
def test_tuners_are_compared_by_what_they_changed(tuner):
    run = gpu.kinds_of_tuner()[tuner]
    idle = replace(run.recipe, tune=replace(run.recipe.tune, tuner="none", hyper=()))
    before = gpu.tuned(Run(idle, "smoke"))
    once, again = gpu.tuned(run), gpu.tuned(run)
    assert gpu.difference(once, again) == 0
    changed = len(once) != len(before) or any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(once, before))
    assert changed


# ---- peers


@pytest.mark.parametrize("text", [False, True])
def test_lamo_and_its_peer_give_one_loss(text):
    run = gpu.lamo_run("smoke", text)
    model, sampler, _ = pace.on_noise(run)
    peer, batches = gpu.peer_of(run, model, sampler)
    own = dict(model.lm.trunk.named_parameters())
    with torch.no_grad():
        for name, weight in peer.lm.base_model.model.transformer.named_parameters():
            copied(own, name, weight)
        peer.lm.base_model.model.transformer.wpe.weight.zero_()  # LaMo does not use it
        batch = batches.batch(0)
        assert (getattr(batch, "text", None) is not None) == text
        assert peer.eval().loss(batch).item() == pytest.approx(model.eval().loss(batch).item(), rel=1e-5)


def copied(own, name, weight):
    "Write into a weight of the peer's trunk, by its name there, what ours has."
    if "lora_" in name or name == "wpe.weight":
        return
    if "c_attn" in name:
        parts = [name.replace("c_attn.base_layer", f"c_attn.{k}.base_layer") for k in ("q_proj", "k_proj", "v_proj")]
        if name.endswith("weight"):
            weight.copy_(torch.cat([own[part].T for part in parts], 1))
        else:
            weight.copy_(torch.cat([own[part] for part in parts]))
    else:
        weight.copy_(own[name])


# ---- time


def test_a_part_whose_time_is_over_leaves_the_rest_out(tmp_path, capsys):
    visit = here(tmp_path, minutes=1e-9)
    assert visit.each("parity", {str(i): lambda: 1 for i in range(8)}) == {"0": 1}
    assert visit.found["left_out"] == ["parity of 1, 2, 3, 4, 5 and 2 more: no time was left"]


@pytest.mark.parametrize(
    "words, says",
    [
        (("--minutes", "0"), "--minutes is 0, but must be above 0"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--device", "cpu", "--scale", "papre"), "did you mean 'paper'?"),
    ],
)
def test_wrong_words_are_one_line(words, says, tmp_home, capsys):
    assert command.main(["gpu", *words]) == 2
    assert says in capsys.readouterr().err and not (tmp_home / "data/benchmarks").exists()


# ---- policies


def test_what_is_missing_is_trained_packed_and_found_by_the_next(tmp_home, monkeypatch, capsys):
    own = f"{PAPER}/pdt_fig2/{FAMILY}/pretrain"

    def few(scale):
        return [task for task in missing(scale) if task.job.id == own and task.seed == 0]

    missing = gpu.missing_policies
    monkeypatch.setattr(gpu, "missing_policies", few)
    monkeypatch.setattr(gpu, "PARTS", ())
    file = gpu.visit(2.0, "cpu", "smoke", tmp_home / "out")
    (name,) = json.loads(file.read_text())["policies"]
    with zipfile.ZipFile(tmp_home / "out/policies.zip") as whole:
        names = set(whole.namelist())
    assert {f"data/policies/{name}", f"data/benchmarks/{file.name}"} < names and len(names) == 3
    assert few("smoke") == []


# ---- the forecast


@pytest.fixture
def card(tmp_home, monkeypatch):
    "card(name): a file of a measured card, and a card of that name here; none here without a name."
    monkeypatch.setattr(pace, "card_at_hand", lambda: "NVIDIA H100")
    monkeypatch.setattr("promptnb.experiments.forecast.card_at_hand", lambda: "NVIDIA H100")
    monkeypatch.setattr("promptnb.experiments.forecast.cards", lambda: ["0"])
    rates = [
        dict(kind=kind, of=of, name=name, seconds=seconds)
        for kind, of, name, seconds in (
            ("pretrain", FAMILY, f"pretrain.{FAMILY}.prompt-dt", 0.002),
            ("tune", "ranking", f"{FAMILY}.ranking", 0.1),
        )
    ]
    known = dict(date="2026-11-28", device="cuda", rates=rates, play={FAMILY: 0.01}, probe=dict(small=1.0, large=1.0))

    def write(measured):
        write_json(pace.folder() / "a.json", dict(known, card=measured))

    return write


TABLE = ["run", PAPER, "--exhibit", "table1", "--family", FAMILY, "--scale", "paper", "--dry-run"]


def test_a_dry_run_on_a_card_shows_the_sum(card, no_snakemake, capsys):
    card("NVIDIA H100")
    assert command.main(TABLE) in (None, 0)
    said = capsys.readouterr().out
    assert "on 1 GPU" in said and "rates measured on NVIDIA H100, 2026-11-28" in said and "scaled" not in said
    # 50,000 updates of 2 ms, 50 evaluations of 200 steps of 10 ms
    assert f"9 policies of {FAMILY}: {(100 + 100) / 60:.2f} min each, 30.0 min" in said
    assert "together: 9 policies, 30.0 min; " in said


def test_another_card_is_timed_and_scales_the_rest(card, monkeypatch):
    card("NVIDIA A100")
    monkeypatch.setattr(pace, "probe", lambda device: dict(small=2.0, large=4.0))
    here = pace.this_card()
    assert here.rate(pace.standard(FAMILY))[0] == pytest.approx(0.004)
    assert here.source.endswith("NVIDIA A100, 2026-11-28, scaled to the card here")
    assert pace.this_card(measure=False).factor == dict(small=1.0, large=1.0)


def test_a_processors_records_say_nothing_of_a_card(card, tmp_home):
    from promptnb.experiments import forecast

    card("NVIDIA H100")
    run = pace.standard(FAMILY)
    where = dict(device="a processor", threads=1)
    write_json(run.path, dict(run_id=run.id, status="ok", why="", recipe_digest="-", rows=[], seconds=9e9, where=where))
    assert forecast.run_seconds(run, forecast.Rates("auto", "none"))[0] == pytest.approx(200)
    assert forecast.run_seconds(run, forecast.Rates("cpu", "none"))[0] == 9e9


def test_the_prototypes_rates_are_of_recipes_that_there_are():
    known = json.loads((ROOT / "data/benchmarks/prototype.json").read_text())
    names = {pace.name_of(run) for run in every_run()}
    wrong = [x["name"] for x in known["rates"] if x["kind"] != "offline" and x["name"] not in names]
    assert not wrong and known["prototype"]


def every_run():
    "The runs of the first paper's Table 1 at paper scale."
    from promptnb.experiments.plan import Request, tasks_of

    tasks = tasks_of(Request(PAPER, ("table1",), "paper", seeds=(0,)), done=lambda run: False)
    return [run for task in tasks for run in task.runs]


def test_seeds_side_by_side_are_timed_without_their_starts(monkeypatch):
    "Three trainings take 10 s to start and 2 s an update each: an update of one takes 2 s."
    clock = SimpleNamespace(now=0.0)

    def fitting(model, sampler, config):
        clock.now += 10 + 2 * config.steps
        yield

    monkeypatch.setattr("promptnb.train.fitting", fitting)
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    fits = [(None, None, FitConfig())] * 3
    assert pace.beside(fits, 0.1, torch.device("cpu")) == pytest.approx(2.0)
