#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: first a comparison with the
# float64 oracle on fresh random inputs and the kernels' tests, then both benchmarks. Results go to
# the folder given, all of them together to its gpu.json with the card's name; a short table last.
#
#   benchmarks/run_gpu.sh FOLDER [options of bench_losses.py]     (PYTHON=... chooses the Python)
set -u
if [ $# -lt 1 ]; then
    echo "usage: benchmarks/run_gpu.sh FOLDER [options of bench_losses.py]" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export GHM_DEVICE=${GHM_DEVICE:-cuda}

failed=0
step() { # NAME LIMIT_S COMMAND...: runs it, keeps its output, continues after a failure
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log"; then
        echo "$name: done in $((SECONDS - start)) s" >>"$out/summary.txt"
    else
        echo "$name: FAILED (exit $?) after $((SECONDS - start)) s, see $name.txt and $name.log" >>"$out/summary.txt"
        failed=1
    fi
    tail -n 1 "$out/summary.txt"
}

: >"$out/summary.txt"
step oracle 60 "$python" benchmarks/check_oracle.py --device "$GHM_DEVICE" --output "$out/oracle.json"
# Each form of a kernel is compiled when it is first met: the rarer ones are left to the whole suite.
step tests 150 "$python" -m pytest -q tests/losses/test_triton.py \
    -k "levels or walk or bad_values or device_operations or factor or second or (deltas and None) or (differ and weights)"
step bench_losses 165 "$python" benchmarks/bench_losses.py --device "$GHM_DEVICE" --budget-s 0.5 \
    --output "$out/bench_losses.json" "$@"
step bench_train_step 150 "$python" benchmarks/bench_train_step.py --device "$GHM_DEVICE" \
    ${GHM_TRAIN_OPTIONS:-} --output "$out/bench_train_step.json"

# One file to keep; the result of a step that wrote none is null.
"$python" - "$out" "$GHM_DEVICE" >"$out/gpu.log" 2>&1 <<'PY' || failed=1
import json
import sys
from pathlib import Path

import torch

from ghm_d2.provenance import describe

folder, device = Path(sys.argv[1]), torch.device(sys.argv[2])
result = describe(device) | {"steps": (folder / "summary.txt").read_text().splitlines()}
for name in ("oracle", "bench_losses", "bench_train_step"):
    file = folder / f"{name}.json"
    result[name] = json.loads(file.read_text()) if file.is_file() else None
(folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
PY

echo
tail -n 3 "$out/tests.txt"
cat "$out/oracle.txt" "$out/bench_losses.txt" "$out/bench_train_step.txt" "$out/summary.txt"
exit $failed
