"""Packed sequences through whole models of Transformers."""

import models
import pytest
import torch
from block_net import Outcome
from windows import assert_gradients_close, clone_gradients

from equipoise import attach


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences_of_a_family_equal_unpacked_ones(name, checkpointing):
    """Rows of 5, 3 and 4 tokens, and the same in one row of 13, which ends with a token of padding."""
    strategy = "loss-free:rate=0.1+lbl:scope=sequence,coefficient=0.5+lbl:scope=micro_batch,coefficient=0.2"
    lengths = [5, 3, 4]
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    outcomes = []
    for packed in (False, True):
        model = models.family(name, experts_implementation="eager")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        balance = attach(model, strategy)
        if packed:
            rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
            row = torch.cat([*rows, torch.zeros(1, dtype=torch.long)])[None]
            labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in rows] + [torch.tensor([-100])])
            positions = torch.tensor([[*range(5), *range(3), *range(4), 0]])
            sequence_ids = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4 + [3]])
            balance.token_mask((sequence_ids < 3).long(), sequence_ids)
            loss = model(input_ids=row, position_ids=positions, labels=labels[None], use_cache=False).loss
        else:
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        assert balance.num_tokens == 12
        ticket = balance.loss()
        (loss + ticket).backward()
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [2 * 12] * 2
        loads = {n: load.tolist() for n, load in balance.load.items()}
        outcomes.append(
            (Outcome(loads, clone_gradients(model), balance.biases), float(loss.detach()), float(ticket.detach()))
        )
    (unpacked, loss, ticket), (packed, packed_loss, packed_ticket) = outcomes
    assert packed.loads == unpacked.loads
    assert packed_loss == pytest.approx(loss, rel=1e-6) and packed_ticket == pytest.approx(ticket, rel=1e-6)
    # the embedding has a row for padding; only the unpacked model has a gradient there, which the mask makes zero
    assert_gradients_close(packed.gradients, unpacked.gradients, 1e-5)
    for n in packed.biases:
        assert torch.equal(packed.biases[n], unpacked.biases[n])
