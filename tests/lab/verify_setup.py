"""Makes a lab host into one with a runner on it, by hand: what a deploy would leave there, without one."""

from __future__ import annotations

from typing import Final

from nixops.inventory import model

# $1 is the directory of the host's tools. Can be run again: everything is as at the beginning then.
SETUP: Final = r"""
set -eu
tools=$1
rm -rf /etc/systemd/system/gitea-runner-actions*.service.d /opt/verify /run/secrets /var/lib/vault
mkdir -p /opt/verify /run/secrets/deep
cat > /opt/verify/packages.nix <<NIX
let
  make = name: script: derivation {
    inherit name; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "$tools";
    args = [ "-c" script ]; allowSubstitutes = false; preferLocalBuild = true;
  };
  links = programs: "mkdir -p \$out/bin; for p in \${programs}; do ln -s $tools/\$p \$out/bin/\$p; done";
in {
  system = make "nixos-system-lab" "mkdir -p \$out/sw; ln -s $tools \$out/sw/bin; echo lab > \$out/nixos-version";
  bash = make "bash-5.2" (links "bash");
  coreutils = make "coreutils-9.5" (links "ls cat sort mkdir mktemp rm tail head chmod sleep");
  gitMinimal = make "git-minimal-2.47.0" (links "git");
  gnused = make "gnused-4.9" (links "sed");
  nix = make "nix-2.26.1" (links "nix nix-build nix-store nix-instantiate");
  nodejs = make "nodejs-22.11.0" "mkdir -p \$out/bin; printf '#!/bin/sh\n' > \$out/bin/node; chmod 755 \$out/bin/node";
}
NIX
# All in one call, in the order of the attributes' names: the system is the last.
built=$(nix-build /opt/verify/packages.nix --no-out-link 2> /dev/null)
path=$(printf '%s\n' "$built" | sed -e '$d' -e 's|$|/bin|' | tr '\n' ':')
[ -e /run/current-system ] || ln -s "$(printf '%s\n' "$built" | tail -n 1)" /run/current-system
mkdir /opt/verify/bin
ln -s "$tools"/* /opt/verify/bin
rm -f /opt/verify/bin/node
put() { (umask 0377; printf "$2" > "$1"); }
put /run/secrets/runner-token 'TOKEN=0123456789abcdef0123456789abcdef01234567\n'
put /run/secrets/actions1-token 'TOKEN=1123456789abcdef0123456789abcdef01234567\n'
put /run/secrets/cache-secret 'cache-1:c2VjcmV0c2VjcmV0\n'
put /run/secrets/deep/backup 'another secret\n'
mkdir -p -m 0700 /var/lib/vault/approle
put /var/lib/vault/approle/role-id 'role\n'
put /var/lib/vault/approle/secret-id 'secret\n'
cat > /opt/verify/runner.sh <<'SH'
cat > .runner <<JSON
{
  "WARNING": "a comment",
  "id": 7,
  "uuid": "$2",
  "name": "$1",
  "token": "averysecrettoken",
  "address": "http://forge.lab:3000",
  "labels": ["native:host"]
}
JSON
chmod 0600 .runner
while :; do sleep 1000; done
SH
unit() {
    cat > "/etc/systemd/system/gitea-runner-$1.service" <<UNIT
[Unit]
StartLimitIntervalSec=0
[Service]
DynamicUser=yes
User=$2
StateDirectory=$2
WorkingDirectory=-/var/lib/gitea-runner/$1
Environment=HOME=/var/lib/gitea-runner/$1
Environment=PATH=${path%:}
EnvironmentFile=/run/secrets/$3
ExecStartPre=/bin/sh -c 'mkdir -p /var/lib/gitea-runner/$1'
ExecStart=/bin/sh -c 'cd /var/lib/gitea-runner/$1; exec /bin/sh /opt/verify/runner.sh $4 $5'
Restart=on-failure
RestartSec=2
$6
UNIT
}
unit actions1 gitea-runner actions1-token one 11111111-1111-1111-1111-111111111111 ''
unit actions2 gitea-runner-actions2 runner-token nix-cache02-native 22222222-2222-2222-2222-222222222222 \
'TemporaryFileSystem=/var/lib:ro
BindPaths=/var/lib/private/gitea-runner-actions2:/var/lib/gitea-runner
MemoryMax=1G
CPUQuota=150%
TasksMax=200
Nice=5'
systemctl daemon-reload
systemctl stop gitea-runner-actions1.service gitea-runner-actions2.service
state=/var/lib/private/gitea-runner
rm -rf "$state" "$state-actions2" /var/lib/gitea-runner* /var/lib/private/static-runner /var/lib/static-runner
systemctl start gitea-runner-actions1.service gitea-runner-actions2.service
for i in $(seq 100); do
    [ -s "$state/actions1/.runner" ] && [ -s "$state-actions2/actions2/.runner" ] && exit 0
    sleep 0.1
done
exit 1
"""

# Two instances of the newer module beside them: no User=, nested state directories, tokens through LoadCredential.
CONNECTIONS: Final = r"""
set -eu
path=$(systemctl show -P Environment gitea-runner-actions2.service | tr ' ' '\n' | sed -n 's/^PATH=//p')
for instance in actions1 actions2; do
    (umask 0377; printf 0123456789abcdef0123456789abcdef01234567 > "/run/secrets/forgejo-$instance-torjus-nixos")
    cat > "/opt/verify/$instance.yml" <<YAML
server:
  connections:
    torjus-nixos:
      url: http://forge.lab:3000
      uuid: ${instance#actions}2222222-2222-2222-2222-222222222222
      token_url: file:/run/credentials/forgejo-runner-$instance.service/token
YAML
    cat > "/etc/systemd/system/forgejo-runner-$instance.service" <<UNIT
[Unit]
StartLimitIntervalSec=0
[Service]
DynamicUser=yes
StateDirectory=forgejo-runner/$instance
WorkingDirectory=/var/lib/forgejo-runner/$instance
Environment=HOME=/var/lib/forgejo-runner/$instance
Environment=PATH=$path
LoadCredential=token:/run/secrets/forgejo-$instance-torjus-nixos
ExecStart=/bin/sh /opt/verify/daemon.sh daemon --config /opt/verify/$instance.yml
UNIT
done
cat > /opt/verify/daemon.sh <<'SH'
echo state > state
echo "runner: nix-cache02-native, with version: v12, with labels: [native], declared successfully"
while :; do sleep 1000; done
SH
systemctl daemon-reload
systemctl restart forgejo-runner-actions1.service forgejo-runner-actions2.service
"""

# $1 is what the drop-in adds to the runner's unit.
DROP_IN: Final = r"""
set -eu
mkdir -p /etc/systemd/system/gitea-runner-actions2.service.d
printf '[Service]\n%s\n' "$1" > /etc/systemd/system/gitea-runner-actions2.service.d/changed.conf
systemctl daemon-reload
systemctl reset-failed gitea-runner-actions2.service || true
systemctl restart gitea-runner-actions2.service
"""


def inventory_host(address: str, **runner: object) -> model.Host:
    """What an inventory says of such a host, with ``runner`` changing ``actions2``."""
    ours = {
        "name": "nix-cache02-native",
        "labels": ["native:host"],
        "scope": {"user": "torjus"},
        "trusted": ["torjus/nixos-servers"],
        "host_packages": ["bash", "coreutils", "gitMinimal", "gnused", "nix", "nodejs"],
        "limits": {"MemoryMax": "1G", "CPUQuota": "150%", "TasksMax": 200, "Nice": 5},
        "token": {"path": "hosts/nix-cache02/runner-token"},
        **runner,
    }
    return model.Host.model_validate(
        {
            "address": address,
            "protected_files": ["/run/secrets/cache-secret"],
            "runners": {"actions1": {"managed": False, "token_file": "/run/secrets/actions1-token"}, "actions2": ours},
        }
    )
