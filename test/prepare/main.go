package main

import (
	"context"
	"fmt"
	"os"

	"sluice/test/cluster"
)

func main() {
	if err := cluster.Prepare(context.Background(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "prepare:", err)
		os.Exit(1)
	}
}
