"""Accuracy by transformers and by vlmq-run: the same answers to the same questions.

    cargo run --release -- eval tests/data/tiny-qwen2-vl tests/data/vqa/eval.jsonl --json scores.json
    python tests/interop/accuracy.py tests/data/tiny-qwen2-vl tests/data/vqa/eval.jsonl scores.json

transformers in float32 on the CPU, greedy decoding, exact match without regard to case. Prints both scores and every
answer that differs, with the smallest lead of a chosen logit over the next one: a lead near 0 is a tie that rounding
decides. Under a minute for 400 questions; not part of CI.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def answer(model, processor, folder, row):
    """The answer to a line's question, and the smallest lead of its tokens."""
    question, images = [], []
    for message in row["messages"][:-1]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        images += [Image.open(folder / part["image"]).convert("RGB") for part in parts if part["type"] == "image"]
        parts = [part if part["type"] == "text" else {"type": "image"} for part in parts]
        question.append(message | {"content": parts})
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    made = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=row.get("max_new_tokens", 64),
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :]
    best = torch.stack([step[0].topk(2).values for step in made.logits])
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), (best[:, 0] - best[:, 1]).min().item()


def main():
    folder, data, scores = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    scores = json.loads(Path(scores).read_text())
    assert [row["id"] for row in rows] == [ours["id"] for ours in scores["answers"]], "other questions"

    right = same = 0
    for row, ours in zip(rows, scores["answers"]):
        theirs, lead = answer(model, processor, Path(data).parent, row)
        content = row["messages"][-1]["content"]
        expected = content if isinstance(content, str) else "".join(part["text"] for part in content)
        right += theirs.lower() == expected.strip().lower()
        same += theirs == ours["answer"]
        if theirs != ours["answer"]:
            print(f"{row['id']}: transformers {theirs!r}, vlmq-run {ours['answer']!r}, smallest lead {lead:.1e}")
    print(f"{same} of {len(rows)} answers are the same; transformers scores {right / len(rows)}, vlmq-run {scores['score']}")
    sys.exit(same != len(rows))


main()
