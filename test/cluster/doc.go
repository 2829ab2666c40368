// Package cluster makes several Docker hosts on one machine, for tests and for
// the demo.
//
// A host is a process that holds a set of namespaces (network, mount, UTS, IPC
// and PID) and the Docker engine that runs inside them. All hosts of a cluster
// hang on one bridge, which stands in a namespace of its own, so nothing of a
// cluster is ever seen in the machine's own network:
//
//	┌ host h1 ───────────┐ ┌ host h2 ───────────┐   ┌ outside ──────────┐
//	│ dockerd, /run,     │ │ dockerd ...        │   │ a client, no      │
//	│ /var/lib/docker    │ │                    │   │ engine            │
//	│ eth0 10.77.0.11    │ │ eth0 10.77.0.12    │   │ eth0 10.77.0.200  │
//	└──────┬─────────────┘ └──────┬─────────────┘   └──────┬────────────┘
//	┌ underlay ─ port1 ─────────── port2 ─────────────────port200 ──────┐
//	│                     br0 10.77.0.1, refuses everything else        │
//	└───────────────────────────────────────────────────────────────────┘
//
// A test binary re-executes itself to hold the namespaces; TestMain (or main)
// therefore calls [MaybeInner] before anything else:
//
//	func TestMain(m *testing.M) {
//		cluster.MaybeInner()
//		os.Exit(m.Run())
//	}
//
//	c, err := cluster.Up(ctx, cluster.Options{Hosts: 3, Dir: dir})
//	defer c.Down()
//	err = c.Swarm(ctx, 1)
//	out, err := c.Host(1).Docker(ctx, "node", "ls")
//
// # Why it is built like this
//
//   - A PID namespace per host makes "everything of this host is gone" one
//     SIGKILL: the kernel ends engine, shims, containers and plugins with their
//     init. [Host.Reboot] and [Cluster.Down] need no list of processes, and a
//     crashed test leaves one process per host to find again.
//   - /run is a private tmpfs, as on a real host: the engine's socket, its
//     network namespaces, containerd and xtables.lock live there and are gone
//     after a reboot. /var/lib/docker and /etc/docker (which holds the engine's
//     identity) are directories of the host's own and outlive it.
//   - Mounts are shared from / down (rshared), as systemd does it; plugins with
//     propagated mounts depend on that.
//   - The underlay's gateway is also the hosts' resolver. Nothing listens there
//     and nothing is routed further, so a registry is refused within
//     milliseconds. Without that refusal each start of a task costs about 20 s,
//     because the engine first tries to pull the image.
//
// # Limits
//
// Root is needed. Hosts share one kernel: its modules, its clock, its conntrack
// limits, its cgroup tree. Without [Options.Engine] they also share the
// machine's file system outside /run, /var/lib/docker, /etc/docker and
// /etc/resolv.conf, so what an engine or plugin writes elsewhere is
// written on the machine.
package cluster
