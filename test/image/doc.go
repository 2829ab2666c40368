// Package image makes the container images of the tests and the demo without a
// registry and without an engine: an archive for `docker load`, with the same
// bytes and so the same image ids wherever and whenever it is made.
//
//	layer:  /probe        the program of test/image/probe, static
//	        /bin/busybox  Debian's busybox-static, and /bin/sh for health checks
//	        /www          pages of the web server
//	images: sluice-probe:test  entrypoint /probe, default command "serve --tcp 80 --udp 53"
//	        sluice-web:test    busybox httpd on port 80: a real server that
//	                           knows nothing of the tests
//
// GET / of the web server gives a page, GET /cgi-bin/who one line of JSON with
// its host name and the address of the client that it sees.
package image
