#!/bin/sh
# Makes the bundles of this folder again from npm, at the versions of package.json and package-lock.json.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/package.json" "$here/package-lock.json" "$work/"
cd "$work"
npm ci --no-audit --no-fund --ignore-scripts
cp node_modules/htmx.org/dist/htmx.min.js "$here/htmx.js"
cp node_modules/htmx.org/LICENSE "$here/htmx.LICENSE"
