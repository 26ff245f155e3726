#!/bin/sh
# Installs Chromium where that is possible. Where it is not, it says why, and the tests are skipped.
set -eu

for program in chromium-headless-shell chromium google-chrome; do
    if command -v "$program" >/dev/null; then
        echo "Chromium is here: $("$program" --version 2>/dev/null || echo "$program")."
        exit 0
    fi
done
if ! command -v apt-get >/dev/null; then
    echo "The tests with a browser are skipped: they need Chromium, and there is no apt-get."
elif [ "$(id -u)" -ne 0 ]; then
    echo "The tests with a browser are skipped: they need Chromium, and only root can install it."
else
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends \
        chromium-headless-shell fonts-dejavu-core >/dev/null ||
        echo "The tests with a browser are skipped: apt-get could not install Chromium, as it says above."
fi
