package main

import (
	"context"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"

	sluiceipam "sluice/ipam"
)

// manifest is the answer to Plugin.Activate. The engine does not ask a managed
// plugin (config.json says the types); one that is started by hand is asked.
type manifest struct{ Implements []string }

// addressSpaces has the field names of the wire; go-plugins-helpers' type too,
// but keyed literals of it would hide which is which.
func addressSpaces() ipam.AddressSpacesResponse {
	s := sluiceipam.GetDefaultAddressSpaces()
	return ipam.AddressSpacesResponse{LocalDefaultAddressSpace: s.Local, GlobalDefaultAddressSpace: s.Global}
}

// gwAllocCheckRequest and its answer are missing in go-plugins-helpers: a
// method of engines from 28.0 on (moby#49372).
type gwAllocCheckRequest struct{ Options map[string]any }

// gwAllocCheckResponse says whether the network needs no gateway address.
type gwAllocCheckResponse struct{ SkipIPv4, SkipIPv6 bool }

// register fills the mux: every method of the two APIs, in the order in which
// the engine's documentation has them.
func (s *socket) register() {
	constant(s, "Plugin.Activate", manifest{[]string{"NetworkDriver", "IpamDriver"}})

	// ConnectivityScope is said although it defaults to Scope: "global" is what
	// makes the engine gossip names and peers for our networks.
	constant(s, "NetworkDriver.GetCapabilities", network.CapabilitiesResponse{Scope: s.scope, ConnectivityScope: s.scope})
	handle(s, "NetworkDriver.AllocateNetwork", s.allocateNetwork)
	handle(s, "NetworkDriver.FreeNetwork", s.freeNetwork)
	handle(s, "NetworkDriver.CreateNetwork", s.createNetwork)
	handle(s, "NetworkDriver.DeleteNetwork", s.deleteNetwork)
	handle(s, "NetworkDriver.CreateEndpoint", s.createEndpoint)
	handle(s, "NetworkDriver.DeleteEndpoint", s.deleteEndpoint)
	handle(s, "NetworkDriver.EndpointOperInfo", s.endpointOperInfo)
	handle(s, "NetworkDriver.Join", s.join)
	handle(s, "NetworkDriver.Leave", s.leave)
	handle(s, "NetworkDriver.DiscoverNew", func(ctx context.Context, w network.DiscoveryNotification) (empty, error) {
		return s.discover(ctx, w, false)
	})
	handle(s, "NetworkDriver.DiscoverDelete", func(ctx context.Context, w network.DiscoveryNotification) (empty, error) {
		return s.discover(ctx, w, true)
	})
	handle(s, "NetworkDriver.ProgramExternalConnectivity", programExternalConnectivity)
	handle(s, "NetworkDriver.RevokeExternalConnectivity", revokeExternalConnectivity)
	handle(s, "NetworkDriver.GwAllocCheck", gwAllocCheck)

	constant(s, "IpamDriver.GetCapabilities", sluiceipam.GetCapabilities())
	constant(s, "IpamDriver.GetDefaultAddressSpaces", addressSpaces())
	handle(s, "IpamDriver.RequestPool", s.requestPool)
	handle(s, "IpamDriver.ReleasePool", s.releasePool)
	handle(s, "IpamDriver.RequestAddress", s.requestAddress)
	handle(s, "IpamDriver.ReleaseAddress", s.releaseAddress)
}

func (s *socket) allocateNetwork(ctx context.Context, w network.AllocateNetworkRequest) (network.AllocateNetworkResponse, error) {
	req, err := decodeAllocate(w)
	if err != nil {
		return network.AllocateNetworkResponse{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return network.AllocateNetworkResponse{}, err
	}
	opts, err := d.Allocate(ctx, req)
	return network.AllocateNetworkResponse{Options: opts}, err
}

func (s *socket) freeNetwork(ctx context.Context, w network.FreeNetworkRequest) (empty, error) {
	id, err := networkID(w.NetworkID)
	if err != nil {
		return empty{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.Free(ctx, id)
}

func (s *socket) createNetwork(ctx context.Context, w network.CreateNetworkRequest) (empty, error) {
	req, err := decodeCreate(w)
	if err != nil {
		return empty{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.CreateNetwork(ctx, req)
}

func (s *socket) deleteNetwork(ctx context.Context, w network.DeleteNetworkRequest) (empty, error) {
	id, err := networkID(w.NetworkID)
	if err != nil {
		return empty{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.DeleteNetwork(ctx, id)
}

func (s *socket) createEndpoint(ctx context.Context, w network.CreateEndpointRequest) (network.CreateEndpointResponse, error) {
	req, err := decodeEndpoint(w)
	if err != nil {
		return network.CreateEndpointResponse{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return network.CreateEndpointResponse{}, err
	}
	reply, err := d.CreateEndpoint(ctx, req)
	return encodeEndpoint(req, reply), err
}

func (s *socket) deleteEndpoint(ctx context.Context, w network.DeleteEndpointRequest) (empty, error) {
	n, e, err := endpointIDs(w.NetworkID, w.EndpointID)
	if err != nil {
		return empty{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.DeleteEndpoint(ctx, n, e)
}

// endpointOperInfo has nothing to tell: the engine takes only values of its own
// Go types from it, which no remote driver can send.
func (s *socket) endpointOperInfo(_ context.Context, w network.InfoRequest) (network.InfoResponse, error) {
	_, _, err := endpointIDs(w.NetworkID, w.EndpointID)
	return network.InfoResponse{Value: map[string]string{}}, err
}

func (s *socket) join(ctx context.Context, w network.JoinRequest) (network.JoinResponse, error) {
	req, err := decodeJoin(w)
	if err != nil {
		return network.JoinResponse{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return network.JoinResponse{}, err
	}
	reply, err := d.Join(ctx, req)
	return encodeJoin(reply), err
}

func (s *socket) leave(ctx context.Context, w network.LeaveRequest) (empty, error) {
	n, e, err := endpointIDs(w.NetworkID, w.EndpointID)
	if err != nil {
		return empty{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.Leave(ctx, n, e)
}

func (s *socket) discover(ctx context.Context, w network.DiscoveryNotification, gone bool) (empty, error) {
	node, isNode, err := decodeDiscovery(w, gone)
	if err != nil || !isNode {
		return empty{}, err
	}
	d, _, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.Discovered(ctx, node)
}

// programExternalConnectivity and its counterpart have nothing to do: Join
// names no gateway, so the engine attaches docker_gwbridge, and the bridge
// driver publishes the ports. Engines ask all the same.
func programExternalConnectivity(_ context.Context, w network.ProgramExternalConnectivityRequest) (empty, error) {
	_, _, err := endpointIDs(w.NetworkID, w.EndpointID)
	return empty{}, err
}

func revokeExternalConnectivity(_ context.Context, w network.RevokeExternalConnectivityRequest) (empty, error) {
	_, _, err := endpointIDs(w.NetworkID, w.EndpointID)
	return empty{}, err
}

// gwAllocCheck is not announced in the capabilities, and answered so that an
// engine that asks regardless goes on as before: every network has a gateway.
func gwAllocCheck(context.Context, gwAllocCheckRequest) (gwAllocCheckResponse, error) {
	return gwAllocCheckResponse{}, nil
}

func (s *socket) requestPool(ctx context.Context, w ipam.RequestPoolRequest) (ipam.RequestPoolResponse, error) {
	_, i, err := s.parts(ctx)
	if err != nil {
		return ipam.RequestPoolResponse{}, err
	}
	reply, err := i.RequestPool(ctx, sluiceipam.PoolRequest{
		Space: w.AddressSpace, Pool: w.Pool, SubPool: w.SubPool, Options: w.Options, V6: w.V6,
	})
	if err != nil {
		return ipam.RequestPoolResponse{}, err
	}
	return ipam.RequestPoolResponse{PoolID: reply.PoolID, Pool: reply.Pool.String(), Data: reply.Data}, nil
}

func (s *socket) releasePool(ctx context.Context, w ipam.ReleasePoolRequest) (empty, error) {
	_, i, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, i.ReleasePool(ctx, sluiceipam.ReleasePoolRequest{PoolID: w.PoolID})
}

func (s *socket) requestAddress(ctx context.Context, w ipam.RequestAddressRequest) (ipam.RequestAddressResponse, error) {
	_, i, err := s.parts(ctx)
	if err != nil {
		return ipam.RequestAddressResponse{}, err
	}
	reply, err := i.RequestAddress(ctx, sluiceipam.AddressRequest{PoolID: w.PoolID, Address: w.Address, Options: w.Options})
	if err != nil {
		return ipam.RequestAddressResponse{}, err
	}
	return ipam.RequestAddressResponse{Address: reply.Address.String()}, nil
}

func (s *socket) releaseAddress(ctx context.Context, w ipam.ReleaseAddressRequest) (empty, error) {
	_, i, err := s.parts(ctx)
	if err != nil {
		return empty{}, err
	}
	return empty{}, i.ReleaseAddress(ctx, sluiceipam.ReleaseAddressRequest{PoolID: w.PoolID, Address: w.Address})
}
