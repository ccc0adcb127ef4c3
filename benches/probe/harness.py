"""What every item of the probe is made of: poisoned buffers, checks, times, and lines of JSON."""

import contextlib
import json
import lzma
import math
import os
import re
import statistics
import time
import traceback

import torch

from .api import Call

GUARD = 256  # bytes, before and behind
POISONS = (0xFF, 0xFF, 0x5A)  # NaN twice, then what is no NaN: bits that nobody wrote differ
FLUSH_BYTES = 256 << 20  # several times the L2 of any card

TYPES = {"VLMQ_F32": torch.float32, "VLMQ_BF16": torch.bfloat16, "VLMQ_F16": torch.float16}


class Lost(Exception):
    """The device no longer answers."""


def raw(tensor):
    """The bytes of a tensor, [..., bytes of an element]."""
    # Of a single row or column any stride counts as contiguous: a copy has the plain ones.
    plain = tensor.clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).reshape(*tensor.shape, tensor.element_size())


class Buffer:
    """A matrix amid poison: before it, behind it and between its rows."""

    def __init__(self, device, dtype, rows, cols, stride=None, shift=0, poison=0xFF, values=None):
        self.dtype, self.shape, self.poison = dtype, (rows, cols), poison
        self.stride = cols if stride is None else stride
        item = torch.empty(0, dtype=dtype).element_size()
        self.body = (max(rows - 1, 0) * self.stride + cols) * item if rows else 0
        self.raw = torch.full((3 * GUARD + (shift + 1) * item + self.body,), poison, dtype=torch.uint8, device=device)
        # Aligned to 256 bytes but for the shift.
        self.start = GUARD + (-(self.raw.data_ptr() + GUARD)) % 256 + shift * item
        self.view = self.of(self.raw)
        if values is not None:
            self.view.copy_(values.to(dtype).reshape(rows, cols))
        self.before = self.raw.clone()

    def of(self, raw):
        flat = raw[self.start : self.start + self.body].view(self.dtype)
        return flat.as_strided(self.shape, (self.stride, 1))

    def is_untouched_but(self, written):
        """Whether only elements of the mask differ from what was there before."""
        before, after = self.before.clone(), self.raw.clone()
        for copy in (before, after):
            self.of(copy)[written] = 0
        return torch.equal(before, after)


class Out:
    """An output of a call: a matrix that the call must write where `written` (everywhere) and nowhere else."""

    def __init__(self, dtype, rows, cols, stride=None, shift=0, initial=None, written=None):
        self.layout = (dtype, rows, cols, stride, shift)
        self.initial, self.written = initial, written

    def buffer(self, device, poison):
        return Buffer(device, *self.layout, poison=poison, values=self.initial)

    def mask(self, device):
        if self.written is None:
            return torch.ones(self.layout[1:3], dtype=torch.bool, device=device)
        return self.written


class Case:
    """A call with its inputs; each run has outputs of its own."""

    def __init__(self, probe, name, outputs, **fields):
        self.probe, self.name, self.outputs, self.fields = probe, name, outputs, fields

    def run(self, turn):
        """The outputs by name, the work space among them."""
        api = self.probe.api
        buffers = {name: out.buffer(api.device, POISONS[turn]) for name, out in self.outputs.items()}

        def workspace(size):
            buffers["workspace"] = Buffer(api.device, torch.uint8, 1, size, poison=POISONS[turn])
            return buffers["workspace"].view

        call = Call(api, self.name, workspace, **self.fields, **{name: b.view for name, b in buffers.items()})
        api.seed(turn)
        if api.emulated or turn < 2:
            call()
        else:
            other = torch.cuda.Stream()
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                call()
            other.synchronize()
        self.probe.synchronize()
        self.probe.spoil(buffers, turn)
        return buffers

    def inputs(self):
        return [value for value in self.fields.values() if isinstance(value, torch.Tensor)]

    def judge(self):
        """Runs three times. The first run's outputs, whether all had the same bits, and what was wrongly written or not."""
        device = self.probe.api.device
        before = [raw(tensor).clone() for tensor in self.inputs()]
        runs = [self.run(turn) for turn in range(3)]
        wrong, same = [], True
        for name, out in self.outputs.items():
            mask = out.mask(device)
            first, second, third = (raw(run[name].view) for run in runs)
            unwritten = torch.zeros_like(mask)
            if out.initial is None:
                unwritten = (first == POISONS[0]).all(-1) & (third == POISONS[2]).all(-1) & mask
                if count := int(unwritten.sum()):
                    wrong.append(f"{name}: {count} of {int(mask.sum())} elements not written")
            compared = (mask & ~unwritten).unsqueeze(-1)
            same &= not bool((((first != second) | (first != third)) & compared).any())
            if not all(run[name].is_untouched_but(mask) for run in runs):
                wrong.append(f"{name}: written outside of what is documented")
        for run in runs:
            if "workspace" in run and not run["workspace"].is_untouched_but(
                torch.ones_like(run["workspace"].view, dtype=torch.bool)
            ):
                wrong.append("written outside of the work space")
        if any(not torch.equal(raw(tensor), old) for tensor, old in zip(self.inputs(), before)):
            wrong.append("an input was written")
        return {name: buffer.view for name, buffer in runs[0].items()}, same, wrong


class Recorder:
    """Lines of JSON, each flushed, and a short line for people."""

    def __init__(self, path, start, earlier=None):
        self.file = open(path, "a")
        self.begun = start
        self.earlier = earlier or {}

    def write(self, line):
        line = {key: finite(value) for key, value in line.items()}
        line["at_s"] = round(time.time() - self.begun, 2)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print(self.short(line), flush=True)

    def short(self, line):
        parts = [f"{line['at_s']:6.1f}", f"{line['kind']:<9}", line["name"]]
        if line.get("error") is not None:
            # Not a number where it is not finite: see finite().
            error = line["error"] if isinstance(line["error"], str) else f"{line['error']:.2e}"
            parts.append(f"error {error}" + (f" of {line['limit']:.0e}" if line.get("limit") is not None else ""))
        if line.get("ms_median") is not None:
            parts.append(f"{line['ms_median']:.4g} ms")
            before = self.earlier.get(line["name"])
            if before:
                parts.append(f"(before {before:.4g} ms: {before / line['ms_median']:.2f} times as fast)")
        for key, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
            if line.get(key) is not None:
                parts.append(f"{line[key]:.4g} {unit}")
        if line.get("share_of_ceiling") is not None:
            parts.append(f"{100 * line['share_of_ceiling']:.0f} % of {line['ceiling']}")
        if line.get("ok") is not None:
            parts.append("ok" if line["ok"] else "NOT OK")
        if line.get("note"):
            parts.append(str(line["note"]).splitlines()[-1][:200])
        return "  ".join(parts)


def finite(value):
    """JSON knows no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Probe:
    """What an item works with."""

    def __init__(self, api, recorder, ceilings, sample_seconds=0.4):
        self.api, self.recorder, self.ceilings = api, recorder, ceilings
        self.device = api.device
        self.small = api.emulated  # no figure of time, small sizes
        self.sample_seconds = sample_seconds
        self.flush = None
        name = "the emulator" if api.emulated else torch.cuda.get_device_name(0)
        self.common = {"device": name}
        self.generator = torch.Generator(device=self.device)
        self.planted = None

    def synchronize(self):
        if not self.api.emulated:
            torch.cuda.synchronize()

    def spoil(self, buffers, turn):
        """Does what a planted fault says, so that a test can see it found."""
        buffer = next(iter(buffers.values()))
        if self.planted == "output":
            buffer.of(buffer.raw)[0, 0] = 77
        elif self.planted == "unwritten":
            buffer.of(buffer.raw)[0, 0] = buffer.of(torch.full_like(buffer.raw, buffer.poison))[0, 0]
        elif self.planted == "guard":
            buffer.raw[buffer.start + buffer.body] = 1
        elif self.planted == "bits" and turn == 2:
            buffer.raw[buffer.start] ^= 1

    def is_alive(self):
        """Whether the device still answers: some errors stay until the process ends."""
        try:
            self.synchronize()
            return bool(torch.ones(1, device=self.device).item() == 1)
        except Exception:
            return False

    def pick(self, full, small):
        return small if self.small else full

    def noise(self, *shape, seed=0, dtype=torch.float32):
        """Numbers of [-1, 1)."""
        self.generator.manual_seed(1000 + seed)
        return (torch.rand(*shape, generator=self.generator, device=self.device) * 2 - 1).to(dtype)

    def bits(self, *shape, high, seed=0, dtype=torch.uint8):
        self.generator.manual_seed(2000 + seed)
        return torch.randint(0, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def order(self, n, seed=0):
        self.generator.manual_seed(3000 + seed)
        return torch.randperm(n, generator=self.generator, device=self.device).int()

    def input(self, values, dtype=None, stride=None, shift=0):
        """A matrix among NaN."""
        rows, cols = values.shape
        return Buffer(self.device, dtype or values.dtype, rows, cols, stride, shift, values=values).view

    # ---- lines ----

    @contextlib.contextmanager
    def whatever_happens(self, kind, name):
        """What is thrown is a line; the rest of the item goes on while the device answers."""
        try:
            yield
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "probe" in frame.filename]
            last = frames[-1]
            # What people have today may be missing or out of memory: that is no fault of ours.
            ok = False if kind in ("correct", "time") else None
            self.recorder.write(
                {
                    "kind": kind,
                    "name": name,
                    "error": None,
                    "limit": None,
                    "ok": ok,
                    "repeat_ok": None,
                    "written_ok": None,
                    "ms_median": None,
                    **self.common,
                    "note": f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}: {type(error).__name__}: {str(error)[:600]}",
                }
            )
            if not self.is_alive():
                raise Lost(name) from error

    def correct(self, name, case, errors, note="", **shape):
        """One line about a case: `errors` makes (what, error, limit) of its outputs."""
        with self.whatever_happens("correct", name):
            outputs, same, wrong = case.judge()
            self.verdict(name, errors(outputs), same, wrong, note, **shape)

    def verdict(self, name, errors, same, wrong, note="", **shape):
        errors = [(what, float(error), limit) for what, error, limit in errors]
        gated = [entry for entry in errors if entry[2] is not None]
        # NaN is not within a limit.
        right = all(error <= limit for _, error, limit in gated)

        def excess(entry):
            _, error, limit = entry
            return math.inf if math.isnan(error) or (limit == 0 and error > 0) else error / limit if limit else 0.0

        worst = max(gated, key=excess, default=(None, None, None))
        notes = [note] if note else []
        notes += wrong + ([] if same else ["other bits in another run"])
        notes += [f"{what}: {error:.3g} of {limit:.3g}" for what, error, limit in gated if not error <= limit]
        self.recorder.write(
            {
                "kind": "correct",
                "name": name,
                **shape,
                "what": worst[0],
                "error": worst[1],
                "limit": worst[2],
                "ok": right and same and not wrong,
                "repeat_ok": same,
                "written_ok": not wrong,
                "errors": {what: [finite(error), limit] for what, error, limit in errors},
                **self.common,
                "note": "; ".join(notes),
            }
        )

    def samples(self, run, reset=None, seconds=None, least=3, most=30, ahead_ms=0):
        """Milliseconds of each sample by events, nothing of before in the cache. None on the emulator, where it runs once."""
        if self.api.emulated:
            if reset:
                reset()
            run()
            return None
        seconds = self.sample_seconds if seconds is None else seconds
        if self.flush is None:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        times, begun = [], time.perf_counter()
        warm = least > 1
        while len(times) < least + warm or (time.perf_counter() - begun < seconds and len(times) < most + warm):
            if reset:
                reset()
            self.flush.fill_(len(times) % 7)
            if ahead_ms:
                # The device waits while the host enqueues: what is measured is the device's time.
                torch.cuda._sleep(int(ahead_ms * 1.7e6))
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        return times[warm:]

    def timed(
        self,
        name,
        run,
        flop=0,
        raw_flop=None,
        bytes=0,
        ceiling=None,
        kind="time",
        errors=(),
        note="",
        reset=None,
        seconds=None,
        least=3,
        most=30,
        ahead_ms=0,
        **shape,
    ):
        """One line about a time. `ceiling` names the line whose rate the executed FLOP are held against; bytes, the copy's.
        `errors` is called after the last sample."""
        with self.whatever_happens(kind, name):
            times = self.samples(run, reset, seconds, least, most, ahead_ms)
            self.synchronize()
            self.time_line(name, times, flop, raw_flop, bytes, ceiling, kind, errors, note, **shape)

    def time_line(self, name, times, flop=0, raw_flop=None, bytes=0, ceiling=None, kind="time", errors=(), note="", **shape):
        raw_flop = flop if raw_flop is None else raw_flop
        line = {
            "kind": kind,
            "name": name,
            **shape,
            "error": None,
            "limit": None,
            "ok": None,
            "repeat_ok": None,
            "written_ok": None,
        }
        line |= {"ms_median": None, "ms_min": None, "samples": 0, "flop": flop, "raw_flop": raw_flop, "bytes": bytes}
        line |= {"tflops": None, "raw_tflops": None, "gbps": None, "share_of_ceiling": None, "ceiling": None}
        if times:
            median = statistics.median(times)
            line |= {"ms_median": median, "ms_min": min(times), "samples": len(times)}
            shares = []
            if flop:
                line |= {"tflops": flop / median / 1e9, "raw_tflops": raw_flop / median / 1e9}
                if ceiling in self.ceilings:
                    shares.append((line["raw_tflops"] / self.ceilings[ceiling], ceiling))
            if bytes:
                line["gbps"] = bytes / median / 1e6
                if "copy" in self.ceilings:
                    shares.append((line["gbps"] / self.ceilings["copy"], "copy"))
            if shares and kind == "time":
                line["share_of_ceiling"], line["ceiling"] = max(shares)
            if kind == "ceiling":
                self.ceilings[name] = line["tflops"] if flop else line["gbps"]
        errors = [(what, float(error), limit) for what, error, limit in (errors() if callable(errors) else errors)]
        if errors:
            gated = [e for e in errors if e[2] is not None]
            _, line["error"], line["limit"] = max(gated or errors, key=lambda e: e[1] / e[2] if e[2] else e[1])
            line["errors"] = {what: [finite(error), limit] for what, error, limit in errors}
            if gated:
                line["ok"] = all(error <= limit for _, error, limit in gated)
        self.recorder.write({**line, **self.common, "note": note})

    def say(self, kind, name, note="", **fields):
        self.recorder.write({"kind": kind, "name": name, **fields, **self.common, "note": note})


class Item:
    """One thing the probe does: a name, a rank by which it is done, and a guess of its seconds on a GPU."""

    def __init__(self, name, kind, run, seconds, quick):
        self.name, self.kind, self.run, self.seconds, self.quick = name, kind, run, seconds, quick


def attempt(probe, item):
    """Runs an item, whatever happens. Whether the device still answers."""
    try:
        with probe.whatever_happens(item.kind, item.name):
            if probe.planted == "throw":
                raise RuntimeError("a planted fault")
            if probe.planted == "crash":
                os.abort()
            if probe.planted == "hang":
                time.sleep(3600)
            item.run(probe)
            probe.synchronize()
    except Lost:
        return False
    return probe.is_alive() and probe.planted != "lost"


def relative(got, exact):
    """||d|| / ||exact||, in float64."""
    got, exact = got.double(), exact.double()
    norm = exact.norm()
    return float((got - exact).norm() / norm) if norm > 0 else float((got - exact).norm())


def different(got, exact):
    """Share of elements whose bits differ."""
    return float((raw(got) != raw(exact)).any(-1).double().mean()) if got.numel() else 0.0


def read_lines(path):
    try:
        with (lzma.open(path, "rt") if str(path).endswith(".xz") else open(path)) as file:
            return [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        return []


def matching(items, pattern):
    return [item for item in items if re.search(pattern, item.name)]
