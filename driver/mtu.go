package driver

import (
	"errors"
	"fmt"

	"sluice/driver/overlay"
	"sluice/internal/model"
	"sluice/internal/options"
)

// fits refuses an MTU whose packets this node's underlay would drop or cut up,
// which shows only once a large one is sent. An underlay that is not known is no
// reason to refuse: Join will tell if it is trouble.
func (d *Driver) fits(n model.Network) error {
	underlay, err := d.underlayMTU()
	if n.Local || err != nil || n.MTU <= underlay-overlay.VXLANOverhead {
		return nil
	}
	return fmt.Errorf("MTU %d does not fit this node: VXLAN adds %d bytes, and its underlay %s carries %d; create the network with -o %s=%d or less, or raise the MTU of the underlay",
		n.MTU, overlay.VXLANOverhead, d.cfg.Intents.Self().VTEP, underlay, options.MTU, underlay-overlay.VXLANOverhead)
}

// localMTU is Ethernet's, in bytes; a local network has no tunnel.
const localMTU = 1500

func (d *Driver) underlayMTU() (int, error) {
	vtep := d.cfg.Intents.Self().VTEP
	if !vtep.IsValid() {
		return 0, errors.New("this node's data-path address is not known yet: the engine tells it when it joins the swarm; see `docker info`, Swarm: Node Address")
	}
	mtu, err := d.cfg.UnderlayMTU(vtep)
	if err != nil {
		return 0, fmt.Errorf("find the MTU of the device with this node's data-path address %s: %w", vtep, err)
	}
	return mtu, nil
}
