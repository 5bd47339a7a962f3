"""Prompt-DT, the base of three papers, whole: Prompt-MT-BC, its appendix, and what only the paper has.

Facts: the paper's tables and figures (data/reported, each with its place) and the released code, mxu34/prompt-dt."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from homes import fabricate, made_of

from promptnb import recipes, tasks
from promptnb.core import Steps
from promptnb.experiments import plan
from promptnb.experiments.job import job_recipes
from promptnb.models.dt import DTConfig, PromptDT
from promptnb.recipes.prompt_tuning_dt import TABLE_FAMILIES
from promptnb.report import exhibits, prompts, tables
from promptnb.report.view import View, exhibit, policy_file

PAPER, LAPTOP = "prompt_tuning_dt", "laptop"
PDT = recipes.PAPER_OF[PAPER]


def recipe(family, key, scale="paper"):
    "A recipe of the paper at a scale."
    return recipes.resolve(PDT.recipes[f"{PAPER}/{family}/{key}"], scale)


def updates(r):
    "Tuning updates of a recipe."
    return dict(r.tune.hyper)["steps"]


def view_of(id, scale=LAPTOP):
    "An exhibit of the paper, runs missing or not."
    return View(exhibit(PAPER, id), scale, partial=True)


def trained(e, scale, seeds, value):
    "Records of an exhibit's pre-training, as if it had been run: `value(recipe, seed, step)` on each test task."
    for full in recipes.recipes_of(e, scale):
        r = recipes.resolve(full, scale)
        for seed in seeds:
            path = policy_file(r, scale, seed)
            known = dict(paper=e.paper, task=r.family, method=r.method, seed=seed, scale=scale, run_id=path.stem)
            known |= dict(n_episodes=2, trainable=1, env_steps=0, metric="return")
            steps = np.linspace(0, r.pretrain.steps, 4)[1:].astype(int).tolist()
            rows = [
                dict(known, task_id=i, step=step, value=value(r, seed, step))
                for i in tasks.family(r.family).test
                for step in steps
            ]
            record = dict(run_id=path.stem, status="ok", why="", recipe_digest=recipes.digest(r.pretrain), **made_of(r))
            record |= dict(rows=rows, seconds=1.0, where=dict(commit="-", threads=1))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))


def steps(n, S=3, A=2):
    "Noise in the shape of n steps (1, n, .)."
    t = torch.arange(n)[None]
    return Steps(torch.randn(1, n, S), torch.randn(1, n, A), torch.randn(1, n, 1), t, torch.ones(1, n))


def level(r, seed, step=0):
    "A made-up return that differs between recipes, seeds and steps."
    return 300.0 + 10 * len(r.key) + seed + step / 10


# ---- Prompt-MT-BC


def test_prompt_mt_bc_is_prompt_dt_without_return_to_go():
    "PromptDT.pdf section 5.2 and the released flags --no-rtg --no-r: the prompt stays, the history's returns are zero."
    for family in (*TABLE_FAMILIES, "ant-dir-ood", "ml1-reach", "ml1-pick-place"):
        base, bc = (recipe(family, key).pretrain for key in ("prompt-dt", "prompt-mt-bc"))
        assert (bc.prompt, bc.use_rtg, bc.J, bc.H) == (True, False, base.J, base.H)
        assert bc == replace(base, name="prompt-mt-bc", use_rtg=False)


def test_its_history_reads_no_return_but_its_prompt_does():
    torch.manual_seed(0)
    model = PromptDT(DTConfig(3, 2, width=8, layers=1, use_rtg=False)).eval()
    history, prompt = steps(4), steps(2)

    def acts(history, prompt):
        return model(history, model.prefix(*model.prompt_tokens(prompt)))

    same = acts(replace(history, rtg=history.rtg + 5), prompt)
    assert torch.equal(acts(history, prompt), same)
    assert not torch.allclose(acts(history, replace(prompt, rtg=prompt.rtg + 5)), same)


@pytest.mark.parametrize(
    "id, family, value",
    [
        ("pdt_fig2", "cheetah-dir", 926),
        ("pdt_fig2", "cheetah-vel", -46.2),
        ("pdt_fig2", "ant-dir", 378),
        ("pdt_fig2_mw", "ml1-reach", 4384),
        ("pdt_fig4", "ant-dir-ood", 486),
        ("pdt_dial", "dial", 0.69),
    ],
)
def test_prompt_mt_bc_stands_beside_prompt_dt(id, family, value):
    "Prompt-DT Fig 2 and Fig 4, digitised from the figures' images: +-3 % of the axis."
    pub = view_of(id).published.query("method == 'Prompt-MT-BC' and family == @family")
    assert pub.value.tolist() == [value] and "digitised" in pub.source.iloc[0]
    if family != "dial":
        assert f"{PAPER}/{family}/prompt-mt-bc" in exhibit(PAPER, id).recipes


def test_meta_world_leaves_prompt_mt_bc_to_paper_scale():
    on_laptop = {r.key for r in recipes.recipes_of(exhibit(PAPER, "pdt_fig2_mw"), LAPTOP)}
    assert "prompt-mt-bc" not in on_laptop and "prompt-dt" in on_laptop


# ---- MACAW and Dial: published only


def test_macaw_is_a_row_without_a_run(tmp_home):
    "Prompt-DT Fig 4, digitised: 264."
    e = exhibit(PAPER, "pdt_fig4")
    fabricate(tmp_home, e, LAPTOP, (0, 1, 2), level)
    t = tables.tidy_table(view_of("pdt_fig4")).set_index("method")
    assert t.loc["MACAW", ["reported", "note"]].tolist() == [264, "published only"]
    assert pd.isna(t.loc["MACAW", "mean"]) and (t.drop("MACAW").n == 3).all()


def test_macaws_end_points_are_lines_across(tmp_home):
    "Prompt-DT Fig 2, digitised: 379, -162, 222, and the oracle's 925, -114, 353."
    trained(exhibit(PAPER, "pdt_fig2"), LAPTOP, (0, 1, 2), level)
    fig, _ = prompts.pretraining(view_of("pdt_fig2"))
    found = [
        [line.get_ydata()[0] for line in ax.lines if line.get_label() in (f"{name} (published)",)]
        for ax in fig.axes
        for name in ("MACAW", "MACAW, oracle")
    ]
    assert found == [[379], [925], [-162], [-114], [222], [353]]
    for ax, values in zip(fig.axes, ((379, 925), (-162, -114), (222, 353))):
        lo, hi = ax.get_ylim()
        assert all(lo < v < hi for v in values)


def test_dial_has_published_numbers_to_two_places_and_says_why_ours_are_blank():
    "Prompt-DT Fig 2: 0.91, 0.69, 0.59, 0.6, 0.68."
    printed, t = prompts.table(view_of("pdt_dial"))
    assert t["mean"].isna().all()
    assert t.set_index("method").reported.to_dict() == {
        "Prompt-DT": 0.91,
        "Prompt-MT-BC": 0.69,
        "MT-ORL": 0.59,
        "MT-BC-FT": 0.6,
        "MACAW": 0.68,
    }
    assert "published 0.69" in printed.loc["Prompt-MT-BC", "dial"]
    assert "data were never released" in exhibits.caption(view_of("pdt_dial"), t)


# ---- the appendix's figures


def test_figures_5_and_6_have_the_five_lengths_at_paper_scale():
    "Prompt-DT Table 1: (J, H) = (1, 2), (1, 5), (1, 10), (2, 20); Figs 5 and 6 add (5, 20)."
    for id, use_rtg in (("pdt_fig5", True), ("pdt_fig6", False)):
        for family in TABLE_FAMILIES:
            rs = [r for r in recipes.recipes_of(exhibit(PAPER, id), "paper") if r.family == family]
            assert [(r.pretrain.J, r.pretrain.H) for r in rs] == [(1, 2), (1, 5), (1, 10), (2, 20), (5, 20)]
            assert {(r.pretrain.use_rtg, r.pretrain.prompt) for r in rs} == {(use_rtg, True)}


def test_a_laptop_is_spared_the_longest_prompt():
    for id, families in (("pdt_fig5", set(TABLE_FAMILIES)), ("pdt_fig6", {"ant-dir"})):
        rs = recipes.recipes_of(exhibit(PAPER, id), LAPTOP)
        assert {r.family for r in rs} == families
        assert max(r.pretrain.J * r.pretrain.H for r in rs) == 40


def test_figure_5_shares_the_policies_of_table_1():
    policies = {r.pretrain for r in recipes.recipes_of(exhibit(PAPER, "pdt_table1"), LAPTOP)}
    assert {r.pretrain for r in recipes.recipes_of(exhibit(PAPER, "pdt_fig5"), LAPTOP)} == policies


def test_figure_3_has_500_trajectories_and_two_seeds_at_paper_scale():
    "PromptDT.pdf section 5.4 and Fig 3: first, middle and last 500 trajectories; 2 seeds. A test takes three: laptop."
    rs = recipes.recipes_of(exhibit(PAPER, "pdt_fig3"))
    assert len(rs) == 9
    for r in rs:
        paper, laptop = (recipes.resolve(r, scale) for scale in ("paper", LAPTOP))
        assert (paper.pretrain.episodes, paper.seeds, laptop.seeds) == (500, (0, 1), (0, 1, 2))


def test_figure_3_stands_beside_its_nine_numbers():
    "Prompt-DT Fig 3, digitised from the image; two cells by eye."
    pub = view_of("pdt_fig3").published
    cells = {"expert": [-44, -45.5, -177], "medium": [-46, -53.5, -231], "random": [-229, -234, -233]}
    wanted = {f"{d} data, {q} prompt": v for d, vs in cells.items() for q, v in zip(("expert", "medium", "random"), vs)}
    assert pub.set_index("method").value.to_dict() == wanted
    assert pub[pub.source.str.contains("by eye")].value.tolist() == [-44, -46]


def test_figure_7_compares_batches_at_every_scale():
    "PromptDT.pdf App. C.2, Fig 7: 128 and 256, ten steps; the code has 256. By eye: about 280 on Ant-dir."
    for scale, batches in dict(paper=[128, 256], laptop=[32, 64]).items():
        rs = [recipe("ant-dir", key, scale) for key in ("mt-bc-ft-128", "mt-bc-ft")]
        assert [r.tune.demo_batch for r in rs] == batches and len({updates(r) for r in rs}) == 1
    assert updates(recipe("ant-dir", "mt-bc-ft-128")) == 10
    assert view_of("pdt_fig7").published[["method", "family", "value"]].to_numpy().tolist() == [
        ["MT-BC-FT, batch 128", "ant-dir", 280]
    ]


def test_table_7_has_100_updates_of_1280():
    "PromptDT.pdf Table 7: 930, -32, 470; at laptop scale a quarter of both."
    rs = recipes.recipes_of(exhibit(PAPER, "pdt_table7"))
    assert [(r.family, updates(r), r.tune.demo_batch) for r in rs] == [(f, 100, 1280) for f in TABLE_FAMILIES]
    assert {(updates(r), r.tune.demo_batch) for r in (recipes.resolve(r, LAPTOP) for r in rs)} == {(25, 320)}
    t = tables.tidy_table(view_of("pdt_table7"))
    assert t.reported.tolist() == [930, -32, 470]


# ---- tables of settings and tasks


def test_table_2_sets_ours_beside_the_paper_and_the_code():
    "PromptDT.pdf Table 2; mxu34/prompt-dt pdt_main.py."
    p, _ = prompts.settings(view_of("pdt_table2"))
    both = {k: v for k, v in zip(p.index, p[["paper", "released code"]].to_numpy().tolist())}
    assert both["batch size per task"] == ["8", "16"] and both["evaluation episodes per task"] == ["20", "50"]
    assert [both[k][0] for k in ("context length K", "layers", "heads", "embedding dimension")] == [
        "20",
        "3",
        "1",
        "128",
    ]
    assert (p["ours, paper scale"] == p["released code"]).all()


def test_a_changed_recipe_shows_in_table_2(monkeypatch):
    name = f"{PAPER}/ant-dir/prompt-dt"
    r = PDT.recipes[name]
    monkeypatch.setitem(PDT.recipes, name, replace(r, pretrain=replace(r.pretrain, heads=7)))
    p, _ = prompts.settings(view_of("pdt_table2"))
    assert p.loc["heads", "ours, paper scale"] == "1, 7"


def test_table_3_has_targets_and_prompt_lengths():
    "PromptDT.pdf Table 3: targets and lengths of five families; the released code's target of Cheetah-dir is 1500."
    p, _ = prompts.settings(view_of("pdt_table3"))
    assert p.loc["target return G*", "paper"].tolist() == ["1000", "0", "500", "10", "1500"]
    assert p.loc["prompt length K*", "paper"].tolist() == ["5", "5", "5", "15", "2"]
    assert p.loc["prompt length K*", "ours, paper scale"].tolist() == ["5", "5", "5", "", "2"]
    assert p.loc[("target return G*", "cheetah-dir"), ["released code", "ours, paper scale"]].tolist() == ["1500"] * 2


def test_table_4_is_macaws_and_has_no_column_of_ours():
    "PromptDT.pdf Table 4; MACAW's own release has width 100 and one step."
    p, _ = prompts.settings(view_of("pdt_table4"))
    assert list(p) == ["paper", "released code"]
    assert p.loc["MLP width"].tolist() == ["300", "100"] and p.loc["adaptation steps"].tolist() == ["10", "1"]


@pytest.mark.parametrize("id", ["pdt_table5", "pdt_table6"])
def test_our_splits_are_the_printed_ones(id):
    "PromptDT.pdf Tables 5 and 6, and the released config files; Dial is no family here."
    p, _ = prompts.splits(view_of(id))
    dial = p.index.get_level_values("family") == "dial"
    assert (p[~dial].paper == p[~dial].ours).all() and not dial.all()
    assert (p[dial].ours == "").all()


def test_another_split_shows_in_table_6(monkeypatch):
    fam = tasks.family("ant-dir-ood")
    monkeypatch.setitem(tasks.FAMILIES, fam.name, replace(fam, test=(1, 4)))
    p, _ = prompts.splits(view_of("pdt_table6"))
    assert p.loc[("ant-dir-ood", "test")].tolist() == ["1,4,41", "1,4"]


NAMED_TWICE = prompts.as_printed("pdt_table2").query("field != 'pretrain.activation'")  # the paper's word: ReLU


@pytest.mark.parametrize("row", list(NAMED_TWICE.itertuples()), ids=lambda row: row.field)
def test_a_printed_setting_is_the_published_one(row):
    "The table as printed and the values that recipes are compared with are typed twice: they must not part."
    r = PDT.recipes[f"{PAPER}/cheetah-vel/prompt-dt"]
    said = [p for p in PDT.published if p.field == row.field and p.covers(r)]
    assert said and all((p.paper, p.code) == (float(row.paper), float(row.code)) for p in said)


def test_no_field_of_prompt_mt_bc_is_unpublished():
    "Each field of its pre-training that Prompt-DT's has stands in the list of what paper and code give."
    fields = {"dt": set(), "mt-bc": set()}
    for key, found in fields.items():
        r = PDT.recipes[f"{PAPER}/cheetah-vel/prompt-{key}"]
        found |= {p.field for p in PDT.published if p.covers(r) and p.field.startswith("pretrain.")}
    assert fields["mt-bc"] == fields["dt"] | {"pretrain.use_rtg", "pretrain.prompt"}


@pytest.mark.parametrize("what", ["policies without return-to-go", "what Figure 7 counts", "MACAW", "Dial"])
def test_what_stands_apart_is_in_the_table_of_differences(what):
    "Released code: zeros in training and the constant target in evaluation (pitfall 3); ours are zeros in both."
    d = exhibits.differences(PAPER).set_index("what")
    assert d.loc[what, "ours"] and d.loc[what, "paper"] and d.loc[what, "source"]


# ---- each of them can be run, and renders


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("id", [e.id for e in recipes.exhibits(PAPER) if e.recipes])
def test_every_tuning_waits_for_its_policies(id, scale):
    "A job tunes recipes of several policies; the plan of any one exhibit trains them all."
    if not recipes.recipes_of(exhibit(PAPER, id), scale):
        pytest.skip("not at this scale")
    jobs = plan.Request(PAPER, (id,), scale).jobs()
    trained_here = {r.pretrain for job in jobs if job.kind == "pretrain" for r in job_recipes(job, scale)}
    tuned = {r.pretrain for job in jobs if job.kind == "tune" for r in job_recipes(job, scale)}
    assert tuned and tuned <= trained_here


NEW = [
    *("pdt_fig5", "pdt_fig6", "pdt_fig7", "pdt_fig8", "pdt_dial"),
    *("pdt_table2", "pdt_table3", "pdt_table4", "pdt_table5", "pdt_table6", "pdt_table7"),
]


@pytest.mark.parametrize("id", [*NEW, "pdt_fig2", "pdt_fig2_mw", "pdt_fig3", "pdt_fig4"])
def test_an_exhibit_renders_at_laptop_scale(id, tmp_home):
    e = exhibit(PAPER, id)
    (trained if e.kind == "pretraining" else lambda e, *how: fabricate(tmp_home, e, *how))(e, LAPTOP, (0, 1, 2), level)
    made, text = exhibits.drawn(View(e, LAPTOP))
    files = {p.suffix for p in (tmp_home / "figures/yours" / PAPER / LAPTOP).glob(f"{id}.*")}
    figure = e.kind in ("pretraining", "quality")
    assert files == ({".csv", ".pdf", ".png", ".txt"} if figure else {".csv", ".md", ".tex"})
    assert ("n = 3 seeds" if e.recipes else "needs no run of its own") in text.replace("Needs", "needs")
    if figure:
        assert made.get_size_inches()[0] == 5.5


@pytest.mark.parametrize("id", NEW)
def test_an_exhibit_renders_without_any_run(id, tmp_home):
    exhibits.drawn(view_of(id))
    assert not exhibit(PAPER, id).unknown


def test_a_remark_below_a_figure_and_its_legend_do_not_meet(tmp_home):
    trained(exhibit(PAPER, "pdt_fig6"), LAPTOP, (0,), level)
    fig, _ = prompts.pretraining(view_of("pdt_fig6"))
    assert fig.legends[0].get_title().get_text() == "no run of cheetah-dir, cheetah-vel"
    assert not fig.get_supxlabel()
