#!/bin/sh
# Builds the Dockerfile and takes the plugin's rootfs out of the image.
#
#   docker-rootfs.sh BASE CONFIG OUT
#
# Neither BuildKit nor a registry is needed, if BASE is an image of this engine.
set -eu

[ $# = 3 ] || { echo "usage: docker-rootfs.sh BASE CONFIG OUT" >&2; exit 2; }
base=$1 config=$2 out=$3
image=sluice-rootfs:build

docker build --build-arg "BASE=$base" -t "$image" .
container=$(docker create "$image")
trap 'docker rm -f "$container" >/dev/null' EXIT
trap 'exit 130' INT TERM

fs=$out/rootfs.new
rm -rf "$fs"
mkdir -p "$fs"
# Two steps and not a pipe: a pipe would hide that the export failed.
docker export -o "$out/rootfs.tar" "$container"
tar -C "$fs" -xf "$out/rootfs.tar"
rm -f "$out/rootfs.tar"

# What the engine adds to a container of its own accord.
rm -rf "$fs/.dockerenv" "$fs/dev" "$fs/etc/hostname" "$fs/etc/mtab"
mkdir -p "$fs/dev"
cp "$config" "$out/config.json"
rm -rf "$out/rootfs"
mv "$fs" "$out/rootfs"
echo "$out: $(($(du -sk "$out/rootfs" | cut -f1) / 1024)) MiB, with $(grep '^iptables ' "$out/rootfs/usr/share/doc/packages") of $base"
