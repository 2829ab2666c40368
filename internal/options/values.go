package options

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"sluice/internal/model"
)

// word is one value of a choice. An empty no means that it is served; else no
// says why a word that people know from elsewhere is refused.
type word struct{ name, no string }

type choice []word

// The choices. The schedulers are those of the kernel, so that a name copied from
// an ipvsadm or keepalived configuration means the same here.
var (
	datapaths  = choice{{name: "auto"}, {name: "ipvs"}, {name: "nft"}}
	modes      = choice{{name: "dr"}, {name: "nat"}, {name: "tun"}}
	sources    = choice{{name: "keep"}, {name: string(model.Masquerade)}}
	schedulers = schedulerChoice()
	booleans   = map[string]bool{
		"true": true, "on": true, "yes": true, "1": true,
		"false": false, "off": false, "no": false, "0": false,
	}
)

func schedulerChoice() choice {
	var c choice
	for _, s := range model.Schedulers() {
		c = append(c, word{name: s.Name})
	}
	return append(c, word{"twos", "is not in every kernel that has ip_vs, and all nodes must mean the same"})
}

// schedulersDoc is the manual's text of the schedulers.
func schedulersDoc() string {
	texts := make([]string, 0, len(schedulers))
	var counting []string
	for _, s := range model.Schedulers() {
		texts = append(texts, "`"+s.Name+"` "+s.Doc)
		if s.Counts {
			counting = append(counting, "`"+s.Name+"`")
		}
	}
	return "How a backend is chosen: " + strings.Join(texts, "; ") + ". Only ip_vs counts connections: with " +
		strings.Join(counting, ", ") + ", nodes that balance by nftables do the nearest that they can, and `" + Datapath + "=nft` is refused."
}

// withoutCounts lists the schedulers that every datapath has.
func withoutCounts() string {
	var names []string
	for _, s := range model.Schedulers() {
		if !s.Counts {
			names = append(names, s.Name)
		}
	}
	return strings.Join(names, ", ")
}

// parse returns the word that v names in any case.
func (c choice) parse(v string) (string, error) {
	v = strings.ToLower(v)
	for _, w := range c {
		switch {
		case w.name != v:
		case w.no != "":
			return "", fmt.Errorf("%s %s", v, w.no)
		default:
			return w.name, nil
		}
	}
	return "", fmt.Errorf("unknown")
}

// allowed lists the words that are served.
func (c choice) allowed() string {
	var names []string
	for _, w := range c {
		if w.no == "" {
			names = append(names, w.name)
		}
	}
	return strings.Join(names, ", ")
}

func between(lo, hi int) string { return fmt.Sprintf("a number from %d to %d", lo, hi) }

// number reads a decimal number in [lo, hi].
func number(v string, lo, hi int) (int, error) {
	// Base 10, not 0: 0100 is somebody's hundred, not sixty-four.
	n, err := strconv.ParseInt(v, 10, 32)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("out of range")
	case err != nil:
		return 0, fmt.Errorf("not a number")
	case n < int64(lo) || n > int64(hi):
		return 0, fmt.Errorf("out of range")
	}
	return int(n), nil
}

// durations is what seconds reads, for texts.
const durations = "a duration of whole seconds from 1s to 576h, like 300, 300s, 5m or 2h"

// seconds reads a duration that is from one second to MaxSeconds.
func seconds(v string) (int, error) {
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		d, err := time.ParseDuration(strings.ToLower(v))
		if err != nil {
			return 0, errors.New("not a duration")
		}
		if d%time.Second != 0 {
			return 0, errors.New("not whole seconds")
		}
		n = int64(d / time.Second)
	}
	if n < 1 || n > MaxSeconds {
		return 0, errors.New("out of range")
	}
	return int(n), nil
}

// persistence reads a duration, or none.
func persistence(v string) (int, error) {
	if v == "0" || strings.EqualFold(v, "off") {
		return 0, nil
	}
	return seconds(v)
}

// netmask reads the length of a prefix, which may be written as a mask.
func netmask(v string) (int, error) {
	if !strings.Contains(v, ".") {
		return number(v, 1, 32)
	}
	a, err := netip.ParseAddr(v)
	if err != nil || !a.Is4() {
		return 0, errors.New("not a mask")
	}
	mask := a.As4()
	m := binary.BigEndian.Uint32(mask[:])
	ones := bits.LeadingZeros32(^m)
	if ones == 0 || m<<ones != 0 {
		return 0, errors.New("not a mask: bits that are one come first, and there is at least one")
	}
	return ones, nil
}

func boolean(v string) (bool, error) {
	b, ok := booleans[strings.ToLower(v)]
	if !ok {
		return false, errors.New("neither true nor false")
	}
	return b, nil
}

// unescape undoes %XX. The text of an internal option is ours and never
// escaped, so it is not passed here.
func unescape(v string) (string, error) {
	u, err := url.PathUnescape(v)
	if err != nil {
		return "", fmt.Errorf("a %% must start an escape like %%2f; write %%25 for the sign itself")
	}
	return strings.TrimSpace(u), nil
}
