package diag

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/internal/reconcile"
	"sluice/internal/view"
	"sluice/ipam/pool"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// Loop is what is asked of the reconciler.
type Loop interface {
	Stats() reconcile.Stats
	Last() reconcile.Round
	Inspect(context.Context) ([]kernel.Op, error)
}

// Hub is what is asked of the view.
type Hub interface {
	View() model.View
	Engine() model.EngineSnapshot
	Peers() []view.Peer
	Unclaimed() map[model.NetworkID]error
}

// Pool is the use of a network's addresses.
type Pool struct{ Used, Size int }

// AbilityIPVS is the name of the ability to balance with ip_vs.
const AbilityIPVS = "ip_vs"

// AbilityMesh is the name of the ability to have published ports.
const AbilityMesh = "mesh"

// Ability is something that a node's kernel may lack without harm to the rest.
type Ability struct {
	Name, Use string
	Err       error // why the kernel lacks it, and what to do; nil: it has it
}

// Config is what a Server is made of. The functions answer from memory, but for
// Traffic and Dropped.
type Config struct {
	Version string
	Scope   string // global or local
	Hub     Hub
	Loop    Loop
	Sockets Sockets
	// Settings are the plugin's, without secrets.
	Settings []Setting
	// Datapath is the best datapath that this node has for service VIPs, and why it is that one.
	Datapath func() (name, why string)
	// Abilities are what this node's kernel has or lacks.
	Abilities func() []Ability
	// Traffic reads what the kernel has counted in a network's namespace, by
	// object: IPVSService, IPVSDest, and VIP, where only connections are known. Nil
	// if the plugin does not. Of a kernel that hangs, neither it nor Dropped is waited
	// for; the answer says what is missing.
	Traffic func(ctx context.Context, ns string) (map[kernel.Key]kernel.Traffic, error)
	// Dropped reads how many frames of containers the source guard of a network has
	// dropped, by the name of its namespace. Nil if the plugin does not.
	Dropped func(ns string) (uint64, error)
	// Ended counts the connections that were ended on this node, by service.
	Ended func() map[model.ServiceID]uint64
	// Calls counts the engine's calls since the start, by method.
	Calls func() []Call
	// Gossip is the state of the control plane, and whether it runs.
	Gossip func() (running bool, state string)
	// Pools is the use of the pools this node decides on.
	Pools func() map[model.NetworkID]Pool
	// Leases are those pools with the addresses in use.
	Leases func() []pool.Listing
	// Refusals lists what the IPAM side of this node has refused lately.
	Refusals func() []Problem
	// Trouble lists what parts of the process have to report: a damaged state
	// file, a missing feature of the kernel, a bad setting.
	Trouble func() []Problem
	// Firewall says what the host's firewall manager has for this node; empty: nobody
	// has looked. Nil: nobody looks.
	Firewall func() string
	// State is how the state file is. Nil: the plugin keeps none.
	State func() StateFile
	// Memory is the resident size of this process in bytes.
	Memory func() uint64
	Log    *slog.Logger
}

// Server answers questions over HTTP; it is a handler for the diagnosis socket.
type Server struct {
	cfg Config
	mux http.ServeMux

	ports judged

	drops, counts chan struct{} // see within: held while the kernel is asked for Dropped and Traffic
}

// Paths of the questions.
const (
	PathStatus   = "/v1/status"
	PathNetworks = "/v1/networks"
	PathServices = "/v1/services"
	PathService  = "/v1/service" // ?name=, a name or id, and perhaps &network=
	PathEntry    = "/v1/entry"   // perhaps ?port=, like 81 or 81/udp
	PathIPAM     = "/v1/ipam"
	PathDiff     = "/v1/diff"
	PathConfig   = "/v1/config"
)

// wrongQuestion is the HTTP status of an answer that says, in plain text, what is
// wrong with the question.
const wrongQuestion = http.StatusBadRequest

// inspectTime bounds the wait for a read-back of the kernel: many times what
// one of a large node takes.
const inspectTime = 10 * time.Second

// NewServer makes a Server.
func NewServer(cfg Config) *Server {
	s := &Server{cfg: cfg, drops: make(chan struct{}, 1), counts: make(chan struct{}, 1)}
	handle := func(path string, f func(*http.Request) (Answer, error)) {
		s.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			a, err := f(r)
			if err != nil {
				http.Error(w, err.Error(), wrongQuestion)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			if err := json.NewEncoder(w).Encode(a); err != nil {
				cfg.Log.Debug("answer not delivered", "op", path, "err", err)
			}
		})
	}
	answer := func(path string, f func(context.Context) Answer) {
		handle(path, func(r *http.Request) (Answer, error) { return f(r.Context()), nil })
	}
	answer(PathStatus, func(context.Context) Answer { return s.Status() })
	answer(PathNetworks, func(context.Context) Answer { return s.Networks() })
	answer(PathServices, func(context.Context) Answer { return s.Services() })
	answer(PathIPAM, func(context.Context) Answer { return s.IPAM() })
	answer(PathConfig, func(context.Context) Answer { return Settings{Settings: cfg.Settings} })
	answer(PathDiff, func(ctx context.Context) Answer { return s.Diff(ctx) })
	handle(PathService, func(r *http.Request) (Answer, error) {
		q := r.URL.Query()
		return s.Service(r.Context(), q.Get("name"), q.Get("network"))
	})
	handle(PathEntry, func(r *http.Request) (Answer, error) { return s.Ports(r.Context(), r.URL.Query().Get("port")) })
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Status answers how this node is.
func (s *Server) Status() Status {
	v, e, stats := s.cfg.Hub.View(), s.cfg.Hub.Engine(), s.cfg.Loop.Stats()
	out := Status{
		Version: s.cfg.Version, Alias: e.Alias, Scope: s.cfg.Scope,
		Node: string(v.Self.Node), Host: e.HostName, Role: role(e),
		Port: v.Self.VXLANPort, Networks: len(v.Networks), Endpoints: len(v.Endpoints),
		Services: len(service.Virtuals(v)), Memory: s.cfg.Memory(),
		Loop: loopState(stats), Calls: append([]Call{}, s.cfg.Calls()...), Kernel: []KernelAbility{}, Addresses: []AddressUse{}, Problems: []Problem{},
	}
	out.State = StateFile{Saved: true}
	if s.cfg.State != nil {
		out.State = s.cfg.State()
	}
	for _, n := range v.Networks {
		if n.Transit {
			out.Transit++
		}
	}
	for _, a := range s.cfg.Abilities() {
		k := KernelAbility{Name: a.Name, Use: a.Use}
		if a.Err != nil {
			k.Lacks = a.Err.Error()
		}
		out.Kernel = append(out.Kernel, k)
	}
	if e.SwarmValid || e.ContainersValid || e.NetworksValid {
		out.Engine = e.Version // else it was there once
	}
	if v.Self.VTEP.IsValid() {
		out.VTEP = v.Self.VTEP.String()
	}
	out.Datapath, out.Why = s.cfg.Datapath()
	if s.cfg.Firewall != nil {
		out.Firewall = s.cfg.Firewall()
	}
	running, state := s.cfg.Gossip()
	out.Gossip = Gossip{State: state, Peers: []Peer{}}
	if s.cfg.Scope == "global" && e.SwarmValid && e.Active {
		out.Problems = append(out.Problems, contact(v, e, running, state)...)
	}
	for _, p := range s.cfg.Hub.Peers() {
		state := PeerPresent
		if !p.Present {
			state = PeerLost
			out.Problems = append(out.Problems, Problem{
				What: fmt.Sprintf("node %s (%s) is out of contact; its containers are still served", orElse(p.Name, string(p.Node)), orElse(p.VTEP, "address unknown")),
				Do:   "if it is gone for good, remove it from the swarm: docker node rm",
			})
		}
		out.Gossip.Peers = append(out.Gossip.Peers, Peer{Node: string(p.Node), Host: p.Name, VTEP: p.VTEP, State: state, Endpoints: p.Endpoints})
	}
	if stats.DumpError != "" {
		out.Problems = append(out.Problems, Problem{What: "the kernel cannot be read: " + stats.DumpError, Do: "nothing is changed until it can; the data path goes on as it is"})
	}
	for _, f := range stats.Fights {
		out.Problems = append(out.Problems, Problem{
			What: fmt.Sprintf("%s is changed again and again by somebody: %d times in the last %d minutes, last seen by %s", f.What, f.Times, minutes(time.Since(f.Since)), f.Cause),
			Do:   "find the program and have it leave sluice's objects alone; each time they are missing until they are mended",
		})
	}
	out.Problems = append(out.Problems, s.cfg.Trouble()...)
	guard, unread := s.guard(v)
	out.Guard, out.Problems = guard, append(out.Problems, unread...)
	d := s.doors()
	ports := d.ports(func(ingress.Port) bool { return true })
	out.Published = published(ports, s.cfg.Sockets.Missed(), d.drained())
	out.Problems = append(out.Problems, d.problems(s, ports)...)
	if s.ipamSource(e) == IPAMLeases {
		a := s.IPAM()
		out.Problems = append(out.Problems, a.Problems...)
		for _, p := range a.Pools {
			if p.Pool != "" {
				out.Addresses = append(out.Addresses, AddressUse{Network: p.Network, Subnet: p.Subnet, Used: p.Used, Free: p.Free, Leaked: p.Leaked})
			}
		}
	}
	out.Problems = append(out.Problems, failures(s.cfg.Loop.Last(), "", func(kernel.Key) bool { return true })...)
	return out
}

// contact lists what keeps a node of a swarm from the others.
func contact(v model.View, e model.EngineSnapshot, running bool, state string) []Problem {
	switch {
	case !v.Self.VTEP.IsValid() && e.NodeAddr.Is6():
		return []Problem{{
			What: fmt.Sprintf("the node's address in the swarm, %s, is not IPv4, which is all that sluice serves", e.NodeAddr),
			Do:   "let it leave the swarm and join again with an IPv4 --advertise-addr and --data-path-addr",
		}}
	case !v.Self.VTEP.IsValid():
		return []Problem{{
			What: "this node's data-path address is not known yet, so it serves no network of the swarm",
			Do:   "see docker info, Swarm: Node Address",
		}}
	case !running && len(v.Networks) > 0:
		return []Problem{{
			What: "gossip is " + state + ": the other nodes do not learn of this node's containers, nor it of theirs",
			Do:   "sluice config shows address and port; no other program may hold the port",
		}}
	}
	return nil
}

// minutes are those begun.
func minutes(d time.Duration) int { return int(d/time.Minute) + 1 }

// loopState converts the loop's counters.
func loopState(st reconcile.Stats) LoopState {
	return LoopState{Rounds: st.Rounds, Changes: st.Ops, Failures: st.Failures, Drift: st.Drift, LastRound: st.LastRound, ReadBack: st.LastDump, DriftByKind: st.Drifts}
}

func role(e model.EngineSnapshot) string {
	switch {
	case !e.SwarmValid:
		return "role not known yet"
	case e.NoSwarm:
		return "no swarm"
	case !e.Active:
		return "swarm not at work (locked, pending or in error)"
	case e.Leader:
		return "leader"
	case e.Manager:
		return "manager"
	}
	return "worker"
}

// failures lists what the last round could not do with the objects that count,
// one problem for each text.
func failures(r reconcile.Round, prefix string, counts func(kernel.Key) bool) []Problem {
	var texts []string
	for k, err := range r.Failed {
		if counts(k) {
			texts = append(texts, prefix+err.Error())
		}
	}
	slices.Sort(texts)
	var out []Problem
	for _, t := range slices.Compact(texts) {
		out = append(out, Problem{What: t})
	}
	return out
}

// Networks answers which networks there are.
func (s *Server) Networks() Networks {
	v, e, pools := s.cfg.Hub.View(), s.cfg.Hub.Engine(), s.cfg.Pools()
	last := s.cfg.Loop.Last()
	out := Networks{Networks: []Network{}, Problems: []Problem{}}
	for id, n := range v.Networks {
		x := Network{
			ID: string(id), Name: n.Name, State: "here", Subnet: n.Subnet.String(), Gateway: n.Gateway.String(),
			VNI: uint32(n.VNI), MTU: n.MTU, Scheduler: n.Options.Scheduler, Netns: overlay.NetnsName(n),
			Used: pools[id].Used, Size: pools[id].Size,
		}
		if n.Transit {
			x.State = "transit"
		}
		if e, ok := ingress.Claimed(v, id)[v.Self.Node]; ok {
			x.Entry, x.Number = e.Addr.String(), e.Number
		}
		for _, ep := range v.Endpoints {
			if ep.Network == id {
				x.Local++
			}
		}
		for _, r := range v.Remotes {
			if r.Network == id {
				x.Remote++
			}
		}
		out.Problems = append(out.Problems, failures(last, "network "+orElse(n.Name, id.Short())+": ", func(k kernel.Key) bool {
			return k.Netns() == x.Netns || k == kernel.Netns{Name: x.Netns}
		})...)
		out.Networks = append(out.Networks, x)
	}
	for id, err := range s.cfg.Hub.Unclaimed() {
		out.Problems = append(out.Problems, Problem{
			What: fmt.Sprintf("published ports of network %s are not served by this node: %v", orElse(v.Networks[id].Name, id.Short()), err),
			Do:   "or leave this node out (sluice.publish.nodes)",
		})
	}
	for id, name := range e.Unallocated {
		out.Networks = append(out.Networks, Network{ID: string(id), Name: name, State: "not allocated"})
		out.Problems = append(out.Problems, Problem{
			What: fmt.Sprintf("network %s has no addresses and no driver: the swarm's leader could not allocate it, or is about to", name),
			Do:   "the refusals below say why, if this is the leader and the network is sluice's; remove the network and create it again",
		})
	}
	for id, n := range e.Networks {
		if _, here := v.Networks[id]; here {
			continue
		}
		x := Network{
			ID: string(id), Name: n.Name, State: "elsewhere", Refused: n.Options[options.Refused],
			Used: pools[id].Used, Size: pools[id].Size,
		}
		if n.Subnet.IsValid() {
			x.Subnet, x.Gateway = n.Subnet.String(), n.Gateway.String()
		}
		if x.Refused != "" {
			x.State = "refused"
			out.Problems = append(out.Problems, Problem{
				What: fmt.Sprintf("network %s was refused: %s", n.Name, x.Refused),
				Do:   "remove it and create it again: docker network rm " + n.Name,
			})
		}
		out.Networks = append(out.Networks, x)
	}
	slices.SortFunc(out.Networks, func(a, b Network) int {
		return strings.Compare(a.Name+"\x00"+a.ID, b.Name+"\x00"+b.ID)
	})
	slices.SortFunc(out.Problems, func(a, b Problem) int { return strings.Compare(a.What, b.What) })
	out.Problems = append(out.Problems, s.cfg.Refusals()...)
	return out
}

// Services answers which services there are on this node's networks, and who
// serves them.
func (s *Server) Services() Services {
	v := s.cfg.Hub.View()
	names := s.nodeNames(v)
	out := Services{Services: []Service{}, Ports: []Port{}, Problems: []Problem{}}
	for _, x := range service.Virtuals(v) {
		svc := Service{
			Name: x.Name, ID: string(x.Service), Network: orElse(v.Networks[x.Network].Name, x.Network.Short()),
			Datapath: service.Datapath(v.Self, v.Networks[x.Network]), Mode: x.Mode, Scheduler: x.Scheduler, Backends: []Backend{},
		}
		if x.VIP.IsValid() {
			svc.VIP = x.VIP.String()
		}
		svc.SchedulerUsed, svc.SchedulerReason = service.Scheduler(&x, svc.Datapath)
		for _, b := range x.Backends {
			svc.Backends = append(svc.Backends, backend(b, names))
		}
		if len(x.Backends) > 0 && len(x.Ready()) == 0 {
			out.Problems = append(out.Problems, refusing(x))
		}
		out.Services = append(out.Services, svc)
	}
	d := s.doors()
	out.Ports = d.ports(func(ingress.Port) bool { return true })
	out.Problems = append(out.Problems, d.problems(s, out.Ports)...)
	return out
}

// Diff answers what differs between plan and kernel, read back now.
func (s *Server) Diff(ctx context.Context) Diff {
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	out := Diff{Changes: []string{}, Problems: []Problem{}}
	ops, err := s.cfg.Loop.Inspect(ctx)
	if err != nil {
		out.Problems = append(out.Problems, Problem{
			What: "what the kernel has is not known: " + err.Error(),
			Do:   "nothing is changed until it can be read; the data path goes on as it is",
		})
		return out
	}
	for _, o := range ops {
		out.Changes = append(out.Changes, o.String())
	}
	if len(ops) > 0 {
		out.Problems = append(out.Problems, Problem{
			What: fmt.Sprintf("%d differences between plan and kernel", len(ops)),
			Do:   "they are mended within seconds; if they stay, sluice status says what refuses",
		})
	}
	return out
}
