#!/bin/sh
# Puts together what `docker plugin create` takes: OUT/config.json and OUT/rootfs.
#
#   rootfs.sh BINARY CONFIG OUT
#
# BINARY is the static plugin. Beside it the rootfs has iptables, in both
# flavours, because rules that are to stand among the engine's have to be made
# with the flavour the engine uses. It is the one of this machine's Debian or
# Ubuntu package, copied from where dpkg says it is installed, with the libraries
# that ldd finds. The Dockerfile runs this same script.
set -eu

[ $# = 3 ] || { echo "usage: rootfs.sh BINARY CONFIG OUT" >&2; exit 2; }
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
binary=$1 config=$2 out=$3

# The engine copies the rootfs once per plugin; a Go binary and iptables are
# half of this. More means that something came along that should not have.
limit_mib=40

# iptables.deb is no command: need.sh installs what it does not find, and what
# counts here is the package, not a command that may come from elsewhere.
if [ "$(dpkg-query -W -f '${db:Status-Status}' iptables 2>/dev/null || true)" != installed ]; then
	"$here/need.sh" "the plugin's rootfs" iptables.deb=iptables
fi
if ! command -v ldd >/dev/null 2>&1; then
	echo "ldd is missing, which finds the libraries of iptables: install libc-bin" >&2
	exit 1
fi

fs=$out/rootfs.new
rm -rf "$fs"
# /run/docker/plugins: the engine mounts the socket's directory there.
# /host/run, /var/lib/sluice: targets of the mounts in config.json.
# The rest is what runc mounts over, or programs expect.
for d in bin dev etc host/run proc root run/docker/plugins sys tmp usr/sbin usr/share/doc var/lib/sluice; do
	mkdir -p "$fs/$d"
done
chmod 1777 "$fs/tmp"
: >"$fs/etc/hosts"
: >"$fs/etc/resolv.conf"
cp "$config" "$out/config.json"
install -m 0755 "$binary" "$fs/bin/sluice-plugin"

# Programs of the legacy flavour keep each other out by a lock file in /run; it
# only works if it is the host's.
ln -s /host/run/xtables.lock "$fs/run/xtables.lock"

# IPv4 modules only, but of these all: listing a chain means printing rules that
# others wrote, and a rule whose module is missing cannot be printed.
files=$(dpkg -L iptables | grep -E '/(xtables-(nft|legacy)-multi|lib(xt|ipt)_[^/]*\.so)$')
for f in $files; do
	mkdir -p "$fs$(dirname "$f")"
	cp -L "$f" "$fs$f"
done
for flavour in nft legacy; do
	multi=$(echo "$files" | grep "/xtables-$flavour-multi\$") ||
		{ echo "the package iptables of this machine has no xtables-$flavour-multi" >&2; exit 1; }
	for name in iptables iptables-save iptables-restore; do
		ln -s "$multi" "$fs/usr/sbin/${name%%-*}-$flavour${name#iptables}"
		[ $flavour = legacy ] || ln -s "$multi" "$fs/usr/sbin/$name"
	done
done

# ldd prints "NAME => PATH (ADDRESS)" for libraries and "PATH (ADDRESS)" for the
# loader; the loader's path is part of the programs and must be kept.
# shellcheck disable=SC2086 # a list of files
libs=$(ldd $files | grep -oE '(=> )?/[^ ]+ \(0x' | sed -E 's/^=> //; s/ \(0x$//' | sort -u)
if ldd $files | grep 'not found'; then # shellcheck disable=SC2086
	echo "libraries of iptables are missing on this machine" >&2
	exit 1
fi
for f in $libs; do
	mkdir -p "$fs$(dirname "$f")"
	cp -L "$f" "$fs$f"
done

# Where the foreign files come from, and under which licences. dpkg knows a
# library by one of three spellings, whichever of /lib and /usr/lib is a link.
# shellcheck disable=SC2046,SC2086 # lists of files
packages=$(for f in $libs; do echo "$f" $(realpath "$f") "/usr$f"; done | xargs -n 64 dpkg -S 2>/dev/null |
	cut -d: -f1 | sort -u || true)
for package in iptables $packages; do
	mkdir -p "$fs/usr/share/doc/$package"
	cp -L "/usr/share/doc/$package/copyright" "$fs/usr/share/doc/$package/" 2>/dev/null ||
		echo "note: no copyright file of package $package on this machine" >&2
	dpkg-query -W -f '${Package} ${Version}\n' "$package" | sort -u | head -n 1
done >"$fs/usr/share/doc/packages"

# What is missing shows here and not on somebody's node: the rootfs's own loader
# has to find what each file needs inside. That takes chroot and nothing else of
# a privileged user; iptables proper would ask the kernel. A user namespace lets
# chroot work without root, and a build machine may forbid both.
enter=chroot
[ "$(id -u)" = 0 ] || enter='unshare -r chroot'
loader=$(echo "$libs" | grep -E '/ld[^/]*\.so[^/]*$')
if $enter "$fs" "$loader" --version >/dev/null 2>&1; then
	for f in $files; do
		found=$($enter "$fs" "$loader" --list "$f" 2>&1) || { echo "$f does not load in the rootfs: $found" >&2; exit 1; }
		case $found in *'not found'*) echo "$f does not load in the rootfs: $found" >&2; exit 1 ;; esac
	done
	$enter "$fs" /usr/sbin/iptables-nft -V >/dev/null
	$enter "$fs" /usr/sbin/iptables-legacy -V >/dev/null
else
	echo "note: iptables in the rootfs was not tried, which takes root or user namespaces" >&2
fi

kib=$(du -sk "$fs" | cut -f1)
if [ "$kib" -gt $((limit_mib * 1024)) ]; then
	echo "$fs has $((kib / 1024)) MiB, more than the $limit_mib allowed:" >&2
	du -k "$fs" | sort -n | tail -n 8 >&2
	exit 1
fi
rm -rf "$out/rootfs"
mv "$fs" "$out/rootfs"
echo "$out: $((kib / 1024)) MiB ($(du -k "$binary" | cut -f1) KiB of it sluice), with $(grep '^iptables ' "$out/rootfs/usr/share/doc/packages")"
