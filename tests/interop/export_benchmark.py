"""Writes a benchmark as data for `vlmq-run eval --preset`: DIR/questions.jsonl with LMMs-Eval's columns, DIR/images/.

    pip install datasets pillow
    python tests/interop/export_benchmark.py chartqa DIR [--limit N] [--jpeg]

Images are PNG, as they are. --jpeg writes what LMMs-Eval's class for Qwen2-VL shows the model: JPEG of quality 85.
"""

import argparse
import base64
import io
import json
from pathlib import Path

# Preset: data set, configuration, split, columns that the preset reads. scienceqa-img is the preset `scienceqa` on the
# questions with an image.
BENCHMARKS = {
    "chartqa": ("lmms-lab-encoder/ChartQA", None, "test", ["question", "answer", "type"]),
    "docvqa": ("lmms-lab-encoder/DocVQA", "DocVQA", "validation", ["question", "answers"]),
    "mme-realworld": ("yifanzhang114/MME-RealWorld-Lmms-eval", None, "train",
                      ["question", "multi-choice options", "answer", "category"]),
    "mme-realworld-cn": ("yifanzhang114/MME-RealWorld-CN-Lmms-eval", None, "train",
                         ["question", "multi-choice options", "answer", "category"]),
    "ocrbench": ("echo840/OCRBench", None, "test", ["question", "answer", "dataset", "question_type"]),
    "scienceqa": ("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL", "test", ["question", "choices", "answer", "hint"]),
    "scienceqa-img": ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test", ["question", "choices", "answer", "hint"]),
    "seedbench-2-plus": ("doolayer/SEED-Bench-2-Plus", None, "test",
                         ["question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "question_image_type"]),
    "textvqa": ("lmms-lab-encoder/textvqa", None, "validation", ["question", "answers"]),
}


def picture(document):
    """The document's image as Pillow's; MME-RealWorld holds base64 text, ScienceQA has questions without one."""
    if "bytes" in document:
        from PIL import Image
        return Image.open(io.BytesIO(base64.b64decode(document["bytes"])))
    return document["image"]


def export(benchmark, documents, folder, jpeg=False):
    """Writes `documents`, each under the number of its place."""
    columns = BENCHMARKS[benchmark][3]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as lines:
        for number, document in enumerate(documents):
            row = {"id": str(number)}
            image = picture(document)
            if image is not None:
                row["image"] = f"images/{number}.{'jpg' if jpeg else 'png'}"
                options = {"quality": 85} if jpeg else {}
                image.convert("RGB").save(folder / row["image"], **options)
            row.update({column: document[column] for column in columns})
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--jpeg", action="store_true", help="images as JPEG of quality 85")
    arguments = parser.parse_args()
    from datasets import load_dataset
    path, configuration, split, _ = BENCHMARKS[arguments.benchmark]
    documents = load_dataset(path, configuration, split=split, streaming=arguments.limit is not None)
    if arguments.limit is not None:
        documents = documents.take(arguments.limit)
    export(arguments.benchmark, documents, arguments.folder, arguments.jpeg)


if __name__ == "__main__":
    main()
