"""Which strategy, when a model is fine-tuned? Small models, pretrained without one text and fine-tuned on it.

    python benchmarks/finetune.py            # trains what is missing in runs/finetune, stores the result and the page
    python benchmarks/finetune.py --page     # writes docs/evidence/finetuning.md from the stored result
    python benchmarks/finetune.py --check    # fails if the page is not what the stored result gives

The lab pretrains models on the packaged corpus without the new domains. It then fine-tunes each on one new domain,
under every strategy, from the same weights and on the same micro-batches. A saved model is measured as plain
Transformers routes it, on the test text of the new domain and on that of the old domains. Runs are paired by seed.

Each finished run leaves one file in runs/finetune/results, and is skipped the next time.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from page_parts import source_line, table
from paired import run_facts

import equipoise
from equipoise_lab.analysis.statistics import Estimate, paired_differences
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train.config import Train, folder_name
from equipoise_lab.train.data import Corpus, load_corpus
from equipoise_lab.train.engine import reproducible
from equipoise_lab.train.evaluate import evaluate
from equipoise_lab.train.location import CORPUS
from equipoise_lab.train.loop import train
from equipoise_lab.train.models import build_model
from equipoise_lab.train.run_folder import SilentWatcher

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results" / "finetune.json"
PAGE = ROOT / "docs" / "evidence" / "finetuning.md"
BEFORE = "before fine-tuning"
STEPS, TUNING_STEPS, LEARNING_RATE, TUNING_LEARNING_RATE = 200, 60, 3e-3, 1e-3
MEASURES = ("new_nats", "old_nats", "new_maxvio", "old_maxvio", "new_dead", "old_dead")


class Case(NamedTuple):
    """A family, how it is pretrained, and the strategies of its fine-tuning. The others are compared with the first."""

    title: str
    pretraining: str
    strategies: tuple[str, ...]
    advised: str  # by docs/which_strategy.md
    options: dict[str, Any]


CASES = {
    "glm4_moe": Case(
        "Sigmoid router with a bias",
        f"loss-free:rate={1 / STEPS:.3g}",
        (
            "frozen",
            "frozen+lbl:scope=global_batch,coefficient=1e-3",
            "frozen+lbl:scope=global_batch,coefficient=1e-2",
            "loss-free:rate=1e-3",
            f"loss-free:rate={1 / TUNING_STEPS:.3g}",
            "quantile",
        ),
        "frozen+lbl:scope=global_batch,coefficient=1e-2",
        {"qk_norm": True},  # as qwen3_moe
    ),
    "qwen3_moe": Case(
        "Softmax router without a bias",
        "lbl:scope=global_batch,coefficient=1e-2",
        (
            "none",
            "lbl:scope=global_batch,coefficient=1e-4",
            "lbl:scope=global_batch,coefficient=1e-3",
            "lbl:scope=global_batch,coefficient=1e-2",
            "lbl:scope=sequence,coefficient=1e-3",
        ),
        "lbl:scope=global_batch,coefficient=1e-2",
        {},
    ),
}


# ---- the runs ----


@dataclass(frozen=True)
class Experiment:
    """The text, the sizes and the seeds. ``shared`` are options of the lab for both trainings."""

    folder: Path = Path("runs/finetune")
    source: Path = CORPUS
    new_domains: tuple[str, ...] = ("code_py", "verse_zh")
    seeds: int = 4
    steps: int = STEPS
    tuning_steps: int = TUNING_STEPS
    sequences: int = 6  # of a micro-batch in pretraining; a step has one micro-batch of each old domain
    tuning_sequences: int = 4
    tuning_micro_batches: int = 4
    vocab_size: int = 2048
    shared: Mapping[str, Any] = field(default_factory=lambda: {"sequence_length": 128})

    def prepare(self) -> list[str]:
        """Writes the text of each training into a folder of its own, and one tokenizer. Returns the old domains."""
        old = []
        for file in sorted(self.source.iterdir()):
            domain = file.name.split(".")[0]
            if file.name.endswith((".jsonl.xz", ".txt")):
                old += [] if domain in self.new_domains else [domain]
                target = self.text(domain if domain in self.new_domains else "old") / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        whole = load_corpus(self.source, vocab_size=self.vocab_size, sequence_length=self.shared["sequence_length"])
        shutil.copyfile(whole.tokenizer_file, self.tokenizer)
        return old

    def text(self, name: str) -> Path:
        return self.folder / "text" / name

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def corpus(self, name: str) -> Corpus:
        return load_corpus(self.text(name), tokenizer=self.tokenizer, sequence_length=self.shared["sequence_length"])

    def pretraining(self, arch: str, seed: int, num_domains: int) -> Train:
        case = CASES[arch]
        return Train(
            **self.shared,
            **case.options,
            out=self.folder / "pretrained" / f"{arch}_seed{seed}",
            arch=arch,
            data=str(self.text("old")),
            tokenizer=self.tokenizer,
            strategy=case.pretraining,
            seed=seed,
            steps=self.steps,
            learning_rate=LEARNING_RATE,
            sequences=self.sequences,
            micro_batches=num_domains,
            dtype="float32",
            resume=True,
        )

    def tuning(self, arch: str, new: str, strategy: str, seed: int) -> Train:
        return Train(
            **self.shared,
            out=self.folder / "tuned" / f"{arch}_{new}_{folder_name(strategy, seed)}",
            model=self.folder / "pretrained" / f"{arch}_seed{seed}" / "model",
            data=str(self.text(new)),
            tokenizer=self.tokenizer,
            strategy=strategy,
            seed=seed,
            steps=self.tuning_steps,
            learning_rate=TUNING_LEARNING_RATE,
            sequences=self.tuning_sequences,
            micro_batches=self.tuning_micro_batches,
            evaluation_sequences=self.tuning_sequences,  # the saved model is measured on more
            dtype="float32",
            resume=True,
        )

    def rows(self, num_old_domains: int) -> Iterator[dict[str, Any]]:
        """One row for each model: seed by seed, so that a stopped experiment has whole seeds."""
        for seed in range(self.seeds):
            for arch, case in CASES.items():
                pretraining = self.pretraining(arch, seed, num_old_domains)
                for new in self.new_domains:
                    for strategy in (BEFORE, *case.strategies):
                        tuning = None if strategy == BEFORE else self.tuning(arch, new, strategy, seed)
                        name = f"{arch}_{new}_{folder_name(strategy.replace(' ', '-'), seed)}"
                        facts = {"arch": arch, "new": new, "strategy": strategy, "seed": seed}
                        yield self._row(self.folder / "results" / f"{name}.json", facts, pretraining, tuning)

    def _row(self, file: Path, facts: dict[str, Any], pretraining: Train, tuning: Train | None) -> dict[str, Any]:
        if file.exists():
            return read_json(file)
        began = time.process_time()
        watcher = SilentWatcher()
        result = train(pretraining, watcher)  # returns at once if it is complete
        if tuning is not None:
            result = train(tuning, watcher)
        model = (pretraining if tuning is None else tuning).out / "model"
        row = {**facts, **self.measure(model, facts["new"]), "training_maxvio": result["maxvio_batch"]}
        row["cpu_seconds"] = time.process_time() - began
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, row)
        if tuning is not None:
            shutil.rmtree(tuning.out)
        return row

    def measure(self, model_folder: Path, new: str) -> dict[str, float]:
        """Loss, MaxVio and dead experts of a saved model on the test text of the new domain and of the old ones."""
        measured: dict[str, float] = {}
        texts = {"new": self.corpus(new), "old": self.corpus("old")}
        config = Train(out=self.folder, model=model_folder, **self.shared)
        model = build_model(config, texts["old"].vocab_size)
        balance = equipoise.attach(model)  # counts; a bias in a slot steers as in plain Transformers
        for name, text in texts.items():
            with reproducible():
                figures, _ = evaluate(
                    model,
                    balance,
                    text,
                    split="test",
                    sequence_length=config.sequence_length,
                    most_sequences=sys.maxsize,
                    sequences=8,
                    k=balance.layers[0].k,
                    device=torch.device("cpu"),
                    autocast=False,
                )
            for key, figure in (("nats", "val_nats"), ("maxvio", "maxvio_global"), ("dead", "dead_experts")):
                measured[f"{name}_{key}"] = figures[figure]
            measured[f"{name}_tokens"] = sum(domain["tokens"] for domain in figures["domains"].values())
            measured[f"{name}_floor"] = figures["maxvio_floor"]
        return measured


def experiment_facts(experiment: Experiment, old: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    length = experiment.shared["sequence_length"]
    defaults = Train(out=experiment.folder, **experiment.shared)
    return {
        "old_domains": old,
        "new_domains": list(experiment.new_domains),
        "seeds": experiment.seeds,
        "steps": experiment.steps,
        "tokens_per_step": length * experiment.sequences * len(old),
        "learning_rate": LEARNING_RATE,
        "tuning_steps": experiment.tuning_steps,
        "tuning_tokens_per_step": length * experiment.tuning_sequences * experiment.tuning_micro_batches,
        "tuning_micro_batches": experiment.tuning_micro_batches,
        "tuning_learning_rate": TUNING_LEARNING_RATE,
        **{name: getattr(defaults, name) for name in ("layers", "width", "experts", "experts_per_token")},
        "new_tokens": {row["new"]: row["new_tokens"] for row in rows},
        "old_tokens": rows[0]["old_tokens"],
        "cpu_minutes": sum(row["cpu_seconds"] for row in rows) / 60,
        "cases": {
            arch: {"pretraining": case.pretraining, "strategies": case.strategies} for arch, case in CASES.items()
        },
    }


# ---- reading ----


class Reading(NamedTuple):
    """What the rule says of a table. The rule was fixed before the first run:

    Left out is what is worse than the first strategy on old text: the interval of the difference lies above 0. Of the
    rest, the lowest mean loss on new text leads, and whatever the interval of its difference to the leader does not
    tell from it ties with it. Of these the lowest mean MaxVio on new text is chosen.
    """

    worse_on_old: list[str]
    leader: str
    ties: list[str]
    choice: str


Arms = Mapping[str, Mapping[str, Mapping[int, float]]]  # measure -> strategy -> seed -> value


def arms_of(rows: Sequence[Mapping[str, Any]], arch: str, new_domains: Sequence[str]) -> Arms:
    """The values by seed, each the mean over these new domains."""
    chosen = [row for row in rows if row["arch"] == arch and row["new"] in new_domains]

    def value(measure: str, strategy: str, seed: int) -> float:
        values = [row[measure] for row in chosen if (row["strategy"], row["seed"]) == (strategy, seed)]
        assert len(values) == len(new_domains)
        return statistics.fmean(values)

    seeds, strategies = ({row[key]: None for row in chosen} for key in ("seed", "strategy"))
    return {
        measure: {strategy: {seed: value(measure, strategy, seed) for seed in seeds} for strategy in strategies}
        for measure in MEASURES
    }


def read(arms: Arms, strategies: Sequence[str]) -> Reading:
    new, old, maxvio = arms["new_nats"], arms["old_nats"], arms["new_maxvio"]
    first = strategies[0]
    worse = [s for s in strategies[1:] if paired_differences(old[s], old[first]).interval[0] > 0]
    kept = [s for s in strategies if s not in worse]
    leader = min(kept, key=lambda s: statistics.fmean(new[s].values()))
    ties = [s for s in kept if s == leader or paired_differences(new[s], new[leader]).interval[0] <= 0]
    choice = min(ties, key=lambda s: statistics.fmean(maxvio[s].values()))
    return Reading(worse, leader, [s for s in ties if s != leader], choice)


def better_in_all(arms: Arms, strategies: Sequence[str]) -> list[str]:
    """Whose intervals lie below 0, against the first strategy, for both losses and both MaxVio. Not in the rule: it was
    added when the results were known."""
    return [
        strategy
        for strategy in strategies[1:]
        if all(
            paired_differences(arms[measure][strategy], arms[measure][strategies[0]]).interval[1] < 0
            for measure in ("new_nats", "old_nats", "new_maxvio", "old_maxvio")
        )
    ]


# ---- the page ----

TITLES = {
    "new_nats": "loss, new text",
    "old_nats": "loss, old text",
    "new_maxvio": "MaxVio, new text",
    "old_maxvio": "MaxVio, old text",
    "new_dead": "dead experts, new text",
    "old_dead": "dead experts, old text",
}
DIGITS = {"nats": 4, "maxvio": 2, "dead": 1}


def number(value: float, digits: int) -> str:
    """
    >>> number(-0.0625, 3), number(-0.001, 2)
    ('−0.062', '0.00')
    """
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


def difference(estimate: Estimate, digits: int) -> str:
    """In bold if the interval excludes 0."""
    low, high = estimate.interval
    text = f"{number(estimate.mean, digits)} [{number(low, digits)}, {number(high, digits)}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def measured_table(arms: Arms, strategies: Sequence[str], measures: Sequence[str]) -> list[str]:
    """Means; from the second strategy on also the differences from the first, with their intervals."""

    def cell(strategy: str, measure: str) -> str:
        digits, values = DIGITS[measure.split("_")[1]], arms[measure]
        mean = number(statistics.fmean(values[strategy].values()), min(digits, 3))
        if strategy == BEFORE:
            return mean
        if strategy == strategies[0]:
            return f"{mean} ± {number(statistics.stdev(values[strategy].values()), min(digits, 3))}"
        return f"{mean}; {difference(paired_differences(values[strategy], values[strategies[0]]), digits)}"

    def name(strategy: str) -> str:
        return strategy if strategy == BEFORE else f"`{strategy}`"

    return table(
        ("strategy", *(TITLES[measure] for measure in measures)),
        ([name(strategy), *(cell(strategy, m) for m in measures)] for strategy in (BEFORE, *strategies)),
    )


def names(strategies: Sequence[str]) -> str:
    return ", ".join(f"`{strategy}`" for strategy in strategies) or "none"


def reading_lines(arms: Arms, first: str, reading: Reading) -> list[str]:
    lines = []
    if reading.choice != first:
        _, upper = paired_differences(arms["old_nats"][reading.choice], arms["old_nats"][first]).interval
        lines = [f"- The interval of its loss on old text, less that of the first, ends at {number(upper, 4)}."]
    return [
        f"- Worse than the first on old text: {names(reading.worse_on_old)}.",
        f"- Lowest loss on new text among the others: `{reading.leader}`. Not told from it: {names(reading.ties)}.",
        f"- Chosen, as the lowest MaxVio of these: `{reading.choice}`.",
        *lines,
        "",
    ]


def answer_row(arch: str, arms: Arms, reading: Reading) -> list[str]:
    case = CASES[arch]

    def cell(measure: str) -> str:
        if reading.choice == case.advised:
            return "the same"
        estimate = paired_differences(arms[measure][reading.choice], arms[measure][case.advised])
        return difference(estimate, DIGITS[measure.split("_")[1]])

    return [
        f"`{arch}`: {case.title[0].lower()}{case.title[1:]}",
        f"`{reading.choice}`",
        f"`{case.advised}`",
        *map(cell, ("new_nats", "old_nats", "new_maxvio")),
    ]


def section(stored: Mapping[str, Any], arch: str) -> list[str]:
    case, new_domains = CASES[arch], stored["new_domains"]
    arms = arms_of(stored["rows"], arch, new_domains)
    lines = [
        f"## {case.title}",
        "",
        f"`{arch}`, pretrained under `{case.pretraining}`. Means over both new texts:",
        "",
        *measured_table(arms, case.strategies, MEASURES),
        *reading_lines(arms, case.strategies[0], read(arms, case.strategies)),
    ]
    for new in new_domains:
        arms = arms_of(stored["rows"], arch, [new])
        lines += [
            f"Fine-tuned on `{new}` alone; the rule chooses `{read(arms, case.strategies).choice}`:",
            "",
            *measured_table(arms, case.strategies, MEASURES[:4]),
        ]
    return lines


def page(stored: Mapping[str, Any]) -> str:
    by_arch = {arch: arms_of(stored["rows"], arch, stored["new_domains"]) for arch in CASES}
    answers = [answer_row(arch, arms, read(arms, CASES[arch].strategies)) for arch, arms in by_arch.items()]
    header = ("model", "chosen by the rule", "advised", TITLES["new_nats"], TITLES["old_nats"], TITLES["new_maxvio"])
    return "\n".join(
        [
            "# Fine-tuning, measured",
            "",
            "What strategies do to the loss and the load when a small model is fine-tuned on narrow text. "
            "[Which strategy?](../which_strategy.md) has the advice; here is what was measured.",
            "",
            "Do not edit this page by hand: `python benchmarks/finetune.py` writes it from "
            "[finetune.json](../../benchmarks/results/finetune.json).",
            "",
            "## Answer",
            "",
            "Differences are *chosen by the rule* − *advised*, over the means of both new texts: the mean over "
            f"{stored['seeds']} seeds and its 95 % t interval. Bold: the interval excludes 0.",
            "",
            *table(header, answers),
            "Beside the rule, and added when the results were known:",
            "",
            *(line for arch, arms in by_arch.items() for line in beside_the_rule(arch, arms)),
            "",
            "The rule was fixed before the first run:",
            "",
            "1. A strategy is left out if its loss on old text is worse than that of the first strategy, that is, if "
            "the interval of the difference lies above 0.",
            "2. Of the others, the lowest loss on new text leads. Those whose interval does not tell them from the "
            "leader tie with it.",
            "3. Of these, the lowest MaxVio on new text is chosen.",
            "",
            *design(stored),
            *(line for arch in CASES for line in section(stored, arch)),
            *LIMITS,
            *source_line(dict(stored)),
            f"All runs together took {stored['cpu_minutes']:.0f} minutes of one core.",
            "",
        ]
    )


def beside_the_rule(arch: str, arms: Arms) -> list[str]:
    strategies = CASES[arch].strategies
    first = strategies[0]
    new_text = [statistics.fmean(arms["new_nats"][strategy].values()) for strategy in strategies]
    before, after = (statistics.fmean(arms["old_nats"][strategy].values()) for strategy in (BEFORE, first))
    return [
        f"- `{arch}`: better than `{first}` in both losses and both MaxVio, each interval without 0: "
        f"{names(better_in_all(arms, strategies))}. On new text the mean losses of all strategies lie within "
        f"{number(max(new_text) - min(new_text), 4)} nats. On old text the loss rises from {number(before, 2)} to "
        f"{number(after, 2)} nats under `{first}`.",
    ]


def design(stored: Mapping[str, Any]) -> list[str]:
    both = " and ".join(f"`{domain}`" for domain in stored["new_domains"])
    new_tokens = " and ".join(f"{stored['new_tokens'][domain]:,}" for domain in stored["new_domains"])
    return [
        "## Design",
        "",
        f"- **Models.** {stored['layers']} layers, width {stored['width']}, {stored['experts']} experts, "
        f"{stored['experts_per_token']} per token. {stored['seeds']} seeds: weights and order of the text.",
        f"- **Pretraining.** {len(stored['old_domains'])} domains of the packaged corpus, one micro-batch of each in a "
        f"step: {stored['steps']} steps of {stored['tokens_per_step']:,} tokens, learning rate "
        f"{stored['learning_rate']:g}. The tokenizer knows all domains. The model never saw {both}.",
        f"- **Fine-tuning.** On {both}, each alone: {stored['tuning_steps']} steps of "
        f"{stored['tuning_tokens_per_step']:,} tokens in {stored['tuning_micro_batches']} micro-batches, learning "
        f"rate {stored['tuning_learning_rate']:g}. For one seed, all strategies start from the same weights and see "
        "the same micro-batches.",
        f"- **Measured.** The saved model on test text: {new_tokens} tokens of the new domains, "
        f"{stored['old_tokens']:,} of the old ones. The loss is in nats by token. MaxVio is a mean over layers, the "
        "number of dead experts a sum. A bias in a slot steers, as it does in plain Transformers.",
        "",
        "In the tables, ± is the standard deviation over seeds. After the semicolon is the difference from the first "
        "strategy, with its interval.",
        "",
    ]


LIMITS = [
    "## What it can and cannot decide",
    "",
    "- **It decides** how these mechanisms move the load of these models on this text, and what that costs there.",
    "- **It does not decide** how a large model behaves. These models saw about a million tokens, so their routers "
    "still change fast.",
    "- **Strong forgetting.** The learning rate is high and the new text is far from the old. The loss on old text "
    "therefore says how much a model forgets. A gentle fine-tuning may order the strategies otherwise.",
    "- **Few seeds.** *Not worse* may only mean that so few seeds cannot tell. An interval is over seeds, not over "
    "texts, sizes or learning rates. No interval is corrected for the number of comparisons.",
    "- **One length and one learning rate.** A longer fine-tuning moves biases and routers further.",
    "- **Not looked at:** adapters on a frozen base, instructions and chats, padding. Under expert parallelism an even "
    "load also saves time, which no loss shows.",
    "",
]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--page", action="store_true", help="only write the page, from the stored result")
    options.add_argument("--check", action="store_true", help="only compare the page with the stored result")
    arguments = options.parse_args()
    if arguments.check:
        if page(read_json(STORED)) != PAGE.read_text(encoding="utf-8"):
            sys.exit(f"{PAGE.relative_to(ROOT)} must match the stored result: run benchmarks/finetune.py --page.")
        return
    if not arguments.page:
        torch.set_num_threads(1)
        write_json(STORED, run(Experiment(), print))
    PAGE.write_text(page(read_json(STORED)), encoding="utf-8")


def run(experiment: Experiment, say: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
    """Trains and measures what is missing. Returns what is stored."""
    old, rows = experiment.prepare(), []
    for row in experiment.rows(len(old)):
        rows.append(row)
        say(f"{len(rows)}: {row['arch']}, {row['new']}, {row['strategy']}, seed {row['seed']}")
    facts = run_facts("python benchmarks/finetune.py", "transformers", "tokenizers", "numpy")
    return facts | experiment_facts(experiment, old, rows) | {"rows": rows}


if __name__ == "__main__":
    main()
