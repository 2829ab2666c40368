package main

import (
	"github.com/docker/go-plugins-helpers/network"

	"sluice/driver"
)

// encodeEndpoint is CreateEndpoint's answer. What the request had must stay
// empty: the engine takes a second address or MAC, even the same, for an attempt
// to change it, and fails the endpoint (moby libnetwork/endpoint_info.go).
func encodeEndpoint(req driver.EndpointRequest, reply driver.EndpointReply) network.CreateEndpointResponse {
	var i network.EndpointInterface
	if req.MAC.IsZero() && !reply.MAC.IsZero() {
		i.MacAddress = reply.MAC.String()
	}
	return network.CreateEndpointResponse{Interface: &i}
}

// encodeJoin is Join's answer. It has neither gateway nor routes; see
// driver.JoinReply.
func encodeJoin(r driver.JoinReply) network.JoinResponse {
	return network.JoinResponse{InterfaceName: network.InterfaceName{SrcName: r.SrcName, DstPrefix: r.DstPrefix}}
}
