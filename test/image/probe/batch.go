package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Datagrams of a batch, and the largest one.
const (
	batchSize = 32
	batchMax  = 2048
)

// batch sends and receives many datagrams with one system call each (sendmmsg(2),
// recvmmsg(2)), so that the time they take is their way's.
type batch struct {
	headers [batchSize]mmsghdr
	vectors [batchSize]unix.Iovec
	names   [batchSize]unix.RawSockaddrInet4
	data    [batchSize][batchMax]byte
}

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [unsafe.Sizeof(uintptr(0)) - 4]byte // as long as its alignment says
}

func newBatch() *batch {
	b := new(batch)
	for i := range b.headers {
		b.vectors[i].Base = &b.data[i][0]
		b.headers[i].hdr.Iov = &b.vectors[i]
		b.headers[i].hdr.SetIovlen(1)
		b.headers[i].hdr.Name = (*byte)(unsafe.Pointer(&b.names[i]))
	}
	return b
}

// receive waits for one datagram, takes what else is there, and returns how many
// these are.
func (b *batch) receive(fd int) (int, error) {
	for i := range b.headers {
		b.vectors[i].SetLen(batchMax)
		b.headers[i].hdr.Namelen = unix.SizeofSockaddrInet4
	}
	return b.call(unix.SYS_RECVMMSG, fd, batchSize, unix.MSG_WAITFORONE)
}

// send sends the first n to where they came from.
func (b *batch) send(fd, n int) error {
	for sent := 0; sent < n; {
		k, err := b.callFrom(unix.SYS_SENDMMSG, fd, sent, n-sent, 0)
		if err != nil {
			return err
		}
		sent += k
	}
	return nil
}

// connected makes the batch one of a connected socket, which has no other peer.
func (b *batch) connected() {
	for i := range b.headers {
		b.headers[i].hdr.Name = nil
	}
}

func (b *batch) call(trap uintptr, fd, n int, flags uintptr) (int, error) {
	return b.callFrom(trap, fd, 0, n, flags)
}

func (b *batch) callFrom(trap uintptr, fd, from, n int, flags uintptr) (int, error) {
	return retry(func() (int, error) {
		k, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&b.headers[from])), uintptr(n), flags, 0, 0)
		if errno != 0 {
			return 0, errno
		}
		return int(k), nil
	})
}

// get is datagram i as it was received.
func (b *batch) get(i int) []byte { return b.data[i][:b.headers[i].n] }

// set makes m the datagram i to send.
func (b *batch) set(i int, m []byte) {
	b.vectors[i].SetLen(copy(b.data[i][:], m))
}

// from is who sent datagram i.
func (b *batch) from(i int) unix.Sockaddr {
	port := (*[2]byte)(unsafe.Pointer(&b.names[i].Port)) // in network order
	return &unix.SockaddrInet4{Port: int(port[0])<<8 | int(port[1]), Addr: b.names[i].Addr}
}
