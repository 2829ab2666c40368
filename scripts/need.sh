#!/bin/sh
# Makes sure that commands are there, by installing the Debian or Ubuntu packages
# that have them, and says what it does.
#
#   need.sh WHY COMMAND=PACKAGE...
#
# Nothing is installed if every command is found. Without root it uses sudo if
# that asks no password, else it says what to run.
set -eu

why=$1
shift
missing=
for pair; do
	command -v "${pair%%=*}" >/dev/null 2>&1 || missing="$missing ${pair#*=}"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
	echo "$why needs the Debian packages$missing, and there is no apt-get here: install their like by hand" >&2
	exit 1
fi
as_root=
if [ "$(id -u)" != 0 ]; then
	if ! sudo -n true 2>/dev/null; then
		echo "$why needs packages that are not installed; please run: sudo apt-get install$missing" >&2
		exit 1
	fi
	as_root=sudo
fi

echo "$why: apt-get install$missing"
export DEBIAN_FRONTEND=noninteractive
# The lists of a fresh machine are empty or old; refresh them only if the
# package cannot be had without.
# shellcheck disable=SC2086 # a list of packages
if ! $as_root apt-get install -y -q --no-install-recommends $missing >/dev/null 2>&1; then
	echo "$why: apt-get update, then once more"
	$as_root apt-get update -q
	$as_root apt-get install -y -q --no-install-recommends $missing
fi
