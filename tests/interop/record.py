"""What an output says of itself, by other means than vlmq's: checksums, errors of weights, and a model card whose programs run.

check.py calls this for every output.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import struct
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

PICTURE = Path(__file__).parent.parent / "golden/model/images/gradient-70x42.png"


class Mismatch(Exception):
    """A check that failed."""


def checksums(folder):
    """SHA256SUMS by hashlib: of every file but itself, and of the bytes of every tensor."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS"):
        data = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                start, end = (8 + length + offset for offset in tensor["data_offsets"])
                found[f"# {name}"] = hashlib.sha256(data[start:end]).hexdigest()
    listed = {}
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        if entry := re.fullmatch(r"(# )?([0-9a-f]{64})  (.+)", line):
            listed[(entry[1] or "") + entry[3]] = entry[2]
    if wrong := sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name)):
        raise Mismatch(f"SHA256SUMS is wrong about {wrong[:5]}")
    return f"{len(found)} checksums of files and tensors are those of hashlib"


def weight_errors(folder, float_folder, report, weights):
    """weight_error of every layer by PyTorch in float64, to 1e-6; `weights` are the stored ones by name, empty where plain."""
    worst = 0.0
    names = {f"{layer['name']}.weight": layer["weight_error"] for layer in report["layers"]}
    stored = weights or tensors_of(folder, names)
    floats = tensors_of(float_folder, names)
    if not names or names.keys() - stored.keys() or names.keys() - floats.keys():
        raise Mismatch("report.json and the files have other layers")
    for name, recorded in names.items():
        weight = floats[name].double()
        error = ((stored[name].double() - weight).norm() / weight.norm()).item()
        worst = max(worst, abs(recorded - error) / error)
    if not worst <= 1e-6:
        raise Mismatch(f"errors of weights differ by {worst:.1e}")
    return f"errors of weights of {len(names)} layers differ by {worst:.1e}"


def tensors_of(folder, names):
    """Those tensors of a folder that are among `names`."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys() if name in names})
    return tensors


def card(folder, report):
    """The card is one to the Hub's own library, names every loader, and its programs run as they stand there."""
    card = ModelCard.load(folder / "README.md")
    card_of = card.data.to_dict()
    base = Path(report["model"]).name
    wanted = {"base_model": base, "base_model_relation": "quantized", "library_name": "transformers"}
    if wanted.items() - {key: value for key, value in card_of.items() if isinstance(value, str)}.items():
        raise Mismatch(f"the card's metadata are {card_of}")
    sections = dict(re.findall(r"^### (.+?)\n\n```(?:python|sh)\n(.*?)\n```$", card.text, re.DOTALL | re.MULTILINE))
    commands = {loader["name"]: loader["command"].replace(str(folder), folder.name) for loader in report["loaders"]}
    if sections.keys() != commands.keys():
        raise Mismatch(f"the card names {sorted(sections)}, report.json {sorted(commands)}")
    ran = []
    for name, text in sections.items():
        if commands[name] not in text:
            raise Mismatch(f"the card's way to load with {name} is not {commands[name]}")
        if name.startswith("transformers"):
            # As the card says: beside the folder, with a picture there.
            shutil.copyfile(PICTURE, folder.parent / "picture.png")
            printed = io.StringIO()
            with contextlib.chdir(folder.parent), contextlib.redirect_stdout(printed):
                exec(text, {})
            if not printed.getvalue().strip():
                raise Mismatch(f"the card's program for {name} prints nothing")
            ran.append(name)
    return f"the card's metadata are the Hub's; its programs run: {', '.join(ran) or 'none'}"


def check(folder, float_folder, weights):
    """Runs all checks of one output; returns lines that say what was found."""
    folder = Path(folder)
    report = json.loads((folder / "report.json").read_text())
    config = json.loads((folder / "config.json").read_text())["vlmq"]
    if (config["version"], config["commit"]) != (report["vlmq_version"], report["commit"]):
        raise Mismatch("config.json and report.json name other programs")
    torch.manual_seed(0)
    return [checksums(folder), weight_errors(folder, float_folder, report, weights), card(folder, report)]
