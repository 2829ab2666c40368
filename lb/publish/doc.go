// Package publish has this node hold the ports that services publish on it, and
// tells who has those that it cannot hold.
//
//	view ──▶ Wants ──▶ Own ──▶ HostPorts ──▶ Sockets.Set ──▶ Taken ──▶ view ──▶ plan
//	            pure, lb/ingress              the kernel      by whom
//
// What is to be held follows from the services alone. A port that a process of the
// node has is tried again until it can be had; nobody else gets it meanwhile, and
// the plan leaves it to the process. A port that has not been tried is not planned:
// it may be a process's.
//
// It is level-triggered: each look sets all ports, and a restart, with which the
// sockets go, begins with a look. The rules for published ports stay in the kernel
// over that; so Begin comes before the first plan.
//
// # Limits
//
//   - Be aware: between the end of a process of this program and the next look of a new
//     one, another program can take a port that is published. It then has the
//     port, until it ends.
//   - While the view is partial, no port is let go.
package publish
