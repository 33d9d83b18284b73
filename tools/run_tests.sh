#!/usr/bin/env bash
# Install everything the tests need into .venv, check the code (tools/lint.sh), and run all tests.
# Arguments go to pytest, e.g. -k resume, or -m "not slow".
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup_venv.sh '.[dev]'
PYTHON="$VENV_PYTHON" bash tools/lint.sh
bash tools/install_mmcv_ops.sh "$VENV_PYTHON" ||
  echo "warning: without mmcv's ops the tests of GenEval's mmdet detector are skipped" >&2
bash tools/install_browser.sh || echo 'warning: the tests of the demo page and of the report fail without it' >&2
bash tools/install_fashion.sh || echo 'warning: the tests on the real Fashion-MNIST are skipped without it' >&2
# a test waits for subprocesses of one thread most of the time; files keep their fixtures together
exec "$VENV_PYTHON" -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
