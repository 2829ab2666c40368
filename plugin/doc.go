// Command plugin is what the engine runs: `docker plugin enable sluice:latest`
// starts it in a root directory of its own and talks to it over one socket.
//
//	dockerd ──POST /NetworkDriver.Join──▶ socket.go: budget, panic, count, log
//	                                        │ methods.go: which method is what
//	                                        │ decode.go:  wire types → typed requests
//	                                        ▼
//	                              driver.Driver, ipam.Allocator
//
// It listens before it does anything else: the engine gives a plugin about ten
// seconds, and what it must answer at once (capabilities, address spaces) is
// constant. Calls that need more wait for the rest of the program within their
// budget.
//
// Be aware: a plugin that exits is started again at once, for ever, and one that
// hangs stops the engine, at boot without any limit. So nothing here exits on bad
// input or bad settings, and no call outlives its budget.
package main
