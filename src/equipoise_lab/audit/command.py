"""`equipoise audit`: a model and a text -> a folder that says what the model's experts do on the text."""

import datetime
from pathlib import Path
from typing import Any

from equipoise.attachment import attach
from equipoise.errors import EquipoiseError, UsageError
from equipoise.saved import BIASES_FILE, frozen_strategy, read_biases
from equipoise_lab.audit.config import Audit
from equipoise_lab.audit.run import IncompleteAudit, Progress, audit_model
from equipoise_lab.experts.result import RESULT, AuditData, summarise
from equipoise_lab.models.folders import model_folder
from equipoise_lab.models.load import load_model
from equipoise_lab.models.structure import read_config
from equipoise_lab.paths import check_writable
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.location import note_on_packaged
from equipoise_lab.train.text import HELD_OUT_TOKENS

__all__ = ["RESULT", "audit", "load_tokenizer", "table_rows"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
DEFAULT_LENGTH = 512  # of a row, or the model's maximum if that is less
COLUMNS = (
    "layer", "experts", "k", "MaxVio", "floor", "dead", "starved", "domain information, bits", "of its most",
    "top-k score sum", "router entropy", "busiest of 8 ranks",
)  # fmt: skip


def audit(options: Audit, progress: Progress, command: str = "") -> dict[str, Any]:
    """Runs the model on the text, writes ``audit.json`` into the folder ``options.out`` and returns its content.

    ``command`` is the command line, for the record. If an error or Ctrl-C ends the audit early, the counts so far are
    written, marked as incomplete, and the error is raised. They never replace a complete audit.
    """
    options.check()
    read_config(model_folder(options.model))  # a wrong MODEL is the first thing to say
    earlier = _read_earlier_audit(options)
    check_writable(options.out, "--out")
    if (note := note_on_packaged(options.data)) is not None:
        progress.say(note)
    return _audit(options, progress, command, has_complete_audit=bool(earlier.get("complete")))


def _audit(options: Audit, progress: Progress, command: str, *, has_complete_audit: bool) -> dict[str, Any]:
    folder, began = model_folder(options.model), datetime.datetime.now(datetime.UTC)
    progress.say(f"loading {folder}")
    loaded = load_model(folder, dtype="auto", require_all_weights=True)
    notes = list(loaded.notes)
    max_length = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    length = min(DEFAULT_LENGTH, max_length) if options.sequence_length is None else options.sequence_length
    if length > max_length:
        notes.append(
            f"rows of {length} tokens are longer than the {max_length} for which the model was made: its choices at "
            f"later positions mean little. Use --sequence-length {max_length}"
        )
    if (folder / BIASES_FILE).exists():
        attach(loaded.model, frozen_strategy(read_biases(folder)[1]), biases=folder)
        notes.append(f"routed with the biases of {BIASES_FILE}, as in training")
    tokenizer = load_tokenizer(folder)

    def write(data: AuditData) -> dict[str, Any]:
        samples = {domain: data.samples.get(domain, "") for domain in data.counts.domains}
        result = summarise(data, lambda token_id: tokenizer.decode([token_id]), levels_of(options.data, samples))
        result |= {
            "model": str(options.model),
            "model_type": loaded.config.model_type,
            "num_parameters": loaded.num_parameters,
            "data": options.data,
            "text_key": options.text_key,
            "began": began.isoformat(),
            "command": command,
            "notes": [*notes, *_training_text_notes(options, result["tokens"], length), *result["notes"]],
        }
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / RESULT, result)
        return result

    try:
        return write(
            audit_model(
                loaded.model,
                lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
                None if options.data == "corpus" else options.data,
                progress,
                tokens=options.tokens,
                length=length,
                batch=options.batch,
                end=tokenizer.eos_token_id,
                text_key=options.text_key,
            )
        )
    except IncompleteAudit as incomplete:
        outcome = f"{options.out / RESULT} still holds the earlier, complete audit."
        if not has_complete_audit:
            write(incomplete.data)
            outcome = f"The counts so far are in {options.out / RESULT}, marked as incomplete."
        if isinstance(incomplete.reason, KeyboardInterrupt):
            raise KeyboardInterrupt(outcome) from None
        if isinstance(incomplete.reason, EquipoiseError):
            raise type(incomplete.reason)(f"{incomplete.reason} {outcome}") from None
        progress.say(outcome)
        raise incomplete.reason from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Nothing was counted yet, so nothing was written.") from None


def _training_text_notes(options: Audit, tokens: dict[str, int], length: int) -> list[str]:
    """A note if the audit read further than the part of a run's own text that the run held out."""
    try:
        training_data = read_json(options.model / "config.json", dict).get("data")
    except EquipoiseError:
        return []
    share = min(HELD_OUT_TOKENS, options.tokens // len(tokens) // length * length)
    if training_data != options.data or all(share <= number <= HELD_OUT_TOKENS for number in tokens.values()):
        return []
    return [
        "the run was trained on this text, except for the beginning of each domain (5 % or "
        f"{HELD_OUT_TOKENS:,} tokens, at most a quarter): the model has seen what was read beyond that"
    ]


def _read_earlier_audit(options: Audit) -> dict[str, Any]:
    """The audit that lies in the folder, or {}. Only an audit of the same model and text may be replaced.

    An ``audit.json`` without a command is part of a run, and is never replaced.
    """
    path = options.out / RESULT
    if not path.exists():
        return {}
    earlier: dict[str, Any] = read_json(path, dict)  # a damaged one is named, not replaced: it may be part of a run
    is_run = "command" not in earlier
    model, data = earlier.get("model"), earlier.get("data")
    if is_run or (model, data) != (str(options.model), options.data):
        content = "a run" if is_run else f"the audit of {model} on {data}"
        remedy = "Choose another with --out" + ("." if is_run else f", or delete {path}.")
        raise UsageError(f"--out must be a folder of this audit: {options.out} holds {content}. {remedy}")
    return earlier


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model."""
    from transformers import AutoTokenizer

    reason = "there is none."
    if any((folder / name).is_file() for name in TOKENIZER_FILES):  # without a file Transformers makes an empty one
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # Transformers raises anything on files that it does not understand
            reason = " ".join(str(error).split())[:300]
    raise EquipoiseError(f"MODEL must have its tokenizer beside it: {folder}: {reason} Copy tokenizer.json there.")


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table for the terminal, one row per layer."""
    return [
        (
            layer["layer"],
            str(layer["experts"]),
            str(layer["k"]),
            f"{layer['maxvio']:.2f}",
            f"{layer['maxvio_floor']:.2f}",
            str(layer["dead_experts"]),
            str(layer["starved_experts"]),
            f"{layer['domain_information_bits']['value']:.3f}",
            f"{layer['domain_information_bits']['share']:.0%}",
            f"{layer['topk_score_sum']:.3f}",
            f"{layer['router_entropy']:.3f}",
            f"{layer['rank_load']['8']:.2f}" if "8" in layer["rank_load"] else "-",
        )
        for layer in result["layers"]
    ]
