#!/usr/bin/env bash
# Builds shoal-edge and shoal-cloud with the first of docker, podman, buildah that is there.
#   deploy/build-images.sh [edge|cloud ...]
# BASE=<image> takes another base (it needs python3 >= 3.11 with venv); BUILD_FLAGS adds flags for the builder.
set -euo pipefail
cd "$(dirname "$0")/.."

builder=""
for candidate in docker podman buildah; do
  command -v "$candidate" >/dev/null || continue
  # A docker client without an engine answers --version and then fails; ask for the engine.
  [ "$candidate" = docker ] && ! docker info >/dev/null 2>&1 && continue
  builder=$candidate
  break
done
if [ -z "$builder" ]; then
  echo "error: no image builder found" >&2
  echo "hint: install docker, podman or buildah, then run 'make images' again" >&2
  exit 2
fi

verb=build
[ "$builder" = buildah ] && verb=bud
[ $# -gt 0 ] || set -- edge cloud
for image in "$@"; do
  [ -f "Dockerfile.$image" ] || { echo "error: there is no Dockerfile.$image" >&2; exit 2; }
  echo "building shoal-$image with $builder"
  # shellcheck disable=SC2086  # BUILD_FLAGS is a list
  "$builder" $verb ${BUILD_FLAGS:-} ${BASE:+--build-arg "BASE=$BASE"} --file "Dockerfile.$image" --tag "shoal-$image:latest" .
done
