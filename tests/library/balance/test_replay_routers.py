"""Every kind of router takes recorded ids, and weighs them by its live scores; routing is recorded in both layouts."""

import pytest
import shrunken
import torch
from models import family
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from equipoise import EquipoiseError, RouterAdapter, attach

DIM, EXPERTS, K, ROWS, LENGTH = 16, 8, 2, 3, 5


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _record(k=K, rows=ROWS, length=LENGTH, seed=0, experts=EXPERTS):
    return torch.rand(rows, length, experts, generator=torch.Generator().manual_seed(seed)).topk(k).indices


# ---- routers that are modules ----


class TopK(nn.Module):
    k = K

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(_normal(EXPERTS, DIM))

    def choose(self, logits):
        return logits.softmax(-1).topk(self.k, -1)

    def forward(self, x):
        logits = F.linear(x, self.weight)
        return logits, *self.choose(logits)


class Max(TopK):
    k = 1

    def choose(self, logits):
        return logits.softmax(-1).max(-1, keepdim=True)


class MaxWithoutDimension(Max):
    def choose(self, logits):
        weights, expert_ids = torch.max(logits.softmax(-1), dim=-1)
        return weights.unsqueeze(-1), expert_ids.unsqueeze(-1)


class Argmax(Max):
    def choose(self, logits):
        scores = logits.softmax(-1)
        expert_ids = torch.argmax(scores, dim=-1, keepdim=True)
        return scores.gather(-1, expert_ids), expert_ids


class AfterTopK(TopK):
    """Softmax of the chosen logits."""

    def choose(self, logits):
        values, expert_ids = torch.topk(logits, self.k, dim=-1, sorted=False)
        return values.softmax(-1), expert_ids


class Slotted(TopK):
    def __init__(self):
        super().__init__()
        self.register_buffer("balance", torch.zeros(EXPERTS))

    def choose(self, logits):
        expert_ids = (logits.softmax(-1) + self.balance).topk(K, -1).indices
        return logits.softmax(-1).gather(-1, expert_ids), expert_ids


class Dense(TopK):
    def forward(self, x):
        logits = F.linear(x, self.weight)
        weights, expert_ids = logits.softmax(-1).topk(K, -1)
        return torch.zeros_like(logits).scatter(-1, expert_ids, weights), logits


class SequenceFirst(RouterAdapter):
    is_sequence_first = True

    def read(self, output, logits, k):
        return output

    def write(self, output, weights, expert_ids):
        return output[0], weights.view(output[1].shape), output[2]


class Turned(TopK):
    """Is called with [sequence, batch, dim]."""

    router_adapter = SequenceFirst()


class Block(nn.Module):
    """Gives what its router gave."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, hidden):
        return self.router(hidden.transpose(0, 1) if isinstance(self.router, Turned) else hidden)


ROUTERS = [TopK, Max, MaxWithoutDimension, Argmax, AfterTopK, Slotted, Dense, Turned]


def _exact_weights(router, hidden, record):
    """[batch, sequence, k], in float64."""
    scores = (hidden.double() @ router.weight.detach().double().T).softmax(-1)
    weights = scores.gather(-1, record)
    return weights / weights.sum(-1, keepdim=True) if isinstance(router, AfterTopK) else weights


@pytest.mark.parametrize("strategy", ["none", "frozen+lbl:coefficient=0.5"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_ids_are_the_record_and_the_weights_the_live_scores(router, strategy):
    model = nn.Sequential(Block(router()))
    biases = None if strategy == "none" else {"0.router": _normal(EXPERTS, seed=3)}
    balance = attach(model, strategy, biases=biases)
    hidden, record = _normal(ROWS, LENGTH, DIM, seed=1), _record(router.k)
    with balance.replay([record]):
        output = model(hidden)
    exact = _exact_weights(model[0].router, hidden, record)
    if router is Dense:
        dense = torch.zeros(ROWS, LENGTH, EXPERTS, dtype=torch.float64).scatter(-1, record, exact)
        assert_close(output[0].double(), dense, rtol=1e-5, atol=1e-8)
    else:
        turn = router is Turned
        weights, expert_ids = (value.transpose(0, 1) if turn else value for value in output[1:])
        assert torch.equal(expert_ids, record)
        assert_close(weights.double(), exact, rtol=1e-5, atol=1e-8)
    balance.loss()
    balance.step()
    assert torch.equal(balance.load["0.router"], torch.bincount(record.flatten(), minlength=EXPERTS))


def test_a_square_batch_is_turned_by_what_the_adapter_says():
    model = nn.Sequential(Block(Turned()))
    balance = attach(model)
    record = _record(rows=LENGTH)
    with balance.replay([record]):
        _, _, expert_ids = model(_normal(LENGTH, LENGTH, DIM, seed=1))
    assert torch.equal(expert_ids.transpose(0, 1), record)


def test_flat_ids_are_in_the_order_of_the_router():
    model = nn.Sequential(Block(Turned()))
    balance = attach(model)
    hidden, record = _normal(ROWS, LENGTH, DIM, seed=1), _record()
    with balance.replay([record.transpose(0, 1).reshape(-1, K)]):
        _, _, expert_ids = model(hidden)
    assert torch.equal(expert_ids.transpose(0, 1), record)


def test_a_mask_of_rows_is_turned_for_flat_ids():
    model = nn.Sequential(Block(Turned()))
    balance = attach(model)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, 2:] = 0
    record = _record().masked_fill(mask[..., None] == 0, 0)
    with balance.replay([record.transpose(0, 1).reshape(-1, K)], mask=mask):
        model(_normal(ROWS, LENGTH, DIM, seed=1))
    balance.step()
    assert torch.equal(balance.load["0.router"], torch.bincount(record[mask.bool()].flatten(), minlength=EXPERTS))


def test_a_router_that_gets_the_sequence_first_is_known_by_its_input():
    model = nn.Sequential(Block(TopK()))
    balance = attach(model)
    hidden, record = _normal(ROWS, LENGTH, DIM, seed=1), _record()
    with balance.replay([record]):
        _, _, expert_ids = model(hidden.transpose(0, 1))
    assert torch.equal(expert_ids.transpose(0, 1), record)


class Sorts(TopK):
    def choose(self, logits):
        weights, expert_ids = logits.softmax(-1).sort(-1, descending=True)
        return weights[..., :K], expert_ids[..., :K]


def test_a_router_that_cannot_be_steered_is_refused_or_routed_live():
    model = nn.Sequential(Block(Sorts()), Block(TopK()))
    model[0].forward = lambda hidden: model[0].router(hidden) and hidden
    balance = attach(model)
    with pytest.raises(EquipoiseError, match="0.router cannot be, because it chooses without torch.topk"):
        balance.replay([_record(), _record()]).__enter__()
    with balance.replay([None, _record()]):
        _, _, expert_ids = model(_normal(ROWS, LENGTH, DIM, seed=1))
    assert torch.equal(expert_ids, _record())


# ---- expert groups ----


def _outputs(model, balance, record, ids):
    outputs = []
    handles = [layer.router.register_forward_hook(lambda *a: outputs.append(a[2])) for layer in balance.layers]
    with balance.replay(record):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return outputs


def test_groups_that_a_bias_moves_hinder_no_record():
    """DeepSeek-V3: the weights are gathered from the scores, whatever the groups."""
    model = family("deepseek_v3", n_group=4, topk_group=2)
    balance = attach(model, "loss-free")
    ids = torch.randint(3, 64, (ROWS, LENGTH))
    records = [_record(seed=layer) for layer in range(2)]
    for record, (logits, weights, expert_ids), layer in zip(
        records, _outputs(model, balance, records, ids), balance.layers, strict=True
    ):
        assert torch.equal(expert_ids.view(record.shape), record)
        scores = logits.double().sigmoid().gather(-1, record.view(-1, K))
        exact = scores / scores.sum(-1, keepdim=True) * layer.router.routed_scaling_factor
        assert_close(weights.double(), exact, rtol=1e-5, atol=0)


def test_groups_that_are_chosen_first_are_those_of_the_record():
    """DeepSeek-V2: experts outside the chosen groups have the score 0, which would be their weight."""
    model = shrunken.build("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    balance = attach(model, "lbl:coefficient=0.1")
    ids = torch.randint(3, 64, (ROWS, LENGTH))
    record = _record()
    record[0, 0] = torch.tensor([2, 3])  # one group: the router adds its best other one
    record[1, 1] = -1
    ((logits, weights, expert_ids),) = _outputs(model, balance, [record], ids)
    flat = record.view(-1, K)
    is_live = flat[:, 0] == -1
    scores = logits.double().softmax(-1)
    exact = scores.gather(-1, flat.clamp_min(0)) * balance.layers[0].router.routed_scaling_factor
    assert torch.equal(expert_ids[~is_live], flat[~is_live])
    assert_close(weights[~is_live].double(), exact[~is_live], rtol=1e-5, atol=0)
    groups = scores[is_live].view(4, 2).max(-1).values.topk(2).indices
    allowed = torch.zeros(4, 2).index_fill(0, groups, 1).flatten().bool()
    best = scores[is_live][0].masked_fill(~allowed, 0).topk(K).indices
    assert sorted(expert_ids[is_live][0].tolist()) == sorted(best.tolist())


def test_a_record_of_more_groups_than_the_router_chooses_is_refused():
    model = shrunken.build("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=1)
    balance = attach(model)
    record = torch.tensor([0, 7]).expand(ROWS, LENGTH, K)
    with pytest.raises(EquipoiseError, match="at most 1 of 4 expert groups"), balance.replay([record]):
        model(input_ids=torch.randint(3, 64, (ROWS, LENGTH)))


# ---- blocks that route by themselves ----


class OwnRouting(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.gate.weight.data = _normal(EXPERTS, DIM)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def choose(self, logits):
        values, expert_ids = torch.topk(logits, K)
        return values.softmax(-1), expert_ids

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, DIM)
        weights, expert_ids = self.choose(self.gate(x))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(expert_ids == number)
            y = y.index_add(0, token, weights[token, choice, None] * expert(x[token]))
        return y.view(shape)


class OwnMaximum(OwnRouting):
    def choose(self, logits):
        weights, expert_ids = torch.max(logits.softmax(-1), dim=-1)
        return weights[:, None], expert_ids[:, None]


@pytest.mark.parametrize("strategy", ["none", "loss-free", "lbl:coefficient=0.5"])
@pytest.mark.parametrize("block", [OwnRouting, OwnMaximum])
def test_a_block_that_routes_by_itself_is_replayed(block, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(block())
    balance = attach(model, strategy)
    k = balance.layers[0].k
    hidden, record = _normal(ROWS, LENGTH, DIM, seed=1), _record(k)
    with balance.replay([record]):
        output = model(hidden)
        loss = output.square().mean() + balance.loss()
        loss.backward()
    gate = model[0].gate.weight.detach().double().requires_grad_()
    flat, x = record.view(-1, k), hidden.double().view(-1, DIM)
    logits = x @ gate.T
    scores = logits.softmax(-1)
    weights = logits.gather(-1, flat).softmax(-1) if block is OwnRouting else scores.gather(-1, flat)
    experts = [(expert.weight.detach().double(), expert.bias.detach().double()) for expert in model[0].experts]
    rows = [
        sum(weights[t, c] * (experts[e][0] @ x[t] + experts[e][1]) for c, e in enumerate(flat[t].tolist()))
        for t in range(ROWS * LENGTH)
    ]
    exact = torch.stack(rows)
    assert_close(output.detach().double().view(-1, DIM), exact.detach(), rtol=1e-5, atol=1e-6)
    counts = torch.bincount(flat.flatten(), minlength=EXPERTS).double()
    balancing = 0.5 * EXPERTS * (counts / counts.sum() * scores.mean(0)).sum() if "lbl" in strategy else 0
    (exact.square().mean() + balancing).backward()
    distance = (model[0].gate.weight.grad.double() - gate.grad).norm() / gate.grad.norm()
    assert distance < 1e-6
    balance.step()
    assert balance.load["0"].tolist() == counts.tolist()
    assert not balance.biases["0"].any()


# ---- recording ----


def test_a_generation_is_laid_out_as_an_engine_gives_it():
    """A prompt, then a token at a time: [batch, sequence, layers, k]."""
    model = nn.Sequential(Block(TopK()), Block(TopK()))
    model[0].forward = lambda hidden: model[0].router(hidden) and hidden
    balance = attach(model)
    hidden = _normal(ROWS, LENGTH, DIM, seed=1)
    with balance.recording() as recording, torch.inference_mode():
        whole = model.eval()(hidden)[2]
    with balance.recording() as parts, torch.no_grad():
        for part in hidden.split([3, 1, 1], dim=1):
            model(part)
    assert list(parts) == ["0.router", "1.router"]
    assert [ids.shape for ids in parts["0.router"]] == [(9, K), (3, K), (3, K)]
    by_token = parts.by_token(rows=ROWS)
    assert by_token.shape == (ROWS, LENGTH, 2, K)
    assert torch.equal(by_token, recording.by_token(rows=ROWS)) and torch.equal(by_token[:, :, 1], whole)
    assert torch.equal(recording.by_layer()[1], whole.reshape(-1, K))
    assert not recording.by_layer()[0].is_inference() and not balance.has_open_window
    with balance.replay(by_token):
        model.train()(hidden)[1].sum().backward()


def test_rows_are_those_of_the_forward():
    model = family("qwen3_moe").eval()
    balance = attach(model)
    ids = torch.randint(3, 64, (ROWS, LENGTH))
    with balance.recording() as recording:
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    by_token = recording.by_token()
    assert by_token.shape == (ROWS, LENGTH + 2, 2, K)  # the last token of a generation is not routed


def test_a_record_of_a_sequence_first_router_has_its_rows_first():
    for router in (Turned(), TopK()):
        model = nn.Sequential(Block(router))
        balance = attach(model)
        hidden = _normal(ROWS, LENGTH, DIM, seed=1)
        with balance.recording() as recording:
            _, _, expert_ids = model(hidden)
        expected = expert_ids.transpose(0, 1) if isinstance(router, Turned) else expert_ids
        assert torch.equal(recording.by_token(rows=ROWS)[:, :, 0], expected)
        assert torch.equal(recording.by_layer()[0], expert_ids.reshape(-1, K))
        if isinstance(router, Turned):  # its own input shows the rows
            assert torch.equal(recording.by_token()[:, :, 0], expected)
        with balance.replay(recording.by_token(rows=ROWS)):
            assert torch.equal(model(hidden)[2], expert_ids)


def test_recomputations_are_not_recorded():
    model = nn.Sequential(Block(TopK()))
    balance = attach(model)
    hidden = _normal(ROWS, LENGTH, DIM, seed=1).requires_grad_()
    with balance.recording() as recording, balance.recording() as inner:
        torch.utils.checkpoint.checkpoint(lambda x: model(x)[1], hidden, use_reentrant=False).sum().backward()
    assert len(recording["0.router"]) == len(inner["0.router"]) == 1
    model(hidden)
    assert len(recording["0.router"]) == 1


def test_what_cannot_be_laid_out_is_refused():
    model = nn.Sequential(Block(TopK()))
    balance = attach(model)
    with balance.recording() as recording:
        pass
    with pytest.raises(ValueError, match="every layer must be called while routing is recorded: 0.router was not"):
        recording.by_layer()
    with balance.recording() as recording:
        model(_normal(ROWS * LENGTH, DIM))
    with pytest.raises(ValueError, match="rows must divide the 15 tokens of a call of 0.router: got rows=None"):
        recording.by_token()
    with pytest.raises(ValueError, match="rows must divide"):
        recording.by_token(rows=2)
    assert recording.by_token(rows=ROWS).shape == (ROWS, LENGTH, 1, K)
