package linux

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"sluice/internal/netnstest"
)

// BenchmarkMeshAgainstProcess compares published ports, of a task on the node that is
// asked and of one on another, with a process on that node, in turns so short that
// noise meets all: mesh/process is the ratio of their rates. One processor does it all,
// so the time that something takes is the processor's time for it.
func BenchmarkMeshAgainstProcess(b *testing.B) {
	probe := filepath.Join(b.TempDir(), "probe")
	if out, err := exec.Command("go", "build", "-o", probe, "sluice/test/image/probe").CombinedOutput(); err != nil {
		b.Fatalf("build the probe: %v: %s", err, out)
	}
	for _, datapath := range []string{"nft", "ipvs"} {
		b.Run(datapath, func(b *testing.B) {
			if datapath == "ipvs" {
				netnstest.Need(b, netnstest.IPVS)
			}
			l := newMeshLab(b, datapath == "ipvs", "dr")
			const processPort, taskPort = 8000, 7000
			for _, s := range []struct {
				ns   *netnstest.NS
				port int
			}{{l.hosts[0].w.host, processPort}, {l.hosts[0].task, taskPort}, {l.hosts[1].task, taskPort}} {
				echo := exec.Command("taskset", "-c", "0", probe, "echo", "--port", fmt.Sprint(s.port))
				said, err := echo.StdoutPipe()
				if err != nil {
					b.Fatal(err)
				}
				s.ns.Must(echo.Start)
				b.Cleanup(func() {
					if err := echo.Process.Kill(); err != nil {
						b.Error(err)
					}
					echo.Wait() // says that it was killed
				})
				if _, err := said.Read(make([]byte, 1)); err != nil { // that it listens
					b.Fatal(err)
				}
			}
			h := l.hosts[0]
			var out []byte
			l.client.Must(func() (err error) {
				turns := exec.Command("taskset", "-c", "0", probe, "turns", "--rounds", fmt.Sprint(b.N),
					"--to", fmt.Sprintf("process=%s,near=%s,far=%s", h.at(processPort), h.at(nearPort), h.at(farPort)))
				turns.Stderr = os.Stderr
				out, err = turns.Output()
				return err
			})
			// Its targets' samples, by what was done.
			var got struct{ Targets []map[string]any }
			if err := json.Unmarshal(out, &got); err != nil {
				b.Fatal(err)
			}
			base := got.Targets[0]
			for _, t := range got.Targets[1:] {
				for _, what := range []string{"connects", "requests", "datagrams", "packets"} {
					b.ReportMetric(typical(t, base, what), fmt.Sprintf("%s/%s-mesh/process", t["name"], what))
				}
			}
		})
	}
}

// typical is the ratio of the rates of two targets.
func typical(t, base map[string]any, what string) float64 {
	var medians [2]float64
	for i, of := range []map[string]any{base, t} {
		var samples []float64
		for _, v := range of[what+"_us"].([]any) {
			samples = append(samples, v.(float64))
		}
		slices.Sort(samples)
		medians[i] = samples[len(samples)/2]
	}
	return medians[0] / medians[1]
}
