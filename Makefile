# sluice. `make` alone lists the targets.

GO      ?= go
BASE    ?= debian:12-slim
NAME    ?= sluice:latest
FUZZTIME ?= 100000x
FOR     ?= 10m
PKGS    ?= ./...

# The go command stamps binaries with the commit, and fails where git does not
# trust the checkout, as when root builds somebody else's.
VCS     := $(shell git status >/dev/null 2>&1 || echo -buildvcs=false)
# Static: the plugin's rootfs is no distribution. Without paths of the builder,
# symbol table and DWARF, which halves it.
STATIC   = CGO_ENABLED=0 $(GO) build -trimpath $(VCS) -ldflags '-s -w'
# With RACE=1 it is under the race detector, which is C: static all the same. What it
# finds is in the engine's log.
ifdef RACE
STATIC   = CGO_ENABLED=1 $(GO) build -race -trimpath -tags netgo,osusergo $(VCS) -ldflags '-linkmode external -extldflags -static'
endif

# Tests by what they need. ROOT_PKGS change a kernel, inside namespaces of their
# own; E2E_PKGS run Docker engines, likewise.
ROOT_PKGS = ./internal/linux/...
E2E_PKGS  = ./test/...
# What needs ip_vs runs on this machine if its kernel has that, else under a kernel
# of its own, see test/vm/run-in-vm; there is no feature that a test may lack there.
# Of the end-to-end tests, those stay out that are about other things than packets,
# or take long: see E2E_NOT_VM. Engines take 1.5 GB there.
RUN_IN_VM = $(CURDIR)/test/vm/run-in-vm -n ip_vs
VM_PKGS   = ./internal/linux/... ./internal/netnstest
# Each needs longer there than what go test and run-in-vm allow unasked: beside the other
# tests, on two processors, 10 minutes were seen for packets and 30 for engines.
IN_VM     = -count=1 -timeout 30m -exec 'env REQUIRE=all $(RUN_IN_VM) --' $(VM_PKGS)
E2E_NOT_VM = Readme|Autolocked|PluginUpgrade|Restarts|Leaders|Bad|Overlapping|StateFile|DiskTrouble|LocalNetwork|VNITaken|ChosenAddresses|InternalNetwork|Firewalld|Partition|WithoutWarning
E2E_IN_VM = -count=1 -timeout 50m -exec 'env REQUIRE=all SLUICE_TEST_BUILT=1 $(RUN_IN_VM) -m 4G -t 3000 -w $(CURDIR)/build/e2e-logs --' ./test/e2e -skip '$(E2E_NOT_VM)'
VM_GROUPS = 'under a kernel with ip_vs:' $(IN_VM) -- 'under a kernel with ip_vs:' $(E2E_IN_VM)
UNIT_PKGS = $$($(GO) list ./... | grep -vE '/(internal/linux|test)(/|$$)')

.PHONY: test-deps help build rootfs docker-rootfs plugin install uninstall demo demo-down \
	test test-unit test-root test-vm vm-kernel test-e2e soak bench bench-vm benchmarks race race-e2e fuzz lint golden docs clean
.DEFAULT_GOAL := help

help: ## this list
	@echo 'targets:'
	@sed -nE 's/^([a-z][a-z0-9-]*):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo 'settings: NAME=$(NAME) BASE=$(BASE) PKGS=$(PKGS) FUZZTIME=$(FUZZTIME) FOR=$(FOR)'

build: rootfs ## build/sluice (the command) and build/plugin (the plugin)
	$(STATIC) -o build/sluice ./cmd/sluice

build/sluice-plugin: FORCE
	@mkdir -p build
	$(STATIC) -o $@ ./plugin
FORCE:

rootfs: build/sluice-plugin ## build/plugin, for `docker plugin create`; takes iptables from this Debian or Ubuntu
	@mkdir -p build/plugin
	scripts/rootfs.sh build/sluice-plugin config.json build/plugin

docker-rootfs: build/sluice-plugin ## the same, with iptables from the image BASE; needs an engine
	@mkdir -p build/plugin
	scripts/docker-rootfs.sh $(BASE) config.json build/plugin

plugin: rootfs ## make rootfs, then create plugin NAME in the local engine; replaces a disabled one
	scripts/plugin.sh create $(NAME) build/plugin

install: plugin ## make plugin, then enable it
	scripts/plugin.sh enable $(NAME)

uninstall: ## disable and remove plugin NAME, with its state
	scripts/plugin.sh remove $(NAME)

demo: build ## three Docker hosts on this machine, a service on its virtual IP; KEEP=1 leaves it up
	KEEP=$(KEEP) $(GO) run ./test/demo

demo-down: ## take down what `make demo KEEP=1` left up
	$(GO) run ./test/demo -down

# The VM has one processor. What runs there goes on beside the rest, which takes less
# time: its engines get the other processor, one cluster at a time.
test: lint test-deps build build/e2e-logs ## every test that this machine can run; says what it could not run, and why
	@$(MAKE) -s vm-kernel || echo 'the tests that need it will fail; the others run'
	@if test/vm/run-in-vm -q ip_vs; then set --; else set -- $(VM_GROUPS); fi; \
	SLUICE_TEST_BUILT=1 $(GO) run ./test/report -- -race $(UNIT_PKGS) -- -race -count=1 $(ROOT_PKGS) -- -count=1 -p 1 -timeout 30m $(E2E_PKGS) == "$$@"; \
	tests=$$?; $(MAKE) -s fuzz FUZZTIME=10000x && exit $$tests

build/e2e-logs:
	@mkdir -p $@

# Built before the tests: beside it engines miss their deadlines, and a test that
# waits for it runs out of time.
vm-kernel: test-deps ## the kernel that test-vm runs, where this machine's has no ip_vs; once, 15 minutes on two processors
	@mkdir -p build
	@test/vm/run-in-vm -q ip_vs || [ -n "$$VM_KERNEL" ] || { \
		echo 'building a kernel with ip_vs, unless that was done: see build/kernel.log'; \
		test/vm/build-kernel > build/kernel.log 2>&1 || { tail -n 20 build/kernel.log; exit 1; }; }

test-deps:
	@$(GO) run ./test/prepare

test-unit: ## tests that need neither root nor an engine
	$(GO) test $(UNIT_PKGS)

test-root: test-deps ## tests of the kernel side, in network namespaces; need root
	$(GO) test -count=1 $(ROOT_PKGS)

test-vm: test-deps build build/e2e-logs vm-kernel ## tests of packets and engines under a kernel with ip_vs, a user-mode one where this machine's has none
	$(GO) run ./test/report $(VM_GROUPS)

test-e2e: test-deps build ## tests with real Docker engines, in namespaces; ENGINE=trixie or sid takes that Debian suite's
	SLUICE_TEST_BUILT=1 SLUICE_TEST_ENGINE=$(ENGINE) $(GO) test -count=1 -timeout 30m $(E2E_PKGS)

# SEED= makes the choices of an earlier run again. The program is built, as go run
# would not hand on its exit code.
soak: test-deps build ## three managers live through random operations, faults and traffic for FOR; SEED=n makes the same choices again, JSON=file keeps the report
	$(GO) build -o build/soak ./test/soak
	build/soak -for $(FOR) $(if $(SEED),-seed $(SEED)) $(if $(JSON),-json $(JSON))

bench: build ## what the project promises of speed and size, as one table; most of it needs root
	$(GO) run ./test/bench

bench-vm: test-deps build ## Docker's service VIPs and published ports and ours side by side, on a kernel with ip_vs; ONLY=dr,mesh-nft some, WRITE=docs/benchmarks.md keeps the tables
	$(GO) build -o build/datapaths ./test/datapaths
	test/vm/run-in-vm -n ip_vs -m 4G -w docs -- build/datapaths $(if $(ONLY),-only $(ONLY)) $(if $(WRITE),-write $(WRITE))

benchmarks: ## Go benchmarks of PKGS
	$(GO) test -run '^$$' -bench . -benchmem $(PKGS)

race: test-deps ## tests without engines under the race detector; those of the kernel side need root
	@scripts/need.sh 'the race detector' gcc=gcc gcc=libc6-dev
	$(GO) test -race $(UNIT_PKGS)
	$(GO) test -race -count=1 $(ROOT_PKGS)

race-e2e: test-deps ## tests with real Docker engines, with the plugin under the race detector; RUN=TestVIP some
	@scripts/need.sh 'the race detector' gcc=gcc gcc=libc6-dev
	$(MAKE) -s RACE=1 build
	SLUICE_TEST_BUILT=1 $(GO) test -count=1 -timeout 30m ./test/e2e $(if $(RUN),-run '$(RUN)')
	rm build/sluice-plugin

fuzz: ## every fuzz target, FUZZTIME (a number of inputs) each
	GO='$(GO)' scripts/fuzz.sh $(FUZZTIME)

lint: ## format, vet, modernise: what would change is an error
	@unformatted=$$(gofmt -l $$($(GO) list -f '{{.Dir}}' ./...)); [ -z "$$unformatted" ] || { echo "not gofmt'd: $$unformatted"; exit 1; }
	$(GO) vet ./...
	$(GO) fix -diff ./...

golden: ## rewrite the golden files of the tests that have -update; look at the diff
	$(GO) test -count=1 $$(grep -rl --include='*_test.go' '"sluice/internal/golden"' . | xargs -r -n1 dirname | sort -u) -update

docs: ## rewrite the generated parts of README.md and docs/
	$(GO) test -count=1 ./internal/arch -run Docs -update

clean: ## remove build/
	rm -rf build
