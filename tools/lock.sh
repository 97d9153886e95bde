#!/bin/sh
# Resolves the dependencies of setup.py in a new environment and writes requirements.lock. Usage: tools/lock.sh [python]
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${1:-python3.11}" -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip --disable-pip-version-check"
# torch first: a range that admits a newer release would pull a CUDA build of several GB.
$pip install --quiet torch==2.13.0 setuptools wheel
$pip install --quiet --no-build-isolation '.[quickstart,dev]'
{
    echo "# Everything the CPU default needs, pinned. Written by 'make lock'; torch's local version (+cpu) is left out."
    $pip freeze --all --exclude trd_megatron --exclude pip | sed -e 's/^torch==\([0-9.]*\)+.*/torch==\1/' -e '/ @ /d'
} > requirements.lock
