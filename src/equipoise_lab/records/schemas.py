"""What the files of a run folder hold: the type of each key, for checking and for reading."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

__all__ = ["LOGS", "Audit", "Comparison", "Config", "Record", "Result", "TrackerRuns"]


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("the names must be different")
    return names


Count = Annotated[int, Field(ge=0, le=2**48)]  # sums of counts fit into int64
Size = Annotated[int, Field(ge=1, le=2**48)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e305, le=1e305)]  # sums of numbers are finite
Figure = Number | None  # None: it was not finite
NonNegative = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e305)]
Amount = NonNegative | None
Names = Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
Load = list[list[Count]]


class Record(TypedDict, total=False):
    """The base of all schemas: strict about types, open for further keys."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]


class Config(Record, total=False):
    """config.json: what a run stores of its options, model, text and machine."""

    strategy: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
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
    text_key: NotRequired[str]
    began: NotRequired[str]
    command: NotRequired[str]


class ComparisonOptions(Record):
    strategies: list[str]
    seeds: Size


class Comparison(Record):
    """compare.json."""

    options: ComparisonOptions


class SentTo(Record):
    """The last step and the last evaluation that a tracker has."""

    steps: Count
    evaluations: Count


class TrackerRun(Record):
    id: str
    sent: SentTo | None  # None: all that is recorded


TrackerRuns = dict[str, TrackerRun]  # trackers.json


LOGS: dict[str, Any] = {"steps": Step, "loads": Loads, "evaluations": Evaluation}
