#!/usr/bin/env bash
# Brings the plotting library of the report's pages, the npm package uplot (MIT), into megarl/report/assets/uplot. Needs npm; the files are
# committed, so that nobody else does. Why this one: docs/performance.md, "The report's page".
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.6.32
sha512=2883159c6ebccefbb95d751b0b82d010f9e1c0ec41b8bc96d401eda66e882935c89a46cb824332fa369b8cb8122cc6ac36e186cd09bf7a9ded3a4c93c6989023
into=megarl/report/assets/uplot
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

npm pack --silent --pack-destination "$work" "uplot@$version" >/dev/null
echo "$sha512  $work/uplot-$version.tgz" | sha512sum --check --quiet
tar xzf "$work/uplot-$version.tgz" -C "$work"
mkdir -p "$into"
cp "$work/package/dist/uPlot.iife.min.js" "$work/package/dist/uPlot.min.css" "$work/package/LICENSE" "$into"
