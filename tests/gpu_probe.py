"""The probe of benches/gpu_probe.py finds what is planted: wrong, unwritten and stray outputs, other bits in another run, faults
that end a process or hang it. And what it makes of vlmq.h is what a C compiler makes of it.

    python tests/gpu_probe.py --library LIBRARY

LIBRARY is the emulator's (kernels/emulator). Needs benches/requirements.txt and a C compiler (CC, else cc), no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE = ROOT / "benches/gpu_probe.py"
HEADER = ROOT / "kernels/include/vlmq.h"
sys.path.insert(0, str(ROOT / "benches"))

from probe.api import Header, HeaderError  # noqa: E402

# Two calls that write all of their outputs, and one after them.
ITEMS = "correct (norm|permute_columns|rotate)$"


def run(library, folder, *arguments):
    """Exit code, lines of JSON, last line of what was printed."""
    out = folder / "probe.jsonl"
    command = [sys.executable, str(PROBE), "--library", library, "--cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not out.with_name("probe.jsonl.progress").exists(), "the file of progress is left"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return done.returncode, lines, done.stdout.strip().splitlines()[-1]


def planted_faults_are_found(library, folder):
    code, lines, last = run(library, folder, "--only", ITEMS)
    right = len(lines)
    assert code == 0 and last == f"{right} of {right} correct, 0 timed, 0 skipped", last
    assert right > 40 and all(line["ok"] and line["repeat_ok"] and line["written_ok"] for line in lines)
    norms = sum(line["name"].startswith("norm") for line in lines)

    # In each case of one item, which stays the only one that is not right.
    for fault, field, word in [
        ("output", "ok", "y:"),
        ("unwritten", "written_ok", "not written"),
        ("guard", "written_ok", "outside of what is documented"),
        ("bits", "repeat_ok", "other bits"),
    ]:
        code, lines, last = run(library, folder, "--only", ITEMS, "--plant", f"{fault}:norm")
        found = [line for line in lines if not line["ok"]]
        assert code == 1 and len(lines) == right and len(found) == norms, (fault, last)
        for line in found:
            assert line["name"].startswith("norm") and not line[field] and (word in line["note"] or "d_x:" in line["note"]), (
                line
            )

    # One line for the whole item; those before and behind it are as they were.
    for fault, words in [
        ("throw", "a planted fault"),
        ("crash", "SIGABRT"),
        ("hang", "no progress for 5 s"),
    ]:
        code, lines, last = run(library, folder, "--only", ITEMS, "--plant", f"{fault}:norm", "--stall", "5")
        found = [line for line in lines if not line["ok"]]
        assert code == 1 and [line["name"] for line in found] == ["correct norm"], (fault, last)
        assert words in found[0]["note"] and len(lines) == right - norms + 1, (fault, lines)

    # A device that no longer answers: the next process goes on behind it.
    code, lines, last = run(library, folder, "--only", ITEMS, "--plant", "lost:permute_columns")
    found = [line for line in lines if not line["ok"]]
    assert code == 1 and len(lines) == right + 1 and "no longer answers" in found[0]["note"], last

    code, lines, last = run(library, folder, "--only", ITEMS, "--deadline", "0")
    assert code == 1 and last == "0 of 0 correct, 0 timed, 3 skipped", last


def the_header_is_read_right(folder):
    header = Header(HEADER.read_text())
    import ctypes

    program, expected = ["#include <stdio.h>", '#include "vlmq.h"', "int main(void) {"], []
    for name, struct in header.structs.items():
        for field, kind in struct._fields_:
            program.append(f'  printf("%zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));')
            expected.append(f"{getattr(struct, field).offset} {ctypes.sizeof(kind)}")
        program.append(f'  printf("%zu\\n", sizeof({name}));')
        expected.append(str(ctypes.sizeof(struct)))
    for name, value in header.constants.items():
        program.append(f'  printf("%d\\n", (int){name});')
        expected.append(str(value))
    source, built = folder / "layout.c", folder / "layout"
    source.write_text("\n".join([*program, "  return 0;", "}"]))
    subprocess.run([os.environ.get("CC", "cc"), "-I", HEADER.parent, "-o", built, source], check=True)
    printed = subprocess.run([built], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert len(expected) > 250 and printed == expected, [pair for pair in zip(printed, expected) if pair[0] != pair[1]]

    # What it does not know is an error.
    text = HEADER.read_text()
    for old, new in [
        ("int32_t fast;", "int32_t fast[2];"),
        ("int32_t fast;", "long fast;"),
        ("float damp;", "float damp : 3;"),
        ("const float* root; /* of", "const float** root; /* of"),
        ("vlmq_status vlmq_norm(", "int vlmq_norm("),
        ("VLMQ_OK = 0,", "VLMQ_OK,"),
        ("#ifdef __cplusplus\n}", "union vlmq_any { int a; };\n#ifdef __cplusplus\n}"),
    ]:
        assert old in text, old
        try:
            Header(text.replace(old, new))
        except HeaderError:
            continue
        raise AssertionError(f"{new!r} was read without a word")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="the emulator's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        the_header_is_read_right(Path(folder))
        planted_faults_are_found(args.library, Path(folder))
    print("what was planted was found")


main()
