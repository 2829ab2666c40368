// Package dockerapi reads what the local Docker engine knows, in the background,
// and hands it out as a model.EngineSnapshot. It is the only package that speaks
// the engine's API, and it only reads.
//
//	                ┌─ info        who and where this node is
//	/events ──asks──┼─ containers  this node's endpoints and their tasks
//	timers  ──asks──┼─ networks    of our driver                         ──▶ Snapshot
//	                ├─ gossip      VIPs and peers, by verbose inspect         Changed
//	                ├─ cluster     services, tasks, nodes (managers)
//	                └─ sandboxes   namespaces of running containers
//
// Each part is read by a goroutine of its own, so that one that hangs in the
// engine holds up no other: /info on a manager without a leader takes 20 s, the
// inspection of a container takes as long as a driver call on it does.
//
// A session begins when the engine answers a ping and its event stream is open,
// and ends when that stream does. While the engine boots it accepts connections
// and answers none of them; then there is one ping at a time, with a deadline.
//
// An event says "look again", never what to believe: the engine sends some before
// the list that tells of them is up to date. Each is followed by a reading at
// once and by three more within a second.
//
// Be aware: the engine waits for this plugin in many calls, and this package
// waits for the engine. Nothing that answers the engine may call a method of
// Reader that blocks; Snapshot, Changed, Refresh and Status do not.
//
// Versions: the API of engine 20.10 (1.41) and later, negotiated per session.
package dockerapi
