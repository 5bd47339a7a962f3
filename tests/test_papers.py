"From the command line to the tables, at smoke scale: every run leaves a record, every exhibit its files, and nothing is shown that is not known."

import atexit
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from promptnb import cli as command
from promptnb import recipes
from promptnb.core import PromptnbError, Row, read_json, results_dir
from promptnb.experiments import job, plan, run
from promptnb.report import lamo, stats, tables, view
from promptnb.report.view import View

ROOT = Path(__file__).resolve().parent.parent
PAPER, FAMILY = "prompt_tuning_dt", "cheetah-dir"
SMOKE = ("--scale", "smoke")
PRETRAIN, TUNE = (f"{PAPER}/table1/{FAMILY}/{kind}" for kind in ("pretrain", "tune"))
RUN = ("run", PAPER, "--exhibit", "table1", "--family", FAMILY, *SMOKE)
METHODS = [r.method for r in recipes.recipes_of(recipes.EXHIBITS[PAPER, "table1"]) if r.family == FAMILY]
DRAWN = ("table1", "fig3", "pdt_fig2")
DATA = (
    "data/minari",
    "data/runs/collect",
)  # what collecting leaves: tests that need data take it from the finished home

# ---- helpers, used by test_resume and test_faults too


def new_home(home, *more):
    "A workbook in the folder `home`: what is committed and read at run time, and what `more` names in the finished one."
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", ".snakemake", ".lock", ".holder")
    for name in ("nbs", "workflow", "data/experts", "data/reported"):
        shutil.copytree(ROOT / name, home / name, ignore=ignore)
    shutil.copy(ROOT / "settings.ini", home)
    for name in more:
        shutil.copytree(finished_home() / name, home / name, ignore=ignore, dirs_exist_ok=True)
    return home


@functools.cache
def scratch():
    "Where commands put temporary files, which a killed one leaves. A short name: sockets lie there."
    tmp = tempfile.mkdtemp(prefix="pnb")
    atexit.register(shutil.rmtree, tmp, ignore_errors=True)
    return tmp


def env_for(home, **more):
    "The environment of a command on that workbook: one thread, nothing of the user's."
    env = {k: v for k, v in os.environ.items() if k not in ("MINARI_DATASETS_PATH", "IN_TEST")}
    return dict(
        env,
        PROMPTNB_HOME=str(home),
        TMPDIR=scratch(),
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        **more,
    )


def cli(home, *args, timeout=600, **env):
    "The console script, in a process of its own, to its end."
    return subprocess.run(
        [str(Path(sys.executable).with_name("promptnb")), *map(str, args)],
        cwd=home,
        env=env_for(home, **env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def went(p):
    assert p.returncode == 0, p.stdout[-500:] + p.stderr[-1500:]
    return p


def one_line(p, *says):
    "A command that refused: status 2, and one line beginning with promptnb:, the last, which has all of `says`."
    lines = p.stderr.splitlines()
    assert p.returncode == 2 and "Traceback" not in p.stderr, p.stdout[-500:] + p.stderr[-1500:]
    assert [l.startswith("promptnb:") for l in lines].count(True) == 1 and lines[-1].startswith("promptnb:"), p.stderr[
        -1500:
    ]
    assert all(s in lines[-1] for s in says), lines[-1]
    return lines[-1]


@functools.cache
def _finished():
    tmp = Path(tempfile.mkdtemp(prefix="promptnb-smoke-"))
    atexit.register(shutil.rmtree, tmp, ignore_errors=True)
    home = new_home(tmp / "home")
    p = cli(home, *RUN, "--cores", 2)
    return home, p


def finished_home():
    "One unbroken smoke run of table1 on cheetah-dir, shared by all tests: read it, copy from it, do not write to it."
    home, p = _finished()
    went(p)
    return home


@functools.cache
def drawn_home():
    "A copy of it with three exhibits rendered: (folder of the exhibits' files, what was printed)."
    home = new_home(finished_home().parent / "drawn", "data/results")
    p = went(cli(home, "render", PAPER, *SMOKE, "--partial", *(x for e in DRAWN for x in ("--exhibit", e))))
    return home / "figures" / PAPER / "smoke", p.stdout


def paths(home):
    return {p.name: p for p in (home / "data" / "results" / PAPER).glob("*.json")}


def expected(*job_ids, scale="smoke"):
    return [x for j in job_ids or (PRETRAIN, TUNE) for x in job.runs_of(job.find_job(j), scale, 0)]


def fabricate(home, e, scale, seeds, value=lambda r, seed, i: 100.0 * seed + i, status="ok", rows=True, **changed):
    "Records of an exhibit as if it had been run: return `value` on each test task."
    from promptnb import tasks

    for full in recipes.recipes_of(e):
        r = recipes.resolve(full, scale)
        for seed in seeds:
            name = run.recipe_run(r, scale, seed)
            known = dict(
                paper=e.paper,
                task=r.family,
                method=r.method,
                seed=seed,
                scale=scale,
                step=0,
                n_episodes=1,
                trainable=1,
                env_steps=0,
                run_id=name,
            )
            own = (
                [dict(known, task_id=i, metric="return", value=value(r, seed, i)) for i in tasks.family(r.family).test]
                if rows
                else []
            )
            rec = dict(
                run_id=name,
                status=status,
                why="",
                recipe_digest=recipes.digest(r),
                code=run.code_of("tune", r.family, [r.tune.tuner], bool(r.pretrain.context)),
                rows=own,
                seconds=1.0,
                where=dict(commit="-", threads=1),
                **changed,
            )
            path = home / "data" / "results" / e.paper / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rec))


@pytest.fixture
def finished_copy(tmp_path, monkeypatch):
    "A workbook with the finished run's records, to break."
    home = new_home(tmp_path / "home", "data/results")
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    return home


# ---- one record a run


def test_every_run_leaves_a_record():
    home, runs = finished_home(), expected()
    assert (
        len(expected(PRETRAIN)) == 3
        and len(expected(TUNE)) == len(METHODS)
        and set(paths(home)) == {f"{name}.json" for _, name in runs}
    )
    for r, name in runs:
        rec = read_json(paths(home)[f"{name}.json"])
        assert (rec["run_id"], rec["status"], rec["why"], rec["recipe_digest"]) == (name, "ok", "", recipes.digest(r))
        assert rec["rows"] and all(set(w) == set(Row.__dataclass_fields__) for w in rec["rows"])
        assert all(
            math.isfinite(w["value"])
            and (w["scale"], w["task"], w["seed"], w["method"], w["run_id"]) == ("smoke", FAMILY, 0, r.method, name)
            for w in rec["rows"]
        ), name
        assert {w["task_id"] for w in rec["rows"] if w["metric"] == "return"} == {0, 1}
        assert (
            {"python", "torch", "threads", "device", "commit", "mujoco"} <= set(rec["where"])
            and len(rec["data"])
            and rec["seconds"] >= 0
        )


def test_every_job_leaves_its_notebook():
    folder = finished_home() / "data" / "runs" / "notebooks"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"{run.run_id(j, 'smoke', 0)}.ipynb" for j in (PRETRAIN, TUNE)
    )
    for p in folder.iterdir():
        cells = [c for c in read_json(p)["cells"] if c["cell_type"] == "code"]
        assert all(c["execution_count"] for c in cells) and not any(
            o["output_type"] == "error" for c in cells for o in c["outputs"]
        )
        assert any("smoke" in "".join(c["source"]) for c in cells if "injected-parameters" in c["metadata"]["tags"])


def test_nothing_is_left_behind():
    home = finished_home()
    assert not [
        p
        for p in home.rglob("*")
        if ".tmp" in p.name or ".failed" in p.name or p.name == ".holder" or p.name.startswith(".collect-")
    ]


# ---- tables and figures


def test_table_has_our_numbers():
    folder, _ = drawn_home()
    t = pd.read_csv(folder / "table1.csv").set_index(["method", "family"])
    for r, name in expected(TUNE):
        rows = read_json(paths(finished_home())[f"{name}.json"])["rows"]
        value = [w["value"] for w in rows if w["metric"] == "return"]
        assert (
            t.loc[(r.method, FAMILY), "mean"] == pytest.approx(sum(value) / len(value), abs=1e-3)
            and t.loc[(r.method, FAMILY), "n"] == 1
        )
    assert t[t.index.get_level_values("family") != FAMILY][["mean", "n", "difference"]].isna().all(axis=None)
    assert (t[t.index.get_level_values("family") != FAMILY].note == "1 missing").all()


BESIDE = [
    e
    for p in recipes.PAPERS
    if p != "rladapter"
    for e in recipes.exhibits(p)
    if e.reported and (e.kind == "scores" and e.reported == e.id if p == "lamo" else e.kind != "pretraining")
]


@pytest.mark.parametrize("e", BESIDE, ids=lambda e: f"{e.paper}-{e.id}")
def test_table_has_the_published_numbers_and_blanks(e, tmp_home):
    if e.kind == "scores":
        t = lamo.tidy(e, "paper", partial=True).rename(columns=dict(cell="family"))
        t = t[~t.family.str.startswith("mean of")]
    else:
        t = tables.tidy_table(View(e, "smoke", partial=True))
    t, known = t.set_index(["method", "family"]), view.reported(e.paper)
    known = known[(known.exhibit == e.reported) & ~known.family.str.startswith("average")].set_index(
        ["method", "family"]
    )
    assert len(known) and set(known.index) <= set(t.index), "a published number stands in no row: " + str(
        set(known.index) - set(t.index)
    )
    for i, row in t.iterrows():
        if i in known.index:
            assert (row.reported, row.source) == (known.loc[i].value, known.loc[i].source) and (
                row.reported_std == known.loc[i]["std"]
                or math.isnan(row.reported_std)
                and math.isnan(known.loc[i]["std"])
            )
        else:
            assert math.isnan(row.reported) and math.isnan(row.difference)


def test_printed_table():
    folder, said = drawn_home()
    md, tex = (folder / "table1.md").read_text(), (folder / "table1.tex").read_text()
    assert md.strip() in said  # `render` prints what it saved
    rows = {
        c[0]: c[1:]
        for c in ([x.strip() for x in l.strip("|").split("|")] for l in md.splitlines() if l.startswith("|"))
    }
    head = rows["method"]

    def cell(m, f, col):
        return rows[m][head.index(f"{f}: {col}")]

    assert cell("PTDT-offline, expert prompt", "ant-dir", "reported") == "427.9 ± 4.3" and cell(
        "MT-ORL", "ant-dir", "reported"
    ) in ("118", "118.0")
    assert (
        cell("LoRA", FAMILY, "reported") == ""
        and "(n=1;" in cell("LoRA", FAMILY, "ours")
        and cell("LoRA", "ant-dir", "ours") == "1 missing"
    )
    assert "smoke scale" in md and "Blank under 'reported': not known." in md
    body = [l for l in tex.splitlines() if l.endswith(r"\\")]
    assert (
        len(body) == 1 + len(METHODS)
        and len({l.count("&") for l in body}) == 1
        and r"927.2 $\pm$ 18.0" in tex
        and "±" not in tex
    )


def test_figures_stand_beside_their_numbers():
    folder, _ = drawn_home()
    for e in DRAWN[1:]:
        assert (
            (folder / f"{e}.png").read_bytes()[:4] == b"\x89PNG"
            and (folder / f"{e}.pdf").read_bytes()[:4] == b"%PDF"
            and (folder / f"{e}.pdf").read_bytes().rstrip()[-5:] == b"%%EOF"
        )
        d = pd.read_csv(folder / f"{e}.csv")
        assert set(d.family) == {FAMILY} and (d["count"] == 1).all() and d["mean"].notna().all()
    assert (
        not {p.name for p in folder.iterdir()}
        - {f"{e}.{x}" for e in DRAWN for x in ("md", "csv", "tex", "png", "pdf")}
        - {"prompt_change.png", "prompt_change.pdf"}
    )


def said_by(home, paper, scale="laptop"):
    "What a rendered notebook printed, which must hold no error."
    nb = read_json(home / "data" / "runs" / "notebooks" / f"{scale}.{paper}.ipynb")
    out = [o for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not any(o["output_type"] == "error" for o in out)
    return "".join("".join(o.get("text", "")) for o in out)


@pytest.mark.parametrize("paper, published", [("prompt_tuning_dt", "941.5 ± 3.2"), ("prompt_diffuser", "945.3 ± 7.2")])
def test_paper_renders_without_any_result(paper, published, tmp_home):
    p = went(cli(tmp_home, "render", paper, "--partial"))
    assert (
        published in p.stdout
        and "3 missing" in p.stdout
        and "(n=" not in p.stdout
        and "no runs yet" in said_by(tmp_home, paper)
    )


def notes(r, seed, ids, m=6, P=5, S=4, A=2):
    "What a diffuser's record has beside its returns: (rows, fields). Each written prompt is a demonstrated one moved by 0.2; the chain of the first ends on a demonstrated one."
    rng = np.random.default_rng(seed)
    shown = rng.normal(size=(len(ids), m, P, S + A))
    goal = np.append(shown[0, 0], np.ones((P, 1)), 1)
    own = dict(seed=seed, task=r.family, trainable=1, env_steps=0)
    rows = [
        dict(own, task_id=i, metric=k, step=0, value=v + seed)
        for i in ids
        for k, v in (("spread", 1.0), ("spread_demos", 2.0), ("nearest_demo", 0.5))
    ]
    return rows + [dict(own, task_id=-1, metric="cosine", step=t, value=-0.5) for t in (10, 20)], dict(
        prompts=dict(after=dict(s=[[0.0] * S] * P, a=[[0.0] * A] * P)),
        spent=dict(prepare_seconds=10.0 * seed, tuning_seconds=20.0),
        look=dict(
            demonstrated=shown.tolist(),
            written=(shown + 0.2).tolist(),
            chain=[(goal + k).tolist() for k in (2, 1, 0)],
            chain_error=[[0.3, 0.2, 0.1]] * len(ids),
        ),
    )


def test_figures_of_generated_prompts(tmp_home):
    from promptnb import tasks

    paper, scale, seeds = "prompt_diffuser", "laptop", (0, 1, 2)
    es = [e for e in recipes.exhibits(paper) if not e.unknown]
    for e in es:
        fabricate(tmp_home, e, scale, seeds, value=lambda r, seed, i: 100.0 * seed + i + 5 * (r.key == "diffuser"))
    for r, seed in (
        (recipes.resolve(recipes.RECIPES[i], scale), s) for i in {i for e in es for i in e.recipes} for s in seeds
    ):
        path = view.recipe_file(r, scale, seed)
        rec = read_json(path)
        if r.tune.tuner in ("diffuser", "direct"):
            rows, fields = notes(r, seed, tasks.family(r.family).test)
            rec = dict(rec, rows=rec["rows"] + rows, **fields)
        path.write_text(json.dumps(rec))
    went(cli(tmp_home, "render", paper, "--scale", scale))
    folder = tmp_home / "figures" / paper / scale
    said = said_by(tmp_home, paper, scale)
    of = {e.id: pd.read_csv(folder / f"{e.id}.csv") for e in es}
    assert all((folder / f"{e.id}.{'md' if e.kind == 'table' else 'png'}").exists() for e in es)
    assert (
        len(of["table2"]) == 21
        and (of["table2"].n == 3).all()
        and of["fig3"].groupby("method").difference.unique().to_dict()
        == {"DT only": [0], "sum": [0], "projection, on conflict only": [0], "projection": [5]}
    )
    assert (
        set(of["fig3"].query("method == 'projection'").verdict) == {"better"}
        and "against 'DM only', better: projection; worse: none" in said
    )
    assert (
        of["fig4"].groupby("step").distance.first().tolist() == pytest.approx([2, 1, 0], abs=1.5)
        and of["fig4"].distance.iloc[-1] == 0
        and of["fig4"].action_error.iloc[-1] == 0.1
    )
    assert of["fig5"].groupby(["label", "kind"]).size().tolist() == [3 * 3 * 6] * 4 and of["fig5"][
        ["x", "y"]
    ].notna().all(axis=None)
    assert set(of["diversity"].groupby("metric")["mean"].first().items()) == {
        ("nearest_demo", 1.5),
        ("spread", 2.0),
        ("spread_demos", 3.0),
    }
    assert (of["conflict"]["mean"] == -0.5).all() and of["cost"].query(
        "method == 'Prompt Diffuser'"
    ).prepare_seconds.tolist() == [10.0] * 3
    assert "not asked for" not in said and "no runs yet" not in said


def test_one_seed_decides_nothing():
    assert stats.compare([[2.0, 2.0]], [[1.0, 1.0]])["verdict"] == "no clear difference"


# ---- what a table refuses


def test_two_scales_never_meet(finished_copy):
    e = view.exhibit(PAPER, "table1")
    fabricate(finished_copy, e, "laptop", (0, 1, 2))
    small, large = tables.tidy_table(View(e, "smoke", partial=True)), tables.tidy_table(View(e, "laptop"))
    assert set(View(e, "smoke", partial=True).rows.scale) == {"smoke"} and set(View(e, "laptop").rows.scale) == {
        "laptop"
    }
    assert set(small.n.dropna()) == {1} and set(large.n) == {3} and small[small.family != FAMILY]["mean"].isna().all()
    for (r, name), (_, other) in zip(
        expected(TUNE), expected(TUNE, scale="laptop")
    ):  # a laptop record under a smoke record's name
        (results_dir(PAPER) / f"{name}.json").write_text((results_dir(PAPER) / f"{other}.json").read_text())
    assert (
        not len(View(e, "smoke", partial=True).rows)
        and (tables.tidy_table(View(e, "smoke", partial=True)).query("family == @FAMILY").note == "1 stale").all()
    )


def test_a_stale_record_is_shown_as_stale(finished_copy, capsys):
    e = view.exhibit(PAPER, "table1")
    r, name = expected(TUNE)[0]
    path = results_dir(PAPER) / f"{name}.json"
    path.write_text(json.dumps(dict(read_json(path), recipe_digest="0123456789")))
    row = tables.tidy_table(View(e, "smoke", partial=True)).query("method == @r.method and family == @FAMILY").iloc[0]
    assert row.note == "1 stale" and math.isnan(row["mean"])
    with pytest.raises(PromptnbError, match="stale"):
        View(e, "smoke").rows
    assert (
        command.main(["status", PAPER, *SMOKE]) == 0
        and f"table1         {len(METHODS) - 1}/{len(e.recipes)} runs, 1 stale" in capsys.readouterr().out
    )


def test_a_stale_record_is_made_again(finished_copy):
    shutil.copytree(finished_home() / "data" / "runs" / "jobs", finished_copy / "data" / "runs" / "jobs")
    stamps = [job.stamp(job.find_job(j), 0, "smoke") for j in (PRETRAIN, TUNE)]

    def drop():
        return plan.drop_stale_stamps(PAPER, ["table1"], "smoke", None, [FAMILY]) or [s.exists() for s in stamps]

    assert drop() == [True, True]
    path = results_dir(PAPER) / f"{expected(TUNE)[0][1]}.json"
    path.write_text(json.dumps(dict(read_json(path), code="0123456789")))
    assert drop() == [True, False]
