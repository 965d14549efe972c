"""What a run is asked to be: one dataclass a command, for the command line and for Python. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equipoise.errors import UsageError

__all__ = ["ARCHITECTURES", "TOP_K", "Compare", "Train"]

TOP_K = "top-k"  # the selection that models have by themselves
ARCHITECTURES = ("glm4_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3")
SCORE_FUNCTIONS = dict.fromkeys(ARCHITECTURES, "softmax") | {"glm4_moe": "sigmoid", "deepseek_v3": "sigmoid"}
Architecture = Literal["glm4_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3"]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all strategies of a comparison have in common."""

    out: Path
    """Folder for everything that comes out. It must be empty, or new, unless --resume."""

    arch: Architecture = "glm4_moe"
    """Transformers architecture, built small from a config.
    glm4_moe, deepseek_v3: sigmoid scores, shared expert, bias slot.
    qwen3_moe, olmoe, mixtral: softmax scores."""

    qk_norm: bool = False
    """Norms on the queries and keys of glm4_moe's attention: a lower loss, and seeds differ less.
    qwen3_moe and olmoe always have them; mixtral and deepseek_v3 never."""

    score_function: Literal["auto", "softmax", "sigmoid"] = "auto"
    """Gate of the routers of glm4_moe, whose own is sigmoid: softmax starts from the same weights.
    auto: that of the architecture. No saved model routes by softmax: it needs --no-save-model."""

    model: Path | None = None
    """Folder of a Transformers model to train instead of --arch: its weights if it has any, else its config.
    --layers, --width, --experts and the like are then the model's own."""

    data: str = "corpus"
    """Text: "corpus" (eight domains, inside the package), or your own.
    A folder: one file or one sub-folder a domain, .txt, .jsonl or .parquet, each also .xz.
    Documents: blocks between blank lines of a .txt; files of a sub-folder; "text" of a line or row.
    Or one file, or the name of a data set that the library datasets resolves.
    A domain needs at least four documents, some of which are held out."""

    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one. By default a byte-level BPE is trained on the training text."""

    vocab_size: int = 2048
    """Tokens of the BPE that is trained."""

    steps: int = 80
    """Optimizer steps."""

    layers: int = 3
    """Transformer layers, all of them mixture-of-experts."""

    width: int = 128
    """Hidden size; a multiple of 32."""

    experts: int = 32
    """Routed experts a layer."""

    experts_per_token: int = 4
    """Experts a token, k."""

    expert_width: int = 64
    """Hidden size of an expert."""

    sequence_length: int = 128
    """Tokens a sequence."""

    sequences: int = 8
    """Sequences a micro-batch. All of one domain, unless --shuffled."""

    micro_batches: int = 8
    """Micro-batches a step, of all ranks together (gradient accumulation); a multiple of the number of ranks."""

    balance_batch: int = 1
    """Consecutive micro-batches that are forwarded together as one: scope micro_batch counts over so many.
    The text of a step stays the same. It must divide the micro-batches of every rank."""

    shuffled: bool = False
    """Mix domains in every micro-batch. By default each holds one domain: an upper bound of what scope does."""

    selection: str = TOP_K
    """How glm4_moe's routers choose, for comparison. Other than top-k only with the strategies none and z.
    expert-choice[:chunk=TOKENS][,shuffled=true]: experts choose tokens; evaluated as top-k.
    sinkhorn[:iterations=20]: top-k of balanced scores; evaluated as top-k.
    hash: a fixed random function of the token; needs --no-save-model."""

    then: str | None = None
    """Another strategy, which takes over after step --switch-at. Biases go on where both hold some;
    where only the first does they end (frozen+... keeps them as they are)."""

    switch_at: int | None = None
    """The last step before --then takes over."""

    order: Literal["forwards_first", "interleaved"] = "forwards_first"
    """forwards_first: all forwards of a step, then one backward: the global batch is exact.
    interleaved: forward, backward, forward, ...: a backward knows the micro-batches so far."""

    learning_rate: float = 3e-3
    """Peak learning rate of AdamW, the same for every strategy."""

    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly; then a cosine falls to a tenth of the peak."""

    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices."""

    clip: float = 1.0
    """Largest norm of the gradient."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the forward: auto is bfloat16 autocast where the machine has it, else float32."""

    wrapper: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """How the model is spread over the ranks that torchrun starts: a copy on each (ddp), or sharded (fsdp2).
    auto: none in one process, ddp with several."""

    evaluate_every: int = 0
    """Steps between evaluations on the selection text; 0: only at the end. The test text is evaluated
    at the end too."""

    evaluation_sequences: int = 64
    """Sequences of each domain in an evaluation, at most; every domain gives equally many."""

    checkpoint_every: int = 20
    """Steps between checkpoints; a run that is killed loses at most the steps since the last one."""

    save_model: bool = True
    """Save the trained model in the run's folder, for plain Transformers; --no-save-model leaves it out."""

    resume: bool = False
    """Go on where an earlier call with the same options was stopped."""

    def check(self) -> None:
        """Raises UsageError for values that cannot be."""
        for name, least in (
            ("steps", 1),
            ("layers", 1),
            ("width", 32),
            ("experts", 2),
            ("experts_per_token", 1),
            ("expert_width", 1),
            ("sequence_length", 2),
            ("sequences", 1),
            ("micro_batches", 1),
            ("balance_batch", 1),
            ("evaluate_every", 0),
            ("evaluation_sequences", 1),
            ("checkpoint_every", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{_flag(name)} must be at least {least}: got {getattr(self, name)}.")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{_flag(name)} must be a finite number above 0: got {getattr(self, name)}.")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"--warmup must be a share of the steps, from 0 to below 1: got {self.warmup}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"--weight-decay must be at least 0: got {self.weight_decay}.")
        if self.width % 32:
            raise UsageError(f"--width must be a multiple of 32 (the size of an attention head): got {self.width}.")
        if self.experts_per_token > self.experts:
            raise UsageError(
                f"--experts-per-token must be at most --experts: got {self.experts_per_token} of {self.experts}."
            )
        if (self.then is None) != (self.switch_at is None):
            there, missing = ("--then", "--switch-at") if self.switch_at is None else ("--switch-at", "--then")
            raise UsageError(f"{there} must go with {missing}: got no {missing}. Give both, or leave both out.")
        if self.switch_at is not None and not 1 <= self.switch_at < self.steps:
            raise UsageError(
                "--switch-at must leave steps to both strategies, so lie between 1 and --steps - 1: got "
                f"{self.switch_at} of {self.steps}."
            )
        if self.micro_batches % self.balance_batch:
            raise UsageError(
                f"--balance-batch must divide --micro-batches: got {self.balance_batch} of {self.micro_batches}."
            )
        if self.qk_norm and (self.model is not None or self.arch != "glm4_moe"):
            raise UsageError(f"--qk-norm must go with --arch glm4_moe: got {self._why_no_qk_norm()} Leave it out.")
        self._check_gate()
        if self.model is not None and not (self.model / "config.json").is_file():
            raise UsageError(f"--model must be a folder with a config.json: {self.model} is not.")

    def recorded(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a folder, with the defaults of those that came later than the folder."""
        return {field.name: field.default for field in dataclasses.fields(self)} | dict(options)

    def _why_no_qk_norm(self) -> str:
        if self.model is not None:
            return "--model, whose own config says it."
        always = self.arch in ("qwen3_moe", "olmoe")
        return f"{self.arch}, which {'always has these norms' if always else 'has no such norms'}."

    def _check_gate(self) -> None:
        if self.score_function == "auto":
            return
        if self.model is not None or (self.arch != "glm4_moe" and self.score_function != SCORE_FUNCTIONS[self.arch]):
            raise UsageError(
                f"--score-function {self.score_function} must go with --arch glm4_moe: got "
                f"{self.arch if self.model is None else '--model'}, whose score function is its own. Leave one of them out."
            )
        if self.score_function == SCORE_FUNCTIONS[self.arch]:
            return
        if self.save_model:
            raise UsageError(
                f"--score-function {self.score_function} must go with --no-save-model: plain Transformers would route the saved model by "
                f"the {SCORE_FUNCTIONS[self.arch]} scores of {self.arch}."
            )
        if self.experts_per_token == 1:
            raise UsageError(
                f"--score-function {self.score_function} must have at least two experts a token: got --experts-per-token 1, whose weight "
                "is the constant 1, so that the router would learn nothing."
            )

    def shared(self) -> dict[str, Any]:
        """The options that decide the numbers of a run, as JSON can hold them."""
        left_out = {"out", "resume", "strategy", "strategies", "seed", "seeds", "workers", "json"}
        left_out |= {"save_model", "wrapper"}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k not in left_out}


@dataclass(frozen=True, kw_only=True)
class Train(_Run):
    """Train one model under one strategy."""

    strategy: str = "quantile"
    """none, loss-free, quantile, lbl, z, frozen, with options or several at once; or a recipe (equipoise recipes).
    loss-free:rate=1e-2
    lbl:scope=micro_batch,coefficient=1e-2
    loss-free+lbl:scope=sequence,coefficient=1e-4
    For comparison, here only: shuffle, phi, shinka, each with a coefficient."""

    seed: int = 0
    """Decides weights, order of the text and order of the domains, together."""

    @property
    def label(self) -> str:
        """What the run is called: its strategy, the one that takes over, and how it selects and counts where that is
        not usual."""
        parts = [self.strategy]
        if self.then is not None:
            parts.append(f"after step {self.switch_at} {self.then}")
        if self.selection != TOP_K:
            parts.append(f"selection {self.selection}")
        if self.score_function not in ("auto", SCORE_FUNCTIONS[self.arch]):
            parts.append(f"score function {self.score_function}")
        if self.balance_batch != 1:
            parts.append(f"balance batch {self.balance_batch}")
        return ", ".join(parts)

    def strategy_of(self, step: int) -> str:
        """The strategy under which ``step``, counted from 1, is trained."""
        return self.strategy if self.then is None or step <= (self.switch_at or 0) else self.then

    def check(self) -> None:
        super().check()
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0: got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class Compare(_Run):
    """Train the same model under several strategies and show load, balance, quality and specialisation side by side.

    Every strategy starts from the same weights and sees the same micro-batches in the same order at the same learning
    rate.
    """

    strategies: tuple[str, ...] = (
        "none",
        "lbl:scope=micro_batch",
        "lbl:scope=global_batch",
        "loss-free:rate=1e-2",
    )
    """Strategies, each as in `equipoise train --strategy`."""

    seeds: int = 1
    """Number of seeds: 0, 1, ... Runs of one seed are paired."""

    workers: int | None = None
    """Runs that go side by side and share the cores; a run's threads decide how it rounds.
    None: as many as there are cores, at most all runs; 1 on an accelerator and under torchrun."""

    json: bool = False
    """Print results.json on stdout at the end, and nothing else there."""

    def check(self) -> None:
        super().check()
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1: got {self.seeds}.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers must be at least 1: got {self.workers}. Leave it out for one a core.")
        if not self.strategies:
            raise UsageError("--strategies must name at least one: got none. Example: --strategies none loss-free")

    def runs(self) -> list[Train]:
        """One run a seed and strategy, each in a folder of its own below ``out``."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Run)}
        return [
            Train(**{**common, "out": self.out / folder_name(strategy, seed), "strategy": strategy, "seed": seed})
            for seed in range(self.seeds)
            for strategy in self.strategies
        ]


def folder_name(strategy: str, seed: int) -> str:
    """A folder for a strategy and a seed, readable and without characters that a shell or a file system minds.

    >>> folder_name("lbl:scope=micro_batch,coefficient=1e-2", 0)
    'lbl_scope-micro_batch_coefficient-1e-2_seed0'
    """
    plain = strategy.replace("=", "-").replace(":", "_").replace(",", "_").replace("+", "__")
    return f"{plain}_seed{seed}"


def _flag(name: str) -> str:
    return name.replace("_", "-")
