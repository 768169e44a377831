#!/usr/bin/env bash
# Sets up .venv with the test extras and runs the whole suite.     usage: ./launch/test.sh [pytest arguments]
# EXTRAS=dev,voices,deepspeed,text,heic ./launch/test.sh runs what is skipped without those packages as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up "${EXTRAS:-dev,voices}"
cd "$root"
export OMP_NUM_THREADS=1 # two tests at a time of a thread each: threads that wait for each other's core take twice the time
exec "$root/.venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
