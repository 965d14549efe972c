"""Selections: ways to choose experts other than top-k, for comparison. They balance by construction or ignore scores.

    logits of all tokens of a router call  ->  which token goes to which expert, with what weight

A selection is installed in the routers of a model before ``attach``. It only acts inside a forward of the model. A
router that is called by itself behaves as in its family. ``attach`` calls routers in this way to test how they select.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equipoise.balancers import ZLoss
from equipoise.balancers.base import check_bool, check_whole
from equipoise.errors import EquipoiseError, UsageError, suggest
from equipoise.routers.find import find_routers
from equipoise.routing import score
from equipoise_lab.train.balancers import parse_lab_strategy
from equipoise_lab.train.config import TOP_K, Train

__all__ = [
    "ExpertChoice",
    "Hash",
    "Sinkhorn",
    "check_selection",
    "tokens_choose_in_evaluation",
    "evaluation_note",
    "expert_choice",
    "hash_table",
    "install_selection",
    "parse_selection",
    "sinkhorn",
]

SEED = 2106  # of permutations and hash tables; the same in every run, so nothing has to be saved


class Choice(NamedTuple):
    """The assignments of one router call.

    Without ``token_ids``, row t belongs to token t. With them, assignments may be in any order, and ``token_ids`` holds
    the token of each.
    """

    expert_ids: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    token_ids: Int[Tensor, " assignments"] | None = None


class Selection(Protocol):
    """A way to choose experts. Its string consists of ``name`` and the arguments of its constructor."""

    name: str

    def check(self, num_tokens: int, k: int, num_experts: int) -> None:
        """Raises UsageError if the selection does not work for router calls with this many tokens."""

    def choose(
        self, logits: Float[Tensor, "tokens experts"], k: int, layer: int, input_ids: Int[Tensor, " tokens"], vocab: int
    ) -> Choice:
        """The choice of a router call in training. Weights are scores, normalised over the experts of a token."""

    acts_in_evaluation: bool  # whether it also acts in evaluation; otherwise top-k of the scores does
    rows_are_tokens: bool  # whether row t of its choice belongs to token t


# ---- expert choice ----


def _capacity(num_tokens: int, k: int, num_experts: int, chunk: int | None) -> int:
    size = num_tokens if chunk is None else chunk
    if num_tokens % size:
        raise UsageError(
            f"chunk must divide the number of tokens in a router call: got {size} and {num_tokens} (sequences x "
            "sequence length x balance batch). Use a divisor, or leave it out for a single chunk."
        )
    if size * k % num_experts:
        raise UsageError(
            "every expert must take the same number of tokens from a chunk, so tokens * k / experts must be a whole "
            f"number: got {size} * {k} / {num_experts}. Use another chunk, or another number of sequences or experts."
        )
    return size * k // num_experts


def expert_choice(
    scores: Float[Tensor, "tokens experts"], k: int, chunk: int | None = None, shuffled: bool = False
) -> tuple[Int[Tensor, " assignments"], Int[Tensor, " assignments"]]:
    """Expert choice: each expert takes the ``C = N * k / E`` tokens of a chunk that have the highest scores for it.

    N is the number of tokens in a chunk, E the number of experts.

    Returns (token ids, expert ids) of the ``tokens * k`` assignments, sorted by chunk, then expert, then score. Tokens
    are split into chunks in their order. With ``shuffled`` they are permuted first; the permutation is the same for all
    calls with this number of tokens. Between 0 and E experts may take a token. Raises ``UsageError`` if ``chunk`` does
    not divide the number of tokens, or if C is not a whole number.

    The choice leaks: whether a token is taken depends on later tokens of its chunk. How much leaks depends on the size
    of the chunks and on which tokens share one.

    Source: Zhou et al. 2022, arXiv:2202.09368; chunks, shuffling and the leak: Wang et al. 2024,
    arXiv:2408.15664, Section 5.2 and Appendix D.

    >>> expert_choice(torch.tensor([[0.9, 0.8], [0.2, 0.6]]), k=1)  # both experts want token 0
    (tensor([0, 0]), tensor([0, 1]))
    """
    num_tokens, num_experts = scores.shape
    capacity = _capacity(num_tokens, k, num_experts, chunk)
    size = num_tokens if chunk is None else chunk
    order = torch.arange(num_tokens, device=scores.device)
    if shuffled:
        order = torch.randperm(num_tokens, generator=_generator(num_tokens)).to(scores.device)
    by_expert = scores.detach()[order].view(-1, size, num_experts).transpose(1, 2)  # (chunks, experts, tokens)
    positions = by_expert.topk(capacity, dim=-1).indices  # within the chunk
    chunk_starts = torch.arange(0, num_tokens, size, device=scores.device)[:, None, None]
    experts = torch.arange(num_experts, device=scores.device)[None, :, None].expand_as(positions)
    return order[(positions + chunk_starts).reshape(-1)], experts.reshape(-1)


@final
class ExpertChoice:
    """Expert choice in training, top-k of the scores in evaluation.

    Args:
        chunk: number of tokens that compete with each other; default: all tokens of a router call.
        shuffled: assign tokens to chunks by a fixed permutation instead of in their order.

    In training the choice depends on later tokens. In evaluation every token takes its k best experts, which is causal.
    So the loss on the test text is what the model reaches in use. It includes the harm done by training with a leak,
    but not the advantage of the leak itself.

    Weights are the scores of a token's experts, divided by their sum, as the model does with ``norm_topk_prob``. A
    token that one expert takes has weight 1. A token that no expert takes only gets the shared expert. Where we differ
    from the paper: we use sigmoid scores, and the paper does not divide by the sum.
    """

    name = "expert-choice"
    acts_in_evaluation = False
    rows_are_tokens = False

    def __init__(self, chunk: int | None = None, shuffled: bool = False):
        self.chunk = None if chunk is None else check_whole("chunk", chunk, least=1)
        self.shuffled = check_bool("shuffled", shuffled)

    def check(self, num_tokens: int, k: int, num_experts: int) -> None:
        _capacity(num_tokens, k, num_experts, self.chunk)

    def choose(
        self, logits: Float[Tensor, "tokens experts"], k: int, layer: int, input_ids: Int[Tensor, " tokens"], vocab: int
    ) -> Choice:
        scores = score(logits, "sigmoid")
        token_ids, expert_ids = expert_choice(scores, k, self.chunk, self.shuffled)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[token_ids, expert_ids] = True
        weights = _shares(scores, chosen)[token_ids, expert_ids]
        return Choice(expert_ids.view(-1, k), weights.view(-1, k), token_ids)


def _shares(
    scores: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens experts"]:
    chosen_scores = scores * chosen
    return chosen_scores / chosen_scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


# ---- Sinkhorn ----


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "tokens experts"], iterations: int = 20) -> Float[Tensor, "tokens experts"]:
    """``exp(logits)`` with rows and columns scaled in turn, rows first, until rows sum to 1 and columns to T/E.

    T is the number of tokens, E the number of experts. Computed in float64, without gradient. Column sums are exact;
    row sums converge with ``iterations``. The choice leaks: it depends on all tokens of the call, later ones included.

    Source: S-BASE of Clark et al. 2022, arXiv:2202.01169, Section 3, as in ``sinkhorn`` of Megatron-Core. Where we
    differ: a fixed number of iterations instead of a tolerance.
    """
    num_tokens, num_experts = logits.shape
    logits = logits.double()
    matrix = (logits - logits.amax(-1, keepdim=True)).exp()  # a factor per row changes nothing: rows are scaled anyway
    tiny = 1e-150  # the product of two of its inverses is finite
    columns = matrix.new_ones(num_experts)
    rows = matrix.new_ones(num_tokens)
    for _ in range(iterations):
        rows = 1 / (matrix @ columns).clamp_min(tiny)
        columns = num_tokens / num_experts / (rows @ matrix).clamp_min(tiny)
    return rows[:, None] * matrix * columns


@final
class Sinkhorn:
    """Top-k of the Sinkhorn-normalised matrix in training, top-k of the scores in evaluation.

    Args:
        iterations: how often rows and columns are scaled.

    Weights are the scores of the chosen experts, divided by their sum. In training the choice depends on the batch, so
    it leaks; the loss on the test text uses the causal choice. Source: see ``sinkhorn``. Where we differ: sigmoid
    scores and k > 1.
    """

    name = "sinkhorn"
    acts_in_evaluation = False
    rows_are_tokens = True

    def __init__(self, iterations: int = 20):
        self.iterations = check_whole("iterations", iterations, least=1)

    def check(self, num_tokens: int, k: int, num_experts: int) -> None: ...

    def choose(
        self, logits: Float[Tensor, "tokens experts"], k: int, layer: int, input_ids: Int[Tensor, " tokens"], vocab: int
    ) -> Choice:
        return _weighted(logits, sinkhorn(logits.detach(), self.iterations).topk(k, dim=-1).indices)


def _weighted(logits: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens k"]) -> Choice:
    weights = score(logits, "sigmoid").gather(-1, expert_ids)
    return Choice(expert_ids, weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny))


# ---- hash ----


@cache
def hash_table(vocab: int, k: int, num_experts: int, layer: int) -> Int[Tensor, "vocab k"]:
    """The k experts of every token id: distinct, drawn uniformly from a fixed seed, differently for each ``layer``.

    Source: Roller et al. 2021, arXiv:2106.04426, random hashing. Where we differ: k experts per token instead of one.
    """
    draws = torch.rand(vocab, num_experts, generator=_generator(layer), dtype=torch.float64, device="cpu")
    return draws.topk(k, dim=-1).indices


@final
class Hash:
    """The experts of a token are a fixed random function of its token id, in training and in evaluation.

    The router only gives their weights: the scores of these experts, divided by their sum. Source: see ``hash_table``.
    Where we differ: the paper has no weights.
    """

    name = "hash"
    acts_in_evaluation = True
    rows_are_tokens = True

    def check(self, num_tokens: int, k: int, num_experts: int) -> None: ...

    def choose(
        self, logits: Float[Tensor, "tokens experts"], k: int, layer: int, input_ids: Int[Tensor, " tokens"], vocab: int
    ) -> Choice:
        table = hash_table(vocab, k, logits.shape[-1], layer).to(logits.device)
        return _weighted(logits, table[input_ids])


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + number)


# ---- the option ----

SELECTIONS: Mapping[str, Any] = {kind.name: kind for kind in (ExpertChoice, Sinkhorn, Hash)}
OPTIONS: Mapping[str, tuple[str, ...]] = {"expert-choice": ("chunk", "shuffled"), "sinkhorn": ("iterations",)}


def parse_selection(text: str) -> Selection | None:
    """The selection of an option ``--selection``; None for ``top-k``, which is the model's own.

    >>> parse_selection("expert-choice:chunk=256,shuffled=true").chunk
    256
    """
    if text == TOP_K:
        return None
    name, colon, options = text.partition(":")
    if name not in SELECTIONS:
        raise UsageError(
            f"--selection must be one of {TOP_K}, {', '.join(SELECTIONS)}: got {text!r}."
            f"{suggest(name, [TOP_K, *SELECTIONS])} Example: "
            "expert-choice:chunk=1024,shuffled=true"
        )
    known = OPTIONS.get(name, ())
    arguments: dict[str, object] = {}
    for option in options.split(",") if colon else []:
        key, equals, value = option.partition("=")
        if not equals or key not in known or key in arguments:
            raise UsageError(
                f"An option of {name} must be {' or '.join(f'{k}=...' for k in known) or 'left out: it has none'}, "
                f"given once: got {option!r} in {text!r}."
            )
        is_whole = value.isascii() and value.isdigit()
        arguments[key] = value == "true" if value in ("true", "false") else int(value) if is_whole else value
    try:
        return SELECTIONS[name](**arguments)
    except ValueError as error:
        raise UsageError(f"{error} (in {text!r})") from None


def tokens_choose_in_evaluation(text: str) -> bool:
    """Whether tokens choose experts in an evaluation with this ``--selection`` (not experts tokens)."""
    selection = parse_selection(text)
    return selection is None or selection.rows_are_tokens or not selection.acts_in_evaluation


def evaluation_note(text: str) -> str | None:
    """A note on how an evaluation chooses experts, if training does not use top-k of the scores."""
    selection = parse_selection(text)
    if selection is None:
        return None
    if selection.acts_in_evaluation:
        return f"experts are chosen by --selection {text}, as in training"
    return f"experts are chosen by top-k of the scores, as in every evaluation; trained with --selection {text}"


def check_selection(config: Train) -> None:
    """Raises UsageError if the run's selection does not work with its other options."""
    selection = parse_selection(config.selection)
    if selection is None:
        return
    if config.model is not None or config.arch != "glm4_moe":
        raise UsageError(
            f"--selection {config.selection} needs --arch glm4_moe: got "
            f"{config.arch if config.model is None else '--model'}. Leave one of them out."
        )
    if config.score_function == "softmax":
        raise UsageError(
            f"--selection {config.selection} needs sigmoid scores: got --score-function softmax. Leave one of them out."
        )
    for strategy in filter(None, (config.strategy, config.then)):
        if not all(isinstance(balancer, ZLoss) for balancer in parse_lab_strategy(strategy)):
            raise UsageError(
                f"--selection {config.selection} needs the strategy none or z: got {strategy}. A bias does not affect "
                "its choice, and a load-balancing loss would describe choices that it does not make. Use --strategy "
                "none."
            )
    if isinstance(selection, Hash) and config.save_model:
        raise UsageError(
            "--selection hash needs --no-save-model: plain Transformers would route the saved model by top-k of its "
            "scores, which were not trained for that."
        )
    num_tokens = config.sequences * config.balance_batch * config.sequence_length
    selection.check(num_tokens, config.experts_per_token, config.experts)


# ---- installing a selection in a model ----


class _Forward:
    """Holds the token ids of the model's current forward; None outside of a forward."""

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.input_ids = None


class _Layer:
    """State that the router and the experts of one layer share."""

    def __init__(self, selection: Selection, forward: _Forward, number: int, vocab: int):
        self.selection, self.forward, self.number, self.vocab = selection, forward, number, vocab
        self.token_ids: Tensor | None = None  # from the router, until the experts use them


@cache
def _selecting(base: Any) -> Any:
    """A subclass of a router's class, with the same name, that uses the selection inside a forward of the model."""

    def forward(self, hidden):
        layer = self._selection
        logits, weights, expert_ids = base.forward(self, hidden)
        if layer.forward.input_ids is None or not (self.training or layer.selection.acts_in_evaluation):
            return logits, weights, expert_ids
        ids = layer.forward.input_ids.reshape(-1)
        choice = layer.selection.choose(logits, self.top_k, layer.number, ids, layer.vocab)
        layer.token_ids = choice.token_ids
        return logits, choice.weights * self.routed_scaling_factor, choice.expert_ids

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


@cache
def _by_assignment(base: Any) -> Any:
    """A subclass of an experts' class that computes one assignment per row: an expert and a token that it took."""

    def forward(self, hidden, expert_ids, weights):
        layer = self._selection
        token_ids, layer.token_ids = layer.token_ids, None
        if token_ids is None:
            return base.forward(self, hidden, expert_ids, weights)
        output = base.forward(self, hidden[token_ids], expert_ids.reshape(-1, 1), weights.reshape(-1, 1))
        total = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return total.index_add(0, token_ids, output.to(total.dtype)).to(hidden.dtype)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def install_selection(model: nn.Module, text: str) -> None:
    """Installs a selection in the routers of a fresh ``glm4_moe`` model. Call it once, before sharding and attach."""
    selection = parse_selection(text)
    if selection is None:
        return
    forward = _Forward()
    model.register_forward_pre_hook(forward.before, with_kwargs=True)
    model.register_forward_hook(forward.after, always_call=True)
    for number, (name, router, _, *_) in enumerate(find_routers(model)):
        experts = getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None)
        if experts is None or not hasattr(router, "top_k"):
            raise EquipoiseError(
                f"a selection needs the k of {name} and the experts beside it: {type(router).__name__} has another "
                "layout. Use a version of Transformers that constraints.txt names."
            )
        layer = _Layer(selection, forward, number, model.config.vocab_size)  # type: ignore[arg-type]
        for module, subclass in ((router, _selecting), (experts, _by_assignment)):
            module.__dict__["_selection"] = layer
            base: Any = type(module)
            module.__class__ = subclass(base)
