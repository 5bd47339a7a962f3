"Exhibits of context vectors, against numbers worked out by hand on made-up records."

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.pyplot import close

from promptnb import recipes as rc
from promptnb.core import PromptnbError, code_fingerprint
from promptnb.report import cmt, exhibits, lamo, style, tables, view
from promptnb.report.cmt import BOUND, COLLECTED, GIVEN, NULL, WRONG
from promptnb.report.style import LOOKS
from promptnb.report.view import View
from promptnb.tasks import facts


def exhibit(id):
    return view.exhibit("cmt", id)


EXHIBITS = [e for e in rc.exhibits("cmt") if not e.unknown]
TEST = {"cheetah-dir": (0, 1), "cheetah-vel": (2, 7, 15, 23, 26), "ant-dir": (6, 17, 23, 30, 41)}
GOALS = {
    "cheetah-dir": (1.0, -1.0),
    "cheetah-vel": tuple(np.linspace(0.075, 3, 40)),
    "ant-dir": tuple(np.random.default_rng(0).uniform(0, 2 * np.pi, 50)),
}


def look(family, place=lambda g: (g, 0 * g, 0 * g), goals=None):
    "Two contexts a task, to the left and to the right of where its goal lies."
    test, all_ = TEST[family], np.array(GOALS[family] if goals is None else goals)
    ids = [i for i in range(len(all_)) if i not in test or family == "cheetah-dir"] + list(test)
    z = np.stack(place(all_[ids]), -1)
    return dict(
        embedding=np.stack([z - 0.01, z + 0.01], 1).tolist(),
        embedded=[float(i) for i in ids],
        unseen=float(len(test)),
        goals=np.array(GOALS[family])[ids].tolist(),
    )


def circle(g):
    return (np.cos(g), np.sin(g), 0 * g)


def made_look(r, seed):
    return look(r.family, circle if r.family == "ant-dir" else lambda g: (g * (-1) ** seed, 0 * g, 0 * g))


def fabricate(
    e,
    value=lambda r, seed, i: -100.0 + seed + i,
    scale="laptop",
    seeds=(0, 1, 2),
    keep=lambda r, seed: True,
    status="ok",
    episode=lambda k, seed, i: 10.0 * k + seed + i,
    score=lambda r, seed: 50.0 + seed,
    looks=made_look,
    floor=dict(random=10.0, behaviour=60.0),
):
    "Records of an exhibit as if it had been run: return `value(recipe, seed, task)`."
    for r, seed in ((rc.resolve(r, scale), seed) for r in rc.recipes_of(e, scale) for seed in seeds):
        if not keep(r, seed):
            continue
        path = view.recipe_file(r, scale, seed)

        def row(metric, i, v, step=0):
            return dict(
                paper="cmt",
                task=r.family,
                task_id=i,
                method=r.method,
                seed=seed,
                scale=scale,
                step=step,
                metric=metric,
                value=float(v),
                trainable=640,
                env_steps=0,
                run_id=path.stem,
            )

        ids = range(40) if r.tune.play == "all" else TEST.get(r.family, (0,))
        rows = [row("return", i, value(r, seed, i)) for i in ids]
        if r.key == "collect":
            rows += [row("episode_return", i, episode(k, seed, i), k) for i in ids for k in range(5)]
        if " " in r.dataset:
            rows += [row("score", 0, score(r, seed)), row("length", 0, 40 + seed), row("demo_loss", 0, 1.0, 0)]
        rec = dict(
            run_id=path.stem,
            status=status,
            why="",
            recipe_digest=rc.digest(r),
            code=dict(modules=["core"], fingerprint=code_fingerprint("core")),
            facts=facts(r.family),
            rows=rows if status == "ok" else [],
            look=looks(r, seed) if r.tune.tuner == "encode" else {},
            counts=dict(total=1000, trainable=640),
            floor=floor if "smax" in r.family else None,
            spent={},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rec))


def drawn(e, partial=True):
    return exhibits.page_of(e).DRAW[e.kind](View(e, "laptop", partial=partial))


# ---- drawing


@pytest.mark.parametrize("records", ["none", "some", "all"])
def test_every_kind_draws(tmp_home, records):
    for e in EXHIBITS:
        if records != "none":
            fabricate(e, seeds=(0, 1), keep=lambda r, seed: records == "all" or len(r.id) % 3)
        shown, numbers = drawn(e)
        assert isinstance(shown, (pd.DataFrame, Figure)) and isinstance(numbers, pd.DataFrame), e.id
        if isinstance(shown, Figure):
            shown.canvas.draw()
            close(shown)
        if records == "all":
            assert len(numbers), e.id


def test_made_exhibits_leave_their_files(tmp_home):
    for e in EXHIBITS:
        shown = exhibits.make(View(e, "laptop", partial=True))
        tables = e.kind in ("table", "scores", "wins")
        assert {p.suffix[1:] for p in (tmp_home / "figures/cmt/laptop").glob(f"{e.id}.*")} == set(
            ("csv md tex" if tables else "csv pdf png").split()
        )
        if not tables:
            close(shown)


def test_missing_runs_are_refused_unless_partial(tmp_home):
    for e in EXHIBITS:
        with pytest.raises(PromptnbError, match=f"promptnb run cmt --exhibit {e.id}"):
            drawn(e, partial=False)


@pytest.mark.parametrize("records", [False, True])
def test_no_table_speaks_of_published_numbers(tmp_home, records):
    assert view.reported("cmt").empty
    said = {}
    for e in EXHIBITS:
        if records:
            fabricate(e, seeds=(0,))
        shown = exhibits.make(View(e, "laptop", partial=True))
        said[e.id] = (
            shown.to_string()
            if isinstance(shown, pd.DataFrame)
            else " ".join(x.get_text() for x in shown.findobj(lambda x: hasattr(x, "get_text")))
        )
        if isinstance(shown, Figure):
            close(shown)
    for p in (p for p in (tmp_home / "figures/cmt/laptop").iterdir() if p.suffix in (".csv", ".md", ".tex")):
        said[p.name] = p.read_text().replace("nothing here is a published number", "")
    assert len(said) > 2 * len(EXHIBITS) and not [
        (k, w) for k, text in said.items() for w in ("reported", "published", "difference") if w in text
    ]


def test_other_papers_keep_their_columns():
    t = tables.tidy_table(View(view.exhibit("prompt_tuning_dt", "table1"), "paper", seeds=[99], partial=True))
    assert {"reported", "difference", "source"} <= set(t) and "reported" in tables.printed(t).columns.get_level_values(
        1
    )
    assert {"reported", "difference"} <= set(
        lamo.tidy(View(view.exhibit("lamo", "table1"), "paper", [99], partial=True))
    )


def test_labels_are_told_apart():
    for e in EXHIBITS:
        mine = {cmt.without_length(l) for l in lamo.labels_of(e)}
        assert mine <= set(LOOKS), e.id
        assert len({LOOKS[l] for l in mine}) == len(mine), e.id
        if e.kind in ("adaptation", "range", "length", "bars"):
            assert len({style.style(l)["color"] for l in mine}) == len(mine), e.id


# ---- adaptation


def test_numbers_of_the_adaptation_curve(tmp_home):
    fabricate(e := exhibit("adaptation"), value=lambda r, seed, i: len(r.key) + seed)
    fig, n = cmt.adaptation(View(e, "laptop"))
    close(fig)
    n = n[n.task == "cheetah-vel"]
    curve, line = n[n.step.notna()], n[n.step.isna()].set_index("label")
    assert (
        set(curve.label) == {COLLECTED}
        and curve["mean"].tolist() == pytest.approx([10 * k + 1 + 14.6 for k in range(5)])
        and curve["min"].iloc[0] == pytest.approx(14.6)
        and curve["max"].iloc[-1] == pytest.approx(56.6)
        and set(curve["count"]) == {3}
    )
    assert line["mean"].to_dict() == {NULL: 5, GIVEN: 4, WRONG: 6, BOUND: 8}


def test_adaptation_in_words(tmp_home):
    e = exhibit("adaptation")

    def said(**kw):
        return fabricate(e, **kw) or cmt.adaptation_verdict(View(e, "laptop", partial=True))

    assert (
        cmt.adaptation_verdict(View(e, "laptop", partial=True)) == "Is the last episode above episode 0? no runs yet."
    )
    assert "cheetah-vel: yes, +40.0 (3 seeds, 95 % interval +40.0 to +40.0)" in said()
    assert "ant-dir: no, the opposite, -4.0" in said(
        episode=lambda k, seed, i: -1.0 * k
    ) and "no clear difference" in said(episode=lambda k, seed, i: k * (seed - 1.0))


def test_one_seed_decides_nothing(tmp_home):
    for e in EXHIBITS:
        fabricate(e, seeds=(0,), value=lambda r, seed, i: 100.0 * (r.key == "cmt"), score=lambda r, seed: len(r.method))
    said = [
        f(View(exhibit(i), "laptop", partial=True))
        for i, f in dict(
            adaptation=cmt.adaptation_verdict,
            meta=cmt.meta_verdict,
            single=cmt.single_verdict,
            skirmish=cmt.skirmish_verdict,
            embedding=cmt.embedding_verdict,
        ).items()
    ]
    for text in said:
        for s in text.split("\n"):
            assert "one seed decides nothing" in s and not any(
                w in s for w in (": yes", "No, the opposite", "? Yes", ": better on")
            ), s


# ---- where contexts lie


def test_ordered_contexts_have_rank_correlation_1():
    for sign in (1, -1):
        o = cmt.order(look("cheetah-vel", lambda g: (sign * np.exp(g), 0 * g, 0 * g)), "cheetah-vel")
        assert (
            [o["spearman_all"], o["spearman_unseen"]] == pytest.approx([1, 1])
            and (o["tasks"], o["unseen"], o["by"]) == (40, 5, "spearman")
            and 0.25 < o["chance"] < 0.4
        )
    o = cmt.order(look("ant-dir", circle), "ant-dir")
    assert (
        [o["distance_all"], o["distance_unseen"]] == pytest.approx([1, 1])
        and np.isnan(o["spearman_all"])
        and o["chance"] < 0.2
    )


def test_shuffled_contexts_have_rank_correlation_0():
    for seed in range(3):
        mixed = {f: np.random.default_rng(seed).permutation(GOALS[f]) for f in ("cheetah-vel", "ant-dir")}
        o = cmt.order(look("cheetah-vel", goals=mixed["cheetah-vel"]), "cheetah-vel")
        assert o["spearman_all"] < 0.4 and abs(o["distance_all"]) < 0.3
        assert abs(cmt.order(look("ant-dir", circle, mixed["ant-dir"]), "ant-dir")["distance_all"]) < 0.15


def test_unseen_tasks_in_reversed_order_are_below_0():
    x = look("cheetah-vel")
    z = np.array(x["embedding"])
    z[-5:] = z[-5:][::-1]
    assert cmt.order(dict(x, embedding=z.tolist()), "cheetah-vel")["spearman_unseen"] == pytest.approx(-1)


def test_angles_are_on_a_circle():
    a = cmt.apart(np.array([0.1, 2 * np.pi - 0.1, np.pi]), True)
    assert (
        a[0, 1] == pytest.approx(0.2) == a[1, 0] and a[0, 2] == pytest.approx(np.pi - 0.1) and (a.diagonal() == 0).all()
    )
    assert cmt.apart(np.array([0.1, 6.0]), False)[0, 1] == pytest.approx(5.9)


def test_two_goals_have_no_order():
    o = cmt.order(look("cheetah-dir"), "cheetah-dir")
    assert (
        np.isnan(o["spearman_all"])
        and np.isnan(o["spearman_unseen"])
        and o["distance_all"] > 0.8
        and (o["tasks"], o["unseen"]) == (4, 0)
    )


def test_the_order_in_words(tmp_home):
    e = exhibit("embedding")
    assert cmt.embedding_verdict(View(e, "laptop", partial=True)) == "no runs yet"
    fabricate(e)
    s = cmt.embedding_verdict(View(e, "laptop", partial=True)).split("\n")
    assert (
        s[0].endswith("too few tasks to tell.")
        and "no task is unseen" in s[0]
        and "first component and goal have a rank correlation of 1.00 (1.00 to 1.00) over 40 tasks, 1.00 (1.00 to 1.00) over the 5 unseen alone, 3 seeds"
        in s[1]
        and s[1].endswith(": more than by chance.")
    )
    fabricate(
        e,
        looks=lambda r, seed: look(
            r.family,
            circle if r.family == "ant-dir" else lambda g: (g, 0 * g, 0 * g),
            np.random.default_rng(seed).permutation(GOALS[r.family]) if seed else None,
        ),
    )
    s = cmt.embedding_verdict(View(e, "laptop", partial=True)).split("\n")
    assert s[1].endswith("in some seeds only.") and set(
        cmt.orders(View(e, "laptop", partial=True))[["family", "seed"]].itertuples(index=False, name=None)
    ) == {(f, k) for f in GOALS for k in range(3)}


# ---- the goal range


def test_goals_come_from_a_record(tmp_home):
    assert cmt.goals_of("cmt", "cheetah-vel") == ({}, [])
    fabricate(exhibit("embedding"), seeds=(1,))
    goals, test = cmt.goals_of("cmt", "cheetah-vel")
    assert (
        goals[0] == pytest.approx(0.075)
        and goals[39] == pytest.approx(3)
        and len(goals) == 40
        and test == list(TEST["cheetah-vel"])
    )


@pytest.mark.parametrize("named", [False, True])
def test_numbers_along_the_goals(tmp_home, named):
    if named:
        fabricate(exhibit("embedding"))
    fabricate(e := exhibit("range"), value=lambda r, seed, i: i + seed)
    fig, n = cmt.along(View(e, "laptop"))
    label = fig.axes[0].get_xlabel()
    close(fig)
    a = n[n.label == "Prompt-DT, middle goals"].set_index("task_id")
    assert a.loc[20, ["mean", "min", "max", "count"]].tolist() == [21, 20, 22, 3] and len(n) == 5 * 40
    if not named:
        assert (n.goal == n.task_id).all() and label.startswith("task id") and set(n.part) == {""}
        return
    assert (
        label == "goal velocity"
        and a.goal[39] == pytest.approx(3)
        and [a.part[i] for i in (9, 10, 15, 29, 30)] == ["outside", "trained", "between", "trained", "outside"]
    )
    assert n[n.label == NULL].groupby("part").size().to_dict() == dict(trained=35, between=5)
    p = cmt.parts(View(e, "laptop", partial=True))
    assert (
        p.loc[GIVEN, "unseen, between"] == "15.6 ± 1.0 (5 goals, n=3)"
        and p.loc[GIVEN, "unseen, outside"] == ""
        and "20 goals" in p.loc["Prompt-DT, middle goals", "unseen, outside"]
    )


# ---- length


def test_numbers_without_length(tmp_home):
    fabricate(
        e := exhibit("length"),
        value=lambda r, seed, i: i + r.pretrain.context.L,
        score=lambda r, seed: dict(r.tune.hyper)["L"] + seed,
    )
    t = cmt.lengths(View(e, "laptop"))
    assert set(t.label) == {"Random frozen prompt", "Prompt towards the best 10 %", GIVEN} and len(t) == 12 * 3
    h, c = t[t.dataset == "hopper medium"], t[t.dataset == "cheetah-vel"]
    assert (
        (h.value == h.L + h.seed).all()
        and c.value.to_numpy() == pytest.approx(c.L.to_numpy() + 14.6)
        and sorted(c.L.unique()) == [1, 5, 10, 20]
        and (set(h.metric), set(c.metric)) == ({"score"}, {"return"})
    )


# ---- scores and games won


def test_single_tasks_are_tables_of_scores(tmp_home):
    fabricate(
        e := exhibit("single"), score=lambda r, seed: len(r.method) + (0, 1, 5)[seed] + 10 * (r.family == "hopper")
    )
    t = lamo.tidy(View(e, "laptop"))
    r = t[(t.dataset == "hopper medium") & (t.method == "No prompt")].iloc[0]
    assert r[["mean", "n", "iqm", "lo", "hi", "trainable", "total"]].tolist() == pytest.approx(
        [21, 3, 21, 19, 24, 640, 1000]
    )
    m = t[(t.dataset == "mean of 9 datasets") & (t.method == "LoRA")].iloc[0]
    assert (
        m["mean"] == pytest.approx(4 + 2 + 10 / 3)
        and m.source
        == "over hopper medium, medium-replay, medium-expert; halfcheetah medium, medium-replay, medium-expert; walker2d medium, medium-replay, medium-expert"
    )
    p = lamo.printed(t).loc["hopper medium"]
    assert p["No prompt"].to_dict() == {"ours": "21.0 ± 2.6", "IQM [95 %]": "21.0 [19.0, 24.0]"}
    v = lamo.verdicts(View(e, "laptop"), base="No prompt")
    assert set(v[v.method == "LoRA"].verdict) == {"worse"} and v[(v.dataset == lamo.EVERY) & (v.method == "LoRA")].iloc[
        0
    ][["datasets", "difference"]].tolist() == [9, -5]


def test_numbers_of_games_won(tmp_home):
    fabricate(
        e := exhibit("skirmish"),
        value=lambda r, seed, i: 1 + seed / 10,
        score=lambda r, seed: 50 + (0, 1, 5)[seed] + 20 * (r.family == "smax-8m"),
    )
    p, t = cmt.wins(View(e, "laptop"))
    r = t[(t.dataset == "smax-3m good") & (t.method == "LoRA")].iloc[0]
    assert r[
        ["mean", "n", "iqm", "lo", "hi", "return", "return_std", "length", "length_std", "random", "behaviour", "total"]
    ].tolist() == pytest.approx([52, 3, 52, 50, 55, 1.1, 0.1, 41, 1, 10, 60, 1000])
    x = p.loc["smax-3m good"]
    assert (
        x["LoRA"].to_dict()
        == {"won, %": "52.0 ± 2.6", "IQM [95 %]": "52.0 [50.0, 55.0]", "return": "1.10 ± 0.10", "length": "41 ± 1"}
        and x.loc["won, %", ["random actions", "behaviour"]].tolist() == ["10.0", "60.0"]
        and x.loc["return", "behaviour"] == ""
    )
    m = t[(t.dataset == "mean of 15 datasets") & (t.method == "LoRA")].iloc[0]
    assert (
        m["mean"] == pytest.approx(56)
        and np.isnan(m["return"])
        and list(p.columns) == [*lamo.labels_of(e), "random actions", "behaviour"]
    )


def test_missing_and_failed_games_are_shown(tmp_home):
    e = exhibit("skirmish")
    fabricate(e, keep=lambda r, seed: seed < (1 if r.method == "LoRA" else 3))
    fabricate(e, keep=lambda r, seed: r.method == "No prompt", status="failed")
    with pytest.raises(PromptnbError, match="lacks"):
        cmt.wins(View(e, "laptop"))
    p = cmt.wins(View(e, "laptop", partial=True))[0].loc["smax-8m poor"]
    assert (
        p.loc["won, %", "LoRA"] == "50.0 (n=1, 2 missing)"
        and p.loc["won, %", "No prompt"] == "3 failed"
        and p.loc["length", "No prompt"] == ""
    )


def test_against_random_actions(tmp_home):
    e = exhibit("skirmish")
    won = {
        "smax-3m": lambda k: 30 + k,
        "smax-2s3z": lambda k: 9 + k,
        "smax-3s5z": lambda k: 1 + k,
        "smax-5m-vs-6m": lambda k: 10,
        "smax-8m": lambda k: 10.5 + k,
    }
    fabricate(e, score=lambda r, seed: won[r.family](seed) + 20 * (r.method == "LoRA" and r.family == "smax-3s5z"))
    s = cmt.beats_random(View(e, "laptop", partial=True)).split("\n")
    assert (
        len(s) == 3
        and s[0].startswith(
            "Against random actions, trained on good data: 'No prompt': better on smax-3m, smax-8m; no clear difference on smax-2s3z, smax-5m-vs-6m; worse on smax-3s5z (3 seeds);"
        )
        and "the best method of each map: better on smax-3m, smax-3s5z, smax-8m; no clear" in s[0]
    )


def test_no_floor_no_sentence(tmp_home):
    fabricate(e := exhibit("skirmish"), floor=None, seeds=(0,))
    assert (
        cmt.beats_random(View(e, "laptop", partial=True)).count("no runs yet") == 6
        and cmt.wins(View(e, "laptop", partial=True))[0].loc[("smax-3m good", "won, %"), "behaviour"] == ""
    )


# ---- verdicts


def test_verdicts_on_unseen_tasks(tmp_home):
    e = exhibit("meta")
    assert cmt.meta_verdict(View(e, "laptop", partial=True)).count("no runs yet") == len(cmt.QUESTIONS)
    gain = {
        GIVEN: lambda seed: 12,
        WRONG: lambda seed: 2 * seed - 2,
        BOUND: lambda seed: 20,
        COLLECTED: lambda seed: -3,
    }
    fabricate(
        e,
        value=lambda r, seed, i: (
            10 * seed + i + gain.get(r.method, lambda seed: 0)(seed) + 5 * (r.method == GIVEN and r.family == "ant-dir")
        ),
    )
    s = cmt.meta_verdict(View(e, "laptop", partial=True)).split("\n")
    assert (
        "cheetah-vel: yes, +12.0 (3 seeds, 95 % interval +12.0 to +12.0); ant-dir: yes, +17.0" in s[0]
        and s[1].count(": yes") == 3
        and s[2].count("no, the opposite, -3.0") == 3
        and s[3].count("no, the opposite") == 3
        and s[4].count(": yes") == 3
        and s[6].count("no clear difference, +0.0") == 3
    )


def test_only_common_seeds_are_compared(tmp_home):
    fabricate(
        e := exhibit("meta"),
        value=lambda r, seed, i: 100.0 * seed + 5 * (r.method == GIVEN),
        keep=lambda r, seed: seed != (0 if r.method == GIVEN else 2),
    )
    assert (
        "cheetah-vel: no clear difference, +5.0 (1 seed, one seed decides nothing)"
        in cmt.meta_verdict(View(e, "laptop", partial=True)).split("\n")[0]
    )


def test_verdicts_on_single_tasks_and_games(tmp_home):
    gain = {"Prompt towards the best 10 %": 3, "Prompt on shuffled trajectories": -4, "Prompt a map, the best 10 %": 3}
    for i in ("single", "skirmish"):
        fabricate(exhibit(i), score=lambda r, seed: 40 + seed + gain.get(r.method, 0))
    s, g = (
        cmt.single_verdict(View(exhibit("single"), "laptop", partial=True)).split("\n"),
        cmt.skirmish_verdict(View(exhibit("skirmish"), "laptop", partial=True)).split("\n"),
    )
    assert (
        len(s) == 15
        and s[0].startswith(
            "Is 'Prompt towards the best 10 %' above 'Random frozen prompt'? Yes: 'Prompt towards the best 10 %' minus 'Random frozen prompt' is +3.0 over 9 datasets, 3 seeds"
        )
        and "is +7.0" in s[2]
        and s[5].startswith("Is 'Prompt by advantage' above 'Random frozen prompt'? No clear difference")
    )
    assert len(g) == 9 and "is +3.0 over 15 datasets" in g[3] and "? No clear difference" in g[6]
