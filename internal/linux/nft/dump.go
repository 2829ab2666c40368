package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// found is a table as the kernel has it.
type found struct {
	exists  bool
	dormant bool // its hooks are off
	chains  map[string]chain
	rules   map[string][]string          // by chain, the comments in order; empty for a rule without
	sets    map[string]setShape          // all of the table
	elems   map[string]map[string]string // by set, key to data, for the sets asked for
}

// setShape is what must be the same for a set to be the one we declare.
type setShape struct {
	flags, keyType, keyLen, dataType, dataLen, size uint32
	timeout                                         time.Duration
}

// Dumping again costs milliseconds, and one Apply at a time, or a firewall that
// is being written in the same namespace, is all that can come between.
const dumpAttempts = 5

// replyTimeout bounds the wait for the kernel, which answers within the system
// call or not at all. It is generous because building the rules of thousands of
// services takes a loaded machine seconds.
const replyTimeout = 30 * time.Second

// read dumps a table, with the elements of the sets named. Several requests make
// it up; the generation of the namespace's rules before and after says whether
// they saw the same. kernel.ErrInterrupted: they never did.
func read(nsFD int, family nftables.TableFamily, table string, elems []string) (found, error) {
	c, err := dial(nsFD)
	if err != nil {
		return found{}, err
	}
	defer c.nl.Close()
	for range dumpAttempts {
		before, err := c.generation()
		if err != nil {
			return found{}, err
		}
		f, err := c.table(family, table, elems)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) || errors.Is(err, kernel.ErrInterrupted) {
			continue // a set or chain went while we asked for it
		}
		if err != nil {
			return found{}, err
		}
		after, err := c.generation()
		if err != nil {
			return found{}, err
		}
		if before == after {
			return f, nil
		}
	}
	return found{}, fmt.Errorf("dump table %s: rules changed %d times meanwhile: %w", table, dumpAttempts, kernel.ErrInterrupted)
}

// client asks one network namespace.
type client struct{ nl *netlink.Conn }

// dial opens a netlink socket in the namespace behind the file descriptor.
func dial(nsFD int) (client, error) {
	if nsFD <= 0 {
		// To the library, 0 is the namespace of this process: the host's firewall.
		return client{}, fmt.Errorf("nftables: %d is no file descriptor of a network namespace", nsFD)
	}
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: nsFD})
	if err != nil {
		return client{}, fmt.Errorf("nftables: open netlink socket: %w", err)
	}
	if err := sockOptions(nl); err != nil {
		nl.Close()
		return client{}, err
	}
	return client{nl}, nil
}

// sockOptions prepares a socket for large transactions and bounds its waits.
func sockOptions(nl *netlink.Conn) error {
	// The most that a transaction and its acknowledgements may take: 4,096 VIPs (a
	// /20) of 50 slots each are about 16 MB of messages. These are limits; memory
	// is taken as it is needed.
	const limit = 64 << 20
	if err := nl.SetWriteBuffer(limit); err != nil {
		return fmt.Errorf("nftables: send buffer: %w", err)
	}
	if err := nl.SetReadBuffer(limit); err != nil {
		return fmt.Errorf("nftables: receive buffer: %w", err)
	}
	// An error need not quote the message that it is about; that would be megabytes.
	if err := nl.SetOption(netlink.CapAcknowledge, true); err != nil {
		return fmt.Errorf("nftables: short acknowledgements: %w", err)
	}
	// The clock of the host, for the socket only; nothing is decided by it.
	if err := nl.SetDeadline(time.Now().Add(replyTimeout)); err != nil {
		return fmt.Errorf("nftables: deadline: %w", err)
	}
	return nil
}

// attr is one netlink attribute, decoded where it lies.
type attr struct {
	typ  uint16
	data []byte
}

func (a attr) u32() uint32 {
	if len(a.data) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(a.data)
}
func (a attr) text() string { return string(bytes.TrimRight(a.data, "\x00")) }

// attrs splits a row of attributes. What is cut short ends the row: the kernel
// makes these, and a state without them is a state to repair.
func attrs(b []byte) []attr {
	var out []attr
	for len(b) >= unix.NLA_HDRLEN {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.NLA_HDRLEN || n > len(b) {
			break
		}
		typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		out = append(out, attr{typ, b[unix.NLA_HDRLEN:n]})
		b = b[min(len(b), (n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1)):]
	}
	return out
}

// nfgenmsg is the length of the header before the attributes of a message.
const nfgenmsg = 4

// request sends one question and returns the attributes of each answer.
func (c client) request(msg int, family nftables.TableFamily, flags netlink.HeaderFlags, ask ...netlink.Attribute) ([][]attr, error) {
	body, err := netlink.MarshalAttributes(ask)
	if err != nil {
		return nil, err
	}
	replies, err := c.nl.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg),
			Flags: netlink.Request | flags,
		},
		Data: append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, body...),
	})
	if err != nil {
		return nil, err
	}
	out := make([][]attr, 0, len(replies))
	for _, m := range replies {
		if m.Header.Flags&netlink.DumpInterrupted != 0 {
			return nil, kernel.ErrInterrupted
		}
		if len(m.Data) < nfgenmsg {
			continue // an acknowledgement
		}
		out = append(out, attrs(m.Data[nfgenmsg:]))
	}
	return out, nil
}

// generation is the number that every change of the namespace's rules increases.
// What packets add to sets does not count.
func (c client) generation() (uint32, error) {
	replies, err := c.request(unix.NFT_MSG_GETGEN, unix.NFPROTO_UNSPEC, 0)
	if err != nil {
		return 0, fmt.Errorf("nftables: generation: %w", err)
	}
	for _, r := range replies {
		for _, a := range r {
			if a.typ == unix.NFTA_GEN_ID {
				return a.u32(), nil
			}
		}
	}
	return 0, errors.New("nftables: generation: the kernel does not say")
}

func name(typ uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: append([]byte(s), 0)}
}

// table reads one table once.
func (c client) table(family nftables.TableFamily, table string, elems []string) (found, error) {
	f := found{
		chains: map[string]chain{}, rules: map[string][]string{},
		sets: map[string]setShape{}, elems: map[string]map[string]string{},
	}
	tables, err := c.request(unix.NFT_MSG_GETTABLE, family, 0, name(unix.NFTA_TABLE_NAME, table))
	if errors.Is(err, unix.ENOENT) {
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("get table %s: %w", table, err)
	}
	f.exists = true
	for _, t := range tables {
		for _, a := range t {
			if a.typ == unix.NFTA_TABLE_FLAGS {
				f.dormant = a.u32()&unix.NFT_TABLE_F_DORMANT != 0
			}
		}
	}

	// The kernel gives the chains of all tables of the family; it has no filter.
	chains, err := c.request(unix.NFT_MSG_GETCHAIN, family, netlink.Dump)
	if err != nil {
		return f, fmt.Errorf("dump chains of table %s: %w", table, err)
	}
	for _, as := range chains {
		if in, ch := parseChain(as); in == table {
			f.chains[ch.name] = ch
		}
	}
	rules, err := c.request(unix.NFT_MSG_GETRULE, family, netlink.Dump, name(unix.NFTA_RULE_TABLE, table))
	if err != nil {
		return f, fmt.Errorf("dump rules of table %s: %w", table, err)
	}
	for _, as := range rules {
		if in, ch, comment := parseRule(as); in == table {
			f.rules[ch] = append(f.rules[ch], comment)
		}
	}
	sets, err := c.request(unix.NFT_MSG_GETSET, family, netlink.Dump, name(unix.NFTA_SET_TABLE, table))
	if err != nil {
		return f, fmt.Errorf("dump sets of table %s: %w", table, err)
	}
	for _, as := range sets {
		if in, s, shape := parseSet(as); in == table {
			f.sets[s] = shape
		}
	}
	for _, s := range elems {
		if _, ok := f.sets[s]; !ok {
			continue
		}
		list, err := c.request(unix.NFT_MSG_GETSETELEM, family, netlink.Dump,
			name(unix.NFTA_SET_ELEM_LIST_TABLE, table), name(unix.NFTA_SET_ELEM_LIST_SET, s))
		if err != nil {
			return f, fmt.Errorf("dump set %s of table %s: %w", s, table, err)
		}
		m := map[string]string{}
		for _, as := range list {
			parseElems(as, m)
		}
		if f.sets[s].isInterval() {
			m = intervals(m)
		}
		f.elems[s] = m
	}
	return f, nil
}

func parseChain(as []attr) (table string, c chain) {
	for _, a := range as {
		switch a.typ {
		case unix.NFTA_CHAIN_TABLE:
			table = a.text()
		case unix.NFTA_CHAIN_NAME:
			c.name = a.text()
		case unix.NFTA_CHAIN_TYPE:
			c.typ = nftables.ChainType(a.text())
		case unix.NFTA_CHAIN_HOOK:
			for _, h := range attrs(a.data) {
				switch h.typ {
				case unix.NFTA_HOOK_HOOKNUM:
					c.hook = h.u32()
				case unix.NFTA_HOOK_PRIORITY:
					c.priority = int32(h.u32())
				}
			}
		}
	}
	return table, c
}

func parseRule(as []attr) (table, chain, comment string) {
	for _, a := range as {
		switch a.typ {
		case unix.NFTA_RULE_TABLE:
			table = a.text()
		case unix.NFTA_RULE_CHAIN:
			chain = a.text()
		case unix.NFTA_RULE_USERDATA:
			// One type, one length, the text and a zero; see udata. Anybody may have
			// written it, so its length is not to be trusted.
			if u := a.data; len(u) >= 2 && u[0] == byte(userdata.TypeComment) && len(u) >= 2+int(u[1]) {
				comment = string(bytes.TrimRight(u[2:2+int(u[1])], "\x00"))
			}
		}
	}
	return table, chain, comment
}

func parseSet(as []attr) (table, name string, s setShape) {
	for _, a := range as {
		switch a.typ {
		case unix.NFTA_SET_TABLE:
			table = a.text()
		case unix.NFTA_SET_NAME:
			name = a.text()
		case unix.NFTA_SET_FLAGS:
			s.flags = a.u32()
		case unix.NFTA_SET_KEY_TYPE:
			s.keyType = a.u32()
		case unix.NFTA_SET_KEY_LEN:
			s.keyLen = a.u32()
		case unix.NFTA_SET_DATA_TYPE:
			s.dataType = a.u32()
		case unix.NFTA_SET_DATA_LEN:
			s.dataLen = a.u32()
		case unix.NFTA_SET_TIMEOUT:
			if len(a.data) == 8 {
				s.timeout = time.Duration(binary.BigEndian.Uint64(a.data)) * time.Millisecond
			}
		case unix.NFTA_SET_DESC:
			for _, d := range attrs(a.data) {
				if d.typ == unix.NFTA_SET_DESC_SIZE {
					s.size = d.u32()
				}
			}
		}
	}
	return table, name, s
}

// jumpTo is the data of an element that jumps to a chain: no MAC begins so,
// because it is longer than one.
func jumpTo(chain string) string { return "jump " + chain }

func parseElems(as []attr, into map[string]string) {
	for _, a := range as {
		if a.typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for _, e := range attrs(a.data) {
			var key, data string
			var end bool
			for _, f := range attrs(e.data) {
				switch f.typ {
				case unix.NFTA_SET_ELEM_KEY:
					key, _ = parseData(f.data)
				case unix.NFTA_SET_ELEM_DATA:
					data, _ = parseData(f.data)
				case unix.NFTA_SET_ELEM_FLAGS:
					end = f.u32()&unix.NFT_SET_ELEM_INTERVAL_END != 0
				}
			}
			if end {
				key += endMark
			}
			into[key] = data
		}
	}
}

// parseData reads a key, a value, or a verdict.
func parseData(b []byte) (data string, ok bool) {
	for _, a := range attrs(b) {
		switch a.typ {
		case unix.NFTA_DATA_VALUE:
			return string(a.data), true
		case unix.NFTA_DATA_VERDICT:
			var code int32
			var chain string
			for _, v := range attrs(a.data) {
				switch v.typ {
				case unix.NFTA_VERDICT_CODE:
					code = int32(v.u32())
				case unix.NFTA_VERDICT_CHAIN:
					chain = v.text()
				}
			}
			if code == unix.NFT_JUMP {
				return jumpTo(chain), true
			}
			return fmt.Sprintf("verdict %d %s", code, chain), true
		}
	}
	return "", false
}
