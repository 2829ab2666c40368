#!/bin/sh
# Puts the built plugin into the local engine, and takes it out.
#
#   plugin.sh create NAME DIR     # replaces a disabled one of that name
#   plugin.sh enable NAME
#   plugin.sh remove NAME
set -eu

# state prints true (enabled), false, or none. The command prints an empty line
# when there is no such plugin, so its output counts only if it succeeds.
state() {
	if s=$(docker plugin inspect -f '{{.Enabled}}' "$1" 2>/dev/null); then echo "$s"; else echo none; fi
}

if ! command -v docker >/dev/null 2>&1; then
	echo "the docker command is missing: install Docker, or build only: make rootfs" >&2
	exit 1
fi
if ! docker version >/dev/null 2>&1; then
	echo "no Docker engine answers here: start it, or build only: make rootfs" >&2
	docker version >/dev/null # says why
	exit 1
fi

verb=$1 name=$2
case $verb in
create)
	case $(state "$name") in
	true)
		echo "plugin $name is enabled; networks may live on it. To replace it: make uninstall" >&2
		exit 1
		;;
	false)
		echo "removing the disabled plugin $name, with its settings and state"
		docker plugin rm "$name" >/dev/null
		;;
	esac
	# The engine takes no two plugins of the same content (20.10: "content ...
	# already exists"), so an alias needs a mark of its own.
	stage=$(mktemp -d "$3.XXXXXX")
	trap 'rm -rf "$stage"' EXIT
	cp -al "$3/." "$stage/"
	echo "$name" >"$stage/rootfs/etc/sluice-name"
	docker plugin create "$name" "$stage" >/dev/null
	echo "created plugin $name; it is not enabled yet"
	;;
enable)
	case $(state "$name") in
	none)
		echo "there is no plugin $name: make plugin" >&2
		exit 1
		;;
	false) docker plugin enable "$name" >/dev/null ;;
	esac
	echo "plugin $name is enabled. Try: docker network create -d $name --ipam-driver $name NAME"
	;;
remove)
	case $(state "$name") in
	none)
		echo "there is no plugin $name"
		exit 0
		;;
	true) docker plugin disable "$name" >/dev/null ;; # the engine refuses while networks use it, and says so
	esac
	docker plugin rm "$name" >/dev/null
	echo "removed plugin $name, with its settings and state"
	;;
*)
	echo "usage: plugin.sh create NAME DIR | enable NAME | remove NAME" >&2
	exit 2
	;;
esac
