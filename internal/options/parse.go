package options

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"sluice/internal/model"
)

// NetworkRequest is what the options of a network ask for.
type NetworkRequest struct {
	Options model.NetworkOptions // defaults filled in
	VNI     model.VNI            // 0: to be allocated
	MTU     int                  // of the overlay, in bytes; 0: from the underlay
	Key     Key                  // the gossip key that travels with the network; empty: none
	Refused string               // why the leader refused the network; empty: it did not
}

// Error is one option that cannot be taken.
type Error struct {
	Key     string
	Value   string // empty if it is a secret
	Problem string // what is wrong
	Allowed string // what to write instead; may be empty
}

// Error is one line: key=value: problem; allowed: values.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Key)
	if e.Value != "" {
		b.WriteString("=" + strconv.Quote(e.Value))
	}
	b.WriteString(": " + e.Problem)
	if e.Allowed != "" {
		b.WriteString("; allowed: " + e.Allowed)
	}
	return b.String()
}

// Errors are all options of one map that cannot be taken, in the order of
// their keys.
type Errors []*Error

// Error puts all on one line: `docker service ps` shows one line per task.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, " | ")
}

// Unwrap lets errors.As find the single errors.
func (es Errors) Unwrap() []error {
	errs := make([]error, len(es))
	for i, e := range es {
		errs[i] = e
	}
	return errs
}

// Network reads the options of a network, as AllocateNetwork and the generic
// part of CreateNetwork carry them. The error is an Errors with every option
// that was refused; the request then holds what could be read.
func Network(in map[string]string) (NetworkRequest, error) {
	r := NetworkRequest{Options: model.NetworkOptions{
		Datapath:  "auto",
		Mode:      "dr",
		Scheduler: "rr",
	}}
	errs, told := read(in, networkOptions, &r, foreignNetworkKey)
	if model.NeedsIPVS(r.Options.Scheduler) && r.Options.Datapath == nft {
		errs = append(errs, told.refuse(Scheduler, uncounted(r.Options.Scheduler), withoutCounts()+", or another "+Datapath))
		r.Options.Scheduler = "rr"
	}
	return r, errs.orNil()
}

// Service reads the options of an endpoint: the driver-opt of a service's or a
// container's network. Keys without the prefix `sluice.` belong to the engine
// and are passed over. The error is an Errors with every option that was
// refused; the options then hold what could be read, but no published ports if
// anything of those was refused.
func Service(in map[string]string) (model.ServiceOptions, error) {
	var o model.ServiceOptions
	errs, told := read(in, serviceOptions, &o, func(string) *Error { return nil })
	// What belongs together. If one of the two was refused, that is told already.
	switch {
	case o.Persist > 0 && o.PersistBits == 0:
		o.PersistBits = 32
	case o.Persist == 0 && o.PersistBits > 0:
		if !told.refused[Persistence] {
			errs = append(errs, told.refuse(Netmask, "is the netmask of "+Persistence+", which is off", "with "+Persistence+"=DURATION"))
		}
		o.PersistBits = 0
	}
	if o.Lower > o.Upper {
		switch {
		case told.refused[Upper]:
		case o.Upper == 0:
			errs = append(errs, told.refuse(Lower, "needs "+Upper+", which is not set", "0, or with "+Upper+"=NUMBER"))
		default:
			errs = append(errs, told.refuse(Lower, fmt.Sprintf("is more than %s, which is %d", Upper, o.Upper), between(0, o.Upper)))
		}
		o.Lower = 0
	}
	if n, at := o.Published.Ports(), max(len(o.Bind.List()), 1); n*at > model.MaxHostPorts {
		errs = append(errs, told.refuse(Publish, fmt.Sprintf("is %d ports at %d addresses", n, at), fmt.Sprintf("up to %d ports, counted for each address of %s", model.MaxHostPorts, Bind)))
		o.Published, told.refused[Publish] = "", true
	}
	// Without what was refused, or is another version's, it would be open to more than was
	// meant: after an update, old tasks still run behind it.
	for key := range told.refused {
		if strings.HasPrefix(key, Publish+".") {
			o.Published, told.refused[Publish] = "", true
		}
	}
	if o.Published == "" {
		errs = append(errs, unpublish(&o, told)...)
	}
	return o, errs.orNil()
}

// unpublish takes away what is of use with published ports only, and says so.
func unpublish(o *model.ServiceOptions, t told) Errors {
	var errs Errors
	for _, of := range []struct {
		key string
		set bool
	}{{Bind, o.Bind != ""}, {Nodes, o.Nodes != ""}, {Allow, o.Allow != ""}, {Source, o.Source != model.Keep}} {
		if of.set && !t.refused[Publish] {
			errs = append(errs, t.refuse(of.key, "is of use with "+Publish+" only, which is not set", "with "+Publish+"=PORTS"))
		}
	}
	o.Bind, o.Nodes, o.Allow, o.Source = "", "", "", model.Keep
	return errs
}

// Fits says what a service asks for that its network rules out. The error is an
// Errors; its keys and values are as read, not as written.
func Fits(n model.NetworkOptions, s model.ServiceOptions) error {
	errs := fitsMode(cmp.Or(s.Mode, n.Mode), s)
	if n.Datapath != nft {
		return errs.orNil()
	}
	if model.NeedsIPVS(s.Scheduler) {
		errs = append(errs, &Error{Scheduler, s.Scheduler, uncounted(s.Scheduler), withoutCounts() + ", or a network with another " + Datapath})
	}
	if s.Upper > 0 {
		errs = append(errs, &Error{Upper, strconv.Itoa(s.Upper), uncounted("a threshold"), "0, or a network with another " + Datapath})
	}
	return errs.orNil()
}

// fitsMode says what a service asks for that its mode rules out. In nat, the node
// of the client gives each answer the virtual IP and its port back.
func fitsMode(mode string, s model.ServiceOptions) Errors {
	const nat = "nat"
	if mode != nat {
		return nil
	}
	var errs Errors
	if s.OnePacket {
		errs = append(errs, &Error{OnePacket, "true", "cannot be had with " + Mode + "=" + nat + ", where ip_vs has to remember whose answer it is", "false, or another " + Mode})
	}
	for _, p := range s.Ports.List() {
		if p.Proto == model.SCTP && p.From != p.To {
			errs = append(errs, &Error{Ports, string(s.Ports), "SCTP cannot get another port with " + Mode + "=" + nat + ": kernels before 5.15 cannot mend its checksum", "the same port, or another " + Mode})
			break
		}
	}
	return errs
}

const nft = "nft"

// uncounted says why what cannot be had with nft.
func uncounted(what string) string {
	return what + " needs the number of open connections of each backend, which only the kernel's ip_vs keeps, and the network has " + Datapath + "=" + nft
}

// Secret reports whether the value of key, in any case, must not be printed.
func Secret(key string) bool {
	return strings.EqualFold(strings.TrimSpace(key), SecretKey)
}

// Redact is a copy of in that may be printed.
func Redact(in map[string]string) map[string]string {
	out := maps.Clone(in)
	for k := range out {
		if Secret(k) {
			out[k] = Redacted
		}
	}
	return out
}

// told is how people wrote the options of one map, by the table's keys.
type told struct {
	in      map[string]string
	given   map[string]string // the spelling that a key was taken in
	refused map[string]bool
}

// refuse is what is wrong with an option only because of another.
func (t told) refuse(key, problem, allowed string) *Error {
	as := t.given[key]
	return &Error{Key: as, Value: t.in[as], Problem: problem, Allowed: allowed}
}

// read parses in by table into dst. foreign judges the keys that are neither in
// the table nor ours; nil takes them.
func read[T comparable](in map[string]string, table []option[T], dst *T, foreign func(key string) *Error) (Errors, told) {
	var errs Errors
	refuse := func(key, value, problem, allowed string) {
		if Secret(key) {
			value = ""
		}
		errs = append(errs, &Error{Key: key, Value: value, Problem: problem, Allowed: allowed})
	}
	given, refused := make(map[string]string, len(in)), make(map[string]bool)
	for _, key := range slices.Sorted(maps.Keys(in)) {
		value := in[key]
		folded := strings.ToLower(strings.TrimSpace(key))
		i := slices.IndexFunc(table, func(o option[T]) bool { return o.Key == folded || o.alias == folded && o.alias != "" })
		switch {
		case i < 0 && strings.HasPrefix(folded, prefix):
			refuse(key, value, unknown(folded), keyList(table))
			refused[folded] = true
			continue
		case i < 0:
			if e := foreign(folded); e != nil {
				refuse(key, value, e.Problem, e.Allowed)
			}
			continue
		}
		o := table[i]
		text := value
		if !o.Internal {
			var err error
			if text, err = unescape(value); err != nil {
				refuse(key, value, err.Error(), o.Allowed)
				refused[o.Key] = true
				continue
			}
		}
		next := *dst
		if err := o.set(&next, text); err != nil {
			refuse(key, value, err.Error(), o.Allowed)
			refused[o.Key] = true
			continue
		}
		if first, twice := given[o.Key]; twice && next != *dst {
			refuse(key, value, fmt.Sprintf("contradicts %s, which is the same option; give one of them", first), "")
			continue
		}
		given[o.Key] = key
		*dst = next
	}
	return errs, told{in, given, refused}
}

// unknown says what is wrong with a `sluice.` key that the table does not have.
func unknown(key string) string {
	is := func(o Option) bool { return o.Key == key }
	switch {
	case slices.ContainsFunc(NetworkTable(), is):
		return "is an option of a network (docker network create -o KEY=VALUE), not of a service"
	case slices.ContainsFunc(ServiceTable(), is):
		return "is an option of a service (docker service create --network name=NET,driver-opt=KEY=VALUE), not of a network"
	}
	return "unknown option"
}

// foreignNetworkKey judges a network option that is not sluice's.
func foreignNetworkKey(key string) *Error {
	keys := keyList(networkOptions)
	switch key {
	case "com.docker.network.enable_ipv4", "com.docker.network.enable_ipv6", "com.docker.network.internal":
		// The engine says these beside the driver's options too, where they are read.
		return nil
	case "com.docker.network.advertise_addr_nmsgs", "com.docker.network.advertise_addr_ms":
		// Served by the engine for every driver (28.x): how often, and how fast,
		// it announces a container's address.
		return nil
	case "com.docker.network.driver.overlay.vxlanid_list":
		return &Error{Problem: "is an option of Docker's overlay driver; a sluice network has one VNI, given with " + VNI, Allowed: keys}
	case "encrypted":
		return &Error{Problem: "is an option of Docker's overlay driver; this version of sluice does not encrypt the traffic of containers", Allowed: keys}
	}
	if strings.HasPrefix(key, "com.docker.network.") {
		return &Error{Problem: "is an option of the engine's own drivers that sluice does not have", Allowed: keys}
	}
	return &Error{Problem: "unknown option", Allowed: keys}
}

// keyList is the keys that people may set.
func keyList[T any](table []option[T]) string {
	var keys []string
	for _, o := range table {
		if !o.Internal {
			keys = append(keys, o.Key)
		}
	}
	return strings.Join(keys, ", ")
}

// orNil is the errors in the order of their keys, or none.
func (es Errors) orNil() error {
	if len(es) == 0 {
		return nil
	}
	slices.SortStableFunc(es, func(a, b *Error) int { return strings.Compare(a.Key, b.Key) })
	return es
}
