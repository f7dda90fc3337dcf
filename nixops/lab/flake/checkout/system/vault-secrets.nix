# `vault.secrets.<name>`: a unit that fetches one value from OpenBao into a file, with the host's own AppRole.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;
  cfg = config.vault;

  secret =
    { name, ... }:
    {
      options = {
        secretPath = mkOption {
          type = types.str;
          description = "Path below the KV mount.";
        };
        extractKey = mkOption {
          type = types.str;
          description = "The key of the entry whose value is written, as it is.";
        };
        outputDir = mkOption {
          type = types.path;
          default = "/run/secrets/${name}";
          description = "The file that the value goes to (the name is from a time when it was a directory).";
        };
        mode = mkOption {
          type = types.str;
          default = "0400";
        };
        owner = mkOption {
          type = types.str;
          default = "root";
        };
        group = mkOption {
          type = types.str;
          default = "root";
        };
        services = mkOption {
          type = types.listOf types.str;
          default = [ ];
          description = "Services that need the file before they start.";
        };
      };
    };

  unit =
    name: s:
    let
      services = map (service: "${lib.removeSuffix ".service" service}.service") s.services;
      file = s.outputDir;
    in
    lib.nameValuePair "vault-secret-${name}" {
      description = "Secret ${name} from OpenBao";
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];
      wantedBy = [ "multi-user.target" ];
      before = services;
      requiredBy = services;
      environment.BAO_ADDR = cfg.address;
      path = [ pkgs.openbao ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        RuntimeDirectory = "vault-secret-${name}";
        RuntimeDirectoryMode = "0700";
        UMask = "0077";
        TimeoutStartSec = 60;
      };
      # No secret is an argument: the login goes over stdin, the token is in the environment of one short command.
      script = ''
        export HOME="$RUNTIME_DIRECTORY"
        role=$(cat ${cfg.approleDir}/role-id)
        secret=$(cat ${cfg.approleDir}/secret-id)
        token=$(printf '{"role_id":"%s","secret_id":"%s"}' "$role" "$secret" |
          bao write -field=token auth/${cfg.approleMount}/login -)
        new="$RUNTIME_DIRECTORY/value"
        BAO_TOKEN=$token bao kv get -mount=${lib.escapeShellArg cfg.mount} \
          -field=${lib.escapeShellArg s.extractKey} ${lib.escapeShellArg s.secretPath} >"$new"
        [ -s "$new" ]
        mkdir -p -m 0751 ${lib.escapeShellArg (dirOf file)}
        chown ${lib.escapeShellArg "${s.owner}:${s.group}"} "$new"
        chmod ${lib.escapeShellArg s.mode} "$new"
        mv -f "$new" ${lib.escapeShellArg file}
      '';
    };
in
{
  options.vault = {
    address = mkOption { type = types.str; };
    mount = mkOption {
      type = types.str;
      default = "secret";
    };
    approleMount = mkOption {
      type = types.str;
      default = "approle";
    };
    approleDir = mkOption {
      type = types.path;
      default = "/var/lib/vault/approle";
      description = "Holds `role-id` and `secret-id`, for root only.";
    };
    secrets = mkOption {
      type = types.attrsOf (types.submodule secret);
      default = { };
    };
  };

  config.systemd.services = lib.mapAttrs' unit cfg.secrets;
}
