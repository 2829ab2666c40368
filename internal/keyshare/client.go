package keyshare

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
	"unicode"

	"sluice/internal/options"
)

const (
	// A manager's host that is silent while a request waits there is given up after
	// 20 s: it may have lost its power.
	probeEvery, probes = 5 * time.Second, 3
	// maxReply bounds an answer: a key is 64 letters, and a swarm has one or two.
	maxReply = 16 << 10
	// maxKeys is how many keys are given and taken. More would be a mistake: the ring of a swarm
	// grows by those of leaders that knew of no other.
	maxKeys = 64
	// maxRefusal bounds what is shown of a refusal.
	maxRefusal = 256
)

// Ask asks a manager for the gossip keys, and waits about a minute if it has none
// yet; no keys and no error then. An error says that no manager of this swarm was
// there, or why it refused; asking again later may help. ctx ends the wait.
func Ask(ctx context.Context, id Identity, manager netip.AddrPort) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, life)
	defer cancel()
	dialer := &net.Dialer{Timeout: slow, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeEvery, Interval: probeEvery, Count: probes}}
	tr := &http.Transport{
		DialContext:            dialer.DialContext,
		TLSClientConfig:        id.client(),
		TLSHandshakeTimeout:    slow,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+manager.String()+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask manager %s: %w", manager, err)
	}
	res, err := tr.RoundTrip(req) // not a Client: no redirects, no cookies
	if err != nil {
		return nil, fmt.Errorf("ask manager %s: %w", manager, err)
	}
	defer func() { _ = res.Body.Close() }() // all that matters of it has been read
	body, err := io.ReadAll(io.LimitReader(res.Body, maxReply+1))
	if err != nil {
		return nil, fmt.Errorf("ask manager %s: %w", manager, err)
	}
	switch {
	case ctx.Err() != nil: // what has come is the server's word on that
		return nil, fmt.Errorf("ask manager %s: %w", manager, ctx.Err())
	case res.StatusCode == http.StatusNoContent:
		return nil, nil
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("ask manager %s: refused: %s", manager, oneLine(body))
	case len(body) > maxReply:
		return nil, fmt.Errorf("ask manager %s: the answer is longer than %d bytes", manager, maxReply)
	}
	keys, err := decode(body)
	if err != nil {
		return nil, fmt.Errorf("ask manager %s: %w", manager, err)
	}
	return keys, nil
}

// decode reads an answer. Its errors repeat nothing of it.
func decode(body []byte) ([][]byte, error) {
	var r reply
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, errors.New("the answer is not understood; do all nodes run the same version?")
	}
	if len(r.Keys) == 0 || len(r.Keys) > maxKeys {
		return nil, fmt.Errorf("the answer has %d keys; 1 to %d are wanted", len(r.Keys), maxKeys)
	}
	keys := make([][]byte, 0, len(r.Keys))
	for _, text := range r.Keys {
		key, err := options.DecodeKey(text)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// oneLine is a refusal for people.
func oneLine(body []byte) string {
	text := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(body[:min(len(body), maxRefusal)]), ""))
	return strings.TrimSpace(text)
}
