package ipam

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sluice/internal/model"
)

// script runs lines of calls as the engine was seen to make them, and compares
// each answer. A line is "CALL -> ANSWER"; without an answer the call succeeds.
//
//	pool SPACE CIDR|- [sub=CIDR] [KEY=VALUE]...   RequestPool      -> PoolID
//	gw|vip|ask POOLID ADDRESS|-                   RequestAddress   -> address/mask
//	rel POOLID ADDRESS, relpool POOLID            ReleaseAddress, ReleasePool
//	bind NETWORK CIDR [again], free NETWORK       AllocateNetwork, FreeNetwork
//	confirm NETWORK ADDRESS...                    background reader -> -dropped +adopted
//	held ADDRESS...                               endpoints that the nodes have from now on
//	follow                                        another manager leads
//	restart                                       the plugin process
//	show                                          -> pool NETWORK used/unconfirmed, ...
//
// gw has the option of a gateway's request, vip and gw the mark of Swarm's
// allocator, ask nothing as a node's libnetwork. "g" and "l" are the spaces. An
// answer "!text" is an error that holds the text, "nothing" an empty answer.
type script struct {
	t     *testing.T
	scope Scope
	j     *fakeJournal
	a     *Allocator
	held  []netip.Addr
}

func run(t *testing.T, scope Scope, text string) {
	t.Helper()
	s := &script{t: t, scope: scope, j: newJournal(t)}
	s.a = s.open()
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		call, want, _ := strings.Cut(line, " -> ")
		before := s.j.commits
		got, err := s.call(strings.Fields(call))
		switch {
		case err != nil:
			got = "!" + err.Error()
		case got == "":
			got = "nothing"
		}
		switch {
		case strings.HasPrefix(want, "!"):
			if err == nil || !strings.Contains(err.Error(), want[1:]) {
				t.Errorf("%s\n got %s", line, got)
			}
		case err != nil, want != "" && got != want:
			t.Errorf("%s\n got %s", line, got)
		}
		if s.j.commits > before+1 {
			t.Errorf("%s: %d commits", line, s.j.commits-before)
		}
		if err := s.a.table.Check(); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
}

func (s *script) open() *Allocator {
	s.t.Helper()
	a, err := Open(s.t.Context(), Config{Scope: s.scope, Journal: s.j, Held: func(model.NetworkID) []netip.Addr { return s.held }})
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

func (s *script) call(f []string) (string, error) {
	ctx := s.t.Context()
	arg := func(i int) string {
		if i >= len(f) || f[i] == "-" {
			return ""
		}
		if rest, ok := strings.CutPrefix(f[i], "g/"); ok {
			return GlobalSpace + "/" + rest
		}
		if rest, ok := strings.CutPrefix(f[i], "l/"); ok {
			return LocalSpace + "/" + rest
		}
		return f[i]
	}
	spaces := strings.NewReplacer(GlobalSpace, "g", LocalSpace, "l")
	switch f[0] {
	case "pool":
		r := PoolRequest{Space: map[string]string{"g": GlobalSpace, "l": LocalSpace}[f[1]], Pool: arg(2), Options: map[string]string{}}
		for _, kv := range f[3:] {
			switch k, v, _ := strings.Cut(kv, "="); k {
			case "sub":
				r.SubPool = v
			case "v6":
				r.V6 = true
			default:
				r.Options[k] = v
			}
		}
		reply, err := s.a.RequestPool(ctx, r)
		if err == nil && !strings.Contains(reply.PoolID, reply.Pool.String()) {
			s.t.Errorf("pool %s in reply for %s", reply.Pool, reply.PoolID)
		}
		return spaces.Replace(reply.PoolID), err
	case "gw", "vip", "ask":
		r := AddressRequest{PoolID: arg(1), Address: arg(2), Options: map[string]string{"com.docker.network.ipam.serial": "true"}}
		switch f[0] {
		case "gw":
			r.Options["RequestAddressType"] = "com.docker.network.gateway"
		case "ask":
			r.Options = nil
		}
		reply, err := s.a.RequestAddress(ctx, r)
		return reply.Address.String(), err
	case "rel":
		return "", s.a.ReleaseAddress(ctx, ReleaseAddressRequest{arg(1), arg(2)})
	case "relpool":
		return "", s.a.ReleasePool(ctx, ReleasePoolRequest{arg(1)})
	case "bind":
		return "", s.a.Bind(ctx, model.NetworkID(f[1]), netip.MustParsePrefix(f[2]), len(f) > 3)
	case "free":
		return "", s.a.Free(ctx, model.NetworkID(f[1]))
	case "confirm":
		var live []netip.Addr
		for _, a := range f[2:] {
			live = append(live, netip.MustParseAddr(a))
		}
		found, err := s.a.Confirm(ctx, model.NetworkID(f[1]), live, time.Now())
		var out []string
		for _, a := range found.Dropped {
			out = append(out, "-"+a.String())
		}
		for _, a := range found.Adopted {
			out = append(out, "+"+a.String())
		}
		return strings.Join(out, " "), err
	case "follow":
		s.a.Follow(time.Now().Add(time.Second)) // two readings of a clock may be equal
		return "", nil
	case "held":
		s.held = nil
		for _, a := range f[1:] {
			s.held = append(s.held, netip.MustParseAddr(a))
		}
		return "", nil
	case "restart":
		s.a = s.open()
		return "", nil
	case "show":
		var out []string
		for _, p := range s.a.Snapshot() {
			out = append(out, fmt.Sprintf("%s %q %d/%d", p.ID.Subnet, p.Network, p.Used, p.Unconfirmed))
		}
		return strings.Join(out, ", "), nil
	}
	return "", fmt.Errorf("no such call: %v", f)
}
