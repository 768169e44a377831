#!/usr/bin/env bash
# Sets up .venv with the test extras and runs the whole suite.     usage: ./launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev,voices
cd "$root"
exec "$root/.venv/bin/python" -m pytest -n 2 "$@" # two at a time: much of a test of several ranks is waiting
