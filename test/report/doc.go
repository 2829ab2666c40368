// Command report runs go test once for each group of arguments and tells at the
// end, by name, what failed and what was not run and why.
//
//	report -- ./internal/... -- -count=1 -timeout 30m ./test/...
//
// Groups run one after the other. Tracks, which "==" separates, run side by side.
//
// A group may begin with a label, which ends in a colon: where it ran. A test that
// one group skipped and another passed is not among those that were not run; it is
// listed by itself, with the label.
//
//	report -- ./internal/linux -- 'in a VM:' -exec run-in-vm ./internal/linux
//
// go test alone names skipped tests only with -v, among thousands of lines. Here
// a skip is counted and its reason printed, so that nobody takes a machine that
// could not run a test for one that passed it. The last line is
// "N passed, N failed, N skipped"; the exit status is that of the tests.
package main
