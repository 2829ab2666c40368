# The plugin's rootfs, put together inside a container: for machines that are not
# Debian or Ubuntu, and for builds that must not depend on the machine's packages.
#
#   make docker-rootfs                      # BASE=debian:12-slim
#   make docker-rootfs BASE=my/debian:12    # any Debian or Ubuntu image at hand
#
# No Go in here: the binary is static, make builds it and it comes with the build
# context. BASE gives iptables; apt is asked only if the image has none. The work
# is done by the same script as `make rootfs`.
ARG BASE=debian:12-slim

FROM ${BASE} AS rootfs
COPY scripts/need.sh scripts/rootfs.sh /src/scripts/
COPY build/sluice-plugin config.json /src/
RUN mkdir /out && /src/scripts/rootfs.sh /src/sluice-plugin /src/config.json /out

FROM scratch
COPY --from=rootfs /out/rootfs/ /
ENTRYPOINT ["/bin/sluice-plugin"]
