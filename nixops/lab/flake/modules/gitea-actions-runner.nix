# `services.gitea-actions-runner`, of the shape of the NixOS module: the same options, unit names, user, state
# directory and behaviour on a change of labels, including what is awkward about it. All instances share one user.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:

let
  inherit (lib) mkEnableOption mkOption types;
  cfg = config.services.gitea-actions-runner;
  instances = lib.attrValues cfg.instances;
  yaml = pkgs.formats.yaml { };

  wantsContainers = i: i.labels == [ ] || lib.any (lib.hasInfix ":docker:") i.labels;
  wantsHost = i: lib.any (lib.hasSuffix ":host") i.labels;
  # Only one of the two, but the module asks for one instance that has it right, not for all of them.
  oneToken = i: (i.token == null) != (i.tokenFile == null);

  instance.options = {
    enable = mkEnableOption "this instance";
    name = mkOption { type = types.str; };
    url = mkOption { type = types.str; };
    token = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "The token itself; it ends in the store.";
    };
    tokenFile = mkOption {
      type = with types; nullOr (either str path);
      default = null;
      description = "An environment file with `TOKEN=`.";
    };
    labels = mkOption { type = types.listOf types.str; };
    settings = mkOption {
      type = types.submodule { freeformType = yaml.type; };
      default = { };
    };
    hostPackages = mkOption {
      type = types.listOf types.package;
      default = with pkgs; [
        bash
        coreutils
        curl
        gawk
        gitMinimal
        gnused
        nodejs
        wget
      ];
    };
  };

  register =
    name: i:
    pkgs.writeShellScript "gitea-register-runner-${name}" ''
      state=$STATE_DIRECTORY/${name}
      mkdir -p "$state"
      cd "$state"

      # Other labels than the last time need another registration.
      wanted=$(echo ${lib.escapeShellArg (lib.concatStringsSep "\n" i.labels)} | sort)
      registered=$(cat "$state/.labels" 2>/dev/null || echo 0)
      if [ ! -e "$state/.runner" ] || [ "$wanted" != "$registered" ]; then
        # The old registration goes first: where the token no longer holds, none is left. A refused registration
        # does not end this script, as it does not end NixOS's: the daemon then finds no registration and fails.
        rm -vf "$state/.runner"
        ${cfg.package}/bin/act_runner register --no-interactive \
          --instance ${lib.escapeShellArg i.url} \
          --token "$TOKEN" \
          --name ${lib.escapeShellArg i.name} \
          --labels ${lib.escapeShellArg (lib.concatStringsSep "," i.labels)}
        echo "$wanted" >"$state/.labels"
      fi
    '';

  unit =
    name: i:
    let
      docker = wantsContainers i && config.virtualisation.docker.enable;
      podman = wantsContainers i && config.virtualisation.podman.enable;
    in
    lib.nameValuePair "gitea-runner-${utils.escapeSystemdPath name}" {
      inherit (i) enable;
      description = "Gitea Actions Runner";
      wants = [ "network-online.target" ];
      after = [
        "network-online.target"
      ]
      ++ lib.optional docker "docker.service"
      ++ lib.optional podman "podman.service";
      wantedBy = [ "multi-user.target" ];
      environment = {
        HOME = "/var/lib/gitea-runner/${name}";
      }
      // lib.optionalAttrs (i.token != null) { TOKEN = i.token; }
      // lib.optionalAttrs podman { DOCKER_HOST = "unix:///run/podman/podman.sock"; };
      path = [ pkgs.coreutils ] ++ lib.optionals (wantsHost i) i.hostPackages;
      serviceConfig = {
        DynamicUser = true;
        User = "gitea-runner";
        StateDirectory = "gitea-runner";
        WorkingDirectory = "-/var/lib/gitea-runner/${name}";
        Restart = "on-failure";
        RestartSec = 2;
        ExecStartPre = [ (register name i) ];
        ExecStart = "${cfg.package}/bin/act_runner daemon --config ${yaml.generate "config.yaml" i.settings}";
        SupplementaryGroups = lib.optional docker "docker" ++ lib.optional podman "podman";
      }
      // lib.optionalAttrs (i.tokenFile != null) { EnvironmentFile = i.tokenFile; };
    };
in
{
  options.services.gitea-actions-runner = {
    package = lib.mkPackageOption pkgs "gitea-actions-runner" { };
    instances = mkOption {
      type = types.attrsOf (types.submodule instance);
      default = { };
    };
  };

  config = lib.mkIf (cfg.instances != { }) {
    assertions = [
      {
        assertion = lib.any oneToken instances;
        message = "Instances of gitea-actions-runner can have `token` or `tokenFile`, not both.";
      }
      {
        assertion =
          lib.any wantsContainers instances -> config.virtualisation.docker.enable || config.virtualisation.podman.enable;
        message = "Label configuration on gitea-actions-runner instance requires either docker or podman.";
      }
    ];
    systemd.services = lib.mapAttrs' unit cfg.instances;
  };
}
