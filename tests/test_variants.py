"A field of the recipes set from the shell: its variants run, survive a kill, stand beside the unchanged ones."

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from homes import DATA, FAMILY, PAPER, PRETRAIN, SMOKE, cli, env_for, kill_tree, new_home, one_line, went

from promptnb import cli as command
from promptnb import recipes
from promptnb.captured import finished
from promptnb.core import PromptnbError, read_record
from promptnb.experiments import job, live
from promptnb.experiments.plan import Request, plan, varied
from promptnb.recipes import variants
from promptnb.report import records, sweep
from promptnb.report.view import RunState

TABLE = ("--exhibit", "table1", "--family", FAMILY, *SMOKE)
SWEEP = ("--set", "tune.size=4,8")  # the adapters' alone: a run each


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home in which Table 1 has been run on one family, with nothing set."
    return new_home(tmp_path_factory.mktemp("variants") / "home", *DATA, "data/results", "data/runs/policies")


def made(home):
    "{what was set: record} of the variants that have been run."
    found = [json.loads(p.read_text()) for p in (home / "data" / "results" / PAPER).glob("*+*.json")]
    return {json.dumps(record["recipe"]["sets"]): record for record in found}


def killed_after_one(home):
    "Start the sweep, and kill -9 every process of it when the first of its two runs has ended."
    script = str(Path(sys.executable).with_name("promptnb"))
    words = [script, "run", PAPER, *TABLE, *SWEEP, "--cores", "1"]
    run = subprocess.Popen(words, cwd=home, env=env_for(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 300
    while not made(home):
        assert time.time() < end and run.poll() is None, "no run has ended"
        time.sleep(0.01)
    kill_tree(run)


@pytest.fixture(scope="module")
def swept(home):
    "The same home after a sweep that was killed in the middle: (home, what had been made by then)."
    killed_after_one(home)
    before = made(home)
    p = went(cli(home, "run", PAPER, *TABLE, *SWEEP, "--cores", 1))
    assert "promptnb render prompt_tuning_dt --scale smoke --exhibit table1 --set tune.size=4,8" in p.stdout
    return home, before


def test_a_sweep_survives_kill_9_and_its_records_say_what_was_set(swept):
    home, before = swept
    after = made(home)
    assert set(after) == {'[["tune.size", 4]]', '[["tune.size", 8]]'} and set(before) < set(after)
    assert all(after[sets] == record for sets, record in before.items()), "what was finished was made again"
    sizes = {dict(record["recipe"]["tune"]["hyper"])["size"]: record for record in after.values()}
    assert sorted(sizes) == [4, 8] and sizes[4]["rows"] != sizes[8]["rows"]
    assert len({record["recipe_digest"] for record in after.values()}) == 2
    assert {row["method"] for row in sizes[4]["rows"]} == {"Adaptor [size=4]"}


def rendered(home, *sets):
    "The files that `render` leaves of the table with these settings, {end of its name: text or bytes}."
    went(cli(home, "render", PAPER, "--exhibit", "table1", *SMOKE, "--partial", *sets))
    folder = home / "figures" / "yours" / PAPER / "smoke"
    return {p.name: p.read_bytes() for p in folder.glob("table1+*")}


def test_a_sweep_has_a_table_and_a_figure_of_its_own(swept):
    files = rendered(swept[0], *SWEEP)
    name = "table1+tune.size=4_8"
    assert {f"{name}.md", f"{name}.csv", f"{name}.figure.png", f"{name}.figure.csv"} <= set(files)
    rows = [line.split("|")[1].strip() for line in files[f"{name}.md"].decode().splitlines() if line.startswith("|")]
    at = rows.index("Adaptor")
    assert rows[at + 1 : at + 3] == ["Adaptor [size=4]", "Adaptor [size=8]"]
    assert files[f"{name}.figure.csv"].decode().count("Adaptor") == 3
    assert not (swept[0] / "figures" / PAPER).exists(), "a committed figure was touched"


def test_one_value_is_a_row_below_the_unchanged_one_and_a_run_of_a_sweep_counts(swept):
    home, _ = swept
    p = went(cli(home, "run", PAPER, *TABLE, "--set", "tune.size=4"))
    assert "nothing to do" in p.stdout
    text = rendered(home, "--set", "tune.size=4")["table1+tune.size=4.md"].decode()
    assert text.index("| Adaptor ") < text.index("| Adaptor [size=4] ") < text.index("| LoRA")
    assert "with tune.size=4" in text and "published" in text


def test_a_value_whose_runs_all_diverged_breaks_the_line():
    r, made = recipes.RECIPES[f"{PAPER}/cheetah-vel/soft"], dict(metric="return", step=1, n_episodes=1)
    runs = []
    for lr, states in ((1e-4, ("ok", "ok")), (1e-3, ("diverged", "diverged")), (1e-2, ("ok", "diverged"))):
        for seed, state in enumerate(states):
            record = dict(rows=[dict(made, value=100.0)])
            runs.append(RunState(f"Soft [lr={lr}]", replace(r, sets=(("tune.lr", lr),)), seed, state, "", record))
    view = SimpleNamespace(runs=runs, good=[run for run in runs if run.state == "ok"])
    t = sweep.points(view).set_index("x")
    assert list(t.index) == [1e-4, 1e-3, 1e-2] and np.isnan(t["mean"][1e-3]) and list(t.n) == [2, 0, 1]
    assert list(t.note) == ["", "2 diverged", "1 diverged"]


def test_status_knows_the_variants(swept, monkeypatch, capsys):
    home, _ = swept
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    assert command.main(["status", PAPER, *SMOKE]) == 0
    assert "variants: promptnb status prompt_tuning_dt --scale smoke --set tune.size=4" in capsys.readouterr().out
    assert command.main(["status", PAPER, *SMOKE, *SWEEP]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.split()[0].partition("+")[2].startswith("tune.size=4_8") for line in lines)


def test_variants_do_not_ship(swept, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(swept[0]))
    assert command.main(["records", "pack", PAPER, *SMOKE]) == 0
    packed = records.shipped(PAPER, "smoke")
    assert packed and not any("+" in name for name in packed)


# ---- what cannot be set is one line, before work starts


@pytest.mark.parametrize(
    "sets, says",
    [
        (["tune.sise=4"], ["no recipe of prompt_tuning_dt table1", "did you mean 'tune.size'?"]),
        (["online.url=http://127.0.0.1/v1"], ["they have pretrain and tune"]),
        (["tune.size=big"], ["tune.size is a whole number, not big"]),
        (["tune.size=0"], ["at least 1"]),
        (["tune.size=4,0"], ["at least 1"]),
        (["tune.lr=-1"], ["at least 0"]),
        (["pretrain.dropout=2"], ["at most 1"]),
        (["pretrain.prompt=yes"], ["true or false"]),
        (["pretrain.position=head"], ["unknown pretrain.position 'head'"]),
        (["pretrain.heads=3"], ["does not divide"]),
        (["tune.demo_quality=exprt"], ["did you mean 'expert'?"]),
        (["tune.distribution=gausian"], ["did you mean 'gaussian'?"]),
        (["seeds=1,2"], ["use --seeds"]),
        (["tune.size"], ["FIELD=VALUE"]),
        (["tune.size=4", "tune.size=8"], ["tune.size is set twice"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_what_cannot_be_set_is_one_line(home, no_snakemake, monkeypatch, capsys, sets, says):
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    asked = ["run", PAPER, *TABLE, *(word for text in sets for word in ("--set", text))]
    assert command.main(asked) == 2 and not no_snakemake
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in says), line


@pytest.mark.parametrize(
    "text", ["online.api_key=sk-very-secret", "online.extra={'api_key': 1}", "online.key_env=sk-very-secret"]
)
def test_a_key_is_never_set_nor_shown(home, monkeypatch, capsys, text):
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    assert command.main(["run", "rladapter", *SMOKE, "--set", text.replace("'", '"')]) == 2
    said = capsys.readouterr().err
    assert "online.key_env=NAME" in said and "sk-very-secret" not in said


def test_variants_are_of_one_paper_and_not_of_shipped_records(home, monkeypatch, capsys):
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    assert command.main(["run", "all", "--set", "tune.size=4"]) == 2
    assert "name that instead of all" in capsys.readouterr().err
    assert command.main(["render", PAPER, "--shipped", "--set", "tune.size=4"]) == 2
    assert "none are shipped" in capsys.readouterr().err


@pytest.mark.parametrize("more", ([], ["--plain"]))
def test_a_job_that_no_setting_changes_is_refused_and_not_run_as_it_always_is(tmp_home, capsys, more):
    words = [f"{PAPER}/table1/{FAMILY}/tune:adapter@0", *SMOKE, "--set", "tune.size=4", *more]
    assert command.main(["job", *words]) == 2
    said = capsys.readouterr().err
    assert f"changes nothing of {PAPER}/table1/{FAMILY}/tune:adapter: did you mean '{PAPER}/table1+tune.size=4" in said
    assert said.count("\n") == 1 and not list(tmp_home.rglob("data/results/*/*.json"))


@pytest.mark.parametrize(
    "kind, what, says",
    [
        ("pretrain", "pretrain.K=5", "changes nothing of"),
        ("pretrain", "tune.sise=4", "did you mean 'tune.size'?"),
        ("tune", "tune.sise=4", "did you mean 'tune.size'?"),
    ],
)
def test_a_policy_that_no_variant_starts_from_and_a_misspelt_field_are_refused(kind, what, says):
    with pytest.raises(PromptnbError, match=re.escape(says)):
        job.find_job(f"{PAPER}/table1/{FAMILY}/{kind}", "smoke", what)


def test_a_policy_that_variants_share_is_trained_for_them():
    assert job.find_job(PRETRAIN, "smoke", "tune.mu=0.3").id == PRETRAIN


def test_a_page_that_is_told_something_wrong_fails_in_one_line(home):
    p = cli(home, "job", PRETRAIN, *SMOKE, "-p", "sets=tune.sise")
    one_line(p, "FIELD=VALUE")


# ---- what a setting means


def test_what_is_set_stands_at_every_scale_and_in_the_digest():
    request = varied(Request(PAPER, ("table1",), "laptop", sets=("pretrain.width=32", "tune.lr=1e-3")))
    made = {r.id: r for r in request.recipes()}
    assert made and all(r.sets for r in made.values())
    for r in made.values():
        own = recipes.RECIPES[r.id.partition("+")[0]]
        for scale in recipes.SCALES:
            assert recipes.resolve(r, scale).pretrain.width == 32
            assert recipes.digest(recipes.resolve(r, scale)) != recipes.digest(recipes.resolve(own, scale))
    trained = [j for j in request.jobs() if j.kind == "pretrain"]
    assert trained and all("+" in j.exhibit for j in trained), "a changed policy is a job of its own"


@pytest.mark.parametrize("scale", ("desk", "laptop"))
def test_a_factor_of_an_arm_multiplies_what_is_set(scale):
    sets = (("offline.steps", "2000"), ("offline.text.steps", "20000"))
    arms = ("dt", "dt-long", "lamo", "early")
    own = [recipes.RECIPES[f"lamo/hopper/{arm}-medium-0.01"] for arm in arms]
    made = [recipes.resolve(variants.variant(r, sets, variants.written()), scale).offline for r in own]
    assert [x.steps for x in made] == [2000, 8000, 2000, 2000]
    whole, early = (x.text for x in made[2:])
    assert (whole.steps, early.steps) == (20_000, early.warmup + (20_000 - early.warmup) // 10)


def test_sizes_of_a_policy_stay_apart_when_its_steps_are_set():
    from promptnb.recipes.prompt_tuning_dt import SIZES

    request = varied(Request(PAPER, ("sizes",), "desk", families=("cheetah-dir",), sets=("pretrain.steps=3000",)))
    made = [recipes.resolve(r, "desk").pretrain for r in request.recipes()]
    factors = [dict(times).get("steps", 1) for times in SIZES.values()]
    assert {p.steps for p in made} == {round(3000 * factor) for factor in factors} and len(set(factors)) > 2


def test_a_rate_that_an_arm_would_let_grow_is_refused():
    with pytest.raises(PromptnbError, match="decay_to is 25 with the factor of .*a rate that stays.*at most 1"):
        varied(Request(PAPER, ("sizes",), "desk", sets=("pretrain.decay_to=0.5",)))


def test_jobs_in_other_processes_are_told_what_is_set(home, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    url = "http://127.0.0.1:8000/v1"
    monkeypatch.setenv("MY_KEY", "any")
    request = varied(Request("rladapter", ("main",), "smoke", sets=(f"online.url={url}", "online.key_env=MY_KEY")))
    commands = [rule.command for rule in plan(request)]
    assert commands and all(f"--set online.url={url} --set online.key_env=MY_KEY" in c for c in commands)
    for j in request.jobs():
        (r,) = job.job_recipes(job.find_job(j.id, "smoke"), "smoke")
        assert (r.online.url, r.online.key_env) == (url, "MY_KEY") and "/" not in r.key


# ---- watched


def watched(home, monkeypatch, name):
    "Pre-train one policy, watched by the logger `name` ('': by nobody), from the start; returns (run, its record)."
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.setenv(live.LOG, name)
    monkeypatch.setattr(live, "EVERY", 0.02)
    run = job.runs_of(job.find_job(PRETRAIN), "smoke", 3)[0]
    run.path.unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", str(live.BEGUN.get(run.id, home / "none"))], check=True)
    finished(job.attempting(run))
    return run, read_record(run.path)


def logger(folder, body):
    "A logger of somebody's: 'file:function', whose body has `run`, `row`, and `note` to write a line with."
    head = "import json, os, time\n\ndef note(x):\n    with open(os.path.dirname(__file__) + '/heard', 'a') as f:\n"
    head += "        f.write(json.dumps(x) + '\\n')\n\ndef tell(run, row):\n    "
    (folder / f"mine_{folder.name}.py").write_text(head + body + "\n")
    return f"{folder / f'mine_{folder.name}.py'}:tell"


def heard(folder):
    "What that logger wrote."
    return [json.loads(line) for line in (folder / "heard").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(home):
    "The rows of that policy's record when nobody watches."
    with pytest.MonkeyPatch.context() as m:
        return watched(home, m, "")[1]["rows"]


def test_a_function_hears_rows_as_they_are_written(home, alone, tmp_path, monkeypatch):
    path = job.runs_of(job.find_job(PRETRAIN), "smoke", 3)[0].path
    name = logger(tmp_path, f"note([run['id'], row, os.path.exists({str(path)!r})])")
    run, record = watched(home, monkeypatch, name)
    said = heard(tmp_path)
    assert {id for id, _, _ in said} == {run.id}
    steps = [row["step"] for _, row, _ in said if "returns" in row]
    assert steps == [5, 10, 15, 20] and said[0][2] is False, "the first row came when the run had ended"
    assert any(row.get("metric") == "loss" for _, row, _ in said) and record["rows"] == alone


@pytest.mark.parametrize("body", ["raise ConnectionError('nobody there')", "raise SystemExit(3)"])
def test_a_logger_that_raises_is_one_line_and_no_harm(home, alone, tmp_path, monkeypatch, capsys, body):
    _, record = watched(home, monkeypatch, logger(tmp_path, body))
    lines = [line for line in capsys.readouterr().err.splitlines() if live.LOG in line]
    assert len(lines) == 1 and "nothing more is told" in lines[0]
    assert record["status"] == "ok" and record["rows"] == alone


def test_a_logger_that_hangs_is_left_behind(home, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "WAIT", 0.2)
    start = time.time()
    _, record = watched(home, monkeypatch, logger(tmp_path, "note(1)\n    time.sleep(600)"))
    assert record["rows"] == alone and heard(tmp_path) == [1] and time.time() - start < 300


@pytest.mark.parametrize(
    "name, says",
    [
        ("tensorbord", "takes tensorboard, module:function"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("json:dump_s", "did you mean"),
        ("here/none.py:f", "there is no file"),
    ],
)
def test_a_logger_that_is_not_there_is_one_line_before_work(home, no_snakemake, monkeypatch, capsys, name, says):
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.setenv(live.LOG, name)
    assert command.main(["run", PAPER, *TABLE]) == 2 and not no_snakemake
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and live.LOG in line or "plug-in" not in line


def test_without_tensorboard_its_extra_is_named(home, monkeypatch, capsys):
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.setenv(live.LOG, "tensorboard")
    monkeypatch.setattr(live.importlib.util, "find_spec", lambda name: None)
    assert command.main(["run", PAPER, *TABLE]) == 2
    assert "pip install 'promptnb[tensorboard]'" in capsys.readouterr().err


def test_tensorboard_has_the_curves(home, alone, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, record = watched(home, monkeypatch, "tensorboard")
    events = EventAccumulator(str(home / "data" / "runs" / "tensorboard" / PAPER / run.id)).Reload()
    assert {"returns", "returns/0", "return", "loss"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("returns")] == [5, 10, 15, 20]
    last = [row["value"] for row in alone if row["metric"] == "return" and row["step"] == 20]
    assert events.Scalars("returns")[-1].value == pytest.approx(sum(last) / len(last), rel=1e-5)
    assert record["rows"] == alone


def test_an_agent_varies_by_what_it_looks_at_alone():
    "No server without a language model, no tuning without an adapter; what any reply goes through everywhere."
    known = variants.written()
    main = [recipes.RECIPES[id] for id in recipes.EXHIBITS["rladapter", "main"].recipes]
    of = {r.online.guide: variants.settable(r, known) for r in main}
    having = {name: {guide for guide, own in of.items() if f"online.{name}" in own} for name in ("url", "sft", "lr")}
    assert having == dict(url={"decision", "adapter"}, sft={"adapter"}, lr=set(of))
    assert all("online.raw_replies" in own and "online.budget" in own for guide, own in of.items() if guide != "off")


def changed_by(arm, *settings, family="hopper"):
    "Which fields are set in the variant of an arm that settings 'field=value' make; () if they make none."
    made = variants.variant(
        recipes.lamo.offline_recipe(arm, family, "medium", 0.01),
        [tuple(text.split("=")) for text in settings],
        variants.written(),
    )
    return tuple(path.removeprefix("offline.") for path, _ in made.sets) if made else ()


@pytest.mark.parametrize(
    "arm, unread, read",
    [
        ("cql", "K seqs tokens targets", "batch last lr"),
        ("bc", "K seqs tokens targets", "steps warmup"),
        ("dt", "seqs tokens", "K targets layers"),
        ("text", "seqs text.n text.block", "tokens text.steps text.vocab"),
        ("lamo", "text.n text.block", "seqs tokens lam text.lr"),
        ("chain", "text.vocab text.files text.block", "text.n text.steps"),
        ("shuffled", "text.n", "text.block text.files"),
        ("minilm", "text.steps text.layers text.length text.vocab text.n", "text.files K tokens"),
        ("gpt2", "text.lr text.part text.width", "seqs text.files"),
        ("random", "text.steps text.part text.lr text.warmup text.seqs seqs", "text.layers text.length text.vocab"),
    ],
)
def test_an_offline_recipe_varies_by_what_it_reads_alone(arm, unread, read):
    "Another value of the others would be the same numbers, for the price of a training."
    for name in unread.split():
        assert changed_by(arm, f"offline.{name}={'[1]' if name == 'targets' else 1}") == (), name
    for name in read.split():
        assert changed_by(arm, f"offline.{name}={'[1]' if name == 'targets' else 1}") == (name,), name


def test_what_is_read_depends_on_what_else_is_set():
    "An arm without a language loss reads no text while it trains, and one that is given the loss does."
    assert changed_by("text", "offline.lam=0.5", "offline.seqs=4") == ("lam", "seqs")
    assert changed_by("lamo", "offline.lam=0", "offline.seqs=4") == ("lam",)
    assert changed_by("lamo", "offline.text.kind=gpt2", "offline.text.steps=4") == ("text.kind",)


def test_a_kind_of_text_reads_what_its_corpus_is_made_of():
    from promptnb.experiments.offline import corpus_options

    made = {kind: {*corpus_options(recipes.Text(kind))} for kind in recipes.CORPORA}
    assert made == {kind: {*names} for kind, names in variants.OF_CORPUS.items()}
