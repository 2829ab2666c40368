// Command report runs go test once for each group of arguments and tells at the
// end, by name, what failed and what was not run and why.
//
//	report -- ./internal/... -- -count=1 -timeout 30m ./test/...
//
// go test alone names skipped tests only with -v, among thousands of lines. Here
// a skip is counted and its reason printed, so that nobody takes a machine that
// could not run a test for one that passed it. The last line is
// "N passed, N failed, N skipped"; the exit status is that of the tests.
package main
