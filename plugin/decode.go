package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-plugins-helpers/network"

	"sluice/driver"
	"sluice/internal/model"
)

// Keys of the engine's maps (moby libnetwork/netlabel/labels.go).
const (
	labelGeneric  = "com.docker.network.generic"
	labelInternal = "com.docker.network.internal"
	labelIPv6     = "com.docker.network.enable_ipv6"
)

// nodeDiscovery is the one DiscoveryType that reaches a remote driver (moby
// libnetwork/discoverapi).
const nodeDiscovery = 1

// maxID is above the engine's 64 hexadecimal digits and 25 characters of swarm.
const maxID = 128

// identifier checks an id of the engine. Ids become parts of names and paths.
func identifier(kind, id string) error {
	if id == "" {
		return badRequest{fmt.Errorf("the request names no %s", kind)}
	}
	ok := len(id) <= maxID && strings.IndexFunc(id, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) < 0
	if !ok {
		return badRequest{fmt.Errorf("%s id %.40q is not one of the engine's: want letters and digits", kind, id)}
	}
	return nil
}

func networkID(id string) (model.NetworkID, error) {
	return model.NetworkID(id), identifier("network", id)
}

func endpointIDs(network, endpoint string) (model.NetworkID, model.EndpointID, error) {
	err := identifier("network", network)
	if err == nil {
		err = identifier("endpoint", endpoint)
	}
	return model.NetworkID(network), model.EndpointID(endpoint), err
}

func decodeAllocate(w network.AllocateNetworkRequest) (driver.AllocateRequest, error) {
	id, err := networkID(w.NetworkID)
	if err != nil {
		return driver.AllocateRequest{}, err
	}
	nets, err := subnets(w.IPv4Data)
	if err != nil {
		return driver.AllocateRequest{}, err
	}
	return driver.AllocateRequest{Network: id, Options: w.Options, Subnets: nets, V6: len(w.IPv6Data)}, nil
}

func decodeCreate(w network.CreateNetworkRequest) (driver.CreateRequest, error) {
	id, err := networkID(w.NetworkID)
	if err != nil {
		return driver.CreateRequest{}, err
	}
	r := driver.CreateRequest{Network: id}
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	r.Options, err = generic(w.Options[labelGeneric])
	note(err)
	r.Internal, err = boolean(w.Options, labelInternal)
	note(err)
	r.IPv6, err = boolean(w.Options, labelIPv6)
	note(err)
	r.Subnets, err = subnetPointers(w.IPv4Data)
	note(err)
	r.Subnets6, err = subnetPointers(w.IPv6Data)
	note(err)
	if len(errs) > 0 {
		return driver.CreateRequest{}, badRequest{fmt.Errorf("create network %s: %w", id.Short(), oneLine(errs))}
	}
	return r, nil
}

func decodeEndpoint(w network.CreateEndpointRequest) (driver.EndpointRequest, error) {
	n, e, err := endpointIDs(w.NetworkID, w.EndpointID)
	if err != nil {
		return driver.EndpointRequest{}, err
	}
	fail := func(err error) (driver.EndpointRequest, error) {
		return driver.EndpointRequest{}, badRequest{fmt.Errorf("create endpoint %s: %w", e.Short(), err)}
	}
	i := w.Interface
	if i == nil || i.Address == "" {
		return fail(errors.New("the engine gave no IPv4 address; a sluice network needs an IPAM driver, such as --ipam-driver sluice:latest"))
	}
	if i.AddressIPv6 != "" {
		return fail(fmt.Errorf("IPv6 address %s was asked for, but sluice serves IPv4 only; leave out --ip6 and --ipv6", i.AddressIPv6))
	}
	r := driver.EndpointRequest{Network: n, Endpoint: e}
	if r.Addr, err = netip.ParsePrefix(i.Address); err != nil || !r.Addr.Addr().Is4() {
		return fail(fmt.Errorf("address %q is not an IPv4 address with its prefix length", i.Address))
	}
	if i.MacAddress != "" {
		if r.MAC, err = model.ParseMAC(i.MacAddress); err != nil {
			return fail(err)
		}
	}
	if r.Options, err = endpointOptions(w.Options); err != nil {
		return fail(err)
	}
	return r, nil
}

func decodeJoin(w network.JoinRequest) (driver.JoinRequest, error) {
	n, e, err := endpointIDs(w.NetworkID, w.EndpointID)
	if err != nil {
		return driver.JoinRequest{}, err
	}
	r := driver.JoinRequest{Network: n, Endpoint: e, Sandbox: w.SandboxKey}
	if r.Options, err = endpointOptions(w.Options); err != nil {
		return driver.JoinRequest{}, badRequest{fmt.Errorf("join endpoint %s: %w", e.Short(), err)}
	}
	return r, nil
}

// decodeDiscovery reads a notice about a node; isNode is false for a notice
// about something else, which is no error.
func decodeDiscovery(w network.DiscoveryNotification, gone bool) (n driver.Node, isNode bool, err error) {
	if w.DiscoveryType != nodeDiscovery {
		return driver.Node{}, false, nil
	}
	data, ok := w.DiscoveryData.(map[string]any)
	if !ok {
		return driver.Node{}, false, badRequest{errors.New("node discovery: DiscoveryData is no object")}
	}
	n = driver.Node{Gone: gone}
	for key, dst := range map[string]*string{"Address": &n.Address, "BindAddress": &n.BindAddress} {
		if v, given := data[key]; given && v != nil {
			if *dst, ok = v.(string); !ok {
				return driver.Node{}, false, badRequest{fmt.Errorf("node discovery: %s is no text", key)}
			}
		}
	}
	if n.Self, err = boolean(data, "Self"); err != nil {
		return driver.Node{}, false, badRequest{fmt.Errorf("node discovery: %w", err)}
	}
	return n, true, nil
}

func subnetPointers(data []*network.IPAMData) ([]driver.Subnet, error) {
	flat := make([]network.IPAMData, 0, len(data))
	for _, d := range data {
		if d == nil {
			return nil, errors.New("a subnet of the request is null")
		}
		flat = append(flat, *d)
	}
	return subnets(flat)
}

// subnets reads the pools of a network.
func subnets(data []network.IPAMData) ([]driver.Subnet, error) {
	out := make([]driver.Subnet, 0, len(data))
	for _, d := range data {
		var s driver.Subnet
		var err error
		if s.Pool, err = netip.ParsePrefix(d.Pool); err != nil {
			return nil, badRequest{fmt.Errorf("pool %q is no CIDR", d.Pool)}
		}
		if d.Gateway != "" {
			if s.Gateway, err = netip.ParsePrefix(d.Gateway); err != nil {
				return nil, badRequest{fmt.Errorf("gateway %q of pool %s is no address with its prefix length", d.Gateway, d.Pool)}
			}
		}
		out = append(out, s)
	}
	return out, nil
}

// generic reads the driver's options of a network.
func generic(v any) (map[string]string, error) {
	if v == nil {
		return nil, nil
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("%s is no object", labelGeneric)
	}
	out := make(map[string]string, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if m[k] == nil {
			continue
		}
		text, ok := scalar(m[k])
		if !ok {
			return nil, fmt.Errorf("option %s is a list or an object; write it as text", k)
		}
		out[k] = text
	}
	return out, nil
}

// endpointOptions keeps the options that are text. Beside the user's, the
// engine puts lists of ports there, which are none of ours; an option of ours
// that is no text is an error.
func endpointOptions(m map[string]any) (map[string]string, error) {
	out := make(map[string]string, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		text, ok := scalar(m[k])
		switch {
		case ok:
			out[k] = text
		case m[k] != nil && strings.HasPrefix(strings.ToLower(strings.TrimSpace(k)), "sluice."):
			return nil, fmt.Errorf("option %s is a list or an object; write it as text", k)
		}
	}
	return out, nil
}

// scalar is the text of a string, number or boolean. A stack file may have the
// latter two where the docker command has text.
func scalar(v any) (text string, ok bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	}
	return "", false
}

// boolean reads a flag, which some engines write as text; false if it is not there.
func boolean(m map[string]any, key string) (bool, error) {
	v := m[key]
	if v == nil {
		return false, nil
	}
	text, ok := scalar(v)
	if ok {
		if b, err := strconv.ParseBool(text); err == nil {
			return b, nil
		}
	}
	return false, fmt.Errorf("%s is neither true nor false", key)
}
