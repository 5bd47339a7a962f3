"From the command line to the tables, at smoke scale: every run leaves a record, every exhibit its files."

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from homes import (
    DRAWN,
    FAMILY,
    METHODS,
    PAPER,
    PRETRAIN,
    ROOT,
    SMOKE,
    TUNE,
    cli,
    drawn_home,
    expected,
    fabricate,
    finished_home,
    new_home,
    paths,
    runs,
    went,
)

from promptnb import cli as command
from promptnb import recipes, tasks
from promptnb.core import PromptnbError, Row, read_json, results_dir, write_sealed
from promptnb.experiments import plan, run
from promptnb.experiments.notebook import notebook_parameters
from promptnb.report import lamo, prompts, stats, tables
from promptnb.report.style import LOOKS, main_name
from promptnb.report.view import View, exhibit, recipe_file, reported

DIFFUSER, LAPTOP = "prompt_diffuser", "laptop"
SAMPLE = dict(scale="smoke", task=FAMILY, seed=0)  # what every row of the finished home says


@pytest.fixture
def finished_copy(tmp_path, monkeypatch):
    "A workbook with the finished run's records, to break."
    home = new_home(tmp_path / "home", "data/results")
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    return home


def record_of(name):
    "A record of the finished home by the name of its run."
    return read_json(paths(finished_home())[f"{name}.json"])


# ---- one record per run


def test_every_run_leaves_a_record_and_no_other_is_there():
    assert len(expected(PRETRAIN)) == 3
    assert len(expected(TUNE)) == len(METHODS)
    assert set(paths(finished_home())) == {f"{name}.json" for _, name in expected()}


def test_a_record_names_its_run_and_recipe():
    for made in runs():
        rec = record_of(made.id)
        assert (rec["run_id"], rec["status"], rec["why"]) == (made.id, "ok", "")
        assert rec["recipe_digest"] == made.digest


def test_the_rows_of_a_record_are_whole_finite_and_its_own():
    for r, name in expected():
        rows = record_of(name)["rows"]
        own = dict(SAMPLE, method=r.method, run_id=name)
        assert rows, name
        for row in rows:
            assert set(row) == set(Row.__dataclass_fields__), name
            assert math.isfinite(row["value"]), name
            assert {k: row[k] for k in own} == own, name
        assert {row["task_id"] for row in rows if row["metric"] == "return"} == {0, 1}


def test_a_record_says_where_it_was_made_and_from_which_data():
    for _, name in expected():
        rec = record_of(name)
        assert {"python", "torch", "threads", "device", "commit", "mujoco"} <= set(rec["where"])
        assert rec["data"]
        assert rec["seconds"] >= 0


def test_every_job_leaves_its_notebook_run_with_its_parameters():
    folder = finished_home() / "data" / "runs" / "notebooks"
    names = [f"{run.run_id(j, 'smoke', 0)}.ipynb" for j in (PRETRAIN, TUNE)]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    for p in folder.iterdir():
        cells = [c for c in read_json(p)["cells"] if c["cell_type"] == "code"]
        injected = ["".join(c["source"]) for c in cells if "injected-parameters" in c["metadata"]["tags"]]
        assert all(c["execution_count"] for c in cells)
        assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
        assert any("smoke" in source for source in injected)


def test_nothing_is_left_behind():
    def is_left(name):
        return ".tmp" in name or ".failed" in name or name == ".holder" or name.startswith(".collect-")

    assert not [p for p in finished_home().rglob("*") if is_left(p.name)]


# ---- tables and figures


def test_a_table_has_our_numbers():
    folder, _ = drawn_home()
    t = pd.read_csv(folder / "table1.csv").set_index(["method", "family"])
    for r, name in expected(TUNE):
        values = [row["value"] for row in record_of(name)["rows"] if row["metric"] == "return"]
        assert t.loc[(r.method, FAMILY), "mean"] == pytest.approx(sum(values) / len(values), abs=1e-3)
        assert t.loc[(r.method, FAMILY), "n"] == 1


def test_families_without_runs_are_missing_in_the_table():
    folder, _ = drawn_home()
    t = pd.read_csv(folder / "table1.csv").query("family != @FAMILY")
    assert t[["mean", "n", "difference"]].isna().all(axis=None)
    assert (t.note == "1 missing").all()


def has_published_numbers(e):
    "Is this an exhibit of return or score tables with published numbers of its own?"
    if not e.reported or e.paper == "rladapter":
        return False
    return e.kind == "scores" and e.reported == e.id if e.paper == "lamo" else e.kind != "pretraining"


BESIDE = [e for p in recipes.PAPERS for e in recipes.exhibits(p) if has_published_numbers(e)]


def tidy(e):
    "The exhibit's tidy table without any record, by method and family (LaMo's: by method and dataset)."
    if e.kind != "scores":
        return tables.tidy_table(View(e, "smoke", partial=True)).set_index(["method", "family"])
    t = lamo.tidy(View(e, "paper", partial=True)).rename(columns=dict(dataset="family"))
    return t[~t.family.str.startswith("mean of")].set_index(["method", "family"])


def known_numbers(e):
    "The published rows of an exhibit, without averages over families."
    rep = reported(e.paper)
    rep = rep[(rep.exhibit == e.reported) & ~rep.family.str.startswith("average")]
    return rep.set_index(["method", "family"])


@pytest.mark.parametrize("e", BESIDE, ids=lambda e: f"{e.paper}-{e.id}")
def test_a_table_has_the_published_numbers_and_blanks(e, tmp_home):
    t, known = tidy(e), known_numbers(e)
    if e.apart:  # a choice of another's rows
        known = known[known.index.isin(t.index)]
    assert len(known)
    assert set(known.index) <= set(t.index), f"in no row: {set(known.index) - set(t.index)}"
    for i, row in t.iterrows():
        if i not in known.index:
            assert math.isnan(row.reported) and math.isnan(row.difference)
            continue
        there = known.loc[i]
        apart = isinstance(there.get("other_protocol"), str)
        beside, other = (row.elsewhere, row.reported) if apart else (row.reported, row.elsewhere)
        assert (beside, row.source) == (there.value, there.source)
        assert math.isnan(other) and not (apart and pd.notna(row.difference))
        assert row.reported_std == pytest.approx(there["std"], abs=0, nan_ok=True)


@pytest.fixture(scope="module")
def printed_table():
    "What table1.md prints: {method: cells}, its heading under 'method'; and the file's text."
    md = (drawn_home()[0] / "table1.md").read_text()
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in md.splitlines() if line.startswith("|")]
    return {c[0]: c[1:] for c in lines}, md


def test_render_prints_the_table_that_it_saves(printed_table):
    assert printed_table[1].strip() in drawn_home()[1]


def test_a_printed_table_has_ours_and_published_side_by_side(printed_table):
    rows, _ = printed_table

    def lines(method, family):
        return rows[method][rows["method"].index(family)].split("<br>")

    assert lines("PTDT-offline, expert prompt", "ant-dir")[1:] == [
        "published 427.9 ± 4.3",
        "(Prompt Diffuser Table 1, second hand)",
    ]
    assert lines("MT-BC-FT", "ant-dir")[1:] == ["published 110.0", "(Prompt-DT Fig 2, by eye)"]
    assert lines("MT-BC-FT, 100 updates", "ant-dir")[1:] == ["published 470.0", "(Prompt-DT Table 7)"]
    assert lines("LoRA (control)", FAMILY)[1:] == ["n = 1"]
    assert lines("LoRA (control)", "ant-dir") == ["1 missing"]


def test_a_printed_table_has_at_most_six_columns(printed_table):
    assert all(len(row) <= 5 for row in printed_table[0].values())


def test_a_printed_table_names_its_scale_and_explains_blanks(printed_table):
    _, md = printed_table
    assert "smoke scale" in md.lower()
    assert "Without 'published': not known." in md


def test_a_latex_table_has_a_row_per_method_and_no_bare_signs():
    tex = (drawn_home()[0] / "table1.tex").read_text()
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(METHODS)
    assert len({line.count("&") for line in body}) == 1
    assert r"927.2 $\pm$ 18.0" in tex
    assert "±" not in tex


@pytest.mark.parametrize("id", DRAWN[1:])
def test_a_figure_stands_beside_its_numbers(id):
    folder, _ = drawn_home()
    pdf = (folder / f"{id}.pdf").read_bytes()
    numbers = pd.read_csv(folder / f"{id}.csv")
    assert (folder / f"{id}.png").read_bytes()[:4] == b"\x89PNG"
    assert pdf[:4] == b"%PDF" and pdf.rstrip()[-5:] == b"%%EOF"
    assert set(numbers.family) == {FAMILY}
    assert (numbers["count"] == 1).all() and numbers["mean"].notna().all()


def test_only_the_exhibits_asked_for_are_saved():
    folder, _ = drawn_home()
    asked = {f"{id}.{kind}" for id in (*DRAWN, "prompt_change") for kind in ("md", "csv", "tex", "png", "pdf", "txt")}
    assert not {p.name for p in folder.iterdir()} - asked


def test_the_change_of_a_prompt_names_its_task_and_seed():
    folder, _ = drawn_home()
    text = (folder / "prompt_change.txt").read_text()
    assert f"PTDT-offline, expert prompt on {FAMILY}-00, seed 0, smoke scale" in text
    assert set(pd.read_csv(folder / "prompt_change.csv")) == {"entry", "step", "before", "after"}


@pytest.fixture
def laptop_view(tmp_home):
    "laptop_view(id, keep): an exhibit over made-up runs of three seeds, those of recipes for which `keep` is true."

    def view(id, keep, seeds=(0, 1, 2), paper=PAPER):
        e = exhibit(paper, id)
        kept = replace(e, recipes=tuple(r.id for r in recipes.recipes_of(e) if keep(r)))
        fabricate(tmp_home, kept, LAPTOP, seeds, value=lambda r, seed, i: 7.0 * seed**2 + i + 5 * (r.key == "ranking"))
        return View(e, LAPTOP, partial=True)

    return view


def test_a_variant_without_a_run_is_named_and_has_no_number(laptop_view):
    fig, t = prompts.bars(laptop_view("ablation_m", lambda r: r.key == "ranking"))
    assert [text.get_text() for ax in fig.axes for text in ax.texts] == ["no run"] * 3
    assert t["mean"].notna().sum() == 1


def test_a_family_without_a_run_has_no_panel_but_a_line(laptop_view):
    view = laptop_view("controls", lambda r: r.family == "ant-dir")
    fig, axes = prompts.family_axes(view, view.rows)
    assert list(axes) == ["ant-dir"] and "no run of cheetah-dir, cheetah-vel" in fig.get_supxlabel()


def test_an_interval_is_students_over_seed_means(laptop_view):
    fig, t = prompts.bars(laptop_view("ablation_m", lambda r: True))
    row = t[t.method == "PTDT-offline, expert prompt"].iloc[0]
    ends = [line.get_xdata() for line in fig.axes[0].lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(x, [row.lo, row.hi]) for x in ends)


def test_all_questions_to_an_exhibit_are_corrected_together(laptop_view):
    view = laptop_view("controls", lambda r: True)
    asked = [("PTDT-offline, expert prompt", label) for label in view.labels[2:]]
    v = prompts.answers(view, asked)
    assert len(v) == 3 * len(asked) and set(v.verdict) == {"better"}
    assert f"over {len(v)} comparisons" in prompts.told(v)
    assert "better on cheetah-dir (+5.0 ± 0.0), cheetah-vel (+5.0 ± 0.0)" in prompts.told(v)


def test_no_line_is_drawn_for_rewards_of_another_version(tmp_home):
    view = View(exhibit(PAPER, "pdt_fig2_mw"), LAPTOP, partial=True)
    said = prompts.left_out(view)
    assert not len(prompts.same_protocol(view.published[view.published.family == "ml1-reach"]))
    assert "MT-ORL on ml1-reach: 2363, Prompt-DT Fig 2, digitised; Prompt-MT-BC on ml1-reach: 4384" in said
    assert "MACAW on ml1-reach: 3459, Prompt-DT Fig 2, digitised (rewards of Meta-World v2" in said


@pytest.mark.parametrize("paper", ["prompt_tuning_dt", "prompt_diffuser"])
def test_published_returns_of_meta_world_stand_apart(paper):
    rep = reported(paper)
    assert rep[rep.family.str.startswith("ml1")].other_protocol.str.contains("rewards of Meta-World v2").all()


# ---- the papers' pages


def said_by(home, paper, scale="laptop"):
    "What a rendered notebook printed, which must hold no error."
    nb = read_json(home / "data" / "runs" / "notebooks" / f"{scale}.{paper}.ipynb")
    out = [o for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not any(o["output_type"] == "error" for o in out)
    return "".join("".join(o.get("text", "")) for o in out)


@pytest.mark.parametrize(
    "paper, published",
    [("prompt_tuning_dt", "941.5 ± 3.2"), ("prompt_diffuser", "945.3 ± 7.2")],
    ids=["prompt_tuning_dt", "prompt_diffuser"],
)
def test_a_paper_renders_without_any_result(paper, published, tmp_home):
    p = went(cli(tmp_home, "render", paper, "--partial"))
    assert published in p.stdout
    assert "3 missing" in p.stdout
    assert "n = " not in "".join(line for line in p.stdout.splitlines() if line.startswith("|"))
    assert "no runs yet" in said_by(tmp_home, paper)


DRAWABLE = [e for e in recipes.exhibits(DIFFUSER) if not e.unknown]


def made_rows(r, seed, ids):
    "What a diffuser's record has beside its returns: distances of prompts, and the cosine of its two gradients."
    known = dict(seed=seed, task=r.family, trainable=1, env_steps=0)
    distances = dict(spread=1.0, spread_demos=2.0, nearest_demo=0.5)
    rows = [dict(known, task_id=i, metric=k, step=0, value=v + seed) for i in ids for k, v in distances.items()]
    return rows + [dict(known, task_id=-1, metric="cosine", step=t, value=-0.5) for t in (10, 20)]


def made_prompts(seed, ids, m=6, P=5, S=4, A=2):
    "Its prompts: each written one is a demonstrated one moved by 0.2; the first chain ends on a demonstrated one."
    shown = np.random.default_rng(seed).normal(size=(len(ids), m, P, S + A))
    goal = np.append(shown[0, 0], np.ones((P, 1)), 1)
    look = dict(demonstrated=shown.tolist(), written=(shown + 0.2).tolist())
    look |= dict(chain=[(goal + k).tolist() for k in (2, 1, 0)], chain_error=[[0.3, 0.2, 0.1]] * len(ids))
    return dict(look=look, prompts=dict(after=dict(s=[[0.0] * S] * P, a=[[0.0] * A] * P)))


def add_prompts(path, r, seed):
    "Give a made-up record of a diffuser what only diffusers keep."
    ids, rec = tasks.family(r.family).test, read_json(path)
    rec["rows"] += made_rows(r, seed, ids)
    rec |= made_prompts(seed, ids) | dict(spent=dict(prepare_seconds=10.0 * seed, tuning_seconds=20.0))
    path.write_text(json.dumps(rec))


@pytest.fixture(scope="module")
def diffuser_page(tmp_path_factory):
    "Prompt Diffuser's page over made-up records of three seeds: ({exhibit: its numbers}, folder, what it printed)."
    home = new_home(tmp_path_factory.mktemp("diffuser") / "home")
    seeds = (0, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTNB_HOME", str(home))
        for e in DRAWABLE:
            fabricate(home, e, LAPTOP, seeds, value=lambda r, seed, i: 100.0 * seed + i + 5 * (r.key == "diffuser"))
        for id in sorted({i for e in DRAWABLE for i in e.recipes}):
            r = recipes.resolve(recipes.RECIPES[id], LAPTOP)
            if r.tune.tuner in ("diffuser", "direct"):
                for seed in seeds:
                    add_prompts(recipe_file(r, LAPTOP, seed), r, seed)
    went(cli(home, "render", DIFFUSER, "--scale", LAPTOP))
    folder = home / "figures" / "yours" / DIFFUSER / LAPTOP
    return {e.id: pd.read_csv(folder / f"{e.id}.csv") for e in DRAWABLE}, folder, said_by(home, DIFFUSER)


def test_every_exhibit_of_the_diffuser_leaves_its_file(diffuser_page):
    _, folder, said = diffuser_page
    assert all((folder / f"{e.id}.{'md' if e.kind == 'table' else 'png'}").exists() for e in DRAWABLE)
    assert "not asked for" not in said
    page = json.loads((ROOT / "nbs" / "papers" / "prompt_diffuser.ipynb").read_text())
    of_desk = [s for s in map("".join, (c["source"] for c in page["cells"])) if "desk.view(" in s]
    assert said.count("no runs yet") == sum(s.count("prompts.told(") for s in of_desk) > 0


def test_the_grid_of_qualities_has_every_cell(diffuser_page):
    t = diffuser_page[0]["table2"]
    assert len(t) == 21 and (t.n == 3).all()


def test_guidance_is_compared_with_the_diffusion_loss_alone(diffuser_page):
    numbers, _, said = diffuser_page
    by_method = numbers["fig3"].groupby("method").difference.unique().to_dict()
    same = {"DT only": [0], "sum": [0], "projection, on conflict only": [0]}
    assert by_method == {**same, "projection": [5]}
    assert set(numbers["fig3"].query("method == 'projection'").verdict) == {"better"}
    assert "projection against DM only: better on cheetah-dir (+5.0 ± 0.0), cheetah-vel (+5.0 ± 0.0)" in said
    assert "DT only against DM only: not resolved on cheetah-dir (+0.0 ± 0.0)" in said


def test_the_chain_ends_on_the_demonstration(diffuser_page):
    t = diffuser_page[0]["fig4"]
    assert t.groupby("step").distance.first().tolist() == pytest.approx([2, 1, 0], abs=1.5)
    assert (t.distance.iloc[-1], t.action_error.iloc[-1]) == (0, 0.1)


def test_the_plane_has_every_prompt(diffuser_page):
    t = diffuser_page[0]["fig5"]
    assert t.groupby(["label", "kind"]).size().tolist() == [3 * 3 * 6] * 4
    assert t[["x", "y"]].notna().all(axis=None)


def test_distances_and_cosines_are_means_over_seeds(diffuser_page):
    numbers, _, _ = diffuser_page
    by_metric = numbers["diversity"].groupby("metric")["mean"].first().to_dict()
    assert by_metric == dict(nearest_demo=1.5, spread=2.0, spread_demos=3.0)
    assert (numbers["conflict"]["mean"] == -0.5).all()


def test_the_cost_is_that_of_the_records(diffuser_page):
    t = diffuser_page[0]["cost"].query("method == 'Prompt Diffuser'")
    assert t.prepare_seconds.tolist() == [10.0] * 3


# ---- what a table refuses


def test_one_seed_decides_nothing():
    assert stats.judged([stats.compare([[2.0, 2.0]], [[1.0, 1.0]])]).verdict.tolist() == ["not tested"]


def test_two_scales_never_meet(finished_copy):
    e = exhibit(PAPER, "table1")
    fabricate(finished_copy, e, "laptop", (0, 1, 2))
    smoke, laptop = View(e, "smoke", partial=True), View(e, "laptop")
    small, large = tables.tidy_table(smoke), tables.tidy_table(laptop)
    assert set(smoke.rows.scale) == {"smoke"} and set(laptop.rows.scale) == {"laptop"}
    assert set(small.n.dropna()) == {1} and set(large.n) == {3}
    assert small[small.family != FAMILY]["mean"].isna().all()


def test_a_laptop_record_under_a_smoke_name_is_stale(finished_copy):
    e = exhibit(PAPER, "table1")
    fabricate(finished_copy, e, "laptop", (0, 1, 2))
    for (_, small), (_, large) in zip(expected(TUNE), expected(TUNE, scale="laptop")):
        shutil.copy(results_dir(PAPER) / f"{large}.json", results_dir(PAPER) / f"{small}.json")
    smoke = View(e, "smoke", partial=True)
    assert not len(smoke.rows)
    assert (tables.tidy_table(smoke).query("family == @FAMILY").note == "1 stale").all()


def altered(path, **changes):
    "Put a record back with other values, sealed like any."
    record = {k: v for k, v in read_json(path).items() if k != "hash"}
    write_sealed(path, dict(record, **changes))


@pytest.fixture
def one_stale(finished_copy):
    "The finished records, one of them of another recipe: the method whose record it is."
    r, name = expected(TUNE)[0]
    altered(results_dir(PAPER) / f"{name}.json", recipe_digest="0123456789")
    return r.method


def test_a_stale_record_is_shown_as_stale(one_stale):
    t = tables.tidy_table(View(exhibit(PAPER, "table1"), "smoke", partial=True))
    row = t.query("method == @one_stale and family == @FAMILY").iloc[0]
    assert row.note == "1 stale" and math.isnan(row["mean"])


def test_a_stale_record_is_refused_unless_partial(one_stale):
    with pytest.raises(PromptnbError, match="stale"):
        View(exhibit(PAPER, "table1"), "smoke").require()


def test_status_counts_a_stale_record(one_stale, capsys):
    "Of the runs that it needs, policies too: those of two more families are to do."
    assert command.main(["status", PAPER, *SMOKE]) == 0
    done, every = len(expected()) - 1, 3 * len(expected())
    assert f"table1         {done}/{every} runs, 1 stale" in capsys.readouterr().out


def test_a_record_of_other_code_is_stale(finished_copy):
    _, name = expected(TUNE)[0]
    altered(results_dir(PAPER) / f"{name}.json", code=dict(modules=["core"], fingerprint="0123456789"))
    states = [r.state for r in View(exhibit(PAPER, "table1"), "smoke", partial=True).runs if r.recipe.family == FAMILY]
    assert sorted(states) == ["ok"] * (len(METHODS) - 1) + ["stale"]


def test_a_stale_record_is_made_again(finished_copy):
    def left():
        request = plan.Request(PAPER, ("table1",), "smoke", families=(FAMILY,))
        return [run.id for task in plan.tasks_of(request) for run in task.left]

    name = expected(TUNE)[0][1]
    assert left() == []
    altered(results_dir(PAPER) / f"{name}.json", code="0123456789")
    assert left() == [name]


@pytest.mark.parametrize("paper", recipes.PAPERS)
def test_a_page_takes_what_render_gives_it(paper):
    "Which runs count, and whether some may lack: without these no exhibit of the paper can be rendered."
    page = ROOT / "nbs" / "papers" / f"{paper}.ipynb"
    assert notebook_parameters(page) == dict(scale="laptop", exhibits="all", partial=False, shipped=False)
    assert "Page(paper, scale, exhibits, partial, shipped)" in page.read_text()


def test_the_look_of_every_row_of_a_paper_is_listed():
    "So a figure does not depend on what was drawn before it in the process."
    for e in recipes.EXHIBITS.values():
        if e.paper == "grid":  # its table and ranks name tuners, and have looks by kind
            continue
        labels = dict.fromkeys(main_name(e.labels.get(r.id, r.method)) for r in recipes.recipes_of(e))
        assert set(labels) <= set(LOOKS), (e.id, set(labels) - set(LOOKS))
