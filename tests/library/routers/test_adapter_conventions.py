"""What an adapter says of its framework: the order of tokens, the sense of masks, the names of layers."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from equipoise import RouterAdapter, attach

DIM, EXPERTS, K, LENGTH = 16, 8, 2, 6


class Adapter(RouterAdapter):
    is_sequence_first = True
    attention_mask_hides = True
    logits_returned_by = "gating"

    def read(self, output, logits, k):
        return logits.reshape(-1, EXPERTS), *output

    def write(self, output, weights, expert_ids):
        return weights, expert_ids

    def mask(self, arguments):
        is_padding, router = arguments["padding_mask"], arguments["self"]
        return None if is_padding is None else ~is_padding.T & router.counts

    def arguments(self, num_tokens):
        return {"padding_mask": None}

    def layer_name(self, router, name):
        return re.sub(r"layers\.\d+", f"layers.{router.number}", name)


class Router(nn.Module):
    router_adapter = Adapter()

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))
        self.number, self.counts = number, True

    def gating(self, x):
        return x @ self.weight.T

    def forward(self, x, padding_mask):
        weights, expert_ids = self.gating(x).view(-1, EXPERTS).softmax(-1).topk(K)
        return weights, expert_ids


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.router = Router(number)

    def forward(self, x, padding_mask):
        weights, _ = self.router(x, padding_mask)
        return x + weights.mean(-1).view(*x.shape[:2], 1)


class Stage(nn.Module):
    """A stage of a pipeline, which gets hidden states [sequence, batch, dim] from the one before."""

    def __init__(self, first, takes_ids):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, DIM)
        self.layers = nn.ModuleList([Layer(first), Layer(first + 1)])
        self.takes_ids = takes_ids

    def forward(self, input_ids=None, attention_mask=None, padding_mask=None):
        x = self.embedding(input_ids).transpose(0, 1) if self.takes_ids else self.received
        for layer in self.layers:
            x = layer(x, None if padding_mask is None else padding_mask.T)
        return x.square().mean()


def _losses_by_hand(stage, hidden, sequences, counted):
    """A loss over each sequence, a mean over the tokens of each; by plain loops. ``sequences``: [batch, sequence]."""
    total = torch.zeros(())
    for layer in stage.layers:
        scores = (hidden @ layer.router.weight.T).softmax(-1).transpose(0, 1)  # [batch, sequence, experts]
        for number in sequences[counted].unique():
            inside = counted & (sequences == number)
            load = torch.zeros(EXPERTS)
            for token in scores[inside]:
                load[token.topk(K).indices] += 1
            share = EXPERTS * (load / load.sum() * scores[inside].mean(0)).sum()
            total = total + inside.sum() / counted.sum() * share
        weights = scores.transpose(0, 1).topk(K).values
        hidden = hidden + weights.mean(-1, keepdim=True)
    return total


CAUSAL = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()  # True: may not attend
ROWS = torch.arange(3)[:, None].expand(3, LENGTH)
PADDING = torch.arange(LENGTH)[None] >= torch.tensor([6, 2, 5])[:, None]


def _gradients(stage, loss):
    return torch.autograd.grad(loss, [layer.router.weight for layer in stage.layers])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("takes_ids", "documents"), [(True, False), (True, True), (False, False)])
def test_sequences_of_a_sequence_first_model_are_found(takes_ids, documents, padded):
    """A later stage of a pipeline takes no ids, and is not called with what shows documents."""
    stage, sequences, mask = Stage(0, takes_ids).train(), ROWS, CAUSAL
    if documents:
        sequences = ROWS * 2 + (torch.arange(LENGTH) >= torch.tensor([3, 2, 5])[:, None])
        mask = CAUSAL | (sequences[:, None, :, None] != sequences[:, None, None, :])
    ids = torch.randint(32, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden = stage.embedding(ids).transpose(0, 1).detach()
    stage.received = hidden
    with torch.no_grad():
        stage.embedding.weight.requires_grad_(False)
    counted = ~PADDING if padded else torch.ones_like(PADDING)
    expected = _gradients(stage, _losses_by_hand(stage, hidden, sequences, counted))
    balance = attach(stage, "lbl:scope=sequence,coefficient=1")
    inputs = {"input_ids": ids, "attention_mask": mask} if takes_ids else {}
    loss = 0 * stage(**inputs, padding_mask=PADDING if padded else None) + balance.loss()
    loss.backward()
    for layer, gradient in zip(stage.layers, expected, strict=True):
        assert_close(layer.router.weight.grad, gradient, rtol=1e-5, atol=1e-7)
    assert int(balance.num_tokens) == int(counted.sum())


def test_layers_have_the_names_that_the_adapter_gives():
    balance = attach(Stage(4, True), "loss-free")
    assert [layer.name for layer in balance.layers] == ["layers.4.router", "layers.5.router"]
    assert list(balance.state_dict()["biases"]) == list(balance.biases) == ["layers.4.router", "layers.5.router"]
    balance = attach(Stage(4, True), where=lambda name, router: name.startswith("layers.5"))
    assert list(balance.load) == ["layers.5.router"]


def test_the_mask_may_depend_on_the_router():
    stage = Stage(0, True).train()
    stage.layers[1].router.counts = False
    balance = attach(stage, "loss-free")
    stage(torch.zeros(3, LENGTH, dtype=torch.long), padding_mask=PADDING).backward()
    balance.step()
    assert [int(load.sum()) for load in balance.load.values()] == [13 * K, 0]


# ---- multi-token prediction ----


class MultiTokenPredictionLayer(nn.Module):
    """Takes ids and positions that were shifted by one token, as in Megatron; their last ones are 0."""

    def __init__(self):
        super().__init__()
        self.layer = Layer(0)

    def forward(self, input_ids, position_ids, attention_mask, x):
        return self.layer(x, None)


class Predictor(Stage):
    def __init__(self):
        super().__init__(0, True)
        self.mtp = MultiTokenPredictionLayer()

    def forward(self, input_ids, position_ids, attention_mask=None):
        x = self.embedding(input_ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, None)
        shifted = (torch.cat([values[:, 1:], 0 * values[:, :1]], dim=1) for values in (input_ids, position_ids))
        return self.mtp(*shifted, attention_mask, x).square().mean()


@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_multi_token_prediction_have_the_sequences_of_the_model(packed):
    model = Predictor().train()
    model.embedding.weight.requires_grad_(False)
    ids = torch.randint(32, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    layers = SimpleNamespace(layers=[*model.layers, model.mtp.layer])
    sequences = ROWS * 2 + (torch.arange(LENGTH) >= 4) if packed else ROWS
    hidden = model.embedding(ids).transpose(0, 1)
    by_hand = _losses_by_hand(layers, hidden, sequences, torch.ones_like(ids, dtype=torch.bool))
    expected = _gradients(layers, by_hand)
    balance = attach(model, "lbl:scope=sequence,coefficient=1")
    positions = torch.arange(LENGTH).expand(3, LENGTH) % (4 if packed else LENGTH)
    (0 * model(ids, positions) + balance.loss()).backward()
    for layer, gradient in zip(layers.layers, expected, strict=True):
        assert_close(layer.router.weight.grad, gradient, rtol=1e-5, atol=1e-7)
