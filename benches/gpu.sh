#!/usr/bin/env bash
# All that has to run on a GPU, on a machine that has CUDA 13, PyTorch and perhaps Nsight Compute, but no Rust and no network.
#
#   benches/gpu.sh pack            here, with Rust and a CUDA toolkit: builds everything into .gpu/, which git ignores
#   benches/gpu.sh a DIR           there, in a copy of this tree with .gpu/: is it right, and how fast? within 300 s
#   benches/gpu.sh b DIR [FILE]    there: proofs, and a whole 7B model, within 440 s; FILE: the probe.jsonl, or that as .xz, that
#                                  times are compared with (default: the newest below benches/results)
#   benches/gpu.sh pack-table      here: the table of methods alone, as .gpu/methods_table, which has the kernels in it
#   benches/gpu.sh table BED ...   there: the same table as by cargo (benches/methods_table), of a test bed that was made elsewhere
#   benches/gpu.sh rehearse DIR    here, without a GPU: both parts in small, on emulated kernels and the CPU, and what the script
#                                  promises of sections that fail, hang and crash
#
# A part is a row of sections. Each has a time limit of its own, a log, and a line in DIR/summary.md as soon as it ends; none
# stops the next; those that would start too late are skipped. DIR then holds no more than 8 files of no more than 16 MiB.
# GPU_SECONDS sets another limit of a part, GPU_ONLY='unpack|racecheck' the sections to run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tree and the bundle travel together.
readonly LIMIT=$((60 << 20))
readonly TABLE=.gpu/methods_table
readonly BUNDLE=${GPU_BUNDLE:-.gpu/bundle.tar.xz}
readonly MODEL=tests/data/tiny-qwen2-vl CALIB=tests/data/vqa/calib.jsonl QUESTIONS=tests/data/vqa/eval.jsonl

fail() {
  echo "error: $*" >&2
  exit 1
}

# ---- here ----

# Programs and libraries, stripped, with nothing that git tracks among them.
pack() {
  local folder executable executables
  folder=$(mktemp -d)
  trap "rm -rf '$folder'" EXIT
  built() {
    cargo "$@" --locked --message-format=json-render-diagnostics |
      python3 -c 'import json, sys; [print(m["executable"]) for m in map(json.loads, sys.stdin) if m.get("executable")]'
  }
  # One by one: a failure inside a list would not end the script.
  executables=$(built build --release --bin vlmq-run --example wide_checkpoint)
  executables+=$'\n'$(built test --release --no-run --test gpu)
  executables+=$'\n'$(built bench --no-run --bench kernels)
  for executable in $executables; do
    strip -o "$folder/$(basename "$executable" | sed 's/-[0-9a-f]\{16\}$//')" "$executable"
  done
  cp "$1" "$folder/libvlmq_kernels.so"
  # Where the tests look for their data, and the program.
  pwd > "$folder/root"
  mkdir -p "$(dirname "$BUNDLE")"
  tar -C "$folder" -cf - . | xz -T0 "$2" > "$BUNDLE"
  fits
}

# Refuses what is too large to travel: all files that git does not ignore, and the bundle.
fits() {
  local tree bundle
  tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s -- 2> /dev/null | awk '{ sum += $1 } END { print sum }')
  bundle=$(stat -c %s "$BUNDLE")
  echo "$BUNDLE: $((bundle >> 10)) KiB, with $((tree >> 10)) KiB of the tree's own $(((tree + bundle) >> 10)) of $((LIMIT >> 10))"
  ((tree + bundle <= LIMIT)) || fail "tree and bundle together pass $((LIMIT >> 20)) MiB: make the tree smaller"
}

# ---- there: what a part is made of ----

# section NAME LEAST LIMIT: runs section_NAME in a process of its own for at most LIMIT seconds, or what is left of the part;
# skipped where less than LEAST seconds are left.
section() {
  local name=$1 least=$2 limit=$3 left=$((deadline - SECONDS)) started=$SECONDS code=0 verdict
  local log=$out/running-$name.txt
  [[ $name =~ ^(${GPU_ONLY:-.*})$ ]] || return 0
  if ((left < least)); then
    echo "| $name | skipped | 0 s | $left s were left, it needs $least s |" >> "$out/summary.md"
    return 0
  fi
  # The outer braces keep what bash says of a crashed child.
  { timeout --kill-after=5 $((left < limit ? left : limit)) bash benches/gpu.sh section "$name" > "$log" 2>&1 < /dev/null; } 2> /dev/null || code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict="timed out" ;;
    129 | 1[3-9][0-9]) verdict="crashed ($(kill -l $((code - 128)) 2> /dev/null || echo "$code"))" ;;
    *) verdict="failed ($code)" ;;
  esac
  # The last line that says something.
  local last
  last=$(tail -c 4096 "$log" | tr -d '\000' | tr '\r|' '\n/' | awk 'NF { line = $0 } END { print substr(line, 1, 200) }')
  echo "| $name | $verdict | $((SECONDS - started)) s | $last |" >> "$out/summary.md"
  {
    flock 9
    printf '\n===== %s: %s, %s s\n' "$name" "$verdict" $((SECONDS - started))
    # Without the places of one machine, and of lines that go on and on the beginning.
    sed "s|$out|DIR|g; s|$scratch|SCRATCH|g; s|$PWD/||g" "$log" | cut -c 1-1000
  } >> "$out/log.txt" 9> "$scratch/lock"
  rm -f "$log"
}

# part NAME SECONDS DIR
part() {
  local files file code=0
  out=$(mkdir -p "$3" && cd "$3" && pwd)
  scratch=$(mktemp -d)
  trap "rm -rf '$scratch'" EXIT
  deadline=$2
  export GPU_OUT=$out GPU_SCRATCH=$scratch
  {
    echo "# Part $1, $(date -u +%FT%TZ), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1)"
    echo
    echo "| section | verdict | time | last line |"
    echo "|---|---|---|---|"
  } > "$out/summary.md"
  "part_$1"
  wait
  # What is too large is compressed, and left out where that is not enough.
  while IFS= read -r -d '' file; do
    xz -T0 -1 "$file"
    (($(stat -c %s "$file.xz") <= 16 << 20)) || rm "$file.xz"
    echo "| ${file##*/} | too large | | compressed, or left out |" >> "$out/summary.md"
  done < <(find "$out" -type f -size +$((16 << 10))k -print0)
  files=$(find "$out" -type f | wc -l)
  ((files <= 8)) || fail "$files files in $out"
  echo >> "$out/summary.md"
  echo "All in $SECONDS s." >> "$out/summary.md"
  cat "$out/summary.md"
  ! grep -qE '^\| [a-z0-9-]+ \| (timed out|crashed|failed)' "$out/summary.md" || code=1
  return $code
}

# Is it right, and how fast?
part_a() {
  section unpack 5 60
  section environment 5 30
  section tests-blocking 10 75
  section tests 10 45
  section probe 20 100
  section ncu 20 75
  section blocks-2 40 90
  planted
  section memcheck 20 120
}

# Proofs, and a whole model.
part_b() {
  section unpack 5 60
  section tests 10 45
  section probe-again 20 80
  section blocks-28 100 280
  planted
  # Its CPU half runs beside the sanitizers, which hold the GPU.
  section draws 30 150 &
  section memcheck 15 60
  section racecheck-statistics 15 100
  section racecheck 15 100
  section synccheck 15 60
  section initcheck 15 60
  wait
  section bench 15 60
}

# Faults of every kind, in a rehearsal.
planted() {
  [[ -n ${GPU_PLANTED:-} ]] || return 0
  section planted-failure 1 20
  section planted-crash 1 20
  section planted-hang 1 2
  section planted-flood 1 20
  section planted-late 100000 100000
}

# ---- the sections ----

# By Python, which is there for the probe: tar needs an xz beside it.
section_unpack() {
  python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$BUNDLE" "$scratch"
  # Tests know data and program by the place that they were built in.
  local root
  root=$(cat "$scratch/root")
  if [[ ! -e $root ]]; then
    mkdir -p "$(dirname "$root")"
    ln -s "$PWD" "$root"
  fi
  if [[ ! -e target/release/vlmq-run ]]; then
    mkdir -p target/release
    cp "$scratch/vlmq-run" target/release/vlmq-run
  fi
  ls -l "$scratch"
  "$scratch/vlmq-run" --version
}

section_environment() {
  nvidia-smi
  nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,ECC
  uname -srm
  nproc
  grep -m 1 'model name' /proc/cpuinfo
  grep -o -m 1 -w 'sha_ni\|avx512f' /proc/cpuinfo | sort -u || true
  free -g
  df -h "$scratch" .
  for tool in nvcc ncu compute-sanitizer cuobjdump; do command -v "$tool" || echo "no $tool"; done
  echo "cuBLAS: ${VLMQ_CUBLAS:-not found}; LD_LIBRARY_PATH: ${LD_LIBRARY_PATH:-}"
  ldconfig -p | grep -E 'libcuda|libcublas' || true
  dd if=/dev/zero of="$scratch/disk" bs=16M count=64 oflag=direct 2>&1 | tail -n 1
  rm -f "$scratch/disk"
  python3 - << 'PYTHON'
import ctypes
try:
    cuda = ctypes.CDLL("libcuda.so.1")
    value, device = ctypes.c_int(), ctypes.c_int()
    assert cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
    cuda.cuDriverGetVersion(ctypes.byref(value))
    words = [f"driver API {value.value}"]
    for name, attribute in [("pageable memory access", 88), ("shared memory a block", 97), ("multiprocessors", 16), ("memory pools", 115)]:
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        words.append(f"{name} {value.value}")
    print(", ".join(words))
except (OSError, AssertionError) as error:
    print(f"no driver: {error!r}")
PYTHON
}

# The device's tests; every one runs, whatever the others find. On the emulator a few stand for all: CI runs them anyway.
device_tests() {
  local module code=0 counts="" tests=("")
  [[ -z ${GPU_REHEARSAL:-} ]] || tests=(shared_rows products_and_norms the_limit_holds)
  for module in device memory; do
    "$scratch/gpu" --include-ignored --test-threads 4 --show-output "${tests[@]/#/$module::}" 2>&1 | tee "$scratch/$module.txt" || code=1
    counts+="$module: $(grep -o '[0-9]* passed; [0-9]* failed' "$scratch/$module.txt" || echo "no result"); "
  done
  grep -h '^test .* FAILED' "$scratch"/{device,memory}.txt || true
  echo "$counts"
  return $code
}

section_tests-blocking() {
  CUDA_LAUNCH_BLOCKING=1 VLMQ_SYNC=1 device_tests
}

section_tests() {
  device_tests
}

# In small a few calls stand for all: CI runs the whole probe on the emulator beside this.
probe() {
  local some=()
  [[ -z ${GPU_REHEARSAL:-} ]] || some=(--only 'environment|correct (norm|pack|permute_columns|rotate)')
  python3 -u benches/gpu_probe.py --library "$scratch/libvlmq_kernels.so" --stall 25 "$@" "${some[@]}"
}

section_probe() {
  probe --out "$out/probe.jsonl" --deadline 90
}

section_probe-again() {
  local against=()
  [[ -z ${GPU_AGAINST:-} ]] || against=(--against "$GPU_AGAINST")
  probe --out "$out/probe.jsonl" --deadline 70 "${against[@]}"
}

# One launch each of the hot kernels, with everything that helps to tune them later where there is no GPU.
section_ncu() {
  local report=$out/kernels.ncu-rep
  ncu --set full --import-source yes --clock-control none --profile-from-start off -f -o "${report%.ncu-rep}" \
    python3 -u benches/gpu_probe.py --library "$scratch/libvlmq_kernels.so" --profile all
  # The report opens in Nsight Compute alone, this anywhere.
  ncu --import "$report" --page details --csv > "$out/kernels.csv"
  ls -l "$report"
}

# model BLOCKS SAMPLES [OPTION...]: a checkpoint of a 7B model's width with random weights, made unless it is there, quantized, the
# GPU's memory watched. Its report and what was watched are kept where the options are the program's own.
model() {
  local blocks=$1 samples=$2 wide=$scratch/wide-$1 kept=$out sizes=(--hidden 3584 --intermediate 18944 --heads 28 --kv-heads 4) pixels=(470 520)
  if [[ -n ${GPU_REHEARSAL:-} ]]; then
    sizes=(--hidden 128 --intermediate 256 --heads 8 --kv-heads 2)
    blocks=2 samples=2 pixels=(4 9)
  fi
  (($# == 2)) || kept=$scratch
  [[ -d $wide ]] || "$scratch/wide_checkpoint" "$wide" "${sizes[@]}" --blocks "$blocks" --small $MODEL
  cat $CALIB $QUESTIONS > "$scratch/samples.txt"
  head -n "$samples" "$scratch/samples.txt" > "$scratch/samples.jsonl"
  nvidia-smi --query-gpu=timestamp,memory.used,utilization.gpu,clocks.sm,power.draw --format=csv,nounits -lms 200 > "$kept/gpu.csv" &
  local watch=$! code=0
  # The small images, enlarged to 470 tokens or a few more.
  "$scratch/vlmq-run" quantize "$wide" --calib "$scratch/samples.jsonl" --image-root "$(dirname $CALIB)" --samples "$samples" \
    --min-pixels $((pixels[0] * 28 * 28)) --max-pixels $((pixels[1] * 28 * 28)) --max-gpu-memory 24GiB \
    --device cuda --log-level info --out "$wide-w3" "${@:3}" || code=$?
  kill $watch 2> /dev/null || true
  ((code == 0)) || return $code
  sed "s|$scratch|SCRATCH|g" "$wide-w3/report.json" > "$kept/report.json"
  rm -rf "$wide-w3"
  python3 - "$kept/report.json" "$kept/gpu.csv" << 'PYTHON'
import csv, json, sys
report = json.load(open(sys.argv[1]))
counts = report["calibration"]
used = [float(row[1]) for row in csv.reader(open(sys.argv[2])) if len(row) == 5 and row[1].strip().replace(".", "").isdigit()]
for stage in report["stages"]:
    print(f"{stage['stage']}: {stage['seconds']:.2f} s")
print(f"errors of layers: {[round(layer['relative_error'], 4) for layer in report['layers']][:7]}")
print(
    f"{counts['used']} samples, {counts['vision_tokens'] + counts['text_tokens']} tokens: {report['seconds']:.1f} s; GPU memory: "
    f"{(report['peak_device_bytes'] or 0) / 2**20:.0f} MiB counted, {max(used, default=0):.0f} MiB in use at most"
)
PYTHON
}

# Without the search for the least loss first, for what it takes.
section_blocks-2() {
  model 2 128 --grid minmax
  echo "above with --grid minmax, below with the search:"
  model 2 128
  rm -rf "$scratch/wide-2"
}

section_blocks-28() {
  model 28 512
  rm -rf "$scratch/wide-28"
}

# The small checkpoint from its images on: what the GPU writes is as good as what the CPU writes. Two draws are a look, no proof.
section_draws() {
  local seed device seeds=(1 2) samples=64 questions=200 model=$MODEL
  [[ -z ${GPU_REHEARSAL:-} ]] || seeds=(1) samples=2 questions=4 model=$MODEL-narrow
  for seed in "${seeds[@]}"; do
    for device in cuda cpu; do
      "$scratch/vlmq-run" quantize $model --calib $CALIB --samples $samples --seed "$seed" --device $device --quiet \
        --out "$scratch/$device-$seed" > /dev/null
      "$scratch/vlmq-run" eval "$scratch/$device-$seed" $QUESTIONS --limit $questions --reference $model --device cpu --quiet \
        --json "$scratch/$device-$seed.json" > /dev/null
    done
  done
  python3 - "$scratch" "${seeds[@]}" << 'PYTHON'
import json, sys
for device in "cuda", "cpu":
    for seed in sys.argv[2:]:
        scores = json.load(open(f"{sys.argv[1]}/{device}-{seed}.json"))
        print(f"{device}, draw {seed}: accuracy {scores['score']:.4f}, KL {scores['kl']:.3g}", end="; ")
print()
PYTHON
}

# sanitize TOOL NAME [FILTER...]: the device's tests, which launch every kernel, whose names begin with NAME, or those that FILTER leaves of
# them. Never wide layers, which take a sanitizer minutes, nor the test that keeps a GPU busy for a while, which racecheck makes minutes of.
sanitize() {
  local tool=$1 tests=("device::$2" --skip missing --skip layers_get_the_same_codes --skip sources_may_change "${@:3}")
  if [[ -n ${GPU_LAUNCHES:-} ]]; then
    export VLMQ_EMULATOR_LOG=$GPU_LAUNCHES
  elif [[ -n ${GPU_REHEARSAL:-} ]]; then
    tests=(device::products_and_norms)
  fi
  compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$scratch/gpu" --test-threads 1 "${tests[@]}"
}

section_memcheck() {
  sanitize memcheck ""
}

# By themselves, the small ones first: behind all the others their kernels were out of time.
section_racecheck-statistics() {
  sanitize racecheck statistics
}

section_racecheck() {
  sanitize racecheck "" --skip statistics
}

section_synccheck() {
  sanitize synccheck ""
}

# It does not see what cuBLAS writes.
section_initcheck() {
  sanitize initcheck "" --skip products_agree
}

section_bench() {
  # What names no line is an error.
  if [[ -n ${GPU_REHEARSAL:-} ]] && "$scratch/kernels" "no line" > /dev/null 2>&1; then
    echo "a filter that names no line passes"
    return 1
  fi
  "$scratch/kernels"
}

section_planted-failure() {
  echo "as planned"
  return 3
}

section_planted-crash() {
  kill -SEGV $$
}

section_planted-hang() {
  echo "hanging"
  sleep 1000
}

section_planted-flood() {
  head -c 20M /dev/urandom > "$out/flood"
}

# ---- rehearsal ----

# Programs of the names that a GPU machine has, which run what they are given and leave what theirs would leave.
stand_ins() {
  mkdir -p "$1"
  cat > "$1/nvidia-smi" << 'SH'
#!/bin/sh
case "$*" in
  *-lms*) echo "timestamp, memory.used [MiB], utilization.gpu [%], clocks.current.sm [MHz], power.draw [W]"
    while :; do echo "now, 1, 0, 0, 0"; sleep 0.2; done ;;
  *) echo "no GPU: a rehearsal" ;;
esac
SH
  cat > "$1/compute-sanitizer" << 'SH'
#!/bin/sh
while :; do
  case $1 in
    --tool | --error-exitcode | --print-limit) shift 2 ;;
    *) break ;;
  esac
done
exec "$@"
SH
  cat > "$1/ncu" << 'SH'
#!/bin/sh
while :; do
  case $1 in
    --import) echo "no report: a rehearsal"; exit ;;
    -o) report=$2; shift 2 ;;
    --set | --import-source | --clock-control | --profile-from-start) shift 2 ;;
    -f) shift ;;
    *) break ;;
  esac
done
"$@" && echo rehearsal > "$report.ncu-rep"
SH
  chmod +x "$1"/*
}

# Both parts, in small and with planted faults, and what the script promises of them.
rehearse() {
  local results folder part
  results=$(mkdir -p "$1" && cd "$1" && pwd)
  folder=$(mktemp -d)
  trap "rm -rf '$folder'" EXIT
  stand_ins "$folder/tools"
  export GPU_REHEARSAL=1 GPU_PLANTED=1 GPU_BUNDLE=$folder/bundle.tar.xz PATH=$folder/tools:$PATH
  unset VLMQ_TEST_GPU
  # The test program builds the emulated kernels.
  local built
  built=$(cargo test --locked --release --no-run --test gpu --message-format=json-render-diagnostics |
    python3 -c 'import json, sys; print(*[m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable") and m["target"]["kind"] == ["test"]])')
  "$built" --quiet device::devices_do_not_share > /dev/null
  VLMQ_EMULATED_KERNELS=$(realpath "$(find "${CARGO_TARGET_DIR:-target}" -path '*/emulator/plain/libvlmq_kernels.so')")
  export VLMQ_EMULATED_KERNELS
  bash benches/gpu.sh pack-rehearsal
  for part in a b; do
    # Part a runs the whole of a sanitizer's tests, and notes what they launch.
    [[ $part == a ]] && export GPU_LAUNCHES=$folder/launches || unset GPU_LAUNCHES
    # It says that sections failed, as three were made to.
    ! bash benches/gpu.sh $part "$results/$part" > "$folder/said" || fail "part $part did not say that sections failed"
    cmp "$folder/said" "$results/$part/summary.md" || fail "part $part printed something else than its summary"
    python3 - "$results/$part" $part << 'PYTHON'
import pathlib, re, sys
folder, part = pathlib.Path(sys.argv[1]), sys.argv[2]
summary = (folder / "summary.md").read_text()
rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary.splitlines() if line.startswith("| ")][1:]
rows = {row[0]: row[1:] for row in rows}
planted = {"planted-failure": "failed (3)", "planted-crash": "crashed (SEGV)", "planted-hang": "timed out", "planted-flood": "ok",
           "planted-late": "skipped"}
expected = {"a": "unpack environment tests-blocking tests probe ncu blocks-2 memcheck",
            "b": "unpack tests probe-again blocks-28 draws memcheck racecheck-statistics racecheck synccheck initcheck bench"}[part].split()
wrong = [f"{name}: {rows.get(name)}" for name in expected if rows.get(name, [""])[0] != "ok"]
wrong += [f"{name}: {rows.get(name)}, not {verdict}" for name, verdict in planted.items() if rows.get(name, [""])[0] != verdict]
wrong += [f"{name}: not expected" for name in rows if name not in (*expected, *planted, "flood")]
wrong += [f"{name} says nothing" for name in expected if not rows.get(name, ["", "", ""])[2]]
log = (folder / "log.txt").read_text(errors="replace")
wrong += [f"{name} is not in the log" for name in expected if f"===== {name}: ok" not in log]
files = [path for path in folder.rglob("*") if path.is_file()]
wrong += [f"{len(files)} files"] * (len(files) > 8)
wrong += [f"{path.name} is too large" for path in files if path.stat().st_size > 16 << 20]
wrong += ["the flood was not noticed"] * ("| flood | too large |" not in summary)
print(summary)
sys.exit("\n".join(wrong) or 0)
PYTHON
  done
  python3 - "$folder/launches" << 'PYTHON'
import pathlib, re, sys
launched = [line.split(" ", 2)[1:] for line in open(sys.argv[1]).read().splitlines()]
source = "".join(path.read_text() for path in pathlib.Path("kernels").rglob("*.cu*") if "emulator" not in path.parts)
calls = set(re.findall(r"VLMQ_CALL\((vlmq_\w+)", source))
# Without parentheses and template arguments, as each family of a template is written once.
name = lambda kernel: re.match(r"\W*(\w+)", kernel)[1]
kernels = {name(kernel) for kernel in re.findall(r"VLMQ_LAUNCH\(\s*([^,]+)", source)} - {"kernel"}
assert len(calls) > 20 and len(kernels) > 20, (calls, kernels)
missing = sorted(calls - {call for call, _ in launched}) + sorted(kernels - {name(kernel) for _, kernel in launched})
sys.exit("the sanitizers' tests never launch " + ", ".join(missing) if missing else 0)
PYTHON
  echo "rehearsed: every section ran, and those that failed, crashed and hung left the others whole"
}

# ---- what is asked for ----

# cuBLAS as PyTorch's wheels and toolkits have it, in front of nothing that is there already, and never a stub.
find_cublas() {
  local folder
  [[ -z ${VLMQ_CUBLAS:-} ]] || return 0
  while IFS= read -r folder; do
    if [[ -e $folder/libcublas.so.13 && $folder != *stubs* ]]; then
      export VLMQ_CUBLAS=$folder/libcublas.so.13 LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
      return 0
    fi
  done < <(
    python3 -c 'import glob, os, nvidia
for top in nvidia.__path__: print(*glob.glob(os.path.join(top, "*", "lib")), sep="\n")' 2> /dev/null || true
    printf '%s\n' "${CUDA_HOME:-/usr/local/cuda}"/{lib64,lib,targets/x86_64-linux/lib} /usr/local/cuda/{lib64,targets/x86_64-linux/lib}
  )
}

case ${1:-} in
  pack)
    export VLMQ_CUDA=require VLMQ_ARCHS=${VLMQ_ARCHS:-90a}
    target=${CARGO_TARGET_DIR:-target}
    cargo build --locked --release --lib
    pack "$target/release/vlmq/libvlmq_kernels.so" -9e
    ;;
  pack-table)
    export VLMQ_CUDA=require VLMQ_ARCHS=${VLMQ_ARCHS:-90a}
    cargo build --locked --release --example methods_table
    mkdir -p "$(dirname "$TABLE")"
    strip -o "$TABLE" "${CARGO_TARGET_DIR:-target}/release/examples/methods_table"
    echo "$TABLE: $(($(stat -c %s "$TABLE") >> 10)) KiB"
    ;;
  table)
    [[ $# -ge 2 ]] || fail "usage: benches/gpu.sh table BED [OPTION ...]"
    [[ -x $TABLE ]] || fail "$TABLE is missing: benches/gpu.sh pack-table makes it where Rust and a CUDA toolkit are"
    find_cublas
    exec "$TABLE" testbed --device cuda "${@:2}"
    ;;
  pack-rehearsal)
    pack "$VLMQ_EMULATED_KERNELS" -9
    ;;
  rehearse)
    [[ $# -eq 2 ]] || fail "usage: benches/gpu.sh rehearse DIR"
    rehearse "$2"
    ;;
  section)
    out=$GPU_OUT scratch=$GPU_SCRATCH
    "section_$2"
    ;;
  a | b)
    [[ $# -ge 2 ]] || fail "usage: benches/gpu.sh $1 DIR"
    [[ -f $BUNDLE ]] || fail "$BUNDLE is missing: benches/gpu.sh pack makes it where Rust and a CUDA toolkit are"
    find_cublas
    [[ -n ${GPU_REHEARSAL:-} ]] || export VLMQ_TEST_GPU=0
    # Their folders begin with the date.
    GPU_AGAINST=${3:-$(find benches -path 'benches/results/*/a/probe.jsonl*' | sort | tail -n 1)}
    export GPU_AGAINST
    part "$1" "${GPU_SECONDS:-$([[ $1 == a ]] && echo 300 || echo 440)}" "$2"
    ;;
  *)
    fail "usage: benches/gpu.sh pack | a DIR | b DIR [FILE] | pack-table | table BED [OPTION ...] | rehearse DIR"
    ;;
esac
