package driver

import (
	"fmt"
	"strconv"

	"sluice/internal/model"
	"sluice/internal/options"
)

// Abilities says why this node's kernel cannot do what networks and services may
// ask for; nil, the error or the function that gives it, means that it can. What is asked for by name and cannot be had is
// refused, when the engine asks for it: a network or service that is there already
// goes on as the plan can have it.
type Abilities struct {
	NoIPVS error // balance with ip_vs
	// NoTunnel: take IPIP packets in a task's namespace. It is asked only when mode
	// tun is wanted, as finding out has its price: the module puts a device, tunl0,
	// into every network namespace of the host. It must be safe for concurrent use.
	NoTunnel func() error
}

// network refuses what a network asks for by name. A scheduler that counts
// connections is not among that: with datapath auto, the nearest is used.
func (a Abilities) network(o model.NetworkOptions) error {
	if o.Datapath == "ipvs" && a.NoIPVS != nil {
		return &options.Error{
			Key: options.Datapath, Value: o.Datapath,
			Problem: fmt.Sprintf("this node has no ip_vs (%v)", a.NoIPVS),
			Allowed: "auto, which is ipvs on the nodes that have it, or nft; else load ip_vs on this node (modprobe ip_vs), then disable and enable the plugin",
		}
	}
	return a.mode(o.Mode)
}

// service refuses what a service asks for by name.
func (a Abilities) service(o model.ServiceOptions) error {
	if o.Upper > 0 && a.NoIPVS != nil {
		return &options.Error{
			Key: options.Upper, Value: strconv.Itoa(o.Upper),
			Problem: fmt.Sprintf("only ip_vs counts connections, and this node has none (%v)", a.NoIPVS),
			Allowed: "0; else load ip_vs on this node (modprobe ip_vs), then disable and enable the plugin",
		}
	}
	return a.mode(o.Mode)
}

func (a Abilities) mode(mode string) error {
	if mode != "tun" || a.NoTunnel == nil {
		return nil
	}
	err := a.NoTunnel()
	if err == nil {
		return nil
	}
	return &options.Error{
		Key: options.Mode, Value: mode,
		Problem: fmt.Sprintf("this node's tasks can take no IPIP packets (%v)", err),
		Allowed: "dr, nat; else load ipip on this node (modprobe ipip), then disable and enable the plugin",
	}
}
