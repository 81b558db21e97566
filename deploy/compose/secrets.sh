#!/bin/sh
# Makes whatever is missing of what compose.yaml needs and no repository may hold: passwords, keys, and a
# certificate by an authority of this machine's own. To exchange one, remove its file, run this, and start again;
# the superuser's password is the exception: PostgreSQL takes it when its directory is made, and never again.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
cd secrets

missing() {
    [ ! -s "$1" ]
}

random() {
    openssl rand -hex 24
}

# As whom to connect to the database: a service file of libpq's.
connection() {
    if missing "$1"; then
        password=$(random)
        printf '[peculium]\nhost=database\nport=5432\ndbname=peculium\nuser=%s\npassword=%s\n' "$2" "$password" > "$1"
    fi
}

for name in superuser_password grafana_password; do
    if missing "$name"; then
        password=$(random)
        printf '%s' "$password" > "$name"
    fi
done
connection database_owner ledger
connection database_server peculium

if missing checkpoints.pem; then
    openssl genpkey -algorithm ed25519 -out checkpoints.pem
fi
if missing webhook_key; then
    key=$(openssl rand -hex 32)
    printf '%s\n' "$key" > webhook_key
fi
if missing ca.crt; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=Peculium on $(uname -n)" -keyout ca.key -out ca.crt 2> /dev/null
    rm -f server.crt
fi
if missing server.crt; then
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -subj /CN=peculium -keyout server.key -out server.csr 2> /dev/null
    names=DNS:localhost,DNS:server-1,DNS:server-2,IP:127.0.0.1
    printf "subjectAltName=%s\nextendedKeyUsage=serverAuth\n" "$names" > server.ext
    serial=$(openssl rand -hex 8)
    openssl x509 -req -in server.csr -extfile server.ext -CA ca.crt -CAkey ca.key -set_serial "0x$serial" \
        -days 365 -out server.crt 2> /dev/null
    rm server.csr server.ext
fi

# Containers run as the owner of these files; not as root, though.
user=$(id -u):$(id -g)
if [ "$(id -u)" = 0 ]; then
    user=10001:10001
    chown "$user" ./*
fi
if missing ../.env; then
    printf 'PECULIUM_USER=%s\n' "$user" > ../.env
fi
