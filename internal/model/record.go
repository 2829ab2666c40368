package model

// Record is one durable fact of this node. The store does not look into Value,
// and keeps it: who has handed a record over does not change it any more.
type Record struct {
	Kind  string // table: network, endpoint, pool, lease, …
	Key   string
	Value []byte
}

// RecordKey names a Record.
type RecordKey struct{ Kind, Key string }
