"""The Triton kernels give what loops over tokens in float64 give, and the plain path. They compile for GPUs.

Here they run in Triton's interpreter. Blocks are made small, so that programs go over several of them.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from models import tiny_lm
from torch.testing import assert_close

import equipoise
from equipoise import EquipoiseError, kernels
from equipoise.balancers import Balancer, LayerStack, LoadBalancingLoss, Quantile
from equipoise.balancers.quantile import edges
from equipoise.counting.pool import Pool
from equipoise.routing import Routing, score

TOKENS, EXPERTS, K, SEQUENCES = 45, 6, 2, 4  # six experts are no power of two
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of nan in the interpreter
COMPILED = Path(__file__).with_name("compiled_kernels.py")


class Stop(Exception):
    """Ends an ``attach`` where the test has seen enough."""


@pytest.fixture(autouse=True)
def _small_blocks():
    with torch.no_grad(), mock.patch.multiple(kernels, BLOCK=32, MAX_PROGRAMS=3):
        yield


def _inputs(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64).to(dtype)
    expert_ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(K).indices
    sequence_ids = torch.randint(SEQUENCES, (TOKENS,), generator=generator)
    counts = torch.rand(TOKENS, generator=generator) < 0.7 if masked else None
    if counts is not None:
        scores[~counts] = float("nan")  # whatever padding holds
    return scores, expert_ids, sequence_ids, counts


def _does_count(counts, token):
    return counts is None or bool(counts[token])


def _loads(expert_ids, sequence_ids, counts):
    loads = [[0] * EXPERTS for _ in range(SEQUENCES)]
    for token, (experts, sequence) in enumerate(zip(expert_ids.tolist(), sequence_ids.tolist(), strict=True)):
        for expert in experts:
            loads[sequence][expert] += _does_count(counts, token)
    return loads


def _p(scores, divided):
    """By token, in float64."""
    rows = scores.double().tolist()
    return [[s / sum(row) for s in row] for row in rows] if divided else rows


@pytest.mark.parametrize("masked", [False, True])
def test_loads_of_sequences(masked):
    _, expert_ids, sequence_ids, counts = _inputs(torch.float32, masked)
    expected = torch.tensor(_loads(expert_ids, sequence_ids, counts))
    load = torch.arange(EXPERTS)
    found = kernels.count_by_sequence(expert_ids, sequence_ids, counts, SEQUENCES, EXPERTS, load)
    assert found.tolist() == expected.tolist()
    assert load.tolist() == (torch.arange(EXPERTS) + expected.sum(0)).tolist()
    assert torch.equal(kernels.count_by_sequence(expert_ids, sequence_ids, counts, SEQUENCES, EXPERTS), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_masses(dtype, masked, divided):
    scores, _, _, counts = _inputs(dtype, masked)
    p = _p(scores, divided)
    expected = [sum(row[e] for t, row in enumerate(p) if _does_count(counts, t)) for e in range(EXPERTS)]
    assert_close(kernels.masses(scores, counts, divided).sum(0), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_values_in_sequences(dtype, masked, divided):
    scores, expert_ids, sequence_ids, counts = _inputs(dtype, masked)
    loads, p = _loads(expert_ids, sequence_ids, counts), _p(scores, divided)
    expected = 0.0
    for token, sequence in enumerate(sequence_ids.tolist()):
        if _does_count(counts, token):
            f = [load / sum(loads[sequence]) for load in loads[sequence]]
            expected += sum(EXPERTS * f[e] * p[token][e] for e in range(EXPERTS))
    by_sequence = kernels.count_by_sequence(expert_ids, sequence_ids, counts, SEQUENCES, EXPERTS)
    found = kernels.values_in_sequences(scores, counts, sequence_ids, by_sequence, divided)
    assert float(found.sum()) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(("pooled", "in_sequences", "has_onto"), [(1, 0, 1), (0, 1, 1), (1, 1, 0)])
def test_gradient_at_the_scores(dtype, masked, divided, pooled, in_sequences, has_onto):
    scores, expert_ids, sequence_ids, counts = _inputs(dtype, masked)
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(EXPERTS, generator=generator, dtype=torch.float64)
    onto = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64).to(dtype)
    loads, scale = _loads(expert_ids, sequence_ids, counts), 0.3
    expected = onto.double() * has_onto
    for token, row in enumerate(scores.double().tolist()):
        if not _does_count(counts, token):
            continue
        load = loads[sequence_ids[token]]
        slope = [
            pooled * float(slopes[e]) + in_sequences * scale * EXPERTS * load[e] / sum(load) for e in range(EXPERTS)
        ]
        if divided:  # of p_j = s_j / sum s: dp_j / ds_e = (delta_je - p_j) / sum s
            mean = sum(s * g for s, g in zip(row, slope, strict=True)) / sum(row)
            slope = [(g - mean) / sum(row) for g in slope]
        expected[token] += torch.tensor(slope, dtype=torch.float64)
    by_sequence = kernels.count_by_sequence(expert_ids, sequence_ids, counts, SEQUENCES, EXPERTS)
    found = kernels.score_gradient(
        scores,
        counts,
        divided,
        slopes=slopes.to(dtype) if pooled else None,
        sequence_ids=sequence_ids if in_sequences else None,
        by_sequence=by_sequence if in_sequences else None,
        scale=torch.tensor(scale, dtype=torch.float64) if in_sequences else None,
        onto=onto if has_onto else None,
    )
    assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bins", [128, 512])
def test_histogram_of_margins(masked, bins):
    scores, _, _, counts = _inputs(torch.float32, masked)
    bias = torch.tensor([0.1, -0.2, 0.0, 0.05, 0.3, -0.01])
    expected = torch.zeros(bins, EXPERTS, dtype=torch.int64)
    lower = edges(bins).tolist()[1:-1]  # the first and the last bin have no end
    for token, row in enumerate((scores + bias).tolist()):
        if _does_count(counts, token):
            best = sorted(row, reverse=True)
            for expert, value in enumerate(row):
                margin = torch.tensor((best[K - 1] + best[K]) / 2 - value).float().item()
                expected[sum(edge <= margin for edge in lower), expert] += 1
    found = kernels.margin_histogram(scores, bias, K, counts, bins, -61)
    assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_a_sample_is_that_of_the_plain_path(masked, score_function):
    logits, _, _, counts = _inputs(torch.float32, masked=False)
    scores = score(logits, score_function)
    ids = scores.topk(K).indices
    mask = (torch.arange(TOKENS) % 5 > 0).float() if masked else None
    routing = Routing(logits, scores, ids, scores.gather(1, ids), mask)
    statistics = []
    for fused in (False, True):
        balancer = Quantile(fraction=0.3)
        balancer.prepare(LayerStack(score_function, K, torch.zeros(1, EXPERTS), fused=fused))
        statistics.append(balancer.statistic(routing, 0))
    assert torch.equal(*statistics)
    assert 0 < int(statistics[0][:, 0].sum()) < TOKENS / 2


def test_histogram_of_a_token_with_nan_is_that_of_the_plain_path():
    scores = torch.rand(5, EXPERTS, generator=torch.Generator().manual_seed(0))
    scores[2, 3] = float("nan")
    ids = scores.topk(K).indices
    routing = Routing(scores, scores, ids, scores.gather(1, ids))
    statistics = []
    for fused in (False, True):
        balancer = Quantile()
        balancer.prepare(LayerStack("sigmoid", K, torch.zeros(1, EXPERTS), fused=fused))
        statistics.append(balancer.statistic(routing, 0))
    assert torch.equal(*statistics)


# ---- a model ----

STRATEGIES = [
    "loss-free",
    "lbl:scope=micro_batch",
    "lbl",
    "lbl:scope=sequence",
    "quantile",
    "quantile+lbl:scope=global_batch+lbl:scope=sequence,normalise=false",
    "lbl+z",
]


def _train(strategy, masked, *, fused, packed=False, checkpointing=None):
    """Two windows of two micro-batches: loads, biases, values of the loss, gradients. And how many kernels ran."""
    model = tiny_lm(checkpointing)
    balance = equipoise.attach(model, strategy, fused=fused)
    generator = torch.Generator().manual_seed(3)
    found = []
    with mock.patch.object(kernels, "_launch", wraps=kernels._launch) as launched:
        for _ in range(2):
            for _ in range(2):
                ids = torch.randint(32, (3, 7), generator=generator)
                mask = (torch.rand(3, 7, generator=generator) < 0.7).long() if masked else None
                if packed:
                    balance.token_mask(mask, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(3, 7))
                loss = model(ids, mask)
                balance_loss = balance.loss()
                (loss + balance_loss).backward()
                found.append(balance_loss.detach())
            balance.step()
            found += [*balance.load.values(), *balance.biases.values()]
    return found + [p.grad for p in model.parameters()], launched.call_count


@torch.enable_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_is_the_same(strategy, masked):
    plain, none = _train(strategy, masked, fused=False)
    fused, number = _train(strategy, masked, fused=True)
    assert none == 0 and (number > 0) == (strategy != "loss-free")
    for ours, expected in zip(fused, plain, strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@torch.enable_grad()
@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("strategy", ["lbl", "lbl:scope=sequence"])
def test_a_training_with_recomputation_and_packed_sequences_is_the_same(checkpointing, strategy):
    plain, _ = _train(strategy, True, fused=False, packed=True, checkpointing=checkpointing)
    fused, number = _train(strategy, True, fused=True, packed=True, checkpointing=checkpointing)
    assert number > 0
    for ours, expected in zip(fused, plain, strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@torch.enable_grad()
@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
def test_a_second_derivative_takes_the_plain_path(scope):
    results = []
    for fused in (False, True):
        model = tiny_lm()
        balance = equipoise.attach(model, LoadBalancingLoss(0.5, scope=scope), fused=fused)
        balance.loss_scale = 1.0  # the gradient is taken for some tensors only
        loss = model(torch.arange(21).view(3, 7))
        parameters = [block.gate.weight for block in model.blocks]
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert_close(ours, expected)


class _OtherLoss(Balancer):
    """Linear in the scores within sequences, by a formula that the kernels do not know."""

    name, scope, coefficient = "other", "sequence", 0.5

    def loss(self, routing, load):
        raise AssertionError("its slopes are enough")

    def slopes(self, load):
        return load.double().square() / load.sum(-1, keepdim=True).clamp_min(1)


@torch.enable_grad()
def test_another_loss_within_sequences_takes_the_plain_path():
    results = []
    for fused in (False, True):
        model = tiny_lm()
        balance = equipoise.attach(model, _OtherLoss(), fused=fused)
        balance_loss = model(torch.arange(21).view(3, 7)) * 0
        loss = balance_loss + balance.loss()
        loss.backward()
        results.append([loss.detach(), *(block.gate.weight.grad for block in model.blocks)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_kernel_is_launched_on_the_device_of_its_tensors():
    """A layer of a model that is spread over GPUs need not be on the current one."""
    scores = torch.rand(3, EXPERTS)
    with mock.patch.object(torch.cuda, "device_of", wraps=torch.cuda.device_of) as device_of:
        kernels.masses(scores, None, False)
    ((launched_on,), _) = device_of.call_args
    assert launched_on.data_ptr() == scores.data_ptr()


@pytest.fixture
def _without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "equipoise.kernels")


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_it_is_refused():
    with pytest.raises(EquipoiseError, match="fused=True must have Triton"):
        equipoise.attach(tiny_lm(), "lbl", fused=True)
    equipoise.attach(tiny_lm(), "lbl")


@pytest.mark.usefixtures("_without_triton")
def test_a_rank_without_triton_does_not_leave_the_others_waiting():
    """They wait in ``agree``: so it must get there, with its error."""
    with mock.patch.object(Pool, "agree", side_effect=Stop) as agree, pytest.raises(Stop):
        equipoise.attach(tiny_lm(), "lbl", fused=True)
    assert isinstance(agree.call_args.args[2], EquipoiseError)


def test_on_a_cpu_without_the_interpreter_nothing_changes():
    with mock.patch.object(kernels, "IS_INTERPRETED", False), torch.enable_grad():
        plain, _ = _train("lbl", True, fused=False)
        fused, number = _train("lbl", True, fused=True)
    assert number == 0 and all(map(torch.equal, fused, plain))


@pytest.mark.slow
def test_all_compile_for_gpus_of_two_makers():
    """To machine code; where it runs they have not been."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    kernels_of = ["_count_by_sequence", "_margin_histogram", "_masses", "_score_gradient", "_values_in_sequences"]
    assert done.stdout.split() == [f"{name}:{code}" for code, name in product(("cubin", "hsaco"), kernels_of)], (
        done.stderr
    )
