"""What is known of DeepSpeed without DeepSpeed; tests/frameworks/test_deepspeed.py runs its engines."""

import pytest
import torch
from plain_model import BOTH, PlainNet, batches
from torch import nn

import equipoise
from equipoise import EquipoiseError, UsageError
from equipoise.integrations.deepspeed import follow_engine

BIASES = "loss-free:rate=0.01,rule=sign"


class Engine(nn.Module):
    """Accumulates as an engine of DeepSpeed does: it counts on within ``step``."""

    zenflow = False
    torch_autocast_z0_gradscaler = None

    def __init__(self, module, accumulated=2, managed=True):
        super().__init__()
        self.module, self.accumulated, self.managed = module, accumulated, managed
        self.micro_steps, self.overflows, self.applied = 0, False, False

    def forward(self, **batch):
        return self.module(**batch)

    def gradient_accumulation_steps(self):
        return self.accumulated

    def managed_gradient_accumulation(self):
        return self.managed

    def is_gradient_accumulation_boundary(self):
        return self.managed and (self.micro_steps + 1) % self.accumulated == 0

    def was_step_applied(self):
        return self.applied

    def backward(self, loss, scale_wrt_gas=True):
        (loss / self.accumulated).backward()
        return loss

    def step(self):
        is_boundary = self.is_gradient_accumulation_boundary() or not self.managed
        self.applied = is_boundary and not self.overflows
        self.micro_steps += 1
        return "stepped"


def run(engine, balance, data):
    """The number of closed windows after each step."""
    closed = []
    for batch in data:
        engine.backward(engine(**batch) + balance.loss())
        engine.step()
        closed.append(balance.num_windows)
    return closed


def start(strategy=BOTH, **options):
    net = PlainNet()
    balance, engine = equipoise.attach(net, strategy), Engine(net, **options)
    return engine, balance, follow_engine(balance, engine)


def test_a_window_closes_with_the_step_that_ends_an_accumulation():
    engine, balance, _ = start(accumulated=3)
    assert run(engine, balance, batches(7)) == [0, 0, 1, 1, 1, 2, 2]
    assert balance.biases["blocks.0.gate"].any()
    assert engine.backward(engine(**batches(1)[0]) + balance.loss()).dim() == 0 and engine.step() == "stepped"


def test_without_managed_accumulation_every_step_ends_one():
    engine, balance, _ = start(managed=False)
    assert run(engine, balance, batches(3)) == [1, 2, 3]


def test_a_step_that_overflows_moves_nothing():
    engine, balance, _ = start()
    engine.overflows = True
    assert run(engine, balance, batches(2)) == [0, 1]
    assert not balance.biases["blocks.0.gate"].any()


@pytest.mark.parametrize(("scales", "moves"), [((8.0, 4.0), False), ((8.0, 8.0), True), ((8.0, 16.0), True)])
def test_a_step_that_a_scaler_skipped_moves_nothing_though_the_engine_says_it_was_applied(scales, moves):
    engine, balance, _ = start(accumulated=1)
    values = iter(scales)

    class Scaler:
        def get_scale(self):
            return next(values)

    engine.torch_autocast_z0_gradscaler = Scaler()
    run(engine, balance, batches(1))
    assert engine.was_step_applied() and balance.biases["blocks.0.gate"].any() == moves


def test_a_backward_that_is_not_the_engines_is_refused_where_its_factor_would_be_another():
    engine, balance, _ = start()
    for batch in batches(1):
        (engine(**batch) + balance.loss()).backward()
    with pytest.raises(EquipoiseError, match=r"engine.backward\(loss\) must make the backward.*steps = 2"):
        engine.step()


@pytest.mark.parametrize(("strategy", "accumulated"), [(BIASES, 2), (BOTH, 1)])
def test_torchs_backward_is_right_without_a_loss_and_without_accumulation(strategy, accumulated):
    engine, balance, _ = start(strategy, accumulated=accumulated)
    for batch in batches(2):
        (engine(**batch) + balance.loss()).backward()
        engine.step()
    assert balance.num_windows == 2 // accumulated


class Own(equipoise.Balancer):
    name = "own"


def test_torchs_backward_is_right_with_a_balancer_of_ones_own_that_has_no_loss():
    net = PlainNet()
    balance, engine = equipoise.attach(net, Own()), Engine(net)
    follow_engine(balance, engine)
    for batch in batches(2):
        engine(**batch).backward()
        engine.step()
    assert balance.num_windows == 1 and not balance.has_loss


def test_remove_leaves_the_engine_as_it_was():
    engine, balance, following = start(accumulated=1)
    following.remove()
    run(engine, balance, batches(1))
    assert balance.num_windows == 0 and not {"step", "backward"} & vars(engine).keys()
    follow_engine(balance, engine)


def test_remove_leaves_a_wrapper_of_the_users_and_refuses_one_that_came_later():
    engine = Engine(PlainNet(), accumulated=1)
    step = engine.step
    engine.step = timed = lambda: step()
    following = follow_engine(equipoise.attach(engine.module, BIASES), engine)
    ours, engine.step = engine.step, lambda: step()
    with pytest.raises(UsageError, match=r"engine.step must be that of follow_engine .* Remove that first"):
        following.remove()
    engine.step = ours
    following.remove()
    following.remove()
    assert engine.step is timed and "backward" not in vars(engine)


def test_an_engine_is_followed_once():
    engine, balance, _ = start()
    with pytest.raises(UsageError, match="must be called once for an engine"):
        follow_engine(balance, engine)


def test_engines_that_step_otherwise_and_what_is_no_engine_are_refused():
    net = PlainNet()
    balance = equipoise.attach(net, BIASES)

    class PipelineEngine(Engine):
        pass

    with pytest.raises(UsageError, match="a PipelineEngine runs them in train_batch"):
        follow_engine(balance, PipelineEngine(net))
    engine = Engine(net)
    engine.zenflow = True
    with pytest.raises(UsageError, match="ZenFlow applies parts of it later"):
        follow_engine(balance, engine)
    with pytest.raises(TypeError, match="got PlainNet"):
        follow_engine(balance, net)


def test_follow_refuses_its_optimizers_and_names_the_line_to_write():
    net = PlainNet()
    balance = equipoise.attach(net, BIASES)

    class DeepSpeedZeroOptimizer:
        optimizer = torch.optim.SGD(net.parameters())

    DeepSpeedZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
    with pytest.raises(TypeError, match=r"deepspeed.follow_engine\(balance, engine\)"):
        balance.follow(DeepSpeedZeroOptimizer())


# ---- weights that ZeRO-3 has cut in parts ----


def partition(net):
    """What ZeRO-3 leaves of the parameters between two forwards."""
    for parameter in net.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    return net


def test_routers_are_known_by_the_whole_shapes_of_their_weights():
    expected = equipoise.attach(PlainNet(), BIASES).layers
    layers = equipoise.attach(partition(PlainNet()), BIASES).layers
    assert repr(layers) == repr(expected) and [layer.num_experts for layer in layers] == [6, 6]


class RoutesItself(nn.Module):
    """A block that holds a gate and experts, and chooses by itself."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        weights, expert_ids = self.gate(x).softmax(-1).topk(2)
        output = torch.zeros_like(x)
        for expert, layer in enumerate(self.experts):
            share = (weights * (expert_ids == expert)).sum(-1, keepdim=True)
            output = output + share * layer(x)
        return output


def test_so_are_blocks_that_route_by_themselves():
    names = [
        [(layer.name, layer.num_experts, layer.k) for layer in equipoise.attach(net, BIASES).layers]
        for net in (nn.Sequential(RoutesItself()), partition(nn.Sequential(RoutesItself())))
    ]
    assert names[0] == names[1] and names[0][0][1:] == (4, 2)


class SlotParameter(nn.Module):
    """A bias that is a parameter, as in some families."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, hidden):
        logits = nn.functional.linear(hidden, self.weight)
        scores = logits.sigmoid()
        expert_ids = torch.topk(scores + self.e_score_correction_bias, 2, dim=-1)[1]
        return logits, scores.gather(-1, expert_ids), expert_ids


def test_a_bias_that_is_cut_in_parts_is_refused():
    equipoise.attach(nn.Sequential(SlotParameter()), BIASES)
    with pytest.raises(EquipoiseError, match="ZeRO-3 keeps a part of e_score_correction_bias of a SlotParameter"):
        equipoise.attach(partition(nn.Sequential(SlotParameter())), BIASES)


def test_a_router_whose_gate_is_cut_in_parts_is_tried_without_the_hooks_that_gather_it():
    class TokenChoiceTopKRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(8, 4, bias=False))

        def forward(self, x):
            scores = self.gate(x).softmax(-1)
            weights, expert_ids = torch.topk(scores, 2, dim=-1)
            return weights, expert_ids, expert_ids.flatten().bincount(minlength=4)

    def gather(module, args):
        raise AttributeError("'Parameter' object has no attribute 'ds_status'")

    TokenChoiceTopKRouter.__module__ = "deepspeed.moe.ep_router"
    net = partition(nn.Sequential(TokenChoiceTopKRouter()))
    for module in net[0].gate.modules():  # ZeRO-3 hooks modules without weights too
        module.register_forward_pre_hook(gather)
    assert [(layer.name, layer.num_experts, layer.k) for layer in equipoise.attach(net, BIASES).layers] == [("0", 4, 2)]
    assert net[0].gate._forward_pre_hooks


def test_an_engine_without_the_routers_that_were_attached_is_refused():
    net = PlainNet()
    balance, engine = equipoise.attach(net, BIASES), Engine(net)
    net.blocks[1].gate = PlainNet().blocks[1].gate  # as AutoEP does
    with pytest.raises(UsageError, match=r"blocks.1.gate is not in it. AutoEP puts layers of its own.*after deepspeed"):
        follow_engine(balance, engine)


def test_a_gate_of_an_older_deepspeed_is_refused_with_what_to_do():
    class TopKGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.wg = nn.Linear(8, 4, bias=False)

        def forward(self, hidden):
            return self.wg(hidden)

    TopKGate.__module__ = "deepspeed.moe.sharded_moe"
    with pytest.raises(EquipoiseError, match="its forward has no sparse_routes.*leave the gate out with attach"):
        equipoise.attach(nn.Sequential(TopKGate()), BIASES)
