"""A tuner has three places: its notebook, a line of the registry, rows of recipes.

Nothing else names one, and each default stands once."""

import ast
import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from promptnb import recipes as rc
from promptnb.tuners.core import TUNERS, Tuner, make_tuner, tuner_class

PACKAGE = Path(inspect.getfile(rc)).parent.parent
SCALED = ("steps", "prepare_steps", "m", "batches")  # a scale changes what it sees, so recipes name them
AXES = ("L",)  # a figure's axis: the report reads it from the recipe
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


def test_a_recipe_repeats_no_default():
    "What equals the tuner's own field is not named, unless scales change it or a figure reads it."
    for r in TUNED:
        default = make_tuner(r.tune.tuner)
        repeated = {k for k, v in r.tune.hyper if k not in (*SCALED, *AXES) and getattr(default, k) == v}
        assert not repeated, (r.id, repeated)


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
    main = [label for i, label in sweep.labels.items() if not dict(rc.RECIPES[i].tune.hyper).keys() & {name}]
    assert main == [f"{name} = {getattr(make_tuner('diffuser'), name)}"]


def test_accepted_hyper_parameters():
    "Of what is offered, a tuner takes the fields it has."

    @dataclass
    class Own(Tuner):
        size: int = 3

    assert Own.accepted(size=5, precision="bf16") == dict(size=5)
    assert tuner_class("ranking").accepted(size=5, precision="bf16") == dict(precision="bf16")
    assert tuner_class("none").accepted(precision="bf16") == {}
