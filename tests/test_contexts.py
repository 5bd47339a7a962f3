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
from promptnb.tasks import facts, family

EXHIBITS = [e for e in rc.exhibits("cmt") if not e.unknown]
TABLES = ("table", "scores", "wins")
FAMILIES = {name: family(name) for name in ("cheetah-dir", "cheetah-vel", "ant-dir")}
TEST = {name: fam.test for name, fam in FAMILIES.items()}
GOALS = {name: fam.goals for name, fam in FAMILIES.items()}


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
    ids = [*FAMILIES[family].train, *test]
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
            seconds=1,
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


def said(id, **made):
    "The answers to an exhibit's questions on made-up records, one line each."
    fabricate(id, **made)
    return cmt.verdict(seen(id)).split("\n")


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
        files = {p.suffix[1:] for p in (tmp_home / "figures/yours/cmt/laptop").glob(f"{e.id}.*")}
        assert files == set("csv md tex".split() if e.kind in TABLES else "csv pdf png txt".split()), e.id


def test_missing_runs_are_refused_unless_partial(tmp_home):
    for e in EXHIBITS:
        with pytest.raises(PromptnbError, match=f"promptnb run cmt --exhibit {e.id}"):
            drawn(e, partial=False)


@pytest.mark.parametrize("id", ["adaptation", "range", "length"])
def test_a_panel_names_methods_without_runs(tmp_home, id):
    absent = {"adaptation": BOUND, "range": NULL, "length": "Random frozen prompt"}[id]
    fabricate(id, keep=lambda r, seed: not r.method.startswith(absent))
    shown, _ = exhibits.page_of(exhibit(id)).DRAW[id](seen(id))
    assert f"no run: {absent}" in text_of(shown).replace("\n", " ")


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
    for p in (tmp_home / "figures/yours/cmt/laptop").iterdir():
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
    assert "published" in tables.printed(t).to_string()
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


def test_episode_0_is_not_the_null_prompts_level(tmp_home):
    fabricate("adaptation", seeds=(0,))
    assert "one policy with one prompt in different episodes" in cmt.left_out(seen("adaptation"))


def test_a_rise_over_episodes_is_said(tmp_home):
    rise = said("adaptation", episode=lambda k, seed, i: (10 + seed / 10) * k)[0]
    assert "cheetah-vel: better, +40.4 [39.4, 41.4], n = 3" in rise


def test_a_fall_over_episodes_is_said(tmp_home):
    assert "ant-dir: worse, -4.0" in said("adaptation", episode=lambda k, seed, i: -1.0 * k)[0]


def test_seeds_that_disagree_are_not_resolved(tmp_home):
    assert "not resolved (n = 3" in said("adaptation", episode=lambda k, seed, i: k * (seed - 1.0))[0]


# ---- questions


@pytest.mark.parametrize("id", cmt.ANSWERS)
def test_without_runs_there_is_no_answer(tmp_home, id):
    questions = cmt.questions_of(seen(id))
    lines = cmt.verdict(seen(id)).split("\n")
    assert lines == [f"{q.text} no runs yet." for q in questions]


@pytest.mark.parametrize("id", cmt.ANSWERS)
def test_one_seed_decides_nothing(tmp_home, id):
    made = dict(value=lambda r, seed, i: 100.0 * (r.key == "cmt"), score=lambda r, seed: len(r.method))
    fabricate(id, seeds=(0,), **made)
    assert set(cmt.answers(seen(id)).verdict) == {"not tested"}


def test_answers_of_an_exhibit_are_corrected_together(tmp_home):
    fabricate("meta", value=lambda r, seed, i: 10.0 * (r.method == GIVEN) + seed * (1 + (r.method == GIVEN)))
    v = cmt.answers(seen("meta"))
    assert len(v) == len(cmt.META) * 3
    assert (v.p_holm >= v.p).all()
    assert v[(v.p > 0) & (v.p < 0.05)].p_holm.gt(v.p).any()


def test_nothing_is_unseen_on_cheetah_dir(tmp_home):
    assert cmt.place("cheetah-dir") == "cheetah-dir (train tasks)"
    assert "unseen" not in " ".join(said("meta") + said("adaptation")).split("cheetah-vel")[0]


def test_what_was_found(tmp_home):
    fabricate("length", score=lambda r, seed: dict(r.tune.hyper)["L"] + seed / 10)
    views = [seen("length")]
    assert cmt.found(views).iloc[0].to_dict() == {
        "comparisons": 3,
        "better": 2,
        "worse": 0,
        "not resolved": 1,
        "not tested": 0,
    }
    assert "'L = 20' against 'L = 1', hopper medium, 'Random frozen prompt': better, +19.0" in cmt.resolved(views)


# ---- where contexts lie


@pytest.mark.parametrize("sign", [1, -1])
def test_contexts_in_the_order_of_their_goals(sign):
    o = cmt.order(look("cheetah-vel", lambda g: (sign * g, 0 * g, 0 * g)), "cheetah-vel")
    assert [o["order_all"], o["order_unseen"]] == pytest.approx([1, 1])
    assert (o["tasks"], o["unseen"]) == (40, 5)
    assert 0 < o["chance"] < 0.2


def test_contexts_in_order_along_a_bent_curve_are_in_order():
    "The first component alone would say that they are not."
    o = cmt.order(look("cheetah-vel", lambda g: (np.sin(g), np.cos(g), 0 * g)), "cheetah-vel")
    assert o["order_all"] > 0.9 and o["order_unseen"] > 0.9


def test_contexts_on_a_circle_as_their_goals():
    o = cmt.order(look("ant-dir", on_circle), "ant-dir")
    assert [o["order_all"], o["order_unseen"]] == pytest.approx([1, 1])
    assert o["chance"] < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_contexts_have_rank_correlation_0(seed):
    o = cmt.order(look("cheetah-vel", goals=shuffled("cheetah-vel", seed)), "cheetah-vel")
    assert abs(o["order_all"]) < 0.3
    assert abs(cmt.order(look("ant-dir", on_circle, shuffled("ant-dir", seed)), "ant-dir")["order_all"]) < 0.15


def test_unseen_tasks_among_the_wrong_neighbours_are_not_in_order():
    x = look("cheetah-vel")
    z = np.array(x["embedding"])
    z[-5:] = z[-5:][::-1]
    o = cmt.order(dict(x, embedding=z.tolist()), "cheetah-vel")
    assert o["order_unseen"] < 0.3 < 0.7 < o["order_all"]


def test_angles_are_on_a_circle():
    a = cmt.apart(np.array([0.1, 2 * np.pi - 0.1, np.pi]), True)
    assert a[0, 1] == pytest.approx(0.2) == a[1, 0]
    assert a[0, 2] == pytest.approx(np.pi - 0.1)
    assert (a.diagonal() == 0).all()


def test_speeds_are_on_a_line():
    assert cmt.apart(np.array([0.1, 6.0]), False)[0, 1] == pytest.approx(5.9)


def test_of_two_goals_none_is_unseen():
    o = cmt.order(look("cheetah-dir"), "cheetah-dir")
    assert o["order_all"] > 0.8 and np.isnan(o["order_unseen"])
    assert (o["tasks"], o["unseen"]) == (4, 0)


def test_the_order_in_words(tmp_home):
    lines = said("embedding")
    assert "cheetah-vel: better, +1.0" in lines[0]
    assert not any("cheetah-dir" in line for line in lines)  # two goals have no order


def test_an_order_in_some_seeds_only_is_not_resolved(tmp_home):
    def ordered_in_seed_0(r, seed):
        return look(r.family, place_of(r.family), shuffled(r.family, seed) if seed else None)

    assert "cheetah-vel: not resolved (n = 3" in said("embedding", looks=ordered_in_seed_0)[0]


def test_the_order_as_a_table(tmp_home):
    fabricate("embedding")
    t = cmt.order_table(seen("embedding"))
    assert t.loc["cheetah-vel", ["all tasks", "pairs with an unseen one"]].tolist() == ["1.00 (1.00 to 1.00)"] * 2
    assert t.loc["cheetah-dir", "pairs with an unseen one"] == "none is unseen"
    assert len(t.columns) <= 6


def test_only_unseen_tasks_are_ringed(tmp_home):
    fabricate("embedding", seeds=(0,))
    fig, _ = cmt.embedding(seen("embedding"))
    close(fig)
    ringed = [len(ax.get_legend_handles_labels()[1]) for ax in fig.axes[:3]]
    assert ringed == [0, 1, 1]


# ---- the goal range


@pytest.fixture
def ranged(tmp_home):
    "Numbers of the goal range, where a method returns its task's id, and its seed more."
    fabricate("range", value=lambda r, seed, i: i + seed)
    fig, n = cmt.along(whole("range"))
    close(fig)
    return n


def test_numbers_along_the_goals(ranged):
    a = ranged[ranged.label == "Prompt-DT, middle goals"].set_index("task_id")
    assert a.loc[20, ["mean", "min", "max", "count"]].tolist() == [21, 20, 22, 3]
    assert len(ranged) == 5 * 40


def test_goals_are_trained_on_between_or_outside(ranged):
    a = ranged[ranged.label == "Prompt-DT, middle goals"].set_index("task_id")
    assert a.goal[39] == pytest.approx(3)
    parts = [a.part[i] for i in (9, 10, 15, 29, 30)]
    assert parts == ["outside", "trained", "between", "trained", "outside"]
    assert ranged[ranged.label == NULL].groupby("part").size().to_dict() == dict(trained=35, between=5)


def test_means_of_the_parts(ranged):
    p = cmt.parts(seen("range"))
    assert p.loc[GIVEN, "unseen, between"].split("\n") == ["15.6 ± 1.0", "n = 3 [13.1, 18.1]", "5 goals"]
    assert p.loc[GIVEN, "unseen, outside"] == ""
    assert "20 goals" in p.loc["Prompt-DT, middle goals", "unseen, outside"]


def test_answers_about_the_goal_range(tmp_home):
    def value(r, seed, i):
        return i + seed / 10 - (20 + seed) * (r.method == cmt.MIDDLE and not 10 <= i < 30)

    lines = said("range", value=value)
    assert "5 goals inside: not resolved" in lines[0]
    assert "18 goals outside: worse, -21.0" in lines[3]


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


def test_numbers_of_single_tasks(single):
    r = line_of(cmt.scores(single)[1], "hopper medium", "No prompt")
    assert r[["mean", "n", "trainable", "total"]].tolist() == pytest.approx([21, 3, 640, 1000])


def test_margins_of_single_tasks_name_their_data_sets(single):
    t = cmt.scores(single)[1]
    assert line_of(t, "mean mean", "LoRA")["mean"] == pytest.approx(4 + 2 + 10 / 3)
    assert line_of(t, "hopper mean", "LoRA").source == "mean over hopper medium, medium-replay, medium-expert"
    over = "mean over hopper medium; halfcheetah medium; walker2d medium"
    assert line_of(t, "mean medium", "LoRA").source == over


def test_printed_single_tasks(single):
    p = cmt.scores(single)[0]
    assert list(p.columns) == ["medium", "medium-replay", "medium-expert", "mean"]
    assert p.loc[("hopper", "No prompt"), "medium"].split("\n") == ["21.0 ± 2.6", "n = 3 [14.4, 27.6]"]
    assert len(p) == 4 * 8


def test_a_mean_needs_all_its_data_sets(tmp_home):
    fabricate("single", keep=lambda r, seed: r.family != "hopper" or r.method != "LoRA")
    p = cmt.scores(seen("single"))[0]
    assert p.loc[("mean", "LoRA"), "medium"] == "1 of 3 data sets missing"
    assert p.loc[("hopper", "LoRA"), "medium"] == "3 missing"


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
    assert r[["mean", "n", "total"]].tolist() == pytest.approx([52, 3, 1000])
    assert r[["return", "return_std", "length", "length_std"]].tolist() == pytest.approx([1.1, 0.1, 41, 1])


def test_printed_games_won(won):
    x = won[0].loc["smax-3m"]
    assert list(x.columns) == ["good", "medium", "poor", "mean"]
    assert x.loc["LoRA", "good"].split("\n")[0] == "52.0 ± 2.6"
    assert x.loc["random actions"].tolist() == ["10.0"] * 4
    assert x.loc["policy that made the data", "good"] == "60.0"


def test_the_mean_of_games_won(won):
    m = line_of(won[1], "mean mean", "LoRA")
    assert m["mean"] == pytest.approx(56) and np.isnan(m["return"])


@pytest.fixture
def lacking(tmp_home):
    "Games where two seeds of LoRA are missing and all of 'No prompt' have failed."
    fabricate("skirmish", keep=lambda r, seed: seed < (1 if r.method == "LoRA" else 3))
    fabricate("skirmish", keep=lambda r, seed: r.method == "No prompt", status="failed")


def test_missing_and_failed_games_are_refused(lacking):
    with pytest.raises(PromptnbError, match="lacks"):
        cmt.wins(whole("skirmish"))


def test_missing_and_failed_games_are_shown(lacking):
    p = cmt.wins(seen("skirmish"))[0].loc["smax-8m"]
    assert p.loc["LoRA", "poor"].split("\n") == ["50.0", "n = 1", "2 missing"]
    assert p.loc["No prompt", "poor"] == "3 failed"


WON = dict(good=lambda k: 30 + k, medium=lambda k: 9 + k, poor=lambda k: 1 + k)  # percent by seed; random: 10


def test_against_random_actions(tmp_home):
    first = said("skirmish", score=lambda r, seed: WON[r.dataset.split()[1]](seed))[0]
    assert "good data, 5 maps: better, +21.0" in first
    assert "medium data, 5 maps: not resolved (n = 3, difference +0.0" in first
    assert "poor data, 5 maps: worse, -8.0" in first


def test_random_actions_are_compared_as_a_constant(tmp_home):
    fabricate("skirmish", score=lambda r, seed: 20.0 + seed)
    v = cmt.answers(seen("skirmish")).iloc[0]
    assert [v.lo, v.hi] == pytest.approx(
        [11 - 2.484, 11 + 2.484], abs=1e-3
    )  # Student's interval of 20, 21, 22 minus 10


def test_no_floor_no_sentence(tmp_home):
    fabricate("skirmish", floor=None, seeds=(0,))
    assert "random actions" not in set(cmt.answers(seen("skirmish")).against)
    assert "random actions" not in cmt.wins(seen("skirmish"))[0].index.get_level_values(1)


# ---- answers


GAIN = {GIVEN: lambda seed: 12, WRONG: lambda seed: 2 * seed - 2, BOUND: lambda seed: 20, COLLECTED: lambda seed: -3}


def test_answers_on_test_tasks(tmp_home):
    def value(r, seed, i):
        gain = GAIN.get(r.method, lambda seed: 0)(seed)
        return 10 * seed + i + gain + 5 * (r.method == GIVEN and r.family == "ant-dir")

    s = said("meta", value=value)
    assert "cheetah-vel: better, +12.0 [12.0, 12.0], n = 3; ant-dir: better, +17.0" in s[0]
    assert s[1].count("not resolved (n = 3, difference +12.0 ± 5.0)") == 2  # among 24 comparisons
    assert s[2].count("worse, -3.0") == 3
    assert s[6].count("not resolved (n = 3, difference +0.0") == 3


def test_only_common_seeds_are_compared(tmp_home):
    first = said(
        "meta",
        value=lambda r, seed, i: 100.0 * seed + 5 * (r.method == GIVEN),
        keep=lambda r, seed: seed != (0 if r.method == GIVEN else 2),
    )[0]
    assert "cheetah-vel: not tested (n = 1, difference +5.0)" in first


def test_answers_about_a_switch(tmp_home):
    lines = said("ablation", value=lambda r, seed, i: i + seed + 5.0 * (r.key == "cmt-no-infonce"))
    found = [line for line in lines if ": better" in line]
    assert found == ["'no InfoNCE': above 'CMT'? cheetah-vel: better, +5.0 [5.0, 5.0], n = 3."]


PROMPTS = {"Prompt towards the best 10 %": 3, "Prompt on shuffled trajectories": -4, "Prompt a map, the best 10 %": 3}


def prompted(r, seed):
    "A score that some prompts change by known amounts."
    return 40 + seed + PROMPTS.get(r.method, 0)


def test_answers_on_single_tasks(tmp_home):
    s = said("single", score=prompted)
    assert "9 data sets: better, +3.0" in s[0] and "better, +7.0" in s[2]
    assert "not resolved" in s[3]


def test_answers_on_games(tmp_home):
    s = said("skirmish", score=prompted)
    assert "15 data sets: better, +3.0" in s[1]
    assert "15 data sets: worse, -3.0" in s[5]  # a prompt for each agent against one for the map
