package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Operations.
const (
	opNetwork   = "network create"
	opNoNetwork = "network rm"
	opService   = "service create"
	opNoService = "service rm"
	opScale     = "service scale"
	opUpdate    = "service update --force"
	opRollback  = "service rollback"
	opPublish   = "port published"
	opUnpublish = "port published no more"
	opClient    = "docker run"
	opNoClient  = "docker rm"
	opAsk       = "requests to a service"
	opRolling   = "rolling update"
	opDrain     = "node drain, active"
	opDemote    = "node demote, promote"
)

// action is one operation or fault, as chosen.
type action struct {
	kind     string
	name     string // of the network, service or client it is about
	network  string // that a service or client is on
	at       string // how a service says so
	client   string // that asks
	hosts    []int  // that it is about or strikes
	replicas int
	port     int // that is published; 0 is none
	options  []string
	lasts    time.Duration // of a fault that has a length
	// during is an operation that is done while a fault lasts.
	during *action
}

// service is one that comes and goes.
type service struct {
	name, network string
	replicas      int
	port          int
	dnsrr         bool
	masquerade    bool // of what comes by its port
}

// at is how the service says which network it is on: what --network takes.
func (s service) at() string {
	words := []string{"name=" + s.network}
	if s.port != 0 {
		words = append(words, fmt.Sprintf("driver-opt=sluice.publish=%d:80;%d:53/udp", s.port, s.port))
		if s.masquerade {
			words = append(words, "driver-opt=sluice.source=masquerade")
		}
	}
	return strings.Join(words, ",")
}

// client is a container that comes and goes.
type client struct {
	name, network string
	host          int
}

// plan chooses what comes next. It knows what the choices before have left; that they
// are done before the next is asked for is the caller's.
type plan struct {
	rand     *rand.Rand
	hosts    int
	networks []string
	services []service
	clients  []client
	steady   []string // services that only rolling updates touch
	modes    []string // of networks, those that the kernel can
	made     int      // things so far, for names that never come again
	faults   []string // kinds that are still to come before any comes again
	ops      []string // likewise
	turn     int
}

// Bounds of what comes and goes: enough that things meet, and on two processors no task
// starts much later because of others.
const (
	maxNetworks = 3
	maxServices = 3
	maxClients  = 3
	maxReplicas = 3
	// churnPorts begins the published ports of these services.
	churnPorts = 8100
	maxPorts   = 800
)

func newPlan(seed uint64, hosts int, steady, modes []string) *plan {
	return &plan{rand: rand.New(rand.NewPCG(seed, 0)), hosts: hosts, steady: steady, modes: modes}
}

// next is the next action: an operation and a fault in turn.
func (p *plan) next() action {
	p.turn++
	if p.turn%2 == 0 {
		return p.fault()
	}
	return p.operation(true)
}

// deal takes one of the kinds that are left for which fits says yes, and begins anew
// with all when there is none.
func (p *plan) deal(left *[]string, all []string, fits func(string) bool) string {
	i := slices.IndexFunc(*left, fits)
	if i < 0 {
		deck := slices.Clone(all)
		p.rand.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		*left = append(*left, deck...)
		i = slices.IndexFunc(*left, fits)
	}
	kind := (*left)[i]
	*left = slices.Delete(*left, i, i+1)
	return kind
}

// fault chooses a fault.
func (p *plan) fault() action {
	kinds := make([]string, 0, len(faults))
	for kind := range faults {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds) // maps have no order, the seed's choices have
	a := action{kind: p.deal(&p.faults, kinds, func(string) bool { return true })}
	// Long enough that peers notice, and short enough that the swarm does not take a
	// node for lost each time (15 s).
	a.lasts = time.Second + time.Duration(p.rand.IntN(7000))*time.Millisecond
	first := p.rand.IntN(p.hosts)
	a.hosts = []int{first + 1}
	switch a.kind {
	case "plugins killed":
		a.hosts = nil
		for i := range p.hosts {
			a.hosts = append(a.hosts, i+1)
		}
	case "hosts cut off":
		a.hosts = append(a.hosts, (first+1+p.rand.IntN(p.hosts-1))%p.hosts+1)
	}
	if p.rand.IntN(2) == 0 {
		during := p.operation(false)
		a.during = &during
	}
	return a
}

// operation chooses an operation; with alone, also one that nothing else may go on
// beside.
func (p *plan) operation(alone bool) action {
	all := []string{opNetwork, opNoNetwork, opService, opNoService, opScale, opUpdate, opRollback,
		opPublish, opUnpublish, opClient, opNoClient, opAsk, opAsk, opRolling, opDrain, opDemote,
		// More is made than removed: removing needs something that is there.
		opNetwork, opService, opService, opClient, opClient}
	kind := p.deal(&p.ops, all, func(kind string) bool { return p.possible(kind, alone) })
	return p.choose(kind)
}

// possible says whether an operation makes sense now.
func (p *plan) possible(kind string, alone bool) bool {
	switch kind {
	case opNetwork:
		return len(p.networks) < maxNetworks
	case opNoNetwork:
		return p.emptyNetwork() >= 0
	case opService:
		return len(p.networks) > 0 && len(p.services) < maxServices
	case opNoService, opScale, opUpdate, opRollback:
		return len(p.services) > 0
	case opPublish:
		return slices.ContainsFunc(p.services, unpublished)
	case opUnpublish:
		return slices.ContainsFunc(p.services, published)
	case opClient:
		return len(p.networks) > 0 && len(p.clients) < maxClients
	case opNoClient:
		return len(p.clients) > 0
	case opAsk:
		return alone && len(p.askable()) > 0
	}
	return alone // rolling updates, drain and demote
}

func published(s service) bool   { return s.port != 0 }
func unpublished(s service) bool { return s.port == 0 }

// emptyNetwork is the index of a network that nothing uses, -1 if there is none.
func (p *plan) emptyNetwork() int {
	return slices.IndexFunc(p.networks, func(n string) bool {
		return !slices.ContainsFunc(p.services, func(s service) bool { return s.network == n }) &&
			!slices.ContainsFunc(p.clients, func(c client) bool { return c.network == n })
	})
}

// pair is a client and a service that it can ask.
type pair struct {
	client  client
	service service
}

func (p *plan) askable() []pair {
	var all []pair
	for _, c := range p.clients {
		for _, s := range p.services {
			if c.network == s.network && s.replicas > 0 {
				all = append(all, pair{c, s})
			}
		}
	}
	return all
}

func pick[T any](p *plan, of []T) T { return of[p.rand.IntN(len(of))] }

// name is one that was never used.
func (p *plan) name(prefix string) string {
	p.made++
	return fmt.Sprintf("%s%d", prefix, p.made)
}

// choose fills in an operation, and notes what it will have changed.
func (p *plan) choose(kind string) action {
	a := action{kind: kind, hosts: []int{1 + p.rand.IntN(p.hosts)}}
	some := func(fits func(service) bool) *service {
		var those []*service
		for i := range p.services {
			if fits(p.services[i]) {
				those = append(those, &p.services[i])
			}
		}
		s := pick(p, those)
		a.name, a.network, a.replicas, a.port = s.name, s.network, s.replicas, s.port
		return s
	}
	anyone := func(service) bool { return true }
	switch kind {
	case opNetwork:
		a.name = p.name("net")
		a.options = []string{"-o", "sluice.mode=" + pick(p, p.modes), "-o", "sluice.scheduler=" + pick(p, []string{"rr", "wrr", "sh"})}
		if p.rand.IntN(2) == 0 {
			a.options = append(a.options, "--subnet", fmt.Sprintf("10.90.%d.0/24", p.made%256))
		}
		p.networks = append(p.networks, a.name)
	case opNoNetwork:
		i := p.emptyNetwork()
		a.name = p.networks[i]
		p.networks = slices.Delete(p.networks, i, i+1)
	case opService:
		a.name, a.network, a.replicas = p.name("service"), pick(p, p.networks), 1+p.rand.IntN(maxReplicas)
		s := service{name: a.name, network: a.network, replicas: a.replicas}
		if s.dnsrr = p.rand.IntN(4) == 0; s.dnsrr {
			a.options = []string{"--endpoint-mode", "dnsrr"}
		}
		if p.rand.IntN(2) == 0 {
			s.port = churnPorts + p.made%maxPorts
		}
		s.masquerade = p.rand.IntN(4) == 0
		a.port = s.port
		a.at = s.at()
		p.services = append(p.services, s)
	case opNoService:
		s := some(anyone)
		gone := s.name
		p.services = slices.DeleteFunc(p.services, func(o service) bool { return o.name == gone })
	case opScale:
		s := some(anyone)
		s.replicas = p.rand.IntN(maxReplicas + 2)
		a.replicas = s.replicas
	case opUpdate, opRollback:
		some(anyone)
	case opPublish:
		s := some(unpublished)
		p.made++
		s.port = churnPorts + p.made%maxPorts
		a.port, a.at = s.port, s.at()
	case opUnpublish:
		s := some(published)
		s.port, a.port = 0, 0
		a.at = s.at()
	case opClient:
		a.name, a.network = p.name("client"), pick(p, p.networks)
		p.clients = append(p.clients, client{a.name, a.network, a.hosts[0]})
	case opNoClient:
		i := p.rand.IntN(len(p.clients))
		a.name, a.network, a.hosts = p.clients[i].name, p.clients[i].network, []int{p.clients[i].host}
		p.clients = slices.Delete(p.clients, i, i+1)
	case opAsk:
		x := pick(p, p.askable())
		a.name, a.client, a.hosts, a.port = x.service.name, x.client.name, []int{x.client.host}, x.service.port
	case opRolling:
		a.name = pick(p, p.steady)
	}
	return a
}
