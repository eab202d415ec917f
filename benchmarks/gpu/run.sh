#!/usr/bin/env bash
# Everything of Endex that needs an NVIDIA card: tests/gpu, then the benchmarks that a card changes.
#
#   benchmarks/gpu/run.sh --out DIR [--quick] [--python PYTHON] [--tests-only]
#
# DIR gets environment.json, tests.txt, tests.xml and one JSON file a benchmark, as benchmarks/results holds them.
# --python is the interpreter of an environment with torch, Endex's requirements, the extras dev and demo, and a FAISS
# that has GPU code (docs/gpu.md says which); by default .venv/bin/python, else python3.
# Exit code: 0 if all passed, 1 if a test or a benchmark failed, 2 if nothing could be run.
set -uo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
fail() { echo "run.sh: $1" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="" out="" quick=() tests_only=""
while [ $# -gt 0 ]; do
  case $1 in
    --out | --python)
      [ $# -ge 2 ] || fail "$1 needs a value"
      if [ "$1" = --out ]; then out=$2; else python=$2; fi
      shift 2 ;;
    --quick) quick=(--quick); shift ;;
    --tests-only) tests_only=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1; see --help" ;;
  esac
done
[ -n "$out" ] || fail "--out DIR is missing; see --help"
if [ -z "$python" ]; then
  python=python3
  [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
command -v "$python" > /dev/null || fail "there is no interpreter $python"
mkdir -p "$out" || fail "cannot make $out"
out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

"$python" - env --json > "$out/environment.json" << 'PY' || fail "endex env failed"
import sys

from launch.main import main

sys.exit(main(sys.argv[1:]))
PY
"$python" -m json.tool "$out/environment.json"
"$python" - << 'PY' || fail "FAISS sees no card: see docs/gpu.md for the wheel that fits this machine"
import sys

from index._faiss import load_faiss
from index.gpu_rules import has_gpu_code

faiss = load_faiss()
sys.exit(not (has_gpu_code(faiss) and faiss.get_num_gpus()))
PY

status=0
"$python" -m pytest tests/gpu -m gpu -ra --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.txt" || status=1
[ -n "$tests_only" ] && exit "$status"
measure() { # NAME OPTION... : the result file is NAME.json, of the benchmark before the dash
  local name=$1
  shift
  echo "== benchmarks/${name%%-*}.py $*"
  "$python" "benchmarks/${name%%-*}.py" --json "$out/$name.json" "$@" "${quick[@]}" || status=1
}
measure throughput
measure throughput-bert --bert base
measure large_batch
measure indexing_time
measure demo --out "$out/demo"
exit "$status"
