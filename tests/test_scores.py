"Tables, ladders, verdicts and figures of policies trained on one data set, against numbers worked out by hand."

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.pyplot import close

from promptnb import recipes as rc
from promptnb.core import PromptnbError, code_fingerprint, results_dir
from promptnb.report import exhibits, lamo, records, style, view
from promptnb.report.style import LOOKS
from promptnb.report.view import View
from promptnb.tasks import facts

LABELS = list(lamo.LADDER)
EXHIBITS = [e for e in rc.exhibits("lamo") if not e.unknown]


def exhibit(id):
    "An exhibit of LaMo."
    return view.exhibit("lamo", id)


def partial(id, scale="laptop", seeds=None):
    "It, with whatever runs there are."
    return View(exhibit(id), scale, seeds, partial=True)


# ---- made-up records


def made_rows(r, seed, scale, v, lm_loss, run_id):
    "Rows of a run whose score is v: along training, at its end, by target, and the language loss."
    steps = r.offline.steps
    known = dict(paper="lamo", task=r.family, method=r.method, seed=seed, scale=scale, run_id=run_id)
    end = dict(score=v, score_best=v + 5, score_top3=v + 2, score_worst_target=v - 4, own_score=v / 2)
    end |= {f"score@{t:g}": v - i for i, t in enumerate(r.offline.targets)}
    found = [(k * steps // 2, "score_along", v + k) for k in (1, 2)]
    found += [(steps, metric, value) for metric, value in end.items()]
    if r.offline.text:
        found += [(k * steps // 2, "lm_loss", lm_loss(r, k)) for k in range(3)]
    return [dict(known, step=step, metric=metric, value=float(value)) for step, metric, value in found]


def made_text(text):
    "What pre-training on text leaves in a record."
    chain = text.kind in ("chain", "iid")
    entropy = dict(stationary=4.565) if chain else None
    losses = dict(held=4.59, uniform=4.605 if chain else 7.6, losses=[[1, 7.0], [9, 5.0]])
    return dict(kind=text.kind, steps=9, entropy=entropy, **losses)


def fabricate(
    id, value, seeds=(0, 1, 2), keep=lambda r, seed: True, status="ok", lm_loss=lambda r, k: 4 + k, scale="laptop"
):
    "Write the records of an exhibit at a scale as if it had been run: score `value(recipe, seed)`."
    for r in (rc.resolve(r, scale) for r in rc.recipes_of(exhibit(id), scale)):
        for seed in (s for s in seeds if keep(r, s)):
            path = view.recipe_file(r, scale, seed)
            rows = made_rows(r, seed, scale, value(r, seed), lm_loss, path.stem)
            record = dict(
                run_id=path.stem,
                status=status,
                why="",
                recipe_digest=rc.digest(r),
                code=dict(modules=["core"], fingerprint=code_fingerprint("core")),
                facts=facts(r.family),
                rows=rows if status == "ok" else [],
                counts=dict(total=1000, trainable=100, lora=10),
                references=dict(d4rl=(0, 100), own=(1, 50)),
                seconds=1.0,
                where=dict(threads=1),
                lm=r.offline.text and made_text(r.offline.text),
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))


def line(t, dataset, method):
    "The row of a table."
    return t[(t.dataset == dataset) & (t.method == method)].iloc[0]


def test_references_come_from_shipped_records_too(tmp_home):
    fabricate("arms", lambda r, seed: 1.0, seeds=(0,))
    records.pack("lamo", "laptop")
    shutil.rmtree(results_dir("lamo"))
    assert lamo.found_references("lamo", "laptop", "yours") == {}
    for whose in ("any", "shipped"):
        found = lamo.found_references("lamo", "laptop", whose)
        assert found["hopper"] == dict(d4rl=[0, 100], own=[1, 50])


def test_a_study_of_yours_is_read_as_the_page_that_draws_it_says():
    "The kind `grid` is known to two pages."
    for e in (exhibit("fig9"), rc.EXHIBITS["prompt_diffuser", "table2"]):
        own = replace(e, paper="my_study")
        page = exhibits.page_of(own)
        for what in ("READ", "BAND"):
            assert exhibits.of_kind(own, what) == getattr(page, what).get(e.kind, exhibits.of_kind(e, what))
    assert exhibits.of_kind(replace(exhibit("fig9"), paper="my_study"), "BAND")


# ---- tables


@pytest.fixture
def table15(tmp_home):
    "Table 15 of made-up scores whose seeds differ by 0, 1 and 5."
    base = {"LaMo": 30, "DT": 20}
    fabricate("table15", lambda r, seed: base.get(r.method, 25) + (0, 1, 5)[seed] + 10 * (r.offline.ratio == 1))
    return lamo.tidy(View(exhibit("table15"), "laptop"))


def test_our_numbers_of_a_table(table15):
    r = line(table15, "reacher2d medium 10%", "LaMo")
    ours = ["mean", "n", "iqm", "best", "worst", "own", "trainable", "total"]
    assert r[ours].tolist() == pytest.approx([32, 3, 32, 37, 28, 16, 100, 1000])
    assert r["std"] == pytest.approx(np.std([30, 31, 35], ddof=1))
    half = 4.3027 * r["std"] / 3**0.5  # Student's quantile of two degrees of freedom
    assert (r.lo, r.hi) == pytest.approx((32 - half, 32 + half), abs=1e-3) and r.note == ""


def test_published_numbers_stand_apart(table15):
    r = line(table15, "reacher2d medium 10%", "LaMo")
    assert r[["elsewhere", "reported_std"]].tolist() == pytest.approx([12.4, 3.8])
    assert np.isnan(r.difference) and "Table 15" in r.source and "our own policies" in r.other_protocol


def test_a_mean_is_over_one_kind_of_data(table15):
    m = line(table15, "mean of 2 datasets, little data", "DT")
    assert m["mean"] == pytest.approx(22) and m.elsewhere == pytest.approx((2.3 + 6.4) / 2)
    assert m["std"] == pytest.approx(np.std([0, 1, 5], ddof=1))
    assert m.source == "over reacher2d medium 10%, 30%"
    assert table15.dataset.str.startswith("mean").sum() == 3  # one for each method


def test_a_printed_table(table15):
    p = lamo.printed(table15)
    ours = ["32.0 ± 2.6", "3", "[25.4, 38.6]", "12.4 ± 3.8"]
    assert p.loc[("reacher2d medium 10%", "LaMo")].tolist() == ours
    assert p.columns[-1] == "published, other protocol"


@pytest.mark.parametrize("e", [e for e in EXHIBITS if e.kind == "scores"], ids=lambda e: e.id)
def test_a_printed_table_has_at_most_six_columns(tmp_home, e):
    fabricate(e.id, lambda r, seed: 20.0 + seed)
    p = lamo.printed(lamo.tidy(partial(e.id)))
    assert p.index.nlevels + p.shape[1] <= 6


@pytest.fixture
def incomplete(tmp_home):
    "'switches', with three seeds of one arm, two of another and one of a third."
    n = {"LaMo": 3, "LaMo, lambda = 1": 2}
    fabricate("switches", lambda r, seed: 10.0 + seed, keep=lambda r, seed: seed < n.get(r.method, 1))


def test_missing_seeds_are_an_error(incomplete):
    with pytest.raises(PromptnbError, match="lacks 3 of 9 runs.*promptnb run lamo --exhibit switches"):
        lamo.tidy(View(exhibit("switches"), "laptop"))


def test_missing_seeds_are_shown(incomplete):
    t = lamo.tidy(partial("switches"))
    p = lamo.printed(t).loc["hopper medium 1%"]
    ours, intervals = p["ours"].tolist(), p["95 % interval"].tolist()
    assert t.note.tolist() == ["", "2 missing", "1 missing"] and t.n.tolist() == [3, 1, 2]
    assert ours == ["11.0 ± 1.0", "10.0 (2 missing)", "10.5 ± 0.7 (1 missing)"]
    assert intervals[1] == "" and p.n.tolist() == ["3", "1", "2"]


def test_failed_runs_are_shown(tmp_home):
    fabricate("switches", lambda r, seed: 10.0, status="diverged")
    t = lamo.tidy(partial("switches"))
    assert (t.note == "3 diverged").all() and t["mean"].isna().all()
    assert "3 diverged" in lamo.printed(t).to_string()


def test_means_are_over_what_all_methods_have():
    has = dict(a=[1, 2, 3, 4], b=[1, 2, 3], c=[4], d=[])  # c and d have less than half
    assert lamo.shared(has, [1, 2, 3, 4]) == (["a", "b"], [1, 2, 3])


def test_methods_without_a_common_data_set_have_no_mean():
    assert lamo.shared({}, [1]) == ([], [])
    assert lamo.shared(dict(a=[1], b=[2]), [1, 2])[1] == []


@pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)
def test_what_a_scale_leaves_out_is_named(e):
    said = lamo.parts_left_out(e, "laptop")
    assert bool(said) == (len(rc.recipes_of(e, "laptop")) < len(e.recipes))
    gone = set(lamo.datasets_of(e)) - set(lamo.datasets_of(e, "laptop"))
    assert all(dataset.split()[0] in said for dataset in gone)


def test_paper_scale_leaves_nothing_out():
    assert not any(lamo.parts_left_out(e, "paper") for e in EXHIBITS)


def test_a_caption_names_different_numbers_of_updates():
    said = lamo.left_out(View(exhibit("table1"), "laptop"))
    assert "Updates differ: 420 (LaMo; DT; Wiki-RL), 1,050 (CQL), 2,100 (IQL; TD3+BC; BC)." in said
    assert "Updates" not in lamo.left_out(View(exhibit("arms"), "laptop"))


def test_a_caption_names_the_arms_left_out():
    text = exhibits.caption(View(exhibit("table3"), "laptop"))
    assert "Wiki-RL (hopper medium 10%; walker2d medium 10%)" in text


def test_best_three_for_table_13(tmp_home):
    fabricate("table13", lambda r, seed: 10.0)
    assert (lamo.tidy(View(exhibit("table13"), "laptop"))["mean"].dropna() == 12).all()


def test_exhibits_of_ours_borrow_published_values():
    rep, arms = view.reported("lamo"), exhibit("arms")
    assert lamo.published(rep, arms, "LaMo", "reacher2d medium 10%").exhibit.tolist() == ["table1"]
    assert lamo.published(rep, arms, "LaMo without pre-training", "hopper medium 1%").exhibit.tolist() == ["table16"]


def test_exhibits_of_the_paper_borrow_none():
    assert lamo.published(view.reported("lamo"), exhibit("table13"), "LaMo", "kitchen partial 10%").empty


# ---- the ladder

RISE = dict(zip(LABELS, (10, 14, 16, 15, 19, 20, 26)))


@pytest.fixture
def ladder(tmp_home):
    "The ladder of arms that rise by known amounts."
    fabricate("share", lambda r, seed: RISE[r.method] + seed * (1 + RISE[r.method] / 100) + (r.family == "walker2d"))
    return lamo.gains(View(exhibit("share"), "laptop"))


def steps_of(ladder):
    "The steps and the whole gain of each ladder."
    ladders = ladder[ladder.start.notna()].groupby("dataset")
    return [(g[g.step != lamo.WHOLE], g[g.step == lamo.WHOLE].iloc[0]) for _, g in ladders]


def test_every_data_set_has_a_ladder(ladder):
    datasets = lamo.datasets_of(exhibit("share"), "laptop")
    assert list(ladder.dataset.unique()) == ["3 datasets, little data", lamo.LADDER_MEAN, *datasets]


def test_shares_sum_to_the_whole(ladder):
    for steps, whole in steps_of(ladder):
        assert steps.share.sum() == pytest.approx(100) == whole.share
        assert steps.difference.sum() == pytest.approx(whole.difference)
        assert steps.share.tolist() == pytest.approx([25, 12.5, -6.25, 25, 6.25, 37.5], abs=0.1)


def test_a_rung_begins_where_the_one_before_ends(ladder):
    for steps, _ in steps_of(ladder):
        assert (steps.start.iloc[1:].to_numpy() == steps.end.iloc[:-1]).all()


def test_shares_in_words(ladder):
    assert "random frozen trunk: better, +4.0" in lamo.say_share(ladder)
    assert "n = 3 (25 % of the whole)" in lamo.say_share(ladder)


def test_the_whole_gain_is_over_all_data_sets_that_lamo_and_dt_have(tmp_home):
    gain = {"hopper": -4, "walker2d": 6, "reacher2d": 6}
    fabricate("arms", lambda r, seed: 20 + seed / 9 * (r.method == "DT") + gain[r.family] * (r.method == "LaMo"))
    fabricate("share", lambda r, seed: 20 + seed / 9 * (r.method == "DT") + gain[r.family] * (r.method == "LaMo"))
    first = lamo.gains(View(exhibit("share"), "laptop")).iloc[0]
    assert first.dataset == "5 datasets, little data" and "hopper medium 1%, 10%" in first.over
    assert first.difference == pytest.approx((3 * 6 - 2 * 4) / 5 - 1 / 9)


UNCLEAR = {"around 0": lambda seed: 10 + (seed - 1) * 3, "LaMo below DT": lambda seed: 5 + seed}


@pytest.mark.parametrize("end", UNCLEAR)
def test_no_share_of_an_unclear_gain(tmp_home, end):
    fabricate("share", lambda r, seed: UNCLEAR[end](seed) if r.method == "LaMo" else 10)
    t = lamo.gains(View(exhibit("share"), "laptop"))
    assert t.share.isna().all() and "of the whole" not in lamo.say_share(t)


def test_no_share_of_an_unresolved_step(tmp_home):
    def value(r, seed):
        noise = (seed - 1) * 9 * (r.method == "LaMo on the Markov chain")
        return RISE[r.method] + noise + seed * (r.method == "LaMo") / 99

    fabricate("share", value)
    t = lamo.gains(View(exhibit("share"), "laptop")).query("dataset == 'walker2d medium 1%'").set_index("step")
    assert t.share.notna().to_dict() == {step: "chain" not in step for step in t.index}


def test_a_data_set_without_all_rungs_is_not_in_the_ladder(tmp_home):
    def keep(r, seed):
        lacks = r.family == "reacher2d" and r.method == "LaMo on the Markov chain"
        return not lacks and (seed < 2 or r.method != "DT")

    fabricate("share", lambda r, seed: RISE[r.method], keep=keep)
    t = lamo.gains(partial("share"))
    assert "reacher2d medium 10%" not in set(t.dataset)
    assert (t.n == 2).all() and t[t.dataset == lamo.LADDER_MEAN].datasets.unique() == [2]


# ---- verdicts


def verdicts_of(value, seeds=(0, 1, 2)):
    "LaMo against the arm without pre-training, whose score is 20 plus the seed."
    fabricate("table16", lambda r, seed: value(r, seed) if r.method == "LaMo" else 20.0 + seed, seeds=seeds)
    v = lamo.verdicts(partial("table16"), base="LaMo without pre-training")
    return v.query("method == 'LaMo'").set_index("dataset")


GAIN = {"hopper": 3, "walker2d": -2}


def test_verdict_words(tmp_home):
    v = verdicts_of(lambda r, seed: 20.0 + seed + GAIN.get(r.family, seed - 1))
    assert v.loc["hopper medium 1%", "verdict"] == "better" and v.loc["hopper medium 10%", "difference"] == 3
    assert v.loc["walker2d medium 10%", "verdict"] == "worse"


def test_the_verdict_over_all_data_sets(tmp_home):
    v = verdicts_of(lambda r, seed: 20.0 + seed + GAIN.get(r.family, seed - 1))
    every = f"{len(v) - 1} datasets, little data"
    assert v.loc[every, "difference"] == pytest.approx(v.drop(every).difference.mean())


def test_a_data_set_of_one_seed_stays_out_of_the_mean(tmp_home):
    few = ("hopper", 0.1)
    fabricate("arms", lambda r, seed: 20.0 + seed, keep=lambda r, seed: seed == 0 or (r.family, r.offline.ratio) != few)
    v = lamo.verdicts(partial("arms"), each=False, arms=["LaMo"])
    assert v[["dataset", "n"]].values.tolist() == [["4 datasets, little data", 3]]


def test_data_of_two_kinds_have_no_verdict_together():
    w = pd.DataFrame(
        dict(score=np.arange(12.0)),
        index=pd.MultiIndex.from_product(
            [["a", "b"], ["x 1%", "x 10%", "x 100%"], [0, 1]], names=["label", "dataset", "seed"]
        ),
    )
    names = [row["dataset"] for row in lamo.against(w, "a", "b")]
    assert names == ["x 1%", "x 10%", "x 100%", "2 datasets, little data"]


def test_words_are_corrected_for_all_comparisons_of_a_table(tmp_home):
    fabricate("arms", lambda r, seed: 20 + (3 + seed - 1) * (r.method == "LaMo") + seed)
    v = lamo.verdicts(partial("arms"))
    assert v[v.method == "LaMo"].p.max() < 0.05 and set(v[v.method == "LaMo"].verdict) == {"not resolved"}


def test_one_seed_decides_nothing(tmp_home):
    assert set(verdicts_of(lambda r, seed: 90.0, (0,)).verdict) == {"not tested"}


def test_arms_are_compared_on_the_seeds_that_both_have(tmp_home):
    fabricate(
        "switches",
        lambda r, seed: 10 * seed + 5 * (r.method == "LaMo"),
        seeds=(0, 1, 2, 3),
        keep=lambda r, seed: seed != (0 if r.method == "LaMo" else 3),
    )
    v = lamo.verdicts(partial("switches", seeds=(0, 1, 2, 3)), base="LaMo")
    assert (v.n == 2).all() and (v.difference == -5).all()


def test_without_runs_every_question_is_open(tmp_home):
    said = lamo.pretraining_verdict(partial("arms")).split("\n")
    assert len(said) == len(lamo.QUESTIONS) and all(s.endswith("No runs yet.") for s in said)


@pytest.fixture
def answered(tmp_home):
    "The arms, LaMo 3 above the others and the Markov chain 2 below; the language loss keeps the language."
    fabricate(
        "arms",
        lambda r, seed: 20 + seed + 3 * (r.method == "LaMo") - 2 * (r.method == "LaMo on the Markov chain"),
        lm_loss=lambda r, k: 4 + k * (1 if dict(r.offline.model).get("lam") == 0 else 0.1),
    )
    return partial("arms")


def test_answers_follow_the_data(answered):
    first, second, third, fourth, *_ = lamo.pretraining_verdict(answered).split("\n")
    over = "5 datasets, little data (hopper medium 1%, 10%; walker2d medium 1%, 10%; reacher2d medium 10%)"
    gain = f"'LaMo' minus 'LaMo without pre-training' over {over}: yes, +3.0 [3.0, 3.0], n = 3."
    assert first == f"Did pre-training on text help? {gain}"
    assert "not resolved" in second and "no, the opposite" in third and "yes" in fourth


def test_questions_are_corrected_together(answered):
    last = lamo.pretraining_verdict(answered).split("\n")[-1]
    assert f"Holm's correction over {len(lamo.QUESTIONS)} comparisons" in last


def test_what_the_language_loss_keeps(answered):
    said = "4.00 nats before; 4.20 with the language loss, 6.00 without: it keeps more of the language model, +1.80"
    assert said in lamo.language_verdict(answered)


# ---- drawing


MADE = [e for e in EXHIBITS if not e.only or "laptop" in e.only]


@pytest.mark.parametrize("e", MADE, ids=lambda e: e.id)
@pytest.mark.parametrize("records", [False, True], ids=["blank", "records"])
def test_every_kind_draws(tmp_home, e, records):
    if records:
        fabricate(e.id, lambda r, seed: 20.0 + seed + len(r.method) % 7, seeds=(0, 1))
    shown, numbers = lamo.DRAW[e.kind](View(e, "laptop", partial=True))
    assert isinstance(numbers, pd.DataFrame) and isinstance(shown, (pd.DataFrame, Figure))
    assert len(numbers) or not records
    if isinstance(shown, Figure):
        shown.canvas.draw()
        close(shown)


def test_a_table_of_no_run_of_a_scale_is_not_made(tmp_home):
    with pytest.raises(PromptnbError, match="gpt2 is not made at laptop scale"):
        lamo.table(partial("gpt2"))


def drawing(id):
    "(figure, numbers) of an exhibit with whatever runs there are."
    view = partial(id)
    return lamo.DRAW[view.exhibit.kind](view)


def legend_of(fig):
    "The texts of a figure's legends."
    return [text.get_text() for box in fig.legends for text in box.get_texts()]


def test_figure_1_keeps_the_published_means_apart(tmp_home):
    fabricate("fig1", lambda r, seed: 20.0 + seed)
    fig, numbers = drawing("fig1")
    ours, theirs = fig.axes[0], fig.axes[3]
    assert "ours" in ours.get_title() and "published:\n15 datasets" in theirs.get_title()
    assert sorted(bar.get_width() for bar in theirs.patches) == [37, 39, 46, 48, 52]
    assert numbers.datasets[0] == "reacher2d medium 10%, 30%; walker2d medium 1%"  # of one kind of data
    assert "MuJoCo, ours: over reacher2d medium 10%, 30%; walker2d medium 1%." in lamo.left_out(
        partial("fig1"), numbers
    )


def test_a_missing_mean_is_no_bar_of_0(tmp_home):
    fabricate("fig1", lambda r, seed: 20.0 + seed)
    fig, _ = drawing("fig1")
    kitchen = fig.axes[1]
    assert [text.get_text() for text in kitchen.texts] == ["not run here"]  # Wiki-RL
    assert len(kitchen.patches) == 4 and all(bar.get_width() > 0 for bar in kitchen.patches)


def test_a_small_trunk_is_not_called_gpt2_medium(tmp_home):
    fabricate("fig10", lambda r, seed: 20.0 + seed)
    fig, numbers = drawing("fig10")
    assert "LaMo with a trunk of 4 x 160" in legend_of(fig) and "LaMo with a trunk of 4 x 160" in set(numbers.label)
    assert "medium" not in " ".join([*legend_of(fig), *numbers.label])


def test_one_seed_has_no_bar(tmp_home):
    fabricate("fig3", lambda r, seed: 20.0 + seed, keep=lambda r, seed: seed == 0 or r.offline.ratio == 0.01)
    fig, _ = drawing("fig3")
    bars = fig.axes[0].collections[0].get_segments()
    spans = [np.ptp(bar[:, 1]) for bar in bars if len(bar) and np.isfinite(bar).all()]
    assert spans == [2]


@pytest.mark.parametrize("id", ["fig4", "fig5", "fig7", "fig9", "fig11", "fig12"])
def test_legends_fit_the_column(tmp_home, id):
    fabricate(id, lambda r, seed: 20.0 + seed)
    fig, _ = drawing(id)
    fig.canvas.draw()
    box = fig.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1
    assert len(legend_of(fig)) <= 8


def overlap(texts):
    "Pairs of texts that are drawn over each other."
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


def test_long_updates_and_names_fit_the_eight_panels_of_figure_11(tmp_home):
    fabricate("fig11", lambda r, seed: 20.0 + seed, scale="paper")
    fig, _ = lamo.DRAW["progress"](partial("fig11", "paper"))
    fig.canvas.draw()
    assert len(fig.axes) == 9 and not fig.axes[8].get_visible()
    numbers = [text for ax in fig.axes[:8] for text in ax.get_xticklabels()]
    assert "100K" in {text.get_text() for text in numbers}
    titles = [ax.title for ax in fig.axes[:8]]
    assert overlap(numbers) == [] and overlap(titles) == []
    assert all(title.get_window_extent().x1 <= fig.bbox.x1 for title in titles)


def test_every_figure_says_what_its_bands_are():
    drawn = {e.kind for e in EXHIBITS} - {"scores", "params", "references", "quoted", "task_settings", "settings"}
    assert drawn == set(lamo.BAND)


@pytest.mark.parametrize("id", ["table15", "share", "table14", "table5"])
def test_made_exhibits_leave_their_files(tmp_home, id):
    fabricate(id, lambda r, seed: 20.0 + seed)
    exhibits.make(partial(id))
    files = {p.suffix[1:] for p in (tmp_home / "figures/yours/lamo/laptop").glob(f"{id}.*")}
    assert files == ({"csv", "pdf", "png", "txt"} if id == "share" else {"csv", "md", "tex"})


def test_a_saved_table_says_what_it_leaves_out(tmp_home):
    fabricate("table15", lambda r, seed: 20.0 + seed)
    exhibits.make(partial("table15"))
    text = (tmp_home / "figures/yours/lamo/laptop/table15.md").read_text()
    assert "Left to paper scale: kitchen partial" in text and "little data: over reacher2d medium 10%, 30%." in text
    assert text.count("reacher2d medium 10% ") == 1


@pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)
def test_colours_are_told_apart(e):
    arms = lamo.labels_of(e)
    assert set(arms) <= set(LOOKS)
    if lamo.DRAW[e.kind] in (lamo.table, lamo.params, lamo.references):
        return
    panels = {None: arms}
    if e.kind == "progress":  # a panel for each dataset, and for DT and CQL apart
        panels = {}
        for r in (rc.RECIPES[i] for i in e.recipes):
            panels.setdefault((r.dataset, r.offline.learner), []).append(lamo.label_of(e, r))
    for panel, own in panels.items():
        assert len({style.style(arm)["color"] for arm in own}) == len(own) <= 7, panel


def test_deviations_name_what_a_scale_changes():
    d = exhibits.deviations("lamo", "laptop").set_index("field")
    assert "100000" in d.loc["offline.steps"].paper_scale
    assert not (d.paper_scale == d.this_scale).any()


@pytest.mark.parametrize("paper", rc.PAPERS)
def test_paper_scale_deviates_in_nothing(paper):
    "The pages look fields up by name, so an empty table has its columns too."
    assert exhibits.deviations(paper, "paper").set_index("field").empty
