package options

import "strings"

// NetworkTable is the description of every network option, in the table's order.
func NetworkTable() []Option { return describe(networkOptions) }

// ServiceTable is the description of every service option, in the table's order.
func ServiceTable() []Option { return describe(serviceOptions) }

func describe[T any](table []option[T]) []Option {
	out := make([]Option, len(table))
	for i, o := range table {
		out[i] = o.Option
	}
	return out
}

// Markdown is the manual's table of opts, without the internal ones.
func Markdown(opts []Option) string {
	var b strings.Builder
	b.WriteString("| key | default | allowed | meaning |\n|---|---|---|---|\n")
	for _, o := range opts {
		if o.Internal {
			continue
		}
		b.WriteString("| `" + o.Key + "` | " + o.Default + " | " + o.Allowed + " | " + o.Doc + " |\n")
	}
	return b.String()
}
