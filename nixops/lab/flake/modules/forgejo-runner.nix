# `services.forgejo-runner`, of the shape of the NixOS module: connections with a UUID in `settings`, and in
# `secrets`, under the same keys, the files that hold what must not be in the store. Each instance has a user of
# its own, which systemd names after the unit.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:

let
  inherit (lib) mkEnableOption mkOption types;
  cfg = config.services.forgejo-runner;
  yaml = pkgs.formats.yaml { };
  credential = lib.concatStringsSep "__";

  secrets =
    types.attrsOf (types.either types.path secrets)
    // {
      description = "nested attribute set of absolute paths";
    };

  connection =
    { name, config, ... }:
    {
      freeformType = yaml.type;
      options = {
        url = mkOption { type = types.str; };
        uuid = mkOption { type = types.str; };
        # No default: whoever uses `token_url` says `token = null`.
        token = mkOption { type = types.nullOr types.str; };
      };
    };

  instance =
    { name, config, ... }:
    let
      labelled = f: lib.any f config.settings.runner.labels;
    in
    {
      options = {
        enable = mkEnableOption "this instance";
        settings = mkOption {
          default = { };
          type = types.submodule [
            {
              freeformType = yaml.type;
              options = {
                runner.labels = mkOption { type = types.listOf types.str; };
                server.connections = mkOption {
                  type = types.attrsOf (types.submodule connection);
                  default = { };
                };
              };
            }
            { config = lib.mapAttrsRecursive (path: _: "file:$CREDENTIALS_DIRECTORY/${credential path}") config.secrets; }
          ];
        };
        secrets = mkOption {
          type = secrets;
          default = { };
        };
        hostPackages = mkOption {
          type = types.listOf types.package;
          default = with pkgs; [
            bash
            coreutils
            curl
            gawk
            gnused
            nodejs
            wget
          ];
        };
        runtimes = {
          host = mkOption {
            type = types.bool;
            default = labelled (lib.hasSuffix ":host");
          };
          docker = mkOption {
            type = types.bool;
            default = labelled (lib.hasInfix ":docker") && virtualisation.docker.enable;
          };
          podman = mkOption {
            type = types.bool;
            default = labelled (lib.hasInfix ":docker") && virtualisation.podman.enable;
          };
        };
        configFile = mkOption {
          type = types.path;
          readOnly = true;
          default = yaml.generate "config.yaml" config.settings;
        };
      };
    };
  inherit (config) virtualisation;

  assertionsOf =
    name: i:
    [
      {
        assertion = i.settings.server.connections != { };
        message = "The option `services.forgejo-runner.instances.${name}.settings.server.connections' requires at least one connection.";
      }
      {
        assertion = lib.any (lib.hasInfix ":docker") i.settings.runner.labels -> i.runtimes.docker || i.runtimes.podman;
        message = "Instance ${name} of forgejo-runner has docker labels, which require either docker or podman.";
      }
    ]
    ++ lib.mapAttrsToList (c: settings: {
      assertion = (settings.token == null) != (settings.token_url or null == null);
      message = "The option `services.forgejo-runner.instances.${name}.settings' needs to have exactly one of `server.connections.${c}.token_url' or `server.connections.${c}.token' that is not null.";
    }) i.settings.server.connections;

  unit =
    name: i:
    lib.nameValuePair "forgejo-runner-${utils.escapeSystemdPath name}" {
      inherit (i) enable;
      description = "Forgejo Runner";
      wants = [ "network-online.target" ];
      after = [
        "network-online.target"
      ]
      ++ lib.optional i.runtimes.docker "docker.service"
      ++ lib.optional i.runtimes.podman "podman.service";
      wantedBy = [ "multi-user.target" ];
      environment.HOME = "/var/lib/forgejo-runner/${name}";
      path = lib.optionals i.runtimes.host i.hostPackages ++ [ pkgs.gitMinimal ];
      serviceConfig = {
        DynamicUser = true;
        StateDirectory = "forgejo-runner/${name}";
        WorkingDirectory = "/var/lib/forgejo-runner/${name}";
        # A dynamic user's state directory may be mounted noexec, and host jobs run scripts there.
        ExecPaths = lib.optional i.runtimes.host "/var/lib/forgejo-runner/${name}";
        ExecStart = "${lib.getExe cfg.package} daemon --config ${i.configFile}";
        Restart = "on-failure";
        RestartSec = 10;
        LoadCredential = lib.collectLeaves (path: file: "${credential path}:${file}") i.secrets;
        SupplementaryGroups = lib.optional i.runtimes.docker "docker" ++ lib.optional i.runtimes.podman "podman";
      };
    };
in
{
  options.services.forgejo-runner = {
    package = lib.mkPackageOption pkgs "forgejo-runner" { };
    instances = mkOption {
      type = types.attrsOf (types.submodule instance);
      default = { };
    };
  };

  config = lib.mkIf (cfg.instances != { }) {
    assertions = lib.concatLists (lib.mapAttrsToList assertionsOf cfg.instances);
    systemd.services = lib.mapAttrs' unit cfg.instances;
  };
}
