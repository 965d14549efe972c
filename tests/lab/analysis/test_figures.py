"""Figures show the numbers of their tables."""

import math

import pyarrow as pa
import pytest

from equipoise_lab.analysis import figures
from equipoise_lab.analysis.figures import layer_labels, rank_load, relative_load


def runs(**by_strategy):
    rows = [
        {"run": f"{s}{seed}", "strategy": s, "seed": seed, "val_nats": nats, "maxvio_global": maxvio}
        for s, values in by_strategy.items()
        for seed, (nats, maxvio) in enumerate(values)
    ]
    return pa.Table.from_pylist(rows)


def marks(figure):
    """(x, y, half width in x, half width in y) of each strategy."""
    return {
        t.name: (t.x[0], t.y[0], t.error_x.array[0], t.error_y.array[0]) for t in figure.data if t.marker.size == 13
    }


def test_one_seed_has_marks_without_error_bars():
    figure = figures.quality_against_balance(runs(a=[(2.0, 0.5)], b=[(3.0, 0.1)]))
    assert marks(figure) == {"a": (0.5, 2.0, 0.0, 0.0), "b": (0.1, 3.0, 0.0, 0.0)}
    assert not figure.layout.meta["paired"] and len(figure.data) == 2


def test_error_bars_exclude_the_common_effect_of_a_seed():
    """The differences are 1.0, 1.2 and 1.4, on seeds that are far apart. Half of each is left, with sd 0.1, widened by
    sqrt(2), t(2) = 4.3027. The result is the interval of the paired difference over sqrt(2)."""
    table = runs(a=[(2.0, 0.5), (5.0, 0.5), (9.0, 0.5)], b=[(3.0, 0.1), (6.2, 0.1), (10.4, 0.1)])
    figure = figures.quality_against_balance(table)
    marks_by_strategy = marks(figure)
    assert figure.layout.meta["paired"]
    assert marks_by_strategy["a"][1] == pytest.approx(16 / 3) and marks_by_strategy["b"][1] - marks_by_strategy["a"][
        1
    ] == pytest.approx(1.2)
    assert marks_by_strategy["a"][3] == pytest.approx(4.302653 * math.sqrt(2) * 0.1 / math.sqrt(3), rel=1e-5)
    assert marks_by_strategy["a"][2] == pytest.approx(0, abs=1e-9)
    small = next(trace for trace in figure.data if trace.marker.size == 5)
    assert small.y[0] - marks_by_strategy["a"][1] == pytest.approx(0.1)  # -0.5 against a mean of -0.6


def test_seeds_that_are_not_shared_are_left_out_and_unfinished_runs_too():
    table = runs(a=[(2.0, 0.5), (5.0, 0.5), (100.0, 0.5)], b=[(3.0, 0.1), (6.0, 0.1), (None, None)])
    assert marks(figures.quality_against_balance(table))["a"][1] == pytest.approx(3.5)
    alone = figures.quality_against_balance(runs(a=[(2.0, 0.5), (None, None)]))
    assert marks(alone) == {"a": (0.5, 2.0, 0.0, 0.0)}


def experts(load, run="r", strategy="lbl"):
    """``load``: by layer and domain."""
    rows = [
        {"run": run, "strategy": strategy, "seed": 0, "layer": layer, "domain": domain, "expert": e, "load": count}
        for layer, of_domain in load.items()
        for domain, counts in of_domain.items()
        for e, count in enumerate(counts)
    ]
    return pa.Table.from_pylist(rows)


SPLIT = {"m.1": {"prose": [10, 10, 0, 0], "code": [0, 0, 10, 10]}, "m.2": {"prose": [6, 0, 2, 0], "code": [0, 3, 0, 1]}}


def test_the_map_of_experts_is_relative_load_sorted_by_domain():
    figure = figures.expert_map(experts(SPLIT), layer="m.1")
    assert list(figure.data[0].x) == ["0", "1", "2", "3"] and list(map(list, figure.data[0].z)) == [
        [2, 2, 0, 0],
        [0, 0, 2, 2],
    ]
    # prose 6,0,2,0 of 8 and code 0,3,0,1 of 4: experts 0 and 2 belong to prose, 1 and 3 to code
    figure = figures.expert_map(experts(SPLIT))
    assert list(figure.data[0].x) == ["0", "2", "1", "3"] and list(map(list, figure.data[0].z)) == [
        [3, 1, 0, 0],
        [0, 0, 3, 1],
    ]
    assert figure.layout.meta == {"run": "r", "layer": "m.2"}
    with pytest.raises(ValueError, match="layer must be in the table: got 'x'. Use one of m.1, m.2"):
        figures.expert_map(experts(SPLIT), layer="x")


def test_load_over_time_is_relative_to_even_by_step():
    rows = [
        {"run": "r", "strategy": "s", "seed": 0, "step": step, "layer": "a", "expert": e, "load": load}
        for step, loads in ((1, [2, 2]), (2, [3, 1]))
        for e, load in enumerate(loads)
    ]
    figure = figures.load_over_time(pa.Table.from_pylist(rows))
    assert list(figure.data[0].x) == [1, 2] and figure.data[0].z.tolist() == [[1, 1.5], [1, 0.5]]


def test_the_busiest_rank_by_hand():
    assert rank_load([3, 1, 2, 2], 2) == 1.0 and rank_load([3, 3, 1, 1], 2) == 1.5 and rank_load([3, 3, 1, 1], 4) == 1.5
    assert rank_load([1, 1, 1], 2) is None and rank_load([0, 0], 2) is None
    # pooled m.1 10 10 10 10, m.2 6 3 2 1
    rows = figures.rank_loads(experts(SPLIT)).to_pylist()
    assert [(r["ranks"], r["mean"], r["worst"]) for r in rows] == [(2, 1.25, 1.5), (4, 1.5, 2.0)]
    figure = figures.cost(figures.rank_loads(experts(SPLIT)))
    assert list(figure.data[0].x) == ["2", "4"] and list(figure.data[0].y) == [1.25, 1.5]


def test_cost_is_the_mean_over_seeds():
    both = pa.concat_tables([experts(SPLIT), experts({"m.1": SPLIT["m.1"], "m.2": SPLIT["m.1"]}, run="r2")])
    assert list(figures.cost(figures.rank_loads(both)).data[0].y) == [(1.25 + 1) / 2, (1.5 + 1) / 2]


def test_layers_of_an_audit_show_values_and_bounds():
    measured = {"value": 0.25, "bound": 0.01}
    rows = [{"layer": f"m.{i}", "maxvio": i, "maxvio_floor": 0.1, "domain_information_bits": measured} for i in (1, 2)]
    figure = figures.layers(rows)
    assert [list(trace.y) for trace in figure.data] == [[1, 2], [0.1, 0.1], [0.25, 0.25], [0.01, 0.01]]
    assert list(figure.data[0].x) == ["1", "2"]


def test_relative_load_by_hand():
    assert relative_load([6, 1, 1, 0]) == [3.0, 0.5, 0.5, 0.0]
    assert relative_load([7, 7]) == [1.0, 1.0]
    assert relative_load([0, 0]) == [None, None]


def test_curves_have_gaps_and_no_line_without_values():
    rows = [
        {"run": run, "strategy": run, "seed": 0, "step": step, "loss": loss}
        for run, losses in (("a", [1.0, None, 0.0]), ("b", [None, None, None]))
        for step, loss in enumerate(losses, start=1)
    ]
    figure = figures.curve(pa.Table.from_pylist(rows), "loss", log=True)
    assert [trace.name for trace in figure.data] == ["a"]
    assert list(figure.data[0].y) == [1.0, None, None]  # nothing at 0 on a log scale


def test_the_axis_of_losses_never_zooms_into_noise():
    """Two losses that differ by 0.001 of 5: the axis includes 4 % of the loss, 0.2 nats."""
    figure = figures.quality_against_balance(runs(a=[(5.0, 0.01)], b=[(5.001, 0.02)]))
    low, high = figure.layout.yaxis.autorangeoptions.include
    assert high - low == pytest.approx(0.04 * 5.0005) and low < 5.0 < 5.001 < high
    assert list(figure.layout.xaxis.autorangeoptions.include) == [0, 0.5]


def test_a_large_difference_has_the_axis_to_itself():
    figure = figures.quality_against_balance(runs(a=[(4.0, 0.1)], b=[(6.0, 0.2)]))
    assert list(figure.layout.yaxis.autorangeoptions.include) == pytest.approx([4.0, 6.0])


@pytest.mark.parametrize(
    "key, log, values, expected",
    [
        ("loss", False, [5.0, 5.001], [4.90049, 5.10051]),
        ("maxvio_batch", True, [0.5, 2.0], [0.316228, 3.16228]),  # a factor of ten around 1
        ("maxvio_batch", True, [0.01, 1.0], [0.01, 1.0]),
        ("bias_max", False, [0.2, 0.3], [0.0, 0.2, 0.3]),
    ],
)
def test_curves_have_a_least_span(key, log, values, expected):
    rows = [{"run": "a", "strategy": "a", "seed": 0, "step": i + 1, key: value} for i, value in enumerate(values)]
    figure = figures.curve(pa.Table.from_pylist(rows), key, log=log)
    assert list(figure.layout.yaxis.autorangeoptions.include) == pytest.approx(expected, rel=1e-5)


def test_layer_labels_are_numbers_if_these_differ():
    assert layer_labels(["model.layers.1.gate", "model.layers.12.gate"]) == ["1", "12"]
    assert layer_labels(["a.1.x", "a.1.y"]) == ["a.1.x", "a.1.y"]
    assert layer_labels(["gate"]) == ["gate"]
