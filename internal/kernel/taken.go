package kernel

import (
	"fmt"

	"sluice/internal/model"
)

// TakenError says who has a port of the host. errors.Is finds ErrTaken in it.
type TakenError struct {
	Port    model.HostPort
	Process string // name and id, or that it cannot be seen
}

// Error implements error.
func (e *TakenError) Error() string { return fmt.Sprintf("port %s is held by %s", e.Port, e.Process) }

// Unwrap is for errors.Is.
func (e *TakenError) Unwrap() error { return ErrTaken }
