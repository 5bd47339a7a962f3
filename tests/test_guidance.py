"Exhibits of guided agents, against numbers worked out by hand on made-up records."

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.pyplot import close

from promptnb import recipes as rc
from promptnb.core import PromptnbError, code_fingerprint, wilson
from promptnb.report import exhibits, rladapter, stats
from promptnb.report.rladapter import ADAPTER, CONSTANT, DECISION, GOALS, PPO, RANDOM, RULES, UNTUNED
from promptnb.report.style import LOOKS, style
from promptnb.report.tables import short
from promptnb.report.view import View, recipe_file, reported

EXHIBITS = [e for e in rc.exhibits("rladapter") if not e.unknown]
HERE = [e for e in EXHIBITS if rc.recipes_of(e, "laptop")]
TABLES = ("scoreboard", "grid", "examples", "behaviour", "cost")
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


def view(id, scale="laptop"):
    "It at laptop scale, whatever runs there are."
    return View(exhibit(id), scale, partial=True)


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


def drawn(id, partial=True):
    "(what is shown, its numbers) of an exhibit; figures are closed."
    e = exhibit(id)
    shown, numbers = rladapter.DRAW[e.kind](View(e, "laptop", partial=partial))
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
        files = {p.suffix[1:] for p in (tmp_home / "figures/rladapter/laptop").glob(f"{e.id}.*")}
        assert files == set("csv md tex".split() if e.kind in TABLES else "csv pdf png".split()), e.id


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


def test_numbers_of_the_scoreboard(tmp_home):
    fabricate("main", score=lambda label, seed: (1, 2, 6)[seed] + (label == PPO))
    r = drawn("main")[1].query("kind == 'ours'").set_index("method").loc[PPO]
    numbers = r[["score", "score_last", "return", "depth", "eval_score", "n", "iqm", "lo", "hi"]].tolist()
    assert numbers == pytest.approx([4, 5, 2, 1.5, 3, 3, 4, 2, 7])
    assert r.score_std == pytest.approx(np.std([2, 3, 7], ddof=1))
    assert (r.env_steps, r.note) == (BUDGET, "")


def test_a_missing_seed_is_said_in_the_scoreboard(tmp_home):
    fabricate("main", keep=lambda label, seed: (label, seed) != (RULES, 1))
    printed, t = drawn("main")
    r = t.query("kind == 'ours'").set_index("method").loc[RULES]
    assert (r.note, r.n) == ("1 missing", 2)
    assert printed.loc["ours, laptop scale", RULES, BUDGET]["n, or source"] == "2 seeds, 1 missing"


def test_printed_line_of_the_scoreboard(tmp_home):
    fabricate("main", score=lambda label, seed: (1, 2, 6)[seed] + (label == PPO))
    line = drawn("main")[0].loc["ours, laptop scale", PPO, BUDGET]
    assert (line["score"], line["IQM [95 %]"], line["reward"]) == ("4.00 ± 2.65", "4.00 [2.00, 7.00]", "")


def test_every_published_number_stands_in_the_table(tmp_home):
    rep, text = reported("rladapter"), drawn("main")[0].loc["published"]

    def one(x):
        return f"{x:.1f}" if round(x, 1) == x else f"{x:g}"

    assert text.index.is_unique
    for _, r in rep[rep.exhibit.isin(["scoreboard", "scoreboard_reward"])].iterrows():
        line = text.loc[r.method, r.steps]
        column = "score" if r.exhibit == "scoreboard" else "reward"
        assert f"{one(r.value)} ± {one(r['std'])}" in line[column].split(" / "), r.method
        assert r.source in line["n, or source"], r.method


def test_sources_that_disagree_are_both_printed(tmp_home):
    text = drawn("main")[0].loc["published"]
    assert text.loc["Rainbow", "1M"].reward == "6.0 ± 1.3 / 5.0 ± 1.3"
    assert text.loc["AdaRefiner (GPT-4)", "1M"].score == "15.8 ± 1.4"
    assert text.loc["AdaRefiner (GPT-4)", "5M"].reward == "12.9 ± 1.2"


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


def test_the_caption_says_what_the_published_rewards_are():
    text = exhibits.caption(view("main"))
    assert "single episodes" in text and "budgets differ" in text


# ---- rates


@pytest.mark.parametrize("k, n", [(0, 7), (3, 7), (7, 7), (1, 1500), (500, 1500)])
def test_wilson_is_scipys(k, n):
    from scipy.stats import binomtest

    ci = binomtest(k, n).proportion_ci(method="wilson")
    assert list(wilson(k, n)) == pytest.approx([100 * ci.low, 100 * ci.high], abs=0.01)


def test_rates_are_pooled_over_seeds(tmp_home):
    fabricate("success", rate=lambda achievement, seed: 10.0 * seed if achievement == "eat_cow" else 0.0)
    t = drawn("success")[1]
    r = t[(t.label == PPO) & (t.name == "eat_cow")].iloc[0]
    assert r[["percent", "n", "seeds"]].tolist() == pytest.approx([10, 1500, 3])
    assert [r.lo, r.hi] == pytest.approx(list(wilson(150, 1500)))


def test_a_rate_without_a_chance_has_no_interval(tmp_home):
    fabricate("behaviour", behave=lambda label, seed: (None, 0))
    t = rladapter.rates(view("behaviour"), "behaviour")
    assert t[["percent", "lo", "hi"]].isna().all(axis=None)


def test_published_rates_stand_beside_ours(tmp_home):
    t = drawn("success")[1]
    human = t[t.label == "Human experts, published"].set_index("name").percent
    assert len(human) == 22 and human["collect_diamond"] == 12


def test_every_achievement_has_a_panel():
    rep = reported("rladapter")
    names = rep[rep.exhibit == "success"].family
    assert {n.split("_")[0] for n in names} == {word for panel in rladapter.PANELS for word in panel}


# ---- along, grid


def test_numbers_of_the_curve(tmp_home):
    fabricate("curve")
    t = drawn("curve")[1]
    d = t[(t.label == PPO) & (t.metric == "score_along")]
    assert d.step.tolist() == [k * STEPS // 4 for k in (1, 2, 3, 4)]
    assert d["mean"].tolist() == [3, 6, 9, 12]
    assert (d["min"].iloc[0], d["max"].iloc[-1], set(d["count"])) == (2, 16, {3})


def test_the_curve_shows_the_published_random_agent(tmp_home):
    fabricate("curve")
    t = drawn("curve")[1]
    floor = t[t.label == "Random, published"].set_index("metric")["mean"].to_dict()
    assert floor == dict(score_along=1.55, return_along=1.377)


GAIN = {"K = 10": lambda s: 3, "as released": lambda s: -2, "K = 50": lambda s: 2 * s - 1}  # two seeds at this scale


@pytest.fixture
def ablation(tmp_home):
    "The ablation, where three switches change the score by known amounts: (printed, tidy)."
    fabricate(
        "ablation",
        score=lambda label, seed: 5 + seed**2 + GAIN.get(label, lambda s: 0)(seed),
        keep=lambda label, seed: label != "K = 500" and (label, seed) != ("SFT on gains", 0),
    )
    printed, t = drawn("ablation")
    return printed, t.set_index("method")


def test_numbers_of_the_ablation(ablation):
    _, t = ablation
    assert t.loc["K = 10", ["difference, full", "n", "verdict, full", "note"]].tolist() == [3, 2, "better", ""]
    assert t.loc["as released", ["difference, PPO", "verdict, PPO"]].tolist() == [-2, "worse"]
    assert t.loc["K = 50", "verdict, full"] == "no clear difference"
    assert t.loc["SFT on gains", ["n", "note"]].tolist() == [1, "1 missing"]


def test_printed_ablation(ablation):
    printed, _ = ablation
    column = f"score minus '{ADAPTER}'"
    assert printed.loc["K = 10", column] == "+3.00 [+3.00, +3.00] better"
    assert printed.loc[ADAPTER, column] == ""
    assert printed.loc["K = 500", ["n", "score"]].tolist() == ["2 missing", ""]


def test_the_ablation_in_words(ablation):
    s = rladapter.ablation_verdict(view("ablation"))
    assert "better: 'K = 10' +3.00" in s and "worse: 'as released' -2.00" in s and "'K = 50' +0.00" in s
    assert "'PPO'" not in s


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
    return tmp_home / "figures/rladapter/laptop"


def test_a_table_of_exchanges_stays_a_markdown_table(evil_files):
    text = (evil_files / "guidance.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(EVIL) and {line.count("|") for line in lines} == {9}
    assert "<" not in "".join(lines) and "://" not in text


def test_a_table_of_exchanges_stays_a_latex_table(evil_files):
    rows = [line for line in (evil_files / "guidance.tex").read_text().splitlines() if "&" in line]
    assert {line.count("&") for line in rows} == {7}


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
    said = row[["sub-goals", "unlocked", "l, before to after"]].tolist()
    assert said == ["none (budget spent)", "nothing", "0.42"]


# ---- intervals


@pytest.mark.parametrize("n", [2, 3, 8])
def test_interval_is_students(n):
    from scipy.stats import ttest_rel

    a, b = np.random.default_rng(n).normal(size=(2, n))
    v, want = stats.compare(a, b, "student"), ttest_rel(a, b).confidence_interval()
    assert (v["lo"], v["hi"], v["difference"]) == pytest.approx((*want, (a - b).mean()))
    words = {(True, False): "better", (False, True): "worse", (False, False): "no clear difference"}
    assert v["verdict"] == words[bool(want.low > 0), bool(want.high < 0)]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_students_interval_errs_in_one_of_twenty(n):
    rng = np.random.default_rng(n)
    words = [stats.compare(*rng.normal(size=(2, n)), "student")["verdict"] for _ in range(2_000)]
    assert 0.02 < np.mean([word != "no clear difference" for word in words]) < 0.08


# ---- comprehension and tuning

RISES = {RULES: 1, GOALS: -1}


def moving(label, seed, part):
    "A comprehension score that rises for one arm, falls for another, and goes with the seed for a third."
    return 0.4 + (seed - 1 if label == DECISION else RISES.get(label, 0)) * part / 10


def test_comprehension_in_words(tmp_home):
    s = said(rladapter.comprehension_verdict, "comprehension", comprehend=moving)
    assert "from 0.425 to 0.500: rises, +0.075 (3 seeds" in line_of(s, f"{RULES}:")
    assert "falls, -0.075" in line_of(s, f"{GOALS}:")
    assert "no clear change" in line_of(s, f"{DECISION}:")
    assert "from 0.400 to 0.400: no clear change" in line_of(s, f"{CONSTANT}:")


def test_tuning_in_words(tmp_home):
    s = said(rladapter.comprehension_verdict, "comprehension").split("\n")[-1]
    change = "from 2.00 to 1.10: lower, -0.90 (3 seeds, 95 % interval -1.15 to -0.65)"
    assert s == f"{ADAPTER}, tuning after stage 1: the adapter's loss goes {change}."


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
    assert s.endswith("1 tuning not done: too few rows.") and "lower, -1.00 (2 seeds" in s
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


# ---- behaviour, cost

BEHAVED = {
    ADAPTER: lambda seed: (50.0 + seed, 100),
    GOALS: lambda seed: (None, 0),
    RULES: lambda seed: (None, 0) if seed == 0 else (30.0, 50),
}


@pytest.fixture
def behaviour(tmp_home):
    "Behaviours: the adapter's is better than PPO's, the rules' worse, random goals had no chance: (printed, tidy)."
    fabricate(
        "behaviour",
        behave=lambda label, seed: BEHAVED.get(label, lambda s: (40.0, 100))(seed),
        keep=lambda label, seed: (label, seed) != (CONSTANT, 2),
    )
    printed, t = drawn("behaviour")
    return printed, t.set_index("method")


def test_numbers_of_behaviours(behaviour):
    _, t = behaviour
    assert t.loc[ADAPTER, ["percent", "chances", "n", "difference", "verdict"]].tolist() == [51, 300, 3, 11, "better"]
    assert t.loc[RULES, ["percent", "chances", "n", "verdict"]].tolist() == [30, 100, 2, "worse"]
    assert t.loc[GOALS, "n"] == 0


def test_printed_behaviours(behaviour):
    printed, _ = behaviour
    row = printed.loc["sleeps when tired"]
    assert [row[arm] for arm in (GOALS, ADAPTER, PPO)] == [
        "no chance",
        "51.0 ± 1.0 of 300; better",
        "40.0 ± 0.0 of 300",
    ]
    assert printed.loc["runs lacking", CONSTANT] == "1 missing"


def test_behaviours_in_words(behaviour):
    s = rladapter.behaviour_verdict(view("behaviour")).split("\n")
    more = "more often: sleeps when tired (+11.0); less often: none"
    assert s[-1] == f"{ADAPTER}, against 'PPO', 3 seeds: {more}; no clear difference: 0 of 1 behaviour."
    assert not any(line.startswith(GOALS) for line in s)


def test_numbers_of_the_cost(tmp_home):
    fabricate("cost")
    r = drawn("cost")[1].set_index("method").loc[ADAPTER]
    counts = ["n", "steps", "calls", "share", "calls_per_million", "tokens_in_per_million", "llm_seconds_per_million"]
    assert r[counts].tolist() == pytest.approx([3, STEPS, 400, 20, 4e8 / STEPS, 8e10 / STEPS, 6e7 / STEPS])


def test_printed_cost(tmp_home):
    fabricate("cost", keep=lambda label, seed: label != DECISION)
    printed = drawn("cost")[0]
    line = printed.loc[ADAPTER, ["tokens in / out", "of the time", "LM hours per 1M steps", "n"]].tolist()
    assert line == ["80,000 / 12,000", "20.0 %", f"{6e7 / STEPS / 3600:.2f}", "3"]
    assert printed.loc[DECISION, ["queries", "n"]].tolist() == ["", "3 missing"]


# ---- verdicts

HELPS = {RANDOM: lambda s: -2, ADAPTER: lambda s: 1, UNTUNED: lambda s: s - 1, GOALS: lambda s: 3}


def test_verdicts_of_the_main_table(tmp_home):
    s = said(
        rladapter.main_verdict, "main", score=lambda label, seed: 5 + 10 * seed + HELPS.get(label, lambda s: 0)(seed)
    )
    learns = "Does PPO learn ('PPO' above 'Random actions')? yes, +2.00 (3 seeds, 95 % interval +2.00 to +2.00)."
    assert line_of(s, "Does PPO learn") == learns
    assert "? no clear difference, +0.00" in line_of(s, "Does a text head")
    assert "? yes, +1.00" in line_of(s, "Does the full method help")
    assert "? no, the opposite, -2.00" in line_of(s, "Do the full method's words")
    assert "? no clear difference, +1.00" in line_of(s, "Does tuning the adapter help")


def test_verdicts_without_runs(tmp_home):
    assert rladapter.main_verdict(view("main")).count("no runs yet") == len(rladapter.QUESTIONS)


ONE_SEED = dict(seeds=(0,), score=lambda label, seed: len(label), behave=lambda label, seed: (len(label), 9))
VERDICTS = [(rladapter.main_verdict, "main"), (rladapter.comprehension_verdict, "comprehension")]
VERDICTS += [(rladapter.behaviour_verdict, "behaviour")]


@pytest.mark.parametrize("n", range(3), ids=[id for _, id in VERDICTS])
def test_one_seed_decides_nothing(tmp_home, n):
    verdict, id = VERDICTS[n]
    for line in said(verdict, id, **ONE_SEED).split("\n"):
        assert "one seed decides nothing" in line
        assert not any(word in line for word in ("? yes", "? no, ", ": rises", ": falls", ": lower", "sleeps")), line


def test_one_seed_decides_nothing_in_the_ablation(tmp_home):
    s = said(rladapter.ablation_verdict, "ablation", **ONE_SEED)
    assert "one seed decides nothing: " in s and "better" not in s and "worse" not in s


def test_only_common_seeds_are_compared(tmp_home):
    s = said(
        rladapter.main_verdict,
        "main",
        score=lambda label, seed: 100.0 * seed + 5 * (label == PPO),
        keep=lambda label, seed: seed != (0 if label == PPO else 2),
    )
    assert "'Random actions')? no clear difference, +5.00 (1 seed, one seed decides nothing)" in s


def test_failed_runs_are_said(tmp_home):
    fabricate("main", keep=lambda label, seed: label != PPO)
    fabricate("main", keep=lambda label, seed: label == PPO, status="failed")
    line = drawn("main")[0].loc["ours, laptop scale", PPO, BUDGET]
    assert line["n, or source"] == "3 failed"
    assert rladapter.main_verdict(view("main")).split("\n")[0].endswith("no runs yet.")


# ---- what a scale changes


def test_deviations_name_the_code():
    t = exhibits.deviations("rladapter", "laptop").set_index("field")
    steps = t.loc["steps", ["paper_scale", "this_scale", "source"]].tolist()
    assert steps == ["5000000", str(STEPS), "AdaRefiner's code"]
    assert set(t.part) <= {"guided training", "evaluation of agents", "seeds"}


def test_what_only_measures_is_no_deviation():
    t = exhibits.deviations("rladapter", "laptop").set_index("field")
    assert not {"last", "points"} & set(t.index)
