"""A tuner has three places: its notebook, a line of the registry, rows of recipes.

Nothing else names one."""

import ast
import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from promptnb import recipes as rc
from promptnb.recipes import Tune
from promptnb.tuners.core import TUNERS, Tuner, make_tuner, tuner_class

PACKAGE = Path(inspect.getfile(rc)).parent.parent
SCALED = ("steps", "prepare_steps", "m", "batches")  # a scale changes what it sees, so recipes name them
OWN_WORDS = ("ranking", "hill", "es", "resample", "diffuser", "direct", "gradient", "encode")  # they mean a tuner only
TUNED = [r for r in rc.RECIPES.values() if r.pretrain]


def strings_of(path):
    "All string constants of a file."
    return {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}


def test_tuners_are_defined_in_their_package_alone():
    classes = {tuner_class(n).__name__ for n in TUNERS}
    for file in PACKAGE.rglob("*.py"):
        where = file.relative_to(PACKAGE).parts[0]
        if where in ("tuners", "_modidx.py"):
            continue
        names = {n.id for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Name)}
        assert not names & classes, file


def test_the_code_that_applies_tuners_names_none():
    assert set(OWN_WORDS) <= set(TUNERS)
    for file in [*PACKAGE.glob("*.py"), *PACKAGE.glob("experiments/*.py")]:
        if file.name in ("_modidx.py", "results.py"):
            continue
        assert not strings_of(file) & set(OWN_WORDS), file


def test_a_recipe_names_what_papers_name():
    "Each published hyper-parameter stands in the recipes that it is of, so that it can be compared."
    for paper in rc.PAPER_OF.values():
        for p in paper.published:
            part, _, name = p.field.partition(".")
            of = [r for r in paper.recipes.values() if part == "tune" and r.pretrain and p.covers(r)]
            for r in of:
                assert name in dict(r.tune.hyper) or name in Tune.__dataclass_fields__, (r.id, name)


def test_what_a_recipe_names_is_what_its_tuner_has():
    "A main recipe's values are the tuner's own, so that an own recipe without any is the same method."
    for key in ("ranking", "es", "hill", "resample", "full", "soft", "adapter", "lora", "gradient"):
        r = rc.RECIPES[f"prompt_tuning_dt/cheetah-vel/{key}"]
        own = make_tuner(r.tune.tuner)
        other = {k for k, v in r.tune.hyper if getattr(own, k) != v and not (k == "k" and v == 0)}
        assert not other, (key, other)
    diffuser = make_tuner("diffuser")
    assert all(getattr(diffuser, k) == v for k, v in rc.RECIPES["prompt_diffuser/cheetah-vel/diffuser"].tune.hyper)


@pytest.mark.parametrize("scale", rc.SCALES)
def test_a_recipe_names_what_its_scale_changes(scale):
    "A scale cannot change a field that a recipe leaves to the tuner."
    changed = {k for part in ("hyper", "online") for k in rc.SCALES[scale].get(part, {})}
    assert changed <= set(SCALED)
    for r in TUNED:
        left = {f.name for f in fields(tuner_class(r.tune.tuner))} - dict(r.tune.hyper).keys()
        assert not left & changed, r.id


@pytest.mark.parametrize("name", ["N", "lam", "schedule"])
def test_a_sweep_marks_the_main_recipe_with_the_value_of_its_tuner(name):
    "The label of the main table's run is the value that the tuner has."
    sweep = rc.EXHIBITS["prompt_diffuser", f"sweep_{name}"]
    main = [label for i, label in sweep.labels.items() if rc.RECIPES[i].key == "diffuser"]
    assert main == [f"{name} = {getattr(make_tuner('diffuser'), name)}"]


def test_accepted_hyper_parameters():
    "Of what is offered, a tuner takes the fields it has."

    @dataclass
    class Own(Tuner):
        size: int = 3

    assert Own.accepted(size=5, precision="bf16") == dict(size=5)
    assert tuner_class("ranking").accepted(size=5, precision="bf16") == dict(precision="bf16")
    assert tuner_class("none").accepted(precision="bf16") == {}
