package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"sluice/internal/diag"
	lb "sluice/lb/service"
	"sluice/test/cluster"
)

func TestBadNetworkOptionsReachServicePSAndNetworks(t *testing.T) {
	for name, tt := range map[string]struct {
		args  []string
		words []string
	}{
		"unknown option": {[]string{"-o", "sluice.color=red"}, []string{"sluice.color"}},
		"bad scheduler":  {[]string{"-o", "sluice.scheduler=fastest"}, []string{"sluice.scheduler", "fastest", "rr"}},
		"unknown mode":   {[]string{"-o", "sluice.mode=warp"}, []string{"sluice.mode", "warp", "dr, nat, tun"}},
		"no counts":      {[]string{"-o", "sluice.datapath=nft", "-o", "sluice.scheduler=wlc"}, []string{"sluice.scheduler", "wlc", "sluice.datapath=nft", "rr, wrr, sh"}},
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
	network(t, "plain", "-o", "sluice.datapath=nft")
	for name, tt := range map[string]struct {
		network string
		options string // separated by commas
		words   []string
	}{
		"unknown option":    {"web", "sluice.color=red", []string{"sluice.color"}},
		"bad weight":        {"web", "sluice.weight=1000", []string{"sluice.weight", "1000", "from 1 to 255"}},
		"unknown mode":      {"web", "sluice.mode=warp", []string{"sluice.mode", "warp", "dr, nat, tun"}},
		"unknown scheduler": {"web", "sluice.scheduler=fastest", []string{"sluice.scheduler", "fastest", "rr, wrr"}},
		"long timeout":      {"web", "sluice.idle-timeout=577h", []string{"sluice.idle-timeout", "577h", "1s to 576h"}},
		"bad ports":         {"web", "sluice.ports=80;90-85", []string{"sluice.ports", "range 90-85 ends before it begins"}},
		"thresholds":        {"web", "sluice.threshold.upper=5,sluice.threshold.lower=6", []string{"sluice.threshold.lower", "which is 5", "from 0 to 5"}},
		"netmask alone":     {"web", "sluice.persistence.netmask=24", []string{"sluice.persistence.netmask", "sluice.persistence, which is off"}},
		"no counts":         {"plain", "sluice.scheduler=nq", []string{"sluice.scheduler", "nq", "sluice.datapath=nft"}},
	} {
		t.Run(name, func(t *testing.T) { taskError(t, withOptions(tt.network, tt.options), tt.words...) })
	}
}

// withOptions is a service's attachment to a network, as --network has it.
func withOptions(network, options string) string {
	return "name=" + network + ",driver-opt=" + strings.ReplaceAll(options, ",", ",driver-opt=")
}

// TestBadForTheKernelReachesServicePS: what is right elsewhere, and no node here
// can do, is never a black hole.
func TestBadForTheKernelReachesServicePS(t *testing.T) {
	t.Run("ip_vs", func(t *testing.T) {
		for i := range lab.Hosts() {
			var s diag.Status
			if sluice(t, i+1, &s, "status"); s.Datapath != lb.NFT {
				t.Skipf("host %d has ip_vs", i+1)
			}
		}
		network(t, "web")
		network(t, "asked", "-o", "sluice.datapath=ipvs")
		t.Run("network", func(t *testing.T) { taskError(t, "asked", `sluice.datapath="ipvs"`, "ip_vs", "auto") })
		t.Run("service", func(t *testing.T) {
			taskError(t, withOptions("web", "sluice.threshold.upper=9"), `sluice.threshold.upper="9"`, "ip_vs")
		})
	})
	t.Run("ipip", func(t *testing.T) {
		// In a namespace of its own, which ends with the command.
		try := exec.CommandContext(within(t), "unshare", "-n", "ip", "link", "add", "try", "type", "ipip", "local", "192.0.2.1")
		if out, err := try.CombinedOutput(); err == nil {
			t.Skip("this kernel has ipip")
		} else if !strings.Contains(string(out), "nknown device type") && !strings.Contains(string(out), "not supported") {
			t.Fatalf("%v: %v: %s", try.Args, err, out)
		}
		network(t, "web")
		network(t, "asked", "-o", "sluice.mode=tun")
		t.Run("network", func(t *testing.T) { taskError(t, "asked", `sluice.mode="tun"`, "IPIP", "dr, nat") })
		t.Run("service", func(t *testing.T) {
			taskError(t, withOptions("web", "sluice.mode=tun"), `sluice.mode="tun"`, "IPIP", "dr, nat")
		})
	})
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
