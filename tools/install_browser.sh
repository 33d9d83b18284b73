#!/usr/bin/env bash
# The browser that the tests of the demo page and of the report drive: installs Debian's Chromium where none is
# found and this is root; otherwise says what to install. Safe to run twice.
set -euo pipefail
for name in "${CHROMIUM:-chromium}" chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" > /dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo 'Installing Chromium for the browser tests ...'
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null && exit 0
fi
echo 'The browser tests need Chromium or Chrome. Install it (on Debian, as root: apt-get install chromium), or set' >&2
echo 'CHROMIUM to its executable.' >&2
exit 1
