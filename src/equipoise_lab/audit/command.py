"""The command: a model and a text -> a folder with what its experts do there."""

import json
from pathlib import Path
from typing import Any

from equipoise.attachment import attach
from equipoise.errors import EquipoiseError, UsageError
from equipoise.saved import BIASES_FILE, frozen_strategy, model_folder, read_biases
from equipoise_lab.audit.config import Audit
from equipoise_lab.audit.run import CutShort, Progress, audit_model
from equipoise_lab.experts.result import RESULT, Audited, summarise
from equipoise_lab.models.one_model import open_model
from equipoise_lab.records import write_json
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.text import HELD_OUT_TOKENS

__all__ = ["RESULT", "audit", "load_tokenizer", "table_rows"]

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
LENGTH = 512  # of a row, where nothing else is said and the model takes it
COLUMNS = (
    "layer", "experts", "k", "MaxVio", "floor", "dead", "starved", "domain information, bits", "of its most",
    "top-k score sum", "router entropy", "busiest of 8 ranks",
)  # fmt: skip


def audit(asked: Audit, progress: Progress, command: str = "") -> dict[str, Any]:
    """Runs the model on the text, writes ``audit.json`` into the folder and returns what is in it. ``command`` is what
    was typed, for the record.

    Where the text is cut short, by an error or by Ctrl-C, what was counted until then is written, marked as not
    complete, before that is raised.
    """
    asked.check()
    _refuse_run_without_model(asked.model)
    there = _earlier(asked)
    is_new = not asked.out.exists()
    asked.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the work
    try:
        return _audit(asked, progress, command, there)
    finally:
        if is_new and not any(asked.out.iterdir()):
            asked.out.rmdir()


def _audit(asked: Audit, progress: Progress, command: str, there: dict[str, Any]) -> dict[str, Any]:
    folder = model_folder(asked.model)
    progress.say(f"loading {folder}")
    opened = open_model(folder, dtype="auto", whole=True)
    if opened.weights != "loaded":
        raise UsageError(f"MODEL must have weights: {folder} has none. Give the folder of a saved model.")
    notes = list(opened.notes)
    longest = getattr(opened.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, longest) if asked.sequence_length is None else asked.sequence_length
    if length > longest:
        notes.append(
            f"rows of {length} tokens are longer than the {longest} that the model was made for: its choices at the "
            f"positions beyond say little. Take --sequence-length {longest}"
        )
    if (folder / BIASES_FILE).exists():
        attach(opened.model, frozen_strategy(read_biases(folder)[1]), biases=folder)
        notes.append(f"routed with the biases of {BIASES_FILE}, as it was trained")
    tokenizer = load_tokenizer(folder)

    def write(audited: Audited) -> dict[str, Any]:
        samples = {domain: audited.samples.get(domain, "") for domain in audited.watched.domains}
        found = summarise(audited, lambda token_id: tokenizer.decode([token_id]), levels_of(asked.data, samples))
        found |= {
            "model": str(asked.model),
            "model_type": opened.config.model_type,
            "num_parameters": opened.num_parameters,
            "data": asked.data,
            "command": command,
            "notes": [*notes, *_trained_on(asked, found["tokens"], length), *found["notes"]],
        }
        write_json(asked.out / RESULT, found)
        return found

    try:
        return write(
            audit_model(
                opened.model,
                lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
                None if asked.data == "corpus" else asked.data,
                progress,
                tokens=asked.tokens,
                length=length,
                batch=asked.batch,
                end=tokenizer.eos_token_id,
            )
        )
    except CutShort as cut:
        kept = f"{asked.out / RESULT} is still the whole audit that was there before."
        if not there.get("complete"):
            write(cut.audited)
            kept = f"What was counted until then is in {asked.out / RESULT}, marked as not complete."
        if isinstance(cut.reason, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        if isinstance(cut.reason, EquipoiseError):
            raise type(cut.reason)(f"{cut.reason} {kept}") from None
        progress.say(kept)
        raise cut.reason from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Nothing was counted yet, and nothing is written.") from None


def _refuse_run_without_model(folder: Path) -> None:
    """Of a run only the model is read, whatever version wrote its records."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not (folder / "model").is_dir() and isinstance(config, dict) and {"format", "strategy"} <= config.keys():
        there = f" What its experts did on its test text is in {folder / RESULT}." if (folder / RESULT).exists() else ""
        raise UsageError(
            f"MODEL must be a saved model, or a run that has one: {folder} is a run without the folder model. It was "
            f"trained with --no-save-model, or is not finished.{there}"
        )


def _trained_on(asked: Audit, tokens: dict[str, int], length: int) -> list[str]:
    """What to know of the text of a run that was trained on the same."""
    try:
        trained_on = json.loads((asked.model / "config.json").read_text(encoding="utf-8")).get("data")
    except (OSError, ValueError, AttributeError):
        return []
    share = min(HELD_OUT_TOKENS, asked.tokens // len(tokens) // length * length)
    if trained_on != asked.data or all(share <= number <= HELD_OUT_TOKENS for number in tokens.values()):
        return []
    return [
        f"the run was trained on this text but for what comes first: of a domain 5 % or {HELD_OUT_TOKENS:,} tokens, at "
        "most a quarter; what was read beyond that it has seen"
    ]


def _earlier(asked: Audit) -> dict[str, Any]:
    """What is in the folder, empty if nothing is. The same audit made anew replaces the old one; no other does, nor
    does one replace what a run has of its test text."""
    path = asked.out / RESULT
    try:
        there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_run = "command" not in there
    if is_run or (there["model"], there["data"]) != (str(asked.model), asked.data):
        of = "a run" if is_run else f"the audit of {there['model']} on {there['data']}"
        remedy = "Choose another with --out" + ("." if is_run else f", or delete {path}.")
        raise UsageError(f"--out must be a folder of this audit: {asked.out} has {of}. {remedy}")
    return there


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside a model."""
    from transformers import AutoTokenizer

    reason = "there is none."
    if any((folder / name).is_file() for name in TOKENIZERS):  # without a file Transformers makes an empty one
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # whatever a foreign folder makes of Transformers
            reason = " ".join(str(error).split())[:300]
    raise EquipoiseError(f"MODEL must have its tokenizer beside it: {folder}: {reason} Copy tokenizer.json there.")


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a terminal shows, a row a layer."""
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
        for layer in found["layers"]
    ]
