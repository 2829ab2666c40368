package linux

import (
	"testing"

	"sluice/internal/kernel/kerneltest"
	"sluice/internal/linux/ipvs"
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

func TestLinuxWithIPVSKeepsContract(t *testing.T) {
	kerneltest.Contract(t, func(t *testing.T) kerneltest.Subject {
		netnstest.Need(t, netnstest.NFTables, netnstest.IPVS)
		k, w := newHost(t, nft.Tables{})
		k.cfg.IPVS = ipvs.New()
		return kerneltest.Subject{Kernel: k, World: w, Tables: true, IPVS: true}
	})
}
