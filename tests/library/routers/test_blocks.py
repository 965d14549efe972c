"""Blocks that route by themselves: observed and steered at their gate and their one top-k, or refused by name."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from equipoise import EquipoiseError, RouterAdapter, attach
from equipoise.routers import stand_in
from equipoise.routers.blocks import BlockAdapter

DIM, EXPERTS, K = 16, 8, 2


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class AfterTopK(nn.Module):
    """Softmax after a top-k of the logits, as in litgpt and in re-implementations of Mixtral."""

    k = K

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.gate.weight.data = _normal(EXPERTS, DIM)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(DIM, 8), nn.SiLU(), nn.Linear(8, DIM)) for _ in range(8))

    def choose(self, logits):
        values, expert_ids = torch.topk(logits, self.k)
        return values.softmax(-1, dtype=torch.float), expert_ids

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, DIM)
        return self.mix(x, *self.choose(self.gate(x))).view(shape)

    def mix(self, x, weights, expert_ids):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(expert_ids == number)
            y[token] += weights[token, choice, None] * expert(x[token])
        return y


class BeforeTopK(AfterTopK):
    """Softmax, then the top-k, then a sum of 1, as in minimind; returns an auxiliary value too; shared experts."""

    def __init__(self):
        super().__init__()
        self.shared_expert = nn.Sequential(nn.Linear(DIM, 512), nn.SiLU(), nn.Linear(512, DIM))

    def choose(self, logits):
        weights, expert_ids = logits.softmax(-1).topk(self.k, dim=-1, sorted=False)
        return weights / weights.sum(-1, keepdim=True), expert_ids

    def forward(self, x):
        return super().forward(x) + self.shared_expert(x), torch.zeros(())


class Sigmoid(AfterTopK):
    """Keeps batch and sequence; experts in a loop over the choices."""

    def choose(self, logits):
        return logits.sigmoid().topk(self.k, dim=-1)

    def forward(self, x):
        weights, expert_ids = self.choose(self.gate(x))
        y = torch.zeros_like(x)
        for choice in range(self.k):
            for number, expert in enumerate(self.experts):
                is_chosen = expert_ids[..., choice] == number
                y = y + (weights[..., choice] * is_chosen)[..., None] * expert(x)
        return x + y


class Switch(AfterTopK):
    """One expert by a maximum, as in Switch Transformers; the gate has another name, and there is another one."""

    k = 1

    def __init__(self):
        super().__init__()
        self.switch = self.gate
        del self.gate
        self.shared_gate = nn.Linear(DIM, EXPERTS)

    def choose(self, logits):
        weights, expert_ids = torch.max(logits.softmax(-1), dim=-1)
        return weights[:, None], expert_ids[:, None]

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, DIM)
        return self.mix(x, *self.choose(self.switch(x))).view(shape)


BLOCKS = {  # what each ranks, and its scores
    AfterTopK: (lambda logits: logits, lambda logits: logits.softmax(-1)),
    BeforeTopK: (lambda logits: logits.softmax(-1), lambda logits: logits.softmax(-1)),
    Sigmoid: (lambda logits: logits.sigmoid(), lambda logits: logits.sigmoid()),
    Switch: (lambda logits: logits.softmax(-1), lambda logits: logits.softmax(-1)),
}


class Model(nn.Module):
    def __init__(self, block, is_checkpointed=False):
        super().__init__()
        self.embedding, self.block, self.is_checkpointed = nn.Embedding(32, DIM), block, is_checkpointed
        self.embedding.weight.data = _normal(32, DIM, seed=2)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        output = checkpoint(self.block, hidden, use_reentrant=False) if self.is_checkpointed else self.block(hidden)
        return output[0] if isinstance(output, tuple) else output


IDS = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(5))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def _gate(block):
    return block.switch if isinstance(block, Switch) else block.gate


def _expected(model, bias, mask=None):
    """Load and gradient of 0.5 E sum f P at the gate, in float64, expert by expert."""
    block = model.block
    weight = _gate(block).weight.detach().double().requires_grad_()
    keep = slice(None) if mask is None else mask.flatten().bool()
    logits = (model.embedding(IDS).detach().double().reshape(-1, DIM) @ weight.T)[keep]
    rank, score = next(BLOCKS[cls] for cls in type(block).__mro__ if cls in BLOCKS)
    chosen = (rank(logits) + bias).topk(block.k).indices
    load = torch.tensor([int((chosen == expert).sum()) for expert in range(EXPERTS)])
    scores = score(logits)
    (0.5 * EXPERTS * (load / load.sum() * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()).backward()
    return load, weight.grad


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("block", BLOCKS)
def test_counts_bias_and_gradient_are_exact(block, masked, checkpointed):
    model = Model(block(), checkpointed)
    bias = 0.2 * _normal(EXPERTS, seed=3)
    balance = attach(model, "frozen+lbl:coefficient=0.5", biases={"block": bias})
    mask = MASK if masked else None
    (0 * model(IDS, mask).sum() + balance.loss()).backward()
    balance.step()
    load, gradient = _expected(model, bias, mask)
    assert torch.equal(balance.load["block"], load)
    assert_close(_gate(model.block).weight.grad.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_loss_free_moves_the_bias_by_the_load(block):
    model = Model(block())
    balance = attach(model, "loss-free:rate=0.125,rule=sign,center=false")
    expected = torch.zeros(EXPERTS)
    for _ in range(3):
        model(IDS)
        balance.step()
        load, _ = _expected(model, expected)
        assert torch.equal(balance.load["block"], load)
        expected = expected + 0.125 * torch.sign(load.sum() / EXPERTS - load)
        assert torch.equal(balance.biases["block"], expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_bias_nothing_changes(block):
    plain = Model(block())
    attached = copy.deepcopy(plain)
    attach(attached, "loss-free")
    outputs = plain(IDS), attached(IDS)
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(plain.parameters(), attached.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_bias_changes_the_experts_that_compute(block):
    """With a large bias on one expert, every token gets its output."""
    model = Model(block())
    bias = torch.zeros(EXPERTS)
    bias[3] = 100.0
    attach(model, "frozen", biases={"block": bias})
    seen = []
    model.block.experts[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // DIM))
    model(IDS)
    assert seen[0] == 15


def test_copies_are_steered_and_not_counted():
    model = Model(AfterTopK())
    balance = attach(model, "frozen+lbl", biases={"block": 0.2 * _normal(EXPERTS, seed=3)})
    expected = model(IDS)
    balance.loss()
    balance.step()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), expected)
    with pytest.raises(EquipoiseError, match="none was"):
        balance.step()


def test_detach_leaves_nothing():
    model = Model(AfterTopK())
    names = set(vars(model.block))
    balance = attach(model, "loss-free+lbl")
    model(IDS)
    balance.detach()
    assert type(model.block) is AfterTopK
    assert set(vars(model.block)) - names <= {"_equipoise_logits"}
    assert not model.block.gate._forward_hooks


def test_a_compiled_block_is_counted():
    torch.compiler.reset()
    model = Model(Sigmoid())
    bias = 0.2 * _normal(EXPERTS, seed=3)
    balance = attach(model, "frozen+lbl:coefficient=0.5", biases={"block": bias})
    model.block.compile(fullgraph=True, backend="aot_eager")
    (0 * model(IDS).sum() + balance.loss()).backward()
    balance.step()
    load, gradient = _expected(model, bias)
    assert torch.equal(balance.load["block"], load)
    assert_close(model.block.gate.weight.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_what_is_known_of_a_block():
    balance = attach(Model(BeforeTopK()))
    (layer,) = balance.layers
    assert layer.kind.gives == BlockAdapter("gate", "experts")
    assert (layer.name, layer.num_experts, layer.k, layer.kind.selection) == ("block", EXPERTS, K, "scores")


def test_the_proof_makes_no_stand_in_of_an_expert(monkeypatch):
    """Experts may be large: the stand-in has none of them, and no large module beside them."""
    shapes, make = set(), stand_in.stand_in_tensor
    monkeypatch.setattr(
        stand_in, "stand_in_tensor", lambda name, value, random: shapes.add(value.shape) or make(name, value, random)
    )
    block = BeforeTopK()
    block.register_buffer("unique", torch.zeros(7))  # no proof of an equal block serves this one
    attach(Model(block))
    assert shapes == {(EXPERTS, DIM), (7,)}


# ---- refusals ----


class Noisy(AfterTopK):
    def choose(self, logits):
        return super().choose(logits + torch.randn_like(logits))


class Capacity(AfterTopK):
    def mix(self, x, weights, expert_ids):
        is_first = torch.arange(len(x))[:, None] < 20
        return super().mix(x, weights * is_first, expert_ids)


class OtherExperts(AfterTopK):
    def mix(self, x, weights, expert_ids):
        return super().mix(x, weights, (expert_ids + 1) % EXPERTS)


class Constant(AfterTopK):
    """Softmax over one logit: its weight is 1."""

    k = 1


class Gathered(AfterTopK):
    """Its weights do not come from the values of its top-k."""

    def choose(self, logits):
        scores = logits.softmax(-1)
        expert_ids = scores.topk(K).indices
        return scores.gather(-1, expert_ids), expert_ids


class TwoTopK(AfterTopK):
    def choose(self, logits):
        logits.topk(3)
        return super().choose(logits)


class Sorted(AfterTopK):
    def choose(self, logits):
        values, expert_ids = logits.softmax(-1).sort(descending=True)
        return values[:, :K], expert_ids[:, :K]


class Squared(AfterTopK):
    def choose(self, logits):
        values, expert_ids = logits.softmax(-1).topk(K)
        return values**2, expert_ids


class WithTaskId(AfterTopK):
    def forward(self, x, task):
        return super().forward(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Noisy, "it gives another result each time that it runs"),
        (Capacity, "tokens above a capacity may be dropped"),
        (OtherExperts, "its output is not the sum over the experts of its top-k"),
        (Constant, "its one weight per token is constant"),
        (Gathered, "the weights of its experts are not the values of its top-k"),
        (TwoTopK, "it takes 2 top-k over its 8 experts, and must take one"),
        (Sorted, "it takes 0 top-k over its 8 experts, and must take one"),
        (Squared, "its weights are in proportion to none of softmax, sigmoid, sqrt_softplus of its logits"),
        (WithTaskId, "its forward needs task beside the tokens"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(block, reason):
    with pytest.raises(EquipoiseError, match=reason) as refusal:
        attach(Model(block()) if block is not WithTaskId else nn.Sequential(block()), "loss-free")
    if block in (TwoTopK, Sorted, Squared, Gathered, WithTaskId, OtherExperts):
        text = str(refusal.value)
        assert block is OtherExperts or "self.router = equipoise.nn.Router(dim, num_experts, k" in text


def test_a_block_that_stops_taking_its_top_k_is_an_error():
    model = Model(AfterTopK())
    attach(model)
    model.block.choose = lambda logits: Sorted.choose(model.block, logits)
    with pytest.raises(EquipoiseError, match=r"must choose by one top-k.*AfterTopK took 0"):
        model(IDS)


# ---- routers of small public models that are modules of their own, and cannot be right ----


class NoisyTopkRouter(nn.Module):
    """As in makeMoE: dense weights and ids, noise before the top-k in any mode."""

    def __init__(self):
        super().__init__()
        self.linear, self.noise = nn.Linear(DIM, EXPERTS), nn.Linear(DIM, EXPERTS)

    def forward(self, x):
        logits = self.linear(x)
        logits = logits + torch.randn_like(logits) * nn.functional.softplus(self.noise(x))
        values, expert_ids = logits.topk(K, dim=-1)
        dense = torch.full_like(logits, float("-inf")).scatter(-1, expert_ids, values).softmax(-1)
        return dense, expert_ids


class DenseAndIds(RouterAdapter):
    logits_returned_by = "linear"

    def read(self, output, logits, k):
        return logits, output[0].gather(-1, output[1]), output[1]

    def write(self, output, weights, expert_ids):
        dense = torch.zeros_like(output[0]).reshape(-1, EXPERTS).scatter(-1, expert_ids, weights)
        return dense.view(output[0].shape), output[1]


class CapacityRouter(nn.Module):
    """As in nanoMoE: places within the capacity of an expert in place of weights and ids."""

    def __init__(self):
        super().__init__()
        self.w_g = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x):
        weights = self.w_g(x.reshape(-1, DIM)).softmax(-1)
        is_used = nn.functional.one_hot(weights.topk(K).indices, EXPERTS).sum(1)
        place = is_used.cumsum(0) * is_used
        return place.sum(0), weights[..., None] * nn.functional.one_hot(place.clamp(max=9), 10), is_used


def test_a_router_with_noise_is_refused_also_with_an_adapter():
    with pytest.raises(EquipoiseError, match=r"NoisyTopkRouter.* does not return .* but 2 outputs"):
        attach(nn.Sequential(NoisyTopkRouter()))
    router = NoisyTopkRouter()
    router.router_adapter = DenseAndIds()
    with pytest.raises(EquipoiseError, match="it gives another result each time that it runs in training"):
        attach(nn.Sequential(router))


def test_a_router_that_gives_places_in_a_capacity_is_refused():
    with pytest.raises(EquipoiseError, match=r"CapacityRouter.* does not return .* but 3 outputs"):
        attach(nn.Sequential(CapacityRouter()))


class Classifier(nn.Module):
    """As many labels as layers: no block of experts."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4)), nn.Linear(DIM, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_head_with_as_many_outputs_as_layers_is_no_block(caplog):
    attach(nn.ModuleDict({"moe": AfterTopK(), "classifier": Classifier()}))
    assert not caplog.records
    with pytest.raises(EquipoiseError, match="Classifier holds none, and nothing that is called a mixture of experts"):
        attach(Classifier())
