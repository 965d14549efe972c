"""The folder of a comparison: claimed once its inputs are right, then continued only with the same options.

Only rank 0 has the folder.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, final

from equipoise.errors import EquipoiseError
from equipoise_lab.paths import some_names
from equipoise_lab.records import (
    OPTIONS_OF_COMPARISON,
    OPTIONS_OF_RUN,
    Comparison,
    Run,
    is_new,
    read_json,
    write_json,
)
from equipoise_lab.report import write_report
from equipoise_lab.train.config import Compare, folder_name
from equipoise_lab.train.config_file import write_config_file
from equipoise_lab.train.location import PLACES, is_same_place
from equipoise_lab.train.run_folder import FolderLock

__all__ = ["ComparisonFolder"]


@final
class ComparisonFolder:
    """The folder ``config.out``. A run has begun in it once it has made a step (see ``records.is_new``)."""

    def __init__(self, config: Compare):
        self.config = config
        self.path = config.out
        self._lock: FolderLock | None = None

    def check(self) -> None:
        """Raises ``EquipoiseError`` unless the comparison may start or continue here. Changes nothing."""
        out, config = self.path, self.config
        if out.exists() and not out.is_dir():
            raise EquipoiseError(f"--out must be a folder: {out} is a file. Choose another.")
        if is_new(out):
            return
        if not config.resume:
            raise EquipoiseError(
                f"--out must be new or empty: {out} holds {some_names(out)}. Nothing was changed. "
                "Choose another folder, or continue a stopped comparison with --resume."
            )
        if not (out / "compare.json").exists():
            raise EquipoiseError(
                f"--resume needs the folder of a comparison: {out} has no compare.json. Give the folder that was "
                "passed as --out, or leave --resume out and choose a new folder."
            )
        self._check_same_options()
        for run in config.runs():
            if not is_new(run.out):
                Run(run.out)  # raises now if it is damaged, before anything is trained

    def _check_same_options(self) -> None:
        """Strategies and seeds may be added. Those of which no run has begun may also be removed."""
        out, config = self.path, self.config
        options = config.recorded(read_json(out / "compare.json", Comparison)["options"])
        runs = {run.out for run in config.runs()}
        removed = [
            path
            for seed in range(options["seeds"])
            for strategy in options["strategies"]
            if (path := out / folder_name(strategy, seed)) not in runs and not is_new(path)
        ]
        if removed:
            raise EquipoiseError(
                "a resumed comparison must keep its strategies and seeds: "
                f"{out} has {', '.join(options['strategies'])} with --seeds {options['seeds']}; "
                f"got {', '.join(config.strategies)} with --seeds {config.seeds}. Nothing was changed. "
                "Strategies and seeds may be added, but not removed once they have begun."
            )
        for name, value in config.shared().items():
            if options.get(name) != value and not (name in PLACES and is_same_place(options.get(name), value)):
                raise EquipoiseError(
                    f"a resumed comparison must keep its options: {out} has {name}={options.get(name)!r}, got "
                    f"{value!r}. Nothing was changed. Give the same options, or choose another folder."
                )

    def claim(self, command: str) -> None:
        """Writes the options of the comparison, and keeps other processes out until ``release``."""
        config = self.config
        self._lock = FolderLock(self.path)
        self.check()  # another process may have begun meanwhile
        options = {**config.shared(), "strategies": list(config.strategies), "seeds": config.seeds}
        write_json(self.path / "compare.json", {"command": command, "options": options})
        write_config_file(config)

    def finish(self, results: list[dict[str, Any]], failures: Sequence[EquipoiseError]) -> None:
        """Writes the results and the page."""
        write_json(self.path / "results.json", results)
        try:
            write_report(self.path)
        except EquipoiseError:
            if not failures:
                raise  # after a failed run it is only a consequence

    def release(self) -> None:
        """Lets other processes in. If no run has begun, removes what ``claim`` wrote."""
        if self._lock is None:
            return
        if is_new(self.path):
            for run in self.config.runs():
                for name in (OPTIONS_OF_RUN, "config.json"):
                    (run.out / name).unlink(missing_ok=True)
                with suppress(OSError):
                    run.out.rmdir()
            for name in (OPTIONS_OF_COMPARISON, "compare.json"):
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        with suppress(OSError):
            self.path.rmdir()  # if it is empty
