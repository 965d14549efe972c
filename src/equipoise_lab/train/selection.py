"""Other ways to choose experts than top-k of the scores, for comparison: they balance by construction, or need no gate.

logits of a router call, all of its tokens at once -> which token goes to which expert, with what weight

A selection is installed under the routers of a model before anything is attached. It acts inside a forward of the model
only. A router that is called by itself, as ``attach`` calls it to prove how it selects, is the family's own.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equipoise.balancers import ZLoss
from equipoise.balancers.base import check_bool, check_whole
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import find_routers
from equipoise.routing import score
from equipoise_lab.train.balancers import parse_lab_strategy
from equipoise_lab.train.config import TOP_K, Train

__all__ = [
    "ExpertChoice",
    "Hash",
    "Sinkhorn",
    "check_selection",
    "evaluates_by_token",
    "evaluation_note",
    "expert_choice",
    "hash_table",
    "install_selection",
    "parse_selection",
    "sinkhorn",
]

SEED = 2106  # of permutations and hash tables: the same in every run, so that nothing has to be saved


class Choice(NamedTuple):
    """What a selection made of one router call. Without ``token_ids`` row t is of token t; with them the slots are in
    any order, and slot by slot they say whose it is."""

    expert_ids: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    token_ids: Int[Tensor, " slots"] | None = None


class Selection(Protocol):
    """How experts are chosen. ``name`` and the arguments of the constructor are what its string is made of."""

    name: str

    def check(self, num_tokens: int, k: int, num_experts: int) -> None:
        """Raises UsageError where it cannot be, for router calls of this many tokens."""

    def choose(
        self, logits: Float[Tensor, "tokens experts"], k: int, layer: int, input_ids: Int[Tensor, " tokens"], vocab: int
    ) -> Choice:
        """The choice of a router call in training; weights are scores, normalised over a token's experts."""

    in_evaluation: bool  # whether it chooses there too; else top-k of the scores does
    by_token: bool  # whether row t of its choice is of token t


# ---- expert choice ----


def _capacity(num_tokens: int, k: int, num_experts: int, chunk: int | None) -> int:
    size = num_tokens if chunk is None else chunk
    if num_tokens % size:
        raise UsageError(
            f"chunk must divide the tokens of a router call: got {size} of {num_tokens} (sequences x sequence length x "
            "balance batch). Take a divisor, or leave it out for one chunk."
        )
    if size * k % num_experts:
        raise UsageError(
            "every expert must take equally many tokens of a chunk, a whole number tokens * k / experts: got "
            f"{size} * {k} / {num_experts}. Take another chunk, or another number of sequences or experts."
        )
    return size * k // num_experts


def expert_choice(
    scores: Float[Tensor, "tokens experts"], k: int, chunk: int | None = None, shuffled: bool = False
) -> tuple[Int[Tensor, " slots"], Int[Tensor, " slots"]]:
    """Each expert takes the ``C = N * k / E`` tokens of a chunk of N tokens with the highest score for it.

    Returns (token ids, expert ids) of the ``tokens * k`` slots, sorted by chunk, then expert, then score. Tokens are
    cut into chunks in their order, or, ``shuffled``, in the order of one permutation, the same for every call with that
    many tokens. A token may be taken by 0 to E experts. Raises ``UsageError`` where ``chunk`` does not divide the
    tokens or C is not whole.

    The choice leaks: whether a token is taken depends on the later tokens of its chunk. How much leaks depends on the
    size of the chunks and on whose tokens are in one.

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
    places = by_expert.topk(capacity, dim=-1).indices
    begins = torch.arange(0, num_tokens, size, device=scores.device)[:, None, None]
    experts = torch.arange(num_experts, device=scores.device)[None, :, None].expand_as(places)
    return order[(places + begins).reshape(-1)], experts.reshape(-1)


@final
class ExpertChoice:
    """Expert choice in training, top-k of the scores in evaluation.

    Args:
        chunk: tokens that compete with each other; default all of a router call.
        shuffled: put tokens into chunks by a fixed permutation instead of in their order.

    In training the choice looks at later tokens. In evaluation every token takes its k best experts, which is causal:
    the test text's loss is that of the model as it could be used, with the gap that the leak left, not of the leak.

    Weights are the plain scores of a token's experts, divided by their sum, as the model does with
    ``norm_topk_prob``; a token that one expert took has weight 1, one that none took gets the shared expert alone.
    Where we differ from the paper: sigmoid scores, and it does not divide.
    """

    name = "expert-choice"
    in_evaluation = False
    by_token = False

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
    kept = scores * chosen
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


# ---- Sinkhorn ----


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "tokens experts"], iterations: int = 20) -> Float[Tensor, "tokens experts"]:
    """``exp(logits)`` with rows and columns scaled in turn, rows first, so that rows sum to 1 and columns to T/E.

    float64, without gradient. Columns are exact, rows as far as ``iterations`` go. What is chosen depends on all tokens
    of the call, later ones too: it leaks.

    Source: S-BASE of Clark et al. 2022, arXiv:2202.01169, Section 3, as in Megatron-Core's ``sinkhorn``. Where we
    differ: a number of iterations instead of a tolerance.
    """
    num_tokens, num_experts = logits.shape
    logits = logits.double()
    matrix = (logits - logits.amax(-1, keepdim=True)).exp()  # a factor of the row, which rows are free of
    tiny = 1e-150  # its inverse times that of another is finite
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
        iterations: scalings of rows and of columns.

    Weights are the plain scores of the chosen experts, divided by their sum. The choice depends on the batch, so in
    training it leaks; the test text's loss is that of the causal choice. Source: see ``sinkhorn``. Where we differ:
    sigmoid scores and k > 1.
    """

    name = "sinkhorn"
    in_evaluation = False
    by_token = True

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
    """The k experts of every token id in ``layer``: distinct, drawn uniformly from a fixed seed, by layer another draw.

    Source: Roller et al. 2021, arXiv:2106.04426, random hashing. Where we differ: k experts a token, not one.
    """
    draws = torch.rand(vocab, num_experts, generator=_generator(layer), dtype=torch.float64, device="cpu")
    return draws.topk(k, dim=-1).indices


@final
class Hash:
    """The experts of a token are a fixed random function of its token id, in training and in evaluation.

    The gate only weighs them: plain scores of these experts, divided by their sum. Source: see ``hash_table``. Where we
    differ: the paper has no weights.
    """

    name = "hash"
    in_evaluation = True
    by_token = True

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
    """What ``--selection`` names; None for ``top-k``, the model's own.

    >>> parse_selection("expert-choice:chunk=256,shuffled=true").chunk
    256
    """
    if text == TOP_K:
        return None
    name, colon, options = text.partition(":")
    if name not in SELECTIONS:
        raise UsageError(
            f"--selection must be one of {TOP_K}, {', '.join(SELECTIONS)}: got {text!r}. Example: "
            "expert-choice:chunk=1024,shuffled=true"
        )
    known = OPTIONS.get(name, ())
    arguments: dict[str, object] = {}
    for option in options.split(",") if colon else []:
        key, equals, value = option.partition("=")
        if not equals or key not in known or key in arguments:
            raise UsageError(
                f"An option of {name} must be {' or '.join(f'{k}=...' for k in known) or 'left out: it has none'}, "
                f"once: got {option!r} in {text!r}."
            )
        whole = value.isascii() and value.isdigit()
        arguments[key] = value == "true" if value in ("true", "false") else int(value) if whole else value
    try:
        return SELECTIONS[name](**arguments)
    except ValueError as error:
        raise UsageError(f"{error} (in {text!r})") from None


def evaluates_by_token(text: str) -> bool:
    """Whether an evaluation under ``--selection text`` gives every token its own k experts."""
    selection = parse_selection(text)
    return selection is None or selection.by_token or not selection.in_evaluation


def evaluation_note(text: str) -> str | None:
    """What to know of the choice in an evaluation where training chooses otherwise than by the scores."""
    selection = parse_selection(text)
    if selection is None:
        return None
    if selection.in_evaluation:
        return f"chosen by --selection {text}, as in training"
    return f"chosen by top-k of the scores, as in every evaluation; trained with --selection {text}"


def check_selection(config: Train) -> None:
    """Raises UsageError where the run's selection cannot be."""
    selection = parse_selection(config.selection)
    if selection is None:
        return
    if config.model is not None or config.arch != "glm4_moe":
        raise UsageError(
            f"--selection {config.selection} must go with --arch glm4_moe: got "
            f"{config.arch if config.model is None else '--model'}. Leave one of them out."
        )
    if config.score_function == "softmax":
        raise UsageError(
            f"--selection {config.selection} must go with sigmoid scores: got --score-function softmax. Leave one of them out."
        )
    for strategy in filter(None, (config.strategy, config.then)):
        if not all(isinstance(balancer, ZLoss) for balancer in parse_lab_strategy(strategy)):
            raise UsageError(
                f"--selection {config.selection} must go with the strategy none or z: got {strategy}. No bias moves "
                "its choice, and a load-balancing loss would be about choices that it does not make. Give --strategy "
                "none."
            )
    if isinstance(selection, Hash) and config.save_model:
        raise UsageError(
            "--selection hash must go with --no-save-model: plain Transformers would route the saved model by top-k of "
            "its scores, which were not trained for that."
        )
    num_tokens = config.sequences * config.balance_batch * config.sequence_length
    selection.check(num_tokens, config.experts_per_token, config.experts)


# ---- under the routers of a model ----


class _Forward:
    """The token ids of the model's forward under way; None outside of one."""

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.input_ids = None


class _Layer:
    """What the router and the experts of one layer share."""

    def __init__(self, selection: Selection, forward: _Forward, number: int, vocab: int):
        self.selection, self.forward, self.number, self.vocab = selection, forward, number, vocab
        self.token_ids: Tensor | None = None  # of the slots that the router gave and the experts have not taken yet


@cache
def _selecting(base: Any) -> Any:
    """A subclass of a router's class, of the same name, that selects otherwise inside a forward of the model."""

    def forward(self, hidden):
        layer = self._selection
        logits, weights, expert_ids = base.forward(self, hidden)
        if layer.forward.input_ids is None or not (self.training or layer.selection.in_evaluation):
            return logits, weights, expert_ids
        ids = layer.forward.input_ids.reshape(-1)
        choice = layer.selection.choose(logits, self.top_k, layer.number, ids, layer.vocab)
        layer.token_ids = choice.token_ids
        return logits, choice.weights * self.routed_scaling_factor, choice.expert_ids

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


@cache
def _taking_slots(base: Any) -> Any:
    """A subclass of an experts' class that computes slot by slot, each an expert and whatever token it took."""

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
    """Puts a selection under the routers of a fresh ``glm4_moe`` model, once, before it is sharded and attached."""
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
                f"a selection must find experts beside {name}, and its k: {type(router).__name__} is of another "
                "version of Transformers. Take a version that constraints.txt names."
            )
        layer = _Layer(selection, forward, number, model.config.vocab_size)  # type: ignore[arg-type]
        for module, changed in ((router, _selecting), (experts, _taking_slots)):
            module.__dict__["_selection"] = layer
            base: Any = type(module)
            module.__class__ = changed(base)
