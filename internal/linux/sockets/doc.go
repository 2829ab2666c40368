// Package sockets lists the TCP connections that clients have opened to a task,
// with how long each has been silent, and ends given ones.
//
//	                                          task's namespace
//	client ◀───── RST, from the VIP ◀── table ip sluice ◀── socket 10.255.0.3:80
//	  read: connection reset                                  │ SOCK_DESTROY
//	                                                          ▼
//	                                                     server: read: connection aborted
//
// Both are asked of inet_diag (sock_diag(7)), on a netlink socket inside the task's
// namespace. The kernel ends a connection as if its server had done so without
// delay: it sends RST, which takes the way of every answer, and the server's next
// call fails with ECONNABORTED.
//
// What counts as a client's connection: the local address is the given one, and
// something listens on the local port, at this address or at all (kernel.Conn.Served),
// or the port is none that the kernel gives to connections of the task's own
// (net.ipv4.ip_local_port_range): then something has listened there. A server that is
// told to stop closes its listener first. So what the task itself has opened is left
// alone, as are connections of its other networks, and over lo.
//
// What counts as silence: no segment with data was sent or received (tcp_info,
// tcpi_last_data_sent and tcpi_last_data_recv). A keepalive or an acknowledgement
// is no data, a retransmission is. A connection that never had any is as old as
// its handshake.
//
// # Limits
//
//   - Be aware: TCP over IPv4 only. Sockets of IPv6 that carry IPv4, as servers for
//     both have them, are found. UDP has no connection that could be ended.
//   - A client's connection is known by its port alone. One that the task has
//     opened from a port on which it listens, too, is taken for a client's; that takes
//     SO_REUSEPORT on both sockets. So is one that it has opened from a low port of its
//     choice, as rsh and NFS do; it is not Served.
//   - One whose server listens no more, on a port that the kernel gives to connections
//     of the task's own, too (32768 and up by default), is not listed.
//   - To the kernel, a connection of Multipath TCP is one or more of TCP, each of
//     which is ended by itself. The processes learn of it when the last has been gone
//     for net.mptcp.close_timeout, 60 s unless changed.
//   - The kernel needs CONFIG_INET_DIAG_DESTROY (Linux 4.5), which is an option; see
//     Probe.
package sockets
