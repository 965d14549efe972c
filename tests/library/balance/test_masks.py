"""Which tokens a mask leaves out, and which masks are refused."""

import logging
import math

import models
import pytest
import reference
import torch
from models import DIM
from torch import nn
from windows import (
    LAYERS,
    PADDING_MASK,
    SCOPES,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    count_by_hand,
    random_ids,
    record_calls,
)

from equipoise import EquipoiseError, attach
from equipoise.nn import MoE


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl:scope=sequence", "none"])
@pytest.mark.parametrize("how", ["keyword", "position", "bool", "token_mask", "flat_token_mask", "outranks"])
def test_padding_does_not_count(strategy, how):
    model, balance = attach_tiny(strategy)
    calls = record_calls(model)
    if how == "keyword":
        loss = model(random_ids(), attention_mask=PADDING_MASK)
    elif how == "position":
        loss = model(random_ids(), PADDING_MASK)
    elif how == "bool":
        loss = model(input_ids=random_ids(), attention_mask=PADDING_MASK.bool())
    elif how == "outranks":
        balance.token_mask(PADDING_MASK)
        loss = model(random_ids(), attention_mask=torch.ones_like(PADDING_MASK))
    else:
        balance.token_mask(PADDING_MASK.reshape(-1) if how == "flat_token_mask" else PADDING_MASK)
        loss = model(random_ids())
    assert balance.num_tokens == 10
    (loss + balance.loss()).backward()
    assert balance.num_tokens == 10
    model(random_ids(seed=1))
    assert balance.num_tokens == 14, "the mask of the previous micro-batch still applies"
    balance.loss()
    balance.step()
    assert_tokens_counted(balance, 24)
    for name in LAYERS:
        assert balance.load[name].tolist() == count_by_hand(calls[name], [PADDING_MASK.reshape(-1).tolist(), None])


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl"])
def test_a_token_mask_ends_with_step(strategy):
    model, balance = attach_tiny(strategy)
    balance.token_mask(PADDING_MASK)
    model(random_ids())
    balance.step()  # without loss()
    model(random_ids())
    balance.step()
    assert_tokens_counted(balance, 14)


def test_a_token_mask_after_its_forward_raises_except_in_evaluation(caplog):
    model, balance = attach_tiny("loss-free+lbl")
    model(random_ids())
    balance.token_mask(PADDING_MASK)
    with pytest.raises(EquipoiseError, match="token_mask.. must be called before the forward that it belongs to"):
        balance.loss()
    balance.token_mask(PADDING_MASK)
    with pytest.raises(
        EquipoiseError, match="token_mask.. must be called before the forward"
    ):  # no forward came after the first mask
        (balance.loss() + model(random_ids())).backward()
    balance.step()
    balance.token_mask(PADDING_MASK)
    (model(random_ids()) + balance.loss()).backward()
    balance.token_mask(PADDING_MASK)
    with caplog.at_level(logging.WARNING, "equipoise"):
        balance.step()
    assert "token_mask() must be called before" in caplog.text
    model.eval()
    balance.token_mask(PADDING_MASK)
    model(random_ids())
    assert balance.loss() == 0  # a training loop with the model in evaluation mode


def test_token_mask_none_counts_all_tokens():
    model, balance = attach_tiny("lbl")
    balance.token_mask(None)
    model(random_ids(), attention_mask=PADDING_MASK)
    assert balance.num_tokens == 14


def test_the_attention_mask_of_a_transformers_model_is_found():
    for strategy in ("none", "loss-free+lbl:scope=sequence"):
        model = models.family("qwen3_moe")
        balance = attach(model, strategy)
        ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
        output = model(input_ids=ids, attention_mask=PADDING_MASK, labels=ids)
        (output.loss + balance.loss()).backward()
        balance.step()
        assert all(load.sum() == 2 * 10 for load in balance.load.values())


class Flat(nn.Module):
    """A model that takes its tokens in one dimension."""

    def __init__(self):
        super().__init__()
        self.embedding, self.moe = nn.Embedding(16, 8), MoE(8, hidden=4, num_experts=4, k=2)

    def forward(self, input_ids, attention_mask=None):
        return self.moe(self.embedding(input_ids)).square().mean()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl", "none"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_mask_of_one_dimension_marks_the_padding_of_flat_tokens(strategy, dtype):
    torch.manual_seed(0)
    model, ids = Flat().train(), torch.randint(16, (10,))
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 0, 1]).to(dtype)
    balance, chosen = attach(model, strategy), []
    model.moe.router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    (model(ids, attention_mask=mask) + balance.loss()).backward()
    balance.step()
    assert int(balance.num_tokens) == 7
    assert balance.load["moe.router"].tolist() == reference.load(chosen[0].tolist(), 4, mask.tolist())


def test_a_mask_of_one_dimension_that_numbers_sequences_parts_flat_tokens():
    torch.manual_seed(0)
    model, ids = Flat().train(), torch.randint(16, (9,))
    balance = attach(model, "lbl:scope=sequence,coefficient=1")
    model(ids, attention_mask=torch.tensor([1, 1, 1, 1, 2, 2, 2, 0, 0]))
    packed = balance.loss()
    model(ids[:7], attention_mask=torch.tensor([1, 1, 1, 1, 2, 2, 2]))
    assert torch.equal(packed, balance.loss())
    model(ids[:4], attention_mask=torch.ones(4, dtype=torch.int64))
    first = balance.loss()
    model(ids[4:7], attention_mask=torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(packed, (4 * first + 3 * balance.loss()) / 7)


def test_the_end_of_an_attention_mask_with_a_cached_prefix_applies():
    model = models.family("mixtral")
    balance = attach(model, "none")
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # its end and its start mask different tokens
    with torch.no_grad(), balance.counting():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    balance.step()
    assert all(load.sum() == 2 * 10 for load in balance.load.values())


def test_the_end_of_a_token_mask_with_a_cached_prefix_applies():
    model, balance = attach_tiny("none")
    balance.token_mask(torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]))
    model(random_ids(length=3))
    balance.step()
    assert_tokens_counted(balance, 6)


def test_a_router_called_by_itself_has_the_end_of_a_longer_mask():
    model, balance = attach_tiny("none")
    balance.token_mask(torch.tensor([[0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1]]))
    for name in LAYERS:
        model.get_submodule(name)(torch.randn(6, DIM, generator=torch.Generator().manual_seed(0)))
    balance.step()
    assert_tokens_counted(balance, 4)


def test_a_four_dimensional_mask_is_ignored_and_one_of_another_size_refused():
    model = models.family("mixtral")
    balance = attach(model, "none")
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    model(ids, attention_mask=torch.zeros(2, 1, 7, 7))
    balance.step()
    assert all(load.sum() == 2 * 14 for load in balance.load.values())
    balance.token_mask(torch.ones(3, 5))
    with pytest.raises(
        EquipoiseError, match=r"one number per token that model.layers.0.mlp.gate routes: got shape \(3, 5\)"
    ):
        model(ids)
    for wrong in (torch.ones(1, 1, 7), torch.tensor(1.0), [1, 0]):
        with pytest.raises(ValueError, match=r"mask must be a tensor \[batch, sequence\] or \[tokens\]"):
            balance.token_mask(wrong)
    with pytest.raises(ValueError, match="sequence_ids must be a tensor"):
        balance.token_mask(None, torch.zeros(1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_square_causal_mask_is_not_taken_for_padding(dtype):
    model, balance = attach_tiny("none")
    model(random_ids(rows=1), torch.ones(7, 7).tril())
    balance.step()
    assert_tokens_counted(balance, 7)
    with pytest.raises(EquipoiseError, match="it is a causal attention mask.*token_mask"):
        model(random_ids(rows=2)[:, :2], torch.ones(2, 2).tril().to(dtype))
    model(random_ids(rows=2)[:, :2], torch.tensor([[1, 1], [1, 0]]).to(dtype))
    balance.step()
    assert_tokens_counted(balance, 3)
    balance.token_mask(torch.ones(7, 7).tril())
    with pytest.raises(EquipoiseError, match=r"one number per token.*got shape \(7, 7\) for 7 tokens"):
        model(random_ids(rows=1))


@pytest.mark.parametrize("low", [float("-inf"), -1e9, -1])
def test_a_mask_that_is_added_to_attention_scores_is_refused(low):
    model, balance = attach_tiny("none")
    mask = torch.where(PADDING_MASK == 0, low, 0.0)
    with pytest.raises(EquipoiseError, match=r"called with, it holds other numbers.*token_mask\(None\) if all do"):
        model(random_ids(), mask)
    with pytest.raises(EquipoiseError, match="it holds other numbers"):
        model(random_ids(), mask.clamp(-1, 0).long())
    with balance.paused():
        model(random_ids(), mask)
    model.eval()
    model(random_ids(), mask)
    model.train()
    balance.token_mask(PADDING_MASK)
    model(random_ids(), mask)
    balance.step()
    assert_tokens_counted(balance, 10)
    model(random_ids(), torch.where(PADDING_MASK == 0, 0, 5))  # numbers of packed sequences
    balance.step()
    assert_tokens_counted(balance, 10)


def test_a_micro_batch_of_padding_has_no_loss_and_no_gradient():
    model, balance = attach_tiny("+".join(f"lbl:scope={s},coefficient=1" for s in SCOPES))
    loss = balance.loss() + model(random_ids(), torch.zeros_like(PADDING_MASK)) * 0
    loss = balance.loss() + loss
    assert loss == 0 and balance.num_tokens == 0
    loss.backward()
    for name, gradient in clone_gradients(model).items():
        assert not gradient.any(), name
    balance.step()
    metrics = balance.metrics()
    assert metrics["tokens"] == 0 and metrics["load_balancing_loss"] == 0 and math.isnan(metrics["maxvio_batch"])
    assert not any(bias.isnan().any() for bias in balance.biases.values())


class TextBesideImages(nn.Module):
    """Routes the tokens of a text. It takes images too, as its first argument."""

    def __init__(self):
        super().__init__()
        self.embedding, self.moe = nn.Embedding(64, 16), MoE(16, 8, 6, 2)
        self.prefix = nn.Parameter(torch.zeros(1, 3, 16))

    def forward(self, images, input_ids, attention_mask=None, prefixed=False):
        hidden = self.embedding(input_ids)
        if prefixed:
            hidden = torch.cat([self.prefix.expand(len(input_ids), -1, -1), hidden], 1)
        return self.moe(hidden).sum()


def test_only_a_sequence_length_cuts_a_mask():
    """The second size of an image is its channels, not a length. The longer mask covers a prefix of the model."""
    model = TextBesideImages()
    balance = attach(model, "lbl")
    (model(torch.zeros(2, 3, 8, 8), random_ids(), attention_mask=PADDING_MASK) + balance.loss()).backward()
    balance.step()
    assert balance.metrics()["tokens"] == 10
    longer = torch.cat([torch.ones(2, 3), PADDING_MASK], 1)
    (model(random_ids(), random_ids(), attention_mask=longer, prefixed=True) + balance.loss()).backward()
    balance.step()
    assert balance.metrics()["tokens"] == 16


def test_a_square_padding_mask_is_accepted_if_the_first_tensor_has_other_rows():
    model = TextBesideImages()
    balance = attach(model, "loss-free")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    model(torch.zeros(6, 3, 8, 8), random_ids(rows=4)[:, :4], attention_mask=mask)
    balance.step()
    assert balance.metrics()["tokens"] == 12
