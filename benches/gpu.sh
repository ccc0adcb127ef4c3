#!/usr/bin/env bash
# All that has to run on a GPU, on a machine that has the CUDA runtime but no Rust.
#
#   benches/gpu.sh pack             here, with a CUDA toolkit: builds everything, leaves target/vlmq-gpu.tar.gz
#   vlmq-gpu/gpu.sh [RESULTS.md]    there, in the unpacked folder: tests, sanitizer, end to end, every benchmark
#
# PyTorch with CUDA, where python3 has it, is measured beside. Under 8 minutes on one GPU; the first failure ends it.
set -euo pipefail

pack() {
  cd "$(dirname "$0")/.."
  local folder=target/vlmq-gpu executable
  rm -rf "$folder"
  mkdir -p "$folder/tests/data"
  export VLMQ_CUDA=require
  built() {
    cargo "$@" --message-format=json-render-diagnostics |
      python3 -c 'import json, sys; [print(m["executable"]) for m in map(json.loads, sys.stdin) if m.get("executable")]'
  }
  # One by one: a failure inside a list would not end the script.
  local tests benches programs
  tests=$(built test --release --no-run --test device_cuda --test memory_cuda)
  benches=$(built bench --no-run --bench kernels)
  programs=$(built build --release --bin vlmq-run --example wide_checkpoint)
  for executable in $tests $benches $programs; do
    strip -o "$folder/$(basename "$executable" | sed 's/-[0-9a-f]\{16\}$//')" "$executable"
  done
  cp -r benches/gpu.sh benches/gpu_probe.py benches/probe "$folder"
  cp -r tests/data/tiny-qwen2-vl tests/data/tiny-qwen2-vl-narrow tests/data/vqa "$folder/tests/data"
  tar -C target -czf target/vlmq-gpu.tar.gz vlmq-gpu
  du -h target/vlmq-gpu.tar.gz
}

run() {
  cd "$(dirname "$0")"
  local results=${1:-RESULTS.md} model=tests/data/tiny-qwen2-vl calib=tests/data/vqa/calib.jsonl questions=tests/data/vqa/eval.jsonl
  local work
  work=$(mktemp -d)
  trap "rm -rf '$work'" EXIT
  export VLMQ_TEST_GPU=0
  exec > >(tee "$results") 2>&1
  echo "# $(date -u +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"

  echo; echo "## Operations against the CPU"; echo '```'
  ./device_cuda --skip missing
  ./memory_cuda parked limit
  echo '```'
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
      echo; echo "## compute-sanitizer, $tool"; echo '```'
      compute-sanitizer --tool $tool --error-exitcode 1 ./device_cuda agree --test-threads 1 | tail -3
      echo '```'
    done
  else
    echo; echo "compute-sanitizer is not installed: not run."
  fi

  echo; echo "## The small checkpoint, from the images on: eight draws of 64 samples"; echo '```'
  for seed in 1 2 3 4 5 6 7 8; do
    for device in cpu cuda; do
      ./vlmq-run quantize $model --calib $calib --samples 64 --seed $seed --device $device --quiet --out "$work/$device-$seed" > /dev/null
      ./vlmq-run eval "$work/$device-$seed" $questions --limit 200 --reference $model --device cpu --quiet \
        --json "$work/$device-$seed.json" > /dev/null
    done
  done
  python3 - "$work" << 'PYTHON'
import json, statistics, sys
def of(device, key):
    return [json.load(open(f"{sys.argv[1]}/{device}-{seed}.json"))[key] for seed in range(1, 9)]
cpu, cuda = of("cpu", "kl"), of("cuda", "kl")
mean = statistics.mean
print(f"accuracy: {mean(of('cpu', 'score')):.4f} quantized on the CPU, {mean(of('cuda', 'score')):.4f} on the GPU")
apart = (mean(cuda) - mean(cpu)) / mean(cpu)
# One draw is chance (tests/pipeline_cuda.rs): the mean's own error says how much these show.
error = statistics.stdev(b - a for a, b in zip(cpu, cuda)) / 8**0.5 / mean(cpu)
print(f"KL from float: {mean(cpu):.3g} and {mean(cuda):.3g}, {100 * apart:+.1f} % with a standard error of {100 * error:.1f} %")
assert abs(apart) < 0.1 + 2 * error, "KL is more than 10 % apart"
PYTHON
  echo '```'

  if python3 -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null; then
    python3 gpu_probe.py --reference "$work/reference.json" > /dev/null
    export VLMQ_BENCH_REFERENCE=$work/reference.json
  else
    echo; echo "PyTorch with CUDA is not installed: nothing is measured beside."
  fi
  echo; echo "## Operations"
  ./kernels

  echo; echo "## A 7B model, 512 samples of about 512 tokens"; echo '```'
  ./wide_checkpoint "$work/wide" --hidden 3584 --intermediate 18944 --heads 28 --kv-heads 4 --blocks 28 --small $model
  cat $calib $questions | head -512 > "$work/long.jsonl"
  # The small images, enlarged to 470 tokens or a few more.
  ./vlmq-run quantize "$work/wide" --calib "$work/long.jsonl" --image-root "$(dirname $calib)" --samples 512 \
    --min-pixels $((470 * 28 * 28)) --max-pixels $((520 * 28 * 28)) --device cuda --quiet --out "$work/wide-w3"
  python3 - "$work/wide-w3/report.json" << 'PYTHON'
import json, sys
report = json.load(open(sys.argv[1]))
counts = report["calibration"]
print(f"{counts['used']} samples, {counts['vision_tokens'] + counts['text_tokens']} tokens: {report['seconds']:.1f} s")
print(", ".join(f"{stage['stage']} {stage['seconds']:.1f} s" for stage in report["stages"]))
PYTHON
  echo '```'
}

if [[ ${1:-} == pack ]]; then pack; else run "$@"; fi
