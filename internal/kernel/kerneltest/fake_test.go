package kerneltest

import (
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

func TestFakeKeepsContract(t *testing.T) {
	Contract(t, func(t *testing.T) Subject {
		f := NewFake()
		return Subject{Kernel: f, World: fakeWorld{f}, Tables: true, IPVS: true, Tunnels: true, Mesh: true}
	})
}

// fakeWorld is the World of a Fake.
type fakeWorld struct{ f *Fake }

func (w fakeWorld) Spoil(t *testing.T, key kernel.Key, how Damage) {
	w.f.Alter(func(s kernel.State) {
		if s[key] == nil {
			t.Fatalf("spoil %s: it is not there", key)
		}
		switch v := s[key].(type) {
		case kernel.LinkSpec:
			if how == Changed {
				v.MTU -= 50
			} else if how == Halved {
				v.Kept = false
			} else {
				v.MTU = 0
			}
			s[key] = v
		case kernel.SysctlSpec:
			v.Value = map[string]string{"0": "1", "1": "0"}[v.Value]
			s[key] = v
		case kernel.GuardPortSpec:
			if v.MAC = other; how == Changed {
				s[key] = v
			} else {
				delete(s, key)
			}
		case kernel.GuardAddrSpec:
			if v.MAC = other; how == Changed {
				s[key] = v
			} else {
				delete(s, key)
			}
		case kernel.NeighSpec:
			s[key] = kernel.NeighSpec{MAC: other}
		case kernel.FDBSpec:
			s[key] = kernel.FDBSpec{VTEP: vtepThree}
			if how == Halved {
				s[key] = kernel.FDBSpec{}
			}
		case kernel.IPVSTimeoutsSpec:
			s[key] = kernel.IPVSTimeoutsSpec{TCP: 1, FIN: 1, UDP: 1}
		case kernel.IPVSServiceSpec:
			s[key] = kernel.IPVSServiceSpec{Scheduler: "dh"}
		case kernel.IPVSDestSpec:
			s[key] = kernel.IPVSDestSpec{Weight: 77, Method: kernel.IPVSDR}
		case kernel.ForwardSpec:
			s[key] = kernel.ForwardSpec{}
		case kernel.TaskRouteSpec:
			s[key] = kernel.TaskRouteSpec{}
		case kernel.MeshNetSpec:
			s[key] = kernel.MeshNetSpec{}
		case kernel.MeshAllowSpec:
			s[key] = kernel.MeshAllowSpec{From: "?"}
		case kernel.MeshTableSpec:
			delete(s, key) // its contents stay
		case kernel.FilterSpec:
			s[key] = kernel.FilterSpec{}
		}
		if _, ok := key.(kernel.TaskTunnel); ok || how == Deleted { // one with a fault is none
			w.f.remove(key) // Alter holds the lock
		}
	})
}

func (w fakeWorld) Take(_ *testing.T, l kernel.Link, _ string) { w.f.Take(l) }

func (w fakeWorld) AddVXLAN(_ *testing.T, name string, vni model.VNI, port uint16) {
	w.f.AddForeignVXLAN(name, vni, port)
}

// AddForeign has nothing to do: what is not sluice's has no form here.
func (w fakeWorld) AddForeign(*testing.T, string) func(*testing.T) { return func(*testing.T) {} }

func (w fakeWorld) Sandbox(*testing.T) string {
	const path = "/run/docker/netns/1"
	w.f.AddSandbox(path)
	return path
}
