# The secrets that the hosts had before nixops came: copied to /run/secrets at each boot from /var/lib/lab-secrets,
# where the lab puts them. They are in no store path.
{ ... }:
{
  systemd.tmpfiles.rules = [ "d /run/secrets 0751 root root -" ];

  systemd.services.lab-secrets = {
    description = "Secrets in /run/secrets";
    wantedBy = [ "multi-user.target" ];
    unitConfig.ConditionPathExists = "/var/lib/lab-secrets";
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
    };
    script = ''
      umask 077
      for file in /var/lib/lab-secrets/*; do
        install -m 0400 -o root -g root "$file" "/run/secrets/''${file##*/}"
      done
    '';
  };
}
