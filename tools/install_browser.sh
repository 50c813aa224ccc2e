#!/usr/bin/env bash
# Installs the browser of `make test-browser` where it is missing: Chromium and its driver, as Debian packages them.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "chromium and chromedriver are missing, and only root on Debian can have them installed here: please install" \
        "them, or run the other tests alone (make test)" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
packages=(chromium chromium-driver)
if ! { apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"; } >/dev/null; then
    echo "chromium and chromium-driver could not be installed, so the page is not tested: is Debian's archive within" \
        "reach?" >&2
    exit 1
fi
chromium --version
chromedriver --version
