package driver_test

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/driver"
	"sluice/internal/model"
	"sluice/internal/options"
)

func TestWhatAllocateRefusesIsToldOnTheNodes(t *testing.T) {
	ipv6 := driver.Subnet{Pool: prefix("fd00::/64")}
	for _, c := range []struct {
		name    string
		request driver.AllocateRequest
		text    string
	}{
		{"an unknown option", driver.AllocateRequest{Subnets: plain, Options: map[string]string{"sluice.colour": "red"}}, "sluice.colour"},
		{"an unknown mode", driver.AllocateRequest{Subnets: plain, Options: map[string]string{"sluice.mode": "warp"}}, "dr"},
		{"a scheduler that nft cannot do", driver.AllocateRequest{Subnets: plain, Options: map[string]string{"sluice.datapath": "nft", "sluice.scheduler": "wlc"}}, `sluice.scheduler="wlc": wlc needs`},
		{"two subnets", driver.AllocateRequest{Subnets: append(plain, subnet("10.254.0.0/20", "10.254.0.1/20"))}, "2 IPv4 subnets"},
		{"no subnet", driver.AllocateRequest{}, "0 IPv4 subnets"},
		{"an IPv6 subnet among the others", driver.AllocateRequest{Subnets: append(plain, ipv6)}, "without --ipv6"},
		{"an IPv6 subnet where it belongs", driver.AllocateRequest{Subnets: plain, V6: 1}, "without --ipv6"},
		{"a VNI in use", driver.AllocateRequest{Subnets: plain, Options: map[string]string{"sluice.vni": "77"}}, "VNI 77 is in use"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, false)
			h.has(t, "another", 77)
			c.request.Network = web
			out, err := h.Allocate(t.Context(), c.request)
			if err != nil {
				t.Fatalf("the leader's allocator would try for ever: %v", err)
			}
			complains(t, errors.New(out[options.Refused]), c.text)
			err = h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: out, Subnets: plain})
			complains(t, err, out[options.Refused])
			if len(h.hub.View().Networks) > 0 {
				t.Error("it was recorded all the same")
			}

			// What was wrong may be right at the next replay: a former refusal is no reason.
			_ = h.book.Free(t.Context(), "another")
			good := maps.Clone(out)
			delete(good, "sluice.colour")
			delete(good, "sluice.mode")
			delete(good, "sluice.scheduler")
			if out, err := h.Allocate(t.Context(), driver.AllocateRequest{Network: web, Options: good, Subnets: plain}); err != nil || out[options.Refused] != "" {
				t.Errorf("still refused: %q, %v", out[options.Refused], err)
			}
		})
	}
}

// has gives a network a VNI and a pool.
func (h *host) has(t *testing.T, id model.NetworkID, vni model.VNI) {
	t.Helper()
	if _, err := h.book.VNI(t.Context(), id, vni); err != nil {
		t.Fatal(err)
	}
	if err := h.pools.Bind(t.Context(), id, prefix("10.9.0.0/24"), false); err != nil {
		t.Fatal(err)
	}
}

// TestAVNIOfAFormerLeadIsGivenAway to the network that another leader gave it to, and to
// none that was refused it.
func TestAVNIOfAFormerLeadIsGivenAway(t *testing.T) {
	given := map[string]string{options.VNI: "77", options.SecretKey: strings.Repeat("ab", 32)}
	refused := map[string]string{options.VNI: "77", options.Refused: "VNI 77 is in use"}
	for _, c := range []struct {
		name   string
		opts   map[string]string
		former bool
		want   bool
	}{
		{"told of by a new leader's allocator", given, true, true},
		{"made now, where the other was not told of", map[string]string{options.VNI: "77"}, true, false},
		{"refused before", refused, true, false},
		{"in this lead", given, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, false)
			h.has(t, "another", 77)
			if c.former {
				h.Follow(time.Now())
			}
			out, err := h.Allocate(t.Context(), driver.AllocateRequest{Network: web, Options: c.opts, Subnets: plain})
			if got := out[options.Refused] == ""; err != nil || got != c.want {
				t.Fatalf("refused: %q, %v", out[options.Refused], err)
			}
			want := []model.NetworkID{web}
			if !c.want {
				want = []model.NetworkID{"another", web} // its pool
			}
			if got := h.Allocated(); !slices.Equal(got, want) {
				t.Errorf("networks with a pool or a VNI: %v, want %v", got, want)
			}
		})
	}
	t.Run("its disk is full", func(t *testing.T) {
		h := newHost(t, false)
		h.has(t, "another", 77)
		h.Follow(time.Now())
		h.journal.fail = errDisk
		if out, err := h.Allocate(t.Context(), driver.AllocateRequest{Network: web, Options: given, Subnets: plain}); !errors.Is(err, errDisk) {
			t.Errorf("%v, %v", out, err)
		}
	})
}

func TestAllocateEchoesAndReplays(t *testing.T) {
	h := newHost(t, false)
	given := map[string]string{"sluice.scheduler": "sh", "com.docker.network.driver.mtu": "1400"}
	first := h.allocated(t, given)
	for k, v := range given {
		if first[k] != v {
			t.Errorf("%s: %q, want it as it was given, %q", k, first[k], v)
		}
	}
	if first[options.MTU] != "" {
		t.Errorf("the MTU is given twice: %v", first)
	}
	for name, other := range map[string]*host{"the same leader": h, "another leader": newHost(t, false)} {
		if again := other.allocated(t, first); !maps.Equal(first, again) {
			t.Errorf("%s answers a replay with something else: %s", name, cmp.Diff(options.Redact(first), options.Redact(again)))
		}
		key, err := options.DecodeKey(first[options.SecretKey])
		if keys := other.ring.Keys(); err != nil || len(keys) != 1 || !bytes.Equal(keys[0], key) {
			t.Errorf("%s does not have the network's key as its only one", name)
		}
	}
	if h.pools.bound[web] != prefix("10.255.0.0/20") {
		t.Errorf("bound: %v", h.pools.bound)
	}

	// Two leaders that know nothing of each other choose alike, but for the key.
	a, b := newHost(t, false).allocated(t, nil), newHost(t, false).allocated(t, nil)
	if a[options.VNI] != b[options.VNI] || a[options.SecretKey] == b[options.SecretKey] {
		t.Errorf("VNIs %s and %s", a[options.VNI], b[options.VNI])
	}
	if a[options.MTU] != "1450" {
		t.Errorf("MTU %q", a[options.MTU])
	}
}

// TestKeysAreUnited: a network that was pending got a key before the leader was
// told of the older ones.
func TestKeysAreUnited(t *testing.T) {
	old, leader := newHost(t, false), newHost(t, false)
	before := old.allocated(t, nil)
	pending, err := leader.Allocate(t.Context(), driver.AllocateRequest{Network: "pending", Subnets: plain})
	if err != nil {
		t.Fatal(err)
	}
	leader.allocated(t, before)
	if n := len(leader.ring.Keys()); n != 2 {
		t.Fatalf("%d keys", n)
	}
	node := newHost(t, false)
	for id, opts := range map[model.NetworkID]map[string]string{web: before, "pending": pending} {
		if err := node.CreateNetwork(t.Context(), driver.CreateRequest{Network: id, Options: opts, Subnets: plain}); err != nil {
			t.Fatal(err)
		}
	}
	for i, k := range node.ring.Keys() {
		if !bytes.Equal(k, leader.ring.Keys()[i]) {
			t.Error("leader and node disagree about the order of keys")
		}
	}
}

// TestAKeyInAnyCaseIsOneKey: options are read without regard to case.
func TestAKeyInAnyCaseIsOneKey(t *testing.T) {
	h := newHost(t, false)
	out := h.allocated(t, map[string]string{"Sluice.Secret-Key": strings.Repeat("0a", 16)})
	if err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: out, Subnets: plain}); err != nil {
		t.Fatal(err)
	}
	if keys := h.ring.Keys(); len(keys) != 1 || !bytes.Equal(keys[0], bytes.Repeat([]byte{10}, 16)) {
		t.Errorf("%d keys", len(keys))
	}
}

func TestAllocateFailsForWhatMakesPoolsUnusable(t *testing.T) {
	h := newHost(t, false)
	h.pools.fail = errors.New("pool 10.255.0.0/20 is network db's")
	_, err := h.Allocate(t.Context(), driver.AllocateRequest{Network: web, Subnets: plain})
	complains(t, err, "allocate network webnetwork00", "is network db's")
	h.pools.fail = nil
	h.journal.fail = errDisk
	if out, err := h.Allocate(t.Context(), driver.AllocateRequest{Network: web, Subnets: plain}); err == nil && out[options.Refused] == "" {
		t.Error("allocated, and nothing is recorded")
	}
}

func TestAllocateWithoutADataPathAddress(t *testing.T) {
	h := newHost(t, false)
	h.mtu = errors.New("no such device")
	out := h.allocated(t, nil)
	if out[options.Refused] != "" || out[options.MTU] != "" {
		t.Errorf("got %v", options.Redact(out))
	}
	err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: out, Subnets: plain})
	complains(t, err, "find the MTU", "192.168.0.1", "no such device")
}
