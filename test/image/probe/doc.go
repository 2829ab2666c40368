// Command probe is the program in the test images: a server that says who it is
// and whom it sees, and clients whose exit code is a verdict.
//
//	probe serve --tcp 80 --udp 53     answer connections and datagrams
//	probe get web:80                  ask, print answers
//	probe hold web:80                 keep one connection and watch for gaps
//	probe load --to web=web:80        measure several servers in turns
//	probe echo                        serve what turns measures
//	probe turns --to web=10.0.0.2:80  measure several echo servers in turns
//	probe dns web                     ask the engine's name server
//	probe health                      for health checks
//	probe forge, probe hear           send frames in others' names, hear them
//
// Every answer of the server is one line of JSON:
//
//	{"host":"web.1","proto":"tcp","local":"10.255.0.5:80","peer":"10.255.0.9:41000","ready":true,"echo":"1"}
//
// local is the address that the request arrived at, peer where it came from, as
// the server's own sockets tell it: what is between them and the client shows.
//
// A TCP port speaks two protocols. A client whose first byte is a capital letter
// speaks HTTP: GET / gives the answer above, GET /health 200 or 503. Any other
// speaks lines: each line gets one answer that echoes it, and closing without a
// word gets one too.
//
// Exit codes: 0 all is well, 1 something was not answered or not as demanded, 2
// the command line is wrong. IPv4 only.
package main
