#!/bin/sh
# Runs every fuzz target of the module with COUNT inputs each: fuzz.sh COUNT, such as
# 10000x. It goes on after one that fails, and names at the end those that did; what made
# them fail is under testdata/fuzz beside them, where it is a test from then on.
#
# Not for a time, such as 10s, though go takes that too: before Go 1.27 a target may then
# fail at its end with "context deadline exceeded" and no input (golang/go#75804).
#
# Go takes one target of one package at a time, so as many of those run side by side
# as there are processors, with one worker each.
set -eu
export count="$1" GO="${GO:-go}"
failed=$(mktemp)
export failed
trap 'rm -f "$failed"' EXIT
grep -rlE --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do
	sed -nE "s,^func (Fuzz[A-Za-z0-9_]*)\(.*,$(dirname "$file") \1,p" "$file"
done | xargs -P "$(nproc)" -n 2 sh -c '
	if out=$($GO test -vet=off -run "^\$" -fuzz "^$2\$" -fuzztime "$count" -parallel 1 "$1" 2>&1); then
		echo "ok	$1 $2"
	else
		printf "%s\nFAIL	%s %s\n" "$out" "$1" "$2"
		echo "$1 $2" >> "$failed"
	fi' fuzz
if [ -s "$failed" ]; then
	echo "fuzz targets that failed:"
	sort "$failed"
	exit 1
fi
