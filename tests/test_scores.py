"Tables, ladders, verdicts and figures of policies trained on one data set, against numbers worked out by hand on made-up records."

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.pyplot import close

from promptnb import recipes as rc
from promptnb.core import PromptnbError, code_fingerprint
from promptnb.report import exhibits, lamo, style, view
from promptnb.report.style import LOOKS
from promptnb.report.view import View
from promptnb.tasks import facts

LABELS = list(lamo.LADDER)


def exhibit(id):
    return view.exhibit("lamo", id)


EXHIBITS = [e for e in rc.exhibits("lamo") if not e.unknown]


def row(r, seed, scale, step, metric, value):
    return dict(
        paper="lamo",
        task=r.family,
        method=r.method,
        seed=seed,
        scale=scale,
        step=step,
        metric=metric,
        value=float(value),
        run_id=view.recipe_file(r, scale, seed).stem,
    )


def fabricate(
    e, value, scale="laptop", seeds=(0, 1, 2), keep=lambda r, seed: True, status="ok", lm_loss=lambda r, k: 4 + k
):
    "Records of an exhibit as if it had been run: score `value(recipe, seed)`."
    for r, seed in ((rc.resolve(r, scale), seed) for r in rc.recipes_of(e, scale) for seed in seeds):
        if not keep(r, seed):
            continue
        x, v, text = r.offline, value(r, seed), r.offline.text
        end = dict(
            score=v,
            score_best=v + 5,
            score_top3=v + 2,
            score_worst_target=v - 4,
            own_score=v / 2,
            **{f"score@{t:g}": v - i for i, t in enumerate(x.targets)},
        )
        rows = [row(r, seed, scale, k * x.steps // 2, "score_along", v + k) for k in (1, 2)] + [
            row(r, seed, scale, x.steps, m, y) for m, y in end.items()
        ]
        if text:
            rows += [row(r, seed, scale, k * x.steps // 2, "lm_loss", lm_loss(r, k)) for k in range(3)]
        chain = text and text.kind in ("chain", "iid")
        rec = dict(
            run_id=rows[0]["run_id"],
            status=status,
            why="",
            recipe_digest=rc.digest(r),
            code=dict(modules=["core"], fingerprint=code_fingerprint("core")),
            facts=facts(r.family),
            rows=rows if status == "ok" else [],
            counts=dict(total=1000, trainable=100, lora=10),
            references=dict(d4rl=(0, 100), own=(1, 50)),
            seconds=1.0,
            lm=text
            and dict(
                kind=text.kind,
                steps=9,
                held=4.59,
                entropy=dict(stationary=4.565) if chain else None,
                uniform=4.605 if chain else 7.6,
                losses=[[1, 7.0], [9, 5.0]],
            ),
        )
        path = view.recipe_file(r, scale, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rec))


def line(t, dataset, method):
    return t[(t.dataset == dataset) & (t.method == method)].iloc[0]


# ---- tables


def test_numbers_of_a_table(tmp_home):
    fabricate(
        e := exhibit("table15"),
        lambda r, seed: {"LaMo": 30, "DT": 20}.get(r.method, 25) + (0, 1, 5)[seed] + 10 * (r.offline.ratio == 1),
    )
    t = lamo.tidy(View(e, "laptop"))
    r = line(t, "reacher2d medium 10%", "LaMo")
    assert r[
        ["mean", "n", "iqm", "best", "worst", "own", "reported", "reported_std", "trainable", "total"]
    ].tolist() == pytest.approx([32, 3, 32, 37, 28, 16, 12.4, 3.8, 100, 1000])
    assert (
        r["std"] == pytest.approx(np.std([30, 31, 35], ddof=1))
        and r.difference == pytest.approx(32 - 12.4)
        and (r.lo, r.hi) == (30, 35)
        and r.note == ""
        and "Table 15" in r.source
    )
    m = line(t, "mean of 3 datasets", "DT")
    assert (
        m["mean"] == pytest.approx(22 + 10 / 3)
        and m.reported == pytest.approx((2.3 + 6.4 + 22.8) / 3)
        and m["std"] == pytest.approx(np.std([0, 1, 5], ddof=1))
        and m.source == "over reacher2d medium 10%, 30%, 100%"
    )
    p = lamo.printed(t).loc["reacher2d medium 10%"]
    assert p["LaMo"].to_dict() == {"ours": "32.0 ± 2.6", "IQM [95 %]": "32.0 [30.0, 35.0]", "published": "12.4 ± 3.8"}


def test_missing_seeds_are_shown(tmp_home):
    e = exhibit("switches")
    fabricate(
        e, lambda r, seed: 10.0 + seed, keep=lambda r, seed: seed < {"LaMo": 3, "LaMo, lambda = 1": 2}.get(r.method, 1)
    )
    with pytest.raises(PromptnbError, match="lacks 3 of 9 runs.*promptnb run lamo --exhibit switches"):
        lamo.tidy(View(e, "laptop"))
    t = lamo.tidy(View(e, "laptop", partial=True))
    p = lamo.printed(t).loc["hopper medium 1%"]
    assert t.note.tolist() == ["", "2 missing", "1 missing"] and t.n.tolist() == [3, 1, 2]
    assert (
        p.loc["ours"].tolist() == ["11.0 ± 1.0", "10.0 (n=1, 2 missing)", "10.5 ± 0.7 (n=2, 1 missing)"]
        and p.loc["IQM [95 %]"].tolist()[1] == ""
    )


def test_failed_runs_are_shown(tmp_home):
    fabricate(e := exhibit("switches"), lambda r, seed: 10.0, status="diverged")
    t = lamo.tidy(View(e, "laptop", partial=True))
    assert (t.note == "3 diverged").all() and t["mean"].isna().all() and "3 diverged" in lamo.printed(t).to_string()


def test_mean_of_cells_is_over_cells_that_all_have():
    assert lamo.shared(dict(a=[1, 2, 3, 4], b=[1, 2, 3], c=[4], d=[]), [1, 2, 3, 4]) == (
        ["a", "b"],
        [1, 2, 3],
    )  # c and d have less than half
    assert lamo.shared({}, [1]) == ([], []) and lamo.shared(dict(a=[1], b=[2]), [1, 2])[1] == []


def test_what_a_scale_leaves_out_is_named():
    for e in EXHIBITS:
        assert lamo.left_out(View(e, "paper")) == "" and bool(said := lamo.left_out(View(e, "laptop"))) == (
            len(rc.recipes_of(e, "laptop")) < len(e.recipes)
        ), e.id
        assert all(c.split()[0] in said for c in set(lamo.datasets_of(e)) - set(lamo.datasets_of(e, "laptop")))
    assert "Wiki-RL (hopper medium 10%; walker2d medium 10%)" in exhibits.caption(View(exhibit("table3"), "laptop"))


def test_best_three_for_table_13(tmp_home):
    fabricate(e := exhibit("table13"), lambda r, seed: 10.0)
    assert (lamo.tidy(View(e, "laptop"))["mean"].dropna() == 12).all()


def test_published_values_of_other_tables_stand_only_beside_exhibits_of_ours():
    rep = view.reported("lamo")
    assert (
        lamo.published(rep, exhibit("arms"), "LaMo", "reacher2d medium 10%").exhibit == "table1"
        and lamo.published(rep, exhibit("arms"), "LaMo without pre-training", "hopper medium 1%").exhibit == "table16"
    )
    assert lamo.published(rep, exhibit("table13"), "LaMo", "kitchen partial 10%") is None


# ---- the ladder

RISE = dict(zip(LABELS, (10, 14, 16, 15, 19, 20, 26)))


def test_shares_sum_to_the_whole(tmp_home):
    fabricate(
        e := exhibit("share"),
        lambda r, seed: RISE[r.method] + seed * (1 + RISE[r.method] / 100) + (r.family == "walker2d"),
    )
    t = lamo.gains(View(e, "laptop"))
    assert list(t.dataset.unique()) == [lamo.EVERY, *lamo.datasets_of(e, "laptop")]
    for _, g in t.groupby("dataset"):
        steps, whole = g[g.step != lamo.WHOLE], g[g.step == lamo.WHOLE].iloc[0]
        assert (
            steps.share.sum() == pytest.approx(100) == whole.share
            and steps.difference.sum() == pytest.approx(whole.difference)
            and (steps.start.iloc[1:].to_numpy() == steps.end.iloc[:-1]).all()
        )
        assert steps.share.tolist() == pytest.approx([25, 12.5, -6.25, 25, 6.25, 37.5], abs=0.1)
    assert "random frozen trunk 25 %" in lamo.say_share(t)


@pytest.mark.parametrize(
    "last", [lambda seed: 10 + (seed - 1) * 3, lambda seed: 5 + seed]
)  # interval around 0; LaMo below DT
def test_no_share_of_an_unclear_gain(tmp_home, last):
    fabricate(e := exhibit("share"), lambda r, seed: last(seed) if r.method == "LaMo" else 10)
    t = lamo.gains(View(e, "laptop"))
    assert t.share.isna().all() and lamo.say_share(t).count("no clear gain to share") == t.dataset.nunique()


def test_a_cell_without_all_rungs_is_not_in_the_ladder(tmp_home):
    fabricate(
        e := exhibit("share"),
        lambda r, seed: RISE[r.method],
        keep=lambda r, seed: (
            not (r.family == "reacher2d" and r.method == "LaMo on the Markov chain") and (seed < 2 or r.method != "DT")
        ),
    )
    t = lamo.gains(View(e, "laptop", partial=True))
    assert (
        "reacher2d medium 10%" not in set(t.dataset)
        and (t.n == 2).all()
        and t[t.dataset == lamo.EVERY].datasets.unique() == [2]
    )


# ---- verdicts


def verdict(home, value, seeds=(0, 1, 2)):
    fabricate(
        e := exhibit("table16"), lambda r, seed: value(r, seed) if r.method == "LaMo" else 20.0 + seed, seeds=seeds
    )
    return (
        lamo.verdicts(View(e, "laptop", partial=True), base="LaMo without pre-training")
        .query("method == 'LaMo'")
        .set_index("dataset")
    )


def test_verdict_words(tmp_home):
    v = verdict(tmp_home, lambda r, seed: 20.0 + seed + {"hopper": 3, "walker2d": -2}.get(r.family, seed - 1))
    assert (
        v.loc["hopper medium 1%", "verdict"] == "better"
        and v.loc["walker2d medium 10%", "verdict"] == "worse"
        and v.loc["hopper medium 10%", "difference"] == 3
    )
    assert (
        v.loc[lamo.EVERY, "difference"] == pytest.approx(v.drop(lamo.EVERY).difference.mean())
        and v.loc[lamo.EVERY, "datasets"] == len(v) - 1
    )


def test_one_seed_decides_nothing(tmp_home):
    assert set(verdict(tmp_home, lambda r, seed: 90.0, (0,)).verdict) == {"no clear difference"}


def test_pairs_by_seed(tmp_home):
    "Arms with different seeds are compared on those that both have."
    fabricate(
        exhibit("switches"),
        lambda r, seed: 10 * seed + 5 * (r.method == "LaMo"),
        seeds=(0, 1, 2, 3),
        keep=lambda r, seed: seed != (0 if r.method == "LaMo" else 3),
    )
    v = lamo.verdicts(View(exhibit("switches"), "laptop", (0, 1, 2, 3), partial=True), base="LaMo")
    assert (v.n == 2).all() and (v.difference == -5).all()


def test_sentences_follow_the_data(tmp_home):
    e = exhibit("arms")

    def say():
        return lamo.pretraining_verdict(View(e, "laptop", partial=True)).split("\n")

    assert len(say()) == len(lamo.QUESTIONS) and all(s.endswith("No runs yet.") for s in say())
    fabricate(
        e,
        lambda r, seed: 20 + seed + 3 * (r.method == "LaMo") - 2 * (r.method == "LaMo on the Markov chain"),
        lm_loss=lambda r, k: 4 + k * (1 if dict(r.offline.model).get("lam") == 0 else 0.1),
    )
    s = say()
    assert (
        s[0].startswith(
            "Did pre-training on text help? Yes: 'LaMo' minus 'LaMo without pre-training' is +3.0 over 5 datasets, 3 seeds"
        )
        and "No clear difference" in s[1]
        and "No, the opposite" in s[2]
        and "Yes" in s[3]
    )
    assert (
        "4.00 nats before; 4.20 with the language loss, 6.00 without: it keeps more of the language model"
        in lamo.language_verdict(View(e, "laptop", partial=True))
    )


# ---- drawing


@pytest.mark.parametrize("records", [False, True], ids=["no records", "records"])
def test_every_kind_draws(tmp_home, records):
    for e in EXHIBITS:
        if records:
            fabricate(e, lambda r, seed: 20.0 + seed + len(r.method) % 7, seeds=(0, 1))
        shown, numbers = lamo.DRAW[e.kind](View(e, "laptop", partial=True))
        assert isinstance(numbers, pd.DataFrame) and isinstance(shown, (pd.DataFrame, Figure)), e.id
        if isinstance(shown, Figure):
            shown.canvas.draw()
            close(shown)
        if records:
            assert len(numbers), e.id


def test_made_exhibits_leave_their_files(tmp_home):
    for id, kinds in (
        ("table15", "csv md tex"),
        ("share", "csv pdf png"),
        ("table14", "csv md tex"),
        ("table5", "csv md tex"),
    ):
        fabricate(e := exhibit(id), lambda r, seed: 20.0 + seed)
        exhibits.make(View(e, "laptop", partial=True))
        assert {p.suffix[1:] for p in (tmp_home / "figures/lamo/laptop").glob(f"{id}.*")} == set(kinds.split())
    text = (tmp_home / "figures/lamo/laptop/table15.md").read_text()
    assert (
        "Left to paper scale: kitchen partial" in text
        and text.count("reacher2d medium 10% ") == 1
        and "Mean over reacher2d" in text
    )


def test_colours_are_told_apart():
    for e in EXHIBITS:
        if lamo.DRAW[e.kind] not in (lamo.table, lamo.params, lamo.references):
            assert len({style.style(l)["color"] for l in lamo.labels_of(e)}) == len(lamo.labels_of(e)) <= 7, e.id
    assert all(l in LOOKS for e in EXHIBITS for l in lamo.labels_of(e))


def test_deviations_name_what_a_scale_changes():
    d = exhibits.deviations("lamo", "laptop").set_index(["part", "field"])
    x = d.loc[("training of policies", "steps")]
    assert (
        "100000" in x.paper_scale
        and x.source == "LaMo's code"
        and not (d.paper_scale == d.this_scale).any()
        and exhibits.deviations("lamo", "paper").empty
    )
