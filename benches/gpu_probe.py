"""The kernels' C API on PyTorch's tensors: is it right, and how fast. Needs torch and numpy, no Rust.

    python3 benches/gpu_probe.py --library libvlmq_kernels.so --out probe.jsonl --deadline 90

Every call of kernels/include/vlmq.h, which is read, not repeated: its error against float64, the same bits three times (once on
another stream), every documented element written and nothing else (outputs are poisoned before), its time by events with
nothing of before in the cache, and its share of what a plain product or copy reaches in the same process; beside it what
people run today in PyTorch.

--out holds one line of JSON a result, flushed at once:

    kind              ceiling, correct, time, reference, environment, skipped
    name              with the sizes; what shapes the call, as fields of their own
    error, limit      of the check that came closest to its limit, or went past it; all of them: errors
    ok                false: wrong; null: nothing was to be checked
    repeat_ok, written_ok
    ms_median, ms_min, samples
    flop, raw_flop    what the method needs (half of a symmetric product, n^3/3 for a factorization), what is executed
    bytes             that must be moved
    tflops, raw_tflops, gbps, share_of_ceiling, ceiling (the name of a line)
    device, note, at_s (seconds since the start)

The last line on stdout is the verdict; the exit code is 1 where anything is not ok. What fails or hangs is a line, too: a child
process does the work, and another goes on behind an item that killed it, or after which the device no longer answers.

With the emulator's library (kernels/emulator) the same items run on the CPU in miniature, without any figure of time. Tests of
cargo leave it in CARGO_TARGET_TMPDIR: emulator/plain/libvlmq_kernels.so.
"""

import argparse
import ctypes
import hashlib
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

LOST = 75  # exit code of a child that left a device which no longer answers
GRACE = 15  # seconds past the deadline at which an item is ended
STARTING = 90  # seconds that PyTorch and a driver may need
PR_SET_PDEATHSIG = 1
LATE = "ended: past the deadline"
MOST_CHILDREN = 12


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libvlmq_kernels.so, of nvcc or the emulator's; only --reference needs none")
    parser.add_argument("--header", default=HERE.parent / "kernels/include/vlmq.h", help="vlmq.h of the library")
    parser.add_argument("--out", default="probe.jsonl", help="lines of JSON; written anew")
    parser.add_argument("--deadline", type=float, default=1e9, metavar="SECONDS", help="what has not begun by then is skipped")
    parser.add_argument(
        "--stall", type=float, default=60, metavar="SECONDS", help="an item that says nothing for so long is ended"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="items to run; the ceilings of the same run come first where times are wanted",
    )
    parser.add_argument("--quick", action="store_true", help="whether the calls are right, nothing else")
    parser.add_argument("--cpu", action="store_true", help="fail unless the library is the emulator's")
    parser.add_argument("--against", metavar="EARLIER.jsonl", help="say each time beside that of an earlier run")
    parser.add_argument("--reference", metavar="OUT.json", help="only: seconds of PyTorch by line of benches/kernels.rs")
    parser.add_argument(
        "--profile", metavar="NAME", help="only: one run of a hot call, or of all, between cudaProfilerStart and Stop"
    )
    parser.add_argument("--list", action="store_true", help="only: the items' names")
    parser.add_argument(
        "--plant",
        metavar="FAULT:REGEX",
        help="for tests: output, unwritten, guard, bits, throw, crash, hang or lost, at these items",
    )
    parser.add_argument("--child", type=float, metavar="START", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library is None and args.reference is None:
        parser.error("--library is needed")
    return args


def progress_of(args):
    """What has begun and ended, for whoever goes on."""
    return pathlib.Path(f"{args.out}.progress")


def begun(args):
    """Names of items that have begun, and the one that has not ended."""
    try:
        events = [line.split(" ", 1) for line in progress_of(args).read_text().splitlines()]
    except FileNotFoundError:
        events = []
    ended = {name for event, name in events if event == "end"}
    names = [name for event, name in events if event == "begin"]
    return names, next((name for name in names if name not in ended), None)


# ---- the child: does the work ----


def environment(probe, args, when):
    import numpy
    import torch

    fields = {}
    if not probe.small:
        # All of it in one question fails where a driver does not know one of the names.
        for query in (
            "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.used",
            "clocks_event_reasons.active",
        ):
            try:
                command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", "0"]
                asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
                # A line has a name of its own.
                keys = ["gpu" if key == "name" else key for key in query.split(",")]
                fields |= dict(zip(keys, (value.strip() for value in asked.stdout.split(","))))
            except Exception as error:
                fields["nvidia-smi"] = f"{type(error).__name__}: {error}"
        of = torch.cuda.get_device_properties(0)
        fields |= {
            "multiprocessors": of.multi_processor_count,
            "capability": f"{of.major}.{of.minor}",
            "memory_bytes": of.total_memory,
        }
    if when == "before":
        digest = hashlib.sha256(pathlib.Path(args.library).read_bytes()).hexdigest()
        fields |= {"library_sha256": digest, "torch": torch.__version__, "cuda": torch.version.cuda, "numpy": numpy.__version__}
        fields |= {"python": platform.python_version(), "cpus": os.cpu_count()}
    probe.say("environment", f"environment, {when}", ", ".join(str(value) for value in list(fields.values())[:6]), **fields)


def items_of(probe, args):
    """All items, the most valuable first."""
    from probe import beside, correct, times
    from probe.harness import Item

    before = Item("environment, before", "environment", lambda p: environment(p, args, "before"), 1, True)
    after = Item("environment, after", "environment", lambda p: environment(p, args, "after"), 1, True)
    right, fast, today = correct.items(), times.items(probe), beside.items(probe)
    # The first times and yardsticks before what is merely complete.
    items = [
        before,
        *beside.ceiling_items()[:1],
        *right,
        *fast[:8],
        *today[:3],
        *fast[8:],
        *beside.ceiling_items()[1:],
        *today[3:],
        after,
    ]
    if args.quick:
        items = [item for item in items if item.quick]
    wanted = [item for item in items if re.search(args.only, item.name)]
    if any(item.kind == "time" for item in wanted):
        wanted = [
            item for item in items if item in wanted or item.name in ("ceilings", "environment, before", "environment, after")
        ]
    return wanted


def open_probe(args, start):
    import torch

    from probe.api import Api
    from probe.harness import Probe, Recorder, read_lines

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    api = Api(args.header, args.library)
    if args.cpu and not api.emulated:
        sys.exit(f"{args.library} is not the emulator's library")
    if not api.emulated and not torch.cuda.is_available():
        sys.exit("this library needs a GPU, and PyTorch sees none")
    lines = read_lines(args.against) if args.against else []
    earlier = {line["name"]: line.get("ms_median") for line in lines}
    known = {}
    for line in read_lines(args.out):
        if line["kind"] == "ceiling" and line.get("ms_median"):
            known[line["name"]] = line["tflops"] if line["flop"] else line["gbps"]
    probe = Probe(api, Recorder(args.out, start, earlier), known)
    for other in {line["device"] for line in lines if "device" in line} - {probe.common["device"]}:
        print(f"the figures beside are of {other}, not of {probe.common['device']}", flush=True)
    return probe


def work(args):
    """Runs what has not begun yet. The device is left to the parent where it no longer answers."""
    import gc

    import torch

    from probe.harness import attempt

    probe = open_probe(args, args.child)
    done, _ = begun(args)
    fault, _, where = (args.plant or "").partition(":")
    items = items_of(probe, args)
    with open(progress_of(args), "a") as progress:
        progress.writelines(f"plan {item.name}\n" for item in items)
        for item in items:
            if item.name in done:
                continue
            progress.write(f"begin {item.name}\n")
            progress.flush()
            alive, elapsed = True, time.time() - args.child
            if elapsed + item.seconds > args.deadline and not item.name.startswith("environment"):
                probe.say("skipped", item.name, f"at {elapsed:.0f} s of {args.deadline:.0f}, {item.seconds:g} s are needed")
            else:
                probe.planted = fault if fault and re.search(where, item.name) else None
                alive = attempt(probe, item)
            progress.write(f"end {item.name}\n")
            progress.flush()
            if not alive:
                # A kernel that read or wrote where it must not; every call after it would fail.
                probe.say(
                    "environment", f"the device after {item.name}", "no longer answers: another process goes on", ok=False
                )
                leave(LOST)
            gc.collect()
            if not probe.small and torch.cuda.memory_reserved() > 24 << 30:
                torch.cuda.empty_cache()
    leave(0)


def leave(code):
    """Without taking down a device that may no longer answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- the parent: sees that it goes on ----


def parent(args):
    start = time.time()
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    progress_of(args).write_text("")
    command = [sys.executable, "-u", str(pathlib.Path(__file__).resolve()), *sys.argv[1:], "--child", repr(start)]
    for _ in range(MOST_CHILDREN):
        before = len(begun(args)[0])
        code, why = watch(args, command, start)
        if code == 0:
            break
        names, open_one = begun(args)
        if open_one is not None:
            kind = open_one.split(" ", 1)[0]
            late = why == LATE
            line = {"kind": "skipped" if late else kind if kind in ("correct", "time", "reference") else "environment"}
            line |= {"name": open_one, "error": None, "limit": None, "ok": None if late else False, "repeat_ok": None}
            line |= {"written_ok": None, "ms_median": None}
            report(args, {**line, "at_s": round(time.time() - start, 2), "note": why})
            with open(progress_of(args), "a") as progress:
                progress.write(f"end {open_one}\n")
        elif code != LOST:
            # Nothing was under way: it would fail again.
            report(args, {"kind": "environment", "name": "the probe itself", "ok": False, "note": why})
            break
        if len(names) == before:
            break
        if why == LATE:
            break
    else:
        note = f"{MOST_CHILDREN} processes came to an end"
        report(args, {"kind": "environment", "name": "the probe itself", "ok": False, "note": note})
    if code != 0:
        events = [line.split(" ", 1) for line in progress_of(args).read_text().splitlines()]
        known = {name for event, name in events if event == "begin"}
        for name in dict.fromkeys(name for event, name in events if event == "plan" and name not in known):
            report(args, {"kind": "skipped", "name": name, "at_s": round(time.time() - start, 2), "note": why})
    progress_of(args).unlink()
    sys.exit(verdict(args))


def report(args, line):
    with open(args.out, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{line['kind']}  {line['name']}  {'NOT OK  ' if line.get('ok') is False else ''}{line['note']}", flush=True)


def watch(args, command, start):
    """Runs a child to its end; ends it where it makes no progress. Its exit code, and why it is not 0."""
    # A probe that is ended from outside must not leave a process on the GPU.
    child = subprocess.Popen(command, preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    seen, since = None, time.time()
    late = False
    while child.poll() is None:
        time.sleep(0.05)
        size = sum(path.stat().st_size for path in (pathlib.Path(args.out), progress_of(args)))
        if size != seen:
            seen, since = size, time.time()
        late = time.time() - start > args.deadline + GRACE
        # Starting takes its time, too.
        patience = args.stall if begun(args)[1] is not None else max(args.stall, STARTING)
        if late or time.time() - since > patience:
            child.kill()
            child.wait()
            return -1, LATE if late else f"ended: no progress for {patience:g} s"
    code = child.returncode
    if code < 0:
        return code, f"ended by {signal.Signals(-code).name}"
    return code, f"ended with exit code {code}" if code else ""


def verdict(args):
    """The last line; what the process exits with."""
    lines = [json.loads(line) for line in pathlib.Path(args.out).read_text().splitlines()]
    checked = [line for line in lines if line.get("ok") is not None]
    right = [line for line in checked if line["ok"]]
    timed = [line for line in lines if line["kind"] == "time" and line.get("ms_median") is not None]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    print(f"{len(right)} of {len(checked)} correct, {len(timed)} timed, {len(skipped)} skipped")
    return int(len(right) < len(checked) or not (checked or timed))


def profile(args):
    """Each hot call once, after one run that is not looked at."""
    import torch

    from probe import times

    probe = open_probe(args, time.time())
    chosen = {name: make for name, make in times.profiled(probe).items() if args.profile in ("all", name)}
    if not chosen:
        sys.exit(f"--profile knows all, {', '.join(times.profiled(probe))}")
    for name, make in chosen.items():
        made = make()
        call, reset = made if isinstance(made, tuple) else (made, lambda: None)
        reset()
        call()
        reset()
        probe.synchronize()
        if not probe.small:
            torch.cuda.cudart().cudaProfilerStart()
        call()
        probe.synchronize()
        if not probe.small:
            torch.cuda.cudart().cudaProfilerStop()
        print(f"profiled {name}", flush=True)


def main():
    args = arguments()
    if args.child is not None:
        work(args)
    elif args.list:
        args.out = os.devnull
        print("\n".join(f"{item.kind:<12}{item.name}" for item in items_of(open_probe(args, time.time()), args)))
    elif args.profile:
        args.out = os.devnull
        profile(args)
    elif args.reference:
        from probe import beside

        figures = json.dumps(beside.by_line_of_kernels(), indent=1)
        pathlib.Path(args.reference).write_text(figures)
        print(figures)
    else:
        parent(args)


main()
