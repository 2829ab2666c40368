package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// imageDir is what `make rootfs` leaves and `docker plugin create` takes.
const imageDir = "build/plugin"

// image measures the plugin's files, as the engine stores them: unpacked.
func image(_ context.Context, t *table) error {
	var size int64
	err := filepath.WalkDir(imageDir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		i, err := d.Info()
		if err == nil {
			size += i.Size()
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is not there; run make rootfs first, from the top of the checkout", imageDir)
	}
	if err != nil {
		return err
	}
	t.add(goal{what: "plugin image", unit: mib, limit: 40}, []float64{float64(size) / (1 << 20)})
	return nil
}
