package main

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"time"

	"sluice/internal/diag"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/store"
)

// blank says whether records may be missing: there were none, some were damaged, or
// what has happened lately may not have reached a disk that takes nothing.
func blank(records []model.Record, st store.Status) bool {
	return len(records) == 0 || len(st.Damage) > 0 || st.Trouble != nil
}

// serving says whether the kernel has networks of a former life, which go on serving
// while it is found out what they are. A first start has none, nor has a host that was
// started anew: there, all nodes would wait for each other.
func (p *parts) serving(ctx context.Context) bool {
	have, err := p.kernel.Dump(ctx, nil)
	if err != nil {
		p.log.Warn("kernel could not be read; nothing is removed until the others have told all", "err", err)
		return true
	}
	return networks(have)
}

func networks(have kernel.State) bool {
	for k := range have {
		if _, is := k.(kernel.Netns); is {
			return true
		}
	}
	return false
}

// stateFile is the state file as collectors see it.
func (p *parts) stateFile() diag.StateFile {
	st := p.store.Status()
	out := diag.StateFile{Saved: st.Trouble == nil, Damaged: len(st.Damage)}
	if !out.Saved {
		out.Since = st.Since
	}
	return out
}

// stateProblems lists what is wrong with the state file. dir is its directory as the
// host sees it.
func stateProblems(st store.Status, dir string) []diag.Problem {
	var out []diag.Problem
	for _, d := range st.Damage {
		out = append(out, diag.Problem{
			What: fmt.Sprintf("the state file was damaged (%s) and is kept as %s", d.Reason, d.File),
			Do:   "the node is rebuilt from what the engine and its peers know; delete the kept file, in " + dir + " on the host, when you have looked at it",
		})
	}
	if st.Trouble != nil {
		out = append(out, diag.Problem{
			What: fmt.Sprintf("state cannot be saved since %s: %v", st.Since.Format(time.TimeOnly), st.Trouble),
			Do:   "see to the disk of " + dir + " on the host; until then new networks and containers are refused here, and what runs goes on",
		})
	}
	return out
}

// hostStateDir is where the host has the state directory: the engine mounts one of
// its own there (config.json, propagatedMount). The engine may not have told its data
// directory yet; it is rarely another than the default.
func (p *parts) hostStateDir() string {
	root := cmp.Or(p.hub.Engine().DataRoot, "/var/lib/docker")
	return filepath.Join(root, "plugins", cmp.Or(pluginID(), "ID"), "propagated-mount")
}
