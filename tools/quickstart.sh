#!/usr/bin/env bash
# From a fresh clone to a one-step generator: installs into .venv, trains, measures. Arguments go to
# mmfgm/tools/quickstart.py, e.g. --distill-iters 500.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup_venv.sh '.'
exec "$VENV_PYTHON" -m mmfgm.tools.quickstart "$@"
