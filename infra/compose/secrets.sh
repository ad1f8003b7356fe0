#!/bin/sh
# Makes what is missing in secrets/ beside this file: random passwords, and a certificate for NAME that signs itself.
#   sh secrets.sh [NAME]     afterwards secrets/login is the user and password of the proxy, as USER:PASSWORD
set -eu
name=${1:-localhost}
folder=$(dirname "$0")/secrets
mkdir -p "$folder"
chmod 700 "$folder"  # containers of other users read the files in it, nobody else of this machine does
cd "$folder"

missing() {
  [ ! -e "$1" ]
}

for secret in postgres_password s3_access_key s3_secret_key; do
  if missing $secret; then openssl rand -hex 24 | tr -d '\n' > $secret; fi
done
if missing s3_identities; then
  cat > s3_identities <<EOF
{"identities": [{"name": "llmill", "actions": ["Admin", "Read", "List", "Tagging", "Write"],
  "credentials": [{"accessKey": "$(cat s3_access_key)", "secretKey": "$(cat s3_secret_key)"}]}]}
EOF
fi
if missing login; then
  printf 'llmill:%s' "$(openssl rand -hex 24)" > login
  printf 'llmill:%s\n' "$(cut -d: -f2 login | openssl passwd -apr1 -stdin)" > htpasswd
fi
if missing tls_key; then
  openssl req -x509 -newkey rsa:3072 -nodes -days 825 -keyout tls_key -out tls_certificate -subj "/CN=$name" \
    -addext "subjectAltName=DNS:$name,DNS:localhost,IP:127.0.0.1" 2> /dev/null
fi
chmod 644 ./*
