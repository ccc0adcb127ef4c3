"""Kernels of other packages where they can be imported, at the sizes of our solve: GPTQModel's and llm-compressor's."""

import contextlib
import importlib
import importlib.util
import threading
import types
from unittest import mock

import torch

from .beside import BITS, BLOCK, DAMP, GROUP, allowing_tf32, prepare, symmetric
from .harness import Item, Lost
from .solving import RULE, Factored, Layer


class Problem:
    """The weight and H of a solve, the factor of its inverse, and what our own solve makes of them. H is damped here: the packages
    always do. Scales are float32, as theirs are."""

    def __init__(self, probe, rows, n):
        self.probe, self.rows, self.n = probe, rows, n
        self.weight = probe.noise(rows, n, seed=6, dtype=torch.bfloat16)
        self.h = symmetric(probe, n)
        self.inverse, _ = prepare(self.h, None)

    def ours(self, grid=None):
        """Codes and the error of our solve, its grid given or found."""
        order = torch.arange(self.n, dtype=torch.int32, device=self.probe.device)
        diagonal = self.h.diagonal()
        system = Factored(self.probe, self.n, BLOCK, False)
        system.permuted(self.h, None, order, diagonal + DAMP * diagonal.mean())
        system.run()
        layer = Layer(self.probe, system, self.rows, GROUP, RULE | {"scale_type": "VLMQ_F32"}, grid=grid)
        layer.reset(self.weight, order)
        layer.run()
        return layer.result("codes"), self.error(layer.residual)

    def error(self, difference):
        """||(W - W_hat) X||^2 by H, without its damping."""
        return float(((difference @ self.h) * difference).sum(dtype=torch.float64))

    def compared(self, values, scales, zeros, grid=None):
        """Of quantized weights with their grid: the share of codes other than ours, and the error as a multiple of ours."""
        wide = [x.float().repeat_interleave(GROUP, 1) for x in (scales, zeros)]
        codes = torch.round(values.float() / wide[0] + wide[1])
        ours, error = self.ours(grid)
        theirs = self.error(self.weight.float() - wide[0] * (codes - wide[1]))
        return [("share of other codes", (codes != ours).double().mean(), None), ("error / ours", theirs / error, None)]

    def timed(self, name, run, reset, errors, what, ahead_ms=0):
        flop = self.rows * self.n**2
        shares = ", ".join(f"{of} {value:.4g}" for of, value, _ in errors)
        # As our solve is timed: what the host has enqueued before the device begins costs nothing.
        self.probe.timed(
            name,
            run,
            flop,
            kind="reference",
            errors=errors,
            reset=reset,
            most=5,
            ahead_ms=ahead_ms,
            note=f"{what}; {shares}",
            rows=self.rows,
            features=self.n,
        )


@contextlib.contextmanager
def told(probe, name, how="failed"):
    """What another package throws is one line, and no fault of ours."""
    try:
        yield
    except Lost:
        raise
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split())[:400]
        probe.time_line(name, None, kind="reference", note=f"{how}: {type(error).__name__}: {why}")
        if not probe.is_alive():
            raise Lost(name) from error


@contextlib.contextmanager
def patience(probe, name, what, every=20, most=12):
    """Says that something takes long while it does: an item without a word is ended. Not for ever."""
    done = threading.Event()

    def tell():
        for turn in range(1, most + 1):
            if done.wait(every):
                return
            probe.say("reference", name, f"{what}: {turn * every} s so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def imported(probe, name, modules):
    """The modules, and the name with its version; None where they cannot be imported, which is a line."""
    top = modules[0].partition(".")[0]
    if importlib.util.find_spec(top) is None:
        probe.time_line(name, None, kind="reference", note=f"not importable: no package {top}")
        return None
    with told(probe, name, "not importable"), patience(probe, name, "importing"):
        found = [importlib.import_module(module) for module in modules]
        return f"{name} {getattr(importlib.import_module(top), '__version__', 'of unknown version')}", *found
    return None


class Counted:
    """Counts the calls of a module's function while they go on."""

    def __init__(self, module, function):
        self.calls, original = 0, getattr(module, function)

        def counting(*args, **more):
            self.calls += 1
            return original(*args, **more)

        self.patch = mock.patch.object(module, function, counting)


def sizes(probe):
    wide, narrow = probe.pick((18944, 3584), (256, 128))
    return [(probe.pick(18944, 40), narrow), (narrow, wide)]


def gptqmodel(probe):
    """GPTQ.quantize with its CUDA block kernel, which is compiled when first asked for."""
    found = imported(probe, "GPTQModel", ("gptqmodel.quantization", "gptqmodel.quantization.gptq_cuda"))
    if found is None:
        return
    name, package, kernel = found
    if not probe.small:
        built = False
        with told(probe, name), patience(probe, name, "compiling the block kernel"):
            built = kernel.block_update_available()
            if not built:
                raise RuntimeError(f"no block kernel: {kernel._EXTENSION.last_error_message()}")
        if not built:
            return
    for rows, n in sizes(probe):
        with told(probe, f"{name} {rows}x{n}"):
            gptqmodel_layer(Problem(probe, rows, n), f"{name} {rows}x{n}", package, kernel)


def gptqmodel_layer(problem, name, package, kernel):
    config = package.QuantizeConfig(
        bits=BITS,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        act_group_aware=False,
        static_groups=False,
        damp_percent=DAMP,
        mse=0.0,
        fallback=None,
        offload_to_disk=False,
    )
    linear = torch.nn.Linear(problem.n, problem.rows, bias=False, device="meta").requires_grad_(False)
    linear.weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    state = types.SimpleNamespace()

    def reset(prepared):
        """A task in which calibration has ended."""
        state.task = package.GPTQ(linear, config)
        state.task.quantizer.configure(perchannel=True)
        state.task.H, state.task.nsamples = problem.h.clone(), 1
        if prepared:
            state.task.hessian_inverse = lambda _: (problem.inverse, DAMP)

    def run():
        state.result = state.task.quantize(blocksize=BLOCK)

    for prepared in (True, False):
        reset(prepared)
        count = Counted(kernel, "gptq_block_update")
        with allowing_tf32(False), count.patch:
            run()
        used = f"{count.calls} launches of the block kernel" if count.calls else "its loop in PyTorch"
        values, scales, zeros = state.result[:3]
        errors = problem.compared(values, scales, zeros)
        what = "from the given factor of H^-1" if prepared else "with damping, inverse and factor"
        with allowing_tf32(False):
            problem.timed(
                name if prepared else f"{name}, prepared too",
                run,
                lambda: reset(prepared),
                errors,
                f"GPTQ.quantize {what}: grid, solve, losses; {used}",
                ahead_ms=25 if prepared else 0,
            )


def llmcompressor(probe):
    """quantize_weight with its Triton kernel, which is compiled in the first run."""
    modules = ("llmcompressor.modifiers.gptq.gptq_quantize", "compressed_tensors.quantization")
    found = imported(probe, "llm-compressor", (*modules, "compressed_tensors.quantization.utils"))
    if found is None:
        return
    name, package, quantization, utils = found
    for rows, n in sizes(probe):
        with told(probe, f"{name} {rows}x{n}"):
            llmcompressor_layer(Problem(probe, rows, n), f"{name} {rows}x{n}", package, quantization, utils)


def llmcompressor_layer(problem, name, package, quantization, utils):
    rows, n = problem.rows, problem.n
    config = quantization.QuantizationArgs(
        num_bits=BITS, type="int", symmetric=False, strategy="group", group_size=GROUP, actorder=None
    )
    # The grid comes from an observer of the weight as it was, before the solve.
    groups = problem.weight.float().reshape(1, rows, n // GROUP, GROUP)
    scales, zeros = utils.calculate_qparams(*torch.aminmax(groups, dim=-1), config)
    unsigned = zeros[0].int() + 2 ** (BITS - 1)
    grid = scales[0].float(), unsigned.to(torch.uint8)
    state = types.SimpleNamespace()

    def reset(prepared):
        """Both are overwritten."""
        state.weight = problem.weight.float().unsqueeze(0)
        state.h = (problem.inverse if prepared else problem.h.clone()).unsqueeze(0)

    def run():
        state.result = package.quantize_weight(
            weights=state.weight,
            hessians=state.h,
            scale=scales,
            zero_point=zeros,
            global_scale=None,
            quant_args=config,
            blocksize=BLOCK,
            percdamp=DAMP,
        )

    for prepared in (True, False):
        given = contextlib.nullcontext()
        if prepared:
            given = mock.patch.object(package, "factorize_hessian", lambda weights, hessians, *_: hessians)
        with given, allowing_tf32(False):
            reset(prepared)
            count = Counted(package, "fused_gptq_block_update")
            with count.patch, patience(problem.probe, name, "the first run"):
                run()
                problem.probe.synchronize()
            used = f"{count.calls} launches of the Triton kernel" if count.calls else "its loop in PyTorch"
            if bool(state.result[2].any()):
                raise RuntimeError("H was not positive definite to it: it rounded to nearest")
            errors = problem.compared(state.result[0][0], scales[0], unsigned, grid)
            what = "from the given factor of H^-1" if prepared else "with damping, inverse and factor"
            problem.timed(
                name if prepared else f"{name}, prepared too",
                run,
                lambda: reset(prepared),
                errors,
                f"quantize_weight {what}: solve, losses, not the grid, which is of the weight as it was, in ours as well; {used}",
                ahead_ms=25 if prepared else 0,
            )


def items():
    """Their imports take long, and what they compile: nothing where they are absent."""
    # GPTQModel last: its import changes Triton for the whole process.
    plan = [("llm-compressor", "llmcompressor", llmcompressor, 60), ("GPTQModel", "gptqmodel", gptqmodel, 120)]
    return [
        Item(f"reference {name}", "reference", run, seconds if importlib.util.find_spec(package) else 0.1, False)
        for name, package, run, seconds in plan
    ]
