package options

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Redacted stands where a secret would be printed.
const Redacted = "(redacted)"

// Key is a gossip key as raw bytes: 16, 24 or 32 of them, for AES-128, -192 or
// -256. It prints as Redacted whatever the verb or encoding; Bytes and
// EncodeKey are the only ways to its content.
type Key string

// Bytes is the key itself.
func (k Key) Bytes() []byte { return []byte(k) }

// String never tells the key.
func (k Key) String() string {
	if k == "" {
		return ""
	}
	return Redacted
}

// Format implements fmt.Formatter, so that no verb gets past String.
func (k Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// MarshalText implements encoding.TextMarshaler, which JSON and slog use.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// EncodeKey is the text of a key in options: hexadecimal, because the docker
// command lower-cases some values and base64 would not survive that.
func EncodeKey(key []byte) string { return hex.EncodeToString(key) }

// DecodeKey reads a key of 16, 24 or 32 bytes, in hexadecimal or in base64
// (standard or URL alphabet, padded or not). What reads as hexadecimal is
// taken as hexadecimal. The error does not repeat the text.
func DecodeKey(s string) ([]byte, error) {
	s = strings.TrimSpace(s)
	if b, err := hex.DecodeString(s); err == nil && validLength(len(b)) {
		return b, nil
	}
	bare := strings.TrimRight(s, "=")
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		if b, err := enc.DecodeString(bare); err == nil && validLength(len(b)) {
			return b, nil
		}
	}
	return nil, errors.New("not a gossip key: want 16, 24 or 32 bytes in hexadecimal or base64, such as the output of `openssl rand -hex 32`")
}

func validLength(n int) bool { return n == 16 || n == 24 || n == 32 }
