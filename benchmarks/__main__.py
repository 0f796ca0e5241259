"""`python -m benchmarks`: measures, appends rows to results.csv, and writes the report."""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import (
    bench_advantage,
    bench_calibration,
    bench_linear_logprob,
    bench_policy_loss,
    bench_query_attention,
    bench_shrinkage,
    bench_split_vocabulary,
    bench_token_logprob,
    bench_trl_step,
    bench_v0_prior,
    report,
    wins,
)
from benchmarks.harness import OURS, Row, measure, warm_up
from v05.kernels.wins import FILE

FOLDER = Path(__file__).parent
BENCHES = {
    "shrinkage": bench_shrinkage,
    "calibration": bench_calibration,
    "advantage": bench_advantage,
    "policy_loss": bench_policy_loss,
    "token_logprob": bench_token_logprob,
    "split_vocabulary": bench_split_vocabulary,
    "linear_logprob": bench_linear_logprob,
    "query_attention": bench_query_attention,
    "v0_prior": bench_v0_prior,
    "trl_step": bench_trl_step,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(BENCHES), help="only this op; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the smallest inputs, half a second each, nothing kept")
    parser.add_argument("--ours", action="store_true", help="without rivals, while working on a kernel; nothing kept")
    parser.add_argument(
        "--warm-up", action="store_true", help="only one call of each rival, which fills torch's compile cache"
    )
    parser.add_argument("--first", type=int, help="only so many cases of each op")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, help="of timing per case (4; with --quick 0.5)")
    parser.add_argument("--threads", type=int, help="of the processor (torch's own number)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results.csv, RESULTS.md and plots")
    parser.add_argument("--write-wins", action="store_true", help="only write dispatch's preference from the rows")
    parser.add_argument("--rows-only", action="store_true", help="write the rows and no report")
    parser.add_argument("--report-only", action="store_true", help="write the report from the rows there are")
    return parser.parse_args()


def append(path: Path, rows: list[Row]) -> None:
    """Adds rows to a CSV file, with a header where it is new; columns only ever join at the end."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["pass" if name == "direction" else name for name in Row._fields])
        writer.writerows(rows)


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row.op:14} {row.shape:32} {row.dtype:9} {row.direction:19} {row.contender:16}"
    if not row.p50_ms:
        return f"{what} {row.note}"
    reached = f"{float(row.fraction_of_ceiling):5.2f} of {row.ceiling}, host {row.host_us} us  " if row.host_us else ""
    return f"{what} {float(row.p50_ms):10.3f} ms  {float(row.ratio_to_ours):8.2f} x v05  {reached}{row.note}"


def main() -> int:
    options = arguments()
    path, begin = options.output / "results.csv", time.perf_counter()
    unkept = options.quick or options.ours or options.warm_up
    if options.threads:
        torch.set_num_threads(options.threads)
    run_id = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if options.write_wins:
        print(f"{FILE}: {wins.write(report.read(path), FILE)} wins")
        return 0
    for op in [] if options.report_only else options.op or BENCHES:
        for case in itertools.islice(BENCHES[op].cases(torch.device(options.device), options.quick), options.first):
            if options.ours:
                own = [contender for contender in case.contenders if contender.name.startswith(OURS)]
                case = replace(case, contenders=own)
            if options.warm_up:
                for some in [case, *([case.another(1)] if case.another else [])]:
                    warm_up(replace(some, contenders=[c for c in some.contenders if not c.name.startswith(OURS)]))
                torch.compiler.reset()
                continue
            rows = []
            for row in measure(case, run_id, options.seconds or (0.5 if options.quick else 4.0)):
                print(describe(row), flush=True)
                rows.append(row)
            if not unkept:
                append(path, rows)
            torch.compiler.reset()
            gc.collect()
    if not (unkept or options.rows_only):
        report.write(path, options.output)
        print(f"{options.output / 'RESULTS.md'} after {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
