package ipam

import (
	"net/netip"
	"slices"
	"testing"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

func TestLeader(t *testing.T) {
	t.Run("life of a network and a service", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g - -> g/10.255.0.0/20
			gw g/10.255.0.0/20 - -> 10.255.0.1/20
			bind web 10.255.0.0/20
			# the virtual IP, then three tasks
			vip g/10.255.0.0/20 - -> 10.255.0.2/20
			vip g/10.255.0.0/20 - -> 10.255.0.3/20
			vip g/10.255.0.0/20 - -> 10.255.0.4/20
			vip g/10.255.0.0/20 - -> 10.255.0.5/20
			# update --force: the new task's address before the old one's release, which then rests
			vip g/10.255.0.0/20 - -> 10.255.0.6/20
			rel g/10.255.0.0/20 10.255.0.3
			vip g/10.255.0.0/20 - -> 10.255.0.7/20
			show -> 10.255.0.0/20 "web" 6/0
			# service rm
			rel g/10.255.0.0/20 10.255.0.2
			rel g/10.255.0.0/20 10.255.0.4
			rel g/10.255.0.0/20 10.255.0.5
			rel g/10.255.0.0/20 10.255.0.6
			rel g/10.255.0.0/20 10.255.0.7
			# network rm
			free web
			rel g/10.255.0.0/20 10.255.0.1
			relpool g/10.255.0.0/20
			show -> nothing
			# the subnet rests, too, over a restart as well
			restart
			pool g - -> g/10.255.16.0/20`)
	})
	t.Run("change of leader while tasks that the last one removed still run", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			held 10.60.0.2 10.60.0.3 10.60.0.4 10.60.0.255
			bind web 10.60.0.0/24
			show -> 10.60.0.0/24 "web" 4/3
			# of the three only one is replayed; the others' tasks are deleted
			vip g/10.60.0.0/24 10.60.0.2 -> 10.60.0.2/24
			vip g/10.60.0.0/24 - -> 10.60.0.5/24
			confirm web 10.60.0.1 10.60.0.2 10.60.0.5
			vip g/10.60.0.0/24 - -> 10.60.0.6/24
			restart
			held 10.60.0.2 10.60.0.4
			confirm web 10.60.0.1 10.60.0.2 10.60.0.5 10.60.0.6 -> -10.60.0.3
			show -> 10.60.0.0/24 "web" 5/1
			# that the last container ends is all that is ever heard of it
			held 10.60.0.2
			confirm web 10.60.0.1 10.60.0.2 10.60.0.5 10.60.0.6 -> -10.60.0.4
			show -> 10.60.0.0/24 "web" 4/0`)
	})
	t.Run("an address in use is refused, and a replay is not", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			vip g/10.60.0.0/24 10.60.0.9 -> 10.60.0.9/24
			# docker run --ip, of the VIP and of the other container
			vip g/10.60.0.0/24 10.60.0.2 -> !address 10.60.0.2 of pool 10.60.0.0/24 is in use
			vip g/10.60.0.0/24 10.60.0.9 -> !in use
			rel g/10.60.0.0/24 10.60.0.9
			vip g/10.60.0.0/24 10.60.0.9 -> 10.60.0.9/24
			# a new leader; that the managers were asked in between changes nothing
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24
			confirm web 10.60.0.1 10.60.0.2 10.60.0.9
			vip g/10.60.0.0/24 10.60.0.2 -> 10.60.0.2/24
			vip g/10.60.0.0/24 10.60.0.9 -> 10.60.0.9/24
			vip g/10.60.0.0/24 10.60.0.2 -> !in use
			restart
			vip g/10.60.0.0/24 10.60.0.9 -> 10.60.0.9/24
			show -> 10.60.0.0/24 "web" 3/1`)
	})
	t.Run("the same requests on the leader as a node", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g - -> g/10.255.0.0/20
			gw g/10.255.0.0/20 - -> 10.255.0.1/20
			bind web 10.255.0.0/20
			vip g/10.255.0.0/20 - -> 10.255.0.2/20
			pool l 10.255.0.0/20 com.docker.network.ipam.serial=true ik=iv -> l/10.255.0.0/20
			gw l/10.255.0.0/20 10.255.0.1 -> 10.255.0.1/20
			ask l/10.255.0.0/20 10.255.0.2 -> 10.255.0.2/20
			rel l/10.255.0.0/20 10.255.0.2
			rel l/10.255.0.0/20 10.255.0.1
			relpool l/10.255.0.0/20
			show -> 10.255.0.0/20 "web" 2/0`)
	})
	t.Run("network rm right after service rm", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			vip g/10.60.0.0/24 - -> 10.60.0.3/24
			rel g/10.60.0.0/24 10.60.0.2
			free web
			rel g/10.60.0.0/24 10.60.0.1
			relpool g/10.60.0.0/24
			# no release of the task ever comes, or it comes now; the subnet can be had again
			rel g/10.60.0.0/24 10.60.0.3
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			bind web2 10.60.0.0/24
			vip g/10.60.0.0/24 10.60.0.3 -> 10.60.0.3/24
			show -> 10.60.0.0/24 "web2" 2/0`)
	})
	t.Run("demoted, then leader again in the same process", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 ik=iv -> !unknown --ipam-opt ik="iv"
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			vip g/10.60.0.0/24 - -> 10.60.0.3/24
			vip g/10.60.0.0/24 - -> 10.60.0.4/24
			vip g/10.60.0.0/24 - -> 10.60.0.5/24
			# elsewhere .5 is released, .6 to .8 handed out, .6 and .7 released; nobody tells
			pool g 10.60.0.0/24 com.docker.network.ipam.serial=true -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24
			show -> 10.60.0.0/24 "web" 5/4
			vip g/10.60.0.0/24 10.60.0.2 -> 10.60.0.2/24
			vip g/10.60.0.0/24 10.60.0.3 -> 10.60.0.3/24
			vip g/10.60.0.0/24 10.60.0.8 -> 10.60.0.8/24
			# .4 was running, so it is not replayed; a new task comes before the reader does,
			# and gets an address that nobody had lately
			vip g/10.60.0.0/24 - -> 10.60.0.9/24
			show -> 10.60.0.0/24 "web" 7/2
			# the managers do not show .9 yet
			confirm web 10.60.0.1 10.60.0.2 10.60.0.3 10.60.0.4 10.60.0.8 -> -10.60.0.5
			show -> 10.60.0.0/24 "web" 6/0
			confirm web 10.60.0.1 10.60.0.2 10.60.0.3 10.60.0.4 10.60.0.8 10.60.0.9 -> nothing
			# a third time: nothing was counted, one Free ends it
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24
			free web
			rel g/10.60.0.0/24 10.60.0.1
			relpool g/10.60.0.0/24
			show -> nothing`)
	})
	t.Run("new leader that knows nothing", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 sluice.size=24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 10.60.0.2 -> 10.60.0.2/24
			vip g/10.60.0.0/24 10.60.0.9 -> 10.60.0.9/24
			vip g/10.60.0.0/24 10.60.0.4 -> 10.60.0.4/24
			# behind the old leases: what the old leader got back rests
			vip g/10.60.0.0/24 - -> 10.60.0.10/24
			# an address asked for moves nothing any more
			vip g/10.60.0.0/24 10.60.0.239 -> 10.60.0.239/24
			vip g/10.60.0.0/24 - -> 10.60.0.11/24`)
	})
	t.Run("the plugin was away during the replay", func(t *testing.T) {
		run(t, ScopeGlobal, `
			vip g/10.60.0.0/24 - -> !pool sluice-global/10.60.0.0/24 is not known
			confirm web 10.60.0.1 -> !network web owns no pool
			bind web 10.60.0.0/24
			confirm web 10.60.0.1 10.60.0.2 10.60.0.7 10.60.0.250 10.61.0.1 10.60.0.2 -> +10.60.0.1 +10.60.0.2 +10.60.0.7
			show -> 10.60.0.0/24 "web" 3/3
			# what was adopted from a state older than a release goes with the next round
			confirm web 10.60.0.1 10.60.0.2 -> -10.60.0.7
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			vip g/10.60.0.0/24 - -> 10.60.0.3/24
			show -> 10.60.0.0/24 "web" 3/0`)
	})
	t.Run("plugin killed in the middle", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 sub=10.60.0.128/25 -> g/10.60.0.0/24/10.60.0.128/25
			restart
			gw g/10.60.0.0/24/10.60.0.128/25 - -> 10.60.0.1/24
			restart
			bind web 10.60.0.0/24
			restart
			vip g/10.60.0.0/24/10.60.0.128/25 - -> 10.60.0.128/24
			restart
			vip g/10.60.0.0/24/10.60.0.128/25 - -> 10.60.0.129/24
			vip g/10.60.0.0/24/10.60.0.128/25 10.60.0.5 -> 10.60.0.5/24
			restart
			show -> 10.60.0.0/24 "web" 4/0
			# a replay is remembered, confirmations are not: Confirm looks again
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24/10.60.0.128/25 10.60.0.5 -> 10.60.0.5/24
			vip g/10.60.0.0/24/10.60.0.128/25 - -> 10.60.0.130/24
			show -> 10.60.0.0/24 "web" 5/2
			restart
			show -> 10.60.0.0/24 "web" 5/3
			confirm web 10.60.0.5 10.60.0.128 -> -10.60.0.129
			show -> 10.60.0.0/24 "web" 4/0`)
	})
	t.Run("two networks want one subnet", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			# looks like a replay until Bind, then is undone by the engine
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			bind shop 10.60.0.0/24 -> !pool 10.60.0.0/24 overlaps network web (10.60.0.0/24); choose another --subnet
			rel g/10.60.0.0/24 10.60.0.1
			relpool g/10.60.0.0/24
			show -> 10.60.0.0/24 "web" 2/0
			# another gateway cannot be a replay; the engine then releases the pool only
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.2 -> !belongs to network web with gateway 10.60.0.1, so 10.60.0.2 cannot be its gateway
			relpool g/10.60.0.0/24
			show -> 10.60.0.0/24 "web" 2/0
			# nor can another range, or an overlap
			pool g 10.60.0.0/24 sub=10.60.0.0/25 -> !pool 10.60.0.0/24 overlaps network web (10.60.0.0/24)
			pool g 10.60.0.0/16 -> !pool 10.60.0.0/16 overlaps network web (10.60.0.0/24); choose another --subnet
			bind shop 10.60.0.0/16 -> !pool 10.60.0.0/16 overlaps network web (10.60.0.0/24)
			bind web 10.61.0.0/24 -> !network web has subnet 10.60.0.0/24 and cannot have 10.61.0.0/24 too
			free shop
			show -> 10.60.0.0/24 "web" 2/0`)
	})
	t.Run("another manager has led", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			vip g/10.60.0.0/24 - -> 10.60.0.3/24
			follow
			show -> 10.60.0.0/24 "web" 3/0
			# who wants it and has not had it waits for what the managers' lists say
			bind shop 10.60.0.0/24 -> !overlaps network web
			# the network is there still, and belongs to this leader again
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind web 10.60.0.0/24 again
			show -> 10.60.0.0/24 "web" 3/2
			bind shop 10.60.0.0/24 again -> !overlaps network web
			# that one removed it and gave the subnet to another network; an address of it is
			# in the hands of a container already
			follow
			held 10.60.0.2 10.60.0.4
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			bind shop 10.60.0.0/24 again
			show -> 10.60.0.0/24 "shop" 3/2
			bind web 10.60.0.0/24 again -> !overlaps network shop
			free web
			vip g/10.60.0.0/24 10.60.0.4 -> 10.60.0.4/24
			restart
			show -> 10.60.0.0/24 "shop" 3/2
			# after a restart, of which nobody tells
			bind web 10.60.0.0/24 again -> !overlaps network shop
			follow
			held
			bind web 10.60.0.0/24 again
			show -> 10.60.0.0/24 "web" 1/0
			restart
			show -> 10.60.0.0/24 "web" 1/0`)
	})
	t.Run("the owner was gone already", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			bind web 10.60.0.0/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			# another leader removed web; shop is replayed while the reader frees web
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			free web
			show -> 10.60.0.0/24 "" 1/0
			gw g/10.60.0.0/24 10.60.0.9 -> 10.60.0.9/24
			bind shop 10.60.0.0/24
			show -> 10.60.0.0/24 "shop" 1/0
			vip g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24`)
	})
	t.Run("network that never came to be", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g - -> g/10.255.0.0/20
			gw g/10.255.0.0/20 - -> 10.255.0.1/20
			pool g 10.255.0.0/16 -> !pool 10.255.0.0/16 overlaps a pool that no network has taken yet (10.255.0.0/20); choose another --subnet
			rel g/10.255.0.0/20 10.255.0.1
			show -> 10.255.0.0/20 "" 0/0
			relpool g/10.255.0.0/20
			relpool g/10.255.0.0/20
			show -> nothing`)
	})
	t.Run("network of another driver, replayed", func(t *testing.T) {
		run(t, ScopeGlobal, `
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 - -> 10.60.0.1/24
			vip g/10.60.0.0/24 - -> 10.60.0.2/24
			pool g 10.60.0.0/24 -> g/10.60.0.0/24
			gw g/10.60.0.0/24 10.60.0.1 -> 10.60.0.1/24
			vip g/10.60.0.0/24 10.60.0.2 -> 10.60.0.2/24
			# without the allocator's mark it is somebody else
			ask g/10.60.0.0/24 10.60.0.2 -> !address 10.60.0.2 of pool 10.60.0.0/24 is in use
			# taken over by a network: what it does not ask for is in doubt
			bind web 10.60.0.0/24
			show -> 10.60.0.0/24 "web" 2/1
			free web
			show -> nothing`)
	})
	t.Run("network with another IPAM", func(t *testing.T) {
		run(t, ScopeGlobal, `
			bind web 10.0.1.0/24
			bind web 10.0.1.0/24
			show -> 10.0.1.0/24 "web" 0/0
			pool g 10.0.0.0/16 -> !overlaps network web (10.0.1.0/24)
			free web
			show -> nothing`)
	})
}

func TestNodeLocalSpaceSaysYes(t *testing.T) {
	run(t, ScopeGlobal, `
		# create, killed engine, create again: no release in between
		pool l 10.200.0.0/24 -> l/10.200.0.0/24
		gw l/10.200.0.0/24 10.200.0.1 -> 10.200.0.1/24
		ask l/10.200.0.0/24 10.200.0.5 -> 10.200.0.5/24
		pool l 10.200.0.0/24 -> l/10.200.0.0/24
		gw l/10.200.0.0/24 10.200.0.1 -> 10.200.0.1/24
		ask l/10.200.0.0/24 10.200.0.5 -> 10.200.0.5/24
		# a subnet of the swarm that is used again while old containers live
		pool l 10.200.0.0/16 sub=10.200.1.0/24 -> l/10.200.0.0/16/10.200.1.0/24
		ask l/10.200.0.0/16/10.200.1.0/24 10.200.255.250 -> 10.200.255.250/16
		restart
		ask l/10.200.0.0/24 10.200.0.6 -> 10.200.0.6/24
		rel l/10.200.0.0/24 10.200.0.7
		relpool l/10.200.7.0/24
		show -> nothing
		pool l - -> !subnets are chosen by the swarm's leader; for a network of this engine alone use the plugin alias with SCOPE=local
		ask l/10.200.0.0/24 - -> !addresses of pool sluice-local/10.200.0.0/24 are chosen by the swarm's leader
		ask l/10.200.0.0/24 10.201.0.1 -> !address 10.201.0.1 is outside of pool 10.200.0.0/24
		pool l fd00::/64 v6 -> !IPv6
		pool l - v6 -> !IPv6
		pool l 10.200.0.1/24 -> !did you mean 10.200.0.0/24?`)
}

func TestLocalNetwork(t *testing.T) {
	t.Run("life of a network", func(t *testing.T) {
		run(t, ScopeLocal, `
			pool l - -> l/10.255.0.0/20
			gw l/10.255.0.0/20 - -> 10.255.0.1/20
			bind web 10.255.0.0/20
			ask l/10.255.0.0/20 - -> 10.255.0.2/20
			ask l/10.255.0.0/20 - -> 10.255.0.3/20
			ask l/10.255.0.0/20 10.255.0.3 -> !address 10.255.0.3 of pool 10.255.0.0/20 is in use; choose another address or leave the choice to sluice
			rel l/10.255.0.0/20 10.255.0.3
			ask l/10.255.0.0/20 10.255.0.3 -> 10.255.0.3/20
			restart
			bind web 10.255.0.0/20
			ask l/10.255.0.0/20 - -> 10.255.0.4/20
			show -> 10.255.0.0/20 "web" 4/0
			# network rm: IPAM first
			rel l/10.255.0.0/20 10.255.0.1
			relpool l/10.255.0.0/20
			free web
			show -> nothing`)
	})
	t.Run("subnet, range, aux address", func(t *testing.T) {
		run(t, ScopeLocal, `
			pool l 10.50.0.0/24 sub=10.50.0.128/25 -> l/10.50.0.0/24/10.50.0.128/25
			ask l/10.50.0.0/24/10.50.0.128/25 10.50.0.129 -> 10.50.0.129/24
			gw l/10.50.0.0/24/10.50.0.128/25 - -> 10.50.0.1/24
			ask l/10.50.0.0/24/10.50.0.128/25 - -> 10.50.0.128/24
			ask l/10.50.0.0/24/10.50.0.128/25 - -> 10.50.0.130/24
			# nothing is kept for nodes
			ask l/10.50.0.0/24/10.50.0.128/25 10.50.0.254 -> 10.50.0.254/24
			# the aux address as gateway, a second gateway, the gateway as address
			gw l/10.50.0.0/24/10.50.0.128/25 10.50.0.9 -> !with gateway 10.50.0.1, so 10.50.0.9 cannot be its gateway
			gw l/10.50.0.0/24/10.50.0.128/25 10.50.0.1 -> 10.50.0.1/24
			ask l/10.50.0.0/24/10.50.0.128/25 10.50.0.1 -> !address 10.50.0.1 is the gateway
			rel l/10.50.0.0/24/10.50.0.128/25 10.50.0.1
			gw l/10.50.0.0/24/10.50.0.128/25 10.50.0.129 -> !in use`)
	})
	t.Run("requests without a subnet never give the same twice", func(t *testing.T) {
		run(t, ScopeLocal, `
			pool l - -> l/10.255.0.0/20
			pool l - -> l/10.255.16.0/20
			pool l - -> l/10.255.32.0/20
			relpool l/10.255.0.0/20
			relpool l/10.255.16.0/20
			pool l - -> l/10.255.48.0/20
			pool l - sluice.size=24 -> l/10.255.64.0/24
			pool l - sluice.size=24 sluice.pool=10.9.0.0/16 -> l/10.9.0.0/24
			relpool l/10.9.0.0/24
			pool l - -> l/10.255.80.0/20
			pool l - sluice.size=24 sluice.pool=10.9.0.0/16 -> l/10.9.1.0/24`)
	})
	t.Run("a subnet in use", func(t *testing.T) {
		run(t, ScopeLocal, `
			pool l 10.50.0.0/24 -> l/10.50.0.0/24
			bind web 10.50.0.0/24
			pool l 10.50.0.0/24 -> !pool 10.50.0.0/24 overlaps network web (10.50.0.0/24); choose another --subnet
			bind shop 10.50.0.0/24 -> !overlaps network web
			relpool l/10.50.0.0/24
			ask l/10.50.0.0/24 - -> !is not known: its network was removed, or the plugin's state was lost; remove the network and create it again
			pool l 10.50.0.0/24 -> l/10.50.0.0/24`)
	})
	t.Run("the swarm's space", func(t *testing.T) {
		run(t, ScopeLocal, `
			pool g - -> !this plugin has SCOPE=local
			vip g/10.50.0.0/24 - -> !this plugin has SCOPE=local
			rel g/10.50.0.0/24 10.50.0.1
			relpool g/10.50.0.0/24`)
	})
}

func TestFreshSubnetAvoidsRoutesAndNamesNetworks(t *testing.T) {
	a, err := Open(t.Context(), Config{
		Journal:     newJournal(t),
		Routes:      func() []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix("10.255.0.0/18")} },
		NetworkName: func(model.NetworkID) string { return "web" },
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := a.RequestPool(t.Context(), PoolRequest{Space: GlobalSpace})
	if err != nil || r.Pool != netip.MustParsePrefix("10.255.64.0/20") || r.PoolID != "sluice-global/10.255.64.0/20" {
		t.Errorf("got %v, %v", r, err)
	}
	if err := a.Bind(t.Context(), "f9sx", r.Pool, false); err != nil {
		t.Fatal(err)
	}
	_, err = a.RequestPool(t.Context(), PoolRequest{Space: GlobalSpace, Pool: "10.255.64.0/24"})
	if want := "pool 10.255.64.0/24 overlaps network web (10.255.64.0/20); choose another --subnet"; err == nil || err.Error() != want {
		t.Errorf("err = %v", err)
	}
	if p := a.Snapshot(); len(p) != 1 || p[0].Nodes != netip.MustParsePrefix("10.255.79.0/24") || p[0].Free != 3839 {
		t.Errorf("snapshot %+v", p)
	}
}

func TestConstantsKeepTheSpacesApart(t *testing.T) {
	if s := GetDefaultAddressSpaces(); s.Local != "sluice-local" || s.Global != "sluice-global" {
		t.Error(s)
	}
	if c := GetCapabilities(); c.RequiresMACAddress || c.RequiresRequestReplay {
		t.Error(c)
	}
}

func TestLeasesTellGatewayAndDoubt(t *testing.T) {
	a := open(t, ScopeGlobal, newJournal(t))
	ctx := t.Context()
	r, err := a.RequestPool(ctx, PoolRequest{Space: GlobalSpace})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []map[string]string{{"RequestAddressType": "com.docker.network.gateway"}, nil} {
		if _, err := a.RequestAddress(ctx, AddressRequest{PoolID: r.PoolID, Options: o}); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Bind(ctx, "web", r.Pool, false); err != nil {
		t.Fatal(err)
	}
	got := a.Leases(a.Snapshot()[0].ID)
	if len(got) != 2 || !got[0].Gateway || got[0].Unconfirmed || got[1].Gateway || !got[1].Unconfirmed {
		t.Errorf("leases %+v", got)
	}
	if !slices.IsSortedFunc(got, func(x, y pool.Lease) int { return x.Address.Compare(y.Address) }) {
		t.Error("not sorted")
	}
}
