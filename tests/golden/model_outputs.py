"""What transformers computes in float32 for a checkpoint: token ids, positions, vision features, hidden states, logits.

Conversations are written as JSONL beside the tensors, in the format that `--calib` takes, so that a test reads its input
as a user's run would. Image paths are relative to that file.
"""

import json
import shutil

import torch
from PIL import Image
from safetensors.torch import save_file

import families
from families.base import DATA, MODEL

SMALL = 150_000  # bytes; larger pixel values stay out: other goldens check them


def draw_images():
    """Synthetic PNGs of sizes that no patch divides: 70×42 rounds half to even, 131×50 is wide."""
    folder = MODEL / "images"
    folder.mkdir(parents=True, exist_ok=True)
    gradient, blocks = Image.new("RGB", (70, 42)), Image.new("RGB", (131, 50))
    gradient.putdata([(3 * x + 20, 6 * y, 255 - 2 * x - y) for y in range(42) for x in range(70)])
    blocks.putdata([((x // 9 * 37) % 256, (y // 7 * 53) % 256, (x * y) % 256) for y in range(50) for x in range(131)])
    for family in families.FAMILIES:
        family.draw_images(folder)
    gradient.save(folder / "gradient-70x42.png", optimize=True)
    blocks.save(folder / "blocks-131x50.png", optimize=True)


def image(path):
    return {"type": "image", "image": path}


def copied(path):
    """An image of the data files beside the goldens: a data file's paths may not lead out of its folder."""
    shutil.copyfile(DATA / "vqa" / path, MODEL / path)
    return path


def text(value):
    return {"type": "text", "text": value}


def turn(role, *content):
    return {"role": role, "content": list(content)}


def vqa(file, wanted):
    """Conversations of a data file by id; their images are copied to those of the goldens."""
    rows = {}
    for line in (DATA / "vqa" / file).read_text().splitlines():
        row = json.loads(line)
        if row["id"] in wanted:
            for message in row["messages"]:
                for part in message["content"]:
                    if part["type"] == "image":
                        copied(part["image"])
            rows[row["id"]] = row
    return [rows[key] for key in wanted]


def conversations(trained):
    """The sequences: an image with question and answer, text alone over two turns, two images, an odd-sized image."""
    text_only = [
        turn("system", text("answer in one word.")),
        turn("user", text("how many digits are there?")),
        turn("assistant", text("3")),
        turn("user", text("what color is the circle? green, or red?")),
        turn("assistant", text("green")),
    ]
    two_images = [
        turn("user", image(copied("images/calib-0007.png")), text("and "), image("images/gradient-70x42.png"),
             text("what shape is blue?")),
        turn("assistant", text("square")),
    ]
    odd_image = [
        turn("user", text("read the word: "), image("images/blocks-131x50.png"), text(" is it 7?")),
        turn("assistant", text("no")),
    ]
    rest = [
        {"id": "text-only", "messages": text_only},
        {"id": "two-images", "messages": two_images},
        {"id": "odd-image", "messages": odd_image},
    ]
    if not trained:
        tiny = {"id": "tiny-image", "messages": [
            turn("user", image("images/gradient-70x42.png"), text("describe the image.")),
            turn("assistant", text("a brown ring.")),
        ]}
        return vqa("eval.jsonl", ["eval-0002"]) + rest + [tiny]
    return vqa("eval.jsonl", ["eval-0002", "eval-0001", "eval-0005"]) + vqa("calib.jsonl", ["calib-0001"]) + rest


def encode(processor, messages, prompt=False):
    """Model inputs of a conversation, or of the prompt for its last answer."""
    messages = messages[:-1] if prompt else messages
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    images = [Image.open(MODEL / part["image"]).convert("RGB") for part in parts]
    # In a list of their own: LLaVA-OneVision's processor treats several images of one sample otherwise than one.
    return processor(text=[rendered], images=[images] if images else None, return_tensors="pt")


@torch.no_grad()
def embed(family, model, inputs):
    """Vision features [vision tokens, hidden] (None without images), embeddings after the scatter [tokens, hidden], and what
    is added behind the first layers by DeepStack (a list of [tokens, hidden], zero where there is no image)."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    if "pixel_values" not in inputs:
        return None, embeddings, []
    features, deepstack = family.features(model, inputs)
    places = inputs["input_ids"][0] == model.config.image_token_id
    embeddings[places] = features
    levels = [torch.zeros_like(embeddings) for _ in deepstack]
    for level, added in zip(levels, deepstack):
        level[places] = added
    return features, embeddings, levels


@torch.no_grad()
def forward(model, inputs):
    """Outputs of all decoder layers, each [tokens, hidden], and logits [tokens, vocabulary]."""
    hidden = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: hidden.append(out[0]))
        for layer in model.model.language_model.layers
    ]
    logits = model(**inputs, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return hidden, logits


@torch.no_grad()
def generate(model, processor, messages, limit=24):
    """Prompt ids, greedily generated ids (end of turn included), and the smallest lead of a chosen logit."""
    inputs = encode(processor, messages, prompt=True)
    made = model.generate(
        **inputs, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True, output_logits=True,
    )
    prompt = inputs["input_ids"][0]
    top = torch.stack([step[0].topk(2).values for step in made.logits])
    return prompt, made.sequences[0, len(prompt):], (top[:, 0] - top[:, 1]).min().item()


def write(family, name, model, processor, trained):
    """Write `<name>.outputs.safetensors` and `<name>.jsonl`; returns the sequences with what `embed` makes of them."""
    tensors, rows, made = {}, [], []
    v = family.variants.get(name, {})
    for row in conversations(trained) + family.conversations(name):
        inputs = encode(processor, row["messages"])
        features, embeddings, levels = embed(family, model, inputs)
        hidden, logits = forward(model, inputs)
        at, place = row["id"] + ".", family.positions(model, inputs)
        tensors[at + "input_ids"] = inputs["input_ids"][0].int()
        tensors[at + "position_ids"] = place.int()
        if features is not None:
            tensors |= {at + key: value for key, value in family.image_tensors(inputs).items()}
            if v.get("pixels") and inputs["pixel_values"].nbytes < SMALL:
                tensors[at + "pixel_values"] = inputs["pixel_values"]
            # The trained checkpoints see 64 tokens an image: the first sequence in full, of others the last rows.
            keep = features if not trained or row["id"] == "eval-0002" else features[-8:]
            tensors[at + "vision_features"] = keep
            places = inputs["input_ids"][0] == model.config.image_token_id
            tensors |= {f"{at}deepstack.{level}": added[places] for level, added in enumerate(levels)}
        tensors[at + "hidden_last_token"] = torch.stack([layer[-1] for layer in hidden])
        short = trained or row["id"] == "tiny-image" or (v.get("brief") and row["id"] != "eval-0002")
        tensors[at + "logits"] = logits[-8:] if short else logits
        if not trained:
            tensors[at + "embeddings"] = embeddings
            if row["id"] in ("eval-0002", "two-images"):
                tensors[at + "hidden_first_layer"] = hidden[0]
        extra = {}
        if trained or v.get("greedy"):
            prompt, answer, lead = generate(model, processor, row["messages"])
            tensors[at + "prompt_ids"], tensors[at + "generated_ids"] = prompt.int(), answer.int()
            extra["generated"] = processor.tokenizer.decode(answer)
            extra["smallest_lead"] = round(lead, 4)
        rows.append(row | extra)
        made.append((row["id"], place, embeddings, levels))
    (MODEL / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, MODEL / f"{name}.outputs.safetensors")
    return made
