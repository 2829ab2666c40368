package cluster_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"sluice/test/cluster"
)

// enginesEnv names releases of Debian, separated by commas, whose engines are
// tested too. Each is a download of about 250 MB the first time.
const enginesEnv = "SLUICE_TEST_ENGINES"

func TestSwarmOfOtherEngines(t *testing.T) {
	needHosts(t)
	suites := os.Getenv(enginesEnv)
	if suites == "" {
		t.Skipf("needs %s: releases of Debian to download, such as trixie,sid", enginesEnv)
	}
	for suite := range strings.SplitSeq(suites, ",") {
		t.Run(suite, func(t *testing.T) {
			tree, err := cluster.EngineTree(within(t, 10*time.Minute), suite, t.Output())
			must(t, err)
			c := up(t, cluster.Options{Hosts: 3, Prefix: suite, Engine: tree})
			ctx := within(t, time.Minute)
			version, err := c.Host(1).Docker(ctx, "version", "--format", "{{.Server.Version}}")
			must(t, err)
			own, err := c.Host(1).ExecNet(ctx, "dockerd", "--version")
			must(t, err)
			if strings.Contains(own, version) {
				t.Errorf("the engine is %s, the machine's own", version)
			}
			t.Logf("engine %s", version)
			must(t, c.Swarm(ctx, 1))
			must(t, c.Host(2).Reboot(ctx))
			must(t, c.WaitSettled(ctx))
		})
	}
}
