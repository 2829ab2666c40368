// Command prepare installs the Debian or Ubuntu packages that the tests need and
// the machine lacks, and says which. It starts none of their services.
package main
