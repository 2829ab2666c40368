package nft

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// ruleset is the fixed part of a table: all of it but the elements of its sets
// and the chains of single objects, such as VIPs.
type ruleset struct {
	family nftables.TableFamily
	table  string
	sets   []set
	chains []chain
	rules  []rule
	// single says which other chains are those of single objects; nil: there are none.
	single func(name string) bool
}

// isSingle reports whether a chain is that of a single object.
func (rs ruleset) isSingle(name string) bool { return rs.single != nil && rs.single(name) }

// set is a named set, or a map if it has data.
type set struct {
	name    string
	key     []nftables.SetDatatype // the fields of its concatenation, each padded to 4 octets
	data    nftables.SetDatatype   // zero for a set
	ranges  bool                   // elements are intervals
	timeout time.Duration          // > 0: packets add elements, which live this long unless a rule says otherwise
	size    uint32                 // most elements; 0: no limit
}

// chain is a chain; typ is empty unless a hook calls it.
type chain struct {
	name     string
	typ      nftables.ChainType
	hook     uint32
	priority int32
}

// rule is one rule. Its text goes into the kernel as its comment, with a
// fingerprint of the expressions behind it, see comment.
type rule struct {
	chain string
	text  string
	exprs []expr.Any
}

// newRule joins the parts of a rule in order.
func newRule(chain, text string, parts ...[]expr.Any) rule {
	return rule{chain: chain, text: text, exprs: slices.Concat(parts...)}
}

// comment is what nft list shows behind the rule: what it is for, and a
// fingerprint of what it does. A rule's comment cannot change while the rule
// stays, so the comments of a chain, in order, say whether its rules are the
// ones that this version of sluice makes. Comparing the expressions themselves
// would make every kernel that prints one of them differently look damaged.
func (r rule) comment(family nftables.TableFamily) (string, error) {
	h := fnv.New32a()
	for _, e := range r.exprs {
		if _, ok := e.(*expr.Counter); ok {
			e = &expr.Counter{} // what it has counted is not what the rule does
		}
		b, err := expr.Marshal(byte(family), e)
		if err != nil {
			return "", fmt.Errorf("rule %q of chain %s: %w", r.text, r.chain, err)
		}
		h.Write(b)
	}
	return fmt.Sprintf("%s [%08x]", r.text, h.Sum32()), nil
}

// comments returns the comments of the fixed rules by chain.
func (rs ruleset) comments() (map[string][]string, error) {
	out := make(map[string][]string, len(rs.chains))
	for _, r := range rs.rules {
		c, err := r.comment(rs.family)
		if err != nil {
			return nil, err
		}
		out[r.chain] = append(out[r.chain], c)
	}
	return out, nil
}

// kernelTable is the library's form of the table.
func (rs ruleset) kernelTable() *nftables.Table {
	return &nftables.Table{Name: rs.table, Family: rs.family}
}

// isMap reports whether elements carry data.
func (s set) isMap() bool { return s.data.Name != "" }

// isVerdictMap reports whether the data is a verdict.
func (s set) isVerdictMap() bool { return s.data.Name == nftables.TypeVerdict.Name }

// keyType is the type of the key, a concatenation if it has several fields.
func (s set) keyType() (nftables.SetDatatype, error) {
	if len(s.key) == 1 {
		return s.key[0], nil
	}
	t, err := nftables.ConcatSetType(s.key...)
	if err != nil {
		return t, fmt.Errorf("set %s: %w", s.name, err)
	}
	return t, nil
}

// kernelSet is the library's form of the set. The id only has to be unique in a
// batch; giving it here keeps the library from its unguarded package counter.
func (s set) kernelSet(t *nftables.Table, id uint32) (*nftables.Set, error) {
	kt, err := s.keyType()
	if err != nil {
		return nil, err
	}
	return &nftables.Set{
		Table: t, ID: id, Name: s.name,
		IsMap: s.isMap(), KeyType: kt, DataType: s.data,
		Concatenation: len(s.key) > 1,
		Interval:      s.ranges,
		Dynamic:       s.timeout > 0, HasTimeout: s.timeout > 0, Timeout: s.timeout,
		Size: s.size,
	}, nil
}

// The registers that rules compute in: sixteen of four octets. Values longer
// than that take the following ones too.
const (
	r0 uint32 = unix.NFT_REG32_00 + iota
	r1
	r2
	r3
	r4
	r5
	r6
	r7
	r8
)

// part is a piece of a rule.
func part(e ...expr.Any) []expr.Any { return e }

// load reads octets of a header into a register.
func load(base expr.PayloadBase, offset, length, reg uint32) expr.Any {
	return &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg, Base: base, Offset: offset, Len: length}
}

// Fields of the Ethernet (IEEE 802.3), IPv4 (RFC 791), TCP, UDP, SCTP (ports in
// the same place) and ICMP (RFC 792) headers.
func etherDaddr(reg uint32) expr.Any { return load(expr.PayloadBaseLLHeader, 0, 6, reg) }
func ipID(reg uint32) expr.Any       { return load(expr.PayloadBaseNetworkHeader, 4, 2, reg) }
func ipFragOff(reg uint32) expr.Any  { return load(expr.PayloadBaseNetworkHeader, 6, 2, reg) }
func ipProtocol(reg uint32) expr.Any { return load(expr.PayloadBaseNetworkHeader, 9, 1, reg) }
func ipSaddr(reg uint32) expr.Any    { return load(expr.PayloadBaseNetworkHeader, 12, 4, reg) }
func ipDaddr(reg uint32) expr.Any    { return load(expr.PayloadBaseNetworkHeader, 16, 4, reg) }
func thSport(reg uint32) expr.Any    { return load(expr.PayloadBaseTransportHeader, 0, 2, reg) }
func thDport(reg uint32) expr.Any    { return load(expr.PayloadBaseTransportHeader, 2, 2, reg) }
func tcpFlags(reg uint32) expr.Any   { return load(expr.PayloadBaseTransportHeader, 13, 1, reg) }
func icmpType(reg uint32) expr.Any   { return load(expr.PayloadBaseTransportHeader, 0, 1, reg) }

// Fields of the packet that an ICMP error quotes: behind 8 octets of ICMP an
// IPv4 header, taken to be 20 octets, and the ports.
func quotedProtocol(reg uint32) expr.Any { return load(expr.PayloadBaseTransportHeader, 8+9, 1, reg) }
func quotedDaddr(reg uint32) expr.Any    { return load(expr.PayloadBaseTransportHeader, 8+16, 4, reg) }
func quotedSport(reg uint32) expr.Any    { return load(expr.PayloadBaseTransportHeader, 8+20, 2, reg) }
func quotedDport(reg uint32) expr.Any    { return load(expr.PayloadBaseTransportHeader, 8+22, 2, reg) }

// is compares a register with octets.
func is(reg uint32, b ...byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: b}
}

// isNot compares a register with octets.
func isNot(reg uint32, b ...byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: b}
}

// mask keeps the given bits of a register.
func mask(reg uint32, m ...byte) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(m)), Mask: m, Xor: make([]byte, len(m))}
}

// inSet ends the rule unless the key in the register is in the set.
func inSet(reg uint32, name string) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: name}
}

// notInSet ends the rule if the key in the register is in the set.
func notInSet(reg uint32, name string) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: name, Invert: true}
}

// mapped replaces a key by its data in a map, and ends the rule if there is none.
func mapped(key, dest uint32, name string) expr.Any {
	return &expr.Lookup{SourceRegister: key, DestRegister: dest, IsDestRegSet: true, SetName: name}
}

// vmap does the verdict that a key has in a map, and ends the rule if there is none.
func vmap(key uint32, name string) expr.Any {
	return mapped(key, unix.NFT_REG_VERDICT, name)
}

// setEtherDaddr writes a register as the frame's destination. There is no
// checksum over it.
func setEtherDaddr(reg uint32) expr.Any {
	return &expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: reg,
		Base: expr.PayloadBaseLLHeader, Offset: 0, Len: 6, CsumType: expr.CsumTypeNone,
	}
}

// update adds key and data to a map, or prolongs the life of what is there: the
// data of an element never changes. If the map is full, the rule ends here.
func update(name string, key, data uint32, life time.Duration) expr.Any {
	return &expr.Dynset{Operation: unix.NFT_DYNSET_OP_UPDATE, SetName: name, SrcRegKey: key, SrcRegData: data, Timeout: life}
}

// forget deletes a key from a map, if it is there. The kernel wants a data
// register for a map even so.
func forget(name string, key, data uint32) expr.Any {
	return &expr.Dynset{Operation: dynsetDelete, SetName: name, SrcRegKey: key, SrcRegData: data}
}

// dynsetDelete is NFT_DYNSET_OP_DELETE (Linux 5.4), which package unix lacks.
const dynsetDelete = 2

func verdict(k expr.VerdictKind, chain string) []expr.Any {
	return part(&expr.Verdict{Kind: k, Chain: chain})
}
func jump(chain string) []expr.Any { return verdict(expr.VerdictJump, chain) }

// goTo continues in another chain; what called this one is what that one returns to.
func goTo(chain string) []expr.Any { return verdict(expr.VerdictGoto, chain) }
func ret() []expr.Any              { return verdict(expr.VerdictReturn, "") }
func accept() []expr.Any           { return verdict(expr.VerdictAccept, "") }
func drop() []expr.Any             { return verdict(expr.VerdictDrop, "") }

// uncomment returns the text of a rule's comment without its fingerprint.
func uncomment(comment string) string {
	if i := strings.LastIndex(comment, " ["); i >= 0 {
		return comment[:i]
	}
	return comment
}

// udata wraps a comment the way nft(8) reads it.
func udata(comment string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, comment)
}
