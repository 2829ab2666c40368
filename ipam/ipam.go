package ipam

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// Names of the address spaces. They end up in PoolIDs that the engine keeps, so
// they never change.
const (
	LocalSpace  = "sluice-local"
	GlobalSpace = "sluice-global"
)

// Capabilities is the answer to IpamDriver.GetCapabilities.
type Capabilities struct {
	RequiresMACAddress    bool
	RequiresRequestReplay bool
}

// GetCapabilities answers from constants, as the engine asks while it starts.
// No MAC is needed to choose an address. No replay is wanted: it would concern
// the local networks of this engine only, which are in the journal, and could
// not be told from somebody else's request for the same subnet.
func GetCapabilities() Capabilities { return Capabilities{} }

// AddressSpaces is the answer to IpamDriver.GetDefaultAddressSpaces.
type AddressSpaces struct{ Local, Global string }

// GetDefaultAddressSpaces answers from constants. The two have to differ: the
// leader's allocator uses one and its libnetwork the other, for the same
// addresses.
func GetDefaultAddressSpaces() AddressSpaces {
	return AddressSpaces{Local: LocalSpace, Global: GlobalSpace}
}

// Scope is the scope of the networks that the plugin makes.
type Scope int

const (
	ScopeGlobal Scope = iota // networks of a swarm
	ScopeLocal               // networks of this engine
)

// Config is what an Allocator has to know. The functions are called with the
// lock held: they answer from memory and do not call the Allocator.
type Config struct {
	Scope Scope

	// Supernets and Bits: where the subnet of a network comes from that asked for
	// none, and how large it is. Zero values are pool.DefaultSupernets and
	// pool.DefaultBits.
	Supernets []netip.Prefix
	Bits      int

	// Routes returns the destinations of this host's routes, which such a subnet
	// stays away from. Default routes do no harm. Nil: none.
	Routes func() []netip.Prefix

	// NetworkName returns what people call a network. Nil: its short id.
	NetworkName func(model.NetworkID) string

	// Held returns the addresses of the endpoints of a network that are known to
	// exist, on any node: they are not given away after a change of leader,
	// whatever Swarm remembers. Nil: none.
	Held func(model.NetworkID) []netip.Addr

	// Blank says that the journal may lack pools that the swarm has: it is new, or was
	// lost. What depends on it waits for Recovered.
	Blank bool

	// Now is the clock that tells how long nobody has had a lease, and when one was
	// given back. Nil: time.Now.
	Now func() time.Time

	Journal Journal      // required
	Log     *slog.Logger // nil: silent
}

// Allocator serves the IPAM verbs of one plugin. Safe for concurrent use.
type Allocator struct {
	scope   Scope
	space   string // the one that table is for
	list    pool.List
	routes  func() []netip.Prefix
	held    func(model.NetworkID) []netip.Addr
	now     func() time.Time
	journal Journal
	log     *slog.Logger

	recovered chan struct{} // closed when no pool is missing
	whole     sync.Once     // closes it

	// mu guards table, and holds the order of commits and changes together, so it
	// is held while Journal.Commit runs. Rank 3, above the journal's own locks and
	// those behind Config's functions, which may be taken while it is held; nothing
	// that is called with it held may call the Allocator.
	mu    sync.Mutex
	table *pool.Table
}

// Open returns an Allocator with the state of its journal. Settings that cannot
// work and a journal that cannot be read are errors: going on without the leases
// would give addresses to two containers.
func Open(ctx context.Context, c Config) (*Allocator, error) {
	a := &Allocator{
		scope:   c.Scope,
		space:   GlobalSpace,
		list:    pool.List{Supernets: c.Supernets, Bits: c.Bits},
		routes:  c.Routes,
		held:    c.Held,
		now:     c.Now,
		journal: c.Journal,
		log:     c.Log,

		recovered: make(chan struct{}),
	}
	if !c.Blank || c.Scope == ScopeLocal {
		a.Recovered()
	}
	mode := pool.Replayed
	if c.Scope == ScopeLocal {
		a.space, mode = LocalSpace, pool.Exclusive
	}
	if len(a.list.Supernets) == 0 {
		a.list.Supernets = pool.DefaultSupernets()
	}
	if a.list.Bits == 0 {
		a.list.Bits = pool.DefaultBits
	}
	if err := a.list.Check(); err != nil {
		return nil, fmt.Errorf("default pools: %w", err)
	}
	if a.routes == nil {
		a.routes = func() []netip.Prefix { return nil }
	}
	if a.held == nil {
		a.held = func(model.NetworkID) []netip.Addr { return nil }
	}
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	a.table = pool.NewTable(a.space, mode, c.NetworkName)
	records, err := a.journal.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("load ipam journal: %w", err)
	}
	if err := restore(a.table, a.space, records); err != nil {
		return nil, fmt.Errorf("load ipam journal: %w", err)
	}
	return a, nil
}

// commitLocked journals a change, if there is something to journal, and then
// applies it. If the journal refuses, the table is unchanged.
func (a *Allocator) commitLocked(ctx context.Context, c pool.Change) error {
	if c.Durable() {
		puts, deletes, err := a.recordsLocked(c)
		if err != nil {
			return err
		}
		if err := a.journal.Commit(ctx, puts, deletes); err != nil {
			return fmt.Errorf("write ipam journal: %w", err)
		}
	}
	a.table.Apply(c)
	return nil
}
