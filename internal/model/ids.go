package model

import (
	"fmt"
	"net/netip"
	"strings"
)

// NetworkID is the engine's id of a network: 25 characters for a swarm network,
// 64 hexadecimal digits for one that is local to an engine.
type NetworkID string

// EndpointID is the engine's id of an endpoint: 64 hexadecimal digits, new at
// every start of a container.
type EndpointID string

// ServiceID is swarm's id of a service, 25 characters. It survives a rename.
type ServiceID string

// TaskID is swarm's id of a task, 25 characters.
type TaskID string

// NodeID is swarm's id of a node, or the host name where there is no swarm.
type NodeID string

// Short is the id's first twelve characters, which is what the docker command shows.
func (id NetworkID) Short() string { return short(string(id)) }

// Short is the id's first twelve characters, which is what the docker command shows.
func (id EndpointID) Short() string { return short(string(id)) }

func short(s string) string { return s[:min(len(s), 12)] }

// VNI is a VXLAN network identifier, 24 bits (RFC 7348 section 5).
type VNI uint32

// MaxVNI is the largest VNI.
const MaxVNI VNI = 1<<24 - 1

// MAC is an Ethernet address, comparable and usable as a map key.
type MAC [6]byte

// IsZero reports whether m is unset.
func (m MAC) IsZero() bool { return m == MAC{} }

// String is the usual form, 02:42:0a:ff:00:02.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// MarshalText implements encoding.TextMarshaler with the usual form; the zero
// MAC is empty text.
func (m MAC) MarshalText() ([]byte, error) {
	if m.IsZero() {
		return nil, nil
	}
	return []byte(m.String()), nil
}

// UnmarshalText implements encoding.TextUnmarshaler; see ParseMAC.
func (m *MAC) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*m = MAC{}
		return nil
	}
	p, err := ParseMAC(string(b))
	if err != nil {
		return err
	}
	*m = p
	return nil
}

// ParseMAC reads six hexadecimal octets separated by colons.
func ParseMAC(s string) (MAC, error) {
	var m MAC
	parts := strings.Split(s, ":")
	if len(parts) != len(m) {
		return MAC{}, fmt.Errorf("MAC address %q: want six octets like 02:42:0a:ff:00:02", s)
	}
	for i, p := range parts {
		hi, lo := -1, -1
		if len(p) == 2 {
			hi, lo = nibble(p[0]), nibble(p[1])
		}
		if hi < 0 || lo < 0 {
			return MAC{}, fmt.Errorf("MAC address %q: octet %q is not two hexadecimal digits", s, p)
		}
		m[i] = byte(hi<<4 | lo)
	}
	return m, nil
}

func nibble(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// MACFor derives a MAC from an IPv4 address: 02:42 and the four octets, as
// Docker's own drivers do, so that a neighbour entry can be computed by anybody
// who knows the address. It is the zero MAC for anything but IPv4.
func MACFor(a netip.Addr) MAC {
	a = a.Unmap()
	if !a.Is4() {
		return MAC{}
	}
	b := a.As4()
	return MAC{0x02, 0x42, b[0], b[1], b[2], b[3]}
}
