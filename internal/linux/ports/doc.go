// Package ports holds ports of the host by sockets, so that they are seen to be
// taken (ss -l) and no other process gets them.
//
//	client ─▶ port 81 ─▶ nat rules ─▶ a task         what is meant to happen
//	                          ╎
//	                          └╌╌▶ socket of ours     only if the rules are missing:
//	                               accept, RST, count
//
// Published ports are translated before the kernel looks for a socket, so nothing
// comes to these as long as the rules are there. A TCP socket must listen to keep
// others out: one that is only bound lets a second one with SO_REUSEADDR in, and is
// in no list. What it accepts is reset at once, since a client that waits for an
// answer is worse off than one that is refused, and counted: each is a connection
// that the rules have missed. A UDP socket is bound without SO_REUSEADDR, because
// with it others that have it would share the port; it takes no packet, by a filter.
// SCTP is as TCP, where the kernel has it.
//
// Who has a port that cannot be had is found in /proc: net/tcp and the like say
// which socket, the descriptors of processes say whose it is.
//
// # Limits
//
//   - Be aware: one socket, and so one descriptor, for each port. Ranges are made of
//     ports to the kernel; a socket takes some 3 KiB of its memory, whether it listens
//     or not. A thousand are opened in some 40 ms and closed in 15 ms; to Set them once
//     more takes 1 ms. They take half of the descriptors that the process may have, and
//     no more: what is beyond is told as not to be had, the highest ports first.
//   - IPv4 only. A process may still have a port of IPv6 alone.
//   - A port of the range from which the kernel chooses (ip_local_port_range) may be
//     had by some client for as long as its connection lasts.
//   - A socket that is bound to a TCP port and does not listen is in no table of
//     /proc: it has no name. Neither has a process that this one may not look into,
//     which takes CAP_SYS_PTRACE, or that is outside of the process namespace of the
//     /proc given. The plugin is in that of its host (pidhost in config.json).
//   - To find a name, the descriptors of all processes are read until it is found.
//     That is done only for ports that cannot be had, at each try.
package ports
