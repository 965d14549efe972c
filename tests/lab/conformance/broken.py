"""Drivers of equipoise with one known defect each, so that a scenario can be seen to fail."""

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from equipoise_lab.conformance.drivers.equipoise import Equipoise
from equipoise_lab.conformance.scenarios import SCENARIOS


class CountsPadding(Equipoise):
    def train_step(self, batches, **options):
        return super().train_step([replace(batch, mask=None) for batch in batches], **options)


class NanForPadding(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, loss=float("nan"))


class CountsEveryForward(Equipoise):
    def train_step(self, batches, **options):
        return super().train_step([replace(batch, mode="train") for batch in batches], **options)


class RecomputationTwice(Equipoise):
    """Tokens that are recomputed count twice, those of forwards without gradients once."""

    def train_step(self, batches, *, recompute=None, **options):
        if recompute is not None:
            batches = [replace(batch, mode="train") for batch in batches] + list(batches[:1])
        return super().train_step(batches, **options)


class LastMicroBatchOnly(Equipoise):
    def train_step(self, batches, **options):
        return super().train_step([batch for batch in batches if batch.mode == "train"][-1:], **options)


class MetricOfTheLastMicroBatch(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        last = Equipoise(self.layer).train_step(batches[-1:])
        return replace(result, imbalance=last.imbalance)


class MetricOfAllForwards(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, imbalance=CountsEveryForward(self.layer).train_step(batches).imbalance)


class MetricOfRecomputation(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, imbalance=Equipoise(self.layer).train_step([*batches, batches[-1]]).imbalance)


class MetricPlusOne(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, imbalance=result.imbalance + 1)


class EachRankAlone(Equipoise):
    """No rank knows of another one."""

    def __init__(self, layer):
        super().__init__(replace(layer, rank_without=-1, is_wrapped_in_ddp=False))  # a group for each rank


class WeakerByRanks(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, gradients=[gradient / dist.get_world_size() for gradient in result.gradients])


class HalfTheStrength(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, gradients=[0.5 * gradient for gradient in result.gradients])


class OtherScope(Equipoise):
    """Takes f over the micro-batch where the loss is over sequences or the global batch, and the reverse."""

    def __init__(self, layer):
        super().__init__(replace(layer, loss="sequence" if layer.loss == "micro_batch" else "micro_batch"))


class WithTheStepBefore(Equipoise):
    def train_step(self, batches, **options):
        earlier = getattr(self, "earlier", [])
        self.earlier = list(batches)
        return super().train_step([*earlier, *batches], **options)


class OneExpertLess(Equipoise):
    def __init__(self, layer):
        super().__init__(replace(layer, k=max(layer.k - 1, 1) if layer.k > 1 else 2))


class UnnormalisedScores(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        scores = torch.sigmoid(batches[0].logits[0]).sum(-1).mean()
        return replace(
            result, loss=result.loss * float(scores), gradients=[g * float(scores) for g in result.gradients]
        )


class OneLayerOnly(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, loss=result.loss / 2)

    def biases(self):
        first, *others = super().biases()
        return [first, *(torch.zeros_like(bias) for bias in others)]


class RowsInPlaceOfSequences(Equipoise):
    def train_step(self, batches, **options):
        return super().train_step([replace(batch, sequence_ids=None) for batch in batches], **options)


class WithoutGroups(Equipoise):
    def __init__(self, layer):
        super().__init__(replace(layer, groups=None))


class ClosedGroupsAtZero(Equipoise):
    """What is closed has the score 0: it wins if biased scores are negative."""

    def choose(self, batch):
        logits = batch.logits[0].reshape(-1, self.layer.experts)
        biased = logits.sigmoid() + torch.tensor(self.layer.bias or (0.0,) * self.layer.experts)
        size = self.layer.experts // self.layer.groups[0]
        best = biased.reshape(len(biased), -1, size).topk(2, -1).values.sum(-1).topk(self.layer.groups[1], -1).indices
        is_open = torch.zeros(len(biased), self.layer.groups[0], dtype=torch.bool).scatter(1, best, True)
        return torch.where(is_open.repeat_interleave(size, 1), biased, 0.0).topk(self.layer.k, -1).indices


class WithoutBias(Equipoise):
    def __init__(self, layer):
        super().__init__(replace(layer, bias=None))


class MovesTheBiasOnly(Equipoise):
    """The bias steers, but what is in the loss is chosen without it."""

    def train_step(self, batches, **options):
        return replace(super().train_step(batches, **options), loss=WithoutBias(self.layer).train_step(batches).loss)


class CountsAfterCapacity(Equipoise):
    """Every expert has its capacity, no more and no less."""

    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(
            result, loss=1.0, gradients=[0 * g for g in result.gradients], counts=[16 + 0 * c for c in result.counts]
        )


class SixteenBitCounts(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, counts=[count.bfloat16().long() for count in result.counts])


class SixteenBitBias(Equipoise):
    def biases(self):
        return [bias.bfloat16().float() for bias in super().biases()]


class BiasRoundedAtEachStep(Equipoise):
    def train_step(self, batches, **options):
        before = getattr(self, "rounded", [bias.bfloat16() for bias in super().biases()])
        start = super().biases()
        result = super().train_step(batches, **options)
        self.rounded = [b + (after - s).bfloat16() for b, s, after in zip(before, start, super().biases(), strict=True)]
        return result

    def biases(self):
        return [bias.float() for bias in getattr(self, "rounded", super().biases())]


class AlwaysApplies(Equipoise):
    def train_step(self, batches, **options):
        return super().train_step(batches, **{**options, "is_applied": True, "has_finite_gradients": True})


class KeepsSkippedCounts(Equipoise):
    def train_step(self, batches, *, is_applied=True, **options):
        if not is_applied:
            self.left = list(batches)
            return super().train_step(batches, is_applied=False, **options)
        return super().train_step([*getattr(self, "left", []), *batches], **options)


class NeverMoves(Equipoise):
    def biases(self):
        return [torch.zeros_like(bias) for bias in super().biases()]


class MovesAtEvenLoad(Equipoise):
    def biases(self):
        return [bias + 1e-3 * torch.arange(len(bias)) for bias in super().biases()]


class LosesTheBias(Equipoise):
    def load(self, state):
        pass


class RoutesLive(Equipoise):
    def train_step(self, batches, **options):
        return super().train_step([replace(batch, replayed=None) for batch in batches], **options)


class CountsReplayedPadding(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        padding = 2 * int((~batches[0].mask).sum())  # two choices of expert 0
        return replace(result, counts=[count + padding * (torch.arange(len(count)) == 0) for count in result.counts])


class MovesByDefault(Equipoise):
    def default_bias_rate(self):
        return 1e-3


class LossInEvaluation(Equipoise):
    def evaluation_loss(self, batch):
        return 1.0


class NoLoss(Equipoise):
    def train_step(self, batches, **options):
        return replace(super().train_step(batches, **options), loss=None)


class ConstantLoss(Equipoise):
    def train_step(self, batches, **options):
        return replace(super().train_step(batches, **options), loss=1.0)


class LossTimesTwo(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, loss=2 * result.loss)


class NanGradient(Equipoise):
    def train_step(self, batches, **options):
        result = super().train_step(batches, **options)
        return replace(result, gradients=[gradient / 0 for gradient in result.gradients])


class EndsUnderASigmoid(Equipoise):
    def __init__(self, layer):
        if layer.score_function == "sigmoid":
            print("a last word", flush=True)
            os._exit(3)
        super().__init__(layer)


BROKEN = {  # by scenario, a driver with a defect that it must find
    "loss-at-balance": LossTimesTwo,
    "loss-at-collapse": ConstantLoss,
    "loss-gradient": OneExpertLess,
    "loss-gradient-top-1": OneExpertLess,
    "loss-gradient-sigmoid": UnnormalisedScores,
    "loss-sigmoid-without-normalised-weights": UnnormalisedScores,
    "loss-sigmoid-far-from-zero": UnnormalisedScores,
    "loss-of-two-layers": OneLayerOnly,
    "loss-with-padding": CountsPadding,
    "loss-with-padding-top-1": CountsPadding,
    "loss-of-padding-only": NanForPadding,
    "loss-with-a-prompt": LossTimesTwo,
    "loss-within-sequences": OtherScope,
    "loss-within-packed-sequences": RowsInPlaceOfSequences,
    "loss-with-groups": WithoutGroups,
    "loss-beside-a-bias": MovesTheBiasOnly,
    "loss-with-a-capacity": CountsAfterCapacity,
    "loss-with-padded-capacity": CountsAfterCapacity,
    "loss-of-an-untrained-gate": NanGradient,
    "loss-by-its-coefficient-alone": NoLoss,
    "loss-in-evaluation": LossInEvaluation,
    "micro-batches-even": HalfTheStrength,
    "micro-batches-uneven": CountsPadding,
    "global-batch-even": OtherScope,
    "global-batch-uneven": CountsPadding,
    "global-batch-ends-with-the-step": WithTheStepBefore,
    "micro-batch-two-ranks": WeakerByRanks,
    "global-batch-two-ranks": WeakerByRanks,
    "global-batch-unequal-ranks": EachRankAlone,
    "loss-recomputed-by-the-framework": HalfTheStrength,
    "loss-recomputed-by-torch": HalfTheStrength,
    "global-batch-recomputed": RecomputationTwice,
    "bias-moves": NeverMoves,
    "bias-moves-once-a-step": LastMicroBatchOnly,
    "bias-with-padding": CountsPadding,
    "bias-with-as-many-tokens-as-experts": CountsPadding,
    "bias-beside-evaluation": CountsEveryForward,
    "bias-beside-evaluation-with-gradients": CountsEveryForward,
    "bias-beside-a-rollout": CountsEveryForward,
    "bias-recomputed-by-the-framework": RecomputationTwice,
    "bias-recomputed-reentrantly": RecomputationTwice,
    "bias-recomputed-without-reentry": RecomputationTwice,
    "bias-recomputed-beside-a-rollout": RecomputationTwice,
    "bias-two-ranks": EachRankAlone,
    "bias-two-ranks-without-expert-parallelism": EachRankAlone,
    "bias-unequal-ranks": EachRankAlone,
    "bias-under-ddp": EachRankAlone,
    "bias-with-a-capacity": CountsAfterCapacity,
    "bias-of-many-tokens-in-bfloat16": SixteenBitCounts,
    "bias-of-a-prediction-head": OneLayerOnly,
    "bias-beside-a-stage-without-experts": NeverMoves,
    "bias-at-even-load": MovesAtEvenLoad,
    "bias-in-a-skipped-step": AlwaysApplies,
    "bias-after-a-skipped-step": KeepsSkippedCounts,
    "bias-beside-infinite-gradients": AlwaysApplies,
    "bias-after-a-cast": SixteenBitBias,
    "bias-moves-in-bfloat16": BiasRoundedAtEachStep,
    "bias-after-resuming": LosesTheBias,
    "bias-of-a-model-without-one": MovesByDefault,
    "groups": WithoutGroups,
    "groups-under-negative-biases": ClosedGroupsAtZero,
    "groups-and-the-bias": WithoutGroups,
    "replay": RoutesLive,
    "replay-with-padding": CountsReplayedPadding,
    "imbalance": MetricPlusOne,
    "imbalance-of-two-micro-batches": MetricOfTheLastMicroBatch,
    "imbalance-of-two-ranks": EachRankAlone,
    "imbalance-under-recomputation": MetricOfRecomputation,
    "imbalance-beside-evaluation": MetricOfAllForwards,
}


def verdicts_on_rank(rank, names):
    """By scenario, whether equipoise was right on this rank, and the broken driver."""
    answers = {}
    for name in names:
        problem = SCENARIOS[name].problem
        answers[name] = problem(Equipoise, rank).is_right, problem(BROKEN[name], rank).is_right
        dist.barrier()
    return answers
