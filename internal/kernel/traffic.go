package kernel

// Traffic is what the kernel has counted for an object that balances, since it
// was made. Numbers that the kernel does not count there are 0.
type Traffic struct {
	Connections           uint64 // begun; with IPVSServiceSpec.OnePacket, packets
	PacketsIn, PacketsOut uint64 // to the virtual IP; back, where answers come by (IPVSNAT)
	BytesIn, BytesOut     uint64
	Active, Inactive      int // connections of a backend now: open ones, others that are remembered
}
