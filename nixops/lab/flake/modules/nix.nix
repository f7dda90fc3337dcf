# `nix.settings`, rendered to /etc/nix/nix.conf. Where a configuration sets none, the host's own file stays.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.nix;
  atom =
    with lib.types;
    oneOf [
      bool
      int
      str
      path
    ];
  show = value: if lib.isBool value then lib.boolToString value else toString value;
in
{
  options.nix = {
    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.nix;
    };
    settings = lib.mkOption {
      type = lib.types.attrsOf (lib.types.either atom (lib.types.listOf atom));
      default = { };
      description = "Settings of Nix; a list is written separated by spaces.";
    };
  };

  config.environment.etc."nix/nix.conf" = lib.mkIf (cfg.settings != { }) {
    text = lib.concatStrings (
      lib.mapAttrsToList (name: value: "${name} = ${show value}\n") (
        # The lab has no network and no user namespaces; NixOS's own defaults for the rest.
        {
          allowed-users = [ "*" ];
          build-users-group = "nixbld";
          sandbox = false;
          substituters = [ ];
          trusted-users = [ "root" ];
        }
        // cfg.settings
      )
    );
  };
}
