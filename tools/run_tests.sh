#!/usr/bin/env bash
# Install everything the tests need into .venv and run them all. Arguments go to pytest,
# e.g. -k resume, or -m "not slow".
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup_venv.sh '.[test]'
# where it cannot, it says what to install, and only the tests that need it fail
bash tools/install_browser.sh || true
exec "$VENV_PYTHON" -m pytest "$@"
