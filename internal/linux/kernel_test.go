package linux

import (
	"errors"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"sluice/internal/kernel"
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

func TestLinuxWithMeshKeepsContract(t *testing.T) {
	kerneltest.Contract(t, func(t *testing.T) kerneltest.Subject {
		netnstest.Need(t, netnstest.NFTables)
		k, w := newHost(t, nft.Tables{})
		return kerneltest.Subject{Kernel: k, World: w, Tables: true, Mesh: true}
	})
}

// A kernel that has ip_vs and no ipip is not known.
func TestLinuxWithAllKeepsContract(t *testing.T) {
	kerneltest.Contract(t, func(t *testing.T) kerneltest.Subject {
		netnstest.Need(t, netnstest.NFTables, netnstest.IPVS, netnstest.IPIP)
		k, w := newHost(t, nft.Tables{})
		k.cfg.IPVS = ipvs.New()
		return kerneltest.Subject{Kernel: k, World: w, Tables: true, IPVS: true, Tunnels: true, Mesh: true}
	})
}

func TestHasTunnelSaysWhatTheKernelHas(t *testing.T) {
	k, _ := newHost(t, nil)
	err := k.HasTunnel()
	lacking := netnstest.Has(netnstest.IPIP)
	if lacking == nil && err != nil {
		t.Errorf("a kernel with ipip: %v", err)
	}
	if lacking != nil && (!errors.Is(err, kernel.ErrUnsupported) || !strings.Contains(err.Error(), "modprobe ipip")) {
		t.Errorf("a kernel without ipip: %v, want %v and what to do", err, kernel.ErrUnsupported)
	}
}

func TestHasIPVSSaysWhatTheKernelHas(t *testing.T) {
	k, _ := newHost(t, nil)
	if err := k.HasIPVS(); !errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("without an adapter: %v, want %v", err, kernel.ErrUnsupported)
	}
	k.cfg.IPVS = ipvs.New()
	err := k.HasIPVS()
	if _, lacking := netlink.GenlFamilyGet("IPVS"); lacking == nil && err != nil {
		t.Errorf("a kernel with IPVS: %v", err)
	} else if lacking != nil && !errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("a kernel without IPVS: %v, want %v", err, kernel.ErrUnsupported)
	}
}

func TestHasMeshSaysWhatTheKernelHas(t *testing.T) {
	netnstest.Need(t, netnstest.NFTables)
	k, _ := newHost(t, nil)
	if err := k.HasMesh(); !errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("without an adapter: %v, want %v", err, kernel.ErrUnsupported)
	}
	k.cfg.Tables = nft.Tables{}
	if err := k.HasMesh(); err != nil { // the lab of the mesh runs on it
		t.Error(err)
	}
}

// Where there is no IPVS, there is nothing of it, and that is all that a dump says.
func TestDumpWithoutIPVS(t *testing.T) {
	netnstest.Need(t, netnstest.NFTables)
	k, _ := newHost(t, nft.Tables{})
	k.cfg.IPVS = ipvs.New()
	want := kerneltest.Example()
	apply(t, k, want)
	have, err := k.Dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if ops := kernel.Diff(have, want); len(ops) > 0 {
		t.Errorf("still to do: %v", ops)
	}
}
