#!/usr/bin/env bash
# Build the documentation into site/ (or the folder given as the only argument). It needs no network
# once the tools are installed, and a warning, such as a link that leads nowhere, is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
if ! "$python" -c 'import mkdocs, material, mkdocstrings' 2> /dev/null; then
  echo "error: $python has no mkdocs; run: pip install -e '.[dev]' -c requirements/constraints.txt" >&2
  exit 2
fi
# Material prints an advertisement for its successor, which is not about our pages
export NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs build --strict --site-dir "${1:-site}"
