# Sourced by other scripts from the repository's root: makes .venv if there is none and installs $1
# (e.g. '.[test]') into it with the tested versions. Sets VENV_PYTHON. Set PYTHON to choose the
# interpreter, which must be 3.10 to 3.12.
if [ -n "${VIRTUAL_ENV:-}" ]; then unset VIRTUAL_ENV; fi
VENV_PYTHON="$PWD/.venv/bin/python"
if ! "$VENV_PYTHON" -m pip --version > /dev/null 2>&1; then
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      found="$candidate"
      break
    fi
  done
  if [ -z "${found:-}" ]; then
    echo 'error: no Python 3.10 to 3.12 found; install one, or name it: PYTHON=/path/to/python3.11 bash ...' >&2
    exit 2
  fi
  rm -rf .venv
  "$found" -m venv .venv || {
    echo "error: $found cannot make virtual environments; on Debian: apt install python3-venv" >&2
    rm -rf .venv
    exit 2
  }
fi
# reinstall only when what is to be installed has changed
stamp=".venv/installed-$(echo "$1" | tr -c 'a-z0-9\n' _)-$(cat setup.cfg setup.py requirements/constraints.txt | cksum | cut -d ' ' -f 1)"
if [ ! -e "$stamp" ] || [ ! -e mmfgm/.mim/configs ]; then
  echo "Installing mmfgm and what it needs into .venv (several GB with torch; a few minutes) ..."
  "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24' 'setuptools>=80,<82' wheel
  "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable "$1"
  # mmcv brings the desktop build of OpenCV, which lacks its libraries on a server
  "$VENV_PYTHON" -c 'import cv2' 2> /dev/null || "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
    --constraint requirements/constraints.txt --force-reinstall --no-deps opencv-python-headless
  touch "$stamp"
fi
