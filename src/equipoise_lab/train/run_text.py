"""The text of a run, and its micro-batches, on every rank."""

from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise_lab.models.weights import find_weights
from equipoise_lab.train.batches import Batches
from equipoise_lab.train.config import Train
from equipoise_lab.train.data import Corpus, load_corpus
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.location import PACKAGED, note_on_packaged
from equipoise_lab.train.ranks import Ranks
from equipoise_lab.train.run_folder import Watcher

__all__ = ["batches_of", "load_text"]


def load_text(config: Train, watcher: Watcher, ranks: Ranks) -> Corpus:
    """The text of a run. Raises ``EquipoiseError`` if the run cannot be trained on it."""

    if (note := note_on_packaged(config.data)) is not None:
        watcher.say(note)

    def load() -> Corpus:
        return load_corpus(
            None if config.data == PACKAGED else config.data,
            tokenizer=_tokenizer_of(config),
            vocab_size=config.vocab_size,
            progress=watcher.say,
            sequence_length=config.sequence_length,
            text_key=config.text_key,
        )

    text = ranks.run_by_node(load)
    ranks.check_equal({"fingerprint": text.fingerprint}, _different_text)
    # A bad levels.json must fail now, not at the end of the run.
    ranks.run_on_first(levels_of, config.data, dict.fromkeys(text.domains, ""))
    batches_of(config, text, ranks)
    return text


def _tokenizer_of(config: Train) -> Path | None:
    """That of --tokenizer, else the one beside the weights of --model; None to train one."""
    if config.tokenizer is not None or config.model is None or not find_weights(config.model).files:
        return config.tokenizer
    if not (config.model / "tokenizer.json").is_file():
        raise EquipoiseError(
            f"--model must have the tokenizer that its weights were trained with: {config.model} has no tokenizer.json."
            " Copy it there, or give it with --tokenizer."
        )
    return config.model


def _different_text(name: str, value: Any, rank: int, other_value: Any) -> str:
    return (
        f"every rank must have the same text: rank 0 has the {name} {value}, rank {rank} has {other_value}. Copy the "
        "text and the tokenizer of --data and --tokenizer to every node."
    )


def batches_of(config: Train, text: Corpus, ranks: Ranks) -> Batches:
    """The micro-batches of this rank."""
    return Batches(
        text,
        sequence_length=config.sequence_length,
        sequences_per_micro_batch=config.sequences,
        micro_batches_per_step=config.micro_batches // ranks.size,
        seed=config.seed,
        shuffled=config.shuffled,
        balance_batch=config.balance_batch,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
