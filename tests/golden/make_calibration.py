"""Goldens for tests/samples: what transformers and torchvision make of images, templates and conversations.

Needs torch, torchvision, pillow and transformers (made with 2.15, 0.29, 13.0 and 5.23). Run from the repository root:
    python tests/golden/make_calibration.py
Writes tests/golden/calibration: the test images themselves, what a decoder must make of them (decoded/), what the resize
must make of those (resized/), pixel values (*.f32, little-endian), and cases.json.
"""

import json
import pathlib
import shutil
import struct
import zlib

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.utils.chat_template_utils import render_jinja_template

torch.set_num_threads(1)
ROOT = pathlib.Path("tests/golden/calibration")
DATA = pathlib.Path("tests/data")
MODEL = DATA / "tiny-qwen2-vl"
rng = np.random.default_rng(20250803)


def noise(h, w):
    return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)


def smooth(h, w):
    """Cheap to compress, yet every row and column differs."""
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 255 // max(w - 1, 1), y * 255 // max(h - 1, 1), (x // 16 + y // 16) % 2 * 200], -1).astype(np.uint8)


def raw_png(path, width, height, depth, color, rows, extra=()):
    """A PNG of any bit depth, which Pillow cannot write. rows: packed bytes of each row."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    data = zlib.compress(b"".join(b"\0" + r for r in rows), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
                     + b"".join(chunk(k, b) for k, b in extra) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def make_images(folder):
    for h, w in [(56, 56), (42, 70), (20, 300), (56, 100), (100, 56), (150, 90), (1, 150), (29, 31)]:
        Image.fromarray(noise(h, w)).save(folder / f"noise-{h}x{w}.png", optimize=True)
    for h, w in [(300, 1000), (700, 420)]:
        Image.fromarray(smooth(h, w)).save(folder / f"smooth-{h}x{w}.png", optimize=True)
    small = noise(17, 24)
    alpha = rng.integers(0, 256, (17, 24, 1), dtype=np.uint8)
    Image.fromarray(small[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.concatenate([small[..., :1], alpha], -1), "LA").save(folder / "grey-alpha.png")
    Image.fromarray(np.concatenate([small, alpha], -1)).save(folder / "alpha.png")
    Image.fromarray(small).quantize(200).save(folder / "palette.png")
    Image.fromarray(small).quantize(11).save(folder / "palette-4bit.png", bits=4, transparency=3)
    Image.fromarray(small[..., 0] > 99).save(folder / "one-bit.png")
    wide = rng.integers(0, 65536, (17, 24, 4), dtype=np.uint16).astype(">u2")
    rows = lambda a: [r.tobytes() for r in np.ascontiguousarray(a)]
    raw_png(folder / "grey-16bit.png", 24, 17, 16, 0, rows(wide[..., :1]))
    raw_png(folder / "grey-alpha-16bit.png", 24, 17, 16, 4, rows(wide[..., :2]))
    raw_png(folder / "rgb-16bit.png", 24, 17, 16, 2, rows(wide[..., :3]))
    raw_png(folder / "alpha-16bit.png", 24, 17, 16, 6, rows(wide))
    packed = rng.integers(0, 256, (17, 12), dtype=np.uint8)
    raw_png(folder / "grey-2bit.png", 24, 17, 2, 0, rows(packed[:, :6]))
    raw_png(folder / "grey-4bit.png", 24, 17, 4, 0, rows(packed))
    raw_png(folder / "rgb-transparent.png", 24, 17, 8, 2, rows(small), [(b"tRNS", struct.pack(">HHH", 1, 2, 3))])
    quadrants = np.zeros((48, 64, 3), np.uint8)
    quadrants[:24, :32] = (220, 30, 30)
    quadrants[:24, 32:] = (30, 200, 30)
    quadrants[24:, :32] = (40, 40, 210)
    quadrants[24:, 32:] = (240, 240, 90)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(quadrants).save(folder / f"exif-{orientation}.jpg", quality=90, exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(10, 14)).save(folder / "exif-6.png", exif=exif)
    Image.fromarray(quadrants).convert("L").save(folder / "grey.jpg", quality=90)
    Image.fromarray(quadrants).convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    Image.fromarray(quadrants).save(folder / "progressive.jpg", quality=90, progressive=True)


def make_other_formats(folder):
    """Further kinds of files, and further places where it says how a picture is to be turned. With numbers of their own."""
    random = np.random.default_rng(7)
    small = random.integers(0, 256, (17, 24, 3), dtype=np.uint8)
    image = Image.fromarray(small)
    quadrants = np.zeros((48, 64, 3), np.uint8)
    quadrants[:24, :32], quadrants[:24, 32:], quadrants[24:, :32] = (220, 30, 30), (30, 200, 30), (40, 40, 210)
    alpha = np.concatenate([small, random.integers(0, 256, (17, 24, 1), dtype=np.uint8)], -1)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "lossless.webp", lossless=True)
    Image.fromarray(alpha).save(folder / "alpha.webp", lossless=True, exact=True)
    Image.fromarray(quadrants).save(folder / "lossy.webp", quality=90)
    image.save(folder / "exif-6.webp", lossless=True, exif=turned)
    palette = image.quantize(50)
    palette.save(folder / "palette.gif")
    palette.save(folder / "transparent.gif", transparency=7)
    palette.save(folder / "animated.gif", save_all=True, append_images=[Image.fromarray(small[::-1]).quantize(50)], duration=50)
    image.save(folder / "rgb.bmp")
    palette.save(folder / "palette.bmp")
    image.save(folder / "rgb.tif")
    image.save(folder / "lzw.tif", compression="tiff_lzw")
    image.convert("L").save(folder / "grey.tif")
    image.save(folder / "exif-6.tif", exif=turned)

    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(quadrants).save(folder / "xmp-6.jpg", quality=90, xmp=xmp.encode())
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp)
    image.save(folder / "xmp-6.png", pnginfo=text)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.replace('="6"/>', ">8</tiff:Orientation>").replace("tiff:", "<tiff:"), zip=True)
    image.save(folder / "xmp-packed-8.png", pnginfo=text)
    raw = b"Exif\0\0" + turned.tobytes().removeprefix(b"Exif\0\0")
    lines = "\n".join(raw.hex()[i : i + 72] for i in range(0, 2 * len(raw), 72))
    for zipped in (False, True):
        text = PngImagePlugin.PngInfo()
        text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{lines}\n", zip=zipped)
        image.save(folder / f"raw-profile-{'z' if zipped else 't'}-6.png", pnginfo=text)
    # Behind the pixels.
    image.save(folder / "late-6.png")
    whole = (folder / "late-6.png").read_bytes()
    body = b"eXIf" + turned.tobytes().removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (folder / "late-6.png").write_bytes(whole[:-12] + late + whole[-12:])
    # Orientation as a number of 32 bits, as one of 8, and twice.
    for name, kind, count, value in [("long", 4, 1, 6), ("byte", 1, 1, 6), ("two", 3, 2, 6)]:
        entry = struct.pack("<HHII", 0x0112, kind, count, value)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
        Image.fromarray(quadrants).save(folder / f"exif-{name}.jpg", quality=90, exif=exif)


TEMPLATES = {
    # The constructs of Qwen2-VL's and Qwen2.5-VL's templates: a default system turn, counters in namespaces, variables that
    # nobody sets, content that is a string or parts.
    "chatml": """{% set pictures = namespace(count=0) %}
{% for turn in messages %}
    {% if loop.first and turn['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
    {% endif %}
<|im_start|>{{ turn['role'] }}
    {% if turn['content'] is string %}
{{ turn['content'] }}
    {%- else %}
        {%- for item in turn['content'] %}
            {%- if item['type'] == 'image' or 'image' in item or 'image_url' in item %}
                {%- set pictures.count = pictures.count + 1 %}
                {%- if number_images %}Picture {{ pictures.count }}: {% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}
                {{- item['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    # Those of LLaVA-OneVision's: filters over parts, a marked answer, white space that differs from the prompt's.
    "filters": "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + ' ' }}"
               "{% for item in turn['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
               "{% for item in turn['content'] | selectattr('type', 'equalto', 'text') %}"
               "{% if turn.role == 'assistant' %}{% generation %}{{ '\\n' ~ item.text }}{% endgeneration %}"
               "{% else %}{{ '\\n' ~ item.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # Everything else a template may use, in one.
    "constructs": """{{- bos_token }}
{%- if tools is not none and tools %}never{% endif %}
{% macro turn(role) -%}
<{{ role | upper }}>
{%- endmacro %}
{% set ns = namespace(n=0, seen=[]) %}
{# a comment #}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% set ns.n = ns.n + 100 %}
        {% continue %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
    {%- if ns.n > 104 %}{% break %}{% endif %}
{{ turn(message.role) }} {{ ns.n }}{{ loop.index0 }}{{ missing }}
    {% for part in message['content'] if part.type == 'text' %}
        {%- generation -%}
        {{- part.text.strip().split(' ')[0] }}|{{ part['text'][::-1] }}|{{ part.text.startswith('a') }}
        {%- endgeneration %}
    {% endfor %}
{{ message | tojson }}
{{ message.content | map(attribute='type') | join(',') }}{{ message.get('name', 'nameless') }}
{% endfor %}
{{ {'b': [1, 2.5, none, true], 'a': '<é & "x">'} | tojson(sort_keys=true) }}
{{ {'b': 1, 'c': {}} | tojson(indent=2) }}
{{ eos_token if add_generation_prompt else '' }}
""",
}


def text(t):
    return {"type": "text", "text": t}


IMAGE = {"type": "image"}
CHATS = [
    [{"role": "user", "content": [IMAGE, text("Describe.")]}, {"role": "assistant", "content": [text("A cat.")]}],
    [{"role": "user", "content": [text("Hello,  world \n")]}],
    [{"role": "system", "content": [text("Be brief.")]}, {"role": "user", "content": [text("one"), IMAGE, text("two"), IMAGE]},
     {"role": "assistant", "content": [text("a <b> 'q' é\n")]}, {"role": "user", "content": [text("and?")]},
     {"role": "assistant", "content": [text("no 42")]}],
]


def templates():
    out = []
    for name, template in TEMPLATES.items():
        for chat in CHATS:
            for prompt in (False, True):
                rendered, _ = render_jinja_template(conversations=[chat], chat_template=template, add_generation_prompt=prompt,
                                                    bos_token="<|begin|>", eos_token="<|im_end|>")
                out.append({"template": name, "messages": chat, "prompt": prompt, "text": rendered[0]})
    # One string is one text part for Qwen's template: the crate always passes parts.
    for chat in CHATS[1:2]:
        plain = [{"role": m["role"], "content": m["content"][0]["text"]} for m in chat]
        a = render_jinja_template(conversations=[plain], chat_template=TEMPLATES["chatml"])[0]
        b = render_jinja_template(conversations=[chat], chat_template=TEMPLATES["chatml"])[0]
        assert a == b
    return out


def sequences(processor, model):
    rows = [json.loads(l) for l in open(DATA / "vqa/calib.jsonl")][:4] + [json.loads(l) for l in open(DATA / "vqa/eval.jsonl")][:3]
    chats = [(r["id"], "vqa", r["messages"]) for r in rows]
    img = lambda name: {"type": "image", "image": f"images/{name}.png"}
    chats += [
        ("two-images", "golden", [{"role": "user", "content": [img("noise-42x70"), text("compare with"), img("noise-20x300"), text("what is it?")]},
                                  {"role": "assistant", "content": [text("a red ring.")]}]),
        ("multi-turn", "golden", [{"role": "system", "content": [text("answer in one word.")]},
                                  {"role": "user", "content": [img("noise-150x90"), text("how many?")]}, {"role": "assistant", "content": [text("2")]},
                                  {"role": "user", "content": [text("and now?"), img("noise-56x56")]}, {"role": "assistant", "content": [text("it isn't  three \u00e9\n")]}]),
        ("text-only", "golden", [{"role": "user", "content": [text("what color is the sky?\n\n")]}, {"role": "assistant", "content": [text(" blue")]}]),
        ("no-answer", "golden", [{"role": "user", "content": [img("noise-29x31"), text("read the digits.")]}]),
    ]
    out = []
    for name, where, messages in chats:
        base = DATA / "vqa" if where == "vqa" else ROOT
        row = {"id": name, "where": where, "messages": messages}
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        for key, part, prompt in (("full", messages, False), ("prompt", question, True)):
            images = [load_image(str(base / p["image"])) for m in part for p in m["content"] if p["type"] == "image"]
            rendered = processor.apply_chat_template(part, add_generation_prompt=prompt)
            enc = processor(text=[rendered], images=images or None, return_tensors="pt")
            if images:
                positions, _ = model.model.get_rope_index(enc["input_ids"], enc["mm_token_type_ids"], enc["image_grid_thw"])
                positions = positions[:, 0].tolist()
            else:
                positions = [list(range(enc["input_ids"].shape[1]))] * 3
            row[key] = {"tokens": enc["input_ids"][0].tolist(), "positions": positions,
                        "grids": enc["image_grid_thw"][:, 1:].tolist() if images else []}
        answer = messages[-1]["content"][0]["text"] if messages[-1]["role"] == "assistant" else None
        row["answer_text"] = answer
        out.append(row)
    return out


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    for sub in ("images", "decoded", "resized"):
        (ROOT / sub).mkdir(parents=True)
    make_images(ROOT / "images")
    make_other_formats(ROOT / "images")
    processor = Qwen2VLProcessor.from_pretrained(MODEL)
    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL)
    # Between processors of different size limits: tiny-qwen2-vl's own.
    ip = processor.image_processor
    images = []
    for path in sorted((ROOT / "images").iterdir()):
        image = load_image(str(path))
        row = {"file": path.name, "exact": path.suffix != ".jpg" and path.name != "lossy.webp"}
        if not path.name.startswith(("noise", "smooth")):
            pixels = np.asarray(image)
            if path.name == "grey-16bit.png":
                # Pillow clips 16-bit grey at 255, which leaves a white sheet; the high byte, as it does for 16-bit colour, is meant.
                assert np.median(pixels) == 255
                pixels = np.repeat((np.asarray(Image.open(path)) >> 8).astype(np.uint8)[..., None], 3, -1)
            Image.fromarray(pixels).save(ROOT / "decoded" / (path.name + ".png"), optimize=True)
            row["decoded"] = True
            images.append(row)
            continue
        h, w = smart_resize(image.height, image.width, 28, ip.size["shortest_edge"], ip.size["longest_edge"])
        tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        resized = ip.resize(tensor, size=ip.size, resample=ip.resample, factor=28)[0].permute(1, 2, 0).numpy()
        assert resized.shape[:2] == (h, w)
        Image.fromarray(resized).save(ROOT / "resized" / path.name, optimize=True)
        enc = ip(images=[image], return_tensors="pt")
        values = enc["pixel_values"].numpy().astype("<f4")
        row["grid"] = enc["image_grid_thw"][0, 1:].tolist()
        row["columns"] = values.shape[1]
        row["resized"] = True
        flat = values.ravel()
        picks = rng.integers(0, flat.size, 64)
        row["picks"] = [[int(i), float(flat[i])] for i in picks]
        if path.name in ("noise-56x56.png", "noise-42x70.png", "noise-29x31.png"):
            values.tofile(ROOT / (path.stem + ".f32"))
            row["values"] = path.stem + ".f32"
        images.append(row)
    sizes = [(480, 640), (427, 640), (1024, 899), (333, 500), (42, 70), (20, 300), (2160, 3840), (6000, 6000), (1, 200), (200, 1), (14, 14),
             (70, 14), (98, 98), (28, 28), (3136, 1), (5, 997)]
    resize = []
    for lo, hi in ((3136, 12845056), (3136, 200704), (256 * 28 * 28, 1280 * 28 * 28)):
        for h, w in sizes:
            try:
                resize.append({"in": [h, w], "min": lo, "max": hi, "out": list(smart_resize(h, w, 28, lo, hi))})
            except ValueError:
                resize.append({"in": [h, w], "min": lo, "max": hi, "out": None})
    cases = {"images": images, "smart_resize": resize, "template_sources": TEMPLATES, "templates": templates(), "sequences": sequences(processor, model)}
    (ROOT / "cases.json").write_text(json.dumps(cases, ensure_ascii=False, separators=(",", ":")))


main()
