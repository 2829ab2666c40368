package gossip

import (
	"bytes"
	"context"
	"log"
	"log/slog"
)

// memberlistLogger hands memberlist's lines to slog.
func memberlistLogger(ctx context.Context, l *slog.Logger) *log.Logger {
	return log.New(&logWriter{ctx: ctx, log: l}, "", 0)
}

// logWriter parses "[LEVEL] memberlist: text", one line per Write as log.Logger
// guarantees. memberlist's errors are a peer's or the network's, and heal
// without a person: they are warnings here.
type logWriter struct {
	ctx context.Context
	log *slog.Logger
}

func (w *logWriter) Write(line []byte) (int, error) {
	level, text := slog.LevelInfo, bytes.TrimSpace(line)
	if rest, ok := bytes.CutPrefix(text, []byte("[")); ok {
		if name, msg, ok := bytes.Cut(rest, []byte("] ")); ok {
			switch string(name) {
			case "DEBUG":
				level = slog.LevelDebug
			case "WARN", "ERR", "ERROR":
				level = slog.LevelWarn
			}
			text = msg
		}
	}
	// After the node has closed memberlist only reports what that broke.
	if w.ctx.Err() == nil && w.log.Enabled(w.ctx, level) {
		text = bytes.TrimPrefix(text, []byte("memberlist: "))
		w.log.Log(w.ctx, level, "memberlist", "text", string(text))
	}
	return len(line), nil
}
