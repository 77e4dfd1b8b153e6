#!/usr/bin/env bash
# Stand-ins, of the same names, for the images that docker-compose.yml and deployments/Dockerfile pull, made from Debian
# packages where no registry can be reached. Needs root, an engine, debootstrap and the `stack` extra's weed.
#
#   make-base-images.sh WEED      # the SeaweedFS binary; images that exist are left alone
set -euo pipefail
weed=$1
cd "$(dirname "$0")/../.."
python_image=$(sed -n 's/^ARG BASE=//p' deployments/Dockerfile)
postgres_image=$(sed -n 's/^ *image: \(postgres:.*\)/\1/p' docker-compose.yml)
seaweedfs_image=$(sed -n 's/^ *image: \(.*seaweedfs:.*\)/\1/p' docker-compose.yml)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
missing() { ! docker image inspect "$1" >/dev/null 2>&1; }

if missing deme-test-debian:bookworm; then
    # All three images in one: one bootstrap takes a minute.
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,postgresql,wget bookworm "$work/rootfs" \
        >"$work/log" 2>&1 || { tail "$work/log"; exit 1; }
    tar -C "$work/rootfs" -c . | docker import - deme-test-debian:bookworm >/dev/null
fi

if missing "$python_image"; then
    printf 'FROM deme-test-debian:bookworm\nRUN ln -s python3 /usr/bin/python\n' | docker build -q -t "$python_image" - >/dev/null
fi

if missing "$postgres_image"; then
    mkdir "$work/postgres"
    cp tests/compose/postgres-entrypoint.sh "$work/postgres/"
    cat >"$work/postgres/Dockerfile" <<'EOF'
FROM deme-test-debian:bookworm
COPY postgres-entrypoint.sh /
ENV PGDATA=/var/lib/postgresql/data PATH=/usr/lib/postgresql/15/bin:$PATH
RUN install -d -o postgres -g postgres $PGDATA /docker-entrypoint-initdb.d
USER postgres
STOPSIGNAL SIGINT
ENTRYPOINT ["/postgres-entrypoint.sh"]
EOF
    docker build -q -t "$postgres_image" "$work/postgres" >/dev/null
fi

if missing "$seaweedfs_image"; then
    mkdir "$work/seaweedfs"
    cp "$weed" "$work/seaweedfs/weed"
    printf 'FROM deme-test-debian:bookworm\nCOPY weed /usr/bin/\nENTRYPOINT ["/usr/bin/weed", "-logtostderr=true"]\n' \
        >"$work/seaweedfs/Dockerfile"
    docker build -q -t "$seaweedfs_image" "$work/seaweedfs" >/dev/null
fi
