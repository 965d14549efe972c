import pytest

from equipoise import Balancer, Frozen, LoadBalancingLoss, LossFree, UsageError, parse_strategy
from equipoise.balancers import format_strategy
from equipoise.balancers.strategy import BALANCERS
from equipoise.recipes import RECIPES


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("none", "none"),
        ("frozen", "frozen"),
        ("loss-free", "loss-free"),
        ("loss-free:rate=1e-2", "loss-free:rate=0.01"),
        ("loss-free:rate=0.001", "loss-free"),
        ("loss-free:rate=1e-2,rule=proportional", "loss-free:rate=0.01,rule=proportional"),
        ("loss-free:center=false", "loss-free:center=false"),
        ("lbl:scope=micro_batch,coefficient=1e-2", "lbl:scope=micro_batch"),
        ("lbl:normalise=false,pooling=previous", "lbl:pooling=previous,normalise=false"),
        ("loss-free+lbl:scope=sequence,coefficient=1e-4", "loss-free+lbl:coefficient=0.0001,scope=sequence"),
        ("frozen+lbl:coefficient=1e+2+lbl:scope=sequence", "frozen+lbl:coefficient=100.0+lbl:scope=sequence"),
    ],
)
def test_strategies_round_trip(text, written):
    balancers = parse_strategy(text)
    assert format_strategy(balancers) == written
    again = parse_strategy(written)
    assert [vars(b) for b in again] == [vars(b) for b in balancers]
    assert format_strategy(again) == written


@pytest.mark.parametrize("rate", [1e-7, 1e-5, 0.1, 1 / 3, 1.0, 1e22, 123456.789])
def test_numbers_survive_the_round_trip_exactly(rate):
    (balancer,) = parse_strategy(str(LossFree(rate=rate)))
    assert balancer.rate == rate
    first, second = parse_strategy(format_strategy([LoadBalancingLoss(rate), Frozen()]))
    assert first.coefficient == rate and isinstance(second, Frozen)


def test_none_is_no_balancer():
    assert parse_strategy("none") == []
    assert format_strategy([]) == "none"


def test_options_reach_the_balancer():
    (balancer,) = parse_strategy("loss-free:rate=1e+2,rule=sign,center=false")
    assert (balancer.rate, balancer.rule, balancer.center) == (100.0, "sign", False)
    (balancer,) = parse_strategy("lbl:coefficient=0,scope=sequence,normalise=false")
    assert (balancer.coefficient, balancer.scope, balancer.normalise) == (0.0, "sequence", False)
    (balancer,) = parse_strategy("lbl:pooling=previous")
    assert (balancer.scope, balancer.pooling) == ("global_batch", "previous")


def test_a_plus_in_a_number_does_not_split():
    assert [type(b) for b in parse_strategy("lbl:coefficient=1e+2+loss-free:rate=1e+2")] == [
        LoadBalancingLoss,
        LossFree,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a name: got an empty one"),
        ("loss-free + lbl", "must have no blanks: got 'loss-free . lbl'. Write 'loss-free.lbl'"),
        ("loss-free:rate=1e-3+ lbl", "must have no blanks: .* Write 'loss-free:rate=1e-3.lbl'"),
        (
            "los-free",
            "made of frozen, loss-free, quantile, lbl, z, or a recipe .*got 'los-free'. Did you mean loss-free",
        ),
        ("LBL", "got 'LBL'. Did you mean lbl"),
        ("Loss_Free+z", r"got 'Loss_Free' in 'Loss_Free\+z'. Did you mean loss-free"),
        ("bananas", "got 'bananas'. Example: loss-free:rate=1e-3"),
        ("lbl+", r"got 'lbl\+'"),
        ("+lbl", "got ''"),
        ("lbl + frozen", "got 'lbl . frozen'"),
        ("lbl+none", "none must stand alone: got 'lbl.none'. Leave it out"),
        ("frozen:rate=1", "An option of frozen must be multiplies=...: got 'rate=1'"),
        ("loss-free:speed=1", "An option of loss-free must be rate=... or rule=... or .*: got 'speed=1'"),
        ("loss-free:rate", "got 'rate' in 'loss-free:rate'"),
        ("loss-free:rate=1,,rule=sign", "got ''"),
        ("loss-free:", "loss-free:"),
        ("loss-free:rate=1,rate=2", "given once: got rate twice"),
        ("loss-free:rate=0", "in 'loss-free:rate=0', rate must be above 0: got 0.0"),
        ("loss-free:rate=-1", "rate must be above 0"),
        ("loss-free:rate=inf", "rate must be a finite number: got inf"),
        ("loss-free:rate=nan", "rate must be a finite number: got nan"),
        ("loss-free:rate=fast", "rate must be a finite number: got 'fast'"),
        ("loss-free:rate=", "rate must be a finite number: got ''"),
        ("loss-free:rate=true", "rate must be a finite number: got True"),
        ("loss-free:rule=1", "rule must be one of sign, proportional"),
        ("loss-free:center=1", "center must be true or false: got 1.0"),
        ("lbl:normalise=True", "normalise must be true or false: got 'True'"),
        ("loss-free:scope=micro_batch", "must go with rule=sign"),
        ("loss-free:scope=sequence", "scope must be one of micro_batch, global_batch"),
        ("loss-free:schedule=linear", "zero_from must be given with schedule=linear"),
        ("loss-free:zero_from=10", "zero_from must be given with .* and only with them"),
        ("loss-free:schedule=drop,zero_from=1.5", "zero_from must be a whole number: got 1.5"),
        ("loss-free:schedule=drop,zero_from=0", "zero_from must be at least 1"),
        ("loss-free:momentum=0.5", "momentum must go with rule=momentum"),
        ("loss-free:rule=momentum,momentum=1", "momentum must be below 1"),
        ("loss-free:rule=momentum,sharpness=0", "sharpness must be above 0"),
        ("quantile:bins=100", "bins must be 0 .exact. or a power of two from 128 to 1048576: got 100"),
        ("quantile:bins=16", "bins must be 0"),
        ("quantile:bins=-1", "bins must be at least 0"),
        ("quantile:bins=nan", "bins must be a whole number"),
        ("quantile:bins=inf", "bins must be a whole number"),
        ("quantile:ema=1", "ema must be below 1"),
        ("quantile:fraction=0", "fraction must be above 0"),
        ("quantile:fraction=2", "fraction must be at most 1"),
        ("z:coefficient=-1", "coefficient must be at least 0"),
        ("deepseek-v3+z", "A recipe must stand alone: got 'deepseek-v3.z'"),
        ("qwen3", "qwen3 is left out"),
        ("lbl:scope=token", "scope must be one of sequence, micro_batch, global_batch: got 'token'"),
    ],
)
def test_bad_strategies_are_usage_errors(text, message):
    with pytest.raises(UsageError, match=message):
        parse_strategy(text)


def test_a_recipe_is_a_strategy():
    names = "loss-free:center=false+lbl:coefficient=0.0001,scope=sequence"
    assert format_strategy(parse_strategy("deepseek-v3")) == "loss-free:rule=sign,center=false" + names[22:]
    for name in RECIPES:
        assert parse_strategy(name)


def test_every_balancer_has_its_own_name_and_one_level_of_inheritance():
    for name, kind in BALANCERS.items():
        assert kind.name == name and kind.__bases__ == (Balancer,)
        assert str(kind()) == name
