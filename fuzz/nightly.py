#!/usr/bin/env python3
"""Fuzzes all targets in turn and adds what was done to totals.json, from which the table of docs/security.md is made.

    python3 fuzz/nightly.py --hours 6            # processor hours, over all targets
    python3 fuzz/nightly.py --table              # the table, of what was done so far

One target after the other runs for some minutes, round after round, until the hours are spent; with `--jobs 2` two at once, each on a
core of its own. It ends at the first finding, whose input then lies in fuzz/artifacts/TARGET/.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

FUZZ = Path(__file__).resolve().parent
TOTALS = FUZZ / "totals.json"
# What targets are given, for the table.
GIVEN = {
    "checkpoint": "config.json, index, shards",
    "config": "config.json of every family, towers loaded",
    "data": "JSON and JSONL, every preset's columns, `data:` images",
    "image": "image files, every family's preprocessing",
    "packed": "GPTQ and compressed-tensors layers",
    "processor": "image processors' files",
    "resume": "a whole work folder, to go on with",
    "safetensors": "a weight file",
    "template": "a chat template",
    "tokenizer": "tokenizer.json and special tokens",
}
# Longest input in bytes, where the usual 8 KiB are not enough for what a target reads.
LONGEST = {"image": 65536, "safetensors": 65536, "resume": 256}
ENVIRONMENT = {**os.environ, "RUSTC_BOOTSTRAP": "1", "VLMQ_CUDA": "off"}
STATUS = re.compile(r"^#(\d+):? .*?cov: (\d+)", re.M)


def targets():
    return sorted(path.stem for path in (FUZZ / "fuzz_targets").glob("*.rs"))


def fuzz(target, seconds):
    """Runs one target; returns its exit code, executions, processor seconds and edges."""
    corpus = FUZZ / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    line = ["cargo", "fuzz", "run", "-s", "none", target, str(corpus), str(FUZZ / "seeds" / target), "--"]
    line += ["-fork=1", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-timeout=25", f"-max_len={LONGEST.get(target, 8192)}"]
    line += [f"-max_total_time={seconds}"]
    program = subprocess.Popen(line, cwd=FUZZ.parent, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, errors="replace")
    said = program.stderr.read()
    # Of this program and all that it started, whatever runs beside it.
    _, status, used = os.wait4(program.pid, 0)
    program.returncode = os.waitstatus_to_exitcode(status)
    found = STATUS.findall(said)
    if program.returncode != 0:
        sys.stderr.write(said[-8000:])
    executions = max((int(count) for count, _ in found), default=0)
    edges = max((int(edges) for _, edges in found), default=0)
    return program.returncode, executions, used.ru_utime + used.ru_stime, edges


def read_totals():
    return json.loads(TOTALS.read_text()) if TOTALS.exists() else {}


def table(totals):
    lines = ["| target | is given | executions | processor minutes | edges reached |", "|---|---|---|---|---|"]
    for target in targets():
        row = totals.get(target, {"executions": 0, "seconds": 0, "edges": 0})
        lines.append(
            f"| `{target}` | {GIVEN[target]} | {row['executions']:,} | {row['seconds'] / 60:.0f} | {row['edges']:,} |"
        )
    seconds = sum(row["seconds"] for row in totals.values())
    executions = sum(row["executions"] for row in totals.values())
    lines.append(f"| all | | {executions:,} | {seconds / 60:.0f} | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=6.0, help="processor hours to spend over all targets")
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes of a target in a round")
    parser.add_argument("--jobs", type=int, default=1, help="targets at once")
    parser.add_argument("--only", nargs="*", help="targets, instead of all")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    arguments = parser.parse_args()
    totals = read_totals()
    if arguments.table:
        print(table(totals))
        return
    # Its time is not fuzzing's.
    subprocess.run(["cargo", "fuzz", "build", "-s", "none"], cwd=FUZZ.parent, env=ENVIRONMENT, check=True)
    spent, lock, stop = 0.0, threading.Lock(), threading.Event()
    queue = itertools.cycle(arguments.only or targets())

    def work():
        nonlocal spent
        while spent < 3600 * arguments.hours and not stop.is_set():
            with lock:
                target = next(queue)
            code, executions, seconds, edges = fuzz(target, max(1, int(60 * arguments.minutes)))
            with lock:
                spent += seconds
                row = totals.setdefault(target, {"executions": 0, "seconds": 0.0, "edges": 0})
                row["executions"] += executions
                row["seconds"] = round(row["seconds"] + seconds, 1)
                row["edges"] = max(row["edges"], edges)
                TOTALS.write_text(json.dumps(totals, indent=2, sort_keys=True) + "\n")
                done = f"{executions:,} executions, {seconds:.0f} s, {edges:,} edges"
                print(f"{target}: {done}; {spent / 3600:.2f} hours", flush=True)
            if code != 0:
                raise SystemExit(f"{target} found something: see fuzz/artifacts/{target}")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        workers = [pool.submit(work) for _ in range(arguments.jobs)]
        wait(workers, return_when=FIRST_EXCEPTION)
        # The others end with the target that they are at.
        stop.set()
    for worker in workers:
        worker.result()
    print(table(totals))


if __name__ == "__main__":
    main()
