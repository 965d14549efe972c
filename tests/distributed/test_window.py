"""One window on two ranks that differ: in their number of micro-batches, in what they skip, in what they fail at."""

from functools import cache

import pytest
import torch
import window_ranks
from ranks import run_on_ranks
from window_ranks import EXPERTS, LAYERS, SETTINGS, UNEQUAL

pytestmark = pytest.mark.xdist_group("ranks")


@cache
def _on_two_ranks():
    return run_on_ranks(2, window_ranks.everything)


def _found(case):
    for found in _on_two_ranks():
        assert not isinstance(found, str), found
    return [found[case] for found in _on_two_ranks()]


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_unequal_numbers_of_micro_batches_are_named_on_both_ranks(counts):
    for said in _found(counts):
        assert "closed it after 2 micro-batches, 1 rank(s) began micro-batch 3" in said
    assert _found((2, 2)) == ["went on", "went on"]


@pytest.mark.parametrize("strategy", ["lbl+quantile", "lbl+loss-free:rule=sign,scope=micro_batch"])
def test_unequal_numbers_are_named_with_statistics_under_way_too(strategy):
    for said in _found(strategy):
        assert "closed it after 2 micro-batches, 1 rank(s) began micro-batch 3" in said


@pytest.mark.parametrize("counts", [(1, 0), (0, 2)])
def test_a_rank_without_a_forward_raises_on_both_where_micro_batches_are_pooled(counts):
    for rank, said in enumerate(_found(counts)):
        assert ("none was" if counts[rank] == 0 else "another rank failed to") in said


@pytest.mark.parametrize(
    "strategy", ["loss-free", "quantile", "quantile:bins=0", "loss-free:rule=sign,scope=micro_batch"]
)
def test_a_rank_without_a_forward_raises_on_both_where_the_window_is(strategy):
    first, second = _found(("one calls nothing", strategy))
    assert "another rank failed to" in first and "none was" in second


@pytest.mark.parametrize("strategy", window_ranks.PARTIAL)
def test_a_layer_that_one_rank_does_not_call_is_counted_where_it_is(strategy):
    """So are experts of images, where a rank has text only; without any call a bias stays."""
    expected = window_ranks.one_layer_on_one_rank([0, 1], strategy)
    for found in _found(("partial", strategy)):
        for (load, biases), (one_load, one_biases) in zip(found, expected, strict=True):
            assert {n: c.tolist() for n, c in load.items()} == {n: c.tolist() for n, c in one_load.items()}
            for layer, bias in biases.items():
                assert torch.equal(bias, one_biases[layer])
        (first, moved), (second, then) = found
        assert (int(first["0"].sum()), int(first["1"].sum()), int(second["1"].sum())) == (32, 16, 0)
        assert torch.equal(then["1"], moved["1"])
        assert strategy == "lbl" or all(bias.any() for bias in moved.values())


@pytest.mark.parametrize("strategy", UNEQUAL)
def test_unequal_numbers_are_welcome_where_nothing_waits_for_them(strategy):
    expected = window_ranks.dealt(strategy, [0, 1, 2, 3])
    for found in _found(("unequal", strategy)):
        assert found["load"] == expected["load"]
        for layer, bias in found["biases"].items():
            assert torch.equal(bias, expected["biases"][layer])


@pytest.mark.parametrize(
    ("layers", "strategy"),
    [(layers, s) for layers in LAYERS for s in (SETTINGS if layers < 64 else ("loss-free", "lbl+quantile"))],
)
def test_one_collective_a_window_and_one_a_micro_batch_where_a_loss_waits_for_it(strategy, layers):
    """Whatever the number of layers; none is begun that is not in ``metrics``."""
    load = 8 * layers * EXPERTS
    header, histogram = 3 * 8, 8 * layers * EXPERTS * 128
    collectives, num_bytes = {
        "loss-free": (1, load),
        "quantile": (1, load + histogram),
        "lbl:pooling=previous": (1, load),
        "lbl": (4, 4 * (load + header)),
        "lbl+quantile": (5, 4 * (load + header) + histogram),
    }[strategy]
    assert _found(("traffic", layers, strategy)) == [(collectives, collectives, num_bytes)] * 2


@pytest.mark.parametrize(
    "strategy", ["loss-free:rate=1e-2,rule=sign", "quantile", "lbl+loss-free:rate=1e-2,rule=momentum"]
)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("ranks", [(), (1,), (0, 1)])
def test_a_step_that_one_rank_skips_is_skipped_by_all(strategy, as_tensor, ranks):
    count = (
        2 * 16 * 2 * 2
    )  # ranks, tokens, experts per token, layers: whole, applied or not, and not in the next window
    for found in _found(("skipped", ranks, as_tensor, strategy)):
        assert found == [(not ranks, count), (True, count)]


def test_a_step_that_a_grad_scaler_skips_moves_neither_weights_nor_biases():
    assert _found("scaled") == [[(False, False), (True, True)]] * 2


def test_a_window_whose_optimizer_raised_is_closed_without_moving_anything():
    expected = window_ranks.after_an_optimizer_that_raises([0, 1, 2, 3])
    for found in _found("raises"):
        assert found["load"] == expected["load"]
        assert all(torch.equal(found["biases"][layer], bias) for layer, bias in expected["biases"].items())
        assert all(bias.any() for bias in found["biases"].values())


def test_a_short_last_window_counts_its_own_tokens():
    found = _found("short")
    assert found[0] == found[1]
    loads, biases = found[0][::2], found[0][1::2]
    assert [sum(load[0]) for load in loads] == [2 * 16 * n for n in (6, 2, 2)]
    assert biases[0] != biases[1] and biases[1] == biases[2]


def test_ranks_that_begin_with_other_biases_or_in_a_group_of_others_are_refused():
    assert all("must begin with the same biases" in said for said in _found("start"))
    first, second = _found("others")
    assert first == "went on" and "must be a member of the group" in second


@pytest.mark.parametrize("counts", [(2, 4), (4, 2)])
def test_unequal_numbers_are_named_with_forwards_first_too(counts):
    for said in _found(("forwards first", counts)):
        assert "closed it after 2 micro-batches, 1 rank(s) began micro-batch 3" in said


@pytest.mark.parametrize("strategy", window_ranks.MEASURED_ALONE)
def test_an_evaluation_on_one_rank_only_is_found_out_on_both(strategy):
    for said in _found(("measured alone", strategy)):
        assert "1 of 2 ranks are at the end of measuring(), the others in a step" in said


@pytest.mark.parametrize("error", ["ArithmeticError", "EquipoiseError"])
def test_an_evaluation_that_raises_on_one_rank_raises_on_both_and_leaves_nothing_behind(error):
    first, second = _found(("evaluation", error))
    assert "measuring() must end on every rank" in first[0] and second[0] == "no evaluation"
    assert first[1] == second[1] == 2 * 16


@pytest.mark.parametrize("strategy", ["loss-free", "lbl", "quantile"])
def test_after_a_window_that_a_rank_could_not_close_the_next_ones_count_right(strategy):
    for found in _found(("goes on", strategy)):
        assert "attached routers must be called" in found[0]
        assert found[1:] == [2 * 16] * 5


def test_attach_before_the_process_group_is_found_out():
    assert all("attach must come after torch.distributed.init_process_group" in said for said in _found("early"))


def test_process_groups_come_and_go_beside_ours_and_ours_go_with_detach():
    for before, after in _found("groups"):
        assert before == after


def test_a_bias_that_one_rank_loads_and_ddp_hands_out_is_the_bias_everywhere():
    first, second = _found("one loads")
    assert first == second
    assert first[0][0] > 4 and max(map(abs, first[1])) < 0.1


def test_a_router_of_distributed_tensors_is_refused_in_words():
    assert all("a router must give plain tensors" in said for said in _found("tensor router"))


def test_a_rank_that_never_comes_is_waited_for_as_long_as_the_group_says():
    first, second = _found("never")
    assert first.startswith("raised") and "2000ms" in first, first
    assert second == "stayed away"
