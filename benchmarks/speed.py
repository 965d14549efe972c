"""What balancing costs and how quick the lab is: the page, from the results that are stored.

    make bench                            # measures, and writes the page
    python benchmarks/speed.py            # writes docs/speed.md
    python benchmarks/speed.py --check    # docs/speed.md is what the stored results make

Rows that an older `overhead.json` has not are left out; nothing else may be missing.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import overhead

from equipoise_lab.records import read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
QUESTIONS = ("overhead", "experts", "trainer", "lab_step", "attach", "audit", "attention", "ranks")
UNKNOWN = "Why is not known."
ALONE = 0.2  # cores that other programs may take of a machine that is ours


class Bar(NamedTuple):
    """What must hold. ``why``: what is said where it does not."""

    what: str
    measured: str
    limit: str
    holds: bool
    section: str
    why: str = UNKNOWN


class Section(NamedTuple):
    title: str
    lines: list[str]
    bars: Sequence[Bar] = ()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(header), "|---" * len(header) + "|", *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def source(stored: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    return [f"`{stored['command']}`, {stored['hardware']}, {stored['date']}, {versions}.", ""]


def company(stored: dict[str, Any]) -> list[str]:
    """A sentence where other programs ran during a measurement."""
    cores = stored["cores_of_others"]
    if cores is None or cores < ALONE:
        return []
    return [
        f"Measured while other programs took {cores:.1f} cores of this machine: times are too long, and what is said "
        "of several threads is not to be trusted.",
        "",
    ]


def shown(found: dict[str, float], digits: int = 3) -> str:
    """A median with its interval."""
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def said(holds: bool | None) -> str:
    return "" if holds is None else "holds" if holds else "**missed**"


def missed(bars: Iterable[Bar]) -> list[str]:
    """A sentence for each reason why bars are missed."""
    whats: dict[str, list[str]] = {}
    for bar in bars:
        if not bar.holds:
            whats.setdefault(bar.why, []).append(bar.what)
    return [line for why, names in whats.items() for line in (f"Missed: {'; '.join(names)}. {why}", "")]


# ---- what balancing costs ----
WHY_STEP = {
    "loss-free": "Loss-Free counts every choice and moves biases once; what is left is the counting.",
    "lbl:scope=global_batch": "The loss has a value and a gradient of its own at every router, in every micro-batch: "
    "some fifty operations, most of which take as long for few tokens as for many; what is added to a router by itself "
    "(see the next section) is all of it. Beside experts as small as the lab's it shows.",
    "quantile": "The quantile sorts every token's margins at every expert into a histogram, in every call of a router.",
}
WHY_INTERVAL = "The median is under the bar; the interval is too wide to say that the cost is."


def balancing(stored: dict[str, Any]) -> Section:
    title = "Balancing in a step"
    none, *rows = stored["steps"]
    bars = [
        Bar(
            f"step under `{row['strategy']}`, over `none`",
            shown(row["ratio"]),
            f"{row['limit']}",
            row["holds"],
            title,
            WHY_STEP[row["strategy"]] if row["ratio"]["median"] > row["limit"] else WHY_INTERVAL,
        )
        for row in rows
        if row["limit"] is not None
    ]
    lines = [
        "Training steps of the lab's default model, one thread, strategy by strategy in turn; time over that of "
        f"`none`, which counts and moves nothing ({none['seconds']:.2f} s a step). A bar is for the median; the upper "
        "end of the interval may lie a little above it.",
        "",
        *table(
            ("strategy", "step over `none`", "bar", ""),
            (
                (
                    f"`{row['strategy']}`",
                    shown(row["ratio"]),
                    "" if row["limit"] is None else f"{row['limit']}",
                    said(row["holds"]),
                )
                for row in rows
            ),
        ),
    ]
    return Section(title, [*lines, *missed(bars), *source(stored)], bars)


def routers(stored: dict[str, Any]) -> Section:
    title = "A router's forward"
    rows = stored["routers"]
    bars = [
        Bar(
            f"forward of a router that only counts (`{row['strategy']}`), {row['tokens']:,} tokens, over one that is "
            "not attached",
            shown(row["forward"]),
            f"{row['limit']}",
            row["holds"],
            title,
            "A router by itself is one small product and a choice of k. To note and count what was chosen takes some "
            "ten operations, however few the tokens are. Beside a layer's experts it is not seen: see the steps above.",
        )
        for row in rows
        if row["limit"] is not None
    ]

    def added(found: dict[str, float]) -> str:
        return f"{(found['median'] - 1) * found['milliseconds_plain']:.2f}"

    lines = [
        "Windows of eight micro-batches of the default model's routers alone, attached over not attached; with the "
        "loss of every micro-batch where there is one. With backward: and `step()` at the end. Milliseconds are of one "
        "call. `frozen` counts and does no more: it is the floor of what is attached. That of the loss are its bare "
        "operations on the same tensors, without the library. A micro-batch of the default model has 1,024 tokens.",
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
                "bar of the forward",
                "",
            ),
            (
                (
                    f"`{row['strategy']}`",
                    f"{row['tokens']:,}",
                    shown(row["forward"]),
                    added(row["forward"]),
                    shown(row["forward_and_backward"]),
                    added(row["forward_and_backward"]),
                    "" if row["milliseconds_bare"] is None else f"{row['milliseconds_bare']:.2f}",
                    "" if row["limit"] is None else f"{row['limit']}",
                    said(row["holds"]),
                )
                for row in rows
            ),
        ),
    ]
    return Section(title, [*lines, *missed(bars), *source(stored)], bars)


def updates(stored: dict[str, Any]) -> Section:
    title = "`step()`"
    first, *_ = rows = stored["updates"]
    bar = Bar(
        f"`step()` of Loss-Free, {first['layers']} layers x {first['experts']} experts",
        f"{first['milliseconds']:.2f} ms",
        f"{overhead.UPDATE} ms",
        first["milliseconds"] <= overhead.UPDATE,
        title,
        "Its floor are the bare operations beside it: a read and a write of every layer's bias, which is a tensor of "
        "its own that somebody may have written into, and some ten operations over all counts, right after the "
        "forwards, when none of it is in the caches.",
    )
    lines = [
        "Closing a window and moving all biases, Loss-Free, once an optimizer step, one thread. It must not depend on "
        "the tokens. Beside it the same operations on the same tensors without the library.",
        "",
        *table(
            ("layers x experts", "tokens", "ms", "bare operations, ms", "bar", ""),
            (
                (
                    f"{row['layers']} x {row['experts']}",
                    f"{row['tokens']:,}",
                    f"{row['milliseconds']:.2f}",
                    f"{row['floor_milliseconds']:.2f}" if "floor_milliseconds" in row else "",
                    bar.limit if row is first else "",
                    said(bar.holds) if row is first else "",
                )
                for row in rows
            ),
        ),
    ]
    return Section(title, [*lines, *missed([bar]), *source(stored)], [bar])


def alerts(stored: dict[str, Any]) -> Section | None:
    if "alerts" not in stored:  # a result from before they were measured
        return None
    none = stored["steps"][0]["seconds"]
    lines = [
        "`Alerts.see` once an optimizer step, with the reading of loads and biases. It adds loads up, and judges them "
        f"at the end of a stretch of windows. A step of the default model takes {1000 * none:.0f} ms.",
        "",
        *table(
            ("layers x experts", "ms a window", "ms where it judges", "ms a window, mean of all"),
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
    return Section("Alerts", [*lines, *source(stored)])


def memory_and_start(stored: dict[str, Any], attach: dict[str, Any], audit: dict[str, Any]) -> Section:
    title = "Memory and start-up"
    memory, start = stored["memory"], stored["start"]
    added = start["added_to_torch_cpu_seconds"]
    slowest = max(attach["rows"], key=lambda row: row["first_cpu_seconds"])
    command, pair, peak = audit["command_time"], audit["over_bare_forwards"], audit["peak_memory"]
    few, many = peak["few"], peak["many"]
    of_overhead = [
        Bar(
            f"memory of a training process, attached over not attached ({memory['megabytes_plain']:,.0f} MiB)",
            shown(memory["ratio"]),
            f"{memory['limit']}",
            memory["holds"],
            title,
        ),
        Bar(
            "`equipoise --help`",
            f"{start['help_seconds']:.2f} s",
            f"{overhead.HELP} s",
            start["help_seconds"] <= overhead.HELP,
            title,
        ),
        Bar(
            "`import equipoise` after `import torch`, CPU time",
            f"{added:.3f} s" if added > 0 else f"none to be told ({added:.3f} s)",
            f"{overhead.IMPORT} s",
            added <= overhead.IMPORT,
            title,
        ),
    ]
    of_attach = Bar(
        f"`attach`, {slowest['layers']} layers, the slowest of {len(attach['rows'])} families (`{slowest['family']}`), "
        "CPU time",
        f"{slowest['first_cpu_seconds']:.3f} s",
        f"{attach['limit_cpu_seconds']} s",
        attach["holds"],
        title,
    )
    limits = audit["bars"]
    of_audit = [
        Bar(
            f"`equipoise audit`, {command['tokens']:,} tokens",
            f"{command['seconds']} s",
            f"{limits['seconds']:.0f} s",
            command["holds"],
            title,
        ),
        Bar(
            f"its work over the bare forwards, {pair['tokens']:,} tokens",
            f"{pair['ratio']:.3f} ({pair['ratios'][0]:.3f} to {pair['ratios'][-1]:.3f})",
            f"{limits['ratio']}",
            pair["holds"],
            title,
            "Besides the forwards it counts experts by token, by domain and by pair, layer by layer; beside a forward "
            "of a model as small as this one that shows.",
        ),
        Bar(
            f"its memory, {many['tokens']:,} tokens ({many['peak_mib']:.0f} MiB) over {few['tokens']:,}",
            f"{peak['growth']:.3f}",
            f"{limits['growth']}",
            peak["holds"],
            title,
        ),
    ]
    lines = []
    for bars, result in ((of_overhead, stored), ([of_attach], attach), (of_audit, audit)):
        lines += table(("", "measured", "bar", ""), ((b.what, b.measured, b.limit, said(b.holds)) for b in bars))
        lines += [*missed(bars), *source(result)]
    return Section(title, lines, [*of_overhead, of_attach, *of_audit])


def collectives(stored: dict[str, Any], ranks: dict[str, Any]) -> Section:
    lines = []
    if "collectives" in stored:  # else a result from before they were measured
        lines += [
            "`step()` of Loss-Free on gloo ranks of one machine: ranks that pool their counts over the same ranks each "
            "for itself, in turn, after a barrier.",
            "",
            *table(
                ("layers x experts", "ranks", "ms", "ms, each for itself", "ratio", "collectives", "bytes a rank"),
                (
                    (
                        f"{row['layers']} x {row['experts']}",
                        f"{row['ranks']}",
                        f"{row['milliseconds']:.2f}",
                        f"{row['milliseconds_alone']:.2f}",
                        shown(row["ratio"], 2),
                        f"{row['collectives']}",
                        f"{row['collective_bytes']:,}",
                    )
                    for row in stored["collectives"]
                ),
            ),
            *source(stored),
        ]
    lines += [
        f"A whole step on {ranks['ranks']} gloo ranks, which share the cores of this machine, over one without "
        f"equipoise; {ranks['step']}. [scale.md](scale.md) has what travels, how it grows, and what a network adds.",
        "",
        *table(
            ("strategy", "ratio, median (quartiles)", "collectives a step", "bytes a step and rank"),
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
        *source(ranks),
    ]
    return Section("Collectives", lines)


# ---- how quick the lab is ----
def experts(stored: dict[str, Any]) -> Section:
    title = "Experts"

    def shape(row: dict[str, Any]) -> str:
        return f"{row['dim']}, {row['hidden']}, {row['experts']}, {row['k']}, {row['tokens']}, {row['dtype']}"

    limit = stored["limit"]
    holds = {shape(row): row["ours_over_best_stock"]["median"] <= limit for row in stored["rows"]}
    ratios = [row["ours_over_best_stock"]["median"] for row in stored["rows"]]
    bar = Bar(
        "`nn.MoE`, forward and backward, over the best of Transformers, every shape",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{limit}",
        stored["holds"],
        title,
        f"It is so at {'; '.join(name for name, held in holds.items() if not held)}. The more of the time goes into "
        "the grouped products themselves, which both ways have, the less there is to gain around them.",
    )
    lines = [
        "One layer, forward and backward: ours; the block of Qwen3-MoE with each way of Transformers to compute "
        "experts (the best one is named); and the floor, one dense SwiGLU of as many operations as a token's experts "
        "have.",
        "",
        *table(
            ("D, F, E, k, tokens", "ours, ms", "best of Transformers", "ours over it", f"bar {limit}",
             "ours over dense", "best over dense"),
            (
                (
                    shape(row),
                    f"{row['milliseconds']['ours']:.1f}",
                    f"`{row['best_stock']}`, {row['milliseconds'][row['best_stock']]:.1f} ms",
                    shown(row["ours_over_best_stock"], 2),
                    said(holds[shape(row)]),
                    shown(row["ours_over_dense"], 2),
                    shown(row["best_stock_over_dense"], 2),
                )
                for row in stored["rows"]
            ),
        ),
        "D: width of the model, F: of an expert, E: experts, k: experts a token.",
        "",
    ]  # fmt: skip
    return Section(title, [*lines, *missed([bar]), *source(stored)], [bar])


SIDES = {
    "trainer": "transformers.Trainer",
    "lab": "the lab",
    "lab_with_grouped_mm": "the lab with Transformers' experts",
}


def trainer(stored: dict[str, Any]) -> Section:
    title = "The lab beside transformers.Trainer"
    lab = next(row for row in stored["rows"] if row["side"] == "lab")
    bar = Bar(
        "speed of the lab over transformers.Trainer, at least",
        shown(lab["over_trainer"], 2),
        f"{stored['limit']}",
        stored["holds"],
        title,
    )
    lines = [
        f"The same model, weights and micro-batches ({stored['tokens_per_step']:,} tokens a step), nothing attached; "
        "each side in processes of its own, in turn.",
        "",
        *table(
            ("", "tokens/s", "speed over the Trainer", "bar", ""),
            (
                (
                    SIDES[row["side"]],
                    f"{row['tokens_per_second']:,}",
                    "1" if row["side"] == "trainer" else shown(row["over_trainer"], 2),
                    bar.limit if row is lab else "",
                    said(bar.holds) if row is lab else "",
                )
                for row in stored["rows"]
            ),
        ),
    ]
    return Section(title, [*lines, *missed([bar]), *source(stored)], [bar])


PART = {
    "data": "data: the micro-batches of the step",
    "forward": "forward, with the loss of the text and the counting at the routers",
    "backward": "backward, with that of the balancing loss",
    "clipping": "clipping",
    "optimizer": "optimizer",
    "balancing": "balancing: `loss()`, `step()`, `metrics()`",
    "records": "records: what a run writes of a step",
    "rest": "the rest: the step less all of these",
}


def where(stored: dict[str, Any]) -> Section:
    step, run = stored["step"], stored["run"]
    share = {row["part"]: row["share"] for row in step["parts"]}
    beside = sum(row["over_step"] for row in run["rows"])
    lines = [
        f"The default model under `{stored['strategy']}`, {stored['dtype']}, one thread: {step['seconds']:.3f} s a "
        f"step, {stored['tokens_per_step'] / step['seconds']:,.0f} tokens/s. Forward and backward are "
        f"{share['forward'] + share['backward']:.1%} of it. Times are medians over {step['steps']} steps, which "
        f"together are {step['seconds_of_parts']:.3f} s; shares are of the sum over all steps.",
        "",
        *table(
            ("part", "ms", "share"),
            ((PART[row["part"]], f"{1000 * row['seconds']:.1f}", f"{row['share']:.1%}") for row in step["parts"]),
        ),
        f"Beside its steps a default run ({run['steps']} steps) evaluates and saves. Shared out over the steps that is "
        f"{beside:.1%} of a step more:",
        "",
        *table(
            ("", "s", "times a run", "of a step, each step"),
            (
                (row["what"], f"{row['seconds']:.2f}", f"{row['times']}", f"{row['over_step']:.1%}")
                for row in run["rows"]
            ),
        ),
        *company(stored),
        *source(stored),
    ]
    return Section("Where a step of the lab goes", lines)


def quicker(found: dict[str, float]) -> str:
    """Which is the quicker one, of a ratio of the other way over the lab's."""
    if found["low"] > 1:
        return "the lab's way"
    return "the other way" if found["high"] < 1 else "undecided"


def paid_back(row: dict[str, Any]) -> str:
    """After how many steps compiling has gained what it took; nothing where it is not the quicker way."""
    if quicker(row["ratio"]) != "the other way":
        return ""
    return f"{row['compile_seconds'] / (row['seconds_lab'] * (1 - row['ratio']['median'])):,.0f}"


def remedies(stored: dict[str, Any], attention: dict[str, Any]) -> Section:
    faults = next(row for row in stored["remedies"] if "minor_faults_lab" in row)
    failed = [row for row in stored["compiled"] if row["error"] is not None]
    lines = [
        "Time of a step the other way over that of the lab's own: above 1, the lab's way is the quicker one.",
        "",
        *table(
            ("", "the lab's way", "the other way", "ms, lab", "ms, other", "other over lab", "quicker"),
            (
                (
                    row["remedy"],
                    row["lab"],
                    row["other"],
                    f"{1000 * row['seconds_lab']:.0f}",
                    f"{1000 * row['seconds_other']:.0f}",
                    shown(row["ratio"], 2),
                    "undecided" if row["remedy"] == "threads" and company(stored) else quicker(row["ratio"]),
                )
                for row in stored["remedies"]
            ),
        ),
        f"Minor page faults a step: {faults['minor_faults_lab']:,.0f} with freed memory kept, "
        f"{faults['minor_faults_other']:,.0f} without.",
        "",
        "Decoder layers compiled by `torch.compile`, over the lab's own step in the same precision. The ratio is "
        "without the time to compile; the last column says how many steps pay it back, where any do. A default run has "
        f"{stored['run']['steps']} steps.",
        "",
        *table(
            ("", "compiled in, s", "ms, lab", "ms, compiled", "compiled over lab", "quicker", "steps that pay it back"),
            (
                (row["way"], "", "", "", "does not run", "", "")
                if row["error"] is not None
                else (
                    row["way"],
                    f"{row['compile_seconds']:.0f}",
                    f"{1000 * row['seconds_lab']:.0f}",
                    f"{1000 * row['seconds_other']:.0f}",
                    shown(row["ratio"], 2),
                    quicker(row["ratio"]),
                    paid_back(row),
                )
                for row in stored["compiled"]
            ),
        ),
        *(line for row in failed for line in (f"Does not run, {row['way']}: `{row['error']}`", "")),
        *company(stored),
        *source(stored),
        "Attention: the lab's is `eager` on a CPU.",
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
        *source(attention),
    ]
    return Section("What the lab's remedies are worth", lines)


def floors(stored: dict[str, Any], of_experts: dict[str, Any], audit: dict[str, Any]) -> Section:
    frozen = next(row for row in stored["routers"] if row["strategy"] == "frozen")
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in of_experts["rows"]):
        ratios = [row["ours_over_dense"]["median"] for row in of_experts["rows"] if row["dtype"] == dtype]
        what = f"`nn.MoE`, {dtype}, {len(ratios)} shapes"
        rows.append((what, "a dense SwiGLU of as many operations", f"{min(ratios):.2f} to {max(ratios):.2f}"))
    rows += [
        ("a router that counts", "the same router, not attached", f"{frozen['forward']['median']:.2f}"),
        ("an audit", "the forwards of its tokens", f"{audit['over_bare_forwards']['ratio']:.2f}"),
    ]
    lines = table(("what", "its floor", "time over the floor"), rows)
    return Section("Floors", lines)


def page(stored: dict[str, dict[str, Any]]) -> str:
    of_overhead, audit = stored["overhead"], stored["audit"]
    found = [
        balancing(of_overhead),
        routers(of_overhead),
        updates(of_overhead),
        alerts(of_overhead),
        memory_and_start(of_overhead, stored["attach"], audit),
        collectives(of_overhead, stored["ranks"]),
        experts(stored["experts"]),
        trainer(stored["trainer"]),
        where(stored["lab_step"]),
        remedies(stored["lab_step"], stored["attention"]),
    ]
    sections = [section for section in found if section is not None]
    bars = [bar for section in sections for bar in section.bars]
    lines = [
        "# What balancing costs, and how quick the lab is",
        "",
        "Written by `python benchmarks/speed.py` from [benchmarks/results](../benchmarks/results), which `make bench` "
        "makes, but for the whole step on ranks, which `python benchmarks/ranks.py` measures. Do not edit it by hand.",
        "",
        "Things that are compared run in turn, so that what else the machine does meets them alike. A ratio is the "
        "median of the ratios of neighbours; in brackets, unless said, the 95 % interval of order statistics, or the "
        "extremes where there are too few rounds for that. All of it was measured on CPUs; nothing here says how it is "
        "on a GPU.",
        "",
        "## Bars",
        "",
        f"Of {len(bars)} bars {sum(bar.holds for bar in bars)} hold, {sum(not bar.holds for bar in bars)} are missed.",
        "",
        *table(
            ("", "measured", "bar", "", "section"),
            ((b.what, b.measured, b.limit, said(b.holds), f"[{b.section}](#{anchor(b.section)})") for b in bars),
        ),
    ]
    for section in (floors(of_overhead, stored["experts"], audit), *sections):
        lines += [f"## {section.title}", "", *section.lines]
    return "\n".join(lines)


def anchor(title: str) -> str:
    """
    >>> anchor("`step()`"), anchor("A router's forward")
    ('step', 'a-routers-forward')
    """
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def results() -> dict[str, dict[str, Any]]:
    return {question: read_json(RESULTS / f"{question}.json") for question in QUESTIONS}


def write() -> None:
    PAGE.write_text(page(results()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="only compare docs/speed.md with the stored results")
    if options.parse_args().check:
        if page(results()) != PAGE.read_text():
            sys.exit("docs/speed.md must be what benchmarks/speed.py makes of benchmarks/results: it is not.")
        return
    write()


if __name__ == "__main__":
    main()
