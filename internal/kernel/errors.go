package kernel

import "errors"

// The errors an adapter returns, behind texts that name the object.
var (
	// ErrNotExist: the object's place is not there (yet, or any more): a device, a namespace.
	ErrNotExist = errors.New("does not exist")
	// ErrTaken: something that is not sluice's holds what is asked for.
	ErrTaken = errors.New("is taken")
	// ErrUnsupported: this kernel lacks a feature.
	ErrUnsupported = errors.New("is not supported by this kernel")
	// ErrInterrupted: a dump raced with changes and may be incomplete; nothing may be concluded from it.
	ErrInterrupted = errors.New("dump was interrupted")
)
