"""The run folder: the only interface between training and analysis. Imports no torch.

A run is one strategy and one seed in one folder:

    config.json         the resolved configuration, versions, wrapper, names of the MoE layers (written once)
    steps.jsonl         one line per step: step, loss, maxvio_batch, ..., tokens (so far), seconds (of this step);
                        also strategy (of this step) in a run that changes it, and alerts (sentences) if some started
                        or ended
    loads.jsonl         one line per step: step, load (layers x experts counts of the step, pooled over ranks)
    evaluations.jsonl   one line per evaluation: step, overall figures, and by domain nats, bits per byte, load and
                        top-k score sum (by layer)
    audit.json          what the experts did in the last evaluation, on the test text, in the format of `equipoise
                        audit`: tokens and nats by domain, and by layer load (by domain), score sums, experts chosen
                        together and typical tokens of each expert; missing in old runs, and if a selection lets
                        experts choose tokens
    result.json         the result, written when the run is complete
    checkpoints/        what a resumed run needs
    model/              the trained model, for plain Transformers

The three ``.jsonl`` files only grow. A line is written in one piece and flushed. So a killed run leaves at most one
torn line, at the end. Reading drops that line; any other damage is an error that names the file and the line. A number
that is not finite (in a run that diverged) is written as null, so that every reader can parse the files as JSON.

A folder may be damaged, or come from somebody else. So everything is checked here when it is read, and whoever gets a
record can rely on the types below. Keys that they do not name may hold anything.
"""

import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from equipoise.errors import EquipoiseError, UsageError

__all__ = [
    "LOCK",
    "Audit",
    "Comparison",
    "Config",
    "Record",
    "Run",
    "check",
    "find_runs",
    "finite",
    "is_new",
    "read_json",
    "require_keys",
    "write_json",
]

FORMAT = 1
LOCK = ".lock"  # lock file of the process that trains in the folder
MAX_BYTES = 2**28  # of a JSON file or a line: hundreds of times more than a run of hundreds of layers writes


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("the names must be different")
    return names


Count = Annotated[int, Field(ge=0, le=2**48)]  # sums of counts fit into int64
Size = Annotated[int, Field(ge=1, le=2**48)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e305, le=1e305)]  # sums of numbers are finite
Figure = Number | None  # None: it was not finite
Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e305)] | None
Names = Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
Load = list[list[Count]]


class Record(TypedDict, total=False):
    """The base of all schemas: strict about types, open for further keys."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]


class Config(Record, total=False):
    """config.json: what a run stores of its options, model, text and machine."""

    strategy: str
    seed: Count
    steps: Size
    num_experts: Size
    experts_per_token: Size | None
    layers: Names
    domains: Names
    options: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]
    arch: str | None
    data: str | None
    command: str | None
    began: str
    score_function: str | None
    order: str | None
    dtype: Literal["bfloat16", "float32"]
    wrapper: str
    device: str
    corpus_fingerprint: str
    num_parameters: Count | None
    num_active_parameters: Count | None
    num_ranks: Size
    threads: Size
    vocab_size: Size | None
    sequence_length: Size | None
    sequences_per_micro_batch: Size | None
    micro_batches_per_step: Size | None
    learning_rate: Amount
    shuffled: bool | None


class Step(Record):
    """A line of steps.jsonl."""

    step: Size
    loss: NotRequired[Amount]
    maxvio_batch: NotRequired[Amount]
    maxvio_micro: NotRequired[Amount]
    bias_max: NotRequired[Amount]
    seconds: NotRequired[Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e305)]]
    alerts: NotRequired[list[str] | None]


class Loads(Record):
    """A line of loads.jsonl."""

    step: Size
    load: Load


class EvaluatedDomain(Record):
    load: NotRequired[Load]
    nats: NotRequired[Amount]
    bits_per_byte: NotRequired[Amount]


class Evaluation(Record):
    """A line of evaluations.jsonl."""

    step: Size
    domains: NotRequired[Annotated[dict[str, EvaluatedDomain], Field(min_length=1)]]
    maxvio_global: NotRequired[Amount]
    domain_information_bits: NotRequired[Figure]


class Losses(Record):
    nats: Amount
    bits_per_byte: NotRequired[Amount]


class Result(Record, total=False):
    """result.json."""

    val_nats: Amount
    val_perplexity: Amount
    val_bits_per_byte: Amount
    maxvio_global: Amount
    maxvio_floor: Amount
    maxvio_batch: Amount
    domain_information_bits: Figure
    dead_experts: Amount
    tokens_per_second: Amount
    domains: dict[str, Losses]


class Measurement(Record):
    value: Number
    bound: Number


class Information(Measurement):
    share: Number


class TypicalToken(Record):
    text: str
    share: Number
    count: Count


Partner = Annotated[list[Number], Field(min_length=2, max_length=2)]  # (other expert, share of tokens)


class AuditedLayer(Record):
    layer: str
    experts: Size
    k: Size
    load_by_domain: Load
    typical_tokens: list[list[TypicalToken]]
    partners: NotRequired[list[list[Partner]]]
    maxvio: Number
    maxvio_floor: Number
    dead_experts: Count
    starved_experts: Count
    effective_experts: Number
    domain_information_bits: Information
    domain_distance: Measurement
    topk_score_sum: Number
    router_entropy: Number


class AuditMean(Record):
    maxvio: Number
    domain_information_bits: Number
    information_by_level: NotRequired[dict[str, Number]]


class Audit(Record):
    """audit.json."""

    format: Any
    domains: Names
    layers: Annotated[list[AuditedLayer], Field(min_length=1)]
    tokens: dict[str, Count]
    mean: AuditMean
    nats: NotRequired[dict[str, Figure]]
    notes: NotRequired[list[str]]
    words: NotRequired[list[str]]
    model: NotRequired[str]
    model_type: NotRequired[str]
    num_parameters: NotRequired[Count]
    data: NotRequired[str]
    command: NotRequired[str]


class ComparisonOptions(Record):
    strategies: list[str]
    seeds: Size


class Comparison(Record):
    """compare.json."""

    options: ComparisonOptions


LOGS: dict[str, Any] = {"steps": Step, "loads": Loads, "evaluations": Evaluation}


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, which JSON cannot represent.

    >>> finite({"loss": float("nan"), "load": [1, 2]})
    {'loss': None, 'load': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_new(folder: Path) -> bool:
    """Whether ``folder`` is missing or empty. Ignores what a process leaves that is killed before its first file."""
    ignored = {".config.json.tmp", ".compare.json.tmp", LOCK}
    return not folder.is_dir() or all(path.name in ignored for path in folder.iterdir())


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically: ``path`` has either the old content or the new one, whatever happens."""
    text = json.dumps(finite(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    _write(path, [text.encode()])


def _write(path: Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a link there would lead to another file
    with open(temporary, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path, schema: Any = None) -> Any:
    """The content of a JSON file, which must fit ``schema``. Every problem is an ``EquipoiseError`` with the path."""
    try:
        with _open(path) as file:
            content = _parse(_read_at_most(file, path))
    except FileNotFoundError:
        raise EquipoiseError(
            f"A run folder must contain {path.name}: {path} does not exist. Either the run was stopped before it "
            "started, or this is no run folder. Train again into a new folder."
        ) from None
    except ValueError as error:
        raise EquipoiseError(
            f"{path} must be JSON: {error}. The file is damaged. Restore it, or create it again (a run: remove its "
            "folder and train; an audit: repeat the same `equipoise audit`)."
        ) from None
    if schema is not None:
        check(str(path), content, schema)
    return content


def check(where: str, content: Any, schema: Any) -> None:
    """Raises ``EquipoiseError``, which names ``where`` and the first value that does not fit ``schema``."""
    try:
        _adapter(schema).validate_python(content)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        name = ".".join(map(str, error["loc"]))
        problem = f"{error['msg'][0].lower()}{error['msg'][1:]}, got {reprlib.repr(error['input'])}"
        if error["type"] == "missing":
            raise _missing(where, [name]) from None
        raise EquipoiseError(
            f"{where} must contain {name or 'a record'} in the right form: {problem}. The file is damaged or of "
            "another version; restore it or make it again."
        ) from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def require_keys(where: str, content: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises ``EquipoiseError`` unless ``content``, which ``where`` names, has all ``keys``."""
    if missing := [key for key in keys if key not in content]:
        raise _missing(where, missing)


def _missing(where: str, names: list[str]) -> EquipoiseError:
    return EquipoiseError(
        f"{where} must contain {', '.join(names)}: it does not. The file is damaged or of another version; restore it "
        "or make it again."
    )


def _open(path: Path) -> BinaryIO:
    """Raises FileNotFoundError if there is nothing, and EquipoiseError if it cannot be read."""
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise EquipoiseError(f"A record must be a file: {path} is none. Remove it, or restore the file.")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EquipoiseError(f"A record must be readable: {path}: {error.strerror}. Check its permissions.") from None


def _read_at_most(file: BinaryIO, path: Path, line: bool = False) -> bytes:
    content = file.readline(MAX_BYTES + 1) if line else file.read(min(MAX_BYTES, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > MAX_BYTES:
        raise EquipoiseError(
            f"{'A line of ' if line else ''}{path} must have at most {MAX_BYTES:,} bytes: it has more. It is no record "
            "of a run. Restore the file, or remove the folder."
        )
    return content


def _parse(content: bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\u" in content:  # it may be half a surrogate pair, which no page can show
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Run:
    """A run folder. ``Run.create`` creates one and ``Run(path)`` opens one. Reading never changes anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        path = self.path / "config.json"
        self.config: dict[str, Any] = read_json(path)
        file_format = self.config.get("format") if isinstance(self.config, dict) else None
        if file_format is None and isinstance(self.config, dict) and "model_type" in self.config:
            raise EquipoiseError(
                f"A run folder must contain a run: {self.path} contains a Transformers model. Give the folder that was "
                "passed as --out to `equipoise compare`, `train` or `audit`."
            )
        if file_format is True or file_format != FORMAT:
            raise EquipoiseError(
                f"{path} must have format {FORMAT}: got {file_format!r}. It was written by "
                "another version of equipoise. Read it with that version, or train again."
            )
        check(str(path), self.config, Config)

    def require(self, *keys: str) -> None:
        """Raises ``EquipoiseError`` unless config.json has these keys."""
        require_keys(str(self.path / "config.json"), self.config, keys)

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> "Run":
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", {"format": FORMAT, **config})
        return cls(path)

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Appends one line to ``steps``, ``loads`` or ``evaluations``."""
        assert log in LOGS, log
        with open(self.path / f"{log}.jsonl", "ab") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Flushes the logs to the disk. A checkpoint must not survive a crash without the records before it."""
        for path in (self.path / f"{log}.jsonl" for log in LOGS):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def rows(self, log: str) -> Iterator[dict[str, Any]]:
        """The lines of a log, oldest first. Drops a torn last line, which a killed process leaves."""
        assert log in LOGS, log
        path = self.path / f"{log}.jsonl"
        if not path.exists():
            return
        number, last = 0, 0
        with _open(path) as file:
            while line := _read_at_most(file, path, line=True):
                number += 1
                if line == b"\n":
                    continue
                try:
                    row = _parse(line)
                    if not isinstance(row, dict) or "step" not in row:
                        raise ValueError("not an object with a step")
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        return
                    raise EquipoiseError(
                        f"{path} must have one JSON object per line: line {number} is damaged ({error}). Restore the "
                        "file, or remove everything from that line on and resume the run."
                    ) from None
                self._check(f"{path}, line {number},", log, row, last)
                last = row["step"]
                yield row

    def _check(self, where: str, log: str, row: dict[str, Any], last: int) -> None:
        """``last``: the step of the line before, or 0."""
        check(where, row, LOGS[log])
        # There may be two evaluations after the last step.
        if row["step"] != last + 1 if log != "evaluations" else row["step"] < last:
            raise EquipoiseError(
                f"{where} must follow step {last}: it is of step {row['step']}. A line is missing or out of place. "
                "Restore the file, or train again."
            )
        if log == "loads":
            self._check_load(where, row["load"])
        for name, domain in row.get("domains", {}).items() if log == "evaluations" else ():
            self._check_load(f"{where} for domain {name!r}", domain.get("load"))

    def _check_load(self, where: str, load: list[list[int]] | None) -> None:
        layers, experts = self.config.get("layers"), self.config.get("num_experts")
        if load is None or layers is None or experts is None:
            return
        sizes = [len(layer) for layer in load]
        if sizes != [experts] * len(layers):
            raise EquipoiseError(
                f"{where} must contain the load of {len(layers)} layers of {experts} experts: it has layers of "
                f"{reprlib.repr(sizes)} experts. The file is damaged; restore it or train again."
            )

    def rewind(self, step: int) -> None:
        """Removes every line after ``step``. A resumed run does so before it continues from its checkpoint."""
        for log in LOGS:
            path = self.path / f"{log}.jsonl"
            if not path.exists():
                continue
            remaining = [row for row in self.rows(log) if row["step"] <= step]
            _write(path, map(_line, remaining))
        for name in ("audit.json", "result.json"):
            (self.path / name).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json", Result)

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", dict(result))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def find_runs(folder: str | Path) -> list[Run]:
    """The runs in ``folder``, in the order of their start. ``folder`` may also be a run. No run at all is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"Runs are read from a folder: {folder} {problem}. Give the folder that was passed as --out.")
    paths = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(
            f"{folder} must contain runs, each a folder with a config.json: it contains none. Give the folder that was "
            "passed as --out to `equipoise compare` or `equipoise train`."
        )
    return sorted(map(Run, paths), key=lambda run: (run.config.get("began", ""), run.path.name))
