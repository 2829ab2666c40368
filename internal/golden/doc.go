// Package golden compares texts of tests with files kept beside them.
//
//	go test ./lb/service            compares with testdata/NAME.golden
//	go test ./lb/service -update    rewrites them; look at the diff
//
// Importing it gives a test the flag -update. It is for tests alone.
package golden
