"""tests/interop/export_calibration.py writes what vlmq-run reads, and leaves out what is not whole.

    python tests/calibration_export.py          (pillow)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "data/vqa/images"
sys.path.insert(0, str(HERE / "interop"))

import export_calibration as export  # noqa: E402


def run(*words):
    return subprocess.run(
        [sys.executable, HERE / "interop/export_calibration.py", *map(str, words)], capture_output=True, text=True
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(row, folder):
    """Names of the files that a row shows, all of which are there."""
    parts = [part for turn in row["messages"] if isinstance(turn["content"], list) for part in turn["content"]]
    names = [part["image"] for part in parts if part["type"] == "image"]
    assert all((folder / name).is_file() for name in names), names
    return names


def rows_of_conversations(work):
    names = sorted(path.name for path in IMAGES.iterdir())[:6]
    rows = [
        {"id": str(number), "image": f"coco/{name}", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?" if number % 2 else "What is it?"}, {"from": "gpt", "value": f"thing {number}"},
        ]}
        for number, name in enumerate(names)
    ]
    rows[4]["image"] = "coco/missing.png"
    rows[5]["image"] = "sam/other.png"
    (work / "root/coco").mkdir(parents=True)
    for name in names:
        (work / "root/coco" / name).write_bytes((IMAGES / name).read_bytes())
    (work / "root/coco" / names[3]).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (work / "rows.json").write_text(json.dumps(rows))
    out = work / "out"
    done = run(out, "rows", work / "rows.json", "--images", work / "root", "--only", "coco/")
    assert done.returncode == 0 and "3 samples, 2 rows left out" in done.stdout, (done.stdout, done.stderr)
    assert "missing.png" in done.stderr and "left out 1" in done.stderr, done.stderr
    written = lines(out)
    assert sorted(row["id"] for row in written) == ["0", "1", "2"], written
    for row in written:
        assert len(shown(row, out)) == 1
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"][1:] == [{"type": "text", "text": "What is it?"}]
    # Nothing is left of a row that was given up.
    assert len(list((out / "images").iterdir())) == 3
    # The same seed draws the same rows; another folder's files are not touched.
    again = run(work / "again", "rows", work / "rows.json", "--images", work / "root", "--only", "coco/")
    assert again.returncode == 0 and lines(work / "again") == written
    assert "not an empty folder" in run(out, "folder", IMAGES).stderr
    return out


def captions_beside_pictures(work):
    folder = work / "captions"
    folder.mkdir()
    first, second = sorted(IMAGES.iterdir())[:2]
    (folder / "a.png").write_bytes(first.read_bytes())
    (folder / "a.txt").write_text("a red ring\n")
    (folder / "b.png").write_bytes(second.read_bytes())
    out = work / "beside"
    done = run("--question", "What?", out, "folder", folder)
    assert done.returncode == 0 and "1 samples, 1 rows left out" in done.stdout, (done.stdout, done.stderr)
    (row,) = lines(out)
    assert row["messages"][0]["content"][1]["text"] == "What?" and row["messages"][1]["content"] == "a red ring"
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "two squares"}\n')
    out = work / "metadata"
    assert run(out, "folder", folder).returncode == 0
    (row,) = lines(out)
    assert row["messages"][1]["content"] == "two squares" and len(shown(row, out)) == 1


def columns_of_data_sets():
    said = lambda row, pictures=1: export.messages_of(row, pictures, "Q?")
    answer = lambda row: said(row)[-1]["content"]
    assert answer({"caption": " a cat "}) == "a cat"
    assert answer({"captions": ["one", "two"]}) == "one"
    assert answer({"question": "who?", "answer": ["he", "she"]}) == "he"
    assert said({"question": "who?", "answer": "he"})[0]["content"][1]["text"] == "who?"
    two = said({"conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "a"}]}, 2)
    assert [part["type"] for part in two[0]["content"]] == ["image", "text", "image", "text"]
    for row in [{"caption": ""}, {"number": 7}, {"conversations": [{"from": "cat", "value": "x"}]}]:
        try:
            said(row)
        except export.Unusable:
            continue
        raise AssertionError(f"{row} was used")


def main():
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        out = rows_of_conversations(work)
        captions_beside_pictures(work)
        columns_of_data_sets()
        if len(sys.argv) > 1:
            # The program reads what was written.
            model = HERE / "golden/model/flat-tied-bf16"
            words = [sys.argv[1], "quantize", model, "--calib", out / "data.jsonl", "--group-size", "32", "--quiet", "--out", work / "w"]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
            assert done.returncode == 0 and "3 samples" in done.stdout, (done.stdout, done.stderr)
    print("3 passed, 0 failed")


main()
