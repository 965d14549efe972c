"""Options of the commands ``train`` and ``compare``, for the command line and for Python. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from equipoise.errors import UsageError
from equipoise_lab.models.folders import model_folder, suggest_models
from equipoise_lab.paths import suggest_paths
from equipoise_lab.records import read_json
from equipoise_lab.train.location import check_location, find_tokenizer, local_path
from equipoise_lab.train.strategies import check_strategies, is_name

__all__ = ["ARCHITECTURES", "TOP_K", "Compare", "Tracker", "Train"]

TOP_K = "top-k"  # the selection of an unchanged model
ARCHITECTURES = ("glm4_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3")
SCORE_FUNCTIONS = dict.fromkeys(ARCHITECTURES, "softmax") | {"glm4_moe": "sigmoid", "deepseek_v3": "sigmoid"}
Architecture = Literal["glm4_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3"]
MOST_STEPS, MOST_SEEDS = 10**9, 1000  # far more than the lab can train
Tracker = Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Options that all strategies of a comparison share."""

    out: Path
    """Output folder. It must be new or empty, except with --resume."""

    arch: Architecture = "glm4_moe"
    """Transformers architecture. A small model of it is built from a config.
    glm4_moe, deepseek_v3: sigmoid scores, shared expert, bias slot.
    qwen3_moe, olmoe, mixtral: softmax scores."""

    qk_norm: bool = False
    """Normalise queries and keys in glm4_moe's attention. Lowers the loss and the spread between seeds.
    qwen3_moe and olmoe always do so; mixtral and deepseek_v3 never do."""

    score_function: Literal["auto", "softmax", "sigmoid"] = "auto"
    """Score function of glm4_moe's routers. auto: the architecture's own, which is sigmoid for glm4_moe.
    softmax starts from the same weights. It needs --no-save-model: a saved glm4_moe always routes by sigmoid."""

    model: Path | None = None
    """Folder of a Transformers model, or of a run, to train instead of --arch. Starts from its weights if it has any,
    else from its config. --layers, --width, --experts and similar options are then ignored: the model sets them."""

    data: str = "corpus"
    """Text to train on: "corpus" (eight domains, packaged), a folder, a file, or hf:NAME of the Hugging Face Hub.
    A folder holds one file or one sub-folder per domain: any text in UTF-8, optionally as .xz or .gz.
    Documents: rows of .jsonl, .parquet, .csv and .tsv; else the files of a sub-folder, or the blocks between blank
    lines of a file. A domain needs at least four documents; some of them are held out.
    Hidden files and READMEs are not read. Other files that are not text are skipped and counted."""

    text_key: str = "text"
    """The field or column that holds the text, in .jsonl, .parquet, .csv, .tsv and data sets."""

    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one. Default: that of --model if it has weights.
    Otherwise a byte-level BPE is trained on the training text."""

    vocab_size: int = 2048
    """Vocabulary size of the BPE that is trained without --tokenizer."""

    steps: int = 80
    """Optimizer steps."""

    layers: int = 3
    """Transformer layers. All of them are mixture-of-experts layers."""

    width: int = 128
    """Hidden size, a multiple of 32."""

    experts: int = 32
    """Routed experts per layer."""

    experts_per_token: int = 4
    """Experts per token, k."""

    expert_width: int = 64
    """Hidden size of one expert."""

    sequence_length: int = 128
    """Tokens per sequence."""

    sequences: int = 8
    """Sequences per micro-batch. All come from one domain, except with --shuffled."""

    micro_batches: int = 8
    """Micro-batches per step over all ranks (gradient accumulation). A multiple of the number of ranks."""

    balance_batch: int = 1
    """Consecutive micro-batches that one forward joins. The scope micro_batch then counts over all of them.
    The text of a step stays the same. Must divide the number of micro-batches per rank."""

    shuffled: bool = False
    """Mix domains in every micro-batch. Default: one domain each, where the scope of balancing matters most."""

    selection: str = TOP_K
    """How glm4_moe's routers choose experts, for comparison. All but top-k need the strategy none or z.
    expert-choice[:chunk=TOKENS][,shuffled=true]: experts choose tokens; evaluations use top-k.
    sinkhorn[:iterations=20]: top-k of balanced scores; evaluations use top-k.
    hash: a fixed random function of the token id; needs --no-save-model."""

    then: str | None = None
    """A second strategy, which replaces the first after step --switch-at. Biases continue if both have some.
    If only the first has biases, they are removed; frozen+... keeps them unchanged."""

    switch_at: int | None = None
    """The last step of --strategy, before --then starts."""

    order: Literal["forwards_first", "interleaved"] = "forwards_first"
    """forwards_first: all forwards of a step, then one backward. The counts of the global batch are exact.
    interleaved: forward, backward, forward, ... A backward only knows the micro-batches up to its own."""

    learning_rate: float = 3e-3
    """Peak learning rate of AdamW, the same for every strategy."""

    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly. A cosine then lowers it."""

    decay_to: float = 0.1
    """Learning rate of the last step, as a share of the peak. 0 decays to zero."""

    weight_decay: float = 0.1
    """Weight decay of AdamW, for matrices only."""

    clip: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the forward. auto: bfloat16 autocast if the machine supports it in hardware, else float32."""

    wrapper: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """How the model is distributed over the ranks of torchrun: a copy on each (ddp), or sharded (fsdp2).
    auto: none with one process, ddp with several."""

    evaluate_every: int = 0
    """Steps between evaluations on the selection text; 0: only at the end. The test text is evaluated
    once, at the end."""

    evaluation_sequences: int = 64
    """Maximum number of sequences per domain in an evaluation. Every domain gives equally many."""

    checkpoint_every: int = 20
    """Steps between checkpoints. A killed run only loses the steps after the last one; Ctrl-C writes one more."""

    save_model: bool = True
    """The trained model is saved in the run's folder, for plain Transformers. --no-save-model skips this."""

    resume: bool = False
    """Continue the run in --out, with the same options; start it if there is none."""

    tracker: tuple[Tracker, ...] = ("none",)
    """Trackers that get the metrics of every step, the evaluations and the result, while a run trains.
    One or several. A resumed run continues its curves, and may have other trackers."""

    tracker_layers: int = 0
    """Layers of which a tracker also gets MaxVio and dead experts: at most so many, spread over the depth; 0: none."""

    def __post_init__(self) -> None:
        """Expands ``~`` in paths. A run as ``model`` stands for the model that it saved."""
        places: dict[str, Path | None] = {"out": self.out, "model": self.model, "tokenizer": self.tokenizer}
        for name, path in places.items():
            if path is not None:
                expanded = Path(path).expanduser()
                object.__setattr__(self, name, model_folder(expanded) if name == "model" else expanded)
        if self.data.startswith("~"):
            object.__setattr__(self, "data", str(local_path(self.data)))

    def check(self) -> None:
        """Raises UsageError for invalid values."""
        for name, minimum in (
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
            ("tracker_layers", 0),
        ):
            if getattr(self, name) < minimum:
                raise UsageError(f"--{_flag(name)} must be at least {minimum}: got {getattr(self, name)}.")
        if self.steps > MOST_STEPS:
            raise UsageError(f"--steps must be at most {MOST_STEPS:,}: got {self.steps:,}. Lower it.")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{_flag(name)} must be a finite number above 0: got {getattr(self, name)}.")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"--warmup must be a share of the steps, from 0 to below 1: got {self.warmup}.")
        if not 0 <= self.decay_to <= 1:
            raise UsageError(f"--decay-to must be a share of the peak learning rate, from 0 to 1: got {self.decay_to}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"--weight-decay must be at least 0: got {self.weight_decay}.")
        if self.width % 32:
            raise UsageError(f"--width must be a multiple of 32 (the size of an attention head): got {self.width}.")
        if self.experts_per_token > self.experts:
            raise UsageError(
                f"--experts-per-token must be at most --experts: got {self.experts_per_token} and {self.experts}."
            )
        if (self.then is None) != (self.switch_at is None):
            option, missing = ("--then", "--switch-at") if self.switch_at is None else ("--switch-at", "--then")
            raise UsageError(f"{option} needs {missing}: got no {missing}. Give both, or leave both out.")
        if self.switch_at is not None and not 1 <= self.switch_at < self.steps:
            raise UsageError(
                "--switch-at must leave steps for both strategies, so it must be from 1 to --steps - 1: got "
                f"{self.switch_at} with --steps {self.steps}."
            )
        if self.micro_batches % self.balance_batch:
            raise UsageError(
                f"--balance-batch must divide --micro-batches: got {self.balance_batch} and {self.micro_batches}."
            )
        if self.qk_norm and (self.model is not None or self.arch != "glm4_moe"):
            raise UsageError(f"--qk-norm needs --arch glm4_moe: got {self._why_no_qk_norm()} Leave --qk-norm out.")
        self._check_score_function()
        self._check_model()
        check_location(self.data)
        if self.tokenizer is not None:
            find_tokenizer(self.tokenizer)
        self._check_trackers()

    def _check_model(self) -> None:
        if self.model is not None and not (self.model / "config.json").is_file():
            near = suggest_models(self.model) if self.model.exists() else suggest_paths(self.model)
            raise UsageError(
                f"--model must be a folder with a config.json: {self.model} has none.{near or ' Check the path.'}"
            )
        if self.model is not None:
            content = read_json(self.model / "config.json")
            if isinstance(content, dict) and {"format", "strategy"} <= content.keys():
                raise UsageError(
                    f"--model must be a saved model, or a run that saved one: {self.model} is a run without a model. "
                    "It has not finished, or was trained with --no-save-model. Train it again without that option."
                )

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The names of the trackers, without none."""
        return tuple(name for name in self.tracker if name != "none")

    def _check_trackers(self) -> None:
        known, names = get_args(Tracker), self.tracker
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"--tracker must be one or several of {', '.join(known)}: got {unknown[0]!r}.")
        if len(set(names)) < len(names) or not names or (self.trackers and self.trackers != names):
            got = " ".join(names) or "no name"
            raise UsageError(f"--tracker must be none, or different trackers: got {got}. Leave out what is too much.")
        if self.tracker_layers and not self.trackers:
            raise UsageError(f"--tracker-layers needs --tracker: got {self.tracker_layers} layers, and no tracker.")

    def recorded(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The recorded options of a folder. Options newer than the folder get their defaults."""
        return {field.name: field.default for field in dataclasses.fields(self)} | dict(options)

    def _why_no_qk_norm(self) -> str:
        if self.model is not None:
            return "--model, and its config decides on these norms."
        always = self.arch in ("qwen3_moe", "olmoe")
        return f"{self.arch}, which {'always has these norms' if always else 'has no such norms'}."

    def _check_score_function(self) -> None:
        if self.score_function == "auto":
            return
        if self.model is not None or (self.arch != "glm4_moe" and self.score_function != SCORE_FUNCTIONS[self.arch]):
            raise UsageError(
                f"--score-function {self.score_function} needs --arch glm4_moe: got "
                f"{self.arch if self.model is None else '--model'}, which has its own score function. Leave one of "
                "them out."
            )
        if self.score_function == SCORE_FUNCTIONS[self.arch]:
            return
        if self.save_model:
            raise UsageError(
                f"--score-function {self.score_function} needs --no-save-model: plain Transformers would route the "
                f"saved model by {SCORE_FUNCTIONS[self.arch]} scores, as every {self.arch}."
            )
        if self.experts_per_token == 1:
            raise UsageError(
                f"--score-function {self.score_function} needs at least two experts per token: got "
                "--experts-per-token 1. A single expert always has weight 1, so the router would learn nothing."
            )

    def shared(self) -> dict[str, Any]:
        """The options that determine the numbers of a run, as JSON values."""
        left_out = {"out", "resume", "strategy", "strategies", "seed", "seeds", "workers", "json"}
        left_out |= {"save_model", "wrapper", "tracker", "tracker_layers"}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k not in left_out}


@dataclass(frozen=True, kw_only=True)
class Train(_Run):
    """Train one model under one strategy."""

    strategy: str = "quantile"
    """none, or one or more of loss-free, quantile, lbl, z, frozen with options; or a recipe (equipoise recipes).
    loss-free:rate=1e-2
    lbl:scope=micro_batch,coefficient=1e-2
    loss-free+lbl:scope=sequence,coefficient=1e-4
    Which one, and at which rate: docs/which_strategy.md.
    For comparison, in the lab only: shuffle, phi, shinka, lbl-unbiased, lbl-groups, lbl-contrast."""

    seed: int = 0
    """Seed of the weights, the order of the text and the order of the domains."""

    @property
    def label(self) -> str:
        """The name of the run: its strategy, the second strategy, and options of selection that are not the default."""
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
        """The strategy of ``step``, counted from 1."""
        return self.strategy if self.then is None or step <= (self.switch_at or 0) else self.then

    def check(self) -> None:
        super().check()
        check_strategies(filter(None, (self.strategy, self.then)))
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0: got {self.seed}.")
        if self.seed >= 2**63:
            raise UsageError(f"--seed must be below 2**63: got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class Compare(_Run):
    """Train the same model under several strategies and compare load, balance, quality and specialisation.

    Every strategy starts from the same weights. It sees the same micro-batches in the same order, with the same
    learning rate.
    """

    strategies: tuple[str, ...] = (
        "none",
        "lbl:scope=micro_batch",
        "lbl:scope=global_batch",
        "loss-free:rate=1e-2",
    )
    """Strategies to compare, each as in `equipoise train --strategy`."""

    seeds: int = 1
    """Number of seeds: 0, 1, ... Runs with the same seed are paired."""

    workers: int | None = None
    """Runs in parallel. They share the cores; the number of threads of a run affects its rounding.
    Default: one per core, at most one per run; 1 on an accelerator and under torchrun."""

    json: bool = False
    """Print results.json on stdout at the end, and nothing else on stdout."""

    def check(self) -> None:
        super().check()
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1: got {self.seeds}.")
        if self.seeds > MOST_SEEDS:
            raise UsageError(f"--seeds must be at most {MOST_SEEDS:,}: got {self.seeds:,}. Lower it.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers must be at least 1: got {self.workers}. Leave it out for one per core.")
        for strategy in self.strategies:
            if len(parts := strategy.split(",")) > 1 and all(is_name(part.partition(":")[0]) for part in parts):
                raise UsageError(
                    f"--strategies must have a space between two: got {strategy!r}. Write {' '.join(parts)}."
                )
        if not self.strategies:
            raise UsageError("--strategies must name at least one: got none. Example: --strategies none loss-free")
        check_strategies(filter(None, (*self.strategies, self.then)))

    def runs(self) -> list[Train]:
        """One run for each seed and strategy, each in its own folder below ``out``."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Run)}
        return [
            Train(**{**common, "out": self.out / folder_name(strategy, seed), "strategy": strategy, "seed": seed})
            for seed in range(self.seeds)
            for strategy in self.strategies
        ]


def folder_name(strategy: str, seed: int) -> str:
    """The folder name of a strategy and a seed: readable, without special characters of shells or file systems.

    >>> folder_name("lbl:scope=micro_batch,coefficient=1e-2", 0)
    'lbl_scope-micro_batch_coefficient-1e-2_seed0'
    """
    plain = strategy.replace("=", "-").replace(":", "_").replace(",", "_").replace("+", "__")
    return f"{plain}_seed{seed}"


def _flag(name: str) -> str:
    return name.replace("_", "-")
