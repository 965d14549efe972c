"""The strategies that are known without torch are those of the balancers."""

import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from equipoise.balancers.strategy import BALANCERS
from equipoise.errors import UsageError
from equipoise.recipes import RECIPES
from equipoise_lab.train.balancers import LAB_BALANCERS
from equipoise_lab.train.strategies import OPTIONS, check_strategies


def test_options_and_choices_are_those_of_the_balancers():
    classes = [*BALANCERS.values(), *LAB_BALANCERS]
    assert list(OPTIONS) == [one.name for one in classes]
    for one in classes:
        types = get_type_hints(one.__init__)
        choices = {
            name: next((get_args(kind) for kind in (types[name], *get_args(types[name])) if _is_literal(kind)), ())
            for name in inspect.signature(one).parameters
        }
        assert choices == OPTIONS[one.name]


def _is_literal(kind):
    return get_origin(kind) is Literal


def test_recipes_and_numbers_pass():
    check_strategies(["none", *RECIPES, "loss-free:rate=-1", "quantile:bins=3"])


def test_the_first_wrong_one_is_named():
    with pytest.raises(UsageError, match=r"in 'z\+lbl:scope=global', scope must .* Did you mean global_batch\?"):
        check_strategies(["none", "z+lbl:scope=global", "lbll"])
