#!/usr/bin/env bash
# Everything half an hour on a GPU is for, in the order of its worth: build, correctness, benchmarks, sanitizers.
#
#      bench/gpu.sh OUT [STEP...]        STEP: build test decode update gemms ffn ffn4096 stream write memcheck
#                                        racecheck; default all
#
# Each step has its own time limit and log; one that fails or runs out of time does not stop the next, except the build.
# OUT gets NAME.log, NAME.json, NAME.csv and summary.txt, which is printed last. SCALE=0.5 halves every limit.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT [STEP...]}
shift
steps=${*:-build test decode update gemms ffn ffn4096 stream write memcheck racecheck}
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/summary.txt"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} LOCAS_CUDA=1
# Without its caching allocator torch does not hide an access that is out of bounds.
sanitizer="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all"
command -v compute-sanitizer >/dev/null || PATH=$PATH:/usr/local/cuda/bin
small="python_tests/ops/test_update.py python_tests/ops/test_cuda*.py python_tests/ops/test_fused*.py -q -m cuda"
some="where_finite or updates_match or token_nll or importance or strided or (test_forward_and_backward and bfloat16 and (264 or 1000 or 1544))"

step() { # NAME SECONDS COMMAND...
  local name=$1 limit started=$SECONDS status
  limit=$("$python" -c "print(max(1, int($2 * ${SCALE:-1})))")
  shift 2
  case " $steps " in *" $name "*) ;; *) return 0 ;; esac
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  local said=ok
  [ $status -eq 124 ] && said="out of time ($limit s)"
  [ $status -ne 0 ] && [ $status -ne 124 ] && said="FAILED ($status)"
  printf '%-10s %-20s %4d s   %s\n' "$name" "$said" $((SECONDS - started)) "$(tail -n 1 "$out/$name.log" | cut -c1-120)" |
    tee -a "$out/summary.txt"
  return $status
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$out/summary.txt"
step build 400 "$python" setup.py build_ext --inplace || { tail -n 20 "$out/build.log"; exit 1; }
step test 240 "$python" -m pytest python_tests -q -m cuda
step decode 100 "$python" -m bench.ffn --device cuda --quick --tokens 1 8 16 32 64 --kernels \
  --arms "bare products" "ours, matmul" "ours, rehomed" "ours, sm90" --out "$out/decode.json"
step update 40 "$python" -m bench.update --device cuda --out "$out/update.json"
step gemms 60 "$python" -m bench.gemms --out "$out/gemms.json"
step ffn 200 "$python" -m bench.ffn --device cuda --quick --out "$out/ffn.json"
step ffn4096 120 "$python" -m bench.ffn --device cuda --quick --d 4096 --tokens 64 2048 8192 --out "$out/ffn4096.json"
step stream 120 "$python" -m bench.stream --device cuda --dtype bfloat16 --shape 0.6B --tokens 24000 --window 2048 \
  --stride 512 --out "$out/stream.json"
step write 200 "$python" -m bench.write --device cuda --dtype bfloat16 --layers 12 --tokens 512 2048 --stride 512 \
  --out "$out/write.json"
step memcheck 240 $sanitizer --tool memcheck "$python" -m pytest $small -k "$some"
step racecheck 240 $sanitizer --tool racecheck "$python" -m pytest $small -k "$some"

echo
for name in decode update ffn ffn4096 stream write; do # the last table of each log is its compact one
  [ -f "$out/$name.log" ] &&
    awk '/┏/ {table = title; inside = 1} inside {table = table "\n" $0} /└/ {inside = 0} {title = $0} END {if (table) print table}' \
      "$out/$name.log"
done
cat "$out/summary.txt"
