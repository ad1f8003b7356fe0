#!/bin/sh
# Secrets are files in /run/secrets, each named as the variable that a program reads it from.
set -eu
for file in /run/secrets/[A-Z]*; do
  if [ -f "$file" ]; then
    export "$(basename "$file")=$(cat "$file")"
  fi
done
exec "$@"
