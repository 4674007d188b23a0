#!/usr/bin/env bash
# Gets a Chromium for the tests of the page: the one that is there, or Debian's. Never fails: without one those tests are
# skipped, and say so.
set -u

found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

found >/dev/null && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing Chromium from the distribution's packages, for the tests of the page."
  apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi
found >/dev/null && exit 0
cat >&2 <<'END'
********************************************************************************
*  There is no Chromium, so the tests of the page in a real browser WILL NOT RUN.
*  Install one, e.g. as root: apt-get install chromium
********************************************************************************
END
exit 0
