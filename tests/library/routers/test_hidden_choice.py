"""A router that drops tokens after its choice, or chooses by maxima one after another (GShard), without a framework."""

import copy

import pytest
import torch
from plain_model import assert_biases
from torch import nn

from equipoise import EquipoiseError, RouterAdapter, attach
from equipoise.routers.outputs import TOKENS as TRIED
from equipoise.routers.steering import BiasedTopK, ChoicesSeen

DIM, EXPERTS, TOKENS, RATE = 8, 6, 24, 0.05
CAPACITY = 4
BOTH = f"loss-free:rate={RATE},rule=sign+lbl:coefficient=1"


class HiddenChoice(RouterAdapter):
    framework = "sample 1.0"
    choice_is_hidden = True

    def read(self, output, logits, k):
        (_, _, weights), expert_ids = output
        return logits, weights.T, expert_ids

    def write(self, output, weights, expert_ids):
        return output[0], output[1], weights.T

    def prepare(self, stand_in):
        stand_in.capacity = 10**6

    def own_loss(self, output):
        return output[0]


class Gate(nn.Module):
    """(loss, ids [k, tokens], weights [k, tokens]); ids are -1 and weights 0 for tokens beyond the capacity."""

    router_adapter = HiddenChoice()

    def __init__(self, k):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(k)) * 0.7)
        self.k, self.capacity = k, CAPACITY

    def forward(self, x):
        logits = nn.functional.linear(x, self.weight)
        scores = logits.softmax(-1)
        ids = self.choose(scores, logits)
        torch._dynamo.graph_break()  # as where the capacity becomes an int
        is_chosen = nn.functional.one_hot(ids, EXPERTS)  # [k, tokens, experts]
        place = (is_chosen.flatten(0, 1).cumsum(0) - 1).view_as(is_chosen)
        is_kept = (is_chosen * (place < self.capacity)).sum(-1)
        weights = scores.gather(-1, ids.T).T * is_kept
        if self.k > 1:
            weights = weights / weights.sum(0).clamp_min(1e-9)
        loss = scores.mean(0).square().sum()
        return loss, torch.where(is_kept > 0, ids, -1), weights

    def choose(self, scores, logits):
        ids = [torch.argmax(scores, dim=1)]
        for _ in range(1, self.k):
            taken = nn.functional.one_hot(torch.stack(ids), EXPERTS).sum(0).bool()
            ids.append(torch.argmax(logits.masked_fill(taken, -torch.inf), dim=1))
        return torch.stack(ids)


class Block(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.gate = Gate(k)
        self.experts = nn.Parameter(torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(7)))

    def forward(self, x):
        self.loss, ids, weights = self.gate(x)
        return (x * (self.experts[ids.clamp_min(0)] * weights[..., None]).sum(0)).square().mean()


def _tokens(seed):
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def _plain(block, x, bias):
    """Counts, and the gradient of the block's loss and the balancing loss at the gate, in float64 by plain loops."""
    weight = block.gate.weight.detach().double().requires_grad_()
    experts = block.experts.detach().double()
    scores = (x.double() @ weight.T).softmax(-1)
    ranked = (scores.detach() + torch.tensor(bias, dtype=torch.float64)).tolist()
    chosen = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[: block.gate.k] for row in ranked]
    counts = [sum(row.count(expert) for row in chosen) for expert in range(EXPERTS)]
    used, kept = [0] * EXPERTS, set()
    for place in range(block.gate.k):
        for token, row in enumerate(chosen):
            if used[row[place]] < CAPACITY:
                used[row[place]] += 1
                kept.add((token, row[place]))
    loss = 0
    for token, row in enumerate(chosen):
        weights = {expert: scores[token, expert] for expert in row if (token, expert) in kept}
        total = 1 if block.gate.k == 1 else sum(weights.values())
        mixed = sum((w / total * experts[e] for e, w in weights.items()), torch.zeros(DIM, dtype=torch.float64))
        loss = loss + (x[token].double() * mixed).square().mean() / TOKENS
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    loss = loss + EXPERTS * (share * scores.mean(0)).sum()
    return counts, torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize(("k", "is_compiled"), [(1, False), (2, False), (3, False), (2, True)])
def test_choices_count_before_dropping_and_are_steered(k, is_compiled):
    block = Block(k).train()
    balance, bias = attach(block, BOTH), [0.0] * EXPERTS
    run = torch.compile(block, backend="eager") if is_compiled else block
    for seed in range(10, 14):
        block.zero_grad()
        (run(_tokens(seed)) + balance.loss()).backward()
        counts, gradient = _plain(block, _tokens(seed), bias)
        balance.step()
        assert balance.load["gate"].tolist() == counts and max(counts) > CAPACITY
        assert (block.gate.weight.grad.double() - gradient).norm() <= 1e-6 * gradient.norm()
        signs = [(TOKENS * k > EXPERTS * count) - (TOKENS * k < EXPERTS * count) for count in counts]
        bias = [b + RATE * (sign - sum(signs) / EXPERTS) for b, sign in zip(bias, signs, strict=True)]
        assert_biases(balance.biases, {"gate": bias})


def test_a_deep_copy_is_steered_and_does_not_count():
    block = Block(2).train()
    balance = attach(block, BOTH)
    for seed in range(3):
        (block(_tokens(seed)) + balance.loss()).backward()
        balance.step()
    block.loss = None  # torch copies no tensor inside a graph
    copied = copy.deepcopy(block)
    assert torch.equal(copied(_tokens(9)), block(_tokens(9)))
    plain = Block(2)
    plain.load_state_dict(block.state_dict())
    assert not torch.equal(plain(_tokens(9)), block(_tokens(9)))
    copied.train()(_tokens(1)).backward()
    with pytest.raises(EquipoiseError, match="loss"):
        block(_tokens(1)).backward()  # this one counts: its loss is missing


def _softmax_twice(self, scores, logits):
    return scores.softmax(-1).topk(2).indices.T


def _choose_twice(self, scores, logits):
    return scores.topk(2).indices.T + 0 * logits.topk(2).indices.T


@pytest.mark.parametrize("choose", [None, _softmax_twice, _choose_twice])
def test_a_router_that_changes_after_attach_raises(choose, monkeypatch):
    block = Block(2).train()
    attach(block, "lbl")
    if choose is None:
        block.gate.k = 3
    else:
        monkeypatch.setattr(Gate, "choose", choose)
    with pytest.raises(EquipoiseError, match="must take one softmax and choose 2 experts per token"):
        block(_tokens(0))


class Noisy(Gate):
    """Its second maximum ranks other numbers than its scores."""

    def choose(self, scores, logits):
        first = torch.argmax(scores, dim=1)
        taken = nn.functional.one_hot(first, EXPERTS).bool()
        return torch.stack([first, torch.argmax(-logits.masked_fill(taken, torch.inf), dim=1)])


def test_maxima_that_are_not_the_best_are_refused():
    block = Block(2)
    block.gate = Noisy(2)
    with pytest.raises(EquipoiseError, match="the experts that it chooses are not the best by its"):
        attach(block, "lbl")


@pytest.mark.parametrize(("choose", "calls"), [(_softmax_twice, "2 softmax, 1 top-k"), (_choose_twice, "2 top-k")])
def test_two_choices_or_softmaxes_are_refused(choose, calls):
    block = Block(2)
    block.gate = type("Twice", (Gate,), {"choose": choose})(2)
    with pytest.raises(EquipoiseError, match=f"must take one softmax and make one choice, and takes .*{calls}"):
        attach(block, "lbl")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_recorded_choice_is_replayed(k):
    block = Block(k).train()
    balance = attach(block, "frozen")
    record = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).topk(k).indices
    with balance.replay({"gate": record}):
        block(_tokens(0)).backward()
    balance.step()
    assert torch.equal(balance.load["gate"], record.flatten().bincount(minlength=EXPERTS))


class Flat(nn.Module):
    """A gate of [tokens, dim] whose experts are dimension 1. Of [batch, sequence, dim] that is another dimension."""

    router_adapter = HiddenChoice()

    def __init__(self, num_experts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, DIM))

    def forward(self, x):
        scores = nn.functional.linear(x, self.weight).softmax(dim=1)
        ids = torch.argmax(scores, dim=1)
        return scores.sum(), ids[None], (scores * nn.functional.one_hot(ids, scores.shape[1])).sum(1)[None]


@pytest.mark.parametrize("num_experts", [1, 4, TRIED // 2])
def test_a_gate_of_flat_tokens_is_proven_on_these(num_experts):
    model = nn.Sequential(Flat(num_experts))
    balance = attach(model, "lbl")
    (layer,) = balance.layers
    assert (layer.num_experts, layer.dimensions, layer.obstacle) == (num_experts, (2,), None)
    with pytest.raises(EquipoiseError, match=r"must be called with \[tokens, dim\]"):
        model(torch.randn(2, num_experts, DIM))


def _said_of_returned_losses(caplog):
    return [record.message for record in caplog.records if "the routers of sample 1.0 return" in record.message]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("weight", [None, 0.0, 0.1])
def test_a_loss_that_the_router_returns_is_named_once_if_it_is_added(weight, is_compiled, caplog):
    block = Block(1).train()
    balance = attach(block, "lbl")
    run = torch.compile(block, backend="eager") if is_compiled else block
    for seed in range(3):
        loss = run(_tokens(seed)) + balance.loss()
        (loss if weight is None else loss + weight * block.loss).backward()
        balance.step()
    assert len(_said_of_returned_losses(caplog)) == bool(weight)


@pytest.mark.parametrize("added", [0, 1])
def test_the_loss_of_any_one_router_is_named(added, caplog):
    blocks = nn.ModuleList([Block(1), Block(2)]).train()
    balance = attach(blocks, "lbl")
    loss = sum(block(_tokens(0)) for block in blocks) + balance.loss()
    (loss + blocks[added].loss).backward()
    balance.step()
    assert len(_said_of_returned_losses(caplog)) == 1
    balance.detach()
    assert not any(block.gate._forward_hooks for block in blocks)


def test_detach_removes_what_watches_the_returned_losses():
    block = Block(1).train()
    attach(block, "lbl").detach()
    assert not block.gate._forward_hooks


def test_without_a_strategy_nothing_is_said_of_its_loss(caplog):
    block = Block(1).train()
    balance = attach(block)
    (block(_tokens(0)) + block.loss).backward()
    balance.step()
    assert "return" not in caplog.text


# ---- maxima one after another ----


def _two_maxima(scores, logits):
    first = scores.argmax(-1)
    rest = logits.masked_fill(nn.functional.one_hot(first, scores.shape[-1]).bool(), -torch.inf)
    return torch.stack([first, torch.argmax(rest, -1)], -1)


def test_two_maxima_give_the_best_by_score_and_bias():
    logits, bias = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0)), torch.randn(EXPERTS) * 0.3
    scores = logits.softmax(-1)
    steering = BiasedTopK(bias, by_max=True, num_maxima=2)
    with steering:
        ids = _two_maxima(scores, logits)
    assert torch.equal(ids, (scores + bias).topk(2).indices) and steering.num_choices == 1
    with steering, ChoicesSeen(EXPERTS) as seen:
        _two_maxima(scores, logits)
    assert torch.equal(seen.expert_ids, ids) and steering.num_choices == 2


def test_where_scores_are_rounded_to_zero_the_logits_decide():
    logits = torch.tensor([[500.0, 1.0, 2.0, 9.0, 3.0, 4.0]])
    with BiasedTopK(torch.zeros(EXPERTS), by_max=True, num_maxima=2):
        assert _two_maxima(logits.softmax(-1), logits).tolist() == [[0, 3]]
    with BiasedTopK(torch.tensor([0, 0, 0.1, 0, 0, 0]), by_max=True, num_maxima=2):
        assert _two_maxima(logits.softmax(-1), logits).tolist() == [[0, 2]]


@pytest.mark.parametrize("number", [1, 3])
def test_maxima_that_make_no_whole_choice_steer_nothing(number):
    scores = torch.rand(4, EXPERTS)
    steering = BiasedTopK(torch.zeros(EXPERTS), by_max=True, num_maxima=2)
    with steering:
        for _ in range(number):
            scores.argmax(-1)
    assert steering.num_choices == 0


def test_two_maxima_take_a_record():
    scores, record = torch.rand(4, EXPERTS), torch.tensor([[5, 1], [0, 3], [-1, -1], [2, 4]])
    steering = BiasedTopK(None, by_max=True, num_experts=EXPERTS, recorded=record, num_maxima=2)
    with steering:
        ids = _two_maxima(scores, scores.log())
    assert torch.equal(ids[[0, 1, 3]], record[[0, 1, 3]])
    assert torch.equal(ids[2], scores[2].topk(2).indices) and steering.num_replayed == 1
