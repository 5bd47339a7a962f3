"Exhibits of guided agents, against numbers worked out by hand on made-up records."

import json
import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.pyplot import close

from promptnb import recipes as rc
from promptnb.core import PromptnbError, code_fingerprint
from promptnb.report import exhibits, rladapter
from promptnb.report.rladapter import ADAPTER, CONSTANT, DECISION, GOALS, PPO, RANDOM, RULES, UNTUNED
from promptnb.report.style import LOOKS, style
from promptnb.report.tables import short
from promptnb.report.view import View, recipe_file, reported

EXHIBITS = [e for e in rc.exhibits("rladapter") if not e.unknown]
HERE = [e for e in EXHIBITS if rc.recipes_of(e, "laptop")]
TABLES = ("scoreboard", "grid", "examples", "behaviour", "cost", "contrast", "benchmark", "prompts", "settings")
GUIDE = dict(
    step=4096,
    env=0,
    seen=["grass", "tree"],
    status=dict(health=9, food=4),
    goals=["collect wood"],
    reply="collect wood",
    analysis="Wood first.",
    l=0.31,
    l_after=0.42,
    unlocked_after=["collect_wood"],
    done=[["do", 22], ["noop", 9]],
    why="",
)
STEPS = rc.resolve(rc.RECIPES["rladapter/crafter/adapter"], "laptop").online.steps
BUDGET = short(STEPS)
COST = dict(queries=1000, calls=400, cached=600, tokens_in=80_000, tokens_out=12_000, llm_seconds=60)
COST |= dict(seconds=300, invalid=7, rejected=3, failed=1, kept=2)


def exhibit(id):
    "An exhibit of RLAdapter."
    return exhibits.exhibit("rladapter", id)


def view(id, seeds=None):
    "It at laptop scale, whatever runs there are."
    return View(exhibit(id), "laptop", seeds, partial=True)


# ---- made-up records


class Made:
    "What the agents of an exhibit did; a test says what differs."

    def __init__(self, score=None, rate=None, behave=None, comprehend=None, sft=None, guides=(GUIDE,), status="ok"):
        self.score = score or (lambda label, seed: 2.0 + seed)
        self.rate = rate or (lambda achievement, seed: 10.0)
        self.behave = behave or (lambda label, seed: (40.0, 100))
        self.comprehend = comprehend or (lambda label, seed, part: 0.3 + part / 10)
        self.sft = sft or (lambda seed: (2.0, 1.0 + seed / 10))
        self.guides, self.status = guides, status

    def metrics(self, r, seed):
        "(metric, value, number of episodes, share of the training steps) of a run."
        x = self.score(r.method, seed)
        percent, chances = self.behave(r.method, seed)
        yield from (("score", x, 500, 1), ("score_last", x + 1, 500, 1), ("return", x / 2, 500, 1))
        yield from (("depth", 1.5, 500, 1), ("eval_score", x - 1, 32, 1))
        yield "behaviour/sleeps when tired", percent, chances, 1
        for achievement in ("collect_wood", "eat_cow"):
            yield f"success/{achievement}", self.rate(achievement, seed), 500, 1
        for metric in ("score_along", "return_along"):
            for k in (1, 2, 3, 4):
                yield metric, k * x, 500, k / 4
        for metric, value in COST.items():
            yield metric, value, 500, 1
        if r.online.guide != "off":
            for part in (0.25, 1):
                yield "comprehension", self.comprehend(r.method, seed, part), 500, part

    def rows(self, r, seed, name):
        "Rows of a run."
        known = dict(paper="rladapter", task="crafter", task_id=0, method=r.method, seed=seed, scale="laptop")
        known |= dict(trainable=800, env_steps=r.online.steps, run_id=name)
        for metric, value, n, part in self.metrics(r, seed):
            value = None if value is None else float(value)
            yield dict(known, metric=metric, value=value, n_episodes=n, step=int(part * r.online.steps))

    def record(self, r, seed, name):
        "The record of a run."
        before, after = self.sft(seed)
        tuning = dict(stage=1, rows=90, steps=22, loss_before=before, loss_after=after, seconds=4, targets="own")
        return dict(
            run_id=name,
            status=self.status,
            why="",
            recipe_digest=rc.digest(r),
            code=dict(modules=["core"], fingerprint=code_fingerprint("core")),
            facts="",
            rows=list(self.rows(r, seed, name)) if self.status == "ok" else [],
            guides=list(self.guides),
            counts=dict(total=1000, trainable=800),
            spent={},
            seconds=COST["seconds"],
            sft=[tuning] if r.method == ADAPTER else [],
        )


def fabricate(id, seeds=(0, 1, 2), keep=lambda label, seed: True, **made):
    "Write the records of an exhibit as if it had been run."
    made = Made(**made)
    for r in (rc.resolve(r, "laptop") for r in rc.recipes_of(exhibit(id), "laptop")):
        for seed in seeds:
            if keep(r.method, seed):
                path = recipe_file(r, "laptop", seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(made.record(r, seed, path.stem)))


def drawn(id, seeds=None, partial=True):
    "(what is shown, its numbers) of an exhibit; figures are closed."
    e = exhibit(id)
    shown, numbers = rladapter.DRAW[e.kind](View(e, "laptop", seeds, partial=partial))
    if isinstance(shown, Figure):
        shown.canvas.draw()
        close(shown)
    return shown, numbers


def said(verdict, id, **kw):
    "A verdict on made-up records."
    fabricate(id, **kw)
    return verdict(view(id))


def line_of(text, start):
    "The line of a text that begins so."
    return next(line for line in text.split("\n") if line.startswith(start))


# ---- drawing


@pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)
@pytest.mark.parametrize("records", ["none", "some", "all"])
def test_every_kind_draws(tmp_home, e, records):
    if records != "none":
        fabricate(e.id, seeds=(0, 1), keep=lambda label, seed: records == "all" or (len(label) + seed) % 3)
    shown, numbers = drawn(e.id)
    assert isinstance(shown, (pd.DataFrame, Figure)) and isinstance(numbers, pd.DataFrame)
    assert len(numbers) or records != "all" or e not in HERE


@pytest.mark.parametrize("records", [False, True], ids=["blank", "made"])
def test_made_exhibits_leave_their_files(tmp_home, records):
    for e in EXHIBITS:
        if records:
            fabricate(e.id, seeds=(0,))
        shown = exhibits.make(View(e, "laptop", partial=True))
        if isinstance(shown, Figure):
            close(shown)
        files = {p.suffix[1:] for p in (tmp_home / "figures/yours/rladapter/laptop").glob(f"{e.id}.*")}
        assert files == set("csv md tex".split() if e.kind in TABLES else "csv pdf png txt".split()), e.id


@pytest.mark.parametrize("e", HERE, ids=lambda e: e.id)
def test_missing_runs_are_refused_unless_partial(tmp_home, e):
    with pytest.raises(PromptnbError, match=f"promptnb run rladapter --exhibit {e.id}"):
        drawn(e.id, partial=False)


def test_a_page_draws_its_own_paper_alone():
    assert all(exhibits.page_of(e) is rladapter for e in EXHIBITS)
    others = [e for e in rc.EXHIBITS.values() if e.paper != "rladapter" and not e.unknown]
    assert not any(exhibits.page_of(e) is rladapter for e in others)


def test_every_kind_says_how_to_read_it():
    assert {e.kind for e in EXHIBITS} <= set(rladapter.DRAW) == set(rladapter.READ)


def test_every_figure_says_what_its_bands_are():
    assert set(rladapter.BAND) == set(rladapter.DRAW) - set(TABLES)


@pytest.mark.parametrize("e", [e for e in HERE if e.kind in TABLES], ids=lambda e: e.id)
def test_printed_tables_have_at_most_six_columns(tmp_home, e):
    fabricate(e.id)
    printed, _ = drawn(e.id)
    assert printed.index.nlevels + printed.shape[1] <= 6


@pytest.mark.parametrize("e", EXHIBITS, ids=lambda e: e.id)
def test_arms_are_told_apart(e):
    arms = rladapter.arms_of(e)
    assert set(arms) <= set(LOOKS)
    if e.kind in ("success", "along", "comprehension"):
        assert len({style(arm)["color"] for arm in arms}) == len(arms)


def test_no_two_arms_look_the_same():
    looks = [LOOKS[arm] for arm in rladapter.ARMS]
    assert len(set(looks)) >= len(looks) - 1  # 'no SFT' looks as the arm that it is


# ---- the scoreboard


OURS, PUBLISHED = "ours, laptop scale", "published, other protocols"


def test_numbers_of_the_scoreboard(tmp_home):
    fabricate("main", score=lambda label, seed: (1, 2, 6)[seed] + (label == PPO))
    t = drawn("main")[1].query("kind == 'ours' and method == @PPO").set_index("metric")
    assert t["mean"][["score", "score_last", "return", "depth", "eval_score"]].tolist() == [4, 5, 2, 1.5, 3]
    score = t.loc["score"]
    half = 4.302653 * np.std([2, 3, 7], ddof=1) / 3**0.5  # Student's for three seeds
    assert [score.n, score.iqm, score.lo, score.hi] == pytest.approx([3, 4, 4 - half, 4 + half])
    assert score["std"] == pytest.approx(np.std([2, 3, 7], ddof=1))
    assert (score.env_steps, score.note) == (BUDGET, "")


def test_a_missing_seed_is_said_in_the_scoreboard(tmp_home):
    fabricate("main", keep=lambda label, seed: (label, seed) != (RULES, 1))
    printed, t = drawn("main")
    r = t.query("kind == 'ours' and metric == 'score'").set_index("method").loc[RULES]
    assert (r.note, r.n) == ("1 missing", 2)
    assert printed.loc[OURS, f"{RULES}, {BUDGET} steps"].score.endswith("\n1 missing")


def test_printed_line_of_the_scoreboard(tmp_home):
    fabricate("main", score=lambda label, seed: (1, 2, 6)[seed] + (label == PPO))
    line = drawn("main")[0].loc[OURS, f"{PPO}, {BUDGET} steps"]
    assert line["score"] == "4.00 ± 2.65\nn = 3 [-2.57, 10.57]"


def test_every_published_number_stands_in_the_table(tmp_home):
    rep, (printed, t) = reported("rladapter"), drawn("main")
    text, letter = printed.loc[PUBLISHED], rladapter.letters(t)

    def one(x):
        return f"{x:.1f}" if round(x, 1) == x else f"{x:g}"

    assert text.index.is_unique
    for _, r in rep[rep.exhibit.isin(["scoreboard", "scoreboard_reward"])].iterrows():
        line = text.loc[f"{r.method}, " + ("no training" if r.steps == "none" else f"{r.steps} steps")]
        lines = line["score" if r.exhibit == "scoreboard" else "mean return"].split("\n")
        mine = next(x for x in lines if x.startswith(f"{one(r.value)} ± {one(r['std'])} ("))
        assert letter[r.source] in mine.split("(")[1], r.method


def test_sources_that_disagree_are_both_printed(tmp_home):
    text = drawn("main")[0].loc[PUBLISHED]
    assert text.loc["Rainbow, 1M steps", "mean return"] == "single episodes:\n6.0 ± 1.3 (d)\n5.0 ± 1.3 (a)"
    assert text.score["AdaRefiner (GPT-4), 1M steps"] == "15.8 ± 1.4 (a, b, c)"


def test_published_methods_stand_apart(tmp_home):
    fabricate("main")
    printed, t = drawn("main")
    theirs = t[t.kind == "published"]
    assert theirs.other_protocol.notna().all() and "difference" not in t
    assert not printed.loc[PUBLISHED].isin(printed.loc[OURS].score).any(axis=None)
    assert "Published under another protocol" in exhibits.caption(view("main"), t)


def test_the_caption_names_the_sources_of_the_letters(tmp_home):
    _, t = drawn("main")
    text = exhibits.caption(view("main"), t)
    assert all(f"({letter}) {source}" in text for source, letter in rladapter.letters(t).items())


def test_only_known_numbers_are_reported():
    rep = reported("rladapter")
    scores = rep[rep.method.str.startswith("AdaRefiner") & (rep.exhibit == "scoreboard")]
    assert set(scores.value) == {15.8, 28.2, 23.4}
    assert not rep.method.str.contains("RLAdapter").any()
    assert rep.value.notna().all() and rep.source.notna().all()
    assert rep.groupby(["exhibit", "method", "family", "steps", "source"]).size().max() == 1


def test_the_benchmark_s_own_runs_are_reported_in_full():
    rep = reported("rladapter")
    assert set(rep[rep.exhibit == "success"].groupby("method").size()) == {22}
    recomputed = rep[rep.exhibit == "recomputed_score"].set_index("method").value.to_dict()
    assert recomputed == {"Random": 1.55, "Human experts": 50.53}


def test_the_caption_says_what_the_published_rewards_are(tmp_home):
    assert "rewards of single episodes" in exhibits.caption(view("main"), drawn("main")[1])


# ---- rates


def test_a_rate_is_a_mean_over_seeds(tmp_home):
    fabricate("success", rate=lambda achievement, seed: 10.0 * seed if achievement == "eat_cow" else 0.0)
    t = drawn("success")[1]
    r = t[(t.label == PPO) & (t.name == "eat_cow")].iloc[0]
    assert r[["percent", "std", "min", "max", "n", "chances"]].tolist() == [10, 10, 0, 20, 3, 1500]
    half = 4.302653 * 10 / 3**0.5
    assert [r.lo, r.hi] == pytest.approx([10 - half, 10 + half])


def test_a_rate_without_a_chance_has_no_value(tmp_home):
    fabricate("behaviour", behave=lambda label, seed: (None, 0))
    t = rladapter.rates(view("behaviour"), "behaviour")
    assert t[["percent", "lo", "hi", "min", "max"]].isna().all(axis=None) and not t.n.any()


def test_published_rates_stand_beside_ours(tmp_home):
    t = drawn("success")[1]
    human = t[t.label == "Human experts, published"].set_index("name").percent
    assert len(human) == 22 and human["collect_diamond"] == 12


def test_achievements_go_from_easy_to_hard():
    rep = reported("rladapter")
    names = rladapter.easiest_first(rep[rep.exhibit == "success"].family.unique(), rep)
    assert names[:3] == ["wake_up", "collect_sapling", "place_plant"] and names[-1] == "collect_diamond"
    assert len(names) == 22


# ---- along, grid


def test_numbers_of_the_curve(tmp_home):
    fabricate("curve")
    t = drawn("curve")[1]
    d = t[(t.label == PPO) & (t.metric == "score_along")]
    assert d.step.tolist() == [k * STEPS // 4 for k in (1, 2, 3, 4)]
    assert d["mean"].tolist() == [3, 6, 9, 12]
    assert (d["min"].iloc[0], d["max"].iloc[-1], set(d["count"])) == (2, 16, {3})


def titles(id):
    "The titles of a figure's panels."
    shown, _ = drawn(id)
    return [ax.get_title().replace("\n", " ") for ax in shown.axes if ax.get_visible()]


def test_each_guided_arm_has_a_panel_of_its_own(tmp_home):
    fabricate("curve")
    guided = [rladapter.title(arm, 99) for arm in rladapter.MAIN if arm not in (PPO, RANDOM)]
    assert titles("curve") == 2 * guided


def test_success_has_a_panel_for_each_arm_and_one_for_published_rates(tmp_home):
    fabricate("success")
    assert titles("success") == [rladapter.title(arm, 99) for arm in rladapter.MAIN if arm != PPO] + ["published"]


def test_a_panel_without_a_run_says_so(tmp_home):
    fabricate("curve", keep=lambda label, seed: label != RULES)
    shown, _ = drawn("curve")
    empty = [ax.get_title() for ax in shown.axes if "no runs yet" in [text.get_text() for text in ax.texts]]
    assert empty == 2 * ["rule advisor"]


def test_the_curve_shows_the_published_random_agent(tmp_home):
    fabricate("curve")
    t = drawn("curve")[1]
    floor = t[t.label == "Random, published"].set_index("metric")["mean"].to_dict()
    assert floor == dict(score_along=1.55, return_along=1.377)


GAIN = {"K = 10": lambda s: 3, "as released": lambda s: -2, "K = 50": lambda s: 2 * s - 1}


@pytest.fixture
def ablation(tmp_home):
    "The ablation, where three switches change the score by known amounts: (printed, tidy)."
    fabricate(
        "ablation",
        score=lambda label, seed: 5 + seed**2 + GAIN.get(label, lambda s: 0)(seed),
        keep=lambda label, seed: label != "K = 500" and (label, seed) != ("SFT on gains", 0),
    )
    printed, t = drawn("ablation", seeds=(0, 1, 2))
    return printed, t.set_index("method")


def test_numbers_of_the_ablation(ablation):
    _, t = ablation
    full, plain = (t[(t.kind == "difference") & (t.against == base)] for base in (ADAPTER, PPO))
    assert full.loc["K = 10", ["difference", "n", "verdict"]].tolist() == [3, 3, "better"]
    assert plain.loc["as released", ["difference", "verdict"]].tolist() == [-2, "worse"]
    assert full.loc["K = 50", "verdict"] == "not resolved"
    score = t[t.metric == "score"]
    assert score.loc[score.kind == "ours", ["n", "note"]].loc["SFT on gains"].tolist() == [2, "1 missing"]


def test_the_ablation_compares_switches_alone(ablation):
    _, t = ablation
    compared = set(t[t.kind == "difference"].index)
    assert UNTUNED in compared and not compared & {*rladapter.MAIN} - {UNTUNED}


def test_printed_ablation(ablation):
    printed, _ = ablation
    column = rladapter.MINUS[ADAPTER]
    assert printed.loc["K = 10", column] == "+3.00 [3.00, 3.00]\nbetter, n = 3"
    assert printed.loc[ADAPTER, column] == ""
    assert printed.loc["K = 500", "score"] == "3 missing"


def test_the_ablation_in_words(ablation):
    s = rladapter.ablation_verdict(view("ablation", seeds=(0, 1, 2)))
    first = line_of(s, f"Against '{ADAPTER}'")
    assert "better: 'K = 10' +3.00" in first and "worse: 'as released' -2.00" in first and "'K = 50' +1.00" in first
    assert "'PPO'" not in first and s.endswith("comparisons)")


def test_two_seeds_resolve_nothing_in_the_ablation(tmp_home):
    s = said(rladapter.ablation_verdict, "ablation", seeds=(0, 1), score=lambda label, seed: len(label))
    assert "not resolved: " in s and "better" not in s and "worse" not in s


# ---- text of language models is never trusted

EVIL = (
    "a | b\n| c |",
    "<script>alert(1)</script>",
    "![x](http://evil.example/a.png)",
    "[click](javascript:x)",
    "`rm -rf`",
    "=cmd()",
    "\x1b[31mred\x07",
    "\u202eabc",
    "\uff4a\u0430vascript",  # letters that only look like ours
    "$x_1$ \\input{a} & % #",
    "x" * 1_000_000,
    "",
    7,
    None,
)


@pytest.mark.parametrize("n", range(len(EVIL)))
def test_text_becomes_plain(n):
    s = rladapter.plain(EVIL[n])
    assert len(s) <= 120
    assert not set(s) & set('|<>[]`=!\\$&#_{}@+*~^/\n\r\t"')
    assert s.replace("·", "").isascii() and s.isprintable()


@pytest.fixture
def evil_files(tmp_home):
    "The folder of a table of exchanges in which every text is hostile."
    guides = []
    for x in EVIL:
        text = str(x)
        said = dict(analysis=x, reply=x, goals=[text[:500]], why=text[:99], seen=[text[:99]])
        guides.append(dict(GUIDE, **said, status={"<b>|": "1|\n"}, unlocked_after=[text[:40]], done=[["|", 2]]))
    fabricate("guidance", guides=guides)
    exhibits.make(View(exhibit("guidance"), "laptop"))
    return tmp_home / "figures/yours/rladapter/laptop"


def test_a_table_of_exchanges_stays_a_markdown_table(evil_files):
    text = (evil_files / "guidance.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(EVIL) and {line.count("|") for line in lines} == {7}
    assert "<" not in "".join(lines).replace("<br>", "") and "://" not in text


def test_a_table_of_exchanges_stays_a_latex_table(evil_files):
    rows = [line for line in (evil_files / "guidance.tex").read_text().splitlines() if "&" in line]
    assert {line.count("&") for line in rows} == {5}


def test_a_table_of_exchanges_keeps_every_row(evil_files):
    assert len(pd.read_csv(evil_files / "guidance.csv")) == len(EVIL)


def test_numbers_of_an_exchange(tmp_home):
    fabricate("guidance", keep=lambda label, seed: seed > 0)
    assert drawn("guidance")[1].iloc[0].to_dict() == dict(
        step=4096,
        seed=1,
        seen="grass, tree",
        status="health 9, food 4",
        analysis="Wood first.",
        goals="collect wood",
        done="do 22, noop 9",
        unlocked="collect wood",
        l="0.31 to 0.42",
    )


def test_an_exchange_without_goals_says_why(tmp_home):
    fabricate("guidance", guides=[dict(GUIDE, goals=[], why="budget spent", l=None, unlocked_after=[])])
    row = drawn("guidance")[0].iloc[0]
    said = row[["sub-goals", "then did; unlocked", "l, before to after"]].tolist()
    assert said == ["none (budget spent)", "do 22, noop 9\nnothing", "0.42"]


# ---- comprehension and tuning

RISES = {RULES: 1, GOALS: -1}


def moving(label, seed, part):
    "A comprehension score that rises for one arm, falls for another, and goes with the seed for a third."
    return 0.4 + (seed - 1 if label == DECISION else RISES.get(label, 0)) * part / 10


def test_comprehension_in_words(tmp_home):
    s = said(rladapter.comprehension_verdict, "comprehension", comprehend=moving)
    assert "from 0.425 to 0.500: rises, +0.075 [0.075, 0.075], n = 3." in line_of(s, f"{RULES}:")
    assert "falls, -0.075" in line_of(s, f"{GOALS}:")
    assert "not resolved (n = 3, difference +0.00" in line_of(s, f"{DECISION}:")
    assert line_of(s, f"{CONSTANT}:").endswith("goes nowhere: 0.40 before and after in every seed.")


def tuning_line(before, after):
    "What is said of the adapter's tuning from losses `before` to `after` (one per seed)."
    s = said(rladapter.comprehension_verdict, "comprehension", sft=lambda seed: (before[seed], after[seed]))
    return line_of(s, f"{ADAPTER}, tuning").removeprefix(f"{ADAPTER}, tuning after stage 1: the adapter's loss ")


def test_tuning_in_words(tmp_home):
    line = tuning_line((2.0, 2.0, 2.0), (1.0, 1.02, 1.01))
    assert line == "goes from 2.00 to 1.01: falls, -0.99 [-1.01, -0.97], n = 3."


def test_a_small_change_of_the_loss_has_the_digits_that_show_it(tmp_home):
    line = tuning_line((0.24, 0.25, 0.26), (0.243, 0.252, 0.266))
    assert line == "goes from 0.2500 to 0.2537: not resolved (n = 3, difference +0.0037 ± 0.0052)."


def test_a_loss_that_stays_is_said_to_stay(tmp_home):
    assert tuning_line((0.24,) * 3, (0.24,) * 3) == "goes nowhere: 0.24 before and after in every seed."


def test_comprehension_and_tuning_are_judged_together(tmp_home):
    s = said(rladapter.comprehension_verdict, "comprehension")
    assert s.endswith("Holm's correction over 7 comparisons)")  # six arms and one tuning


def test_nothing_is_said_without_runs(tmp_home):
    assert rladapter.comprehension_verdict(view("comprehension")) == "no runs yet"


def test_numbers_of_the_tuning(tmp_home):
    fabricate("comprehension")
    t = drawn("comprehension")[1]
    s = t[t.metric == "sft"]
    assert set(s.label) == {ADAPTER} and PPO not in set(t.label)
    assert s.loss_before.tolist() == [2, 2, 2]
    assert s.loss_after.tolist() == pytest.approx([1, 1.1, 1.2])


def test_a_stage_that_was_not_tuned_is_said(tmp_home):
    sft = {0: (None, None), 1: (2.0, 1.0), 2: (2.0, 1.0)}
    s = said(rladapter.comprehension_verdict, "comprehension", sft=sft.get)
    assert "1 tuning not done: too few rows." in s and "not resolved (n = 2, difference -1.00" in s
    drawn("comprehension")


# ---- what the logs hold

HABIT, GOOD = ["survival", "sleep"], ["chop tree"]
LATE = STEPS // 8 - 9  # a step of one of 8 environments, in the last stage


def log(home, label, seed, *exchanges):
    "Keep a log of (step, goals) beside the record of a run."
    recipes = (rc.resolve(r, "laptop") for r in rc.recipes_of(exhibit("ablation"), "laptop"))
    path = next(recipe_file(r, "laptop", seed) for r in recipes if r.method == label)
    folder = home / "data" / "runs" / path.stem
    folder.mkdir(parents=True)
    path.write_text(json.dumps(dict(json.loads(path.read_text()), folder=str(folder.relative_to(home)))))
    lines = [dict(step=step, goals=goals, sentence=", ".join(goals)) for step, goals in exchanges]
    (folder / "exchanges.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def logged(tmp_home):
    "Logs of two adapters, one of them tuned out of its habit, and of an arm without an adapter."
    fabricate("ablation", keep=lambda label, seed: label in (ADAPTER, UNTUNED, RULES))
    early = [(0, HABIT), (9, HABIT), (50, HABIT), (99, GOOD)]
    log(tmp_home, ADAPTER, 0, *early, (LATE, GOOD), (LATE, GOOD))
    log(tmp_home, ADAPTER, 1, (0, GOOD), (9, GOOD), (LATE, HABIT), (LATE, GOOD))
    log(tmp_home, RULES, 0, (0, HABIT), (LATE, HABIT))
    log(tmp_home, UNTUNED, 0, (0, HABIT), (LATE, HABIT))
    return rladapter.words(view("ablation"), ["survival"])


def test_words_are_of_adapters_with_a_log(logged):
    assert list(logged.index) == [UNTUNED, ADAPTER] and logged.seeds.tolist() == [1, 2]


def test_share_of_the_habit_in_the_first_and_last_stage(logged):
    assert logged.loc[ADAPTER, "habit"].to_dict() == {"first stage": 37.5, "last stage": 25.0}
    assert logged.loc[UNTUNED, "habit"].to_dict() == {"first stage": 100.0, "last stage": 100.0}


def test_different_sentences_in_the_first_and_last_stage(logged):
    assert logged.loc[ADAPTER, "different"].to_dict() == {"first stage": 50.0, "last stage": 75.0}


def test_words_without_a_log_are_none(tmp_home):
    fabricate("ablation", keep=lambda label, seed: label == ADAPTER)
    assert rladapter.words(view("ablation"), ["survival"]).empty
    assert rladapter.words_verdict(view("ablation"), ["survival"]).startswith("no logs")


def test_the_habit_in_words(logged):
    s = rladapter.words_verdict(view("ablation"), ["survival"])
    assert "in 37.5 % of exchanges at first, in 25.0 % at last: not resolved (n = 2" in line_of(s, f"{ADAPTER}:")
    assert "not tested (n = 1" in line_of(s, f"{UNTUNED}:")


# ---- behaviour, cost

BEHAVED = {
    ADAPTER: lambda seed: (50.0 + seed, 100),
    GOALS: lambda seed: (None, 0),
    RULES: lambda seed: (None, 0) if seed == 0 else (30.0, 50),
    DECISION: lambda seed: (20.0 + seed / 10, 100),
}


@pytest.fixture
def behaviour(tmp_home):
    "Behaviours: the adapter's is shown more often than PPO's, the decision LM's less often: (printed, tidy)."
    fabricate("behaviour", behave=lambda label, seed: BEHAVED.get(label, lambda s: (40.0, 100))(seed))
    return drawn("behaviour")


def test_numbers_of_behaviours(behaviour):
    t = behaviour[1][behaviour[1].kind == "ours"].set_index("label")
    assert t.loc[ADAPTER, ["percent", "chances", "n"]].tolist() == [51, 300, 3]
    assert t.loc[RULES, ["percent", "chances", "n"]].tolist() == [30, 100, 2]
    assert t.loc[GOALS, "n"] == 0 and CONSTANT in t.index


def test_behaviours_against_ppo(behaviour):
    t = behaviour[1][behaviour[1].kind == "difference"].set_index("method")
    assert t.verdict.to_dict() == {RULES: "not resolved", DECISION: "worse", ADAPTER: "better"}
    assert t.loc[ADAPTER, ["difference", "n"]].tolist() == [11, 3]


def test_printed_behaviours_say_how_often_and_not_how_good(behaviour):
    row = behaviour[0].loc["sleeps when tired"]
    assert (row[GOALS], row[PPO]) == ("no chance", "40.0 ± 0.0\nof 300, n = 3")
    assert row[ADAPTER].startswith("51.0 ± 1.0\nof 300, n = 3\n+11.0") and row[ADAPTER].endswith("more often, n = 3")
    assert row[DECISION].endswith("less often, n = 3") and row[RULES].endswith("not resolved, n = 2")


def test_printed_behaviours_say_what_runs_lack(tmp_home):
    fabricate("behaviour", keep=lambda label, seed: (label, seed) != (RULES, 2))
    assert drawn("behaviour")[0].loc["runs lacking", RULES] == "1 missing"


def test_behaviours_in_words(behaviour):
    s = rladapter.behaviour_verdict(view("behaviour"))
    assert line_of(s, ADAPTER) == f"{ADAPTER}, against 'PPO': more often: sleeps when tired (+11.0); less often: none."
    assert line_of(s, RULES).endswith("less often: none; not resolved: 1 of 1 behaviour.")
    assert GOALS not in s and "better" not in s and "worse" not in s


def test_numbers_of_the_cost(tmp_home):
    fabricate("cost")
    r = drawn("cost")[1].set_index("method").loc[ADAPTER]
    counts = ["n", "steps", "calls", "share", "calls_per_million", "tokens_in_per_million", "llm_seconds_per_million"]
    assert r[counts].tolist() == pytest.approx([3, STEPS, 400, 20, 4e8 / STEPS, 8e10 / STEPS, 6e7 / STEPS])


def test_printed_cost(tmp_home):
    fabricate("cost", keep=lambda label, seed: label != DECISION)
    printed = drawn("cost")[0]
    asked, tokens, time, _, scaled = printed.loc[ADAPTER]
    assert asked == "1,000 queries\n400 calls\n600 from the cache\nn = 3"
    assert (tokens, time) == ("80,000 / 12,000", "60.0 s\n20.0 % of the run")
    assert scaled.endswith(f"{6e7 / STEPS / 3600:.2f} hours")
    assert printed.loc[DECISION].tolist() == ["3 missing", "", "", "", ""]


def test_a_constant_sentence_is_no_reply(tmp_home):
    fabricate("cost")
    printed, t = drawn("cost")
    assert t.set_index("method").loc[CONSTANT, ["invalid", "rejected", "calls"]].isna().all()
    assert set(printed.loc[CONSTANT].iloc[1:]) == {"no language model"}
    assert printed.loc[CONSTANT, "asked"] == "1,000 queries\nn = 3"


# ---- verdicts

HELPS = {RANDOM: lambda s: -2, ADAPTER: lambda s: 1, UNTUNED: lambda s: s - 1, GOALS: lambda s: 3}


def test_verdicts_of_the_main_table(tmp_home):
    s = said(
        rladapter.main_verdict, "main", score=lambda label, seed: 5 + 10 * seed + HELPS.get(label, lambda s: 0)(seed)
    )
    learns = "Does PPO learn ('PPO' above 'Random actions')? yes, +2.00 [2.00, 2.00], n = 3."
    assert line_of(s, "Does PPO learn") == learns
    assert "? not resolved (n = 3, difference +0.00" in line_of(s, "Does a text head")
    assert "? yes, +1.00" in line_of(s, "Does the full method help")
    assert "? no, the opposite, -2.00" in line_of(s, "Do the full method's words")
    assert "? not resolved (n = 3, difference +1.00" in line_of(s, "Does tuning the adapter help")


def test_both_scores_of_the_main_table_are_judged_together(tmp_home):
    s = said(rladapter.main_verdict, "main")
    assert s.count("Does PPO learn") == 2 and "\n\nScore over the last fifth of training:\n" in s
    assert s.endswith(f"Holm's correction over {2 * len(rladapter.QUESTIONS)} comparisons)")


def test_verdicts_without_runs(tmp_home):
    assert rladapter.main_verdict(view("main")).count("no runs yet") == 2 * len(rladapter.QUESTIONS)


ONE_SEED = dict(seeds=(0,), score=lambda label, seed: len(label), behave=lambda label, seed: (len(label), 9))
VERDICTS = [(rladapter.main_verdict, "main"), (rladapter.comprehension_verdict, "comprehension")]
VERDICTS += [(rladapter.behaviour_verdict, "behaviour"), (rladapter.ablation_verdict, "ablation")]


WORDS = ("yes", "opposite", "rises", "falls", "better", "worse", "resolved")


@pytest.mark.parametrize("n", range(4), ids=[id for _, id in VERDICTS])
def test_one_seed_decides_nothing(tmp_home, n):
    verdict, id = VERDICTS[n]
    s = said(verdict, id, **ONE_SEED)
    assert "not tested" in s
    assert not [word for word in WORDS if word in s]


def test_only_common_seeds_are_compared(tmp_home):
    s = said(
        rladapter.main_verdict,
        "main",
        score=lambda label, seed: 100.0 * seed + 5 * (label == PPO),
        keep=lambda label, seed: seed != (0 if label == PPO else 2),
    )
    assert "'Random actions')? not tested (n = 1, difference +5.00)." in s


def test_failed_runs_are_said(tmp_home):
    fabricate("main", keep=lambda label, seed: label != PPO)
    fabricate("main", keep=lambda label, seed: label == PPO, status="failed")
    assert drawn("main")[0].loc[OURS, f"{PPO}, {BUDGET} steps"].score == "3 failed"
    assert line_of(rladapter.main_verdict(view("main")), "Does PPO learn").endswith("no runs yet.")


# ---- what a scale changes


def test_deviations_name_the_code():
    t = exhibits.deviations("rladapter", "laptop").set_index("field")
    steps = t.loc["online.steps", ["paper_scale", "this_scale"]].tolist()
    assert steps == ["5000000", str(STEPS)]


def test_what_only_measures_is_no_deviation():
    t = exhibits.deviations("rladapter", "laptop").set_index("field")
    assert not {"online.last", "online.points"} & set(t.index)


# ---- what is known of the paper's other pages


def test_what_cannot_be_made_points_to_what_is_shown():
    "Figures and tables whose content is not known; numbers/rladapter_tables_figures_index.csv."
    reasons = {e.id: e.unknown for e in rc.exhibits("rladapter") if e.unknown}
    assert set(reasons) == {"table_main", "table_ablation", "fig_success", "fig_guidance", "v1"}
    shown = {id: re.findall(r"(?<!\w)'(\w+)'", reason) for id, reason in reasons.items()}
    assert all(not exhibit(name).unknown for names in shown.values() for name in names)
    assert shown["table_ablation"] == ["decision_size"] and shown["fig_guidance"] == ["guidance", "behaviour"]


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_all_that_is_known_of_adarefiner_stands_beside_the_full_method(tmp_home, scale):
    "DLLM (2406.07381) Table 2: 28.2 and 12.9, 23.4 and 11.8 after 5M steps, 15.8 and 12.3 after 1M."
    _, t = rladapter.contrast(View(exhibit("decision_size"), scale, partial=True))
    dllm = t[(t.kind == "published") & t.source.str.startswith("DLLM", na=False)]
    known = dllm.set_index(["method", "env_steps", "metric"])["mean"].to_dict()
    reward = rladapter.PUBLISHED["scoreboard_reward"]
    four, less = "AdaRefiner (GPT-4)", "AdaRefiner (GPT-3.5)"
    assert known == {
        (four, "5M", "score"): 28.2,
        (four, "5M", reward): 12.9,
        (less, "5M", "score"): 23.4,
        (less, "5M", reward): 11.8,
        (four, "1M", "score"): 15.8,
        (four, "1M", reward): 12.3,
    }
    arms = [ADAPTER] + ["GPT-3.5 as decision LM"] * (scale == "paper")
    assert list(dict.fromkeys(t[t.kind == "ours"].method)) == arms


def test_the_benchmark_s_rewards_are_of_single_episodes(tmp_home):
    "numbers/crafter_score_recomputed.csv: 2.10 and 14.30 of one episode a run, 1.377 and 12.959 of all."
    fabricate("benchmark", score=lambda label, seed: (1, 2, 6)[seed])
    printed, t = drawn("benchmark")
    known = t.set_index(["agent", "whose", "measure"])["mean"].to_dict()
    for agent, single, whole in (("Random", 2.10, 1.377), ("Human experts", 14.30, 12.959)):
        assert known[agent, "recomputed", rladapter.SINGLE] == known[agent, "published", rladapter.SINGLE] == single
        assert known[agent, "recomputed", "mean return"] == whole
    assert known[RANDOM, "ours, laptop scale", "score"] == 3
    assert printed.loc[(RANDOM, "ours, laptop scale"), "mean return"].startswith("1.50 ± 1.32")


SCENE = dict(seen=("tree", "cow"), status=dict(wood=3), actions=("move_left", "do"), env=0, step=0)


@pytest.mark.parametrize("who", ["adapter", "decision LM"])
def test_the_table_of_prompts_says_what_ours_hold(tmp_home, who):
    from promptnb.llm.text import GOALS, adapter_prompt, decision_prompt

    table, _ = rladapter.prompts(View(exhibit("prompts"), "laptop"))
    if who == "adapter":
        prompt = adapter_prompt(SCENE, ("sleep",), 0.12345)
    else:
        prompt = decision_prompt(SCENE, ("sleep",), "Wood first.")
    text = "\n".join(m["content"] for m in prompt)
    holds = {
        "kinds of things in view": '"tree, cow"' in text,
        "status: counts above zero": '"wood 3"' in text,
        "last action": '"do"' in text and "move_left" not in text,
        "sub-goals before": 'goals: "sleep"' in text,
        "comprehension score l": "score: 0.123" in text,
        "the adapter's analysis": 'analysis: "Wood first."' in text,
        "list of 31 sub-goals": ", ".join(GOALS) in text,
    }
    said = {part: entry.startswith(("yes", "three")) for part, entry in table[f"{who}, ours"].items()}
    assert {part: said[part] for part in holds} == holds
    released = table[f"{who}, released"]
    assert all((released[part] in ("no", "-")) == (table[f"{who}, ours"][part] in ("no", "-")) for part in holds)


def test_arrows_of_the_framework_end_at_boxes(tmp_home):
    shown, arrows = drawn("framework")
    assert {*arrows["from"], *arrows["to"]} == {*rladapter.BOXES}
    names = [text.get_text().split("\n")[0] for text in shown.axes[0].texts]
    assert set(rladapter.BOXES) <= set(names)


# ---- paper scale is the released code

PAPER = rc.PAPER_OF["rladapter"]
RELEASED = dict(  # numbers/adarefiner_hyperparameters.csv, PKU-RL/AdaRefiner @2365033
    rollout=4096,
    envs=1,
    batch=128,
    epochs=4,
    gamma=0.95,
    lam=0.65,
    clip=0.2,
    entropy=0.0,
    value=0.5,
    max_grad=0.5,
    lr=1e-4,
    steps=5_000_000,
    stages=5,
    length=10_000,
    net="spcnn",
    interval=100,
    decision="gpt-4",
    temperature=1.0,
    adapter="meta-llama/Llama-2-7b-chat-hf",
    tokens=100,
    history="actions",
    use_score=True,
    targets="own",
    tune=True,
)
HABITS = dict(  # specs/rladapter.md section 3, and sft.py's text: the released code's, and of the arm 'as released'
    reinit_encoder=True,
    restart_policy=True,
    cumulative=True,
    text_after_step=True,
    empty_each_rollout=True,
    ask_on_reset=False,
    raw_replies=True,
    markup_twice=True,
)


def at_paper_scale(key):
    "The online part of a recipe at paper scale."
    return rc.resolve(rc.RECIPES[f"rladapter/crafter/{key}"], "paper").online


@pytest.mark.parametrize("field", RELEASED)
def test_a_field_of_the_full_method_is_the_released_one(field):
    assert getattr(at_paper_scale("adapter"), field) == getattr(at_paper_scale("released"), field) == RELEASED[field]


@pytest.mark.parametrize("field", HABITS)
def test_a_habit_of_the_released_code_is_the_arm_as_released(field):
    assert getattr(at_paper_scale("released"), field) == HABITS[field] != getattr(at_paper_scale("adapter"), field)


def test_published_values_are_those_of_the_released_code():
    encoder = dict(encoder="sentence-transformers/paraphrase-MiniLM-L6-v2", url="https://api.openai.com/v1")
    code = {p.field.removeprefix("online."): p.code for p in PAPER.published if p.covers(rc.rladapter.ARMS["adapter"])}
    assert {k: v for k, v in code.items() if v is not None} == RELEASED | HABITS | encoder | dict(eval_episodes=20)


def test_every_field_has_a_released_value_or_is_ours():
    "A new field of Online must be looked up, or be named here."
    ours = {"guide", "learner", "precision", "last", "points", "budget", "sft", "preset"}
    ours |= {"version", "key_env", "timeout", "retries", "extra"}  # of a server
    known = {p.field.removeprefix("online.") for p in PAPER.published if p.covers(rc.rladapter.ARMS["adapter"])}
    assert {f.name for f in fields(rc.Online)} == ours | known - {"eval_episodes", "seeds"}


def shown_differences():
    "{field or matter: our value} of the table of differences."
    t = exhibits.differences("rladapter")
    return {what: t[t.what == what].ours.tolist() for what in t.what}


def test_differences_to_the_released_code_are_these():
    fields_ = {what for what in shown_differences() if "." in what and " " not in what}
    medium = {"online.steps"}  # 1,024,000 steps in Achievement Distillation's code
    assert fields_ == {f"online.{k}" for k in HABITS} | {"online.encoder", "online.decision"} | medium


@pytest.mark.parametrize("field", [*RELEASED, *HABITS])
def test_a_wrong_value_at_paper_scale_shows_in_the_differences(field, monkeypatch):
    r = rc.rladapter.ARMS["released"]
    now = getattr(r.online, field)
    wrong = f"not {now}" if isinstance(now, str) else now / 2 or 0.5
    monkeypatch.setitem(PAPER.recipes, r.id, replace(r, online=replace(r.online, **{field: wrong})))
    assert str(wrong) in shown_differences()[f"online.{field}"]


@pytest.mark.parametrize("field", ["net", "envs", "rollout", "batch", "epochs", "lr", "entropy", "gamma", "lam"])
def test_medium_has_achievement_distillation_s_settings(field):
    "snu-mllab/Achievement-Distillation, configs/ppo.yaml."
    known = dict(net="impala", envs=8, rollout=512, batch=4096 // 8, epochs=3, lr=3e-4)
    known |= dict(entropy=0.01, gamma=0.95, lam=0.65)
    assert getattr(at_paper_scale("medium-ppo"), field) == known[field]


def test_the_tuning_s_defaults_are_those_of_the_released_script():
    "PKU-RL/AdaRefiner, sft.py; numbers/adarefiner_hyperparameters.csv, group SFT."
    from promptnb.llm.adapter import SFT

    known = dict(r=64, alpha=16, dropout=0.1, lr=2e-4, batch=4, epochs=1, weight_decay=0.001, grad_norm=0.3)
    known |= dict(whole_text=True, quantise="nf4")
    assert {k: code for k, (code, _) in rc.rladapter.TUNING.items()} == known
    assert {k: getattr(SFT(), k) for k in known} == {k: ours for k, (_, ours) in rc.rladapter.TUNING.items()}


STANDING = (
    "wording of the prompts",
    "vector of the empty sentence",
    "precision of the adapter",
    "temperature of the adapter",
    "evaluation",
    "the game",
)


@pytest.mark.parametrize("what", STANDING)
def test_what_no_field_holds_stands_in_the_differences(what):
    assert what in shown_differences()


def test_standing_differences_are_true_of_the_code():
    from promptnb.llm import Guidance
    from promptnb.llm.backends import Rules
    from promptnb.llm.encoders import encoder

    guidance = Guidance(decision=Rules())
    assert (guidance.adapter_temperature, guidance.max_tokens) == (0.6, 100)
    assert not encoder("hash")([""]).any()


def test_the_table_of_settings_is_of_three_columns_and_a_place(tmp_home):
    table, _ = rladapter.settings(View(exhibit("settings"), "laptop"))
    assert list(table.columns) == ["released code", "ours, paper scale", "ours, laptop scale", "read in"]
    assert list(table.loc["lr"])[:3] == ["0.0001", "0.0001", "0.0003"]
    assert list(table.loc["tuning: lr"])[:3] == ["0.0002", "0.0002", "0.002"]
    assert set(RELEASED) | set(HABITS) <= set(table.index)


def test_exchanges_at_one_step_are_shown_in_one_table():
    "Rows may have the same name: several worlds ask at the same step."
    import pandas as pd

    from promptnb.report.tables import shown

    twice = pd.DataFrame(dict(said=["sleep", "mine coal"]), index=pd.Index([3, 3], name="step"))
    html = shown(twice).to_html()
    assert "sleep" in html and "mine coal" in html and "pre-line" in html
