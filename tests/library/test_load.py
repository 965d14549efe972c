import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.balancers import load_balancing_loss
from equipoise.counting.call import FittedMask
from equipoise.counting.layout import Layout
from equipoise.load import expert_load, sequence_load
from equipoise.routing import route


def _ids(tokens, experts, k, seed=0):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return logits.topk(k).indices


def test_expert_load_by_hand():
    ids = torch.tensor([[0, 1], [0, 3], [1, 2]])
    assert expert_load(ids, 5).tolist() == [2, 2, 1, 1, 0]
    assert expert_load(ids, 5, torch.tensor([1.0, 0.0, 1.0])).tolist() == [1, 2, 1, 0, 0]
    assert expert_load(ids, 5).dtype == torch.int64


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_expert_load_equals_the_reference(mask_dtype):
    ids = _ids(50, 7, 3)
    mask = torch.arange(50) % 3 != 0
    assert expert_load(ids, 7).tolist() == reference.load(ids.tolist(), 7)
    assert expert_load(ids, 7, mask.to(mask_dtype)).tolist() == reference.load(ids.tolist(), 7, mask.tolist())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 5))
def test_counts_sum_to_k_times_the_tokens_and_follow_a_permutation(seed, tokens, k):
    ids = _ids(tokens, 5, k, seed)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    load = expert_load(ids, 5, mask)
    assert load.sum() == k * mask.sum()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(expert_load(order[ids], 5, mask)[order], load)


def test_counts_are_exact_beyond_float32_and_bfloat16():
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(2**24 + 3, 1)  # float32 stops at 2^24
    assert expert_load(ids, 2).tolist() == [2**24 + 3, 0]


def test_int32_ids_are_counted():
    assert expert_load(_ids(9, 4, 2).int(), 4).sum() == 18


def test_a_token_that_lists_an_expert_twice_counts_twice():
    assert expert_load(torch.tensor([[1, 1]]), 3).tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), None, r"expert_ids must have the shape \(tokens, k\): got \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.ones(3), r"expected shape \(4,\), got \(3,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.ones(2, 2), r"expected shape \(4,\), got \(2, 2\)"),
        (torch.zeros(4, 2), None, "expert_ids must be integers: got torch.float32"),
        (torch.zeros(4, 2, dtype=torch.bool), None, "expert_ids must be integers: got torch.bool"),
    ],
)
def test_expert_load_refuses_bad_input(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        expert_load(ids, 3, mask)


def _routing(mask=None, sequence_ids=None, num_sequences=0):
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    return route(logits, 2, mask=mask)._replace(sequence_ids=sequence_ids, num_sequences=num_sequences)


def test_sequence_load_equals_the_reference():
    sequence_ids = torch.tensor([0] * 3 + [1] * 5 + [3] * 4)
    mask = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0])
    for m in (None, mask):
        routing = _routing(m, sequence_ids, 5)
        expected = reference.sequence_loads(
            routing.expert_ids.tolist(), sequence_ids.tolist(), 5, None if m is None else m.tolist()
        )
        load = sequence_load(routing)
        assert load.dtype == torch.int64 and load.shape == (5, 5)
        assert load.tolist() == [expected.get(s, [0] * 5) for s in range(5)]
        assert torch.equal(load.sum(0), expert_load(routing.expert_ids, 5, m))


def test_sequence_load_refuses_a_routing_without_sequences():
    with pytest.raises(ValueError, match=r"which token belongs to which sequence.*token_mask\(mask, sequence_ids\)"):
        sequence_load(_routing())


@pytest.mark.parametrize(("length", "num_sequences"), [(12, 0), (11, 4)])
def test_sequence_load_refuses_ids_that_do_not_fit(length, num_sequences):
    with pytest.raises(ValueError, match=rf"got shape \({length},\) for 12 tokens and num_sequences={num_sequences}"):
        sequence_load(_routing(sequence_ids=torch.zeros(length, dtype=torch.int64), num_sequences=num_sequences))


def test_a_token_counts_if_its_mask_is_not_zero():
    """The same in expert_load, in the counts of a window and in the loss."""
    ids, mask = torch.tensor([[0], [1], [2], [1]]), torch.tensor([0.5, 0.5, 0.0, 1.0])
    layout = Layout([3], [1])
    vector = layout.zeros(torch.device("cpu"))
    layout.count(vector, 0, ids, FittedMask(mask))
    assert layout.load(vector, 0).tolist() == expert_load(ids, 3, mask).tolist() == [1, 2, 0]
    assert int(layout.num_tokens(vector, 0)) == 3
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    halves, whole = (load_balancing_loss(route(logits, 1, mask=m)) for m in (mask, (mask != 0).float()))
    assert torch.equal(halves, whole)
