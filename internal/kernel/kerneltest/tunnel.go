package kerneltest

import "sluice/internal/kernel"

// addTunnels adds a tunnel in the namespace at path for each address of its task.
func addTunnels(s kernel.State, path string) {
	s[kernel.TaskTunnel{Sandbox: path, Addr: member}] = kernel.TaskTunnelSpec{}
	s[kernel.TaskTunnel{Sandbox: path, Addr: secondMember}] = kernel.TaskTunnelSpec{}
}

// tunnelChanges are changes to them: a tunnel has a key and nothing else.
func tunnelChanges(path string) []changeCase {
	return []changeCase{
		put(kernel.TaskTunnel{Sandbox: path, Addr: remote}, kernel.TaskTunnelSpec{}),
		{"another address's tunnel", func(s kernel.State) {
			delete(s, kernel.TaskTunnel{Sandbox: path, Addr: member})
			s[kernel.TaskTunnel{Sandbox: path, Addr: remote}] = kernel.TaskTunnelSpec{}
		}},
	}
}

// tunnelDrifts are damages to them.
func tunnelDrifts(path string) []driftCase {
	k := kernel.TaskTunnel{Sandbox: path, Addr: member}
	return []driftCase{{k, Deleted}, {k, Down}, {k, Changed}, {k, Halved}, {k, Replaced}}
}
