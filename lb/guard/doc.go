// Package guard decides what each container of this node may say that it is, to its
// networks.
//
//	its own address               always: in IPv4, and in ARP
//	virtual IPs of its service    as the source of answers; the bridge does ARP for them
//	aliases of published ports    likewise, if its service publishes any
//	all else                      nothing: nor IPv6, nor another MAC, nor no address at all
//
// In the modes dr and tun, the task's own namespace puts the virtual IP back into its
// answers, so that is what they come to the bridge with. In mode nat they come with
// the task's address; its virtual IP may pass there as well, for its service's
// answers are nobody else's.
//
// What was open goes on: a virtual IP passes for as long as the endpoint's record has
// it, or its namespace translates it, whatever its service has by now.
//
// While the view is partial, containers may run that are not known yet: a table that is
// made then is open. One that is there knows them, and stays as it is but for what is
// added (sluice/internal/reconcile).
//
// A node looks at its own containers only. What the tunnel and the mesh bring in was
// looked at by the node that it comes from, or by the host's own table.
//
// The package is pure.
package guard
