#!/usr/bin/env bash
# The images of configs/reflow/fashion.py: installs Debian's dataset-fashion-mnist where it is missing and this is root;
# otherwise says what to do. Safe to run twice.
set -euo pipefail
if [ -e /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ]; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo 'Installing Fashion-MNIST (30 MB) ...'
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -qq -y --no-install-recommends dataset-fashion-mnist > /dev/null && exit 0
fi
echo 'Fashion-MNIST is not installed. On Debian, as root: apt-get install dataset-fashion-mnist; elsewhere, let' >&2
echo "torchvision download it: torchvision.datasets.FashionMNIST('data/fashion', download=True)." >&2
exit 1
