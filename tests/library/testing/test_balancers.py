"""Every balancer of the library conforms, and each known mistake in a balancer fails the invariant it breaks."""

import itertools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from equipoise import Frozen, LoadBalancingLoss, LossFree
from equipoise.balancers import Balancer, Quantile, ZLoss, parse_strategy
from equipoise.balancers.loss_free import RULES
from equipoise.balancers.strategy import BALANCERS
from equipoise.testing import BALANCER_INVARIANTS, ConformanceError, check_balancer

BIAS = {
    "bias is the state",
    "float64 stays",
    "resumes from its state",
    "finite",
    "huge counts",
    "no tokens move nothing",
    "layers do not mix",
    "experts permute",
    "deterministic",
    "any division of the tokens",
    "masked tokens do not matter",
    "moves against the load",
}
SLOPES = {"loss slopes"}
LOSS = {name for name in BALANCER_INVARIANTS if name.startswith("loss ")} - SLOPES
ANY = {"specification", "copies", "strategy string", "inputs unchanged", "no host synchronisation"}
EVEN, STATISTIC = {"even load moves nothing"}, {"statistic"}
LOSS_FREE, QUANTILE = ANY | BIAS | EVEN, ANY | BIAS | STATISTIC

LIBRARY_BALANCERS = {
    **{
        f"loss-free:rate=0.01,rule={rule},center={center}": LOSS_FREE
        for rule, center in itertools.product(RULES, ("true", "false"))
    },
    "loss-free": LOSS_FREE,
    "loss-free:rate=0.01,rule=sign,scope=micro_batch": LOSS_FREE | STATISTIC,
    "loss-free:rate=0.01,rule=sign,center=false,scope=micro_batch": LOSS_FREE | STATISTIC,
    "loss-free:rate=0.02,rule=sign,schedule=linear,zero_from=20": LOSS_FREE,
    "loss-free:rate=0.02,schedule=drop,zero_from=10": LOSS_FREE,
    "loss-free:rate=0.01,rule=momentum,momentum=0.9,sharpness=5": LOSS_FREE,
    **{f"quantile:bins={bins}": QUANTILE for bins in (128, 256)},
    **{f"quantile:bins={bins},ema=0.5,fraction=0.5": QUANTILE for bins in (128, 256)},
    "quantile:bins=0": QUANTILE - {"huge counts"},
    "quantile:bins=0,fraction=0.5": QUANTILE - {"huge counts"},
    **{
        f"lbl:scope={scope},normalise={normalise}": ANY | LOSS | SLOPES
        for scope, normalise in itertools.product(("sequence", "micro_batch", "global_batch"), ("true", "false"))
    },
    "lbl:coefficient=0.5,pooling=previous": ANY | LOSS | SLOPES,
    "z:coefficient=0.1": ANY | LOSS,
    "frozen": ANY | {"bias is the state", "float64 stays"},
}


def test_every_registered_balancer_is_listed():
    assert {type(parse_strategy(text)[0]) for text in LIBRARY_BALANCERS} == set(BALANCERS.values())
    assert {*BIAS, *LOSS, *SLOPES, *ANY, *EVEN, *STATISTIC} == set(BALANCER_INVARIANTS)


@pytest.mark.parametrize("strategy", LIBRARY_BALANCERS)
def test_the_balancers_of_the_library_conform(strategy):
    assert set(check_balancer(lambda: parse_strategy(strategy)[0])) == LIBRARY_BALANCERS[strategy]


# ---- custom balancers ----


class AllHooks(Balancer):
    """Has every hook: bias, state, statistic, loss."""

    name, metric, coefficient = "sound", "sound_loss", 0.1

    def __init__(self, rate=1e-2):
        self.rate = rate

    def prepare(self, layers):
        self._bias = layers.bias.clone()
        self._momentum = torch.zeros_like(self._bias)

    def bias(self):
        return self._bias

    def state(self):
        return {"momentum": self._momentum}

    def statistic(self, routing, row):
        """How many unmasked tokens score each expert highest."""
        counted = 1 if routing.mask is None else (routing.mask != 0).long()[:, None]
        best = (routing.scores.detach() + self._bias[row]).argmax(-1)
        return (F.one_hot(best, routing.scores.shape[-1]) * counted).sum(0)

    def error(self, load):
        return (load.sum(-1, keepdim=True) - load.shape[-1] * load).sign()

    def update(self, load, statistic=None, window=0):
        step = self.error(load) + 0.5 * self.error(torch.stack(list(statistic)))
        self._momentum.mul_(0.5).add_(step.to(self._bias.dtype), alpha=self.rate)
        self._bias.add_(self._momentum)

    def loss(self, routing, load):
        p = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(1e-30)
        mask = torch.ones_like(p[:, 0]) if routing.mask is None else routing.mask.to(p)
        share = load.to(p) / load.sum().clamp_min(1)
        return load.numel() * ((p * mask[:, None]).sum(0) * share).sum() / mask.sum().clamp_min(1)


class LoadOnly(Balancer):
    """Moves a bias by the load alone."""

    def __init__(self, rate=1e-2):
        self.rate = rate

    def prepare(self, layers):
        self._bias = layers.bias.clone()

    def bias(self):
        return self._bias

    def error(self, load):
        return (load.sum(-1, keepdim=True) - load.shape[-1] * load).sign()

    @torch.no_grad()
    def update(self, load, statistic=None, window=0):
        self._bias.add_(self.error(load).to(self._bias.dtype), alpha=self.rate)


class LossOnly(Balancer):
    """Has a loss only."""

    scope = "token"

    def __init__(self, coefficient=0.1):
        self.coefficient = coefficient

    def loss(self, routing, load):
        z = routing.logits.to(torch.promote_types(routing.logits.dtype, torch.float32))
        if routing.mask is not None:
            z = z * routing.mask.to(z)[:, None]
        return z.square().mean(-1).sum() / self.tokens(routing)

    def tokens(self, routing):
        return max(len(routing.logits), 1) if routing.mask is None else routing.mask.sum().clamp_min(1)


class Factor(LoadOnly):
    """Its bias is a factor."""

    multiplies = True

    @torch.no_grad()
    def update(self, load, statistic=None, window=0):
        super().update(load)
        self._bias.clamp_(min=-1)


class Gathering(AllHooks):
    """Its statistics have one row per token."""

    gathers = True

    def statistic(self, routing, row):
        best = F.one_hot(routing.scores.detach().argmax(-1), routing.scores.shape[-1]).float()
        return best if routing.mask is None else best * routing.mask[:, None]

    def update(self, load, statistic=None, window=0):
        super().update(load, [rows.long().sum(0) for rows in statistic])


class HalfOfTheTokens(AllHooks):
    """Counts half of the tokens. Which half depends on the order of the experts."""

    def statistic(self, routing, row):
        weights = torch.arange(1, 1 + routing.scores.shape[-1], device=routing.scores.device)
        drawn = ((routing.scores.detach() * 1e5).long() * weights).sum(-1) % 2
        mask = drawn.float() if routing.mask is None else routing.mask * drawn
        return super().statistic(routing._replace(mask=mask), row)


@pytest.mark.parametrize(
    ("balancer", "checked"),
    [
        (HalfOfTheTokens, ANY | BIAS | STATISTIC | LOSS),
        (AllHooks, ANY | BIAS | STATISTIC | LOSS),
        (Gathering, (ANY | BIAS | STATISTIC | LOSS) - {"huge counts"}),
        (LoadOnly, LOSS_FREE),
        (Factor, LOSS_FREE),
        (LossOnly, ANY | LOSS),
    ],
)
def test_a_custom_balancer_conforms(balancer, checked):
    assert set(check_balancer(balancer)) == checked


# ---- broken balancers ----


class MovesAnotherTensor(LoadOnly):
    def update(self, load, statistic=None, window=0):
        self._bias = self._bias + self.rate * self.error(load)


class KeepsTheLayerBias(LoadOnly):
    def prepare(self, layers):
        self._bias = layers.bias


class StartsAtZero(LoadOnly):
    def prepare(self, layers):
        self._bias = torch.zeros_like(layers.bias)


class HasAGradient(LoadOnly):
    def prepare(self, layers):
        self._bias = layers.bias.clone().requires_grad_()


class ReturnsACopy(LoadOnly):
    def bias(self):
        return self._bias.clone()


class AlwaysFloat32(LoadOnly):
    def prepare(self, layers):
        self._bias = layers.bias.float().clone()


class SharesTheClass(LoadOnly):
    biases: ClassVar[dict] = {}

    def prepare(self, layers):
        self._bias = self.biases.setdefault(layers.score_function, layers.bias.clone())


class CountsInInt32(LoadOnly):
    def error(self, load):
        load = load.int()
        return (load.sum(-1, keepdim=True, dtype=torch.int32) - load.shape[-1] * load).sign()


class OneMeanForAllLayers(LoadOnly):
    def error(self, load):
        return (load.sum() - load.numel() * load).sign()


class Reversed(LoadOnly):
    def error(self, load):
        return -super().error(load)


class NeverMoves(LoadOnly):
    def update(self, load, statistic=None, window=0):
        pass


class DividesByTheLoad(LoadOnly):
    def error(self, load):
        return 1 - load / load.double().mean(-1, keepdim=True)


class NoErrorIsAboveZero(LoadOnly):
    def error(self, load):
        return (load.double() <= load.double().mean(-1, keepdim=True) * (1 + 1e-9)).double() - (
            torch.arange(load.shape[-1]) == 0
        ).double()


class FirstExpertOnlyFalls(LoadOnly):
    def error(self, load):
        error = super().error(load)
        error[:, 0].clamp_(max=0)
        return error


class HalfOfTheTokensAndFirstExpertOnlyFalls(HalfOfTheTokens):
    def error(self, load):
        error = super().error(load)
        error[:, 0].clamp_(max=0)
        return error


class OnlyTheFirstTokens(AllHooks):
    def statistic(self, routing, row):
        mask = torch.ones(len(routing.logits)) if routing.mask is None else routing.mask
        return super().statistic(routing._replace(mask=mask * (mask.cumsum(0) < 9)), row)


class DrawsAtRandom(LoadOnly):
    def error(self, load):
        return super().error(load) * torch.rand(load.shape)


class DrawsFromItsOwnGenerator(LoadOnly):
    generator = torch.Generator()

    def error(self, load):
        return super().error(load) * (1 + torch.rand(load.shape[:1] + (1,), generator=self.generator))


class RemembersTheLastWindow(LoadOnly):
    before = 0

    def error(self, load):
        error, self.before = super().error(load) + self.before, super().error(load)
        return error


class CountsItsWindows(LoadOnly):
    windows = 0

    def error(self, load):
        self.windows += 1
        return super().error(load) / self.windows


class ChangesTheLoad(LoadOnly):
    def error(self, load):
        return load.mul_(-load.shape[-1]).sub_(load.sum(-1, keepdim=True) // load.shape[-1]).sign()


class BelowZero(Factor):
    def update(self, load, statistic=None, window=0):
        self._bias.add_(self.error(load), alpha=0.7)


class ObjectAsAnOption(LoadOnly):
    def __init__(self, rate=1e-2, rule=None):
        self.rate, self.rule = rate, rule or object()


class KeepsALambda(LoadOnly):
    def prepare(self, layers):
        super().prepare(layers)
        self.function = lambda: None


class CopiesAreTheSame(LoadOnly):
    def __deepcopy__(self, memo):
        return self if hasattr(self, "_bias") else type(self)(self.rate)


class IgnoresTheMask(AllHooks):
    def statistic(self, routing, row):
        return super().statistic(routing._replace(mask=None), row)


class UsesTheBiasOfTheFirstLayer(AllHooks):
    def statistic(self, routing, row):
        return super().statistic(routing, 0)


class ForgetsItsMomentum(AllHooks):
    def state(self):
        return {}


class StatisticInFloats(AllHooks):
    def statistic(self, routing, row):
        return super().statistic(routing, row).float()


class StatisticInOneBuffer(AllHooks):
    def statistic(self, routing, row):
        counts = super().statistic(routing, row)
        self.buffer = counts if not hasattr(self, "buffer") else self.buffer.copy_(counts)
        return self.buffer


class NoStatisticWithoutTokens(AllHooks):
    def statistic(self, routing, row):
        return super().statistic(routing, row) if len(routing.logits) else None


class ShapeOfTheCall(AllHooks):
    def statistic(self, routing, row):
        return routing.expert_ids.clone()


class ShareOfTheCall(AllHooks):
    def statistic(self, routing, row):
        counts = super().statistic(routing, row)
        return counts * 1000 // counts.sum().clamp_min(1)


class ChangesTheScores(AllHooks):
    def statistic(self, routing, row):
        routing.scores.detach().add_(self._bias[row] + 1)
        return super().statistic(routing._replace(scores=routing.scores - self._bias[row]), row)


class CountsByItem(AllHooks):
    def statistic(self, routing, row):
        counts = super().statistic(routing, row)
        return counts if counts.sum().item() >= 0 else -counts


class CountsByBincount(LoadOnly):
    def error(self, load):
        return torch.stack([torch.bincount(row, minlength=1)[:1] for row in load]) * 0 + super().error(load)


class IndexesByAMask(LoadOnly):
    def error(self, load):
        error = super().error(load)
        error[load == 0] = error[load == 0] + 0
        return error


class CopiesFromTheHost(LoadOnly):
    def error(self, load):
        return super().error(load) * torch.arange(load.shape[-1]).clamp(1, 1).to(load.device)


class TensorOfPythonNumbers(LoadOnly):
    def error(self, load):
        return super().error(load) * torch.tensor([1] * load.shape[-1], device=load.device)


class ReadsOnTheHost(LoadOnly):
    def error(self, load):
        return super().error(load.cpu()).to(load.device)


class SynchronisesInTheLoss(AllHooks):
    def loss(self, routing, load):
        return super().loss(routing, load) if float(load.sum()) else routing.logits.sum() * 0


class LossOfMaskedTokens(AllHooks):
    def loss(self, routing, load):
        return super().loss(routing._replace(mask=None), load)


class SoftmaxOverTokens(AllHooks):
    def loss(self, routing, load):
        return super().loss(routing._replace(scores=routing.logits.float().softmax(0)), load)


class HalfOfTheGradient(AllHooks):
    def loss(self, routing, load):
        return super().loss(routing._replace(scores=(routing.scores + routing.scores.detach()) / 2), load)


class LossTimesDetachedLoss(LossOnly):
    def loss(self, routing, load):
        value = super().loss(routing, load)
        return value * value.detach()


class LossIsASum(LossOnly):
    def tokens(self, routing):
        return 1.0


class LossWithoutTokensIsNan(LossOnly):
    def tokens(self, routing):
        return len(routing.logits) if routing.mask is None else routing.mask.sum()


class LossWithTheCoefficient(LossOnly):
    def loss(self, routing, load):
        return self.coefficient * super().loss(routing, load)


class SlopesOfTheLoads(LossOnly):
    """They are not shares: as large as the counts."""

    def slopes(self, load):
        return load.double()


class LossThroughTheWeights(AllHooks):
    def loss(self, routing, load):
        return super().loss(routing, load) + routing.weights.mean() * (len(routing.logits) > 0)


class LossWithoutGradient(AllHooks):
    def loss(self, routing, load):
        return super().loss(routing._replace(scores=routing.scores.detach()), load)


class LossIn16Bits(LossOnly):
    def loss(self, routing, load):
        return super().loss(routing, load).to(routing.logits.dtype)


class LossOfTheFirstExpertOnly(LossOnly):
    def loss(self, routing, load):
        return super().loss(routing._replace(logits=routing.logits[:, :1]), load)


class LossIsAVector(LossOnly):
    def loss(self, routing, load):
        return super().loss(routing, load)[None]


class LossOfExponentials(LossOnly):
    def loss(self, routing, load):
        return super().loss(routing._replace(logits=routing.logits.exp()), load)


class ChangesTheLogits(LossOnly):
    def loss(self, routing, load):
        value = super().loss(routing, load)
        routing.logits.data.mul_(2)
        return value


class UnknownScope(LossOnly):
    scope = "batch"


BROKEN = [
    (MovesAnotherTensor, "bias is the state", "not moved in place"),
    (KeepsTheLayerBias, "bias is the state", "LayerStack.bias itself was moved"),
    (StartsAtZero, "bias is the state", "at the start"),
    (HasAGradient, "bias is the state", "bias requires a gradient"),
    (ReturnsACopy, "bias is the state", "another tensor"),
    (AlwaysFloat32, "float64 stays", "torch.float32 at the start"),
    (SharesTheClass, "specification", "of another copy that was not used"),
    (UnknownScope, "specification", "scope 'batch'"),
    (ObjectAsAnOption, "strategy string", "object at 0x"),
    (KeepsALambda, "copies", "copied by pickle"),
    (CopiesAreTheSame, "copies", "of the original, while only the copy was used"),
    (CountsInInt32, "huge counts", "times"),
    (OneMeanForAllLayers, "layers do not mix", "when another layer changed"),
    (UsesTheBiasOfTheFirstLayer, "layers do not mix", "layer 1"),
    (Reversed, "moves against the load", "seed 13"),
    (NeverMoves, "moves against the load", "the busiest by [0.0, 0.0]"),
    (DividesByTheLoad, "no tokens move nothing", "nan"),
    (DividesByTheLoad, "finite", "window no tokens"),
    (NoErrorIsAboveZero, "even load moves nothing", "7 for every expert"),
    (FirstExpertOnlyFalls, "experts permute", "order ["),
    (HalfOfTheTokensAndFirstExpertOnlyFalls, "experts permute", "order ["),
    (OnlyTheFirstTokens, "any division of the tokens", "compared with one call"),
    (DrawsAtRandom, "deterministic", "the global generator was used"),
    (DrawsFromItsOwnGenerator, "deterministic", "after three windows"),
    (RemembersTheLastWindow, "resumes from its state", "a new copy"),
    (CountsItsWindows, "resumes from its state", "a new copy"),
    (ForgetsItsMomentum, "resumes from its state", "a new copy"),
    (ChangesTheLoad, "inputs unchanged", "hook update"),
    (ChangesTheScores, "inputs unchanged", "hook statistic"),
    (ChangesTheLogits, "inputs unchanged", "hook loss"),
    (BelowZero, "finite", "a factor of -"),
    (IgnoresTheMask, "masked tokens do not matter", "with masked tokens"),
    (StatisticInFloats, "statistic", "torch.float32, whose sums may round"),
    (StatisticInOneBuffer, "statistic", "the same memory"),
    (NoStatisticWithoutTokens, "statistic", "None"),
    (ShapeOfTheCall, "statistic", "statistic of the shapes"),
    (ShareOfTheCall, "any division of the tokens", "divided into"),
    (CountsByItem, "no host synchronisation", "hook statistic"),
    (CountsByBincount, "no host synchronisation", "bincount"),
    (IndexesByAMask, "no host synchronisation", "hook update"),
    (CopiesFromTheHost, "no host synchronisation", "copies between host and device"),
    (TensorOfPythonNumbers, "no host synchronisation", "tensor of Python numbers"),
    (ReadsOnTheHost, "no host synchronisation", "hook update"),
    (SynchronisesInTheLoss, "no host synchronisation", "hook loss and its backward"),
    (LossOfMaskedTokens, "loss of masked tokens", "a gradient at masked tokens"),
    (SoftmaxOverTokens, "loss is a mean over tokens", "tokens of a part"),
    (SoftmaxOverTokens, "loss dtype", "torch.float32, not torch.float64"),
    (HalfOfTheGradient, "loss derivative", "seed of the direction 0"),
    (LossTimesDetachedLoss, "loss derivative", "by differences"),
    (LossIsASum, "loss is a mean over tokens", "from the parts"),
    (LossWithoutTokensIsNan, "loss finite", "a loss of nan"),
    (LossWithTheCoefficient, "loss without its coefficient", "coefficient 1.3"),
    (SlopesOfTheLoads, "loss slopes", "by its slopes"),
    (LossThroughTheWeights, "loss gradient by the logits only", "a gradient through routing.weights"),
    (LossWithoutGradient, "loss gradient by the logits only", "a loss without a gradient"),
    (LossIn16Bits, "loss dtype", "torch.bfloat16, not torch.float32"),
    (LossOfTheFirstExpertOnly, "loss permutes", "in the first order"),
    (LossIsAVector, "loss finite", "not a scalar tensor"),
    (LossOfExponentials, "loss finite", "a loss of inf"),
]


@pytest.mark.parametrize(
    ("balancer", "invariant", "message_part"), BROKEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_balancer_fails_the_invariant_it_breaks(balancer, invariant, message_part):
    SharesTheClass.biases.clear()
    with pytest.raises(ConformanceError) as error:
        check_balancer(balancer, only=invariant)
    message = str(error.value)
    assert message.startswith(f"{invariant}: ") and message.endswith(".")
    assert " must " in message.partition(" Got: ")[0] or " may " in message.partition(" Got: ")[0]
    assert message_part in message.partition(" Got: ")[2]
    assert "score function s" in message


def test_every_invariant_can_fail():
    assert {invariant for _, invariant, _ in BROKEN} == set(BALANCER_INVARIANTS)


# ---- arguments and errors ----


@pytest.mark.parametrize("invariant", BALANCER_INVARIANTS)
def test_only_checks_one_invariant(invariant):
    assert check_balancer(Frozen, only=invariant) in ((), (invariant,))


def test_the_first_failure_is_raised_and_score_functions_can_be_chosen():
    with pytest.raises(ConformanceError, match="^bias is the state: "):
        check_balancer(MovesAnotherTensor)

    class ForSoftmax(LoadOnly):
        def prepare(self, layers):
            if layers.score_function != "softmax":
                raise ValueError("softmax only")
            super().prepare(layers)

    with pytest.raises(ConformanceError, match="ValueError: softmax only; with score function sigmoid"):
        check_balancer(ForSoftmax, only="bias is the state", score_functions=("softmax", "sigmoid"))
    assert check_balancer(ForSoftmax, only="bias is the state", score_functions=("softmax",)) == ("bias is the state",)


def test_a_failure_carries_its_cause():
    with pytest.raises(ConformanceError) as error:
        check_balancer(CountsByItem, only="no host synchronisation")
    assert isinstance(error.value, AssertionError) and isinstance(error.value.__cause__, RuntimeError)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="only must be one of specification, .*: got 'speed'"):
        check_balancer(LossFree, only="speed")
    for chosen in ([], "sigmoid"):
        with pytest.raises(ValueError, match="score_functions must be a list of one or more of softmax, .*: got"):
            check_balancer(LossFree, score_functions=chosen)
    with pytest.raises(ValueError, match="score_functions must be one of softmax, .*: got 'softmx'"):
        check_balancer(LossFree, score_functions=["softmx"])
    with pytest.raises(TypeError, match="factory must make a Balancer: got str"):
        check_balancer(lambda: "loss-free")


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for balancer in (LossFree, Quantile, LoadBalancingLoss, ZLoss):
        check_balancer(balancer, score_functions=("softmax",))
    assert torch.equal(torch.get_rng_state(), before)
