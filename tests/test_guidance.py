"Exhibits of guided agents, against numbers worked out by hand on made-up records."

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.pyplot import close

from promptnb import recipes as rc
from promptnb.core import PromptnbError
from promptnb.report import exhibits, prompts, rladapter, tables, view
from promptnb.report.rladapter import ADAPTER, CONSTANT, DECISION, GOALS, PPO, RANDOM, RULES, UNTUNED
from promptnb.report.view import View


def exhibit(id):
    return view.exhibit("rladapter", id)


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
BUDGET = tables.short(STEPS)
COST = dict(
    queries=1000,
    calls=400,
    cached=600,
    tokens_in=80_000,
    tokens_out=12_000,
    llm_seconds=60,
    seconds=300,
    invalid=7,
    rejected=3,
    failed=1,
    kept=2,
)


def fabricate(
    e,
    score=lambda label, seed: 2.0 + seed,
    rate=lambda a, seed: 10.0,
    n=500,
    behave=lambda label, seed: (40.0, 100),
    comprehend=lambda label, seed, part: 0.3 + part / 10,
    scale="laptop",
    seeds=(0, 1, 2),
    keep=lambda label, seed: True,
    status="ok",
    guides=(GUIDE,),
    sft=lambda seed: (2.0, 1.0 + seed / 10),
):
    "Records of an exhibit as if it had been run."
    for r, seed in ((rc.resolve(r, scale), seed) for r in rc.recipes_of(e, scale) for seed in seeds):
        if not keep(r.method, seed):
            continue
        path, steps, x = view.recipe_file(r, scale, seed), r.online.steps, score(r.method, seed)

        def row(metric, v, n=500, step=steps):
            return dict(
                paper="rladapter",
                task="crafter",
                task_id=0,
                method=r.method,
                seed=seed,
                scale=scale,
                step=step,
                metric=metric,
                value=None if v is None else float(v),
                n_episodes=n,
                trainable=800,
                env_steps=steps,
                run_id=path.stem,
            )

        b, chances = behave(r.method, seed)
        rows = [
            row("score", x),
            row("score_last", x + 1),
            row("return", x / 2),
            row("depth", 1.5),
            row("eval_score", x - 1, 32),
            row("behaviour/sleeps when tired", b, chances),
            *(row(f"success/{a}", rate(a, seed), n) for a in ("collect_wood", "eat_cow")),
        ]
        rows += [row(m, k * x, step=k * steps // 4) for m in ("score_along", "return_along") for k in (1, 2, 3, 4)] + [
            row(m, v) for m, v in COST.items()
        ]
        if r.online.guide != "off":
            rows += [
                row("comprehension", comprehend(r.method, seed, part), step=int(part * steps)) for part in (0.25, 1)
            ]
        rec = dict(
            run_id=path.stem,
            status=status,
            why="",
            recipe_digest=rc.digest(r),
            rows=rows if status == "ok" else [],
            guides=list(guides),
            counts=dict(total=1000, trainable=800),
            spent={},
            sft=[
                dict(
                    stage=1,
                    rows=90,
                    steps=22,
                    loss_before=sft(seed)[0],
                    loss_after=sft(seed)[1],
                    seconds=4,
                    targets="own",
                )
            ]
            if r.method == ADAPTER
            else [],
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rec))


def drawn(e, partial=True):
    return rladapter.DRAW[e.kind](e, "laptop", None, partial)


def said(f, id, **kw):
    fabricate(exhibit(id), **kw)
    return f(exhibit(id), "laptop")


# ---- drawing


@pytest.mark.parametrize("records", ["none", "some", "all"])
def test_every_kind_draws(tmp_home, records):
    for e in EXHIBITS:
        if records != "none":
            fabricate(e, seeds=(0, 1), keep=lambda label, seed: records == "all" or (len(label) + seed) % 3)
        shown, numbers = drawn(e)
        assert isinstance(shown, (pd.DataFrame, Figure)) and isinstance(numbers, pd.DataFrame), e.id
        if isinstance(shown, Figure):
            shown.canvas.draw()
            close(shown)
        if records == "all" and e in HERE:
            assert len(numbers), e.id


@pytest.mark.parametrize("records", [False, True])
def test_made_exhibits_leave_their_files(tmp_home, records):
    for e in EXHIBITS:
        if records:
            fabricate(e, seeds=(0,))
        shown = exhibits.make(View(e, "laptop", partial=True))
        assert {p.suffix[1:] for p in (tmp_home / "figures/rladapter/laptop").glob(f"{e.id}.*")} == set(
            ("csv md tex" if e.kind in TABLES else "csv pdf png").split()
        ), e.id
        if isinstance(shown, Figure):
            close(shown)


def test_missing_runs_are_refused_unless_partial(tmp_home):
    for e in HERE:
        with pytest.raises(PromptnbError, match=f"promptnb run rladapter --exhibit {e.id}"):
            drawn(e, partial=False)


def test_kinds_of_other_pages_are_not_mixed_up(tmp_home):
    assert (
        {"grid", "cost"} <= set(prompts.DRAW) & set(rladapter.DRAW)
        and all(rladapter.mine(e) for e in EXHIBITS)
        and not any(rladapter.mine(e) for e in rc.EXHIBITS.values() if e.paper != "rladapter")
    )
    assert set(rladapter.DRAW) >= {e.kind for e in EXHIBITS} and set(rladapter.READ) == set(rladapter.DRAW)


def test_arms_are_told_apart():
    for e in EXHIBITS:
        arms = rladapter.arms_of(e)
        assert set(arms) <= set(rladapter.LOOK), e.id
        if e.kind in ("success", "along", "comprehension"):
            assert len({rladapter.style(l)["color"] for l in arms}) == len(arms), e.id
    assert len(set(rladapter.LOOK.values())) >= len(rladapter.LOOK) - 1  # 'no SFT' looks as the arm that it is


# ---- the scoreboard


def test_numbers_of_the_scoreboard(tmp_home):
    fabricate(
        e := exhibit("main"),
        score=lambda label, seed: (1, 2, 6)[seed] + (label == PPO),
        keep=lambda label, seed: (label, seed) != (RULES, 1),
    )
    p, t = drawn(e)
    t = t[t.kind == "ours"].set_index("method")
    r = t.loc[PPO]
    assert (
        r[["score", "score_last", "return", "depth", "eval_score", "n", "iqm", "lo", "hi"]].tolist()
        == pytest.approx([4, 5, 2, 1.5, 3, 3, 4, 2, 7])
        and r.score_std == pytest.approx(np.std([2, 3, 7], ddof=1))
        and r.env_steps == BUDGET
    )
    assert t.note[RULES] == "1 missing" and t.n[RULES] == 2 and t.note[PPO] == ""
    line = p.loc["ours, laptop scale", PPO, BUDGET]
    assert (
        line["score"] == "4.00 ± 2.65"
        and line["IQM [95 %]"] == "4.00 [2.00, 7.00]"
        and line["reward"] == ""
        and p.loc["ours, laptop scale", RULES, BUDGET]["n, or source"] == "2 seeds, 1 missing"
    )


def test_every_published_number_stands_in_the_table(tmp_home):
    p, t = drawn(exhibit("main"))
    rep = view.reported("rladapter")
    text = p.loc["published"]

    def one(x):
        return f"{x:.1f}" if round(x, 1) == x else f"{x:g}"

    for _, r in rep[rep.exhibit.isin(["scoreboard", "scoreboard_reward"])].iterrows():
        cell = text.loc[r.method, r.steps]
        assert (
            f"{one(r.value)} ± {one(r['std'])}" in cell["score" if r.exhibit == "scoreboard" else "reward"].split(" / ")
            and r.source in cell["n, or source"]
        ), r.method
    assert (
        text.index.is_unique
        and text.loc["Rainbow", "1M"].reward == "6.0 ± 1.3 / 5.0 ± 1.3"
        and text.loc["AdaRefiner (GPT-4)", "1M"].score == "15.8 ± 1.4"
        and text.loc["AdaRefiner (GPT-4)", "5M"].reward == "12.9 ± 1.2"
    )


def test_only_known_numbers_are_reported():
    rep = view.reported("rladapter")
    ada = rep[rep.method.str.startswith("AdaRefiner") & (rep.exhibit == "scoreboard")]
    assert set(ada.value) == {15.8, 28.2, 23.4} and not rep.method.str.contains("RLAdapter").any()
    assert (
        rep.value.notna().all()
        and rep.source.notna().all()
        and rep.groupby(["exhibit", "method", "family", "steps", "source"]).size().max() == 1
    )
    assert set(rep[rep.exhibit == "success"].groupby("method").size()) == {22} and rep[
        (rep.exhibit == "recomputed_score")
    ].set_index("method").value.to_dict() == {"Random": 1.55, "Human experts": 50.53}


def test_the_caption_says_what_the_published_rewards_are():
    assert "single episodes" in rladapter.caption(exhibit("main"), "laptop") and "budgets differ" in rladapter.caption(
        exhibit("main"), "laptop"
    )


# ---- rates


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    for k, n in ((0, 7), (3, 7), (7, 7), (1, 1500), (500, 1500)):
        lo, hi = rladapter.wilson(k, n)
        ci = binomtest(k, n).proportion_ci(method="wilson")
        assert [lo, hi] == pytest.approx([100 * ci.low, 100 * ci.high], abs=0.01)
    assert np.isnan(rladapter.wilson(0, 0)).all()


def test_rates_are_pooled_over_seeds(tmp_home):
    fabricate(e := exhibit("success"), rate=lambda a, seed: 10.0 * seed if a == "eat_cow" else 0.0)
    fig, t = drawn(e)
    close(fig)
    r = t[(t.label == PPO) & (t.name == "eat_cow")].iloc[0]
    assert r[["percent", "n", "seeds"]].tolist() == pytest.approx([10, 1500, 3]) and [r.lo, r.hi] == pytest.approx(
        np.array(rladapter.wilson(150, 1500))
    )
    human = t[(t.label == "Human experts, published")].set_index("name").percent
    assert len(human) == 22 and human["collect_diamond"] == 12


def test_every_achievement_has_a_panel():
    rep = view.reported("rladapter")
    assert {n.split("_")[0] for n in rep[rep.exhibit == "success"].family} == {w for p in rladapter.PANELS for w in p}


# ---- along, grid


def test_numbers_of_the_curve(tmp_home):
    fabricate(e := exhibit("curve"))
    fig, t = drawn(e)
    close(fig)
    d = t[(t.label == PPO) & (t.metric == "score_along")]
    assert (
        d.step.tolist() == [k * STEPS // 4 for k in (1, 2, 3, 4)]
        and d["mean"].tolist() == [3, 6, 9, 12]
        and d["min"].iloc[0] == 2
        and d["max"].iloc[-1] == 16
        and set(d["count"]) == {3}
    )
    assert t[(t.label == "Random, published")].set_index("metric")["mean"].to_dict() == dict(
        score_along=1.55, return_along=1.377
    )


def test_numbers_of_the_ablation(tmp_home):
    gain = {
        "K = 10": lambda s: 3,
        "as released": lambda s: -2,
        "K = 50": lambda s: 2 * s - 1,
    }  # two seeds at this scale
    fabricate(
        e := exhibit("ablation"),
        score=lambda label, seed: 5 + seed**2 + gain.get(label, lambda s: 0)(seed),
        keep=lambda label, seed: label != "K = 500" and (label, seed) != ("SFT on gains", 0),
    )
    p, t = drawn(e)
    t = t.set_index("method")
    assert (
        t.loc["K = 10", ["difference, full", "n", "verdict, full", "note"]].tolist() == [3, 2, "better", ""]
        and t.loc["SFT on gains", ["n", "note"]].tolist() == [1, "1 missing"]
        and t.loc["as released", ["difference, PPO", "verdict, PPO"]].tolist() == [-2, "worse"]
        and t.loc["K = 50", "verdict, full"] == "no clear difference"
    )
    c = f"score minus '{ADAPTER}'"
    assert (
        p.loc["K = 10", c] == "+3.00 [+3.00, +3.00] better"
        and p.loc[ADAPTER, c] == ""
        and p.loc["K = 500", "n"] == "2 missing"
        and p.loc["K = 500", "score"] == ""
    )
    s = rladapter.ablation_verdict(e, "laptop")
    assert (
        "better: 'K = 10' +3.00" in s
        and "worse: 'as released' -2.00" in s
        and "'K = 50' +0.00" in s
        and "'PPO'" not in s
    )


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
    "$x_1$ \\input{a} & % #",
    "x" * 1_000_000,
    "",
    7,
    None,
)


@pytest.mark.parametrize("evil", EVIL, ids=lambda x: str(x)[:8].encode("ascii", "replace").decode())
def test_text_becomes_plain(evil):
    s = rladapter.plain(evil)
    assert (
        len(s) <= 120
        and not set(s) & set('|<>[]`=!\\$&#_{}@+*~^/\n\r\t"')
        and s.replace("·", "").isascii()
        and s.isprintable()
    )


def test_a_table_of_exchanges_stays_a_table(tmp_home):
    guides = [
        dict(
            GUIDE,
            analysis=x,
            reply=x,
            goals=[str(x)[:500]],
            why=str(x)[:99],
            seen=[str(x)[:99]],
            status={"<b>|": "1|\n"},
            unlocked_after=[str(x)[:40]],
            done=[["|", 2]],
        )
        for x in EVIL
    ]
    fabricate(e := exhibit("guidance"), guides=guides)
    exhibits.make(View(e, "laptop"))
    folder = tmp_home / "figures/rladapter/laptop"
    md, tex = (folder / "guidance.md").read_text(), (folder / "guidance.tex").read_text()
    lines = [l for l in md.splitlines() if l.startswith("|")]
    assert (
        len(lines) == 2 + len(EVIL)
        and {l.count("|") for l in lines} == {9}
        and "<" not in "".join(lines)
        and "://" not in md
    )
    rows = [l for l in tex.splitlines() if "&" in l]
    assert {l.count("&") for l in rows} == {7} and len(pd.read_csv(folder / "guidance.csv")) == len(EVIL)


def test_numbers_of_an_exchange(tmp_home):
    fabricate(
        e := exhibit("guidance"),
        guides=[GUIDE, dict(GUIDE, goals=[], why="budget spent", l=None, unlocked_after=[])],
        keep=lambda label, seed: seed > 0,
    )
    p, t = drawn(e)
    assert t.iloc[0].to_dict() == dict(
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
    assert p.iloc[1][["sub-goals", "unlocked", "l, before to after"]].tolist() == [
        "none (budget spent)",
        "nothing",
        "0.42",
    ]


# ---- comprehension, behaviour, cost


@pytest.mark.parametrize("n", [2, 3, 8])
def test_interval_is_students(n):
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, n))
    v, want = rladapter.compare(a, b), ttest_rel(a, b).confidence_interval()
    assert (v["lo"], v["hi"], v["difference"]) == pytest.approx((*want, (a - b).mean())) and v["verdict"] == (
        "better" if want.low > 0 else "worse" if want.high < 0 else "no clear difference"
    )
    same = [rladapter.compare(*rng.normal(size=(2, n)))["verdict"] for _ in range(2_000)]
    assert 0.02 < np.mean([x != "no clear difference" for x in same]) < 0.08  # says so wrongly in one of twenty cases


def test_comprehension_in_words(tmp_home):
    assert rladapter.comprehension_verdict(exhibit("comprehension"), "laptop") == "no runs yet"
    s = said(
        rladapter.comprehension_verdict,
        "comprehension",
        comprehend=lambda label, seed, part: 0.4 + {RULES: 1, GOALS: -1, DECISION: seed - 1}.get(label, 0) * part / 10,
    ).split("\n")

    def find(l):
        return next(x for x in s if x.startswith(l + ":"))

    assert (
        "from 0.425 to 0.500: rises, +0.075 (3 seeds" in find(RULES)
        and "falls, -0.075" in find(GOALS)
        and "no clear change" in find(DECISION)
        and "from 0.400 to 0.400: no clear change" in find(CONSTANT)
    )
    assert (
        s[-1]
        == f"{ADAPTER}, tuning after stage 1: the adapter's loss goes from 2.00 to 1.10: lower, -0.90 (3 seeds, 95 % interval -1.15 to -0.65)."
    )


def test_numbers_of_the_tuning(tmp_home):
    fabricate(e := exhibit("comprehension"))
    fig, t = drawn(e)
    close(fig)
    s = t[t.metric == "sft"]
    assert (
        set(s.label) == {ADAPTER}
        and s.loss_before.tolist() == [2, 2, 2]
        and s.loss_after.tolist() == pytest.approx([1, 1.1, 1.2])
        and PPO not in set(t.label)
    )


def test_words_of_the_logs(tmp_home):
    "Percent with a goal of the taught habit, and different sentences, in the first and the last stage; arms without a tiny adapter and runs without a log are left out."
    fabricate(e := exhibit("ablation"), keep=lambda label, seed: label in (ADAPTER, UNTUNED, RULES))
    assert rladapter.words(e, "laptop", ["survival"]).empty

    def log(label, seed, *said):
        path = next(
            view.recipe_file(x, "laptop", seed)
            for x in (rc.resolve(r, "laptop") for r in rc.recipes_of(e, "laptop"))
            if x.method == label
        )
        folder = tmp_home / "data" / "runs" / path.stem
        folder.mkdir(parents=True)
        path.write_text(json.dumps(dict(json.loads(path.read_text()), folder=str(folder.relative_to(tmp_home)))))
        (folder / "exchanges.jsonl").write_text(
            "".join(
                json.dumps(
                    dict(
                        query=i,
                        env=0,
                        step=step,
                        l=None,
                        did="noop",
                        goals=goals,
                        sentence=", ".join(goals),
                        unlocked=[],
                        episode=0,
                        fresh=False,
                        events=[],
                    )
                )
                + "\n"
                for i, (step, goals) in enumerate(said)
            )
        )

    late = STEPS // 8 - 9
    habit, good = ["survival", "sleep"], ["chop tree"]
    log(ADAPTER, 0, (0, habit), (9, habit), (50, habit), (99, good), (late, good), (late, good))
    log(ADAPTER, 1, (0, good), (9, good), (late, habit), (late, good))
    log(RULES, 0, (0, habit), (late, habit))
    log(UNTUNED, 0, (0, habit), (late, habit))
    t = rladapter.words(e, "laptop", ["survival"])
    assert list(t.index) == [UNTUNED, ADAPTER] and t.seeds.tolist() == [1, 2]
    assert (
        t.loc[ADAPTER, "habit"].to_dict() == {"first stage": 37.5, "last stage": 25.0}
        and t.loc[ADAPTER, "different"].to_dict() == {"first stage": 50.0, "last stage": 75.0}
        and t.loc[UNTUNED, "habit"].to_dict() == {"first stage": 100.0, "last stage": 100.0}
    )


def test_a_stage_that_was_not_tuned_is_said(tmp_home):
    s = said(rladapter.comprehension_verdict, "comprehension", sft=lambda seed: (2.0, 1.0) if seed else (None, None))
    assert s.endswith("1 tuning not done: too few rows.") and "lower, -1.00 (2 seeds" in s
    fig, t = drawn(exhibit("comprehension"))
    fig.canvas.draw()
    close(fig)


def test_behaviours(tmp_home):
    made = {
        ADAPTER: lambda s: (50.0 + s, 100),
        GOALS: lambda s: (None, 0),
        RULES: lambda s: (None, 0) if s == 0 else (30.0, 50),
    }
    fabricate(
        e := exhibit("behaviour"),
        behave=lambda label, seed: made.get(label, lambda s: (40.0, 100))(seed),
        keep=lambda label, seed: (label, seed) != (CONSTANT, 2),
    )
    p, t = drawn(e)
    t = t.set_index("method")
    assert (
        t.loc[ADAPTER, ["percent", "chances", "n", "difference", "verdict"]].tolist() == [51, 300, 3, 11, "better"]
        and t.loc[RULES, ["percent", "chances", "n", "verdict"]].tolist() == [30, 100, 2, "worse"]
        and t.loc[GOALS, "n"] == 0
    )
    row = p.loc["sleeps when tired"]
    assert (
        row[GOALS] == "no chance"
        and row[ADAPTER] == "51.0 ± 1.0 of 300; better"
        and row[PPO] == "40.0 ± 0.0 of 300"
        and p.loc["runs lacking", CONSTANT] == "1 missing"
    )
    s = rladapter.behaviour_verdict(e, "laptop").split("\n")
    assert (
        s[-1]
        == f"{ADAPTER}, against 'PPO', 3 seeds: more often: sleeps when tired (+11.0); less often: none; no clear difference: 0 of 1 behaviour."
        and not any(x.startswith(GOALS) for x in s)
    )


def test_costs(tmp_home):
    fabricate(e := exhibit("cost"), keep=lambda label, seed: label != DECISION)
    p, t = drawn(e)
    r = t.set_index("method").loc[ADAPTER]
    assert r[
        ["n", "steps", "calls", "share", "calls_per_million", "tokens_in_per_million", "llm_seconds_per_million"]
    ].tolist() == pytest.approx([3, STEPS, 400, 20, 4e8 / STEPS, 8e10 / STEPS, 6e7 / STEPS])
    assert p.loc[ADAPTER, ["tokens in / out", "of the time", "LM hours per 1M steps", "n"]].tolist() == [
        "80,000 / 12,000",
        "20.0 %",
        f"{6e7 / STEPS / 3600:.2f}",
        "3",
    ] and p.loc[DECISION, ["queries", "n"]].tolist() == ["", "3 missing"]


# ---- verdicts


def test_verdicts_of_the_main_table(tmp_home):
    e = exhibit("main")
    assert rladapter.main_verdict(e, "laptop").count("no runs yet") == len(rladapter.QUESTIONS)
    gain = {RANDOM: lambda s: -2, ADAPTER: lambda s: 1, UNTUNED: lambda s: s - 1, GOALS: lambda s: 3}
    s = said(
        rladapter.main_verdict, "main", score=lambda label, seed: 5 + 10 * seed + gain.get(label, lambda s: 0)(seed)
    ).split("\n")

    def find(w):
        return next(x for x in s if x.startswith(w))

    assert (
        find("Does PPO learn")
        == "Does PPO learn ('PPO' above 'Random actions')? yes, +2.00 (3 seeds, 95 % interval +2.00 to +2.00)."
        and "? no clear difference, +0.00" in find("Does a text head")
        and "? yes, +1.00" in find("Does the full method help")
    )
    assert "? no, the opposite, -2.00" in find("Do the full method's words") and "? no clear difference, +1.00" in find(
        "Does tuning the adapter help"
    )


def test_one_seed_decides_nothing(tmp_home):
    kw = dict(seeds=(0,), score=lambda label, seed: len(label), behave=lambda label, seed: (len(label), 9))
    for f, id in (
        (rladapter.main_verdict, "main"),
        (rladapter.comprehension_verdict, "comprehension"),
        (rladapter.behaviour_verdict, "behaviour"),
    ):
        for s in said(f, id, **kw).split("\n"):
            assert "one seed decides nothing" in s and not any(
                w in s for w in ("? yes", "? no, ", ": rises", ": falls", ": lower", "sleeps")
            ), s
    s = said(rladapter.ablation_verdict, "ablation", **kw)
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
    fabricate(e := exhibit("main"), keep=lambda label, seed: label != PPO)
    fabricate(e, keep=lambda label, seed: label == PPO, status="failed")
    assert drawn(e)[0].loc["ours, laptop scale", PPO, BUDGET]["n, or source"] == "3 failed" and rladapter.main_verdict(
        e, "laptop"
    ).split("\n")[0].endswith("no runs yet.")


# ---- what a scale changes


def test_deviations_name_the_code():
    t = exhibits.deviations("rladapter", "laptop").set_index("field")
    assert (
        t.loc["steps", ["paper_scale", "this_scale", "source"]].tolist() == ["5000000", str(STEPS), "AdaRefiner's code"]
        and set(t.part) <= {"guided training", "evaluation of agents", "seeds"}
        and not {"last", "points"} & set(t.index)
    )
