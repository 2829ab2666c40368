package nft_test

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
)

// manyServices is a network's state with so many services of so many backends
// each; every node has ten members.
func manyServices(ns string, services, backends int) kernel.State {
	mac, _ := model.ParseMAC(routerMAC)
	st := kernel.State{kernel.BridgeTable{NS: ns}: kernel.BridgeTableSpec{Router: mac, Uplink: uplink}}
	addr := func(third, n int) netip.Addr {
		return netip.AddrFrom4([4]byte{10, 240, byte(third + n/250), byte(n % 250)})
	}
	for s := range services {
		vip := addr(0, s)
		st[kernel.VIP{NS: ns, IP: vip}] = kernel.VIPSpec{Scheduler: "rr", Slots: backends}
		for b := range backends {
			m := model.MACFor(addr(100, s*backends+b))
			st[kernel.Slot{NS: ns, VIP: vip, Slot: b}] = kernel.SlotSpec{MAC: m}
			st[kernel.Alive{NS: ns, VIP: vip, MAC: m}] = kernel.AliveSpec{}
		}
	}
	for m := range 10 {
		a := addr(90, m)
		st[kernel.Member{NS: ns, IP: a}] = kernel.MemberSpec{MAC: model.MACFor(a)}
	}
	return st
}

// without is the state after the last backend of a service has gone.
func without(st kernel.State, ns string, vip netip.Addr) kernel.State {
	out := maps.Clone(st)
	spec := out[kernel.VIP{NS: ns, IP: vip}].(kernel.VIPSpec)
	last := kernel.Slot{NS: ns, VIP: vip, Slot: spec.Slots - 1}
	mac := out[last].(kernel.SlotSpec).MAC
	delete(out, last)
	delete(out, kernel.Alive{NS: ns, VIP: vip, MAC: mac})
	spec.Slots--
	out[kernel.VIP{NS: ns, IP: vip}] = spec
	return out
}

func BenchmarkApply(b *testing.B) {
	const ns = "sluice-bench"
	for _, n := range []int{1, 100, 1000, 4000} {
		full := manyServices(ns, n, 10)
		less := without(full, ns, netip.AddrFrom4([4]byte{10, 240, 0, 0}))
		b.Run(fmt.Sprintf("services=%d/all", n), func(b *testing.B) {
			fd := newNetns(b)
			ops := kernel.Diff(kernel.State{}, full)
			for b.Loop() {
				must(b, nft.Tables{}.ApplyBridge(fd, ns, ops))
				b.StopTimer()
				must(b, nft.Tables{}.ApplyBridge(fd, ns, []kernel.Op{{Key: kernel.BridgeTable{NS: ns}, Have: kernel.BridgeTableSpec{}}}))
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("services=%d/one-backend", n), func(b *testing.B) {
			fd := newNetns(b)
			must(b, nft.Tables{}.ApplyBridge(fd, ns, kernel.Diff(kernel.State{}, full)))
			ops := [2][]kernel.Op{kernel.Diff(full, less), kernel.Diff(less, full)}
			i := 0
			for b.Loop() {
				must(b, nft.Tables{}.ApplyBridge(fd, ns, ops[i%2]))
				i++
			}
		})
		b.Run(fmt.Sprintf("services=%d/dump", n), func(b *testing.B) {
			fd := newNetns(b)
			must(b, nft.Tables{}.ApplyBridge(fd, ns, kernel.Diff(kernel.State{}, full)))
			for b.Loop() {
				st, err := nft.Tables{}.DumpBridge(fd, ns)
				must(b, err)
				if len(st) != len(full) {
					b.Fatalf("dump has %d objects of %d", len(st), len(full))
				}
			}
		})
	}
}

// BenchmarkAgainstDirect compares a VIP with its backend's own address, in turns
// so short that noise meets both: vip/direct is the ratio of their rates. The
// tasks have the engine's DNS rules, as all containers have, so connection
// tracking works for both. One thread is client, one is server.
func BenchmarkAgainstDirect(b *testing.B) {
	l := newLab(b, byNFT())
	for _, k := range l.tasks {
		k.serve(b, "0.0.0.0:80")
		run(b, k.fd, "iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "127.0.0.11/32", "-p", "udp", "--dport", "53", "-j", "DNAT", "--to-destination", "127.0.0.11:40053")
	}
	a := l.tasks["a"]
	for _, where := range []struct{ name, server string }{{"local", "b"}, {"remote", "d"}} {
		l.set(service{vip: vip1, ready: l.names(where.server)})
		targets := [2]string{vip1 + ":80", l.tasks[where.server].ip.String() + ":80"}
		ratio := func(b *testing.B, each int, f func(target int) error) {
			var took [2]time.Duration
			do(b, a.fd, func() error {
				for i := 0; b.Loop(); i++ {
					for j := range targets {
						target := (i + j) % 2 // who begins, takes turns
						began := time.Now()
						for range each {
							if err := f(target); err != nil {
								return err
							}
						}
						took[target] += time.Since(began)
					}
				}
				return nil
			})
			b.ReportMetric(float64(took[1])/float64(took[0]), "vip/direct")
			b.ReportMetric(float64(took[0].Nanoseconds())/float64(b.N*each), "ns/vip")
		}
		b.Run(where.name+"/connect", func(b *testing.B) {
			ratio(b, 5, func(i int) error {
				c, err := net.Dial("tcp4", targets[i])
				if err != nil {
					return err
				}
				var buf [64]byte
				_, err = c.Read(buf[:]) // the greeting
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
				return err
			})
		})
		b.Run(where.name+"/request", func(b *testing.B) {
			var conns [2]*conn
			for i := range conns {
				var err error
				conns[i], err = a.dial("", targets[i])
				must(b, err)
				conns[i].SetDeadline(time.Time{})
				defer conns[i].Close()
			}
			var buf [64]byte
			ratio(b, 50, func(i int) error {
				if _, err := conns[i].Conn.Write(buf[:]); err != nil {
					return err
				}
				_, err := io.ReadFull(conns[i].Conn, buf[:])
				return err
			})
		})
	}
}

// BenchmarkGuard compares a VIP behind the source guard with one without it, in turns
// of some milliseconds, so that noise meets both: with/without is the ratio of the
// processor's time that they take, and what is above 1 is what the guard costs. It is
// best run on one processor, which then does all of the bridge's work in our name.
func BenchmarkGuard(b *testing.B) {
	l := newLab(b, byNFT())
	for _, k := range l.tasks {
		k.serve(b, "0.0.0.0:80")
	}
	a := l.tasks["a"]
	for _, where := range []struct{ name, server string }{{"local", "b"}, {"remote", "d"}} {
		l.set(service{vip: vip1, ready: l.names(where.server)})
		// guards puts the tables up or takes them down, on both hosts.
		guards := func(b *testing.B, up bool) {
			for _, h := range l.hosts {
				full := kernel.State{}
				for k, v := range h.have {
					switch k.(type) {
					case kernel.GuardTable, kernel.GuardPort, kernel.GuardAddr:
						full[k] = v
					}
				}
				ops := []kernel.Op{{Key: kernel.GuardTable{NS: h.name}, Have: full[kernel.GuardTable{NS: h.name}]}}
				if up {
					ops = kernel.Diff(kernel.State{}, full)
				}
				must(b, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
			}
		}
		compare := func(b *testing.B, each int, f func() error) {
			var took [2][]float64 // without, with
			for i := 0; b.Loop(); i++ {
				for j := range took {
					with := (i + j) % 2  // who begins, takes turns
					guards(b, with == 0) // both ways, as what the kernel still does after a change meets the turn
					guards(b, with == 1)
					do(b, a.fd, func() error {
						// The kernel frees what has gone within a grace period, 16 ms at most.
						for late := time.Now().Add(30 * time.Millisecond); time.Now().Before(late); {
							if err := f(); err != nil {
								return err
							}
						}
						began := used(b)
						for range each {
							if err := f(); err != nil {
								return err
							}
						}
						took[with] = append(took[with], float64((used(b)-began).Nanoseconds())/float64(each))
						return nil
					})
				}
			}
			guards(b, true)
			for i := range took {
				slices.Sort(took[i])
			}
			// Other work on the machine only ever adds: the best quarter says most.
			quarter := func(of []float64) (sum float64) {
				for _, ns := range of[:len(of)/4+1] {
					sum += ns
				}
				return sum / float64(len(of)/4+1)
			}
			median := func(of []float64) float64 { return of[len(of)/2] }
			b.ReportMetric(median(took[1])/median(took[0]), "median-with/without")
			b.ReportMetric(quarter(took[1])/quarter(took[0]), "with/without")
			b.ReportMetric(quarter(took[1]), "ns/with")
			b.ReportMetric(quarter(took[1])-quarter(took[0]), "ns/guard")
		}
		b.Run(where.name+"/connect", func(b *testing.B) {
			compare(b, 100, func() error {
				c, err := net.Dial("tcp4", vip1+":80")
				if err != nil {
					return err
				}
				var buf [64]byte
				_, err = c.Read(buf[:]) // the greeting
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
				return err
			})
		})
		b.Run(where.name+"/request", func(b *testing.B) {
			c, err := a.dial("", vip1+":80")
			must(b, err)
			c.SetDeadline(time.Time{})
			defer c.Close()
			var buf [64]byte
			compare(b, 1000, func() error {
				if _, err := c.Conn.Write(buf[:]); err != nil {
					return err
				}
				_, err := io.ReadFull(c.Conn, buf[:])
				return err
			})
		})
	}
}

// used is the processor's time that this process has taken.
func used(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
