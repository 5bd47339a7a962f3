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

EXHIBITS = [e for e in rc.exhibits("cmt") if not e.unknown]
TABLES = ("table", "scores", "wins")
TEST = {"cheetah-dir": (0, 1), "cheetah-vel": (2, 7, 15, 23, 26), "ant-dir": (6, 17, 23, 30, 41)}
GOALS = {
    "cheetah-dir": (1.0, -1.0),
    "cheetah-vel": tuple(np.linspace(0.075, 3, 40)),
    "ant-dir": tuple(np.random.default_rng(0).uniform(0, 2 * np.pi, 50)),
}


def exhibit(id):
    "An exhibit of the Contextual Meta Transformer."
    return view.exhibit("cmt", id)


def seen(id):
    "It at laptop scale, whatever runs there are."
    return View(exhibit(id), "laptop", partial=True)


def whole(id):
    "It at laptop scale, with all its runs."
    return View(exhibit(id), "laptop")


# ---- made-up records


def on_line(g):
    return g, 0 * g, 0 * g


def on_circle(g):
    return np.cos(g), np.sin(g), 0 * g


def place_of(family):
    "Where contexts of a family lie when they are in the order of their goals."
    return on_circle if family == "ant-dir" else on_line


def look(family, place=on_line, goals=None):
    "Two contexts a task, to the left and to the right of where its goal lies; `goals`: others than its own."
    test, own = TEST[family], np.array(GOALS[family])
    train = [i for i in range(len(own)) if i not in test or family == "cheetah-dir"]
    ids = [*train, *test]
    z = np.stack(place(np.array(own if goals is None else goals)[ids]), -1)
    return dict(
        embedding=np.stack([z - 0.01, z + 0.01], 1).tolist(),
        embedded=[float(i) for i in ids],
        unseen=float(len(test)),
        goals=own[ids].tolist(),
    )


def made_look(r, seed):
    "Contexts in the order of the goals; the sign of the first component differs from seed to seed."
    if r.family == "ant-dir":
        return look(r.family, on_circle)
    return look(r.family, lambda g: (g * (-1) ** seed, 0 * g, 0 * g))


def shuffled(family, seed):
    "The goals of a family in random order."
    return np.random.default_rng(seed).permutation(GOALS[family])


class Made:
    "What the policies of an exhibit did; a test says what differs."

    def __init__(self, value=None, episode=None, score=None, looks=made_look, floor="", status="ok"):
        self.value = value or (lambda r, seed, i: -100.0 + seed + i)
        self.episode = episode or (lambda k, seed, i: 10.0 * k + seed + i)
        self.score = score or (lambda r, seed: 50.0 + seed)
        self.looks, self.status = looks, status
        self.floor = dict(random=10.0, behaviour=60.0) if floor == "" else floor

    def metrics(self, r, seed):
        "(metric, task, step, value) of a run."
        ids = range(40) if r.tune.play == "all" else TEST.get(r.family, (0,))
        for i in ids:
            yield "return", i, 0, self.value(r, seed, i)
        if r.key == "collect":
            for i in ids:
                for k in range(5):
                    yield "episode_return", i, k, self.episode(k, seed, i)
        if " " in r.dataset:
            yield from (("score", 0, 0, self.score(r, seed)), ("length", 0, 0, 40 + seed), ("demo_loss", 0, 0, 1.0))

    def rows(self, r, seed, name):
        "Rows of a run."
        known = dict(paper="cmt", task=r.family, method=r.method, seed=seed, scale="laptop")
        known |= dict(trainable=640, env_steps=0, run_id=name)
        for metric, i, step, value in self.metrics(r, seed):
            yield dict(known, metric=metric, task_id=i, step=step, value=float(value))

    def record(self, r, seed, name):
        "The record of a run."
        return dict(
            run_id=name,
            status=self.status,
            why="",
            recipe_digest=rc.digest(r),
            code=dict(modules=["core"], fingerprint=code_fingerprint("core")),
            facts=facts(r.family),
            rows=list(self.rows(r, seed, name)) if self.status == "ok" else [],
            look=self.looks(r, seed) if r.tune.tuner == "encode" else {},
            counts=dict(total=1000, trainable=640),
            floor=self.floor if "smax" in r.family else None,
            spent={},
        )


def fabricate(id, seeds=(0, 1, 2), keep=lambda r, seed: True, **made):
    "Write the records of an exhibit as if it had been run."
    made = Made(**made)
    for r in (rc.resolve(r, "laptop") for r in rc.recipes_of(exhibit(id), "laptop")):
        for seed in seeds:
            if keep(r, seed):
                path = view.recipe_file(r, "laptop", seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(made.record(r, seed, path.stem)))


def drawn(e, partial=True):
    "(what is shown, its numbers) of an exhibit; figures are closed."
    shown, numbers = exhibits.page_of(e).DRAW[e.kind](View(e, "laptop", partial=partial))
    if isinstance(shown, Figure):
        shown.canvas.draw()
        close(shown)
    return shown, numbers


def said(verdict, id, **made):
    "A verdict on made-up records."
    fabricate(id, **made)
    return verdict(seen(id))


# ---- drawing


@pytest.mark.parametrize("records", ["none", "some", "all"])
def test_every_kind_draws(tmp_home, records):
    for e in EXHIBITS:
        if records != "none":
            fabricate(e.id, seeds=(0, 1), keep=lambda r, seed: records == "all" or len(r.id) % 3)
        shown, numbers = drawn(e)
        assert isinstance(shown, (pd.DataFrame, Figure)) and isinstance(numbers, pd.DataFrame), e.id
        assert len(numbers) or records != "all", e.id


def test_made_exhibits_leave_their_files(tmp_home):
    for e in EXHIBITS:
        shown = exhibits.make(View(e, "laptop", partial=True))
        if isinstance(shown, Figure):
            close(shown)
        files = {p.suffix[1:] for p in (tmp_home / "figures/cmt/laptop").glob(f"{e.id}.*")}
        assert files == set("csv md tex".split() if e.kind in TABLES else "csv pdf png".split()), e.id


def test_missing_runs_are_refused_unless_partial(tmp_home):
    for e in EXHIBITS:
        with pytest.raises(PromptnbError, match=f"promptnb run cmt --exhibit {e.id}"):
            drawn(e, partial=False)


def text_of(shown):
    "All the text of a table or a figure."
    if isinstance(shown, pd.DataFrame):
        return shown.to_string()
    text = " ".join(x.get_text() for x in shown.findobj(lambda x: hasattr(x, "get_text")))
    close(shown)
    return text


@pytest.mark.parametrize("records", [False, True], ids=["blank", "made"])
def test_no_table_speaks_of_published_numbers(tmp_home, records):
    texts = {}
    for e in EXHIBITS:
        if records:
            fabricate(e.id, seeds=(0,))
        texts[e.id] = text_of(exhibits.make(View(e, "laptop", partial=True)))
    for p in (tmp_home / "figures/cmt/laptop").iterdir():
        if p.suffix in (".csv", ".md", ".tex"):
            texts[p.name] = p.read_text().replace("nothing here is a published number", "")
    assert len(texts) > 2 * len(EXHIBITS)
    for name, text in texts.items():
        assert not any(word in text for word in ("reported", "published", "difference")), name


def test_nothing_is_reported_of_this_paper():
    assert view.reported("cmt").empty


def test_other_papers_keep_their_columns():
    t = tables.tidy_table(View(view.exhibit("prompt_tuning_dt", "table1"), "paper", seeds=[99], partial=True))
    assert {"reported", "difference", "source"} <= set(t)
    assert "reported" in tables.printed(t).columns.get_level_values(1)
    scores = lamo.tidy(View(view.exhibit("lamo", "table1"), "paper", [99], partial=True))
    assert {"reported", "difference"} <= set(scores)


@pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)
def test_labels_are_told_apart(e):
    mine = {cmt.without_length(label) for label in lamo.labels_of(e)}
    assert mine <= set(LOOKS)
    assert len({LOOKS[label] for label in mine}) == len(mine)
    if e.kind in ("adaptation", "range", "length", "bars"):
        assert len({style.style(label)["color"] for label in mine}) == len(mine)


# ---- adaptation


@pytest.fixture
def adapted(tmp_home):
    "Numbers of the adaptation curve on Cheetah-vel, where a method returns the length of its key, and its seed more."
    fabricate("adaptation", value=lambda r, seed, i: len(r.key) + seed)
    fig, n = cmt.adaptation(whole("adaptation"))
    close(fig)
    return n[n.task == "cheetah-vel"]


def test_numbers_of_the_adaptation_curve(adapted):
    curve = adapted[adapted.step.notna()]
    assert set(curve.label) == {COLLECTED}
    assert curve["mean"].tolist() == pytest.approx([10 * k + 1 + 14.6 for k in range(5)])  # 14.6: mean test task
    assert curve["min"].iloc[0] == pytest.approx(14.6)
    assert curve["max"].iloc[-1] == pytest.approx(56.6)
    assert set(curve["count"]) == {3}


def test_methods_that_do_not_collect_are_levels(adapted):
    levels = adapted[adapted.step.isna()].set_index("label")
    assert levels["mean"].to_dict() == {NULL: 5, GIVEN: 4, WRONG: 6, BOUND: 8}


def test_adaptation_without_runs(tmp_home):
    assert cmt.adaptation_verdict(seen("adaptation")) == "Is the last episode above episode 0? no runs yet."


def test_a_rise_over_episodes_is_said(tmp_home):
    text = said(cmt.adaptation_verdict, "adaptation")
    assert "cheetah-vel: yes, +40.0 (3 seeds, 95 % interval +40.0 to +40.0)" in text


def test_a_fall_over_episodes_is_said(tmp_home):
    text = said(cmt.adaptation_verdict, "adaptation", episode=lambda k, seed, i: -1.0 * k)
    assert "ant-dir: no, the opposite, -4.0" in text


def test_seeds_that_disagree_make_no_clear_difference(tmp_home):
    text = said(cmt.adaptation_verdict, "adaptation", episode=lambda k, seed, i: k * (seed - 1.0))
    assert "no clear difference" in text


VERDICTS = dict(
    adaptation=cmt.adaptation_verdict,
    meta=cmt.meta_verdict,
    single=cmt.single_verdict,
    skirmish=cmt.skirmish_verdict,
    embedding=cmt.embedding_verdict,
)


@pytest.mark.parametrize("id", VERDICTS)
def test_one_seed_decides_nothing(tmp_home, id):
    made = dict(value=lambda r, seed, i: 100.0 * (r.key == "cmt"), score=lambda r, seed: len(r.method))
    for sentence in said(VERDICTS[id], id, seeds=(0,), **made).split("\n"):
        assert "one seed decides nothing" in sentence
        assert not any(word in sentence for word in (": yes", "No, the opposite", "? Yes", ": better on")), sentence


# ---- where contexts lie


@pytest.mark.parametrize("sign", [1, -1])
def test_contexts_in_the_order_of_their_goals(sign):
    o = cmt.order(look("cheetah-vel", lambda g: (sign * np.exp(g), 0 * g, 0 * g)), "cheetah-vel")
    assert [o["spearman_all"], o["spearman_unseen"]] == pytest.approx([1, 1])
    assert (o["tasks"], o["unseen"], o["by"]) == (40, 5, "spearman")
    assert 0.25 < o["chance"] < 0.4


def test_contexts_on_a_circle_as_their_goals():
    o = cmt.order(look("ant-dir", on_circle), "ant-dir")
    assert [o["distance_all"], o["distance_unseen"]] == pytest.approx([1, 1])
    assert np.isnan(o["spearman_all"])
    assert o["chance"] < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_contexts_have_rank_correlation_0(seed):
    o = cmt.order(look("cheetah-vel", goals=shuffled("cheetah-vel", seed)), "cheetah-vel")
    assert o["spearman_all"] < 0.4 and abs(o["distance_all"]) < 0.3
    assert abs(cmt.order(look("ant-dir", on_circle, shuffled("ant-dir", seed)), "ant-dir")["distance_all"]) < 0.15


def test_unseen_tasks_in_reversed_order_are_below_0():
    x = look("cheetah-vel")
    z = np.array(x["embedding"])
    z[-5:] = z[-5:][::-1]
    assert cmt.order(dict(x, embedding=z.tolist()), "cheetah-vel")["spearman_unseen"] == pytest.approx(-1)


def test_angles_are_on_a_circle():
    a = cmt.apart(np.array([0.1, 2 * np.pi - 0.1, np.pi]), True)
    assert a[0, 1] == pytest.approx(0.2) == a[1, 0]
    assert a[0, 2] == pytest.approx(np.pi - 0.1)
    assert (a.diagonal() == 0).all()


def test_speeds_are_on_a_line():
    assert cmt.apart(np.array([0.1, 6.0]), False)[0, 1] == pytest.approx(5.9)


def test_two_goals_have_no_order():
    o = cmt.order(look("cheetah-dir"), "cheetah-dir")
    assert np.isnan(o["spearman_all"]) and np.isnan(o["spearman_unseen"])
    assert o["distance_all"] > 0.8
    assert (o["tasks"], o["unseen"]) == (4, 0)


def test_the_order_without_runs(tmp_home):
    assert cmt.embedding_verdict(seen("embedding")) == "no runs yet"


def test_the_order_in_words(tmp_home):
    two, line, _ = said(cmt.embedding_verdict, "embedding").split("\n")
    assert two.endswith("too few tasks to tell.") and "no task is unseen" in two
    assert (
        "first component and goal have a rank correlation of 1.00 (1.00 to 1.00) over 40 tasks,"
        " 1.00 (1.00 to 1.00) over the 5 unseen alone, 3 seeds"
    ) in line
    assert line.endswith(": more than by chance.")


def test_an_order_in_some_seeds_only(tmp_home):
    def ordered_in_seed_0(r, seed):
        return look(r.family, place_of(r.family), shuffled(r.family, seed) if seed else None)

    text = said(cmt.embedding_verdict, "embedding", looks=ordered_in_seed_0)
    assert text.split("\n")[1].endswith("in some seeds only.")
    found = cmt.orders(seen("embedding"))[["family", "seed"]].itertuples(index=False, name=None)
    assert set(found) == {(family, seed) for family in GOALS for seed in range(3)}


# ---- the goal range


def test_goals_are_not_known_without_a_record(tmp_home):
    assert cmt.goals_of("cmt", "cheetah-vel") == ({}, [])


def test_goals_come_from_a_record(tmp_home):
    fabricate("embedding", seeds=(1,))
    goals, test = cmt.goals_of("cmt", "cheetah-vel")
    assert (goals[0], goals[39]) == (pytest.approx(0.075), pytest.approx(3))
    assert len(goals) == 40 and test == list(TEST["cheetah-vel"])


def ranged():
    "(name of the axis, numbers) of the goal range, where a method returns its task's id, and its seed more."
    fabricate("range", value=lambda r, seed, i: i + seed)
    fig, n = cmt.along(whole("range"))
    close(fig)
    return fig.axes[0].get_xlabel(), n


@pytest.mark.parametrize("named", [False, True], ids=["ids", "goals"])
def test_numbers_along_the_goals(tmp_home, named):
    if named:
        fabricate("embedding")
    n = ranged()[1]
    a = n[n.label == "Prompt-DT, middle goals"].set_index("task_id")
    assert a.loc[20, ["mean", "min", "max", "count"]].tolist() == [21, 20, 22, 3]
    assert len(n) == 5 * 40


def test_goals_that_no_record_names_are_task_ids(tmp_home):
    name, n = ranged()
    assert name.startswith("task id")
    assert (n.goal == n.task_id).all() and set(n.part) == {""}


def test_goals_are_trained_on_between_or_outside(tmp_home):
    fabricate("embedding")
    name, n = ranged()
    a = n[n.label == "Prompt-DT, middle goals"].set_index("task_id")
    assert name == "goal velocity" and a.goal[39] == pytest.approx(3)
    parts = [a.part[i] for i in (9, 10, 15, 29, 30)]
    assert parts == ["outside", "trained", "between", "trained", "outside"]
    assert n[n.label == NULL].groupby("part").size().to_dict() == dict(trained=35, between=5)


def test_means_of_the_parts(tmp_home):
    fabricate("embedding")
    ranged()
    p = cmt.parts(seen("range"))
    assert p.loc[GIVEN, "unseen, between"] == "15.6 ± 1.0 (5 goals, n=3)"
    assert p.loc[GIVEN, "unseen, outside"] == ""
    assert "20 goals" in p.loc["Prompt-DT, middle goals", "unseen, outside"]


# ---- length


def test_numbers_by_length(tmp_home):
    fabricate(
        "length",
        value=lambda r, seed, i: i + r.pretrain.context.L,
        score=lambda r, seed: dict(r.tune.hyper)["L"] + seed,
    )
    t = cmt.lengths(whole("length"))
    hopper, cheetah = t[t.dataset == "hopper medium"], t[t.dataset == "cheetah-vel"]
    assert set(t.label) == {"Random frozen prompt", "Prompt towards the best 10 %", GIVEN} and len(t) == 12 * 3
    assert (hopper.value == hopper.L + hopper.seed).all()
    assert cheetah.value.to_numpy() == pytest.approx(cheetah.L.to_numpy() + 14.6)
    assert sorted(cheetah.L.unique()) == [1, 5, 10, 20]
    assert (set(hopper.metric), set(cheetah.metric)) == ({"score"}, {"return"})


# ---- scores on single tasks


@pytest.fixture
def single(tmp_home):
    "Single tasks, where a method scores the length of its name, 0, 1 or 5 more by seed, and 10 more on Hopper."
    fabricate("single", score=lambda r, seed: len(r.method) + (0, 1, 5)[seed] + 10 * (r.family == "hopper"))
    return whole("single")


def line_of(t, dataset, method):
    "The row of a tidy table."
    return t[(t.dataset == dataset) & (t.method == method)].iloc[0]


def test_single_tasks_are_tables_of_scores(single):
    r = line_of(lamo.tidy(single), "hopper medium", "No prompt")
    numbers = r[["mean", "n", "iqm", "lo", "hi", "trainable", "total"]].tolist()
    assert numbers == pytest.approx([21, 3, 21, 19, 24, 640, 1000])


def test_the_mean_over_single_tasks_names_them(single):
    m = line_of(lamo.tidy(single), "mean of 9 datasets", "LoRA")
    qualities = "medium, medium-replay, medium-expert"
    assert m["mean"] == pytest.approx(4 + 2 + 10 / 3)
    assert m.source == "over " + "; ".join(f"{body} {qualities}" for body in ("hopper", "halfcheetah", "walker2d"))


def test_printed_lines_of_single_tasks(single):
    p = lamo.printed(lamo.tidy(single)).loc["hopper medium"]
    assert p["No prompt"].to_dict() == {"ours": "21.0 ± 2.6", "IQM [95 %]": "21.0 [19.0, 24.0]"}


def test_verdicts_over_single_tasks(single):
    v = lamo.verdicts(single, base="No prompt")
    lora = v[v.method == "LoRA"]
    assert set(lora.verdict) == {"worse"}
    assert lora[lora.dataset == lamo.EVERY].iloc[0][["datasets", "difference"]].tolist() == [9, -5]


# ---- games won


@pytest.fixture
def won(tmp_home):
    "(printed, tidy) games won, where a method wins 50, 51 or 55 % by seed, and 20 more on 8m."
    fabricate(
        "skirmish",
        value=lambda r, seed, i: 1 + seed / 10,
        score=lambda r, seed: 50 + (0, 1, 5)[seed] + 20 * (r.family == "smax-8m"),
    )
    return cmt.wins(whole("skirmish"))


def test_numbers_of_games_won(won):
    r = line_of(won[1], "smax-3m good", "LoRA")
    assert r[["mean", "n", "iqm", "lo", "hi"]].tolist() == pytest.approx([52, 3, 52, 50, 55])
    assert r[["return", "return_std", "length", "length_std"]].tolist() == pytest.approx([1.1, 0.1, 41, 1])
    assert r[["random", "behaviour", "total"]].tolist() == pytest.approx([10, 60, 1000])


def test_printed_lines_of_games_won(won):
    x = won[0].loc["smax-3m good"]
    expected = {"won, %": "52.0 ± 2.6", "IQM [95 %]": "52.0 [50.0, 55.0]", "return": "1.10 ± 0.10", "length": "41 ± 1"}
    assert x["LoRA"].to_dict() == expected
    assert x.loc["won, %", ["random actions", "behaviour"]].tolist() == ["10.0", "60.0"]
    assert x.loc["return", "behaviour"] == ""


def test_the_mean_of_games_won(won):
    m = line_of(won[1], "mean of 15 datasets", "LoRA")
    assert m["mean"] == pytest.approx(56) and np.isnan(m["return"])


def test_columns_of_games_won(won):
    assert list(won[0].columns) == [*lamo.labels_of(exhibit("skirmish")), "random actions", "behaviour"]


@pytest.fixture
def lacking(tmp_home):
    "Games where two seeds of LoRA are missing and all of 'No prompt' have failed."
    fabricate("skirmish", keep=lambda r, seed: seed < (1 if r.method == "LoRA" else 3))
    fabricate("skirmish", keep=lambda r, seed: r.method == "No prompt", status="failed")


def test_missing_and_failed_games_are_refused(lacking):
    with pytest.raises(PromptnbError, match="lacks"):
        cmt.wins(whole("skirmish"))


def test_missing_and_failed_games_are_shown(lacking):
    p = cmt.wins(seen("skirmish"))[0].loc["smax-8m poor"]
    assert p.loc["won, %", "LoRA"] == "50.0 (n=1, 2 missing)"
    assert p.loc["won, %", "No prompt"] == "3 failed"
    assert p.loc["length", "No prompt"] == ""


WON = {
    "smax-3m": lambda k: 30 + k,
    "smax-2s3z": lambda k: 9 + k,
    "smax-3s5z": lambda k: 1 + k,
    "smax-5m-vs-6m": lambda k: 10,
    "smax-8m": lambda k: 10.5 + k,
}  # percent by map and seed; random actions win 10


def test_against_random_actions(tmp_home):
    fabricate(
        "skirmish", score=lambda r, seed: WON[r.family](seed) + 20 * (r.method == "LoRA" and r.family == "smax-3s5z")
    )
    good, *others = cmt.beats_random(seen("skirmish")).split("\n")
    assert len(others) == 2
    assert good.startswith(
        "Against random actions, trained on good data: 'No prompt': better on smax-3m, smax-8m;"
        " no clear difference on smax-2s3z, smax-5m-vs-6m; worse on smax-3s5z (3 seeds);"
    )
    assert "the best method of each map: better on smax-3m, smax-3s5z, smax-8m; no clear" in good


def test_no_floor_no_sentence(tmp_home):
    fabricate("skirmish", floor=None, seeds=(0,))
    assert cmt.beats_random(seen("skirmish")).count("no runs yet") == 6
    assert cmt.wins(seen("skirmish"))[0].loc[("smax-3m good", "won, %"), "behaviour"] == ""


# ---- verdicts


def test_verdicts_without_runs(tmp_home):
    assert cmt.meta_verdict(seen("meta")).count("no runs yet") == len(cmt.QUESTIONS)


GAIN = {GIVEN: lambda seed: 12, WRONG: lambda seed: 2 * seed - 2, BOUND: lambda seed: 20, COLLECTED: lambda seed: -3}


def test_verdicts_on_unseen_tasks(tmp_home):
    def value(r, seed, i):
        gain = GAIN.get(r.method, lambda seed: 0)(seed)
        return 10 * seed + i + gain + 5 * (r.method == GIVEN and r.family == "ant-dir")

    s = said(cmt.meta_verdict, "meta", value=value).split("\n")
    assert "cheetah-vel: yes, +12.0 (3 seeds, 95 % interval +12.0 to +12.0); ant-dir: yes, +17.0" in s[0]
    assert s[1].count(": yes") == 3
    assert s[2].count("no, the opposite, -3.0") == 3
    assert s[3].count("no, the opposite") == 3
    assert s[4].count(": yes") == 3
    assert s[6].count("no clear difference, +0.0") == 3


def test_only_common_seeds_are_compared(tmp_home):
    text = said(
        cmt.meta_verdict,
        "meta",
        value=lambda r, seed, i: 100.0 * seed + 5 * (r.method == GIVEN),
        keep=lambda r, seed: seed != (0 if r.method == GIVEN else 2),
    )
    expected = "cheetah-vel: no clear difference, +5.0 (1 seed, one seed decides nothing)"
    assert expected in text.split("\n")[0]


PROMPTS = {"Prompt towards the best 10 %": 3, "Prompt on shuffled trajectories": -4, "Prompt a map, the best 10 %": 3}


def prompted(r, seed):
    "A score that some prompts change by known amounts."
    return 40 + seed + PROMPTS.get(r.method, 0)


def test_verdicts_on_single_tasks(tmp_home):
    s = said(cmt.single_verdict, "single", score=prompted).split("\n")
    assert len(s) == 15
    assert s[0].startswith(
        "Is 'Prompt towards the best 10 %' above 'Random frozen prompt'? Yes: 'Prompt towards the best 10 %'"
        " minus 'Random frozen prompt' is +3.0 over 9 datasets, 3 seeds"
    )
    assert "is +7.0" in s[2]
    assert s[5].startswith("Is 'Prompt by advantage' above 'Random frozen prompt'? No clear difference")


def test_verdicts_on_games(tmp_home):
    s = said(cmt.skirmish_verdict, "skirmish", score=prompted).split("\n")
    assert len(s) == 9
    assert "is +3.0 over 15 datasets" in s[3]
    assert "? No clear difference" in s[6]
