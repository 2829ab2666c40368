package linux

import (
	"encoding/binary"
	"log/slog"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/linux/nft"
)

// Whatever comes by the sockets, it is at worst a reason to look.
func FuzzHear(f *testing.F) {
	message := func(typ uint16, data ...byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(data)))
		b = binary.NativeEndian.AppendUint16(b, typ)
		return append(append(b, make([]byte, 10)...), data...)
	}
	for _, typ := range []uint16{
		unix.RTM_NEWLINK, unix.RTM_DELLINK, unix.RTM_NEWADDR, unix.RTM_DELNEIGH, unix.RTM_NEWROUTE, unix.RTM_NEWRULE, unix.RTM_NEWNETCONF,
		subsysTables<<8 | unix.NFT_MSG_NEWGEN, subsysTables<<8 | unix.NFT_MSG_DELRULE,
	} {
		f.Add(message(typ))
		f.Add(message(typ, unix.AF_BRIDGE, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
		f.Add(message(typ, 2, 0, 0, 0, 8, 0, 1, 0, 0, 0, 0, 1))
	}
	k := &Kernel{cfg: Config{LinkPrefix: defaultLinkPrefix, MeshPrefix: defaultMeshPrefix, Tables: nft.Tables{}}, log: slog.New(slog.DiscardHandler)}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, ns := range []string{"", "sluice-a", taskPrefix + "/run/x"} {
			for _, tables := range []bool{false, true} {
				w := &watcher{k: k}
				s := &earSocket{tables: tables, sub: &sub{name: ns, devices: map[int]device{1: {index: 1, name: "vxlan0", kind: "vxlan", alias: aliasPrefix}}}}
				w.parse(s, append([]byte(nil), b...))
				w.told.Contradicts(nil)
			}
		}
	})
}
