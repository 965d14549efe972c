"""``token_mask(mask, sequence_ids)``: sequences that share a row."""

import pytest
import torch
from windows import assert_gradients_close, attach_tiny, clone_gradients, random_ids

from equipoise import EquipoiseError


def test_packed_sequences_equal_unpacked_ones():
    """Two sequences in one row, and the same as two rows. The model has no attention, so it gives the same for both."""
    strategy = "loss-free:rate=0.1+lbl:scope=sequence,coefficient=0.5"
    ids = random_ids(rows=2)
    model, balance = attach_tiny(strategy)
    (model(ids) + balance.loss()).backward()
    for sequence_ids in (
        torch.tensor([[5] * 7 + [9] * 7]),
        torch.tensor([[0] * 7 + [1] * 7]),
        torch.tensor([0] * 7 + [1] * 7),
        torch.tensor([[3] * 7 + [-1] * 7]),
    ):
        packed, packed_balance = attach_tiny(strategy)
        packed_balance.token_mask(torch.ones(1, 14), sequence_ids)
        loss = packed(ids.reshape(1, 14))
        (loss + packed_balance.loss()).backward()
        assert_gradients_close(clone_gradients(packed), clone_gradients(model))
    with_rows, balance_of_rows = attach_tiny(strategy)
    balance_of_rows.token_mask(None, torch.zeros(2, 7))  # the same id in two rows means two sequences
    (with_rows(ids) + balance_of_rows.loss()).backward()
    assert_gradients_close(clone_gradients(with_rows), clone_gradients(model))


def test_packing_changes_the_sequence_loss():
    strategy = "lbl:scope=sequence,coefficient=0.5"
    ids, losses = random_ids(rows=2), []
    for sequence_ids in (None, torch.tensor([[0] * 7 + [1] * 7]), torch.tensor([[0] * 5 + [1] * 9])):
        model, balance = attach_tiny(strategy)
        balance.token_mask(None, sequence_ids)
        model(ids.reshape(1, 14))
        losses.append(float(balance.loss().detach()))
    assert len(set(losses)) == 3


def test_sequence_ids_of_the_wrong_size_are_refused():
    model, balance = attach_tiny("lbl:scope=sequence")
    balance.token_mask(None, torch.zeros(1, 13))
    with pytest.raises(EquipoiseError, match="sequence_ids"):
        model(random_ids())
