"""The style of a strategy depends on its name, not on the page."""

from equipoise_lab.analysis.styles import strategy_styles


def color(strategy, *others):
    return strategy_styles([*others, strategy])[strategy]["color"]


def test_a_strategy_has_the_same_colour_on_every_page():
    names = ["lbl:scope=global_batch,coefficient=1e-2", "loss-free:rate=1e-3", "quantile", "deepseek-v3", "z"]
    alone = {name: color(name) for name in names}
    together = strategy_styles(["none", *reversed(names)])
    assert {name: together[name]["color"] for name in names} == alone
    assert len(set(alone.values())) == len(names)


def test_scopes_and_rates_differ():
    scopes = [color(f"lbl:scope={scope}") for scope in ("sequence", "micro_batch", "global_batch")]
    assert len(set(scopes)) == 3 and color("lbl") == scopes[2]  # the default scope
    rates = [color(f"loss-free:rate={rate}") for rate in ("1e-4", "1e-3", "1e-2")]
    assert rates[0] != rates[1] != rates[2]
    assert color("loss-free:rate=1e-2") != color("loss-free:rate=3e-3")


def test_recipes_have_the_colour_of_their_mechanism_and_suffixes_are_left_out():
    assert color("deepseek-v3") == color("loss-free+lbl:scope=sequence")
    assert color("none, selection hash") != color("none") == "#808080"


def test_strategies_have_distinct_styles():
    styles = strategy_styles(["none", *(f"s{i}" for i in range(14))])
    assert styles["none"]["color"] == "#808080"
    assert len({tuple(style.values()) for style in styles.values()}) == 15


def test_strategies_of_one_hue_differ_in_dash_and_symbol():
    styles = strategy_styles([f"loss-free:rate={rate}" for rate in ("1e-3", "1e-2", "1e-1")])
    assert [style["dash"] for style in styles.values()] == ["solid", "dash", "dot"]
    assert len({style["symbol"] for style in styles.values()}) == 3
