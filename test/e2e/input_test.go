package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

func TestBadNetworkOptionsReachServicePSAndNetworks(t *testing.T) {
	for name, tt := range map[string]struct {
		args  []string
		words []string
	}{
		"unknown option": {[]string{"-o", "sluice.color=red"}, []string{"sluice.color"}},
		"bad scheduler":  {[]string{"-o", "sluice.scheduler=fastest"}, []string{"sluice.scheduler", "fastest", "rr"}},
		"second subnet":  {[]string{"--subnet", "10.88.0.0/24", "--subnet", "10.89.0.0/24"}, []string{"2 IPv4 subnets"}},
		"bad mtu":        {[]string{"-o", "sluice.mtu=12"}, []string{"sluice.mtu", "12"}},
	} {
		t.Run(name, func(t *testing.T) {
			network(t, "bad-net", tt.args...)
			taskError(t, "bad-net", tt.words...)
			err := cluster.Wait(within(t), "sluice networks tells", func(context.Context) error {
				var nw diag.Networks
				sluice(t, 1, &nw, "networks")
				for _, n := range nw.Networks {
					if n.Name == "bad-net" && n.State == "refused" && strings.Contains(n.Refused, tt.words[0]) {
						return nil
					}
				}
				return fmt.Errorf("%+v", nw)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBadServiceOptionsReachServicePS(t *testing.T) {
	network(t, "web")
	for name, tt := range map[string]struct{ option, words string }{
		"unknown option": {"sluice.color=red", "sluice.color"},
		"bad weight":     {"sluice.weight=1000", "sluice.weight"},
		"other mode":     {"sluice.mode=nat", "sluice.mode"},
	} {
		t.Run(name, func(t *testing.T) {
			docker(t, 1, "service", "create", "-d", "--no-resolve-image", "--name", "bad", "--network", "name=web,driver-opt="+tt.option,
				"--restart-max-attempts", "1", "sluice-probe:test")
			t.Cleanup(func() { removeService(t, "bad") })
			err := cluster.Wait(within(t), "docker service ps tells", func(ctx context.Context) error {
				out, err := lab.Host(1).Docker(ctx, "service", "ps", "--no-trunc", "--format", "{{.Error}}", "bad")
				if !strings.Contains(out, tt.words) {
					return fmt.Errorf("%q, %v", out, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOverlappingPoolIsNotAllocated(t *testing.T) {
	network(t, "first", "--subnet", "10.77.8.0/22")
	service(t, "s1", "first", 1)
	network(t, "second", "--subnet", "10.77.8.0/24")
	err := cluster.Wait(within(t), "sluice networks tells of the overlap", func(context.Context) error {
		var nw diag.Networks
		sluice(t, 1, &nw, "networks")
		for _, n := range nw.Networks {
			if n.Name == "second" && n.State == "not allocated" {
				return nil
			}
		}
		return fmt.Errorf("%+v", nw)
	})
	if err != nil {
		t.Error(err)
	}
	reaches(t, lab.Host(1), client(t, 1, "first"), 1, 3, "s1")
}

func TestChosenAddresses(t *testing.T) {
	network(t, "web", "--subnet", "10.66.0.0/16", "--ip-range", "10.66.5.0/24", "--gateway", "10.66.0.9")
	c := client(t, 2, "web", "--ip", "10.66.7.7")
	if a := addrOn(t, lab.Host(2), c, "web"); a.String() != "10.66.7.7" {
		t.Errorf("address %s, asked for 10.66.7.7", a)
	}
	service(t, "s1", "web", 2)
	v := vip(t, "s1", "web")
	if !strings.HasPrefix(v.String(), "10.66.5.") {
		t.Errorf("VIP %s is not in the range", v)
	}
	reaches(t, lab.Host(2), c, 2, 4, v.String())
	if s, err := get(within(t), lab.Host(2), c, "--ping", "-n", "1", "10.66.0.9"); err != nil || s.OK != 1 {
		t.Errorf("the gateway does not answer: %+v, %v", s, err)
	}
}

func TestInternalNetworkHasNoWayOut(t *testing.T) {
	network(t, "inside", "--internal")
	service(t, "s1", "inside", 2)
	c := client(t, 3, "inside")
	reaches(t, lab.Host(3), c, 2, 4, vip(t, "s1", "inside").String())
	out := docker(t, 3, "exec", c, "/bin/ip", "route")
	if strings.Contains(out, "default") {
		t.Errorf("a container of an internal network has a default route: %s", out)
	}
	network(t, "outside")
	c = client(t, 3, "outside")
	if out := docker(t, 3, "exec", c, "/bin/ip", "route"); !strings.Contains(out, "default via 172.") {
		t.Errorf("no way out by docker_gwbridge: %s", out)
	}
}
