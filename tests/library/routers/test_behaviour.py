"""What is proven of a router is what runs: on batch and sequence, with its k, with all that moves its choice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from equipoise import EquipoiseError, RouterKind, attach
from equipoise.routers import find
from equipoise.routers.find import find_routers

DIM, EXPERTS, K = 16, 8, 2


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class PlainRouter(nn.Module):
    """Keeps the shape of its input: [batch, sequence, dim] gives three dimensions."""

    def __init__(self, k=K):
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(_normal(EXPERTS, DIM))

    def logits(self, x):
        return F.linear(x, self.weight)

    def choose(self, logits):
        return logits.softmax(-1).topk(self.k, -1)

    def forward(self, x):
        logits = self.logits(x)
        weights, expert_ids = self.choose(logits)
        return logits, weights, expert_ids


class SlottedRouter(PlainRouter):
    def __init__(self):
        super().__init__()
        self.register_buffer("balance", torch.zeros(EXPERTS))

    def choose(self, logits):
        expert_ids = (logits.sigmoid() + self.balance).topk(K, -1).indices
        return logits.sigmoid().gather(-1, expert_ids), expert_ids


class DenseRouter(PlainRouter):
    def forward(self, x):
        logits = self.logits(x)
        weights, expert_ids = logits.topk(K, -1)
        return torch.zeros_like(logits).scatter(-1, expert_ids, weights.sigmoid()), logits


class SingleGroupRouter(PlainRouter):
    """Ranks the experts of its one group, as routers with n_group=1 do."""

    def choose(self, logits):
        flat = logits.softmax(-1).flatten(0, -2)
        group = flat.unflatten(-1, (1, EXPERTS)).topk(2, -1).values.sum(-1)
        weights, expert_ids = (flat + 0 * group).topk(K, -1)
        return weights.view(*logits.shape[:-1], K), expert_ids.view(*logits.shape[:-1], K)


class Block(nn.Module):
    def __init__(self, router, checkpointed=False):
        super().__init__()
        self.router, self.checkpointed = router, checkpointed

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)

    def inner(self, x):
        output = self.router(x)
        weights = output[0] if len(output) == 2 else output[1]
        return x * weights.sum(-1, keepdim=True)


RANKED = {  # what each ranks, from the logits
    PlainRouter: lambda logits: logits.softmax(-1),
    SlottedRouter: lambda logits: logits.sigmoid(),
    DenseRouter: lambda logits: logits,
    SingleGroupRouter: lambda logits: logits.softmax(-1),
}


# ---- batch and sequence ----


@pytest.mark.parametrize("shape", [(20,), (4, 5), (20, 1), (1, 20), (2, 2, 5)], ids=str)
@pytest.mark.parametrize("router", RANKED)
def test_a_router_is_steered_counted_and_balanced_whatever_the_dimensions_of_its_input(router, shape):
    model = nn.Sequential(Block(router()))
    bias = 0.5 * _normal(EXPERTS, seed=3)
    balance = attach(model, "frozen+lbl:coefficient=0.5", biases={"0.router": bias})
    x = _normal(*shape, DIM, seed=1)
    outputs = []
    model[0].router.register_forward_hook(lambda module, args, output: outputs.append(output))
    (0 * model(x).sum() + balance.loss()).backward()
    assert int(balance.num_tokens) == 20
    balance.step()

    weight = model[0].router.weight.detach().double().requires_grad_()
    logits = x.double().reshape(20, DIM) @ weight.T
    expected_ids = (RANKED[router](logits) + bias).topk(K).indices
    load = torch.bincount(expected_ids.flatten(), minlength=EXPERTS)
    assert torch.equal(balance.load["0.router"], load)
    scores = logits.softmax(-1) if balance.layers[0].kind.score_function == "softmax" else logits.sigmoid()
    share = load / load.sum()
    expected = 0.5 * EXPERTS * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    expected.backward()
    assert_close(model[0].router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    if router is DenseRouter:
        dense = torch.zeros(20, EXPERTS).double().scatter(-1, expected_ids, logits.sigmoid().gather(-1, expected_ids))
        assert outputs[0][0].shape == (*shape, EXPERTS)
        assert_close(outputs[0][0].reshape(20, EXPERTS).double(), dense, rtol=1e-5, atol=1e-6)
    else:
        assert outputs[0][1].shape == outputs[0][2].shape == (*shape, K)
        assert torch.equal(outputs[0][2].reshape(20, K).sort().values, expected_ids.sort().values)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_router_on_batch_and_sequence_is_steered(checkpointed):
    torch._dynamo.reset()
    model = nn.Sequential(Block(PlainRouter(), checkpointed))
    bias = 0.5 * _normal(EXPERTS, seed=3)
    balance = attach(model, "frozen+lbl", biases={"0.router": bias})
    x = _normal(4, 5, DIM, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (compiled(x).sum() + balance.loss()).backward()
    balance.step()
    logits = x.double().reshape(20, DIM) @ model[0].router.weight.detach().double().T
    expected = torch.bincount((logits.softmax(-1) + bias).topk(K).indices.flatten(), minlength=EXPERTS)
    assert torch.equal(balance.load["0.router"], expected)
    torch._dynamo.reset()


class ChangingRouter(PlainRouter):
    """Chooses by another function once it is asked to."""

    calls = 1

    def choose(self, logits):
        scores = logits.softmax(-1)
        if self.calls == 0:
            weights, expert_ids = scores.sort(-1, descending=True)
            return weights[..., :K], expert_ids[..., :K]
        for _ in range(self.calls):
            weights, expert_ids = scores.topk(K, -1)
        return weights, expert_ids


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("how", ["training", "eval", "compiled"])
def test_a_call_that_is_not_steered_once_is_an_error(how, calls):
    torch._dynamo.reset()
    model = nn.Sequential(Block(ChangingRouter()))
    attach(model, "loss-free")
    model.train(how != "eval")
    x = _normal(4, 5, DIM)
    model(x)
    model[0].router.calls = calls
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    with pytest.raises(EquipoiseError, match=f"one torch.topk.*ChangingRouter took {calls}.*detach"):
        run(x)
    torch._dynamo.reset()


class FlatRouter(PlainRouter):
    """Its softmax is over experts only if tokens are flat."""

    def choose(self, logits):
        return logits.softmax(1).topk(K, -1)


def test_a_router_that_chooses_otherwise_on_batch_and_sequence_is_held_to_tokens():
    model = nn.Sequential(Block(FlatRouter()))
    balance = attach(model, "loss-free")
    model(_normal(20, DIM))
    balance.step()
    assert balance.load["0.router"].sum() == 40
    with pytest.raises(
        EquipoiseError, match=r"FlatRouter must be called with \[tokens, dim\]: got the shape \(4, 5, 16"
    ):
        model(_normal(4, 5, DIM))
    with pytest.raises(EquipoiseError, match="must be called with"):
        model[0].router(x=_normal(4, 5, DIM))


def test_a_router_may_take_batch_and_sequence_only():
    class SequenceRouter(PlainRouter):
        def logits(self, x):
            batch, length, dim = x.shape
            return F.linear(x, self.weight)

    balance = attach(model := nn.Sequential(Block(SequenceRouter())), "loss-free")
    model(_normal(4, 5, DIM))
    balance.step()
    assert balance.load["0.router"].sum() == 40


# ---- what the choice depends on beside the logits ----


class BiasedRouter(PlainRouter):
    """Adds a term of any name and place to its scores."""

    def __init__(self, name, tensor, holder=None):
        super().__init__()
        self.path = name if holder is None else f"{holder}.{name}"
        if holder is not None:
            setattr(self, holder, nn.Module())
        where = self if holder is None else getattr(self, holder)
        if isinstance(tensor, nn.Parameter):
            where.register_parameter(name, tensor)
        else:
            where.register_buffer(name, tensor)

    def term(self):
        *holder, name = self.path.split(".")
        return getattr(self.get_submodule(".".join(holder)), name)

    def choose(self, logits):
        scores = logits.sigmoid()
        expert_ids = (scores + self.term().view(-1)).topk(K, -1).indices
        weights = scores.gather(-1, expert_ids)
        return weights / weights.sum(-1, keepdim=True), expert_ids


SLOTS = {
    "buffer": ("balance", torch.zeros(EXPERTS), None),
    "called bias": ("bias", torch.zeros(EXPERTS), None),
    "row": ("correction", torch.zeros(1, EXPERTS), None),
    "frozen parameter": ("offset", nn.Parameter(torch.zeros(EXPERTS), requires_grad=False), None),
    "parameter": ("shift", nn.Parameter(torch.zeros(EXPERTS)), None),
    "inside": ("moving", torch.zeros(EXPERTS), "statics"),
    "not zero": ("priority", torch.linspace(-0.3, 0.3, EXPERTS), None),
}


@pytest.mark.parametrize("slot", SLOTS)
def test_a_slot_is_found_by_what_it_does_and_not_by_its_name(slot):
    name, tensor, holder = SLOTS[slot]
    model = nn.Sequential(Block(BiasedRouter(name, tensor.clone(), holder)))
    (layer,) = find_routers(model)
    assert layer.kind == RouterKind("sigmoid", name if holder is None else f"{holder}.{name}")
    balance = attach(model, "loss-free:rate=0.1,rule=sign")
    assert torch.equal(balance.biases["0.router"], tensor.detach().view(-1))
    x = _normal(4, 5, DIM, seed=1)
    for _ in range(2):
        bias = balance.biases["0.router"]
        with torch.no_grad(), balance.counting():
            model(x)
        logits = x.double().reshape(20, DIM) @ model[0].router.weight.detach().double().T
        expected = torch.bincount((logits.sigmoid() + bias).topk(K).indices.flatten(), minlength=EXPERTS)
        balance.step()
        assert torch.equal(balance.load["0.router"], expected)
    (saved,) = [value for key, value in model.state_dict().items() if key.endswith(name)]
    assert torch.equal(saved.view(-1), balance.biases["0.router"]) and not torch.equal(saved.view(-1), tensor.view(-1))


@pytest.mark.parametrize("num_experts", [2, 3, 64])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_slot_is_found_for_few_experts_and_for_many(num_experts, k):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(_normal(num_experts, DIM))
            self.register_buffer("moving", torch.zeros(num_experts))

        def forward(self, x):
            scores = F.linear(x, self.weight).sigmoid()
            expert_ids = (scores + self.moving).topk(min(k, num_experts), -1).indices
            return scores.logit(), scores.gather(-1, expert_ids), expert_ids

    (layer,) = find_routers(nn.Sequential(Block(Sized())))
    assert layer.kind == RouterKind("sigmoid", "moving")
    assert (layer.num_experts, layer.k) == (num_experts, min(k, num_experts))


def test_a_slot_that_the_block_passes_on_may_have_any_name():
    class PassedRouter(PlainRouter):
        def forward(self, x, moving):
            logits = self.logits(x)
            expert_ids = (logits.sigmoid() + moving).topk(K, -1).indices
            return logits, logits.sigmoid().gather(-1, expert_ids), expert_ids

    class PassingBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = PassedRouter()
            self.register_buffer("moving", torch.zeros(EXPERTS))

        def forward(self, x):
            return x * self.router(x, self.moving)[1].sum(-1, keepdim=True)

    model = nn.Sequential(PassingBlock())
    balance = attach(model, "loss-free:rate=0.1,rule=sign")
    assert balance.layers[0].kind == RouterKind("sigmoid", "moving")
    model(_normal(4, 5, DIM))
    balance.step()
    assert model[0].moving.any() and torch.equal(model[0].moving, balance.biases["0.router"])


class LinearRouter(PlainRouter):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS)

    def logits(self, x):
        return self.gate(x) + 0 * F.linear(x, self.weight)


class NormedRouter(PlainRouter):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(EXPERTS)

    def logits(self, x):
        return self.norm(F.linear(x, self.weight))


class ScaledRouter(PlainRouter):
    """A scale for each expert on the weights, as Gemma 4 has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(EXPERTS))

    def choose(self, logits):
        weights, expert_ids = super().choose(logits)
        return weights * self.scale[expert_ids], expert_ids


class WatchingRouter(PlainRouter):
    """Keeps a load that it does not choose by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS))

    def choose(self, logits):
        weights, expert_ids = super().choose(logits)
        self.load += torch.bincount(expert_ids.flatten(), minlength=EXPERTS)
        return weights, expert_ids


@pytest.mark.parametrize("router", [LinearRouter, NormedRouter, ScaledRouter, WatchingRouter])
def test_a_tensor_with_a_number_for_each_expert_that_does_not_choose_is_no_slot(router):
    (layer,) = find_routers(nn.Sequential(Block(router())))
    assert layer.kind == RouterKind("softmax") and layer.obstacle is None


class ModalRouter(PlainRouter):
    """A bias for each modality."""

    def __init__(self):
        super().__init__()
        self.register_buffer("text", torch.zeros(EXPERTS))
        self.register_buffer("image", torch.zeros(EXPERTS))

    def choose(self, logits):
        is_image = (torch.arange(logits.shape[-2]) % 2).bool()[:, None]
        expert_ids = (logits.sigmoid() + torch.where(is_image, self.image, self.text)).topk(K, -1).indices
        return logits.sigmoid().gather(-1, expert_ids), expert_ids


class StackedRouter(PlainRouter):
    def __init__(self):
        super().__init__()
        self.register_buffer("modalities", torch.zeros(2, EXPERTS))

    def choose(self, logits):
        expert_ids = (logits.sigmoid() + self.modalities[1]).topk(K, -1).indices
        return logits.sigmoid().gather(-1, expert_ids), expert_ids


class MaskedRouter(PlainRouter):
    def __init__(self):
        super().__init__()
        self.register_buffer("is_dead", torch.zeros(EXPERTS, dtype=torch.bool))

    def choose(self, logits):
        return logits.softmax(-1).masked_fill(self.is_dead, 0).topk(K, -1)


class UnregisteredRouter(PlainRouter):
    def __init__(self):
        super().__init__()
        self.moving = torch.zeros(EXPERTS)

    def choose(self, logits):
        expert_ids = (logits.sigmoid() + self.moving).topk(K, -1).indices
        return logits.sigmoid().gather(-1, expert_ids), expert_ids


class TrainedRouter(PlainRouter):
    """Its term reaches the weights, and is trained by them."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(EXPERTS))

    def choose(self, logits):
        return (logits.sigmoid() + self.prior).topk(K, -1)


class ProductRouter(PlainRouter):
    """Its term acts only where another is not zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("bias_strength", torch.zeros(EXPERTS))

    def choose(self, logits):
        expert_ids = (logits.sigmoid() + self.bias * self.bias_strength).topk(K, -1).indices
        return logits.sigmoid().gather(-1, expert_ids), expert_ids


class TwiceRouter(PlainRouter):
    """Its term is in the logits, and is added to the scores again."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(EXPERTS))

    def logits(self, x):
        return super().logits(x) + self.bias

    def choose(self, logits):
        expert_ids = (logits.sigmoid() + self.bias).topk(K, -1).indices
        return logits.sigmoid().gather(-1, expert_ids), expert_ids


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (ModalRouter, "its choice depends on text and image beside its logits"),
        (StackedRouter, "its choice depends on modalities beside its logits"),
        (MaskedRouter, "its choice depends on is_dead beside its logits"),
        (UnregisteredRouter, "its choice depends on moving beside its logits"),
        (ProductRouter, "its choice depends on bias and bias_strength beside its logits"),
        (TwiceRouter, "the experts that it chooses are not the best by its sigmoid scores"),
        (TrainedRouter, "prior is no slot that steers it: a bias on its choice changes the weights of the same choice"),
    ],
)
@pytest.mark.parametrize("strategy", ["loss-free", "lbl"])
def test_a_choice_by_what_cannot_be_a_slot_is_refused_and_the_tensor_named(router, reason, strategy):
    with pytest.raises(EquipoiseError, match=rf"0.router \({router.__name__}\) cannot be: {reason}"):
        attach(nn.Sequential(Block(router())), strategy)


def test_a_declared_router_must_not_choose_by_another_tensor():
    class Undeclared(SlottedRouter):
        router_kind = RouterKind("sigmoid")

    class Misdeclared(BiasedRouter):
        router_kind = RouterKind("sigmoid", "absent")

    with pytest.raises(EquipoiseError, match="Undeclared.*its choice depends on balance beside its logits"):
        attach(nn.Sequential(Block(Undeclared())))
    with pytest.raises(EquipoiseError, match="its slot absent is no buffer or parameter.*Correct the slot"):
        attach(nn.Sequential(Block(Misdeclared("bias", torch.zeros(EXPERTS)))))


# ---- candidates ----


class Chooser9(PlainRouter):
    pass


class Selection(nn.Module):
    """Its gate is a module inside."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x):
        logits = self.project(x)
        weights, expert_ids = logits.sigmoid().topk(K, -1)
        return logits, weights, expert_ids


class Spread(DenseRouter):
    pass


@pytest.mark.parametrize(
    ("chooser", "kind"),
    [
        (Chooser9, RouterKind("softmax")),
        (Selection, RouterKind("sigmoid")),
        (Spread, RouterKind("sigmoid", None, "logits", "dense")),
    ],
)
def test_a_router_is_known_whatever_its_class_is_called(chooser, kind):
    balance = attach(model := nn.Sequential(Block(chooser())), "loss-free:rate=0.1,rule=sign")
    assert [layer.kind for layer in balance.layers] == [kind]
    model(_normal(4, 5, DIM))
    balance.step()
    assert balance.load["0.router"].sum() == 40 and balance.biases["0.router"].any()


def test_of_a_chooser_and_the_gate_inside_it_the_one_that_chooses_is_attached():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = PlainRouter()
            self.register_buffer("moving", torch.zeros(EXPERTS))

        def forward(self, x):
            logits = self.gate(x)[0]
            expert_ids = (logits.sigmoid() + self.moving).topk(K, -1).indices
            return logits, logits.sigmoid().gather(-1, expert_ids), expert_ids

    (layer,) = find_routers(nn.Sequential(Block(Choosing())))
    assert (layer.name, layer.kind.slot) == ("0.router", "moving")


class Expert(nn.Module):
    """A class that no other test uses."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Pair(nn.Module):
    """Two outputs of one shape, which are no scores and logits."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, 2 * DIM)

    def forward(self, x):
        return self.linear(x).chunk(2, -1)


def test_other_modules_are_neither_attached_nor_named_nor_run(caplog, monkeypatch):
    looked_at = []
    form = find.returned_form
    monkeypatch.setattr(find, "returned_form", lambda module: looked_at.append(type(module).__name__) or form(module))
    experts = nn.ModuleList(Expert() for _ in range(20))
    called = []
    for expert in experts:
        expert.up.register_forward_pre_hook(lambda module, args: called.append(module))
    block = nn.ModuleDict({"router": Chooser9(), "experts": experts, "pair": Pair()})
    attach(nn.ModuleDict({"0": block}))
    assert called == [], "a hook of the model ran"
    assert looked_at.count("Expert") == looked_at.count("Pair") == 1, "one look for all that are alike"
    assert not caplog.records


# ---- with the k that it has ----


class MaxRouter(PlainRouter):
    """Takes the maximum where k is 1."""

    def __init__(self, k):
        super().__init__()
        self.top_k = k

    def choose(self, logits):
        scores = logits.softmax(-1)
        if self.top_k == 1:
            return scores.max(-1, keepdim=True)
        return scores.topk(self.top_k, -1)

    def logits(self, x):
        logits = super().logits(x)
        return logits - logits.max(-1, keepdim=True).values if self.top_k > 1 else logits


class ArgmaxRouter(MaxRouter):
    def choose(self, logits):
        scores = logits.softmax(-1)
        expert_ids = torch.argmax(scores, dim=-1, keepdim=True)
        return scores.gather(-1, expert_ids), expert_ids


class MaxWithoutDimension(MaxRouter):
    def choose(self, logits):
        weights, expert_ids = torch.max(logits.softmax(-1), dim=-1)
        return weights.unsqueeze(-1), expert_ids.unsqueeze(-1)


@pytest.mark.parametrize("router", [MaxRouter, ArgmaxRouter, MaxWithoutDimension])
def test_a_router_that_takes_a_maximum_where_k_is_1_is_steered(router):
    bias = 0.5 * _normal(EXPERTS, seed=3)
    model = nn.Sequential(Block(router(1)))
    balance = attach(model, "frozen+lbl", biases={"0.router": bias})
    assert balance.layers[0].k == 1 and balance.layers[0].chooses_by_max
    x = _normal(4, 5, DIM)
    (model(x).sum() + balance.loss()).backward()
    balance.step()
    scores = (x.reshape(20, DIM) @ model[0].router.weight.T).softmax(-1)
    expected = torch.bincount((scores + bias).argmax(-1), minlength=EXPERTS)
    assert torch.equal(balance.load["0.router"], expected)
    assert not torch.equal(expected, torch.bincount(scores.argmax(-1), minlength=EXPERTS))
    logits, weights, expert_ids = copy.deepcopy(model[0].router)(x.reshape(20, DIM))  # a copy is steered as well
    assert torch.equal(expert_ids[:, 0], (scores + bias).argmax(-1))
    assert_close(weights, scores.gather(-1, expert_ids))  # the weights are the plain scores


def test_a_maximum_beside_a_top_k_is_no_choice():
    balance = attach(nn.Sequential(Block(MaxRouter(2))), "loss-free")
    assert not balance.layers[0].chooses_by_max


class TwoMaxima(MaxRouter):
    def choose(self, logits):
        scores = (logits - logits.max(-1, keepdim=True).values).softmax(-1)
        return scores.max(-1, keepdim=True)


def test_a_router_with_two_maxima_cannot_be_steered():
    with pytest.raises(EquipoiseError, match=r"TwoMaxima\) cannot be steered: it chooses without torch.topk.*lbl"):
        attach(nn.Sequential(Block(TwoMaxima(1))), "loss-free")


class TopOneRouter(PlainRouter):
    """Its one weight is 1, so only the choice shows the score function."""

    def __init__(self, score, by_logits=False):
        super().__init__(k=1)
        self.score, self.by_logits = score, by_logits

    def choose(self, logits):
        ranked = logits if self.by_logits else self.score(logits)
        weights, expert_ids = ranked.topk(1, -1)
        return torch.ones_like(weights), expert_ids


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_with_a_constant_weight_the_choice_under_a_bias_shows_the_score_function(name):
    router = TopOneRouter({"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}[name])
    (layer,) = find_routers(nn.Sequential(Block(router)))
    assert layer.kind == RouterKind(name) and layer.k == 1


def test_a_score_function_that_nothing_shows_must_be_declared():
    class Declared(TopOneRouter):
        router_kind = RouterKind("sigmoid", selection="logits")

    reason = "its one weight per token is constant, so its score function may be softmax or sigmoid or sqrt_softplus"
    with pytest.raises(EquipoiseError, match=f"{reason}.*router_kind = equipoise.RouterKind"):
        attach(nn.Sequential(Block(TopOneRouter(torch.sigmoid, by_logits=True))))
    attach(nn.Sequential(Block(Declared(torch.sigmoid, by_logits=True))), "loss-free")


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_with_k_1_the_weights_show_the_score_function(name):
    class ScoreRouter(TopOneRouter):
        def choose(self, logits):
            return self.score(logits).topk(1, -1)

    router = ScoreRouter({"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}[name])
    (layer,) = find_routers(nn.Sequential(Block(router)))
    assert layer.kind == RouterKind(name)
