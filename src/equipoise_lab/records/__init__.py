"""The run folder: the only interface between training and analysis. Imports no torch.

A run is one strategy and one seed in one folder:

    config.json         the resolved configuration, versions, wrapper, names of the MoE layers (written once)
    run.yaml            a copy of the options for `equipoise train --config`; nothing else reads it
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
    trackers.json       which run of a tracker this one is, and up to which step the tracker has it; only with --tracker
    events.out.tfevents.*   what TensorBoard reads; only with --tracker tensorboard
    checkpoints/        what a resumed run needs
    model/              the trained model, for plain Transformers

The three ``.jsonl`` files only grow. A line is written in one piece and flushed. So a killed run leaves at most one
torn line, at the end. Reading drops that line; any other damage is an error that names the file and the line. A number
that is not finite (in a run that diverged) is written as null, so that every reader can parse the files as JSON.

A folder may be damaged, or come from somebody else. So everything is checked here when it is read, and whoever gets a
record can rely on the types in ``schemas``. Keys that they do not name may hold anything.
"""

from equipoise_lab.records.files import check, finite, read_json, require_keys, write_json, write_parts
from equipoise_lab.records.run import LOCK, OPTIONS_OF_COMPARISON, OPTIONS_OF_RUN, Run, find_runs, is_new
from equipoise_lab.records.schemas import Audit, Comparison, Config, Record, TrackerRuns

__all__ = [
    "LOCK",
    "OPTIONS_OF_COMPARISON",
    "OPTIONS_OF_RUN",
    "Audit",
    "Comparison",
    "Config",
    "Record",
    "Run",
    "TrackerRuns",
    "check",
    "find_runs",
    "finite",
    "is_new",
    "read_json",
    "require_keys",
    "write_json",
    "write_parts",
]
