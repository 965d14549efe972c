"""The functions on the page "Each mechanism in ten lines" are equipoise's mechanisms: same values, same gradients."""

import ast

import pytest
import torch
from models import tiny_lm
from pages import ROOT, program
from torch.testing import assert_close

import equipoise
from equipoise import LossFree, Quantile, metrics
from equipoise.balancers import LayerStack, load_balancing_loss, sequence_load_balancing_loss, z_loss
from equipoise.load import expert_load
from equipoise.routing import SCORE_FUNCTIONS, Routing, route, score
from equipoise_lab.train.balancers import PhiBalancing, ShuffleControl, shinka_loss
from equipoise_lab.train.selection import expert_choice, sinkhorn

PAGE = ROOT / "docs" / "concepts" / "mechanisms_in_code.md"
TOKENS, EXPERTS, K = 96, 8, 3
MASKS = ["no mask", "masked", "all masked"]
seeded = pytest.mark.parametrize("seed", range(4))
masked = pytest.mark.parametrize("masking", MASKS)


@pytest.fixture(scope="module")
def page():
    names = {}
    with torch.random.fork_rng():
        exec(compile(program(PAGE), str(PAGE), "exec"), names)
    return names


class Inputs:
    """Random logits of a router that prefers some experts, and what equipoise makes of them."""

    def __init__(self, seed, masking="no mask", score_function="sigmoid", tokens=TOKENS, unused=0):
        self.random = torch.Generator().manual_seed(seed)
        logits = self.draw(tokens, EXPERTS) + self.draw(EXPERTS)
        logits[0] -= 2000  # every sigmoid score of this token is 0
        logits[:, EXPERTS - unused :] -= 200
        self.logits = logits.requires_grad_()
        self.bias = 0.1 * self.draw(EXPERTS)
        self.mask = None
        if masking != "no mask":
            self.mask = torch.rand(tokens, generator=self.random) < (0.7 if masking == "masked" else 0)
        self.sequence_ids = torch.randint(0, 5, (tokens,), generator=self.random).sort().values
        routing = route(self.logits, K, score_function=score_function, bias=self.bias)
        numbers = None if self.mask is None else self.mask.double()
        self.routing = routing._replace(mask=numbers, sequence_ids=self.sequence_ids, num_sequences=5)
        self.scores, self.expert_ids = routing.scores, routing.expert_ids
        self.load = expert_load(self.expert_ids, EXPERTS, numbers)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def other_load(self, size=100):
        """Counts of more tokens than these: those of a global batch."""
        return torch.randint(0, size, (EXPERTS,), generator=self.random)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]

    def assert_same(self, loss, expected):
        assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert_close(self.gradient(loss), self.gradient(expected), rtol=1e-11, atol=1e-14)


def test_the_functions_are_short_and_import_nothing_of_equipoise():
    tree = ast.parse(program(PAGE))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import math", "import torch", "from torch import distributed"]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        assert ast.get_docstring(function), function.name
        assert function.end_lineno - function.body[0].end_lineno <= 10, function.name
    assert len(functions) > 20


@seeded
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_the_choice_with_a_bias(page, seed, score_function):
    own = Inputs(seed, score_function=score_function)
    bias = own.bias.requires_grad_()
    expert_ids, weights = page["choose"](own.scores, K, bias)
    assert torch.equal(expert_ids, own.expert_ids) and (own.scores.topk(K).indices != expert_ids).any()
    factors = own.draw(TOKENS, K)
    own.assert_same((factors * weights).sum(), (factors * own.routing.weights).sum())
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


@seeded
@masked
def test_counts_and_maxvio(page, seed, masking):
    own = Inputs(seed, masking)
    load = page["count"](own.expert_ids, EXPERTS, own.mask)
    assert load.dtype == torch.int64 and torch.equal(load, own.load)
    assert_close(page["max_violation"](load), metrics.max_violation(load), equal_nan=True)


def _loads(seed):
    """Uneven, with dead experts, even, none at all; the deviation of one expert is less than its rounding."""
    own = Inputs(seed)
    huge = torch.full((EXPERTS,), 2**53 // EXPERTS)
    huge[seed] += 1
    return [
        own.other_load(),
        own.other_load(2),
        torch.full((EXPERTS,), 7),
        torch.zeros(EXPERTS, dtype=torch.int64),
        huge,
    ]


def _biases(balancer, start, loads):
    """After each of these loads."""
    balancer.prepare(LayerStack("sigmoid", K, start[None].clone()))
    for load in loads:
        balancer.update(load[None])
        yield balancer.bias()[0].clone()


@seeded
@pytest.mark.parametrize("rule", ["sign", "proportional", "rms"])
def test_rules_of_loss_free(page, seed, rule):
    bias = Inputs(seed).bias
    for load, expected in zip(_loads(seed), _biases(LossFree(0.01, rule=rule), bias, _loads(seed)), strict=True):
        moved = page[f"{rule}_rule"](bias, load, 0.01)
        assert_close(moved, expected, rtol=0, atol=1e-15)
        bias = moved


@seeded
@pytest.mark.parametrize("options", [{}, {"decay": 0.8, "sharpness": 0.5}])
def test_the_momentum_rule(page, seed, options):
    bias, momentum = Inputs(seed).bias, torch.zeros(EXPERTS, dtype=torch.float64)
    balancer = LossFree(0.01, rule="momentum", momentum=options.get("decay"), sharpness=options.get("sharpness"))
    for load, expected in zip(_loads(seed), _biases(balancer, bias, _loads(seed)), strict=True):
        bias, momentum = page["momentum_rule"](bias, momentum, load, 0.01, **options)
        assert_close(bias, expected, rtol=0, atol=1e-15)
        assert_close(momentum, balancer.state()["momentum"][0], rtol=0, atol=1e-15)


@seeded
def test_the_multiplicative_rule(page, seed):
    own, rate = Inputs(seed), 0.4  # some factors reach 0
    factor = torch.ones(EXPERTS, dtype=torch.float64)
    loads = _loads(seed) + [own.other_load() for _ in range(5)]
    zeros = 0
    for load, expected in zip(loads, _biases(LossFree(rate, rule="multiplicative"), factor - 1, loads), strict=True):
        factor = page["multiplicative_rule"](factor, load, rate)
        assert_close(factor, 1 + expected, rtol=1e-13, atol=1e-13)
        zeros += (factor == 0).sum()
    assert zeros > 0
    expert_ids, weights = page["choose_by_factor"](own.scores, K, factor)
    assert torch.equal(expert_ids, (own.scores * factor).topk(K).indices)
    assert torch.equal(weights, own.scores.gather(-1, expert_ids))


@seeded
def test_the_sign_rule_by_micro_batch(page, seed):
    own = Inputs(seed)
    balancer = LossFree(0.01, rule="sign", scope="micro_batch")
    balancer.prepare(LayerStack("sigmoid", K, own.bias[None].clone()))
    for loads in (torch.stack(_loads(seed)), torch.zeros(3, EXPERTS, dtype=torch.int64)):
        before = balancer.bias()[0].clone()
        statistic = sum(balancer.micro_batch_statistic(load[None]) for load in loads)
        balancer.update(loads.sum(0)[None], list(statistic))
        moved = page["sign_rule_by_micro_batch"](before, loads, 0.01)
        assert_close(moved, balancer.bias()[0], rtol=0, atol=1e-15)
        assert not torch.equal(moved, page["sign_rule"](before, loads.sum(0), 0.01)) or not loads.any()


@seeded
@masked
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_load_balancing_losses(page, seed, masking, score_function):
    own = Inputs(seed, masking, score_function)
    scores, ids, mask, routing = own.scores, own.expert_ids, own.mask, own.routing
    own.assert_same(page["micro_batch_loss"](scores, ids, mask), load_balancing_loss(routing))
    own.assert_same(page["sequence_loss"](scores, ids, own.sequence_ids, mask), sequence_load_balancing_loss(routing))
    for load in (own.other_load(), own.other_load(2), 0 * own.load):
        own.assert_same(page["load_balancing_loss"](scores, load, mask), load_balancing_loss(routing, load))
    assert not page["load_balancing_loss"](scores, own.load, mask).isnan()


@seeded
def test_the_losses_of_a_global_batch_are_those_of_attach(page, seed):
    """Micro-batches of unequal length, through a model with a sigmoid and a softmax router."""
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(32, (2, length), generator=random) for length in (5, 9, 13)]
    masks = [torch.rand(batch.shape, generator=random) < 0.8 for batch in ids]
    attached, plain = tiny_lm(seed=seed).double(), tiny_lm(seed=seed).double()

    balance = equipoise.attach(attached, "lbl:scope=global_batch,coefficient=1")
    losses = [attached(batch, mask.double()) * 0 + balance.loss() for batch, mask in zip(ids, masks, strict=True)]
    (sum(losses) / 3).backward()
    balance.step()

    calls = [[], []]
    for layer, (block, function) in enumerate(zip(plain.blocks, ("sigmoid", "softmax"), strict=True)):
        block.gate.register_forward_hook(
            lambda _, __, output, layer=layer, function=function: calls[layer].append(
                (score(output[0], function), output[2])
            )
        )
    for batch, mask in zip(ids, masks, strict=True):
        plain(batch, mask.double())
    total = 0
    for layer, block in enumerate(plain.blocks):
        window = [(*call, mask.flatten()) for call, mask in zip(calls[layer], masks, strict=True)]
        of_layer = page["global_batch_losses"](window, block.gate.weight.shape[0])
        load = page["count"](
            torch.cat([i for _, i, _ in window]), len(block.gate.weight), torch.cat([m for *_, m in window])
        )
        assert torch.equal(load, balance.load[f"blocks.{layer}.gate"])
        total = total + sum(of_layer) / 3
    total.backward()
    for expected, own in zip(attached.blocks, plain.blocks, strict=True):
        assert own.gate.weight.grad.abs().max() > 1e-4
        assert_close(own.gate.weight.grad, expected.gate.weight.grad, rtol=1e-5, atol=1e-8)  # routers are float32


@seeded
def test_the_losses_of_a_global_batch_count_the_other_ranks(page, seed, monkeypatch):
    own, here = Inputs(seed, "masked"), Inputs(seed + 10, "masked", tokens=50)
    of_other_ranks = own.other_load(1000)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load: load.add_(of_other_ranks))
    losses = page["global_batch_losses"]([(i.scores, i.expert_ids, i.mask) for i in (own, here)], EXPERTS)
    for inputs, loss in zip((own, here), losses, strict=True):
        inputs.assert_same(loss, load_balancing_loss(inputs.routing, own.load + here.load + of_other_ranks))


@seeded
@masked
def test_the_z_loss(page, seed, masking):
    own = Inputs(seed, masking)
    own.assert_same(page["z_loss"](own.logits, own.mask), z_loss(own.logits, own.routing.mask))


@seeded
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("masking", MASKS[:2])
def test_the_quantile_bias(page, seed, masking, score_function):
    balancer = Quantile(bins=0)
    own = Inputs(seed, masking, score_function, tokens=512)
    bias = own.bias
    balancer.prepare(LayerStack(score_function, K, bias[None].clone()))
    moves = []
    for _ in range(6):
        mask = None if own.mask is None else own.mask.double()
        routing = route(own.logits, K, score_function=score_function, bias=bias, mask=mask)
        load = expert_load(routing.expert_ids, EXPERTS, mask)
        gain = page["part_beyond_chance"](load, K)
        halves = [
            balancer.statistic(Routing(*(None if part is None else part[half] for part in routing[:5])), 0)
            for half in (slice(0, 200), slice(200, None))
        ]
        moved = page["quantile_rule"](bias, own.scores.detach(), K, own.mask)
        balancer.update(load[None], [torch.cat(halves)])
        assert_close(moved, balancer.bias()[0], rtol=0, atol=1e-12)
        assert (gain >= 0).all() and (gain < 1).all()
        moves.append(not torch.equal(moved, bias))
        bias = moved
    assert moves[0] and not moves[-1]  # what is even stays


@seeded
@pytest.mark.parametrize("surplus", [0, 38, 48, 150])  # of one expert; its count has a standard deviation of 9.9
def test_the_quantile_bias_moves_no_expert_whose_load_is_chance(page, seed, surplus):
    """Of 64 experts with 100 tokens each, one takes some tokens of the others."""
    own, num_experts = Inputs(seed), 64
    chosen = torch.arange(num_experts).repeat(100)
    chosen[: num_experts * surplus // 63][chosen[: num_experts * surplus // 63] != 0] = 0
    scores = 0.4 * torch.rand(len(chosen), num_experts, generator=own.random, dtype=torch.float64)
    scores += 0.5 * torch.nn.functional.one_hot(chosen, num_experts)
    bias = 0.01 * torch.rand(num_experts, generator=own.random, dtype=torch.float64)
    routing = Routing(scores, scores, chosen[:, None], scores)
    load = expert_load(routing.expert_ids, num_experts)
    balancer = Quantile(bins=0)
    balancer.prepare(LayerStack("sigmoid", 1, bias[None].clone()))
    balancer.update(load[None], [balancer.statistic(routing, 0)])
    moved = page["quantile_rule"](bias, scores, 1)
    assert_close(moved, balancer.bias()[0], rtol=0, atol=1e-12)
    num_moved = (page["part_beyond_chance"](load, 1) > 0).sum()
    assert num_moved == {0: 0, 38: 0, 48: 1, 150: num_experts}[surplus]
    assert torch.equal(moved, bias) == (num_moved == 0)


# ---- of the lab ----


@seeded
@pytest.mark.parametrize("masking", MASKS[:2])
def test_the_shuffled_load(page, seed, masking, monkeypatch):
    own, other = Inputs(seed, masking), Inputs(seed + 10, masking, tokens=200)
    balancer = ShuffleControl()
    balancer.prepare(LayerStack("sigmoid", K, torch.zeros(1, EXPERTS)))
    for inputs in (own, other):
        balancer.statistic(inputs.routing, 0)
    seeds, randperm = [], torch.randperm
    monkeypatch.setattr(
        torch,
        "randperm",
        lambda n, generator: (seeds.append(generator.initial_seed()), randperm(n, generator=generator))[1],
    )
    expected = balancer.loss(own.routing, None)
    monkeypatch.undo()
    of_window = torch.cat([i.expert_ids if i.mask is None else i.expert_ids[i.mask] for i in (own, other)])
    num_tokens = TOKENS if own.mask is None else int(own.mask.sum())
    load = page["shuffled_load"](of_window, num_tokens, EXPERTS, torch.Generator().manual_seed(seeds[0]))
    assert load.sum() == num_tokens * K and (load <= page["count"](of_window, EXPERTS)).all()
    own.assert_same(page["load_balancing_loss"](own.scores, load, own.mask), expected)


@seeded
@masked
@pytest.mark.parametrize("memory", [0.3, 0.0])
def test_phi(page, seed, masking, memory):
    """The lab sums scores as integers, 2^24 for a score of 1."""
    balancer = PhiBalancing(memory=memory)
    balancer.prepare(LayerStack("sigmoid", K, torch.zeros(1, EXPERTS)))
    m = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64)
    for window in range(3):
        own = Inputs(seed + 10 * window, masking, unused=1 if window == 0 else 0)
        statistic = balancer.statistic(own.routing, 0)
        loss, expected = page["phi_loss"](own.scores, m, own.mask), balancer.loss(own.routing, None)
        assert_close(loss, expected, rtol=0, atol=1e-6)
        assert_close(own.gradient(loss), own.gradient(expected), rtol=1e-5, atol=1e-9)
        balancer.update(own.load[None], [statistic])
        if masking != "all masked":
            m = page["phi_update"](m, own.scores, memory, own.mask)
        assert_close(m, balancer.state()["excess"][0] + 1 / EXPERTS, rtol=0, atol=1e-7)


@seeded
@masked
def test_shinka(page, seed, masking):
    own = Inputs(seed, masking)
    for load in (own.load, own.other_load(), own.other_load(2), 0 * own.load):
        own.assert_same(page["shinka_loss"](own.scores, load, own.mask), shinka_loss(own.routing, load))


@seeded
@pytest.mark.parametrize("chunk", [TOKENS, 32, 16])
def test_expert_choice(page, seed, chunk):
    scores = Inputs(seed).scores
    token_ids, expert_ids = page["expert_choice"](scores, 2, chunk)
    for own, expected in zip((token_ids, expert_ids), expert_choice(scores, 2, chunk), strict=True):
        assert torch.equal(own, expected)


@seeded
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn(page, seed, iterations):
    logits = Inputs(seed).logits
    matrix = page["sinkhorn"](logits, iterations)
    assert not matrix.requires_grad
    assert_close(matrix, sinkhorn(logits, iterations), rtol=1e-10, atol=1e-15)
