"The panels of explore.ipynb, without a browser: what they compute, and what their widgets do when used."

import time

import pytest
import torch
from homes import DATA, new_home

from promptnb import explore, recipes
from promptnb.core import PromptnbError, minari_dir
from promptnb.experiments.guided import train
from promptnb.experiments.run import Run

POLICY = "cheetah-dir, smoke scale, seed 0 (prompt-dt)"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A workbook with a finished smoke run; everything in this file happens there."
    made = new_home(tmp_path_factory.mktemp("explore") / "home", *DATA, "data/results", "data/runs/policies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTNB_HOME", str(made))
        patch.delenv("MINARI_DATASETS_PATH", raising=False)
        yield made


@pytest.fixture(scope="module")
def bench(home):
    "The bench of its one prompted policy."
    return explore.bench(explore.policies()[POLICY])


@pytest.fixture
def panel(home):
    "The widgets of a prompt bench."
    return explore.BenchPanel(explore.PromptBench(explore.policies()))


def test_policies_are_those_that_are_finished_and_read_prompts(home):
    assert list(explore.policies()) == [POLICY]


def test_without_a_policy_the_panels_say_how_to_get_one(tmp_home):
    for panel in (explore.prompt_bench(), explore.tuning_panel()):
        assert "promptnb run prompt_tuning_dt" in panel.data
    assert "promptnb run rladapter" in explore.guidance_panel().data


def test_a_page_that_is_only_written_has_pictures(home, guided, monkeypatch):
    monkeypatch.setattr(explore, "only_written", lambda: True)
    for panel in (explore.prompt_bench, explore.tuning_panel, explore.results_panel, explore.guidance_panel):
        assert panel().data.startswith(b"\x89PNG")


def test_the_prompt_as_drawn_plays_as_the_policy_does(bench):
    prompt = bench.demos.prompt[0]
    a, b = bench.play(0, dict(a=prompt, b=prompt), episodes=3).values()
    assert (a.returns == b.returns).all() and len(a.returns) == 3
    other = explore.reordered(prompt, [0])
    assert (bench.play(0, dict(a=other), episodes=3)["a"].returns != a.returns).any()


def test_sixteen_episodes_take_under_three_seconds(bench):
    bench.play(0, dict(yours=bench.demos.prompt[0]), 1)
    spent = time.process_time()  # not the clock's: other tests run beside this one
    bench.play(0, dict(yours=bench.demos.prompt[0]), 16)
    assert time.process_time() - spent < 3


def test_a_segment_is_the_demonstrations_own(bench):
    made = bench.segment(0, "expert", 1, 0.0)
    store = explore.demonstrations(bench.family, "expert", (bench.demos.task_ids[0],))
    first = store.first[1 % len(store)]
    assert torch.equal(made.a, store.a[first : first + len(made)])


def test_data_of_a_quality_that_is_lacking_is_collected(bench):
    lacking = [q for q in bench.family.qualities if not (minari_dir() / f"promptnb/cheetah-dir-00/{q}-v0").exists()]
    assert lacking and len(bench.segment(0, lacking[0], 0, 0.5)) == len(bench.demos.prompt[0])


def test_widgets_of_the_bench_change_the_prompt(panel):
    drawn, picture = panel.desk.draft.drawn, panel.panel.picture
    panel.order.value = panel.order.value[::-1]
    assert torch.equal(panel.desk.draft.prompt.s, drawn.s.flip(0)) and panel.panel.picture != picture
    panel.step.value, panel.source.value, panel.start.value = 0, "expert", 0.0
    panel.take.click()
    changed = panel.desk.draft.prompt
    assert not torch.equal(changed.s[-1], drawn.s[0]) and torch.equal(changed.s[0], drawn.s[-1])
    panel.blur.value = 1.0
    assert not torch.equal(panel.desk.draft.prompt.s, changed.s)
    panel.go.click()
    assert "16 episodes" in panel.line.value and set(panel.desk.games) == {"yours", "as drawn"}
    panel.undo.click()
    assert torch.equal(panel.desk.draft.prompt.s, drawn.s) and panel.blur.value == 0


def test_trouble_is_a_line_of_the_panel(panel, monkeypatch):
    def refuse(*_):
        raise PromptnbError("no <such> data")

    monkeypatch.setattr(panel.desk.bench, "expert_return", refuse)
    panel.go.click()
    assert "no &lt;such&gt; data" in panel.line.value


def test_a_page_without_widgets_gets_a_picture(panel):
    bundle = panel.panel._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)


@pytest.mark.parametrize("name", explore.watchable())
def test_a_tuner_is_watched_to_its_end(bench, name):
    live = explore.Live(bench, name, steps=2, every=2, episodes=1)
    live.run()
    assert [t for t, _ in live.judged] == [0, 1, 2] and [t for t, _ in live.returns] == [0, 2]
    assert len(live.now) == bench.demos.G and live.step == 2
    unmoved, moved = explore.live_figure(bench, 0), explore.live_figure(bench, 0, live)
    assert explore.png(unmoved) != explore.png(moved)


def test_every_tuner_is_offered_or_named_with_the_reason(home):
    panel = explore.TuningPanel(explore.policies())
    offered, (left_out,) = (
        {b.description for b in panel.starts},
        [w for w in panel.panel.children if "not here" in str(w)],
    )
    named = {name for name in explore.TUNERS if f"{name} (" in left_out.value}
    assert offered | named == set(explore.TUNERS) and not offered & named
    assert {"full", "soft", "lora", "gradient", "diffuser", "ranking"} <= offered and "needs a policy" in left_out.value


def test_what_is_watched_is_what_the_tuner_does(bench):
    live = explore.Live(bench, "ranking", steps=2, every=9)
    live.run()
    out = live.made(2).adapt(bench.policy, bench.demos, rng=live.rng)
    assert torch.equal(out.assignments[0][0].prompt.s, live.prompts.s)


@pytest.mark.parametrize("name", ["full", "soft", "diffuser"])
def test_fewer_steps_are_the_first_of_more(bench, name):
    live = explore.Live(bench, name)
    short, long = (live.made(n).adapt(bench.policy, bench.demos, rng=live.rng).log for n in (2, 4))
    assert [e for e in long if e["step"] <= 2 and e["task"] == 0] == [e for e in short if e["task"] == 0]


def test_a_tuner_that_plays_is_watched(home, bench):
    live = explore.Live(bench, "hill", steps=2, every=2, episodes=1, online=True)
    live.run()
    assert [t for t, _ in live.judged] == [1, 2] and live.score.env_steps > 0


def test_only_tuners_that_can_play_are_offered_where_play_judges(home):
    panel = explore.TuningPanel(explore.policies())
    panel.online.value = True
    assert {b.description for b in panel.starts if not b.disabled} == {n for n in explore.TUNERS if explore.plays(n)}
    panel.online.value = False
    assert not any(b.disabled for b in panel.starts)


@pytest.mark.parametrize("name", ["hill", "full", "diffuser"])
def test_stop_ends_a_tuner_after_its_step(home, name):
    panel = explore.TuningPanel(explore.policies())
    panel.steps.value = 200
    panel.start(name)
    assert panel.starts[0].disabled and not panel.end.disabled
    panel.end.click()
    panel.thread.join(60)
    assert not panel.thread.is_alive() and panel.live.step < 200
    assert f"{name}: stopped after step" in panel.line.value and panel.end.disabled


def test_results_are_filtered_and_compared(home):
    panel = explore.ResultsPanel(explore.Results())
    everything = len(panel.shown)
    panel.filters["method"].value = "PTDT-offline, expert prompt"
    assert 0 < len(panel.shown) < everything and set(panel.shown.method) == {"PTDT-offline, expert prompt"}
    panel.filters["method"].value = explore.ANY
    t = panel.results.table
    a, b = (t.index[t.method == f"PTDT-offline, {q} prompt"][0] for q in ("expert", "random"))
    panel.pair[0].value, panel.pair[1].value = a, b
    fields = panel.results.differing(a, b).set_index("field")
    assert list(fields.loc["tune.prompt_quality"]) == ["highest", "lowest"] and "tune.hyper.m" not in fields.index
    assert "tune.prompt_quality" in panel.difference.value


def test_methods_of_one_name_in_two_papers_are_two_lines(home):
    results = explore.Results()
    two = results.table.index[results.table["return"].notna()][:2]
    for name in ("family", "method", "scale", "kind"):
        results.table.loc[two, name] = results.table.loc[two[0], name]
    results.table.loc[two, "paper"] = ["one", "another"]
    lines = explore.curves_figure(results, two, "return").axes[0].lines
    assert [x.get_label() for x in lines] == ["one (n = 1)", "another (n = 1)"]


@pytest.fixture(scope="module")
def guided(home):
    "A finished run in Crafter that rules advise."
    pytest.importorskip("crafter")
    r = recipes.resolve(recipes.RECIPES["rladapter/crafter/rules"], "smoke")
    train(Run(r, "smoke"))
    return explore.guided_runs()


def test_every_exchange_is_replayed_to_the_world_that_was_told(guided):
    (folder,) = guided.values()
    replay = explore.Replay(folder)
    worlds = [replay.world(k) for k in range(len(replay.rows))]
    assert len(worlds) > 10 and all(worlds)  # a world that is not what the prompt says is None
    assert len({w.game.picture().tobytes() for w in worlds}) > 3


def test_a_world_that_was_not_told_is_not_shown(guided):
    (folder,) = guided.values()
    replay = explore.Replay(folder)
    replay.seed += 1
    assert not all(replay.pictures(k) for k in range(len(replay.rows)))


def test_an_exchange_is_shown_with_what_was_done_next(guided):
    panel = explore.GuidancePanel(guided)
    first = panel.panel.picture
    panel.at.value = 2
    words = panel.replay.words(2).set_index("what").text
    assert words["told"].startswith("sees: ") and words["decision"] and words["did next"]
    assert panel.panel.picture != first and words["decision"] in panel.text.value
