#!/usr/bin/env bash
# Create the certificate authority, the server's certificate and the key of each site.
#
#   make_keys.sh FOLDER HOST CLIENT...
#
# HOST is the host name or address under which sites reach the server. FOLDER must not exist.
# FOLDER/authority.key signs further certificates: keep it offline. Send FOLDER/CLIENT securely to
# the site, or let the site run the last command itself and send you key.pub.
set -euo pipefail
umask 077
folder=$1 host=$2
shift 2
mkdir "$folder"
cd "$folder"
case $host in
  *[!0-9.]*) name=DNS:$host ;;
  *) name=IP:$host ;;
esac

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 \
  -subj "/CN=authority of $host" -addext keyUsage=critical,keyCertSign \
  -keyout authority.key -out authority.pem
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes \
  -subj "/CN=$host" -keyout server.key -out server.csr
# The SuperLink itself listens at 127.0.0.1.
printf 'subjectAltName=%s,DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n' "$name" >server.ext
openssl x509 -req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial \
  -days 800 -extfile server.ext -out server.pem
rm server.csr server.ext

for client in "$@"; do
  mkdir "$client"
  cp authority.pem "$client"
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "$client" -f "$client/key"
done
