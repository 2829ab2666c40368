package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/test/cluster"
	"sluice/test/image"
)

// blocks are the commands of a section of README.md, block by block.
func blocks(t *testing.T, from, to string) (out [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, begun := strings.Cut(string(text), "\n"+from+"\n")
	section, _, ended := strings.Cut(section, "\n"+to+"\n")
	if !begun || !ended {
		t.Fatalf("README.md has no %q before %q", from, to)
	}
	for i, part := range strings.Split(section, "\n```\n") {
		if i%2 == 1 {
			out = append(out, strings.Split(part, "\n"))
		}
	}
	return out
}

// here makes a command of README.md one that needs no registry and no curl. Nothing
// else of it is changed.
func here(command string) string {
	command, _, _ = strings.Cut(command, "    #")
	if url, is := strings.CutPrefix(command, "curl http://localhost:81"); is {
		return fmt.Sprintf(`timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/81 && printf "GET %s HTTP/1.0\r\n\r\n" >&3 && grep sluice <&3'`, url)
	}
	command = strings.Replace(command, " curlimages/curl ", " --entrypoint /bin/wget "+image.Web+" -q -O - ", 1)
	if create, is := strings.CutSuffix(command, " nginx"); is {
		return strings.Replace(create, "service create", "service create --no-resolve-image --stop-grace-period 2s", 1) + " " + image.Web
	}
	return command
}

// TestReadmeCommandsWork: what a newcomer copies from section Use does what it says.
func TestReadmeCommandsWork(t *testing.T) {
	h := lab.Host(1)
	ran := 0
	for _, commands := range blocks(t, "## Use", "### Network options") {
		t.Run(commands[0], func(t *testing.T) {
			if !strings.Contains(commands[0], "network create") {
				network(t, "shop")
			}
			for _, c := range commands {
				if name := afterWord(c, "--name"); strings.Contains(c, "service create") {
					t.Cleanup(func() { removeService(t, name) })
				} else if strings.Contains(c, "network create") {
					words := strings.Fields(c)
					t.Cleanup(func() { removeNetwork(t, words[len(words)-1]) })
				}
				// A new network may have to wait for the name of one that has just gone; a
				// service answers a moment after its tasks run.
				err := cluster.Wait(within(t), c, func(ctx context.Context) error {
					out, err := h.Exec(ctx, "sh", "-c", here(c))
					if err != nil && (strings.Contains(c, "curl") || strings.Contains(err.Error(), "already exists")) {
						return err
					}
					if err != nil {
						t.Errorf("%s: %v", c, err)
					}
					if strings.Contains(c, "curl") && !strings.Contains(out, "a web server of the sluice tests") {
						t.Errorf("%s: %q", c, out)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				ran++
			}
		})
	}
	if ran < 9 {
		t.Errorf("only %d commands were found", ran)
	}
}

// afterWord is the word behind another.
func afterWord(command, word string) string {
	_, rest, _ := strings.Cut(command, " "+word+" ")
	rest, _, _ = strings.Cut(rest, " ")
	return rest
}
