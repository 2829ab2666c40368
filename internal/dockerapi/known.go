package dockerapi

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"sluice/internal/model"
)

// known is what the parts have read, each as it came. Every map is replaced as a
// whole and never changed, because snapshots share them.
type known struct {
	alias string

	info      info
	infoAt    time.Time
	infoValid bool

	containers      map[model.EndpointID]model.EngineEndpoint // on networks of any driver
	containersAt    time.Time
	containersValid bool
	sandboxes       map[model.EndpointID]string

	networks      map[model.NetworkID]model.EngineNetwork
	waiting       map[model.NetworkID]string // not allocated yet, by anybody
	networksValid bool
	gossip        map[model.NetworkID]gossip

	services     map[model.ServiceID]model.Service // with networks of any driver
	tasks        tasks
	clusterAt    time.Time // of services and tasks
	clusterValid bool      // services and tasks
	nodes        nodes
	nodesAt      time.Time
	nodesValid   bool
}

// doubt keeps everything and marks it as not believed.
func (k *known) doubt() {
	k.infoValid, k.containersValid, k.networksValid = false, false, false
	k.doubtCluster()
}

func (k *known) doubtCluster() { k.clusterValid, k.nodesValid = false, false }

// snapshot joins the parts and leaves out what belongs to other drivers.
func (k *known) snapshot() model.EngineSnapshot {
	s := model.EngineSnapshot{
		Alias:    k.alias,
		HostName: k.info.hostName,
		Version:  k.info.version,
		DataRoot: k.info.dataRoot,

		SwarmValid: k.infoValid,
		SwarmAt:    k.infoAt,
		Active:     k.info.active,
		NoSwarm:    k.info.none,
		Node:       k.info.node,
		NodeAddr:   k.info.addr,
		Managers:   k.info.managers,
		Manager:    k.info.manager,

		// Whether an endpoint is ours is known only with the list of networks.
		ContainersValid: k.containersValid && k.networksValid,
		ContainersAt:    k.containersAt,
		Containers:      make(map[model.EndpointID]model.EngineEndpoint),

		NetworksValid: k.networksValid,
		Unallocated:   k.waiting,
		Networks:      make(map[model.NetworkID]model.EngineNetwork, len(k.networks)),
	}
	// The cluster's word counts while this node is a manager of it.
	if k.info.active && k.info.manager {
		// Without a network of ours nobody asks for services, and none is ours.
		s.ServicesValid = k.infoValid && k.nodesValid && k.networksValid && (k.clusterValid || len(k.networks) == 0)
		s.ServicesAt = k.clusterAt
		s.Leader = s.ServicesValid && k.nodes.leader != "" && k.nodes.leader == k.info.node
		if s.Leader {
			s.LeaderAt = k.nodesAt
		}
		s.Follows = k.follows()
		s.Leaving = k.tasks.leaving
		s.Nodes = k.nodes.all
		s.Services = k.ourServices()
		s.Holders = k.holders(s.Services)
		s.Live = live(s.Holders)
	}
	for id, n := range k.networks {
		n.Peers, n.Services = k.gossip[id].peers, k.gossip[id].services
		s.Networks[id] = n
	}
	for id, c := range k.containers {
		n, ours := s.Networks[c.Network]
		if !ours {
			continue
		}
		c.Sandbox = k.sandboxes[id]
		if c.Task.Service != "" {
			c.Task.VIP = n.Services[c.Task.ServiceName].VIP
			if sv, ok := s.Services[c.Task.Service]; ok && s.ServicesValid {
				c.Task.VIP = sv.VIPs[c.Network] // by id: true also while a service is renamed
			}
		}
		if s.ServicesValid {
			_, c.Task.Leaving = slices.BinarySearch(s.Leaving, c.Task.ID)
		}
		s.Containers[id] = c
	}
	return s
}

// follows is EngineSnapshot.Follows. The nodes are those of this node's swarm if it is
// among them: it may just have changed to another.
func (k *known) follows() time.Time {
	if _, member := k.nodes.all[k.info.node]; !member || !k.infoValid || !k.info.active || !k.info.manager || !k.nodesValid ||
		k.nodes.leader == "" || k.nodes.leader == k.info.node {
		return time.Time{}
	}
	return k.nodesAt
}

func (k *known) ours(id model.NetworkID) bool {
	_, ok := k.networks[id]
	return ok
}

// ourServices are those with an attachment to one of our networks, and of their
// attachments only these.
func (k *known) ourServices() map[model.ServiceID]model.Service {
	out := make(map[model.ServiceID]model.Service)
	for id, s := range k.services {
		vips, opts := maps.Clone(s.VIPs), maps.Clone(s.Options)
		maps.DeleteFunc(vips, func(n model.NetworkID, _ netip.Addr) bool { return !k.ours(n) })
		maps.DeleteFunc(opts, func(n model.NetworkID, _ model.ServiceOptions) bool { return !k.ours(n) })
		if len(vips)+len(opts) > 0 {
			s.VIPs, s.Options = vips, opts
			out[id] = s
		}
	}
	return out
}

// holders lists who has the addresses in use on our swarm networks, sorted.
func (k *known) holders(services map[model.ServiceID]model.Service) map[model.NetworkID][]model.Holder {
	out := make(map[model.NetworkID][]model.Holder)
	for id, n := range k.networks {
		if !n.Swarm {
			continue
		}
		hs := slices.Clone(k.tasks.live[id])
		if n.Gateway.IsValid() {
			hs = append(hs, model.Holder{Addr: n.Gateway, Kind: model.HolderGateway})
		}
		for _, s := range services {
			if vip, ok := s.VIPs[id]; ok {
				hs = append(hs, model.Holder{Addr: vip, Kind: model.HolderService, ID: string(s.ID)})
			}
		}
		slices.SortFunc(hs, func(a, b model.Holder) int {
			return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID))
		})
		out[id] = hs
	}
	return out
}

// live lists the addresses that they have.
func live(holders map[model.NetworkID][]model.Holder) map[model.NetworkID][]netip.Addr {
	out := make(map[model.NetworkID][]netip.Addr, len(holders))
	for id, hs := range holders {
		addrs := make([]netip.Addr, 0, len(hs))
		for _, h := range hs {
			addrs = append(addrs, h.Addr)
		}
		out[id] = slices.Compact(addrs)
	}
	return out
}

// same compares two snapshots but for the times of polls, which each of them moves.
func same(a, b model.EngineSnapshot) bool {
	a.SwarmAt, a.LeaderAt, a.Follows, a.ServicesAt = b.SwarmAt, b.LeaderAt, b.Follows, b.ServicesAt
	return reflect.DeepEqual(a, b)
}
