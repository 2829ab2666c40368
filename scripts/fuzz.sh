#!/bin/sh
# Runs every fuzz target of the module for a time: fuzz.sh TIME, such as 10s.
# Go takes one target of one package at a time.
set -eu
time=$1
grep -rlE --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do
	sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' "$file" | while read -r target; do
		echo "== $(dirname "$file") $target"
		${GO:-go} test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$(dirname "$file")" || exit 1
	done || exit 1
done
