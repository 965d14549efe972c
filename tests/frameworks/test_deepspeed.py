"""Models in an engine of DeepSpeed, on two ranks, give what one process gives in float64."""

import os
import subprocess
import sys
import tempfile
from functools import cache

import pytest
import torch
from frameworks import deepspeed_ranks
from frameworks.deepspeed_ranks import CASES, LR, PRECISIONS, TRAINER_STAGES
from pages import ROOT, blocks
from plain_model import PlainNet, Reference, assert_biases, assert_counts, assert_gradient, batches
from ranks import distance, run_on_ranks

import equipoise


@cache
def _results(function):
    with tempfile.TemporaryDirectory() as folder:
        return run_on_ranks(2, function, folder)


def _on_two_ranks(function):
    for result in _results(function):
        assert not isinstance(result, str), result
    return _results(function)


def on_two_ranks():
    return _on_two_ranks(deepspeed_ranks.everything)


# ---- gradients, counts and biases ----


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_engine_on_two_ranks_gives_what_one_process_gives_in_float64(case):
    """Ranks have unequal tokens, micro-batches uneven padding, the optimizer two groups of parameters."""
    _, accumulated, _, _ = case
    data = batches(16)
    for results in on_two_ranks():
        reference = Reference(PlainNet(), LR)
        steps = results[case]
        assert len(steps) == 8 // accumulated
        for number, step in enumerate(steps):
            first = number * accumulated
            window = [data[2 * m : 2 * m + 2] for m in range(first, first + accumulated)]
            assert_gradient(step["gradient"], reference.step(window, 1 / accumulated / 2))
            assert_counts(step["load"], reference.counts)
            assert_biases(step["biases"], reference.biases)


def test_a_model_that_zero_3_made_in_parts_is_attached_all_the_same():
    data = batches(8)
    for results in on_two_ranks():
        names, total, steps = results["born partitioned"]
        assert names == ["blocks.0.gate", "blocks.1.gate"] and total > 0
        reference = Reference(PlainNet(), LR)
        for number, step in enumerate(steps):
            window = [data[2 * m : 2 * m + 2] for m in range(2 * number, 2 * number + 2)]
            assert_gradient(step["gradient"], reference.step(window, 1 / 4))
            assert_biases(step["biases"], reference.biases)


# ---- steps and checkpoints ----


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_that_is_skipped_closes_the_window_and_moves_nothing(name):
    tokens = [float(sum(b["attention_mask"].sum() for b in batches(12)[first : first + 4])) for first in (0, 4, 8)]
    for results in on_two_ranks():
        if results[name] is None:
            pytest.skip("DeepSpeed has no fp16 on this CPU")
        assert results[name] == [(1, False, tokens[0]), (2, True, tokens[1]), (3, True, tokens[2])]


@pytest.mark.parametrize("stage", range(4))
def test_resuming_from_a_checkpoint_of_the_engine_equals_never_having_stopped(stage):
    for results in on_two_ranks():
        whole, after, num_windows = results["resumed", stage]
        assert len(whole) == len(after) == 1 and num_windows == 3
        assert distance(after[0]["gradient"], whole[0]["gradient"]) < 1e-6
        for name, bias in whole[0]["biases"].items():
            assert torch.equal(after[0]["biases"][name], bias) and bias.any()


# ---- refusals ----

MESSAGES = {
    "follow the optimizer": "TypeError: optimizer must be one of torch: got DeepSpeedZeroOptimizer of DeepSpeed. "
    "Follow its engine: equipoise.integrations.deepspeed.follow_engine(balance, engine).",
    "follow the engine": "TypeError: optimizer must be one of torch: got DeepSpeedEngine of DeepSpeed.",
    "twice": "UsageError: follow_engine() must be called once for an engine",
    "no engine": "TypeError: engine must be what deepspeed.initialize returned first",
    "torch's backward": "EquipoiseError: engine.backward(loss) must make the backward",
    "zenflow": "UsageError: the engine must apply a step when step() is called",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_what_would_be_wrong_is_refused(what):
    for results in on_two_ranks():
        assert results["refusals"][what].startswith(MESSAGES[what])


def test_a_bias_that_zero_3_has_cut_in_parts_is_refused():
    for results in on_two_ranks():
        assert "ZeRO-3 keeps a part of e_score_correction_bias" in results["partitioned slot"]


def test_an_engine_of_a_pipeline_is_refused():
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from equipoise.integrations.deepspeed import follow_engine

    net = PlainNet()
    with pytest.raises(equipoise.UsageError, match="a PipelineEngine runs them in train_batch"):
        follow_engine(equipoise.attach(net, "none"), object.__new__(PipelineEngine))


# ---- the router of AutoEP ----


class AutoEPBlock(torch.nn.Module):
    """Calls the router as the layer of AutoEP does."""

    def __init__(self, score_function, normalised):
        from deepspeed.moe.ep_router import TokenChoiceTopKRouter

        super().__init__()
        torch.manual_seed(0)
        self.router = TokenChoiceTopKRouter(8, 6, None, None, 2, score_function, normalised, 1.0, False)
        self.expert_bias = None

    def forward(self, x):
        weights, _, _ = self.router(x, self.expert_bias)
        return weights.square().sum()


@pytest.mark.parametrize(("score_function", "normalised"), [("softmax", True), ("sigmoid", False)])
def test_the_router_of_autoep_counts_steers_and_gets_its_gradient(score_function, normalised):
    block = AutoEPBlock(score_function, normalised)
    balance = equipoise.attach(block, "loss-free:rate=0.1,rule=sign+lbl:coefficient=1")
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    bias = [0.0] * 6
    for _ in range(3):
        weight = block.router.gate.weight.detach().double().requires_grad_()
        logits = x.double() @ weight.T
        scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)
        chosen = (scores + torch.tensor(bias, dtype=torch.float64)).topk(2).indices
        counts = [int((chosen == expert).sum()) for expert in range(6)]
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        used = scores.gather(-1, chosen)
        used = used / used.sum(-1, keepdim=True) if normalised else used
        loss = used.square().sum() + 6 * sum(count / 40 * p for count, p in zip(counts, mean, strict=True))
        expected = torch.autograd.grad(loss, weight)[0]
        block.zero_grad()
        (block(x) + balance.loss()).backward()
        balance.step()
        assert distance({"weight": block.router.gate.weight.grad.double()}, {"weight": expected}) < 1e-6
        assert balance.load["router"].tolist() == counts
        signs = [(count < 40 / 6) - (count > 40 / 6) for count in counts]
        bias = [b + 0.1 * (sign - sum(signs) / 6) for b, sign in zip(bias, signs, strict=True)]
        torch.testing.assert_close(balance.biases["router"], torch.tensor(bias), rtol=0, atol=1e-6)


# ---- trainings ----


def test_a_training_of_fifty_steps_evens_the_load():
    for results in on_two_ranks():
        unbalanced, balanced = results["evened", True], results["evened", False]
        print(unbalanced, balanced)
        assert balanced < unbalanced / 2


@pytest.mark.parametrize("stage", TRAINER_STAGES[1:])
def test_the_trainer_with_deepspeed_gives_what_it_gives_with_ddp(stage):
    """Two windows, of which the second is short. tests/library compares DDP with a loop of our own."""
    for results in _on_two_ranks(deepspeed_ranks.under_the_trainer):
        biases, loads, final = results[stage]
        expected_biases, expected_loads, expected = results[None]
        assert len(biases) == len(expected_biases) == 2
        for ours, theirs in zip(biases + loads, expected_biases + expected_loads, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert distance(final, expected) < 1e-6


@pytest.mark.parametrize("stage", TRAINER_STAGES[-1:])
def test_resuming_under_the_trainer_with_deepspeed_equals_never_having_stopped(stage):
    for results in _on_two_ranks(deepspeed_ranks.under_the_trainer):
        biases, loads, final = results["resumed", stage]
        whole_biases, whole_loads, expected = results[stage]
        assert all(torch.equal(biases[-1][name], whole_biases[-1][name]) for name in whole_biases[-1])
        assert all(torch.equal(loads[-1][name], whole_loads[-1][name]) for name in whole_loads[-1])
        assert distance(final, expected) < 1e-6


def test_the_example_runs():
    command = [sys.executable, ROOT / "examples/deepspeed_loop.py", "--smoke"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    strategies = [line.split()[0] for line in done.stdout.rsplit("\nstrategy ", 1)[1].splitlines()[1:]]
    assert strategies == ["none", "lbl:scope=global_batch,coefficient=1e-2"]


def test_the_code_of_its_page_runs(tmp_path):
    """Two windows followed, two by hand, a checkpoint."""
    codes = [block.code for block in blocks(ROOT / "docs/how-to/deepspeed.md") if block.language == "py"]
    (result,) = run_on_ranks(1, deepspeed_ranks.page, codes, str(tmp_path))
    assert result == (4, 48.0), result
