package pool

import (
	"errors"
	"fmt"
)

// What can be wrong with a request. Test with errors.Is; the text of the error
// itself is made for the person who typed the command.
var (
	// ErrInvalid: the request cannot be served in any state of the table.
	ErrInvalid = errors.New("invalid request")
	// ErrConflict: the subnet belongs to, or overlaps, another network's.
	ErrConflict = errors.New("subnet conflict")
	// ErrInUse: the address is leased to another container.
	ErrInUse = errors.New("address in use")
	// ErrExhausted: no address or no subnet is left.
	ErrExhausted = errors.New("exhausted")
	// ErrUnknownPool: a pool that was never requested, or released since.
	ErrUnknownPool = errors.New("unknown pool")
	// ErrUnknownNetwork: a network that owns no pool here.
	ErrUnknownNetwork = errors.New("unknown network")
)

// Error is a refusal: what was asked, what is wrong, what to do. Docker shows
// Text as it stands, so the kind is kept beside it and not in front of it.
type Error struct {
	Kind error // one of the sentinels above
	Text string
}

// Error returns the text.
func (e *Error) Error() string { return e.Text }

// Unwrap returns the kind, for errors.Is.
func (e *Error) Unwrap() error { return e.Kind }

func refuse(kind error, format string, args ...any) error {
	return &Error{Kind: kind, Text: fmt.Sprintf(format, args...)}
}
