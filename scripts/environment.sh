# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts. `prepare` makes .venv what uv.lock says, and asks of the machine
# only python3 (3.9 or later) or uv. A second call has nothing to do and takes a second.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

runs() {
    "$@" >/dev/null 2>&1
}

# Print a uv that works, after installing it under .bootstrap if there is none.
find_uv() {
    local candidate
    for candidate in uv "$HOME/.local/bin/uv" .bootstrap/bin/uv; do
        if runs "$candidate" --version; then
            command -v "$candidate"
            return
        fi
    done
    echo "Installing uv into .bootstrap" >&2
    runs python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        fail "the set-up needs uv, or python3 3.9 or later to install it with"
    rm -rf .bootstrap
    if ! { runs python3 -m venv .bootstrap && .bootstrap/bin/python -m pip install -q uv; } >&2; then
        # Some distributions ship python3 without venv, but with pip.
        rm -rf .bootstrap
        python3 -m pip install -q --target .bootstrap uv >&2 ||
            fail "neither \`python3 -m venv\` nor \`python3 -m pip\` works here: install uv"
    fi
    echo '*' >.bootstrap/.gitignore
    runs .bootstrap/bin/uv --version || fail "uv was installed into .bootstrap, but does not run"
    echo .bootstrap/bin/uv
}

# Print a CPython 3.12 that is here already and runs, or "3.12" for uv to download one.
find_python() {
    local candidate
    for candidate in \
        "$("$1" python find --no-project --no-python-downloads 3.12 2>/dev/null)" \
        python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
        if [ -n "$candidate" ] &&
            runs "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 12)'; then
            command -v "$candidate"
            return
        fi
    done
    echo 3.12
}

# prepare [--group NAME]: sync .venv. Packages of a group synced earlier stay.
prepare() {
    local uv extra
    uv=$(find_uv)
    uv=$(cd "$(dirname "$uv")" && pwd)/uv
    export PATH="${uv%/*}:$PATH" # the tests install the built wheel with it
    extra=$(sed -n 's/^default = "\(vllm-.*\)"$/\1/p' pyproject.toml)
    [ -n "$extra" ] || fail "pyproject.toml names no default vLLM release under [tool.vllm-sm12x]"
    set -- --locked --inexact --extra "$extra" "$@"
    local version=""
    [ -x .venv/bin/python ] && version=$(.venv/bin/python -V 2>/dev/null || true)
    case $version in
    "Python 3.12."*) uv sync --quiet "$@" ;;
    *) uv sync --python "$(find_python "$uv")" "$@" ;;
    esac
}
