#!/usr/bin/env bash
# What a first GPU is asked, in about five minutes, from the root of the repository:
#
#     bash tests/tools/gpu_check.sh
#
# PYTHON=python3 runs it; OUT is the folder for its tables; DEVICE=cpu goes as far as a CPU can;
# QUICK=1 takes tiny sizes. Every step is tried, whatever became of those before.
set -u
PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu_check.out} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-}
mkdir -p "$OUT"
FAILED=""

step() { # name, limit in seconds, command
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo
  echo "=== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.txt"
  local status=${PIPESTATUS[0]}
  echo "=== $name: status $status in $((SECONDS - start)) s"
  [ "$status" = 0 ] || FAILED="$FAILED $name"
}

check() { # name, limit
  step "$1" "$2" "$PYTHON" tests/tools/gpu_check.py "$1" --device "$DEVICE" ${QUICK:+--quick}
}

check versions 60
step tests 100 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_device.py ${QUICK:+-k clipping}
check equality 150
check benchmark 150
check training 200
echo
if [ -n "$FAILED" ]; then
  echo "failed:$FAILED; tables in $OUT"
  exit 1
fi
echo "all in $SECONDS s; tables in $OUT"
