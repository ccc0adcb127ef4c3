"""Writes fuzz/seeds: small inputs that each target accepts, or nearly, for a fuzzer to start from.

Needs nothing but Python 3. Seeds that were found, not made, go to fuzz/crashes.
"""

import json
import pathlib
import shutil
import struct

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "tests/golden"


def seed(target, name, content):
    path = HERE / "seeds" / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def archive(files):
    """Files in the form that `parts` of src/files.rs takes apart."""
    pieces = []
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        pieces.append(b"-- %s --\n%s" % (name.encode(), content))
        if not content.endswith(b"\n"):
            pieces.append(b"\n")
    # A weight file must not grow by a line break: it comes last.
    return b"".join(pieces[:-1] if pieces[-1] == b"\n" else pieces)


def safetensors(tensors, metadata=None):
    """tensors: name -> (dtype, shape, bytes)."""
    header, start, data = {}, 0, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
        start += len(content)
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats(count, kind="f"):
    return struct.pack(f"<{count}{kind}", *[(i * 37 % 64 - 32) / 64 for i in range(count)])


def words(count):
    return struct.pack(f"<{count}I", *[(i + 1) * 2654435761 % 2**32 for i in range(count)])


def make_safetensors():
    seed("safetensors", "plain", safetensors({
        "a.weight": ("F32", [2, 3], floats(6)),
        "b": ("F16", [4], floats(4, "e")),
        "c": ("BF16", [2], b"\x80\x3f\x00\x40"),
        "d": ("I64", [], struct.pack("<q", 5)),
    }, {"format": "pt"}))
    seed("safetensors", "empty-tensor", safetensors({"a": ("F32", [0, 5], b""), "b": ("U8", [3], b"abc")}))
    seed("safetensors", "no-tensors", safetensors({}))
    seed("safetensors", "hole", struct.pack("<Q", 55) + b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}  xx')
    seed("safetensors", "header-too-long", struct.pack("<Q", 99999999) + b"{}")
    one = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    seed("safetensors", "twice", struct.pack("<Q", 2 * len(one) + 3) + b"{" + one + b"," + one + b"}x")
    seed("safetensors", "nan", safetensors({"a": ("F32", [2], struct.pack("<2f", float("nan"), 1))}))
    seed("safetensors", "half-bytes", safetensors({"a": ("F4", [2], b"\x21")}))


def make_checkpoint():
    shards = {
        "model-00001-of-00002.safetensors": safetensors({"norm.weight": ("F32", [2], floats(2))}),
        "model-00002-of-00002.safetensors": safetensors({"model.b.weight": ("F16", [2, 2], floats(4, "e"))}),
    }
    index = {"metadata": {"total_size": 16}, "weight_map": {
        "norm.weight": "model-00001-of-00002.safetensors", "model.b.weight": "model-00002-of-00002.safetensors"}}
    config = {"model_type": "qwen2_vl", "hidden_size": 2}
    # Shards end with their data; the line break before the next marker would not fit, so the text files come first.
    for name, files in {
        "sharded": index,
        "outside": {"weight_map": {"norm.weight": "../model-00001-of-00002.safetensors"}},
        "absolute": {"weight_map": {"norm.weight": "/etc/passwd"}},
        "missing": {"weight_map": {"norm.weight": "none.safetensors"}},
        "numbers": {"weight_map": {"norm.weight": 7}},
        "deep": {"weight_map": {"norm.weight": [[[[[[[]]]]]]]}},
    }.items():
        text = archive({"config.json": json.dumps(config), "model.safetensors.index.json": json.dumps(files)}) + b"\n"
        for shard, content in list(shards.items())[:1 if name != "sharded" else 2]:
            # One byte of data more, so that the line break belongs to the tensors.
            text += archive({shard: padded(content)})
        seed("checkpoint", name, text)
    seed("checkpoint", "unlisted", archive({"config.json": json.dumps(config)}) + b"\n"
         + archive({"x.safetensors": shards["model-00001-of-00002.safetensors"]}))
    seed("checkpoint", "index-only", json.dumps(index))


def padded(content):
    """The same file with one tensor more, whose one byte is a line break."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    data = content[8 + length:]
    header["end"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data + b"\n"


def make_config():
    for number, folder in enumerate(["flat-tied-bf16", "qwen2_5_vl-flat-bf16", "qwen3_vl-tied-bf16", "llava-hub-tied-f16"]):
        config = json.loads((GOLDEN / "model" / folder / "config.json").read_text())
        seed("config", f"whole-{number}", json.dumps(config))
        changes = {
            "same": [],
            "vision": ["vision_config.depth=2", "vision_config.patch_size=14", "vision_config.spatial_merge_size=2"],
            "huge": ["vocab_size=2147483648", "vision_config.in_channels=2147483648", "vision_config.temporal_patch_size=2147483648"],
            "text": ["text_config.hidden_size=64", "text_config.head_dim=2", "hidden_size=32", "head_dim=1073741824"],
            "rope": ["rope_scaling.mrope_section=[2,1,1]", "rope_theta=1e-30", "text_config.rope_theta=3e38"],
            "quantized": ['quantization_config={"quant_method":"gptq","bits":4,"group_size":-1,"sym":true}'],
            "lists": ["vision_config.fullatt_block_indexes=[1,9]", "vision_config.deepstack_visual_indexes=[0,1]",
                      "image_grid_pinpoints=[[48,48],[96,48]]", "vision_config.window_size=56"],
            "act": ['hidden_act="quick_gelu"', 'vision_config.hidden_act="gelu"', "projector_hidden_act", "image_token_id=5"],
        }
        for name, lines in changes.items():
            seed("config", f"{name}-{number}", "\n".join([str(number), *lines]))


def make_data():
    pixel = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5E"
             "rkJggg==")
    user = {"role": "user", "content": [{"type": "image", "image": pixel}, {"type": "text", "text": "what?"}]}
    lines = {
        "messages": {"id": 7, "group": "g", "metric": "anls", "max_new_tokens": 5, "answers": ["a"],
                     "messages": [{"role": "system", "content": "s"}, user, {"role": "assistant", "content": "red"}]},
        "url": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///a%20b.png"}}]}]},
        "outside": {"image": "../../../etc/passwd", "question": "q", "answers": ["x"]},
        "sharegpt": {"image": ["a.png", "b/../c.png"], "conversations": [
            {"from": "human", "value": "<image>\nfirst <image> second"}, {"from": "gpt", "value": "A."}]},
        "question": {"images": [pixel], "question": "q", "answers": ["x", "y"], "metric": "vqa"},
        "text": {"text": "plain words"},
        "chart": {"image": "1.png", "question": "q", "answer": ["5"], "type": "human"},
        "choices": {"image": pixel, "question": "q", "choices": ["a", "b"], "answer": 1, "hint": "h", "lecture": ""},
        "options": {"image": "1.png", "question": "q", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4",
                    "answer": "A", "question_image_type": "chart", "data_id": "1"},
        "multi": {"image": "1.png", "question": "q", "multi-choice options": ["(A) a", "(B) b"], "answer": "A",
                  "category": "Perception/OCR", "l2-category": "x"},
        "ocr": {"image": "1.png", "question": "q", "answer": ["w"], "dataset": "HME100k", "question_type": "Key"},
        "data-uri": {"image": "data:,%89PNG", "question": "q"},
    }
    for name, line in lines.items():
        seed("data", name, json.dumps(line))
    seed("data", "list", json.dumps(list(lines.values())[:4]))
    seed("data", "lines", "\ufeff" + "\n\n".join(json.dumps(line) for line in list(lines.values())[3:6]))
    seed("data", "deep", '{"text":' + "[" * 200)


def make_image():
    folder = GOLDEN / "calibration/images"
    for name in ["grey.png", "grey-2bit.png", "palette-4bit.png", "one-bit.png", "exif-6.png", "exif-6.jpg", "grey.jpg", "cmyk.jpg",
                 "progressive.jpg", "noise-1x150.png", "grey-16bit.png", "alpha.png", "rgb-transparent.png"]:
        seed("image", name, (folder / name).read_bytes())


def make_packed():
    """One layer of 32 x 64, named `layer`."""
    scales = floats(64, "e")
    both = {}
    for bits in [2, 3, 4, 8]:
        both[f"gptq-{bits}"] = (
            {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq"},
            {
                "layer.qweight": ("I32", [64 * bits // 32, 32], words(64 * bits)),
                "layer.qzeros": ("I32", [2, bits], b"\0" * 8 * bits),
                "layer.scales": ("F16", [2, 32], scales),
                "layer.g_idx": ("I32", [64], struct.pack("<64I", *[i // 32 for i in range(64)])),
            })
        for symmetric in [False, True]:
            tensors = {
                "layer.weight_packed": ("I32", [32, -(-64 * bits // 32)], words(32 * -(-64 * bits // 32))),
                "layer.weight_scale": ("F16", [32, 2], scales),
                "layer.weight_shape": ("I64", [2], struct.pack("<2q", 32, 64)),
            }
            if not symmetric:
                tensors["layer.weight_zero_point"] = ("I32", [bits, 2], words(2 * bits))
            if bits == 4:
                tensors["layer.weight_g_idx"] = ("I32", [64], struct.pack("<64I", *[i * 7 % 64 // 32 for i in range(64)]))
            weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
            both[f"ct-{bits}-{'symmetric' if symmetric else 'asymmetric'}"] = (
                {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}, tensors)
    for name, (quantization, tensors) in both.items():
        text = archive({"config.json": json.dumps({"quantization_config": quantization})}) + b"\n"
        seed("packed", name, text + archive({"model.safetensors": safetensors(tensors)}))
    channel = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    text = archive({"config.json": json.dumps({"text_config": {"quantization_config": channel}})}) + b"\n"
    seed("packed", "float-layer", text + archive({"model.safetensors": safetensors({"layer.weight": ("BF16", [8, 40], b"\0" * 640)})}))


def make_processor():
    for number, folder in enumerate(["flat-tied-bf16", "qwen2_5_vl-flat-bf16", "qwen3_vl-tied-bf16", "llava-hub-tied-f16"]):
        files = {}
        for name in ["preprocessor_config.json", "processor_config.json"]:
            path = GOLDEN / "model" / folder / name
            if path.exists():
                files[name] = json.dumps(json.loads(path.read_text()))
        seed("processor", f"own-{number}", archive(files))
    for name, values in {
        "sizes": {"size": {"shortest_edge": 1, "longest_edge": 89478485}, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2},
        "small": {"min_pixels": 1, "max_pixels": 1},
        "large": {"min_pixels": 89478485, "max_pixels": 89478485, "patch_size": 64, "merge_size": 64},
        "numbers": {"rescale_factor": 1e-300, "image_mean": [1e38, -1e38, 0], "image_std": [1e-38, 1, 3e38]},
    }.items():
        seed("processor", name, json.dumps(values))


def make_template():
    for folder in ["flat-tied-bf16", "qwen3_vl-tied-bf16", "llava-hub-tied-f16"]:
        path = GOLDEN / "model" / folder
        if (path / "chat_template.jinja").exists():
            text = (path / "chat_template.jinja").read_text()
        else:
            text = json.loads((path / "chat_template.json").read_text())["chat_template"]
        seed("template", folder, text)
    for name, text in {
        "double": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "repeat": "{{ 'x' * 99999999999 }}{{ ['x'] * 9999999999 }}",
        "replace": "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
        "join": "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s.join([ns.s, ns.s]) %}{% endfor %}",
        "format": "{{ '%099999999d' | format(1) }}{{ '{:>999999999}'.format(1) }}{{ '%*d' % (99999999, 1) }}",
        "indent": "{{ messages | tojson(indent=99999999999) }}{{ 'a\nb' | indent(99999999) }}",
        "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "include": "{% include 'a.jinja' %}{% import 'b' as b %}{% extends '/etc/passwd' %}",
        "range": "{% for i in range(99999999999) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}",
        "filters": "{{ messages | map(attribute='role') | join(',') | upper | trim | title }}{{ [3,1]|sort|first }}"
                   "{{ messages[0]['content'] | selectattr('type', 'equalto', 'text') | list | length }}",
        "methods": "{{ 'a b'.split()[0].strip().title().startswith('A') }}{{ messages[0].items() | list }}{{ 'x'.upper().lower() }}",
        "generation": "{% for m in messages %}{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endfor %}",
        "date": "{{ strftime_now('%d %b %Y') }}{{ raise_exception('no') }}",
        "slices": "{{ messages[::-1][0].role[1:99:2] }}{{ 'abc'[-2:] }}{{ (1,2) ~ {'a': 1} }}{{ 7 // 0 }}{{ 9**99 }}{{ -9223372036854775807 - 2 }}",
        "sets": "{% set x %}{{ bos_token }}{% endset %}{% filter upper %}{{ x }}{% endfilter %}{% with y = x %}{{ y }}{% endwith %}",
        "loop": "{% for a in [1,2] recursive %}{{ loop([a]) }}{{ loop.index0 }}{{ loop.cycle(1,2) }}{% break %}{% endfor %}",
    }.items():
        seed("template", name, text)


def make_tokenizer():
    letters = list("abcdefhnostw'.?0123456789") + ["Ġ", "Ċ", "Ã", "©", "Ì", "ģ", "æ", "Ĺ", "¥", "ľ", "¬", "Ģ", "ĉ"]
    vocab = {"e": 5, "f": 6}
    for letter in letters:
        vocab.setdefault(letter, len(vocab) + 5)
    merges = [["t", "h"], ["th", "e"], ["a", "a"]]
    for first, second in merges:
        vocab.setdefault(first + second, len(vocab) + 5)
    added = [{"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, content in enumerate(["<|u|>", "<|p|>", "<|e|>", "<|i|>", "<|v|>"])]
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    base = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": bytes_, "decoder": bytes_,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [" ".join(merge) for merge in merges]},
    }

    def changed(**keys):
        return json.dumps(base | keys, ensure_ascii=False, separators=(",", ":"))

    seed("tokenizer", "plain", changed())
    seed("tokenizer", "pairs", changed(model=base["model"] | {"merges": merges}))
    seed("tokenizer", "template", changed(post_processor={
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}}))
    seed("tokenizer", "backtracking", changed(pre_tokenizer=split | {"pattern": {"Regex": r"((?=a)a*)*b(?=c)"}}))
    seed("tokenizer", "replace", changed(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}] * 8}))
    seed("tokenizer", "dropout", changed(model=base["model"] | {"dropout": 0.5}))
    seed("tokenizer", "cut", changed(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                 "pad_token": "!"}))
    seed("tokenizer", "unigram", changed(model={"type": "Unigram", "unk_id": 0, "vocab": [["<|u|>", 0.0], ["a", -1.0]],
                                                "byte_fallback": False}))
    seed("tokenizer", "words", changed(model={"type": "WordPiece", "unk_token": "<|u|>", "continuing_subword_prefix": "##",
                                              "max_input_chars_per_word": 100, "vocab": vocab}))
    seed("tokenizer", "others", changed(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "x"}]},
        pre_tokenizer={"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ",
                                                                                             "start": 1, "stop": 0}]}))
    config = {"eos_token": {"content": "<|e|>"}, "bos_token": "<|p|>",
              "chat_template": [{"name": "default", "template": "{{ messages[0].content[0].text }}<|i|>"}]}
    seed("tokenizer", "with-others", archive({
        "generation_config.json": '{"eos_token_id": [2, 9999999999]}', "tokenizer_config.json": json.dumps(config),
        "config.json": '{"text_config": {"eos_token_id": 2}}', "tokenizer.json": changed()}))
    seed("tokenizer", "with-template", archive({
        "chat_template.json": json.dumps({"chat_template": "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}<|i|>"}),
        "tokenizer.json": changed()}))


def make_resume():
    """Steps on a work folder: what is done, to which of its files, under which other name, where and how (src/work_folder.rs)."""
    flip, cut, remove, lengthen, write, rename, add, link, add_link = range(9)
    seed("resume", "untouched", b"")
    seed("resume", "every-file-flipped", bytes(value for file in range(8) for value in (flip, file, 0, 128, 0, 1)))
    seed("resume", "cut", bytes(value for file in range(8) for value in (cut, file, 0, 200, 0)))
    seed("resume", "removed", bytes([remove, 3, 0, remove, 6, 0]))
    seed("resume", "longer", bytes([lengthen, 4, 0, 100, lengthen, 1, 0, 1]))
    seed("resume", "written", bytes([write, 7, 0, 5]) + b"{\"a\"" + bytes([write, 2, 0, 2]) + b"{}")
    seed("resume", "renamed", bytes([rename, 8, 2, rename, 9, 5]))
    seed("resume", "added", bytes(value for name in range(12) for value in (add, 1, name)))
    seed("resume", "linked", bytes([link, 0, 0, link, 5, 0]))
    seed("resume", "links-added", bytes(value for name in (7, 4, 10, 11) for value in (add_link, 0, name)))


def main():
    shutil.rmtree(HERE / "seeds", ignore_errors=True)
    for make in [make_safetensors, make_checkpoint, make_config, make_data, make_image, make_packed, make_processor, make_resume,
                 make_template, make_tokenizer]:
        make()


if __name__ == "__main__":
    main()
