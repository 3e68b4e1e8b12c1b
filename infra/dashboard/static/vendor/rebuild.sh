#!/bin/sh
# Makes the bundles of this folder again from npm, at the versions of package.json and package-lock.json.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/package.json" "$here/package-lock.json" "$here/regl-scatterplot.entry.js" "$work/"
cd "$work"
npm ci --no-audit --no-fund --ignore-scripts
cp node_modules/htmx.org/dist/htmx.min.js "$here/htmx.js"
node_modules/.bin/esbuild regl-scatterplot.entry.js --bundle --format=esm --minify --target=es2022 \
  --legal-comments=none --outfile="$here/regl-scatterplot.js"
cp node_modules/htmx.org/LICENSE "$here/htmx.LICENSE"
# The package holds its own dependencies in its bundle.
for package in regl-scatterplot regl regl-line pub-sub-es camera-2d-simple dom-2d-camera earcut gl-matrix @flekschas/utils; do
  printf '== %s ==\n\n' "$package"
  cat "node_modules/$package"/LICENSE*
  printf '\n'
done > "$here/regl-scatterplot.LICENSES"
