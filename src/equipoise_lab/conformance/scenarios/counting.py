"""Which tokens an expert bias counts: once, text only, in training only."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from equipoise_lab.conformance import reference
from equipoise_lab.conformance.driver import Batch, Driver, Layer, Mode, Recompute
from equipoise_lab.conformance.measure import Measurement, compare_biases, compare_counts, worst
from equipoise_lab.conformance.scenarios.scenario import RATE, rows_of, scenario, window

BIASED = Layer(score_function="sigmoid", bias_rate=RATE)


def counted(
    framework: type[Driver],
    ranks: Sequence[Sequence[Batch]],
    rank: int = 0,
    layer: Layer = BIASED,
    recompute: Recompute | None = None,
) -> Measurement:
    """The counts of one step, where the framework shows them, and the biases after it."""
    driver = framework(layer)
    result = driver.train_step(ranks[rank], recompute=recompute)
    right = reference.counts(ranks, layer)
    biases = [reference.moved(layer.bias or [0.0] * layer.experts, count, RATE) for count in right]
    parts = [compare_biases(driver.biases(), biases, RATE)]
    if result.counts is not None:
        parts.append(compare_counts(result.counts, right))
    return worst(parts)


@scenario(40, 76, why="An expert above the mean load loses the rate, one below gains it. Loss-Free Balancing, "
          "Algorithm 1; a constant for all experts changes nothing.")  # fmt: skip
def bias_moves(framework: type[Driver], rank: int) -> Measurement:
    """Does the bias move against the load, by the sign rule?"""
    return counted(framework, [[rows_of(8, 8, of=8, seed=50)]])


@scenario(53, why="The load of a step is the sum over its micro-batches. The bias moves once, by that sum.")
def bias_moves_once_a_step(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias after three micro-batches?"""
    return counted(framework, [window([8, 8, 8], of=8, seed=51)])


@scenario(42, 44, why="Padding is not text. What a router does with it says nothing about the load.")
def bias_with_padding(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if half a row is padding?"""
    return counted(framework, [[_with_equal_padding(rows_of(8, 4, of=8, seed=54))]])


@scenario(42, why="A mask has an entry for each token, not for each expert. If both number 8, it must not be mistaken.")
def bias_with_as_many_tokens_as_experts(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if 8 tokens, 3 of them padding, choose from 8 experts?"""
    return counted(framework, [[rows_of(5, of=8, seed=55)]])


@scenario(64, why="An evaluation is not training. Its tokens do not move the bias of the next step.")
def bias_beside_evaluation(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if an evaluation without gradients stands between two micro-batches?"""
    return counted(framework, [_with_a_forward("evaluate", 56)])


@scenario(89, why="eval() says that a forward is not training, with gradients or without (saliency, influence).")
def bias_beside_evaluation_with_gradients(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if a forward in eval() with gradients stands between two micro-batches?"""
    return counted(framework, [_with_a_forward("evaluate_with_gradients", 59)])


@scenario(86, why="A forward without gradients trains nothing: a rollout, or log-probabilities of the old policy.")
def bias_beside_a_rollout(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if a forward in train() under no_grad stands between two micro-batches?"""
    return counted(framework, [_with_a_forward("train_without_gradients", 62)])


@scenario(59, 60, why="A recomputed token is the same token. It counts once.")
def bias_recomputed_by_the_framework(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias under the framework's own recomputation?"""
    return counted(framework, [[rows_of(8, 8, of=8, seed=65)]], recompute="own")


@scenario(59, 60, why="A recomputed token is the same token. It counts once.")
def bias_recomputed_reentrantly(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias under torch.utils.checkpoint, use_reentrant=True?"""
    return counted(framework, [[rows_of(8, 8, of=8, seed=66)]], recompute="reentrant")


@scenario(59, 60, why="A recomputed token is the same token. It counts once.")
def bias_recomputed_without_reentry(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias under torch.utils.checkpoint, use_reentrant=False?"""
    return counted(framework, [[rows_of(8, 8, of=8, seed=67)]], recompute="non_reentrant")


@scenario(60, why="Recomputed tokens count once, and a forward without gradients counts never. So halving the counts "
          "does not help.")  # fmt: skip
def bias_recomputed_beside_a_rollout(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if one micro-batch is recomputed and one forward is a rollout?"""
    return counted(framework, [_with_a_forward("train_without_gradients", 68)], recompute="own")


@scenario(55, 56, ranks=2, why="The load is that of all ranks, and all of them end with the same bias.")
def bias_two_ranks(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias on two ranks?"""
    return counted(framework, [[rows_of(8, 8, of=8, seed=71 + r)] for r in range(2)], rank)


@scenario(55, ranks=2, why="The load is that of all ranks. Whether experts are spread over them makes no difference.")
def bias_two_ranks_without_expert_parallelism(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias on two ranks that each hold all experts?"""
    ranks = [[rows_of(8, 8, of=8, seed=84 + r)] for r in range(2)]
    return counted(framework, ranks, rank, replace(BIASED, holds_all_experts=True))


@scenario(55, ranks=2, why="The load is the sum of counts over ranks. A mean of shares would favour the smaller rank.")
def bias_unequal_ranks(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias on ranks of 8 and 40 tokens?"""
    return counted(framework, [[rows_of(8, of=8, seed=73)], [rows_of(40, of=40, seed=74)]], rank)


@scenario(56, ranks=2, why="DistributedDataParallel overwrites buffers by those of rank 0 before each forward. Counts "
          "of this rank's earlier micro-batches must survive that.")  # fmt: skip
def bias_under_ddp(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias under torch's DistributedDataParallel, two ranks of two micro-batches?"""
    ranks = [window([8, 8], of=8, seed=75 + 10 * r) for r in range(2)]
    return counted(framework, ranks, rank, replace(BIASED, is_wrapped_in_ddp=True))


@scenario(22, 23, why="A bias moves by what the router wanted. After dropping and padding every expert has the same.")
def bias_with_a_capacity(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if experts drop above a capacity of 1 and are filled up to it?"""
    layer = replace(BIASED, capacity=1.0, pads_to_capacity=True)
    return counted(framework, [[rows_of(32, 32, of=32, seed=79)]], layer=layer)


@scenario(69, why="16,000 tokens and their shares are whole numbers that a 16-bit float cannot hold. Counts are exact.")
def bias_of_many_tokens_in_bfloat16(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias of a bfloat16 model after 64 micro-batches of 250 tokens?"""
    layer = replace(BIASED, dtype=torch.bfloat16)
    return counted(framework, [_nearly_even(64, 250)], layer=layer)


@scenario(88, why="The layer in a multi-token-prediction head is an MoE layer as the others. Its bias moves too.")
def bias_of_a_prediction_head(framework: type[Driver], rank: int) -> Measurement:
    """Do the biases of all layers move, that of a multi-token-prediction head too?"""
    driver = framework(replace(BIASED, number=2, has_prediction_head=True))
    driver.train_step([rows_of(8, 8, of=8, seed=80, number=2)])
    moved = [float(bias.abs().max()) / RATE for bias in driver.biases()]
    words = ", ".join(f"{value:.3g}" for value in moved)
    return Measurement("each layer by 1", f"layers by {words}", float(sum(value == 0 for value in moved)), 0.0)


@scenario(
    89, ranks=2, why="A pipeline stage of dense layers has nothing to count. The other stages must not wait for it."
)
def bias_beside_a_stage_without_experts(framework: type[Driver], rank: int) -> Measurement:
    """Does the bias move, if the first of two pipeline stages has no MoE layer?"""
    layer = replace(BIASED, rank_without=0)
    batches = [rows_of(8, 8, of=8, seed=81)]
    driver = framework(layer)
    driver.train_step(batches)
    if rank == layer.rank_without:
        return Measurement("no wait", "no wait", 0.0, 0.0)
    (count,) = reference.counts([batches], layer)
    return compare_biases(driver.biases(), [reference.moved([0.0] * 8, count, RATE)], RATE)


def _with_a_forward(mode: Mode, seed: int) -> list[Batch]:
    """Two micro-batches, and between them a longer forward that is not training."""
    first, between, last = (
        rows_of(8, of=8, seed=seed),
        rows_of(16, of=16, seed=seed + 1),
        rows_of(8, of=8, seed=seed + 2),
    )
    return [first, replace(between, logits=between.logits.flip(-1), mode=mode), last]


def _with_equal_padding(batch: Batch) -> Batch:
    """All padding has the same hidden state, as it has in a model, so that it goes to the same experts."""
    assert batch.mask is not None
    padded = batch.logits.clone()
    padded[:, ~batch.mask] = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    return replace(batch, logits=padded)


def _nearly_even(number: int, tokens: int) -> list[Batch]:
    """Micro-batches whose experts all get about the mean load. Logits are far enough apart for bfloat16."""
    generator = torch.Generator().manual_seed(83)
    order = torch.rand(number, 1, 1, tokens, 8, generator=generator).argsort(-1)
    return [Batch(0.5 * ranks.float() - 2) for ranks in order]
