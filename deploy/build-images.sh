#!/usr/bin/env bash
# Builds shoal-edge and shoal-cloud with the first of docker, podman, buildah that is there.
#   deploy/build-images.sh [edge|cloud ...]
# BUILDER=<name> chooses the builder; BASE=<image> another base (Debian with Python >= 3.11 and venv); BUILD_FLAGS
# are further flags of the builder's build command; VERSION tags the images beside `latest`.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

works() {
  command -v "$1" >/dev/null || return 1
  # A docker client without an engine answers --version and then fails: ask for the engine.
  [ "$1" != docker ] || docker version --format '{{.Server.Version}}' >/dev/null 2>&1
}

builder=${BUILDER:-}
if [ -z "$builder" ]; then
  for candidate in docker podman buildah; do
    if works "$candidate"; then
      builder=$candidate
      break
    fi
  done
  [ -n "$builder" ] || fail "no image builder found" "install docker, podman or buildah, then run 'make images' again"
fi
case $builder in
  docker | podman | buildah) ;;
  *) fail "BUILDER=$builder is not known" "docker, podman or buildah" ;;
esac
works "$builder" || fail "$builder is not installed, or has no engine" "leave BUILDER away, or install it"

# The health checks are a part of Docker's image format, not of OCI's, which podman and buildah write by default.
format=()
[ "$builder" = docker ] || format=(--format docker)

[ $# -gt 0 ] || set -- edge cloud
for image in "$@"; do
  [ -f "Dockerfile.$image" ] || fail "there is no Dockerfile.$image" "the images are edge and cloud"
done
for image in "$@"; do
  echo "building shoal-$image with $builder" >&2
  # shellcheck disable=SC2086  # BUILD_FLAGS is a list
  "$builder" build "${format[@]}" ${BUILD_FLAGS:-} ${BASE:+--build-arg "BASE=$BASE"} \
    --file "Dockerfile.$image" --tag "shoal-$image:latest" ${VERSION:+--tag "shoal-$image:$VERSION"} .
done
