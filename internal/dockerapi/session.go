package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/filters"

	"sluice/internal/model"
)

// Names of the parts, as Status lists them.
const (
	partInfo       = "info"
	partContainers = "containers"
	partNetworks   = "networks"
	partGossip     = "gossip"
	partCluster    = "cluster"
	partSandboxes  = "sandboxes"
)

var partNames = []string{partInfo, partContainers, partNetworks, partGossip, partCluster, partSandboxes}

// How often each part is read when no event asks for it.
const (
	// A node's role changes seldom, and node events tell of it on managers. That a
	// node joins a swarm, no event tells.
	infoEvery        = 10 * time.Second
	infoEveryOutside = 2 * time.Second
	// Lists are cheap (a millisecond per 100 entries), and events may be lost.
	containersEvery = 5 * time.Second
	networksEvery   = 10 * time.Second
	// Verbose inspection is megabytes in large swarms.
	gossipEvery = 10 * time.Second
	// Tasks change without any event; half a second is what may pass between
	// swarm's decision to stop a task and our draining of it. The stop signal
	// follows the decision by some 3 s. Managers that do not lead are asked less:
	// each of their answers comes from the leader.
	leaderEvery  = 500 * time.Millisecond
	managerEvery = 2 * time.Second
	// Without a network of ours nothing of the swarm matters but who leads it.
	idleEvery = 10 * time.Second
	// Nodes are 3 KB each and change seldom; this is how late we are to learn that
	// another manager leads.
	nodesEvery = 2 * time.Second
	// Inspections that failed are tried again.
	sandboxesEvery = 10 * time.Second
)

// How long a reading may take.
const (
	// The engine itself gives up on a swarm without a leader after 20 s.
	infoTimeout = 25 * time.Second
	// Lists take milliseconds; an engine that needs this long is overloaded, and
	// asking again sooner would not help it.
	listTimeout = 10 * time.Second
	// One inspection: it blocks while a driver call on its container hangs, and
	// others wait behind it.
	inspectTimeout = time.Second
	// subscribeTimeout is for the headers of the event stream, which the engine
	// sends at once.
	subscribeTimeout = 5 * time.Second
)

// session is the parts of one connection and what they remember of it.
type session struct {
	r *Reader
	e *engine

	info, containers, networks, gossip, cluster, sandboxes *part
	named                                                  bool // the engine has told the plugin's name
	nodesAt                                                time.Time
	nodeEvent                                              atomic.Bool // nodes are to be read before their time

	// Sums of the bodies that were last decoded, each used by its part only.
	sumInfo, sumContainers, sumNetworks, sumServices, sumTasks, sumNodes uint64
	sumGossip                                                            map[model.NetworkID]uint64
}

func newSession(r *Reader, e *engine) *session {
	s := &session{r: r, e: e, sumGossip: make(map[model.NetworkID]uint64)}
	fixed := func(d time.Duration) func() time.Duration { return func() time.Duration { return d } }
	s.info = s.part(partInfo, infoTimeout, s.infoEvery, s.readInfo, func(k *known) { k.infoValid = false })
	s.containers = s.part(partContainers, listTimeout, fixed(containersEvery), s.readContainers, func(k *known) { k.containersValid = false })
	s.networks = s.part(partNetworks, listTimeout, fixed(networksEvery), s.readNetworks, func(k *known) { k.networksValid = false })
	s.gossip = s.part(partGossip, listTimeout, fixed(gossipEvery), s.readGossip, func(*known) {})
	s.cluster = s.part(partCluster, listTimeout, s.clusterEvery, s.readCluster, (*known).doubtCluster)
	s.sandboxes = s.part(partSandboxes, listTimeout, fixed(sandboxesEvery), s.readSandboxes, func(*known) {})
	return s
}

func (s *session) parts() []*part {
	return []*part{s.info, s.containers, s.networks, s.gossip, s.cluster, s.sandboxes}
}

// part makes one; doubt is what a failed reading does to what is known.
func (s *session) part(name string, timeout time.Duration, every func() time.Duration, read func(context.Context) error, doubt func(*known)) *part {
	return &part{
		name: name, timeout: timeout, every: every, read: read, ask: make(chan struct{}, 1),
		ended: func(started time.Time, err error) {
			s.r.count(name, started, err)
			if err != nil {
				s.r.update(doubt)
			}
		},
	}
}

// get reads path and reports whether the body is another than last time.
func (s *session) get(ctx context.Context, path string, query url.Values, sum *uint64) ([]byte, bool, error) {
	body, err := s.e.get(ctx, path, query)
	if err != nil {
		return nil, false, err
	}
	return body, s.e.fresh(sum, body), nil
}

func (s *session) infoEvery() time.Duration {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if s.r.known.info.active {
		return infoEvery
	}
	return infoEveryOutside
}

func (s *session) readInfo(ctx context.Context) error {
	at := time.Now()
	body, fresh, err := s.get(ctx, "/info", nil, &s.sumInfo)
	if err != nil {
		return err
	}
	if !fresh {
		s.r.update(func(k *known) { k.infoAt, k.infoValid = at, true })
		return nil
	}
	in, err := parseInfo(body)
	if err != nil {
		s.sumInfo = 0
		return err
	}
	s.r.mu.Lock()
	was := s.r.known.info
	s.r.mu.Unlock()
	if in.none && was.active {
		if err := s.leftSwarm(ctx); err != nil {
			s.sumInfo = 0
			return err
		}
	}
	s.r.update(func(k *known) {
		k.info, k.infoAt, k.infoValid = in, at, true
		if !in.manager {
			k.doubtCluster() // it is of the time before a demotion
		}
	})
	if in.manager && !was.manager {
		s.cluster.look()
	}
	return nil
}

// leftSwarm returns an error if that the engine is in no swarm is not to be believed.
// An engine that is being stopped has ended its part in the swarm and says so to who is
// connected (20.10, until its containers have ended; 28.5, once more at most); it takes no
// connections any more.
func (s *session) leftSwarm(ctx context.Context) error {
	e, err := connect(ctx, s.r.cfg.dial)
	if err != nil {
		return fmt.Errorf("the engine is being stopped, and counts as in its swarm: %w", err)
	}
	return e.close()
}

func (s *session) readContainers(ctx context.Context) error {
	at := time.Now()
	body, fresh, err := s.get(ctx, "/containers/json", nil, &s.sumContainers)
	if err != nil {
		return err
	}
	if !fresh {
		s.r.update(func(k *known) { k.containersAt, k.containersValid = at, true })
		return nil
	}
	list, err := parseContainers(body)
	if err != nil {
		s.sumContainers = 0
		return err
	}
	s.r.update(func(k *known) { k.containers, k.containersAt, k.containersValid = list, at, true })
	s.sandboxes.look()
	return nil
}

// readNetworks lists the networks of our driver; which that is, the engine is
// asked first.
func (s *session) readNetworks(ctx context.Context) error {
	if err := s.readName(ctx); err != nil {
		return err
	}
	s.r.mu.Lock()
	alias, had := s.r.known.alias, s.r.known.networks
	s.r.mu.Unlock()
	// Not filtered by driver: a network that could not be allocated has none.
	body, fresh, err := s.get(ctx, "/networks", nil, &s.sumNetworks)
	if err != nil {
		return err
	}
	if !fresh {
		s.r.update(func(k *known) { k.networksValid = true })
		return nil
	}
	list, waiting, err := parseNetworks(body, alias)
	if err != nil {
		s.sumNetworks = 0
		return err
	}
	gone := false
	for id := range had {
		_, still := list[id]
		gone = gone || !still
	}
	if gone {
		s.nodeEvent.Store(true)
	}
	s.r.update(func(k *known) {
		k.networks, k.waiting, k.networksValid = list, waiting, true
		if gone {
			// Removed, or the engine is being stopped and has left the swarm: then it lists
			// no network of it, and cannot say what services there are. That their networks
			// are no more counts if the managers answer still.
			k.doubtCluster()
		}
	})
	if !sameKeys(had, list) {
		s.gossip.look()
		s.cluster.look()
		s.sandboxes.look()
	}
	return nil
}

func sameKeys(a, b map[model.NetworkID]model.EngineNetwork) bool {
	return maps.EqualFunc(a, b, func(model.EngineNetwork, model.EngineNetwork) bool { return true })
}

// readName finds out the plugin's name, once in a session: a plugin cannot be
// renamed while it runs.
func (s *session) readName(ctx context.Context) error {
	if s.named || s.r.cfg.PluginID == "" {
		return nil
	}
	body, err := s.e.get(ctx, "/plugins/"+s.r.cfg.PluginID+"/json", nil)
	if err != nil {
		return err
	}
	name, err := parsePlugin(body)
	if err != nil {
		return err
	}
	s.named = true
	s.r.update(func(k *known) { k.alias = name })
	return nil
}

// readGossip inspects each swarm network of ours. One that the engine does not
// have here (any more) tells nothing; one that cannot be read for another reason
// keeps what was last read of it (the engine is known to stumble over a service
// that is just being made) and fails the reading as a whole.
func (s *session) readGossip(ctx context.Context) error {
	s.r.mu.Lock()
	networks := s.r.known.networks
	next := maps.Clone(s.r.known.gossip)
	s.r.mu.Unlock()
	if next == nil {
		next = make(map[model.NetworkID]gossip)
	}
	maps.DeleteFunc(next, func(id model.NetworkID, _ gossip) bool { return !networks[id].Swarm })
	maps.DeleteFunc(s.sumGossip, func(id model.NetworkID, _ uint64) bool { return !networks[id].Swarm })
	var errs []error
	for id, n := range networks {
		if !n.Swarm {
			continue
		}
		body, err := s.e.get(ctx, "/networks/"+string(id), url.Values{"verbose": {"true"}})
		if errors.Is(err, errNotFound) {
			delete(next, id)
			delete(s.sumGossip, id)
			continue
		}
		if err != nil {
			errs = append(errs, describe(id, err))
			continue
		}
		sum := s.sumGossip[id]
		if _, known := next[id]; !s.e.fresh(&sum, body) && known {
			continue
		}
		g, err := parseGossip(body)
		if err != nil {
			errs = append(errs, describe(id, err))
			continue
		}
		next[id], s.sumGossip[id] = g, sum
	}
	s.r.update(func(k *known) { k.gossip = next })
	return errors.Join(errs...)
}

func (s *session) clusterEvery() time.Duration {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	switch {
	case len(s.r.known.networks) == 0 || !s.r.known.info.manager:
		return idleEvery
	case s.r.known.nodes.leader == s.r.known.info.node:
		return leaderEvery
	}
	return managerEvery
}

// allRuntimes asks for the tasks of attachable networks too (`docker run` on
// one), which the engine leaves out by default; their addresses are in use.
var allRuntimes = filters.NewArgs(
	filters.Arg("runtime", "container"), filters.Arg("runtime", "attachment"),
	filters.Arg("runtime", "plugin"), filters.Arg("runtime", ""))

// readCluster reads nodes now and then, and tasks and services always. Of the
// last two it takes both or none: what they say of addresses in use is evidence
// only if it is whole.
func (s *session) readCluster(ctx context.Context) error {
	s.r.mu.Lock()
	manager, idle := s.r.known.info.manager, len(s.r.known.networks) == 0
	s.r.mu.Unlock()
	if !manager {
		return nil // readInfo asks for a reading as soon as it is
	}
	at := time.Now()
	if s.nodeEvent.Swap(false) || at.Sub(s.nodesAt) >= nodesEvery {
		if err := s.readNodes(ctx); err != nil {
			s.nodesAt = time.Time{}
			return err
		}
		s.nodesAt = at
		s.r.nodesRead(at)
	}
	if idle {
		// What was read before is not believed when the next network of ours comes.
		s.r.update(func(k *known) { k.nodesValid, k.clusterValid = true, false })
		return nil
	}
	take, err := s.readServices(ctx)
	if err != nil {
		s.sumServices, s.sumTasks = 0, 0 // neither was taken over
		s.nodesAt = time.Time{}          // all of it is in doubt, and asked for again
		return err
	}
	s.r.pollDone(at, take)
	return nil
}

func (s *session) readNodes(ctx context.Context) error {
	body, fresh, err := s.get(ctx, "/nodes", nil, &s.sumNodes)
	if err != nil || !fresh {
		return err
	}
	n, err := parseNodes(body)
	if err != nil {
		s.sumNodes = 0
		return err
	}
	s.r.update(func(k *known) {
		// What was read under another leader is no word of this one: a manager that
		// has just become it would publish tasks and services that are seconds old.
		if n.leader != k.nodes.leader {
			k.clusterValid = false
		}
		k.nodes = n
	})
	return nil
}

// readServices reads tasks and then services, so that a task of a new service is
// not seen without it. It returns nil if nothing is new.
func (s *session) readServices(ctx context.Context) (func(*known), error) {
	query, err := filterQuery(allRuntimes)
	if err != nil {
		return nil, err
	}
	taskBody, newTasks, err := s.get(ctx, "/tasks", query, &s.sumTasks)
	if err != nil {
		return nil, err
	}
	body, newServices, err := s.get(ctx, "/services", nil, &s.sumServices)
	if err != nil || !newTasks && !newServices {
		return nil, err
	}
	var t tasks
	if newTasks {
		if t, err = parseTasks(taskBody); err != nil {
			return nil, err
		}
	}
	var services map[model.ServiceID]model.Service
	if newServices {
		var refused error
		if services, refused, err = parseServices(body); err != nil {
			return nil, err
		}
		if refused != nil {
			s.r.cfg.Log.Warn("services carry options that are not understood; these are ignored", "err", refused)
		}
	}
	return func(k *known) {
		if newTasks {
			k.tasks = t
		}
		if newServices {
			k.services = services
		}
	}, nil
}

// readSandboxes inspects the running containers whose namespace is not known
// yet, one after the other. Inspection is the one request that can block while a
// driver call on its container hangs; such a container is not listed as running,
// so this is rare, and costs others a second.
func (s *session) readSandboxes(ctx context.Context) error {
	s.r.mu.Lock()
	endpoints, next := s.r.snap.Containers, maps.Clone(s.r.known.sandboxes)
	s.r.mu.Unlock()
	if next == nil {
		next = make(map[model.EndpointID]string)
	}
	maps.DeleteFunc(next, func(id model.EndpointID, _ string) bool { _, there := endpoints[id]; return !there })
	byContainer := make(map[string]string)
	var errs []error
	for id, c := range endpoints {
		if next[id] != "" || ctx.Err() != nil {
			continue
		}
		path, asked := byContainer[c.Container]
		if !asked {
			var err error
			if path, err = s.sandbox(ctx, c.Container); err != nil && !errors.Is(err, errNotFound) {
				errs = append(errs, fmt.Errorf("container %.12s: %w", c.Container, err))
			}
			byContainer[c.Container] = path
		}
		if path != "" {
			next[id] = path
		}
	}
	s.r.update(func(k *known) { k.sandboxes = next })
	return errors.Join(errs...)
}

func (s *session) sandbox(ctx context.Context, container string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	body, err := s.e.get(ctx, "/containers/"+container+"/json", nil)
	if err != nil {
		return "", err
	}
	return parseSandbox(body)
}

func filterQuery(f filters.Args) (url.Values, error) {
	text, err := filters.ToJSON(f)
	if err != nil {
		return nil, fmt.Errorf("encode filter: %w", err)
	}
	return url.Values{"filters": {text}}, nil
}
