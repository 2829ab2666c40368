package linux

import (
	"testing"

	"sluice/internal/kernel/kerneltest"
	"sluice/internal/linux/nft"
	"sluice/internal/netnstest"
)

func TestLinuxKeepsContract(t *testing.T) {
	kerneltest.Contract(t, func(t *testing.T) kerneltest.Subject {
		k, w := newHost(t, nil)
		return kerneltest.Subject{Kernel: k, World: w}
	})
}

func TestLinuxWithTablesKeepsContract(t *testing.T) {
	kerneltest.Contract(t, func(t *testing.T) kerneltest.Subject {
		netnstest.Need(t, netnstest.NFTables)
		k, w := newHost(t, nft.Tables{})
		return kerneltest.Subject{Kernel: k, World: w, Tables: true}
	})
}
