"""Writes docs/evidence/speed.md, what balancing costs and how fast the lab is, from the stored results.

    make bench                            # measures, then writes the page
    python benchmarks/speed.py            # writes the page
    python benchmarks/speed.py --check    # fails if the page is not what the stored results give

An older `overhead.json` may lack alerts and collectives: the page then leaves them out. Anything else missing is an
error. The scripts that measured `lab_step.json` and `attention.json` were removed; only their results are left.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equipoise_lab.records import read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence" / "speed.md"
UPDATE_LIMIT = 1.2  # of step() over its bare operations
ALERT_LIMIT = 0.3  # milliseconds
HELP_LIMIT, IMPORT_LIMIT = 0.5, 0.1  # seconds
RESULT_NAMES = ("overhead", "operations", "experts", "trainer", "lab_step", "attach", "audit", "attention", "ranks")
UNKNOWN_REASON = "The reason is not known."
MOST_CORES_OF_OTHERS = 0.2  # above it the page warns that other programs disturbed the measurement


class Target(NamedTuple):
    """A limit that a measurement must keep. ``reason`` explains a miss."""

    name: str
    measured: str
    limit: str
    is_met: bool
    section: str
    reason: str = UNKNOWN_REASON


class Section(NamedTuple):
    title: str
    lines: list[str]
    targets: Sequence[Target] = ()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(header), "|---" * len(header) + "|", *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def source_line(stored: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    return [f"`{stored['command']}`, {stored['hardware']}, {stored['date']}, {versions}.", ""]


def disturbance_note(stored: dict[str, Any]) -> list[str]:
    """A sentence, if other programs ran during a measurement."""
    cores = stored["cores_of_others"]
    if cores is None or cores < MOST_CORES_OF_OTHERS:
        return []
    return [
        f"Other programs took {cores:.1f} cores of this machine during the measurement. So times are too long, and "
        "rows with several threads cannot be trusted.",
        "",
    ]


def format_ratio(ratio: dict[str, float], digits: int = 3) -> str:
    """A median with its interval."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def format_verdict(is_met: bool | None) -> str:
    return "" if is_met is None else "met" if is_met else "**missed**"


def explain_misses(targets: Iterable[Target]) -> list[str]:
    """Each reason, below the targets that are missed for it."""
    names_by_reason: dict[str, list[str]] = {}
    for target in targets:
        if not target.is_met:
            names_by_reason.setdefault(target.reason, []).append(target.name)
    lines = []
    for reason, names in names_by_reason.items():
        if len(names) == 1:
            lines += [f"Missed: {names[0]}. {reason}", ""]
        else:
            lines += ["Missed:", "", *(f"- {name}" for name in names), "", reason, ""]
    return lines


# ---- what balancing costs ----
LOSS_REASON = (
    "The loss keeps sums of scores in every forward and adds a gradient in every backward. The lab's routers score in "
    "bfloat16 and the loss in float32, so both make the scores again from the logits. Most operations take as long "
    "for few tokens as for many. The cost shows because the lab's experts are small."
)
STEP_REASONS = {
    "loss-free": "Loss-Free counts every choice and moves the biases once. The counting is what costs.",
    "lbl:scope=global_batch": LOSS_REASON,
    "lbl:scope=sequence": LOSS_REASON,
    "quantile": "Every router call sorts every token's margin at every expert into a histogram.",
}
INTERVAL_REASON = "The median is within the target. But the interval is so wide that the cost itself may not be."


def balancing(stored: dict[str, Any]) -> Section:
    title = "Balancing in a step"
    unbalanced, *rows = stored["steps"]
    targets = [
        Target(
            f"step under `{row['strategy']}`, over `none`",
            format_ratio(row["ratio"]),
            f"{row['limit']}",
            row["holds"],
            title,
            STEP_REASONS[row["strategy"]] if row["ratio"]["median"] > row["limit"] else INTERVAL_REASON,
        )
        for row in rows
        if row["limit"] is not None
    ]
    lines = [
        "The lab's default model trains on one thread, under the strategies in turn. The time of a step is divided by "
        f"that under `none`, which counts and moves nothing ({unbalanced['seconds']:.2f} s). The target is for the "
        "median. The upper end of the interval may lie up to 0.02 above it.",
        "",
        *table(
            ("strategy", "step over `none`", "target", ""),
            (
                (
                    f"`{row['strategy']}`",
                    format_ratio(row["ratio"]),
                    "" if row["limit"] is None else f"{row['limit']}",
                    format_verdict(row["holds"]),
                )
                for row in rows
            ),
        ),
    ]
    return Section(title, [*lines, *explain_misses(targets), *source_line(stored)], targets)


def routers(stored: dict[str, Any]) -> Section:
    title = "A router's forward"
    rows = stored["routers"]
    targets = [
        Target(
            f"forward of a router that only counts (`{row['strategy']}`), {row['tokens']:,} tokens, over one that is "
            "not attached",
            format_ratio(row["forward"]),
            f"{row['limit']}",
            row["holds"],
            title,
            "A router alone is one small product and a top-k. Recording and counting the choice takes nearly as long "
            "for few tokens as for many. Next to a layer's experts the cost does not show: see the steps above.",
        )
        for row in rows
        if row["limit"] is not None
    ]

    def added_milliseconds(ratio: dict[str, float]) -> str:
        return f"{(ratio['median'] - 1) * ratio['milliseconds_plain']:.2f}"

    lines = [
        "Windows of eight micro-batches run through the routers of the default model alone. The table compares "
        "attached routers with the same routers that are not attached. If the strategy has a loss, the `loss()` of "
        "every micro-batch is included. *With backward* includes the backwards and the `step()` at the end. "
        "Milliseconds are for one call.",
        "",
        "`frozen` only counts, so it is the floor for an attached router. The floor for the loss is its *bare "
        "operations* on the same tensors, without the library. A micro-batch of the default model has 1,024 tokens.",
        "",
        *table(
            (
                "strategy",
                "tokens",
                "forward",
                "added, ms",
                "with backward",
                "added, ms",
                "bare operations, ms",
                "target, forward",
                "",
            ),
            (
                (
                    f"`{row['strategy']}`",
                    f"{row['tokens']:,}",
                    format_ratio(row["forward"]),
                    added_milliseconds(row["forward"]),
                    format_ratio(row["forward_and_backward"]),
                    added_milliseconds(row["forward_and_backward"]),
                    "" if row["milliseconds_bare"] is None else f"{row['milliseconds_bare']:.2f}",
                    "" if row["limit"] is None else f"{row['limit']}",
                    format_verdict(row["holds"]),
                )
                for row in rows
            ),
        ),
    ]
    return Section(title, [*lines, *explain_misses(targets), *source_line(stored)], targets)


SEQUENCE_REASON = (
    "The loss within sequences counts by sequence. A mask of integers may number packed sequences. Without waiting for "
    "the GPU, nobody knows how many there are. So the forward makes a table with a row for each token, and the "
    "backward makes it again. A boolean mask only marks padding: pass `attention_mask.bool()` if nothing is packed."
)


def operations(stored: dict[str, Any]) -> Section:
    title = "Operations and bytes"
    fused = {_call(row): row for row in stored["calls"] if row["fused"]}
    rows = []
    missed: dict[str, list[str]] = {"": [], "; `fused=True`": []}  # calls beyond their target
    num_targets = dict.fromkeys(missed, 0)
    for row in stored["calls"]:
        if not row["fused"]:
            cells: list[str] = []
            for version, kind in ((row, ""), (fused[_call(row)], "; `fused=True`")):
                measured, limit, is_met = _operations_of_call(version)
                cells += [measured, limit, format_verdict(is_met)]
                num_targets[kind] += is_met is not None
                missed[kind] += [_call(row)] if is_met is False else []
            once, num_bytes = f"{row['micro_batch']:g} + {row['step']:g}", f"{row['bytes']:.3g}"
            rows.append((_call(row), *cells, once, num_bytes))
    targets = [
        Target(
            f"kinds of router calls whose operations are within their target{kind}",
            f"{number - len(missed[kind])} of {number}",
            "all",
            not missed[kind],
            title,
            f"These are beyond it: {'; '.join(missed[kind])}. {SEQUENCE_REASON}",
        )
        for kind, number in num_targets.items()
    ]
    layers, experts, k = stored["layers"], stored["experts"], stored["k"]
    columns = ("strategy", "a call", "target", "", "fused", "target", "", "a micro-batch + `step()`", "bytes")
    lines = [
        "The table shows what balancing adds to a router call, written as forward + backward. An operation is a kernel "
        "launch on a GPU. Bytes are those by token and layer that live until the backward. All are counted exactly, on "
        f"an accelerator that exists in Python only, with {experts} experts and {k} per token. A micro-batch and the "
        f"`step()` add some operations once, for {layers} layers.",
        "",
        "*Fused* means with the Triton kernels of `attach(..., fused=True)`. The tests run them in Triton's "
        "interpreter, and they compile for GPUs. They have not run on a GPU yet.",
        "",
        *table(columns, rows),
        "Where autograd keeps the scores, the losses keep nothing. `z` has no closed form: autograd makes its gradient "
        "from the logits, and these are kept.",
        "",
    ]
    return Section(title, [*lines, *explain_misses(targets), *source_line(stored)], targets)


def _call(row: dict[str, Any]) -> str:
    mask = f", {row['mask']} mask" if row["mask"] else ""
    return f"`{row['strategy']}`, {row['score_function']} scores{mask}"


def _operations_of_call(row: dict[str, Any]) -> tuple[str, str, bool | None]:
    """In forward and backward: measured, the target, and whether it is met; None without one."""
    forward, backward, most = row["forward"], row["backward"], (row["forward_limit"], row["backward_limit"])
    measured = f"{forward:g} + {backward:g}"
    if None in most:
        return measured, "", None
    return measured, f"{most[0]} + {most[1]}", forward <= most[0] and backward <= most[1]


def updates(stored: dict[str, Any]) -> Section:
    title = "`step()`"
    first, *_ = rows = stored["updates"]
    target = Target(
        f"`step()` of Loss-Free over its bare operations, {first['layers']} layers x {first['experts']} experts",
        format_ratio(first["over_floor"]),
        f"{UPDATE_LIMIT}",
        first["over_floor"]["median"] <= UPDATE_LIMIT,
        title,
        "The bare operations too read and write every layer's bias. Each bias is a separate tensor, and somebody may "
        "have written into it. So `step()` also looks at each of these tensors. It ends the window, and searches for "
        "layers that were not called. All this runs right after the forwards, when nothing of it is in the caches.",
    )
    lines = [
        "Once per optimizer step, `step()` closes the window and moves all biases, here under Loss-Free and on one "
        "thread. The time should not depend on the number of tokens. *Bare operations* do the same work on the same "
        "tensors, without the library.",
        "",
        *table(
            ("layers x experts", "tokens", "ms", "bare operations, ms", "ratio", "target", ""),
            (
                (
                    f"{row['layers']} x {row['experts']}",
                    f"{row['tokens']:,}",
                    f"{row['milliseconds']:.2f}",
                    f"{row['floor_milliseconds']:.2f}",
                    format_ratio(row["over_floor"]),
                    target.limit if row is first else "",
                    format_verdict(target.is_met) if row is first else "",
                )
                for row in rows
            ),
        ),
    ]
    return Section(title, [*lines, *explain_misses([target]), *source_line(stored)], [target])


def alerts(stored: dict[str, Any]) -> Section | None:
    if "alerts" not in stored:  # an older result
        return None
    title, step_seconds, first = "Alerts", stored["steps"][0]["seconds"], stored["alerts"][0]
    target = Target(
        f"`Alerts.see`, {first['layers']} layers x {first['experts']} experts, mean of all windows",
        f"{first['milliseconds_mean']:.2f} ms",
        f"{ALERT_LIMIT} ms",
        first["milliseconds_mean"] <= ALERT_LIMIT,
        title,
        "Biases and loads are copied, stacked and looked at right after the forwards, when nothing of them is in the "
        "caches. The judgement at the end of a stretch reads 20 windows at once.",
    )
    lines = [
        "`Alerts.see` runs once per optimizer step. Its time includes reading loads and biases. It adds loads up, and "
        "judges them at the end of a stretch of windows. A step of the default model takes "
        f"{1000 * step_seconds:.0f} ms.",
        "",
        *table(
            ("layers x experts", "ms a window, usual", "ms a window, when it judges", "ms a window, mean of all"),
            (
                (
                    f"{row['layers']} x {row['experts']}",
                    f"{row['milliseconds']:.2f}",
                    f"{row['milliseconds_judged']:.2f}",
                    f"{row['milliseconds_mean']:.2f}",
                )
                for row in stored["alerts"]
            ),
        ),
    ]
    return Section(title, [*lines, *explain_misses([target]), *source_line(stored)], [target])


def memory_and_start(stored: dict[str, Any], attach: dict[str, Any], audit: dict[str, Any]) -> Section:
    title = "Memory and start-up"
    memory, start = stored["memory"], stored["start"]
    added = start["added_to_torch_cpu_seconds"]
    slowest = max(attach["rows"], key=lambda row: row["first_cpu_seconds"])
    command, pair, peak = audit["command_time"], audit["over_bare_forwards"], audit["peak_memory"]
    few, many = peak["few"], peak["many"]
    overhead_targets = [
        Target(
            f"memory of a training process, attached over not attached ({memory['megabytes_plain']:,.0f} MiB)",
            format_ratio(memory["ratio"]),
            f"{memory['limit']}",
            memory["holds"],
            title,
        ),
        Target(
            "`equipoise --help`",
            f"{start['help_seconds']:.2f} s",
            f"{HELP_LIMIT} s",
            start["help_seconds"] <= HELP_LIMIT,
            title,
        ),
        Target(
            "`import equipoise` after `import torch`, CPU time",
            f"{added:.3f} s" if added > 0 else f"too small to measure ({added:.3f} s)",
            f"{IMPORT_LIMIT} s",
            added <= IMPORT_LIMIT,
            title,
        ),
    ]
    attach_target = Target(
        f"`attach`, {slowest['layers']} layers, the slowest of {len(attach['rows'])} families (`{slowest['family']}`), "
        "CPU time",
        f"{slowest['first_cpu_seconds']:.3f} s",
        f"{attach['limit_cpu_seconds']} s",
        attach["holds"],
        title,
    )
    limits = audit["bars"]
    audit_targets = [
        Target(
            f"`equipoise audit`, {command['tokens']:,} tokens",
            f"{command['seconds']} s",
            f"{limits['seconds']:.0f} s",
            command["holds"],
            title,
        ),
        Target(
            f"work of an audit over the bare forwards, {pair['tokens']:,} tokens",
            f"{pair['ratio']:.3f} ({pair['ratios'][0]:.3f} to {pair['ratios'][-1]:.3f})",
            f"{limits['ratio']}",
            pair["holds"],
            title,
            "Besides running the forwards, an audit counts experts by token, by domain and by pair, layer by layer. It "
            "shows because the model is small.",
        ),
        Target(
            f"memory of an audit, {many['tokens']:,} tokens ({many['peak_mib']:.0f} MiB) over {few['tokens']:,}",
            f"{peak['growth']:.3f}",
            f"{limits['growth']}",
            peak["holds"],
            title,
        ),
    ]
    lines = []
    for targets, result in ((overhead_targets, stored), ([attach_target], attach), (audit_targets, audit)):
        rows = ((target.name, target.measured, target.limit, format_verdict(target.is_met)) for target in targets)
        lines += table(("", "measured", "target", ""), rows)
        lines += [*explain_misses(targets), *source_line(result)]
    return Section(title, lines, [*overhead_targets, attach_target, *audit_targets])


MEMORY_ON_RANKS = [
    "**Memory on every rank.**",
    "",
    "- Counts: 8 L E bytes for each micro-batch of the open window, and for the last one, which `maxvio_micro` needs.",
    "- Biases: 4 L E bytes.",
    "- With losses: one byte of mask by token for all layers, and nothing else by token. The exception is a checkpoint "
    "or an offload that keeps something else than the scores. Then the chosen experts are kept until the backward: "
    "2 k bytes per token and layer.",
    "- `quantile`: two histograms of 8 L E bins bytes, one for the window and one for the open micro-batch.",
    "",
]


def collectives(stored: dict[str, Any], ranks: dict[str, Any]) -> Section:
    lines = []
    if "collectives" in stored:  # an older result has none
        lines += [
            "This table times `step()` of Loss-Free on gloo ranks of one machine. Ranks that pool their counts are "
            "compared with the same ranks, each alone. Both run in turn, after a barrier.",
            "",
            *table(
                ("layers x experts", "ranks", "ms", "ms, each alone", "ratio", "collectives", "bytes per rank"),
                (
                    (
                        f"{row['layers']} x {row['experts']}",
                        f"{row['ranks']}",
                        f"{row['milliseconds']:.2f}",
                        f"{row['milliseconds_alone']:.2f}",
                        format_ratio(row["ratio"], 2),
                        f"{row['collectives']}",
                        f"{row['collective_bytes']:,}",
                    )
                    for row in stored["collectives"]
                ),
            ),
            *source_line(stored),
        ]
    lines += [
        f"The next table compares a whole step on {ranks['ranks']} gloo ranks with one without equipoise, in "
        f"{ranks['pairs']} pairs of steps. A step has {ranks['step']}. The ranks share the cores of this machine. "
        "`none` only counts, so its quartiles show the noise of the machine. Losses cost more than counting, because "
        "they have a gradient at every router. It shows because the model's experts are small.",
        "",
        *table(
            ("strategy", "ratio, median (quartiles)", "collectives a step", "bytes per step and rank"),
            (
                (
                    f"`{row['strategy']}`",
                    "{1:.3f} ({0:.3f} to {2:.3f})".format(*row["ratio"]),
                    f"{row['collectives']}",
                    f"{row['collective_bytes']:,}",
                )
                for row in ranks["step_time"]
            ),
        ),
        "The last table shows how the local part of Loss-Free grows with the number of layers L and of experts E. It "
        "was measured on one thread, without a network. The time of counting a router call is the difference between "
        "two forwards, so it is noisy.",
        "",
        *table(
            ("layers x experts", "`step()`, ms", "counting a router call, µs", "bytes per window, 8 L E"),
            (
                (
                    f"{row['layers']} x {row['experts']}",
                    f"{row['step_milliseconds']:.1f}",
                    f"{row['call_microseconds']:.0f}",
                    f"{row['collective_bytes']:,}",
                )
                for row in ranks["growth"]
            ),
        ),
        *source_line(ranks),
        "A network adds to this, and nothing of it was measured. [Many ranks](../how-to/many_ranks.md) has a formula, "
        "and says what travels under which strategy.",
        "",
        *MEMORY_ON_RANKS,
    ]
    return Section("Collectives", lines)


# ---- how fast the lab is ----
def experts(stored: dict[str, Any]) -> Section:
    title = "Experts"

    def shape(row: dict[str, Any]) -> str:
        return f"{row['dim']}, {row['hidden']}, {row['experts']}, {row['k']}, {row['tokens']}, {row['dtype']}"

    limit = stored["limit"]
    met = {shape(row): row["ours_over_best_stock"]["median"] <= limit for row in stored["rows"]}
    ratios = [row["ours_over_best_stock"]["median"] for row in stored["rows"]]
    target = Target(
        "`nn.MoE`, forward and backward, over the best of Transformers, every shape",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{limit}",
        stored["holds"],
        title,
        f"The shapes that miss it: {'; '.join(name for name, is_met in met.items() if not is_met)}. Both ways compute "
        "the same grouped products. The larger their share of the time, the less there is to gain around them.",
    )
    dense_target = Target(
        "`nn.MoE`, forward and backward, over a dense SwiGLU, every shape",
        _dense_ranges(stored["rows"]),
        ", ".join(f"{limit} in {dtype}" for dtype, limit in stored["dense_limits"].items()),
        stored["dense_holds"],
        title,
        "Each expert multiplies few rows by a matrix of its own, which is slower than one large product. And every "
        "expert's matrix is read and gets a gradient.",
    )
    lines = [
        "The table times forward and backward of one layer. *Ours* is `nn.MoE`. It is compared with the block of "
        "Qwen3-MoE, under each way in which Transformers computes experts. The best of these ways is named. *Dense* is "
        "the floor: one dense SwiGLU with as many operations as the experts of a token.",
        "",
        *table(
            ("D, F, E, k, tokens", "ours, ms", "best of Transformers", "ours over it", f"target {limit}",
             "ours over dense", "best over dense"),
            (
                (
                    shape(row),
                    f"{row['milliseconds']['ours']:.1f}",
                    f"`{row['best_stock']}`, {row['milliseconds'][row['best_stock']]:.1f} ms",
                    format_ratio(row["ours_over_best_stock"], 2),
                    format_verdict(met[shape(row)]),
                    format_ratio(row["ours_over_dense"], 2),
                    format_ratio(row["best_stock_over_dense"], 2),
                )
                for row in stored["rows"]
            ),
        ),
        "D: width of the model. F: width of an expert. E: number of experts. k: experts per token.",
        "",
    ]  # fmt: skip
    targets = [target, dense_target]
    return Section(title, [*lines, *explain_misses(targets), *source_line(stored)], targets)


def _dense_ranges(rows: list[dict[str, Any]]) -> str:
    by_dtype: dict[str, list[float]] = {}
    for row in rows:
        by_dtype.setdefault(row["dtype"], []).append(row["ours_over_dense"]["median"])
    return ", ".join(f"{min(r):.2f} to {max(r):.2f} in {dtype}" for dtype, r in by_dtype.items())


SIDES = {
    "trainer": "transformers.Trainer",
    "lab": "the lab",
    "lab_with_grouped_mm": "the lab with Transformers' experts",
}


def trainer(stored: dict[str, Any]) -> Section:
    title = "The lab beside transformers.Trainer"
    lab = next(row for row in stored["rows"] if row["side"] == "lab")
    target = Target(
        "speed of the lab over transformers.Trainer (at least)",
        format_ratio(lab["over_trainer"], 2),
        f"{stored['limit']}",
        stored["holds"],
        title,
        "Attention, norms and dense products are those of Transformers on both sides.",
    )
    lines = [
        "Both sides train the same model from the same weights on the same micro-batches "
        f"({stored['tokens_per_step']:,} tokens per step), with nothing attached. They run in turn, each in its own "
        "processes.",
        "",
        *table(
            ("", "tokens/s", "speed over the Trainer", "target", ""),
            (
                (
                    SIDES[row["side"]],
                    f"{row['tokens_per_second']:,}",
                    "1" if row["side"] == "trainer" else format_ratio(row["over_trainer"], 2),
                    target.limit if row is lab else "",
                    format_verdict(target.is_met) if row is lab else "",
                )
                for row in stored["rows"]
            ),
        ),
    ]
    return Section(title, [*lines, *explain_misses([target]), *source_line(stored)], [target])


PARTS = {
    "data": "data: the micro-batches of the step",
    "forward": "forward, including the loss of the text and the counting at the routers",
    "backward": "backward, including that of the balancing loss",
    "clipping": "clipping",
    "optimizer": "optimizer",
    "balancing": "balancing: `loss()`, `step()`, `metrics()`",
    "records": "records: what a run writes about a step",
    "rest": "rest: the step minus all of these",
}


def step_parts(stored: dict[str, Any]) -> Section:
    step, run = stored["step"], stored["run"]
    share = {row["part"]: row["share"] for row in step["parts"]}
    extra = sum(row["over_step"] for row in run["rows"])
    lines = [
        f"The default model trains under `{stored['strategy']}` in {stored['dtype']}, on one thread. A step takes "
        f"{step['seconds']:.3f} s, which is {stored['tokens_per_step'] / step['seconds']:,.0f} tokens/s. Forward and "
        f"backward are {share['forward'] + share['backward']:.1%} of it. Times are medians over {step['steps']} steps; "
        f"together they are {step['seconds_of_parts']:.3f} s. Shares refer to the sum over all steps.",
        "",
        *table(
            ("part", "ms", "share"),
            ((PARTS[row["part"]], f"{1000 * row['seconds']:.1f}", f"{row['share']:.1%}") for row in step["parts"]),
        ),
        f"A default run ({run['steps']} steps) also evaluates and saves. Spread over its steps, that adds {extra:.1%} "
        "to each step:",
        "",
        *table(
            ("", "s", "times per run", "added to each step"),
            (
                (row["what"], f"{row['seconds']:.2f}", f"{row['times']}", f"{row['over_step']:.1%}")
                for row in run["rows"]
            ),
        ),
        *disturbance_note(stored),
        *source_line(stored),
    ]
    return Section("Where a step of the lab goes", lines)


def faster_way(ratio: dict[str, float]) -> str:
    """The faster way, by the ratio of the other way's time to the lab's."""
    if ratio["low"] > 1:
        return "the lab's way"
    return "the other way" if ratio["high"] < 1 else "undecided"


def steps_to_pay_back(row: dict[str, Any]) -> str:
    """The number of steps after which compiling has saved the time it took. Empty if it is not the faster way."""
    if faster_way(row["ratio"]) != "the other way":
        return ""
    return f"{row['compile_seconds'] / (row['seconds_lab'] * (1 - row['ratio']['median'])):,.0f}"


def alternatives(stored: dict[str, Any], attention: dict[str, Any]) -> Section:
    page_faults = next(row for row in stored["remedies"] if "minor_faults_lab" in row)
    failed = [row for row in stored["compiled"] if row["error"] is not None]
    lines = [
        "Each row compares a choice of the lab with another way. The ratio is the time of a step the other way, "
        "divided by its time the lab's way. Above 1 the lab's way is faster.",
        "",
        *table(
            ("", "the lab's way", "the other way", "ms, lab", "ms, other", "other over lab", "faster"),
            (
                (
                    row["remedy"],
                    row["lab"],
                    row["other"],
                    f"{1000 * row['seconds_lab']:.0f}",
                    f"{1000 * row['seconds_other']:.0f}",
                    format_ratio(row["ratio"], 2),
                    "undecided"
                    if row["remedy"] == "threads" and disturbance_note(stored)
                    else faster_way(row["ratio"]),
                )
                for row in stored["remedies"]
            ),
        ),
        f"Minor page faults a step: {page_faults['minor_faults_lab']:,.0f} with freed memory kept, "
        f"{page_faults['minor_faults_other']:,.0f} without.",
        "",
        "The next table compares decoder layers that `torch.compile` compiled with the lab's own step, in the same "
        "precision. The ratio excludes the time to compile. If compiling is faster, the last column says how many "
        f"steps pay for it. A default run has {stored['run']['steps']} steps.",
        "",
        *table(
            ("", "compiled in, s", "ms, lab", "ms, compiled", "compiled over lab", "faster", "steps to pay it back"),
            (
                (row["way"], "", "", "", "does not run", "", "")
                if row["error"] is not None
                else (
                    row["way"],
                    f"{row['compile_seconds']:.0f}",
                    f"{1000 * row['seconds_lab']:.0f}",
                    f"{1000 * row['seconds_other']:.0f}",
                    format_ratio(row["ratio"], 2),
                    faster_way(row["ratio"]),
                    steps_to_pay_back(row),
                )
                for row in stored["compiled"]
            ),
        ),
        *(line for row in failed for line in (f"Does not run, {row['way']}: `{row['error']}`", "")),
        *disturbance_note(stored),
        *source_line(stored),
        "Attention: on a CPU the lab uses `eager`.",
        "",
        *table(
            ("", "s a step, eager", "s a step, sdpa", "eager over sdpa, median (quartiles)"),
            (
                (
                    "with norms on queries and keys",
                    f"{attention['seconds']['eager']:.2f}",
                    f"{attention['seconds']['sdpa']:.2f}",
                    "{:.2f} ({:.2f} to {:.2f})".format(attention["ratio"], *attention["quartiles"]),
                ),
            ),
        ),
        *source_line(attention),
    ]
    return Section("What the lab's choices are worth", lines)


def floors(stored: dict[str, Any], experts: dict[str, Any], audit: dict[str, Any]) -> Section:
    frozen = next(row for row in stored["routers"] if row["strategy"] == "frozen")
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in experts["rows"]):
        ratios = [row["ours_over_dense"]["median"] for row in experts["rows"] if row["dtype"] == dtype]
        name = f"`nn.MoE`, {dtype}, {len(ratios)} shapes"
        rows.append((name, "a dense SwiGLU with as many operations", f"{min(ratios):.2f} to {max(ratios):.2f}"))
    rows += [
        ("a router that counts", "the same router, not attached", f"{frozen['forward']['median']:.2f}"),
        ("an audit", "the forwards of its tokens", f"{audit['over_bare_forwards']['ratio']:.2f}"),
    ]
    lines = [
        "A floor is the part of the work that nothing can leave out. The table divides the time by that of the floor.",
        "",
        *table(("work", "its floor", "time over the floor"), rows),
    ]
    return Section("Floors", lines)


def page(stored: dict[str, dict[str, Any]]) -> str:
    overhead_result, audit_result = stored["overhead"], stored["audit"]
    maybe_sections = [
        balancing(overhead_result),
        routers(overhead_result),
        operations(stored["operations"]),
        updates(overhead_result),
        alerts(overhead_result),
        memory_and_start(overhead_result, stored["attach"], audit_result),
        collectives(overhead_result, stored["ranks"]),
        experts(stored["experts"]),
        trainer(stored["trainer"]),
        step_parts(stored["lab_step"]),
        alternatives(stored["lab_step"], stored["attention"]),
    ]
    sections = [section for section in maybe_sections if section is not None]
    targets = [target for section in sections for target in section.targets]
    lines = [
        "# What balancing costs, and how fast the lab is",
        "",
        "This page says what balancing costs in time, operations and memory, and how fast the lab trains. Everything "
        "was measured on CPUs. Nothing here says how it is on a GPU: [On a GPU](gpu.md) says what has been seen there.",
        "",
        "Candidates that are compared run in turn, so other work on the machine affects them alike. A ratio is the "
        "median of the ratios of neighbouring runs. Unless stated otherwise, brackets hold the 95 % interval of order "
        "statistics. If there are too few rounds for that, they hold the extremes.",
        "",
        "Do not edit this page by hand: `python benchmarks/speed.py` writes it from "
        "[benchmarks/results](../../benchmarks/results). `make bench` measures these results, with two exceptions. "
        "`python benchmarks/ranks.py` measures steps on ranks. `lab_step.py` and `attention.py` were removed after "
        "they had answered their questions: commit `da71248` is the last one that has them.",
        "",
        "## Targets",
        "",
        f"Of {len(targets)} targets, {sum(target.is_met for target in targets)} are met and "
        f"{sum(not target.is_met for target in targets)} are missed. Each section gives the reason for a miss.",
        "",
        *table(
            ("", "measured", "target", "", "section"),
            (
                (
                    target.name,
                    target.measured,
                    target.limit,
                    format_verdict(target.is_met),
                    f"[{target.section}](#{anchor(target.section)})",
                )
                for target in targets
            ),
        ),
    ]
    for section in (floors(overhead_result, stored["experts"], audit_result), *sections):
        lines += [f"## {section.title}", "", *section.lines]
    return "\n".join(lines)


def anchor(title: str) -> str:
    """
    >>> anchor("`step()`"), anchor("A router's forward")
    ('step', 'a-routers-forward')
    """
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def results() -> dict[str, dict[str, Any]]:
    return {name: read_json(RESULTS / f"{name}.json") for name in RESULT_NAMES}


def write() -> None:
    PAGE.write_text(page(results()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--check", action="store_true", help="only compare docs/evidence/speed.md with the stored results"
    )
    if options.parse_args().check:
        if page(results()) != PAGE.read_text():
            sys.exit(
                "docs/evidence/speed.md must match benchmarks/results, and does not: run python benchmarks/speed.py."
            )
        return
    write()


if __name__ == "__main__":
    main()
