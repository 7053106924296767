#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, GPU tests, compute-sanitizer, benchmark; a short summary last.
# A step that fails does not stop the others; the exit status is 1 if one did. About six minutes on 16 cores.
#
#     make gpu            or            [SETTING=...] benchmarks/gpu.sh [build tests sanitizer bench]
#
#   PYTHON    with torch for CUDA, numpy, pytest, hypothesis, rich; to build also setuptools, cmake, ninja, pybind11
#             (default: python3)
#   WHEELS    a folder of wheels for that Python, installed first, without network: what it lacks (highspy, say), and
#             perhaps lplb itself, built elsewhere; then nothing is built here
#   BUILD     0: take the lplb that PYTHON finds, in this tree or installed; 1: build it from this tree (default, unless
#             WHEELS holds it)
#   OUT       where logs and results go (default: build/gpu)
#   WORK      where it builds and installs (default: build/gpu-work)
#   LPLB_*    as for any build and benchmark; LPLB_CUDA_TARGETS is by default the machine code of the device at hand
#
# Where there is no network:  WHEELS=wheels benchmarks/gpu.sh
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$ROOT/build/gpu}
WORK=${WORK:-$ROOT/build/gpu-work}
STEPS=${*:-build tests sanitizer bench}
mkdir -p "$OUT" "$WORK" || exit 1
rm -f "$OUT"/{environment,build,tests-builtin,tests-cusolverdx,sanitizer,bench}.log "$OUT/summary.txt"
OUT=$(cd "$OUT" && pwd)
WORK=$(cd "$WORK" && pwd)
SITE=$WORK/site
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LPLB_CUDA=${LPLB_CUDA:-1}
begin=$SECONDS
summary=()
status=0

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

# Notes how a step ended: name, its status, since when it ran, the last word about it.
note() {
  local result=ok
  case $2 in
    0) ;;
    124 | 137) result="TIMED OUT" ;;
    *) result="FAILED ($2)" ;;
  esac
  [[ $2 == 0 ]] || status=1
  summary+=("$(printf '%-28s %-12s %4d s  %s' "$1" "$result" $((SECONDS - $3)) "${4:-}")")
}

# Without bytes that are not text, and none of it where there is nothing.
last_line() { grep -aE "$1" "$2" 2>/dev/null | tail -n 1; }

# The environment
{
  date -u
  nvidia-smi
  nvcc --version
  "$PYTHON" --version
} >"$OUT/environment.log" 2>&1
if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "no GPU: nvidia-smi finds none; see $OUT/environment.log" >&2
  exit 2
fi
echo "$(nvidia-smi -L | head -n 1); logs in $OUT"

# Build
: >"$OUT/build.log"
if wanted build; then
  since=$SECONDS
  failed=0
  shopt -s nullglob
  wheels=("${WHEELS:-/nonexistent}"/*.whl)
  of_lplb=("${WHEELS:-/nonexistent}"/lplb-*.whl)
  shopt -u nullglob
  offline=(--quiet --disable-pip-version-check --no-index --no-deps --no-cache-dir --no-compile --upgrade --target "$SITE")
  if ((${#wheels[@]})); then
    "$PYTHON" -m pip install "${offline[@]}" "${wheels[@]}" >>"$OUT/build.log" 2>&1 || failed=$?
  fi
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
  if [[ ${BUILD:-1} != 0 && ${#of_lplb[@]} == 0 ]]; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
    export LPLB_CUDA_TARGETS=${LPLB_CUDA_TARGETS:-$capability}
    timeout 240 "$PYTHON" -m pip install "${offline[@]}" --no-build-isolation "$ROOT" >>"$OUT/build.log" 2>&1 || failed=$?
  fi
  note build "$failed" "$since" "$(cd "$WORK" && "$PYTHON" -c '
from lplb import _C; print(" ".join(_C.cuda_targets), "+".join(_C.linalgs), _C.mathdx_version)' 2>&1 | tail -n 1)"
else
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
fi
# BUILD=0: an lplb beside its sources is found last
[[ ${BUILD:-1} != 0 ]] || export PYTHONPATH=$PYTHONPATH:$ROOT
missing=$(cd "$WORK" && "$PYTHON" -c '
from importlib.util import find_spec
print(*(m for m in "torch numpy pytest hypothesis highspy rich lplb".split() if find_spec(m) is None))' 2>&1)
if [[ -n $missing ]]; then
  note "Python packages" 1 "$SECONDS" "missing: $missing (as wheels in WHEELS)"
fi
(cd "$WORK" && "$PYTHON" -c 'from lplb.cli import main; main(["env"])') >>"$OUT/environment.log" 2>&1
linalgs=$(cd "$WORK" && "$PYTHON" -c 'from lplb import _C; print(*_C.linalgs)' 2>/dev/null)

# The sanitizer's tools run beside each other and beside the tests; nothing is timed meanwhile.
sanitizers=()
if wanted sanitizer; then
  for tool in memcheck racecheck initcheck synccheck; do
    (
      cd "$WORK" || exit 1
      compute-sanitizer --version >/dev/null 2>&1 || PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH
      timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 86 \
        "$PYTHON" "$ROOT/tests/test_sanitizer_gpu.py" 200 >"$WORK/$tool.log" 2>&1
    ) &
    sanitizers+=("$tool:$!:$SECONDS")
  done
fi
floor=
if wanted bench && [[ -z ${LPLB_GPU_FLOOR:-} ]]; then
  (cd "$WORK" && timeout 200 "$PYTHON" "$ROOT/benchmarks/bench_cuda.py" --compile-floor "$WORK/floor" >"$WORK/floor.log" 2>&1) &
  floor=$!
fi

# Tests: from another folder, for python -m pytest would look for lplb where it starts
if wanted tests; then
  mapfile -t files < <(grep -lE 'mark\.gpu' "$ROOT"/tests/test_*.py | grep -v test_sanitizer_gpu)
  for linalg in ${linalgs:-builtin}; do
    since=$SECONDS
    (
      cd "$WORK" || exit 1
      LPLB_LINALG=$linalg LPLB_HYPOTHESIS_EXAMPLES=${LPLB_HYPOTHESIS_EXAMPLES:-20} timeout 150 "$PYTHON" -m pytest \
        -c "$ROOT/pyproject.toml" --rootdir "$ROOT" -p no:cacheprovider -q -m gpu --durations=5 "${files[@]}"
    ) >"$OUT/tests-$linalg.log" 2>&1
    failed=$?
    grep -qE '[0-9]+ passed' "$OUT/tests-$linalg.log" || failed="$failed, nothing passed"
    note "tests, $linalg" "$failed" "$since" "$(last_line '[0-9]+ (passed|failed|skipped|error)|no tests ran' "$OUT/tests-$linalg.log")"
  done
fi

if ((${#sanitizers[@]})); then
  : >"$OUT/sanitizer.log"
  for entry in "${sanitizers[@]}"; do
    IFS=: read -r tool pid since <<<"$entry"
    wait "$pid"
    failed=$?
    { echo "==== $tool"; cat "$WORK/$tool.log"; } >>"$OUT/sanitizer.log"
    note "compute-sanitizer $tool" "$failed" "$since" "$(last_line 'SUMMARY|Error|error|stopped' "$WORK/$tool.log" | cut -c 1-90)"
  done
fi

# The benchmark, alone on the device
if wanted bench; then
  since=$SECONDS
  if [[ -n $floor ]]; then
    wait "$floor" || note "gpu_floor.cu" 1 "$since" "$(tail -n 1 "$WORK/floor.log" | cut -c 1-90)"
    export LPLB_GPU_FLOOR=$WORK/floor
  fi
  results=${LPLB_RESULTS:-$ROOT/benchmarks/results}
  touch "$WORK/before"
  (cd "$WORK" && LPLB_RESULTS=$results timeout 200 "$PYTHON" "$ROOT/benchmarks/bench_cuda.py" --write) >"$OUT/bench.log" 2>&1
  note benchmark $? "$since" "$(last_line 'written to|Error' "$OUT/bench.log" | cut -c 1-90)"
  find "$results" -maxdepth 1 -name '*.json' -newer "$WORK/before" -exec cp {} "$OUT/" \;
fi

# The summary: bars, then steps
{
  if wanted bench; then
    "$PYTHON" - "$OUT" <<'PY'
import json
import pathlib
import sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    for row in json.loads(path.read_text())["rows"]:
        if row["bar_us"] is not None:
            met = "met " if row["median_us"] <= row["bar_us"] else "MISSED"
            print(f"{met:6} {row['median_us']:9.2f} us, bar {row['bar_us']:6.1f}: {row['name']}  {row['note']}")
PY
  fi
  printf '%s\n' "${summary[@]}"
  echo "all: $((SECONDS - begin)) s, $([[ $status == 0 ]] && echo ok || echo 'something FAILED')"
} | tee "$OUT/summary.txt"
exit "$status"
