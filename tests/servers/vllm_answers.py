"""Greedy answers of vLLM on this CPU, one engine after another in one process.

    python tests/servers/vllm_answers.py JOBS.json ANSWERS.json [--stand-in]

JOBS: a list of {name, folder, dtype, quantization or null, data, images, count, tokens}. ANSWERS: name -> {answers: [text]}, or {error: text}. Without
--stand-in (see stand_in.py) it is vLLM as it is, whose CPU build has kernels for 4 bits alone.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def question(row, images):
    """The turns before the answer, as vLLM's chat takes them."""
    messages = []
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            break
        content = turn["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": f"file://{images}/{part['image']}"}} if part["type"] == "image" else part
                for part in content
            ]
        messages.append({"role": turn["role"], "content": content})
    return messages


def answers(job):
    from vllm import LLM, SamplingParams

    options = {"quantization": job["quantization"]} if job["quantization"] else {}
    llm = LLM(
        model=job["folder"], dtype=job["dtype"], max_model_len=1024, enforce_eager=True, max_num_seqs=16, seed=0,
        limit_mm_per_prompt={"image": 1, "video": 0}, allowed_local_media_path=job["images"], disable_log_stats=True, **options,
    )
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()[: job["count"]]]
    asked = [question(row, job["images"]) for row in rows]
    found = llm.chat(asked, SamplingParams(temperature=0, max_tokens=job["tokens"]), use_tqdm=False)
    return [one.outputs[0].text for one in found]


def main():
    jobs, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if "--stand-in" in sys.argv:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        import stand_in

        stand_in.install()
    from vllm.distributed import cleanup_dist_env_and_memory

    done = {}
    for job in jobs:
        try:
            done[job["name"]] = {"answers": answers(job)}
        except BaseException as error:  # An engine may end by SystemExit.
            done[job["name"]] = {"error": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-3000:]}
        print(job["name"], str(done[job["name"]])[:160], flush=True)
        target.write_text(json.dumps(done))
        gc.collect()
        cleanup_dist_env_and_memory()


main()
