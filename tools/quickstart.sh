#!/usr/bin/env bash
# From a fresh clone to a one-step generator: installs into .venv, trains, measures. Arguments go to
# mmfgm/tools/quickstart.py, e.g. shapes, or --distill-iters 500.
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in
    # its network is diffusers'
    *' shapes '*) . tools/setup_venv.sh '.[sd3]' ;;
    *) . tools/setup_venv.sh '.' ;;
esac
exec "$VENV_PYTHON" -m mmfgm.tools.quickstart "$@"
