#!/usr/bin/env bash
# Makes a virtual environment with the pinned packages and this project, editable: make_venv.sh VENV [PYTHON]
#
# Does nothing when VENV is complete and current; rebuilds one that is half-made (its stamp is written last), of another
# Python, moved, or older than the pins. PIP_ARGS are handed to every pip install, for example a CPU-only torch with
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:?usage: requirements/make_venv.sh VENV [PYTHON]}
wanted=${2:-}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

say() { echo "make_venv: $*" >&2; }
fail() { say "error: $*"; exit 1; }
runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, '"$2"'))' >/dev/null 2>&1; }

find_python() {
    if [ -n "$wanted" ]; then
        runs "$wanted" 9 || fail "PYTHON=$wanted does not run, or is older than Python 3.9"
        echo "$wanted"
        return
    fi
    local candidate
    for candidate in python3.11 python3; do
        if runs "$candidate" 11; then echo "$candidate"; return; fi
    done
    fail "found neither python3.11 nor a python3 of 3.11 or later; install one, or name it: make PYTHON=/path/to/python3.11"
}

# The virtual environment module, the headers and the compiler that fairseq's source build needs.
ensure_system() {
    local missing=()
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing+=("python$version-venv")
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=("python$version-dev")
    command -v "${CXX:-g++}" >/dev/null 2>&1 || missing+=(build-essential)
    [ ${#missing[@]} -gt 0 ] || return 0

    local root=""
    command -v apt-get >/dev/null 2>&1 || fail "missing: ${missing[*]} (names of the Debian packages); install them and try again"
    if [ "$(id -u)" -ne 0 ]; then
        root="sudo "
        sudo -n true >/dev/null 2>&1 || fail "missing system packages. Run this line, then try again:
sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
    fi
    say "installing system packages: ${missing[*]}"
    ${root}env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    ${root}env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

stamp=$venv/.complete
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
pins_of() { case $1 in 3.9) echo requirements/py39.txt ;; 3.10) echo requirements/py310.txt ;; *) echo requirements/py311.txt ;; esac; }
hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }
packages_key() { echo "$(hash_of "$(pins_of "$1")") $1 $venv"; }
project_key() { hash_of setup.py pyproject.toml; }

is_complete() {
    [ -f "$stamp" ] && runs "$venv/bin/python" 9 || return 1
    local has
    has=$(version_of "$venv/bin/python")
    [ "$(sed -n 1p "$stamp")" = "$(packages_key "$has")" ] || return 1
    [ -z "$wanted" ] || { runs "$wanted" 9 && [ "$(version_of "$wanted")" = "$has" ]; }
}

install_project() {
    "$venv/bin/python" -m pip install -q --no-deps --no-build-isolation -e . >&2
    printf '%s\n%s\n' "$(packages_key "$(version_of "$venv/bin/python")")" "$(project_key)" > "$stamp.new"
    mv "$stamp.new" "$stamp"
}

# Two makes at once must not both build the same environment
exec 9< requirements/make_venv.sh
command -v flock > /dev/null 2>&1 && flock 9

if is_complete; then
    if [ "$(sed -n 2p "$stamp")" != "$(project_key)" ]; then
        say "setup.py or pyproject.toml changed: installing the project again"
        install_project
    fi
    exit 0
fi

python=$(find_python)
version=$(version_of "$python")
pins=$(pins_of "$version")
# Never delete a folder that is not an environment
[ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
    fail "$venv exists and is not a virtual environment: move it away, or set VENV"
started=$SECONDS
ensure_system
if [ -e "$venv" ]; then
    say "$venv is incomplete or out of date: making it again"
    rm -rf "$venv"
fi
say "making $venv with $python ($version) from $pins; this takes 5 to 10 minutes"
# An environment from its first moment on, so that one killed here is rebuilt too
mkdir -p "$venv" && : > "$venv/pyvenv.cfg"
"$python" -m venv "$venv"
read -ra extra <<< "${PIP_ARGS:-}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip_install() { "$venv/bin/python" -m pip install -q "${extra[@]}" "$@" >&2; }
say "1/4 pip"
pip_install "$(grep '^pip==' "$pins")"
say "2/4 torch and the build tools"
# editdistance here, in isolation, because it has no wheel for the newest Pythons and a build backend of its own
pip_install -c "$pins" torch numpy cython setuptools wheel editdistance
say "3/4 fairseq (built from source, 1 to 4 minutes) and the rest"
if grep -q '^fairseq==0.12.2$' "$pins"; then
    # fairseq 0.12.2's archive lacks the sources of what it would build where it sees torch; an isolated build sees none.
    # The variable, unlike -c, pins the isolated build tools too.
    PIP_CONSTRAINT=$pins pip_install -r "$pins"
else
    pip_install --no-build-isolation -r "$pins"
fi
say "4/4 this project"
install_project
say "done in $((SECONDS - started)) s"
