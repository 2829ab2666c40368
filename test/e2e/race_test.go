package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"sluice/test/cluster"
)

// noRaces says whether a plugin that was built with RACE=1 has found two of its
// goroutines at one variable. The engine's log has what a plugin prints.
func noRaces(c *cluster.Cluster) error {
	var errs []error
	for _, h := range c.Hosts() {
		log, err := os.ReadFile(h.LogFile())
		if err != nil {
			errs = append(errs, err)
		}
		if n := bytes.Count(log, []byte("WARNING: DATA RACE")); n > 0 {
			errs = append(errs, fmt.Errorf("the plugin of %s reports %d data races in %s", h.Name(), n, h.LogFile()))
		}
	}
	return errors.Join(errs...)
}
