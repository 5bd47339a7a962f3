"""What every tuner promises, whatever it does: each promise for each entry of TUNERS and each of its switches.

The promises are `promptnb.tuners.checks`; a new entry of the registry is covered by being there."""

import contextlib
import functools
import itertools
import json
import time
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from toys import A, G, Judge, K, P, S, toy

from promptnb.core import PromptnbError, action_loss
from promptnb.models.dt import Policy
from promptnb.tuners import checks
from promptnb.tuners.checks import PROMISES, Trial, actions, demo_error
from promptnb.tuners.core import TUNERS, SoftPrompt, Tuner, WeightTuner, make_tuner, same_batch, tuner_class
from promptnb.tuners.ranking import NOISES

SMALL = dict(steps=12, m=12, lr=1e-2, mu=0.3, eta=0.3)  # for the fields that a tuner has


def small(name, **hyper) -> Tuner:
    "The tuner of that name, small enough for the toy."
    return make_tuner(name, **{**tuner_class(name).accepted(**SMALL), **hyper})


def switches(name):
    "Each boolean field of a tuner turned on, and bf16 where it has a precision."
    cls = tuner_class(name)
    on = [{f.name: True} for f in fields(cls) if f.default is False]
    return on + [cls.accepted(precision="bf16")] * bool(cls.accepted(precision=""))


def label(x):
    "A case's name: that of the tuner and of what is turned on."
    if isinstance(x, str):
        return x
    return ",".join(k if v is True or k == "precision" else f"{k}={v}" for k, v in x.items())


CASES = [(name, kw) for name in TUNERS for kw in ({}, *switches(name))]
NOISY = {"noisy", "seven", "precision"}  # switches that add noise: they may end a little above their start

each_case = pytest.mark.parametrize("name, kw", CASES, ids=label)
each_tuner = pytest.mark.parametrize("name", TUNERS)
each_search = pytest.mark.parametrize("name", [n for n in TUNERS if tuner_class(n).accepted(online=True)])


@functools.cache
def trial(name, prompt=True, T=40, **kw) -> Trial:
    "The tuner on the toy; the tests of one case share it."
    tuner = small(name, **kw)
    return Trial(tuner, *toy(prompt, T, context=tuner.needs_encoder), Judge)


@contextlib.contextmanager
def refusal_allowed():
    "A tuner may refuse a setting in one line."
    try:
        yield
    except PromptnbError as e:
        assert "\n" not in str(e)
        pytest.skip(f"refused: {e}")


# ---- the registry


@each_tuner
def test_entry(name):
    "A registry line names a documented dataclass of hyper-parameters that all have defaults."
    cls = tuner_class(name)
    assert issubclass(cls, Tuner) and is_dataclass(cls)
    assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(")  # not the one that dataclass writes
    assert make_tuner(name) == cls() and isinstance(make_tuner(name), cls)


@each_tuner
def test_idle_and_prepares_name_fields(name):
    cls = tuner_class(name)
    own = {f.name for f in fields(cls)}
    assert set(cls.IDLE) <= own and set(cls.PREPARES) <= own


@each_tuner
def test_misspelt_hyper_parameter(name):
    for f in fields(tuner_class(name)):
        with pytest.raises(PromptnbError, match=f"hyper-parameter of tuner '{name}'.*did you mean '{f.name}'"):
            make_tuner(name, **{f.name + "x": 1})
    with pytest.raises(PromptnbError, match="unknown hyper-parameter"):
        make_tuner(name, zzz=1)


@each_tuner
def test_misspelt_name(name):
    with pytest.raises(PromptnbError, match=f"unknown tuner.*did you mean '{name}'"):
        make_tuner(name + "_")


# ---- the promises


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.__name__)
@each_case
def test_promise(name, kw, promise):
    how = {}
    if promise is checks.helps and kw.keys() & NOISY:
        how = dict(slack=1.05)
    if promise is checks.logs_the_truth and "precision" in kw:
        how = dict(rtol=2e-2)
    with refusal_allowed():
        promise(trial(name, **kw), **how)


@pytest.mark.parametrize("mode", ["train", "eval but for the model"])
@each_case
def test_a_policy_in_any_mode_is_left_alone(name, kw, mode):
    "Also one that is in training, or in part, and half of whose parameters want no gradient."
    tuner = small(name, **kw)
    policy, demos = toy(context=tuner.needs_encoder)
    policy.train(mode == "train")
    policy.model.train()
    for p in list(policy.parameters())[::2]:
        p.requires_grad_(False)
    with refusal_allowed():
        checks.leaves_its_input_alone(Trial(tuner, policy, demos, Judge))


@pytest.mark.parametrize("prompt, T", [(False, 40), (True, P - 1)], ids=["no prompt", "padded prompt"])
@each_case
def test_zero_steps_are_the_start_of_other_policies(name, kw, prompt, T):
    "Of one that reads no prompt, and with a prompt shorter than its place."
    case = trial(name, prompt, T, **kw)
    assert case.demos.prompt.mask.all() == (T > P)
    with refusal_allowed():
        checks.starts_where_it_says(case)


@each_case
def test_environment_steps_are_counted_from_where_the_judge_stands(name, kw):
    judge = Judge()
    case = trial(name, **kw)
    with refusal_allowed():
        out = case.tuner.prepare(case.policy, (), 0).adapt(case.policy, case.demos, 0, judge)
        assert out.env_steps == judge.env_steps - 77


@each_tuner
def test_error_on_demonstrations(name):
    "What the promises call error is the mean squared error of actions over real steps."
    case = trial(name)
    got = demo_error(case.start, case.demos)
    for (policy, row), h, error in zip(case.start, same_batch(case.demos), got):
        pred = policy.model(h, policy.prefix(torch.tensor([row])))
        want = action_loss(pred, h.a, h.mask, "none").mean()
        torch.testing.assert_close(error, want, rtol=1e-6, atol=0)


@each_tuner
def test_merging_changes_nothing(name):
    "A tuner that folds its modules into the weights in the end leaves a plain policy that acts the same."
    if getattr(tuner_class(name), "release", WeightTuner.release) is WeightTuner.release:
        return  # it has nothing to fold
    case = trial(name)
    plain = case.policy.model.state_dict().keys()
    assert all(p.model.state_dict().keys() == plain for p, _ in case.result.assignments)
    unmerged = case.again(whole=False)
    torch.testing.assert_close(actions(unmerged.assignments), actions(case.result.assignments), rtol=0, atol=1e-5)


@each_tuner
def test_is_quick(name):
    case = trial(name)
    start = time.perf_counter()
    case.again()
    assert time.perf_counter() - start < 5


@each_tuner
def test_without_a_prompt(name):
    "On a policy that takes no prompt a tuner works, or says in one line that it needs one."
    tuner = small(name, **tuner_class(name).accepted(steps=2))
    policy, demos = toy(prompt=False, context=tuner.needs_encoder)
    try:
        out = tuner.adapt(policy, demos, 0, Judge())
    except PromptnbError as e:
        needed = "context encoder" if tuner.needs_encoder else "prompt"
        assert f"needs a policy with a {needed}" in str(e) and "\n" not in str(e)
    else:
        assert len(out.assignments) == G and torch.isfinite(actions(out.assignments)).all()


@pytest.mark.parametrize("other", [dict(layers=1), dict(layers=3), dict(shared_embed=True)], ids=str)
def test_no_policy_is_loaded_in_part(other, tmp_path):
    "Weights too many or too few for the configuration are an error, never silently another policy."
    toy()[0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(dict(config, model=dict(config["model"], **other))))
    with pytest.raises((RuntimeError, PromptnbError)):
        Policy.from_pretrained(tmp_path)


# ---- searches, online and off


@each_search
def test_online_needs_a_score(name):
    with pytest.raises(PromptnbError, match="needs `score`"):
        small(name, online=True).adapt(*toy(), 0)


@each_search
def test_online_pays_for_every_query(name):
    "Also where its rewards are seen at the log's steps."
    asked, judge = [], Judge()

    def counting(prompts):
        asked.append(prompts.t[..., 0].numel())
        return judge(prompts)

    assert small(name, online=True).adapt(*toy(), 0, counting).env_steps == 0  # this one counts no steps
    out = small(name, online=True).adapt(*toy(), 0, Judge())
    assert out.env_steps == 10 * sum(asked)


@each_search
def test_a_step_asks_as_many_queries_as_it_has_candidates(name):
    "Searches are compared at an equal number of queries. Every fifth step, and the end, are logged by one more."
    asked = []

    def counting(prompts):
        asked.append(prompts.t.shape[1])
        return Judge()(prompts)

    small(name, online=True, m=6, steps=5).adapt(*toy(), 0, counting)
    assert sorted(asked) == [1, 1] + [6] * 5


@pytest.mark.parametrize("name", ["hill", "resample"])
def test_luck_of_the_episodes_moves_no_climber(name):
    "Each call plays episodes of its own: what is kept was compared with what met the same ones."
    calls, judge = itertools.count(), Judge()

    def lucky(prompts):
        return judge(prompts) + 1e3 * (-1.0) ** next(calls)

    plain, luck = (small(name, online=True).adapt(*toy(), 0, score) for score in (judge, lucky))
    for (a, i), (b, j) in zip(plain.assignments, luck.assignments):
        assert i == j and torch.allclose(a.prompt.s, b.prompt.s, atol=1e-4)


@each_search
def test_one_candidate_cannot_be_compared(name):
    with pytest.raises(PromptnbError, match="m is 1, but must be at least 2"):
        small(name, m=1)


@each_search
@pytest.mark.parametrize("online", [False, True], ids=["offline", "online"])
def test_the_best_is_never_worse(name, online):
    "With keep='best' the result is no worse than the start, even with absurd steps."
    absurd = tuner_class(name).accepted(mu=30.0, eta=50.0)
    case = trial(name, keep="best", online=online, **absurd)
    before, after = (checks.objective(case, x) for x in (case.start, case.result.assignments))
    assert (after <= before + 1e-6).all()


@each_search
@pytest.mark.parametrize("distribution", NOISES)
def test_every_noise(name, distribution):
    case = trial(name, distribution=distribution)
    before, after = (demo_error(x, case.demos) for x in (case.start, case.result.assignments))
    assert (after <= before).all()


@each_search
@pytest.mark.parametrize("bad", [dict(distribution="gausian"), dict(keep="bset")], ids=str)
def test_bad_choice(name, bad):
    with pytest.raises(PromptnbError, match="did you mean '(gaussian|best)'"):
        make_tuner(name, **bad).adapt(*toy(), 0)


# ---- what the promises look at


def test_windows_have_the_form_of_the_policy():
    policy, _ = toy()
    h = checks.windows(policy)
    assert h.s.shape == (9, K, S) and h.a.shape == (9, K, A)
    assert h.mask[:, -1].all() and (h.mask == 0).any()


class Silent(SoftPrompt):
    "Moves its prompts and counts nothing."

    def adapt(self, *args):
        return replace(super().adapt(*args), trainable=0)


def test_a_prompt_that_moves_and_is_not_counted_is_found():
    with pytest.raises(AssertionError, match="prompts move that are not counted"):
        checks.moves_only_what_it_counts(Trial(Silent(steps=3), *toy()))


def test_another_row_of_the_prompts_is_another_prompt():
    case = trial("none")
    swapped = [(policy, G - 1 - row) for policy, row in case.start]
    assert checks.same_prompts(case.start, case.start) and not checks.same_prompts(case.start, swapped)


@dataclass
class Wordless(SoftPrompt):
    "Writes a log whose entries lack one thing."

    missing: str = "loss"

    def adapt(self, *args):
        out = super().adapt(*args)
        return replace(out, log=[{k: v for k, v in e.items() if k != self.missing} for e in out.log])


@pytest.mark.parametrize("missing", ["loss", "step", "task"])
def test_a_log_that_lacks_something_breaks_a_promise(missing):
    "An AssertionError, which `check_tuner` reports, and not a KeyError."
    case = Trial(Wordless(steps=3, missing=missing), *toy())
    for promise in (checks.gives_each_task_a_policy, checks.logs_the_truth):
        with pytest.raises(AssertionError, match="log entry|not every task has"):
            promise(case)


@each_tuner
def test_refuses_a_policy_that_reads_no_prompt(name, refused):
    from promptnb.models.lm import LamoPolicy

    lamo = LamoPolicy(dict(state_dim=S, act_dim=A, layers=1, width=16, heads=1, max_timestep=30), K=K)
    refused(make_tuner(name).adapt, lamo, toy()[1], 0, says=("LamoPolicy reads no prompt", "models.dt"))
