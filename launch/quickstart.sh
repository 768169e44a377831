#!/usr/bin/env bash
# One command from a fresh clone to a talking video: sets up .venv, then makes the preview.
# usage: ./launch/quickstart.sh [image=me.jpg audio=me.wav output=me.mp4 ...]     without arguments: a bundled portrait and speech
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up voices
exec "$root/.venv/bin/torchrun" --standalone "$root/launch/infer.py" +preset=fast_preview "$@"
