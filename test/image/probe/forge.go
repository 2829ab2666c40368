package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A forged frame carries its name between these, where nobody else looks: behind
// ARP's fields, or as the content of a protocol of IPv4 for experiments.
const (
	forgedMark, forgedEnd = "forged:", ";"
	experiment            = 253 // RFC 3692
)

// forge sends frames in whatever names it is told to, again and again.
func forge(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("forge", flag.ContinueOnError)
	f.Usage = func() {
		fmt.Fprint(stderr, "usage: probe forge [flags] NAME=arp|ipv4/MAC/IP,...\nSends each as a frame from MAC in which IP speaks, in this order.\n")
		f.PrintDefaults()
	}
	dev := f.String("dev", "eth0", "device to send by")
	to := f.String("to", "", "MAC/IP of who is to hear it")
	vtep := f.String("vxlan", "", "send them in VXLAN to this address and port instead")
	vni := f.Uint("vni", 0, "VNI of VXLAN")
	every := f.Duration("every", 20*time.Millisecond, "pause between two rounds")
	if err := parse(f, args, 1, stderr); err != nil {
		return err
	}
	hearer, err := parseWho(*to)
	if err != nil {
		return err
	}
	var frames [][]byte
	for text := range strings.SplitSeq(f.Arg(0), ",") {
		frame, err := forged(text, hearer)
		if err != nil {
			return err
		}
		frames = append(frames, frame)
	}
	var out io.WriteCloser
	if *vtep == "" {
		if out, err = openWire(*dev); err != nil {
			return err
		}
	} else {
		if out, err = net.Dial("udp4", *vtep); err != nil {
			return err
		}
		header := binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, uint32(*vni)<<8) // RFC 7348, 5
		for i, frame := range frames {
			frames[i] = slices.Concat(header, frame)
		}
	}
	defer out.Close()
	tick := time.NewTicker(*every)
	defer tick.Stop()
	for {
		for _, frame := range frames {
			// Nobody listens to VXLAN there, says the host by ICMP: it goes on.
			if _, err := out.Write(frame); err != nil && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EPERM) {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// who is a MAC and the address that goes with it.
type who struct {
	mac net.HardwareAddr
	ip  netip.Addr
}

func parseWho(s string) (who, error) {
	mac, ip, _ := strings.Cut(s, "/")
	var w who
	var err1, err2 error
	w.mac, err1 = net.ParseMAC(mac)
	w.ip, err2 = netip.ParseAddr(ip)
	if err := errors.Join(err1, err2); err != nil || len(w.mac) != 6 || !w.ip.Is4() {
		return w, fmt.Errorf("%q is not MAC/IP: %w", s, err)
	}
	return w, nil
}

// forged is the frame that a text like name=arp/02:00:00:00:00:01/10.0.0.1 stands for.
func forged(text string, to who) ([]byte, error) {
	name, rest, _ := strings.Cut(text, "=")
	kind, whom, _ := strings.Cut(rest, "/")
	from, err := parseWho(whom)
	if err != nil {
		return nil, err
	}
	ether := slices.Concat(to.mac, from.mac)
	mark := []byte(forgedMark + name + forgedEnd)
	switch kind {
	case "arp": // RFC 826: Ethernet, IPv4, lengths of addresses, reply
		return slices.Concat(ether, []byte{0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2}, from.mac, from.ip.AsSlice(), to.mac, to.ip.AsSlice(), mark), nil
	case "ipv4":
		head := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, experiment, 0, 0}
		binary.BigEndian.PutUint16(head[2:], uint16(20+len(mark)))
		head = slices.Concat(head, from.ip.AsSlice(), to.ip.AsSlice())
		var sum uint32
		for i := 0; i < len(head); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(head[i:]))
		}
		sum = sum>>16 + sum&0xffff
		binary.BigEndian.PutUint16(head[10:], ^uint16(sum>>16+sum))
		return slices.Concat(ether, []byte{0x08, 0x00}, head, mark), nil
	}
	return nil, fmt.Errorf("%q: want arp or ipv4", text)
}

// hear prints the names of the forged frames that come, and how many of each.
func hear(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("hear", flag.ContinueOnError)
	dev := f.String("dev", "eth0", "device to listen on")
	last := f.String("last", "last", "name of the frame that ends it")
	rounds := f.Int("rounds", 2, "end when it has come this often: what was sent between two of them has had its time")
	timeout := f.Duration("timeout", 30*time.Second, "give up after this time")
	if err := parse(f, args, 0, stderr); err != nil {
		return err
	}
	w, err := openWire(*dev)
	if err != nil {
		return err
	}
	defer w.Close()
	heard := map[string]int{}
	buf := make([]byte, 2048)
	for late := time.Now().Add(*timeout); heard[*last] < *rounds; {
		if time.Now().After(late) || ctx.Err() != nil {
			return fmt.Errorf("%q has come %d times in %s, want %d; heard %v", *last, heard[*last], *timeout, *rounds, heard)
		}
		n, err := unix.Read(int(w), buf)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if _, text, marked := bytes.Cut(buf[:n], []byte(forgedMark)); marked {
			if name, _, whole := bytes.Cut(text, []byte(forgedEnd)); whole {
				heard[string(name)]++
			}
		}
	}
	stdout.Write(line(heard))
	return nil
}

// wire is a socket for frames as they are, on one device.
type wire int

func openWire(dev string) (wire, error) {
	d, err := net.InterfaceByName(dev)
	if err != nil {
		return 0, err
	}
	const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // in the network's order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		return 0, fmt.Errorf("open a raw socket: %w", err)
	}
	// A read looks up now and then, for the time limit.
	second := unix.NsecToTimeval(time.Second.Nanoseconds())
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: d.Index}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &second)); err != nil {
		return 0, errors.Join(fmt.Errorf("listen on %s: %w", dev, err), unix.Close(fd))
	}
	return wire(fd), nil
}

func (w wire) Write(frame []byte) (int, error) { return unix.Write(int(w), frame) }
func (w wire) Close() error                    { return unix.Close(int(w)) }
