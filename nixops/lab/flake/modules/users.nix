# System users and groups, made by systemd-sysusers at activation.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  line = parts: lib.concatStringsSep " " parts + "\n";
  groups = lib.concatMapStrings (name: line [ "g" name "-" ]) (lib.attrNames config.users.groups);
  users = lib.concatStrings (
    lib.mapAttrsToList (
      name: user:
      line [ "u" name "-" "-" user.home ]
      + lib.concatMapStrings (group: line [ "m" name group ]) (lib.optional (user.group != "") user.group ++ user.extraGroups)
    ) config.users.users
  );
in
{
  options = {
    users.groups = lib.mkOption {
      type = lib.types.attrsOf (lib.types.submodule { });
      default = { };
    };
    users.users = lib.mkOption {
      default = { };
      type = lib.types.attrsOf (
        lib.types.submodule {
          options = {
            isSystemUser = lib.mkEnableOption "a system user";
            group = lib.mkOption {
              type = lib.types.str;
              default = "";
            };
            extraGroups = lib.mkOption {
              type = lib.types.listOf lib.types.str;
              default = [ ];
            };
            home = lib.mkOption {
              type = lib.types.str;
              default = "/var/empty";
            };
          };
        }
      );
    };
    virtualisation.docker.enable = lib.mkEnableOption "docker (in the lab: its group)";
    virtualisation.podman.enable = lib.mkEnableOption "podman (in the lab: its group)";
  };

  config = {
    users.groups = lib.mkMerge [
      (lib.mkIf config.virtualisation.docker.enable { docker = { }; })
      (lib.mkIf config.virtualisation.podman.enable { podman = { }; })
    ];
    system.build.sysusers = pkgs.writeText "sysusers.conf" (groups + users);
  };
}
