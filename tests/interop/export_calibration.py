"""Writes calibration data for `vlmq-run quantize --calib`: DIR/data.jsonl, a conversation a line, and DIR/images/ beside it.

    pip install pillow                      (and datasets, for `dataset`)
    python tests/interop/export_calibration.py DIR rows FILE --images ROOT [--only coco/]
    python tests/interop/export_calibration.py DIR folder IMAGES [--question "Describe this picture."]
    python tests/interop/export_calibration.py DIR dataset NAME [--configuration C] [--split train]

rows: a JSON or JSONL file of `conversations` with the image's path below ROOT, as ShareGPT4V and LLaVA-Instruct have them. The paper
calibrates with ShareGPT4V's captions of COCO: sharegpt4v_instruct_gpt4-vision_cap100k.json of Lin-Chen/ShareGPT4V and COCO's
train2017 below ROOT/coco, with --only coco/.
folder: pictures with their captions, as NAME.txt beside NAME.jpg, or as `file_name` and `text` of metadata.jsonl (what Hugging Face
calls an image folder).
dataset: one of the Hugging Face hub, read as a stream. Its picture is in the first column of pictures, or --image-column; what is said of
it in `messages`, `conversations`, a question with its answer, or a caption, whichever is there.

--samples are drawn with --seed and only their images are copied: as JPEG of quality 95 where they are no files yet. A row that lacks
its image, or its text, is counted and left out.
"""

import argparse
import io
import json
import random
import shutil
import sys
from pathlib import Path

QUESTION = "Describe this picture."
# What columns are called that hold a caption, a question, an answer.
CAPTIONS = ("caption", "text", "description", "captions", "sentences")
QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answer", "response", "answers", "label")
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class Unusable(Exception):
    """Why a row is left out."""


def turns(question, answer, pictures=1):
    """A question about pictures, and its answer."""
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def from_conversations(conversations, pictures):
    """ShareGPT's turns as messages; <image> stands for a picture, or all come first."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    messages, marked = [], sum(turn["value"].count("<image>") for turn in conversations)
    if marked not in (0, pictures):
        raise Unusable(f"{marked} <image> markers for {pictures} images")
    waiting = pictures if marked == 0 else 0
    for turn in conversations:
        role = roles.get(turn["from"])
        if role is None:
            raise Unusable(f"a turn from {turn['from']!r}")
        content = []
        if role == "user" and waiting:
            content, waiting = [{"type": "image"}] * waiting, 0
        for number, piece in enumerate(turn["value"].split("<image>")):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        messages.append({"role": role, "content": content})
    return messages


def first(row, names):
    """The first of these columns that has text; of a list its first entry."""
    for name in names:
        value = row.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def messages_of(row, pictures, question):
    """What a row of some columns says of its pictures."""
    if row.get("messages"):
        return row["messages"]
    if row.get("conversations"):
        return from_conversations(row["conversations"], pictures)
    asked, answered = first(row, QUESTIONS), first(row, ANSWERS)
    if asked and answered:
        return turns(asked, answered, pictures)
    caption = first(row, CAPTIONS) or answered
    if not caption:
        raise Unusable(f"no text among the columns {', '.join(map(str, row))}")
    return turns(question, caption, pictures)


def rows_of_file(path):
    """The rows of a JSON list, or of JSON lines."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def from_rows(arguments):
    """Rows that name files below --images."""
    for row in rows_of_file(arguments.file):
        names = row.get("image", row.get("images")) or []
        names = [names] if isinstance(names, str) else names
        if arguments.only and not any(name.startswith(arguments.only) for name in names):
            continue
        yield row, [arguments.images / name for name in names]


def from_folder(arguments):
    """Pictures with a caption each."""
    metadata = arguments.images / "metadata.jsonl"
    if metadata.exists():
        for row in rows_of_file(metadata):
            yield row, [arguments.images / row["file_name"]]
        return
    for path in sorted(arguments.images.rglob("*")):
        if path.suffix.lower() in PICTURES:
            caption = path.with_suffix(".txt")
            yield {"caption": caption.read_text(encoding="utf-8") if caption.exists() else ""}, [path]


def from_dataset(arguments):
    """A data set of the hub; its pictures are Pillow's."""
    from datasets import Image as Pictures
    from datasets import load_dataset

    rows = load_dataset(arguments.name, arguments.configuration, split=arguments.split, streaming=True)
    column = arguments.image_column
    if column is None:
        columns = [name for name, kind in (rows.features or {}).items() if isinstance(kind, Pictures)]
        if not columns:
            raise SystemExit(f"error: {arguments.name} has no column of pictures among {', '.join(rows.features or {})}; name it with --image-column")
        column = columns[0]
    for row in rows.shuffle(seed=arguments.seed, buffer_size=4 * arguments.samples):
        found = row.pop(column)
        yield row, [] if found is None else found if isinstance(found, list) else [found]


def place(picture, target):
    """A file is copied as it is, any other picture written as JPEG. Returns the file's name."""
    from PIL import Image

    if isinstance(picture, Path):
        if not picture.is_file():
            raise Unusable(f"no file {picture}")
        # A broken one should not end the run that is calibrated with it.
        try:
            with Image.open(picture) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise Unusable(f"{picture}: {error}") from error
        target = target.with_suffix(picture.suffix.lower())
        shutil.copyfile(picture, target)
        return target
    if isinstance(picture, dict):
        picture = Image.open(io.BytesIO(picture["bytes"]))
    target = target.with_suffix(".jpg")
    picture.convert("RGB").save(target, quality=95)
    return target


def export(rows, arguments):
    """Draws rows and writes those that are whole."""
    folder = arguments.folder
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"error: {folder} is not an empty folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if arguments.kind != "dataset":
        rows = list(rows)
        random.Random(arguments.seed).shuffle(rows)
    written, left = 0, {}
    with open(folder / "data.jsonl", "w", encoding="utf-8") as lines:
        for row, pictures in rows:
            if written == arguments.samples:
                break
            copied = []
            try:
                messages = messages_of(row, len(pictures), arguments.question)
                parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
                parts = [part for part in parts if part.get("type") == "image"]
                if len(parts) != len(pictures):
                    raise Unusable(f"{len(parts)} places for {len(pictures)} images")
                for number, picture in enumerate(pictures):
                    copied.append(place(picture, folder / "images" / f"{written}-{number}"))
            except Unusable as why:
                for path in copied:
                    path.unlink()
                left[str(why)] = left.get(str(why), 0) + 1
                continue
            images = iter(copied)
            for message in messages:
                if isinstance(message["content"], list):
                    message["content"] = [
                        {"type": "image", "image": f"images/{next(images).name}"} if part.get("type") == "image"
                        else {"type": "text", "text": part["text"]}
                        for part in message["content"]
                    ]
            lines.write(json.dumps({"id": str(row.get("id", written)), "messages": messages}, ensure_ascii=False) + "\n")
            written += 1
    for why, count in sorted(left.items(), key=lambda entry: -entry[1])[:10]:
        print(f"left out {count}: {why}", file=sys.stderr)
    print(f"{folder / 'data.jsonl'}: {written} samples, {sum(left.values())} rows left out")
    if written == 0:
        raise SystemExit("error: no row was usable")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", default=QUESTION, help="what is asked where there is a caption alone")
    kinds = parser.add_subparsers(dest="kind", required=True)
    rows = kinds.add_parser("rows")
    rows.add_argument("file", type=Path)
    rows.add_argument("--images", type=Path, required=True)
    rows.add_argument("--only", help="only rows whose image begins with this")
    folder = kinds.add_parser("folder")
    folder.add_argument("images", type=Path)
    dataset = kinds.add_parser("dataset")
    dataset.add_argument("name")
    dataset.add_argument("--configuration")
    dataset.add_argument("--split", default="train")
    dataset.add_argument("--image-column")
    arguments = parser.parse_args()
    export({"rows": from_rows, "folder": from_folder, "dataset": from_dataset}[arguments.kind](arguments), arguments)


if __name__ == "__main__":
    main()
