"""``python -m mutants [WORD ...]``: runs the mutants whose description holds one of these words; without any, all."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from mutants import MUTANTS
from mutants.mutant import judge


def main() -> None:
    words = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.what for word in words)]
    started, missed = time.time(), 0
    with ThreadPoolExecutor(int(os.environ.get("WORKERS", 2))) as pool:
        for mutant, verdict in zip(chosen, pool.map(judge, chosen), strict=True):
            missed += verdict != "seen"
            print(f"{verdict:8} {mutant.what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutants seen, {time.time() - started:.0f} s")
    sys.exit(bool(missed))


main()
