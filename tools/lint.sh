#!/usr/bin/env bash
# Every check that needs no run: style, spelling, types, and the documentation without a warning.
# All of them run even where one finds something; then the exit status is 1. The tools are those of
# `pip install -e ".[dev]" -c requirements/constraints.txt`, in .venv or in the environment of PYTHON.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-.venv/bin/python}"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
status=0
check() {
  local output
  if output="$("${@:2}" 2>&1)"; then
    echo "$1: no findings"
  else
    printf '%s\n' "$output" "$1: FAILED, by: ${*:2}" >&2
    status=1
  fi
}
check 'style' "$PYTHON" -m ruff check .
check 'format' "$PYTHON" -m ruff format --check .
check 'spelling' "$PYTHON" -m codespell_lib
check 'types' "$PYTHON" -m mypy
check 'docs' bash tools/build_docs.sh "$site"
exit $status
