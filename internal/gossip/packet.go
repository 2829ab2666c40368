package gossip

import "encoding/binary"

// maxPacket is the largest envelope sent as one UDP packet, in bytes. memberlist
// fills packets to udpBuffer; around ours come its message type (1), CRC (5),
// compound header (2+2) and encryption (29); the rest, 61, leaves room for a
// short membership message in the same packet.
const (
	udpBuffer = 1400
	maxPacket = 1300
)

// split cuts a delta that is not full into several of which each fits a packet
// where its records allow that. The parts join without a gap.
func (d delta) split() []*delta {
	limit := maxPacket - 1 - binary.MaxVarintLen32 - 2*binary.MaxVarintLen32 - len(d.appendHeader(nil)) - 3*binary.MaxVarintLen64
	var (
		parts []*delta
		rest  = d.records
		from  = d.from
	)
	for {
		n, size := 0, 0
		for n < len(rest) {
			size += 2*binary.MaxVarintLen32 + binary.MaxVarintLen64 + len(rest[n].key) + len(rest[n].value)
			if n > 0 && size > limit {
				break
			}
			n++
		}
		part := d
		part.from, part.records, part.retained = from, rest[:n:n], nil
		if rest = rest[n:]; len(rest) == 0 {
			return append(parts, &part)
		}
		// Changes with a seq between the last of this part and the first of the
		// next are superseded ones; it does not matter which part covers them.
		part.to = min(part.records[n-1].seq, d.to)
		from = part.to
		parts = append(parts, &part)
	}
}

// encodeDelta encodes a delta as one message if it is full, else as several that
// fit packets where possible.
func encodeDelta(d delta) [][]byte {
	if d.full {
		return [][]byte{d.encode()}
	}
	var msgs [][]byte
	for _, part := range d.split() {
		msgs = append(msgs, part.encode())
	}
	return msgs
}

// packets joins messages into envelopes of at most maxPacket bytes each; false
// if that does not work or takes more than limit of them.
func packets(msgs [][]byte, limit int) ([][]byte, bool) {
	var (
		out  [][]byte
		size = maxPacket
		from = 0
	)
	for i, m := range msgs {
		need := len(envelope(m)) - 1
		if 1+need > maxPacket {
			return nil, false
		}
		if i > from && size+need > maxPacket {
			out = append(out, envelope(msgs[from:i]...))
			from = i
		}
		if i == from {
			size = 1
		}
		size += need
	}
	if from < len(msgs) {
		out = append(out, envelope(msgs[from:]...))
	}
	return out, len(out) <= limit
}

// maxStream is where messages to a peer are spread over several streams. One
// message may be larger, up to a whole table; see MaxTable.
const maxStream = 4 << 20

func streams(msgs [][]byte) (out [][]byte) {
	size, from := 0, 0
	for i, m := range msgs {
		if i > from && size+len(m) > maxStream {
			out = append(out, envelope(msgs[from:i]...))
			size, from = 0, i
		}
		size += len(m)
	}
	return append(out, envelope(msgs[from:]...))
}
