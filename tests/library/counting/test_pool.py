"""The exchange between ranks, as far as one process can test it; ``distributed/`` has the rest."""

import pytest
import torch
from models import VOCAB, family, tiny_lm

import equipoise
from equipoise.counting.exchange import FLAG, Exchange
from equipoise.counting.layout import Layout
from equipoise.counting.pool import Pool, digest_of


class _Event:
    waited = has_arrived = False

    def query(self):
        return self.has_arrived

    def synchronize(self):
        self.waited = True


def _attached(strategy="loss-free"):
    model = tiny_lm()
    return model, equipoise.attach(model, strategy)


def test_one_process_has_no_group_and_no_traffic():
    pool = Pool(None)
    assert pool.size == 1 and pool.gather("x") == ["x"] and pool.all_reduce(torch.ones(2)) is None
    assert (pool.collectives, pool.num_bytes) == (0, 0)


def test_an_error_of_a_single_process_is_raised_as_it_is():
    with pytest.raises(KeyError, match="x"):
        Pool(None).agree("attach", None, KeyError("x"))
    assert Pool(None).agree("attach", 3, None) == [3]


@pytest.mark.parametrize(
    "flags, message_part",
    [
        ([0, -1], "another rank failed to"),
        ([0, 3, 1, 2, 3], "closed it after 2"),
        ([FLAG + 7, 3], "1 of 2 ranks are at the end of"),
    ],
)
def test_flags_on_their_way_from_a_gpu_are_read_before_the_next_collective(flags, message_part):
    model, balance = _attached()
    exchange, event = balance._window.exchange, _Event()
    exchange.pool.size = 2
    exchange._unread.append((torch.tensor(flags), event, False))
    model(torch.randint(0, VOCAB, (2, 7)))
    with pytest.raises(equipoise.EquipoiseError, match=message_part):
        balance.step()
    assert event.waited and not exchange._unread
    with pytest.raises(equipoise.EquipoiseError, match="must begin anew after an error on a GPU.*from a checkpoint"):
        balance.step()
    balance.detach()


def test_flags_without_an_error_that_have_arrived_from_a_gpu_change_nothing():
    model, balance = _attached()
    balance._window.exchange._unread.append((torch.tensor([5, 0]), _Event(), False))
    assert balance.metrics() == {}


def test_a_failure_that_is_known_by_then_is_raised_where_the_next_micro_batch_begins():
    """Not a whole forward later: with expert parallelism this would wait for the rank that failed."""
    model, balance = _attached()
    event = _Event()
    balance._window.exchange._unread.append((torch.tensor([0, -1]), event, False))
    with balance.paused():
        model(torch.randint(0, VOCAB, (2, 7)))
    event.has_arrived = True
    with pytest.raises(equipoise.EquipoiseError, match="another rank failed to"):
        model(torch.randint(0, VOCAB, (2, 7)))


def test_loads_come_first_in_the_vector_of_a_window():
    layout = Layout([3, 2], [1, 2])
    assert (layout.loads, layout.header) == (slice(0, 5), slice(5, 8))
    assert len(layout.zeros(torch.device("cpu"))) == 8
    assert len(Layout([], []).zeros(torch.device("cpu"))) == 3


def test_a_digest_depends_on_the_content_only():
    value = {"a": torch.tensor([1.0, 2.0]), "b": {"c": 3}}
    assert digest_of(value) == digest_of({"b": {"c": 3}, "a": torch.tensor([1.0, 2.0])})
    for other in ({"a": torch.tensor([1.0, 2.5]), "b": {"c": 3}}, {**value, "b": {"c": 4}}, {**value, "d": 0}):
        assert digest_of(other) != digest_of(value)


def test_a_stage_without_routers_must_be_allowed_and_does_nothing():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(equipoise.EquipoiseError, match="allow_empty=True"):
        equipoise.attach(model, "loss-free")
    balance = equipoise.attach(model, "loss-free+lbl", allow_empty=True)
    loss = model(torch.ones(1, 2)).sum() + balance.loss()
    loss.backward()
    balance.step()
    with balance.measuring() as load:
        model(torch.ones(1, 2))
    assert load == {} and balance.load == {} and balance.biases == {} and balance.metrics() == {}
    assert int(balance.num_tokens) == 0 and str(balance) == "Balance('loss-free+lbl', 0 layers)"
    state = balance.state_dict()
    assert state["num_windows"] == 1
    other = equipoise.attach(torch.nn.Linear(2, 2), "loss-free+lbl", allow_empty=True)
    other.load_state_dict(state)
    assert other.state_dict() == state and balance.detach() == {}
    with pytest.raises(equipoise.EquipoiseError, match="must be called before detach"):
        balance.step()


def test_after_detach_nothing_is_measured_or_loaded():
    model, balance = _attached()
    state = balance.state_dict()
    balance.detach()
    with (
        pytest.raises(equipoise.EquipoiseError, match=r"measuring\(\) must be called before detach"),
        balance.measuring(),
    ):
        raise AssertionError("it was entered")
    with pytest.raises(equipoise.EquipoiseError, match=r"load_state_dict\(\) must be called before detach"):
        balance.load_state_dict(state)


def test_a_single_expert_is_refused_on_several_ranks():
    class TwoRanks(Pool):
        size = 2

        def __init__(self):
            pass

    with pytest.raises(equipoise.EquipoiseError, match="must have two experts or more"):
        Exchange(Layout([1], [1]), TwoRanks(), pools_each=False)
    Exchange(Layout([2], [1]), TwoRanks(), pools_each=False)
    Exchange(Layout([1], [1]), Pool(None), pools_each=False)


def test_a_model_with_an_unknown_mixture_of_experts_is_not_empty():
    class OtherMoE(torch.nn.Module):
        pass

    with pytest.raises(equipoise.EquipoiseError, match="OtherMoE"):
        equipoise.attach(torch.nn.Sequential(OtherMoE()), "none", allow_empty=True)


@pytest.mark.parametrize(
    "name, options", [("glm4_moe", {"first_k_dense_replace": 2}), ("qwen3_moe", {"mlp_only_layers": [0, 1]})]
)
def test_a_stage_of_dense_layers_of_a_family_is_empty(name, options):
    stage = family(name, **options).model
    assert len(equipoise.attach(stage, "deepseek-v3", allow_empty=True).biases) == 0
