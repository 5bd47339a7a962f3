"Statistics: intervals are Student's, words keep their error rate, tables keep theirs, and what is there is seen."

import numpy as np
import pytest
from scipy.stats import ttest_rel

from promptnb.report import stats
from promptnb.report.stats import BETTER, UNRESOLVED, UNTESTED, WORSE, compare, holm, judged, summary

WORDS = (BETTER, WORSE)


def noise(rng, repetitions, arms, tasks, shared, seeds=3):
    "Returns of arms that do not differ (repetitions, arms, seeds, tasks); tasks share a part of a seed's variance."
    own = rng.normal(size=(repetitions, arms, seeds, tasks))
    common = rng.normal(size=(repetitions, arms, seeds, 1))
    return (1 - shared) ** 0.5 * own + shared**0.5 * common


def word_of(a, b):
    "The word of a table of one comparison."
    v = compare(a, b)
    return stats.verdict(v["n"], v["difference"], v["p"])


def words_of(arms, base):
    "The words of one table: every arm (seeds, tasks) against `base`."
    return judged([compare(arm, base) for arm in arms]).verdict


# ---- one comparison


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_comparison_is_students(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    v, want = compare(a, b), ttest_rel(a, b)
    interval = want.confidence_interval()
    assert (v["n"], v["difference"]) == (n, pytest.approx((a - b).mean()))
    assert (v["lo"], v["hi"], v["p"]) == pytest.approx((interval.low, interval.high, want.pvalue))


def test_tasks_are_averaged_before_seeds_are_looked_at():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert compare(a, b) == pytest.approx(compare(a.mean(1), b.mean(1)))


def test_a_seed_that_is_not_finite_is_left_out():
    a, b = np.arange(4.0), np.array([0.0, 0.5, np.nan, 1.0])
    assert compare(a, b) == pytest.approx(compare(a[[0, 1, 3]], b[[0, 1, 3]]))


def test_equal_seeds_are_not_resolved_and_a_constant_gap_is():
    x = np.arange(3.0)
    assert compare(x, x)["p"] == 1
    assert judged([compare(x + 1, x)]).verdict[0] == BETTER


# ---- words


def test_the_word_of_a_table_of_one_is_that_of_its_p():
    a, b = np.random.default_rng(1).normal(size=(2, 3, 4))
    assert word_of(a + 9, b) == words_of([a + 9], b)[0] == BETTER


@pytest.mark.parametrize("n, word", [(1, UNTESTED), (2, UNRESOLVED), (3, BETTER)])
def test_a_word_needs_three_seeds(n, word):
    x = np.random.default_rng(0).normal(size=(n, 4))
    assert judged([compare(x + 1000, x)]).verdict[0] == word


def test_the_sign_makes_the_word():
    x = np.random.default_rng(0).normal(size=(3, 4))
    assert [*judged([compare(x + 99, x), compare(x - 99, x)]).verdict] == [BETTER, WORSE]


def test_a_word_depends_on_its_table():
    a, b = np.array([1.0, 1.3, 1.6]), np.zeros(3)
    v = compare(a, b)
    assert v["p"] < 0.05 < 4 * v["p"]
    assert judged([v]).verdict[0] == BETTER
    assert judged([v] * 4).verdict[0] == UNRESOLVED


def test_untested_rows_do_not_count_in_a_table():
    a, b = np.array([1.0, 1.3, 1.6]), np.zeros(3)
    one_seed = compare(a[:1], b[:1])
    assert judged([compare(a, b), *[one_seed] * 9]).verdict[0] == BETTER


def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_no_comparison_is_an_empty_table_with_all_columns():
    t = judged([], ("family", "method"))
    assert t.empty and {"family", "method", "difference", "lo", "hi", "p_holm", "verdict"} <= set(t)


# ---- error rates: what this page is for


@pytest.mark.parametrize("shared", [0, 0.9])
@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_at_most_seven_percent_of_words_are_false(tasks, shared):
    pairs = noise(np.random.default_rng(tasks), 2000, 2, tasks, shared)
    said = [word_of(a, b) in WORDS for a, b in pairs]
    assert 0.03 < np.mean(said) < 0.07


@pytest.mark.parametrize("shared", [0, 0.9])
@pytest.mark.parametrize("arms", [5, 10])
def test_at_most_seven_percent_of_null_tables_have_a_word(arms, shared):
    tables = noise(np.random.default_rng(arms), 500, arms + 1, 3, shared)
    said = [words_of(arms, base).isin(WORDS).any() for base, *arms in tables]
    assert np.mean(said) <= 0.07


@pytest.mark.parametrize("n, effect, least", [(3, 8, 0.8), (5, 3, 0.9), (10, 1.5, 0.95)])
def test_what_is_there_is_seen(n, effect, least):
    "`effect`: the true difference in standard deviations of a seed's difference."
    d = np.random.default_rng(n).normal(effect, 1, size=(500, n))
    assert np.mean([word_of(row, np.zeros(n)) == BETTER for row in d]) > least


def test_no_word_is_said_of_a_small_difference_with_three_seeds():
    d = np.random.default_rng(0).normal(0.5, 1, size=(500, 3))
    assert np.mean([word_of(row, np.zeros(3)) == BETTER for row in d]) < 0.2


def test_a_table_has_its_columns_whatever_its_rows_hold():
    one = dict(method="a", **compare([1.0, 2.0, 3.0], [0.0, 0.5, 0.2]))
    for rows in ([], [one], [one, dict(one, start=2.0)]):
        assert {"method", "start", "verdict"} <= set(judged(rows, ("method", "start")).columns)


# ---- how many seeds


@pytest.mark.parametrize("effect, n, size", [(1, 5, 1), (3, 3, 1), (3, 5, 10), (1.5, 10, 10)])
def test_the_power_is_the_share_of_words_in_simulated_tables(effect, n, size):
    "The first step of Holm's correction: the smallest p of a table meets the level divided by its size."
    d = np.random.default_rng(n).normal(effect, 1, size=(2000, n))
    words = [stats.p_value(row) < stats.ALPHA / size for row in d]
    assert stats.power(effect, 1, n, size) == pytest.approx(np.mean(words), abs=0.03)


@pytest.mark.parametrize("effect, comparisons", [(0.4, 1), (2.0, 1), (2.0, 10), (-2.0, 10)])
def test_the_seeds_needed_are_the_fewest(effect, comparisons):
    n = stats.seeds_needed(effect, 1, comparisons)
    assert stats.power(effect, 1, n, comparisons) >= stats.CHANCE
    assert n == stats.LEAST or stats.power(effect, 1, n - 1, comparisons) < stats.CHANCE


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("comparisons", [1, 10, 40])
def test_the_smallest_seen_is_just_seen(n, comparisons):
    effect = stats.smallest_seen(7.0, n, comparisons)
    assert stats.power(effect, 7.0, n, comparisons) == pytest.approx(stats.CHANCE)


def test_edges_of_the_power():
    assert stats.power(5, 1, 2) == 0 and stats.smallest_seen(1, 2) == np.inf  # two seeds get no word
    assert stats.seeds_needed(0, 1) is None and stats.seeds_needed(1e-3, 1) is None
    assert stats.seeds_needed(1, 0) == stats.LEAST and stats.smallest_seen(0, 3) == 0  # seeds that agree
    assert stats.power(100, 1, 5) == stats.power(30, 1, 5, 1) == 1  # too sure for scipy, which says NaN


# ---- summaries


def test_a_summary_is_over_seed_means():
    x = np.array([[1.0, 3.0], [5.0, 7.0], [3.0, 5.0]])
    s = summary(x)
    assert (s["mean"], s["std"], s["n"]) == (4, 2, 3)
    assert (s["lo"], s["hi"]) == pytest.approx(stats.student(np.array([2.0, 6.0, 4.0])))


@pytest.mark.parametrize("n, known", [(3, False), (9, False), (10, True)])
def test_the_iqm_has_an_interval_from_ten_seeds(n, known):
    s = summary(np.random.default_rng(0).normal(size=(n, 3)))
    assert np.isfinite(s["iqm_lo"]) == known
    assert not known or s["iqm_lo"] < s["iqm"] < s["iqm_hi"]


def test_the_interval_of_the_iqm_redraws_whole_seeds():
    "Tasks that are copies of each other tell no more than one."
    x = np.random.default_rng(0).normal(size=(12, 1))
    one, five = summary(x), summary(np.repeat(x, 5, axis=1))
    width = [s["iqm_hi"] - s["iqm_lo"] for s in (one, five)]
    assert width[1] == pytest.approx(width[0], rel=0.15)


def test_one_seed_has_no_interval():
    s = summary(np.array([[1.0, 2.0]]))
    assert s["n"] == 1 and np.isnan([s["std"], s["lo"], s["iqm_lo"]]).all()
