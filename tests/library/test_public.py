import subprocess
import sys
from pathlib import Path

import pytest

import equipoise

SOURCE = Path(equipoise.__file__).parent.parent


def _run(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "[n for n in ('torch', 'transformers', 'jaxtyping', 'numpy') if n in sys.modules]"


def test_import_is_light():
    assert _run(f"import sys, equipoise\nprint({HEAVY})") == "[]"
    assert (
        _run(f"import sys, equipoise\ndir(equipoise), equipoise.__version__, equipoise.UsageError\nprint({HEAVY})")
        == "[]"
    )


def test_the_check_of_lightness_can_fail():
    assert "torch" in _run(f"import sys, equipoise\nequipoise.attach\nprint({HEAVY})")


def test_all_is_sorted_and_every_name_resolves():
    assert equipoise.__all__ == sorted(equipoise.__all__, key=str.casefold)
    assert len(set(equipoise.__all__)) == len(equipoise.__all__)
    assert set(equipoise.__all__) <= set(dir(equipoise))
    assert not [name for name in equipoise.__all__ if name.startswith("_")]


@pytest.mark.parametrize("name", equipoise.__all__)
def test_public_name_is_defined_where_it_is_said_and_documented(name):
    value = getattr(equipoise, name)
    home = sys.modules[f"equipoise.{equipoise._MODULE_OF[name]}"]
    assert getattr(home, name) is value
    assert name in home.__all__
    assert value.__doc__ and len(value.__doc__.strip()) > 20
    assert value.__module__.startswith(f"equipoise.{equipoise._MODULE_OF[name]}")


def test_the_type_checker_sees_the_same_names():
    import ast

    tree = ast.parse(Path(equipoise.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    submodules = dict.fromkeys(equipoise._SUBMODULES, "equipoise")
    assert seen == submodules | {name: f"equipoise.{home}" for name, home in equipoise._MODULE_OF.items()}


def test_a_person_can_remember_the_public_names():
    assert len(equipoise.__all__) == 16 and len(dir(equipoise)) <= 21


def test_a_misspelt_name_is_an_error_for_the_type_checker(tmp_path):
    """A module-level __getattr__ that the type checker sees would accept every name."""
    file = tmp_path / "user.py"
    file.write_text("import equipoise\n\nequipoise.attach\nequipoise.atach\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and '"atach"' in errors[0], done.stdout


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'equipoise' has no attribute 'balence'"):
        equipoise.balence  # noqa: B018
    assert not hasattr(equipoise, "nothing")


def test_modules_list_what_they_define():
    import importlib

    for home in sorted(set(equipoise._MODULE_OF.values())):
        module = importlib.import_module(f"equipoise.{home}")
        assert module.__doc__, home
        for name in module.__all__:
            assert hasattr(module, name), (home, name)


def test_errors_have_one_root():
    assert issubclass(equipoise.UsageError, equipoise.EquipoiseError)
    assert issubclass(equipoise.UsageError, ValueError)
    assert not issubclass(equipoise.EquipoiseError, ValueError)


def test_the_repr_of_a_public_object_is_one_useful_line():
    import torch

    from equipoise.balancers import LayerStack
    from equipoise.recipes import FRAMEWORKS
    from equipoise.routing import route

    balance = equipoise.attach(equipoise.nn.MoE(16, 4, 8, 2), "frozen")
    kind = "selection='scores', gives='logits')"
    router = "num_experts=8, k=2, score_function='sigmoid', num_groups=1, top_groups=1, renormalise=True, scale=1)"
    expected = [
        (
            equipoise.LossFree(rule="sign"),
            "LossFree(rate=0.001, rule='sign', center=True, scope='global_batch', schedule='constant')",
        ),
        (equipoise.Quantile(ema=0.5), "Quantile(bins=128, ema=0.5, fraction=1.0)"),
        (equipoise.Frozen(), "Frozen(multiplies=False)"),
        (
            equipoise.LoadBalancingLoss(scope="sequence"),
            "LoadBalancingLoss(coefficient=0.01, scope='sequence', pooling='window', normalise=True)",
        ),
        (equipoise.ZLoss(), "ZLoss(coefficient=0.001)"),
        (equipoise.Alerts(num_seen=3), "Alerts(num_seen=3, holding='none')"),
        (equipoise.nn.Router(16, 8, 2), f"Router(dim=16, {router}"),
        (equipoise.nn.MoE(16, 4, 8, 2), f"MoE(hidden=4, shared_hidden=0, capacity_factor=None, dim=16, {router}"),
        (
            LayerStack("sigmoid", 2, torch.zeros(3, 8)),
            "LayerStack('sigmoid', k=2, selection='scores', layers=3, experts=8)",
        ),
        (
            equipoise.integrations.EquipoiseCallback("loss-free", "z"),
            "EquipoiseCallback('loss-free+z', balance=not attached)",
        ),
        (
            equipoise.RouterKind("sigmoid", "bias_slot"),
            f"RouterKind(score_function='sigmoid', slot='bias_slot', {kind}",
        ),
        (balance, "Balance('frozen', 1 layer of 8 experts)"),
        (
            balance.layers[0],
            "MoELayer('router', num_experts=8, k=2, kind=RouterKind(score_function='sigmoid', "
            f"slot='e_score_correction_bias', {kind})",
        ),
        (route(torch.zeros(5, 4), 2), "Routing(tokens=5, experts=4, k=2, is_masked=False, num_sequences=0)"),
        (
            equipoise.recipe("kimi-k3"),
            "Recipe(name='kimi-k3', strategy='quantile:ema=0.0,fraction=1.0', score_function='sigmoid')",
        ),
        (FRAMEWORKS["olmo-core"], "Framework(name='olmo-core', option='lb_loss_weight', formula='1 / L')"),
    ]
    assert [repr(value) for value, _ in expected] == [text for _, text in expected]


def test_the_type_aliases_name_every_choice():
    from typing import get_args

    from equipoise.balancers import base, loss_free
    from equipoise.routing import SCORE_FUNCTIONS, ScoreFunction

    assert get_args(ScoreFunction) == SCORE_FUNCTIONS
    assert (get_args(base.Scope), get_args(base.Pooling)) == (base.SCOPES, base.POOLINGS)
    assert get_args(loss_free.Rule) == tuple(loss_free.RULES)
