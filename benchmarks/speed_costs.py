"""What balancing costs: the sections of docs/evidence/speed.md, each from a stored result."""

from typing import Any

from page_parts import Section, Target, explain_misses, format_ratio, format_verdict, table

UPDATE_LIMIT = 1.2  # of step() over its bare operations
ALERT_LIMIT = 0.3  # milliseconds
HELP_LIMIT, IMPORT_LIMIT = 0.5, 0.1  # seconds

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
    unbalanced, *rows = stored["steps"]
    targets = [
        Target(
            f"step under `{row['strategy']}`, over `none`",
            format_ratio(row["ratio"]),
            f"{row['limit']}",
            row["holds"],
            STEP_REASONS[row["strategy"]] if row["ratio"]["median"] > row["limit"] else INTERVAL_REASON,
            f"`{row['strategy']}`",
        )
        for row in rows
        if row["limit"] is not None
    ]
    lines = [
        "The lab's default model trains on one thread. The time of a step is divided by that under `none`, which "
        f"counts and moves nothing ({unbalanced['seconds']:.2f} s). Targets are for the median. The upper end of the "
        "interval may lie up to 0.02 above its target.",
        "",
        *table(
            ("strategy", "step over `none`"), ((f"`{row['strategy']}`", format_ratio(row["ratio"])) for row in rows)
        ),
    ]
    return Section("Balancing in a step", [*lines, *explain_misses(targets)], targets)


def routers(stored: dict[str, Any]) -> Section:
    rows = stored["routers"]
    targets = [
        Target(
            f"forward of a router under `{row['strategy']}`, {row['tokens']:,} tokens, over one that is not attached",
            format_ratio(row["forward"]),
            f"{row['limit']}",
            row["holds"],
            "A router alone is one small product and a top-k. Recording and counting the choice takes nearly as long "
            "for few tokens as for many. Next to a layer's experts the cost does not show: see the steps above.",
            f"`{row['strategy']}`, {row['tokens']:,} tokens",
        )
        for row in rows
        if row["limit"] is not None
    ]

    def added_milliseconds(ratio: dict[str, float]) -> str:
        return f"{(ratio['median'] - 1) * ratio['milliseconds_plain']:.2f}"

    lines = [
        "The routers of the default model run alone, in windows of eight micro-batches. A micro-batch of that model "
        "has 1,024 tokens. Attached routers are compared with the same routers that are not attached. *Forward* "
        "includes the `loss()` of a strategy that has one. *With backward* includes the backwards and the `step()` "
        "too. Milliseconds are for one call.",
        "",
        "`frozen` only counts, so it is the floor for an attached router. The floor for the loss is its *bare "
        "operations* on the same tensors, without the library.",
        "",
        *table(
            ("strategy", "tokens", "forward", "added, ms", "with backward", "added, ms", "bare operations, ms"),
            (
                (
                    f"`{row['strategy']}`",
                    f"{row['tokens']:,}",
                    format_ratio(row["forward"]),
                    added_milliseconds(row["forward"]),
                    format_ratio(row["forward_and_backward"]),
                    added_milliseconds(row["forward_and_backward"]),
                    "" if row["milliseconds_bare"] is None else f"{row['milliseconds_bare']:.2f}",
                )
                for row in rows
            ),
        ),
    ]
    return Section("A router's forward", [*lines, *explain_misses(targets)], targets)


SEQUENCE_REASON = (
    "A mask of integers may number packed sequences. Without waiting for the GPU, nobody knows how many there are. So "
    "the forward makes a table with a row for each token, and the backward makes it again. A boolean mask only marks "
    "padding: pass `attention_mask.bool()` if nothing is packed."
)


def operations(stored: dict[str, Any]) -> Section:
    fused = {_call(row): row for row in stored["calls"] if row["fused"]}
    rows = []
    verdicts: dict[bool, list[bool]] = {False: [], True: []}  # of calls that have a target, by fused
    for row in stored["calls"]:
        if not row["fused"]:
            cells: list[str] = []
            for version in (row, fused[_call(row)]):
                measured, limit, is_met = _operations_of_call(version)
                cells += [measured, limit, format_verdict(is_met)]
                if is_met is not None:
                    verdicts[version["fused"]].append(is_met)
            once, num_bytes = f"{row['micro_batch']:g} + {row['step']:g}", f"{row['bytes']:.3g}"
            rows.append((_call(row), *cells, once, num_bytes))
    targets = [
        Target(
            f"kinds of router calls whose operations are within their target{'; `fused=True`' if is_fused else ''}",
            f"{sum(met)} of {len(met)}",
            "all",
            all(met),
            SEQUENCE_REASON,
            f"{'with' if is_fused else 'without'} `fused=True`",
        )
        for is_fused, met in verdicts.items()
    ]
    layers, experts, k = stored["layers"], stored["experts"], stored["k"]
    columns = ("strategy", "a call", "target", "", "fused", "target", "", "a micro-batch + `step()`", "bytes")
    lines = [
        "The table shows what balancing adds to a router call, as forward + backward. An operation is a kernel launch "
        "on a GPU. *Bytes*, by token and layer, live until the backward. All are counted exactly, on an accelerator "
        f"that exists in Python only, with {experts} experts and {k} per token. A micro-batch and the `step()` add "
        f"some operations once, for {layers} layers.",
        "",
        "*Fused* means with the Triton kernels of `attach(..., fused=True)`. The tests run them in Triton's "
        "interpreter, and they compile for GPUs. [On a GPU](gpu.md) says what has run there.",
        "",
        *table(columns, rows),
        "Where autograd keeps the scores, the losses keep nothing. `z` has no closed form: autograd makes its gradient "
        "from the logits, and these are kept.",
        "",
    ]
    return Section("Operations and bytes", [*lines, *explain_misses(targets)], targets)


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
    first, *_ = rows = stored["updates"]
    target = Target(
        f"`step()` of Loss-Free over its bare operations, {first['layers']} layers x {first['experts']} experts",
        format_ratio(first["over_floor"]),
        f"{UPDATE_LIMIT}",
        first["over_floor"]["median"] <= UPDATE_LIMIT,
        "Each bias is a separate tensor, and somebody may have written into it. So `step()` looks at every one. It "
        "also ends the window, and searches for layers that were not called. All this runs right after the forwards, "
        "when nothing of it is in the caches.",
    )
    lines = [
        "Once per optimizer step, `step()` closes the window and moves all biases, here under Loss-Free and on one "
        "thread. *Bare operations* do the same work on the same tensors, without the library. The time should not "
        "depend on the number of tokens.",
        "",
        *table(
            ("layers x experts", "tokens", "ms", "bare operations, ms", "ratio"),
            (
                (
                    f"{row['layers']} x {row['experts']}",
                    f"{row['tokens']:,}",
                    f"{row['milliseconds']:.2f}",
                    f"{row['floor_milliseconds']:.2f}",
                    format_ratio(row["over_floor"]),
                )
                for row in rows
            ),
        ),
    ]
    return Section("`step()`", [*lines, *explain_misses([target])], [target])


def alerts(stored: dict[str, Any]) -> Section | None:
    if "alerts" not in stored:  # an older result
        return None
    step_seconds, first = stored["steps"][0]["seconds"], stored["alerts"][0]
    target = Target(
        f"`Alerts.see`, {first['layers']} layers x {first['experts']} experts, mean of all windows",
        f"{first['milliseconds_mean']:.2f} ms",
        f"{ALERT_LIMIT} ms",
        first["milliseconds_mean"] <= ALERT_LIMIT,
        "Biases and loads are copied, stacked and looked at right after the forwards, when nothing of them is in the "
        "caches.",
    )
    lines = [
        "`Alerts.see` runs once per optimizer step. Its time includes reading loads and biases. It adds loads up, and "
        f"judges a stretch of 20 windows at its end. A step of the default model takes {1000 * step_seconds:.0f} ms.",
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
    return Section("Alerts", [*lines, *explain_misses([target])], [target])


def memory_and_start(stored: dict[str, Any], attach: dict[str, Any], audit: dict[str, Any]) -> list[Target]:
    """Targets of which there is nothing to say but whether they are met."""
    memory, start = stored["memory"], stored["start"]
    added = start["added_to_torch_cpu_seconds"]
    slowest = max(attach["rows"], key=lambda row: row["first_cpu_seconds"])
    command, pair, peak = audit["command_time"], audit["over_bare_forwards"], audit["peak_memory"]
    few, many, limits = peak["few"], peak["many"], audit["bars"]
    return [
        Target(
            f"memory of a training process, attached over not attached ({memory['megabytes_plain']:,.0f} MiB)",
            format_ratio(memory["ratio"]),
            f"{memory['limit']}",
            memory["holds"],
        ),
        Target(
            "`equipoise --help`",
            f"{start['help_seconds']:.2f} s",
            f"{HELP_LIMIT} s",
            start["help_seconds"] <= HELP_LIMIT,
        ),
        Target(
            "`import equipoise` after `import torch`, CPU time",
            f"{added:.3f} s" if added > 0 else f"too small to measure ({added:.3f} s)",
            f"{IMPORT_LIMIT} s",
            added <= IMPORT_LIMIT,
        ),
        Target(
            f"`attach`, {slowest['layers']} layers, the slowest of {len(attach['rows'])} families "
            f"(`{slowest['family']}`), CPU time",
            f"{slowest['first_cpu_seconds']:.3f} s",
            f"{attach['limit_cpu_seconds']} s",
            attach["holds"],
        ),
        Target(
            f"`equipoise audit`, {command['tokens']:,} tokens",
            f"{command['seconds']} s",
            f"{limits['seconds']:.0f} s",
            command["holds"],
        ),
        Target(
            f"work of an audit over the bare forwards, {pair['tokens']:,} tokens",
            f"{pair['ratio']:.3f} ({pair['ratios'][0]:.3f} to {pair['ratios'][-1]:.3f})",
            f"{limits['ratio']}",
            pair["holds"],
            "Besides running the forwards, an audit counts experts by token, by domain and by pair, layer by layer. It "
            "shows because the model is small.",
        ),
        Target(
            f"memory of an audit, {many['tokens']:,} tokens ({many['peak_mib']:.0f} MiB) over {few['tokens']:,}",
            f"{peak['growth']:.3f}",
            f"{limits['growth']}",
            peak["holds"],
        ),
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
        ]
    lines += [
        f"The next table compares a whole step on {ranks['ranks']} gloo ranks with one without equipoise, in "
        f"{ranks['pairs']} pairs of steps. A step has {ranks['step']}. The ranks share the cores of this machine. "
        "`none` only counts, so its quartiles show the noise of the machine. Losses cost more than counting, because "
        "they have a gradient at every router.",
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
        "The last table shows how the local part of Loss-Free grows with the number of layers L and of experts E, on "
        "one thread. The time of counting a router call is the difference between two forwards, so it is noisy.",
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
        "A network adds to this, and nothing of it was measured. [Many ranks](../how-to/many_ranks.md) has a formula, "
        "and says what travels under which strategy.",
        "",
    ]
    return Section("Collectives", lines)


MEMORY_ON_RANKS = Section(
    "Memory on every rank",
    [
        "With L layers and E experts, of which a token chooses k:",
        "",
        *table(
            ("what is kept", "bytes"),
            (
                ("counts, by micro-batch of the open window and of the last one (for `maxvio_micro`)", "8 L E"),
                ("biases", "4 L E"),
                ("`quantile`: two histograms, of the window and of the open micro-batch", "8 L E bins each"),
                ("with losses: the mask, once for all layers", "1 by token"),
                (
                    "with losses, under a checkpoint or an offload that keeps something else than the scores: the "
                    "chosen experts, until the backward",
                    "2 k by token and layer",
                ),
            ),
        ),
    ],
)
