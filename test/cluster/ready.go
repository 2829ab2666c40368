package cluster

import (
	"context"
	"io"
	"os"

	"sluice/test/image"
)

// TestedEngine is the root of the tree with the engine of the Debian suite that
// SLUICE_TEST_ENGINE names, for Options.Engine; empty, the machine's own, if it
// names none. See EngineTree, which downloads one, saying so on out.
func TestedEngine(ctx context.Context, out io.Writer) (string, error) {
	suite := os.Getenv("SLUICE_TEST_ENGINE")
	if suite == "" {
		return "", nil
	}
	return EngineTree(ctx, suite, out)
}

// Ready makes a swarm with so many managers of a cluster that is up, with the test
// images, and with the plugin called name, built in a directory, on every host.
//
// The plugin comes before the swarm: the scheduler learns of one that is enabled
// later only when the node next reports, up to 20 s.
func (c *Cluster) Ready(ctx context.Context, name, built string, managers int, settings ...string) error {
	images, err := image.Build(ctx, c.Dir())
	if err != nil {
		return err
	}
	if err := c.LoadImages(ctx, images); err != nil {
		return err
	}
	if err := c.InstallPlugin(ctx, name, built, settings...); err != nil {
		return err
	}
	return c.Swarm(ctx, managers)
}
