# `system.autoUpgrade`: the units have the names and the settings of NixOS's, but the upgrade itself only leaves a
# line in /var/log/nixos-upgrade.ran, so that a test sees that it ran.
{ config, lib, ... }:

let
  cfg = config.system.autoUpgrade;
in
{
  options.system.autoUpgrade = {
    enable = lib.mkEnableOption "periodic upgrades";
    flake = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
    };
    flags = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      default = [ ];
    };
    operation = lib.mkOption {
      type = lib.types.enum [
        "switch"
        "boot"
      ];
      default = "switch";
    };
    dates = lib.mkOption {
      type = lib.types.str;
      default = "04:40";
    };
    randomizedDelaySec = lib.mkOption {
      type = lib.types.str;
      default = "0";
    };
    allowReboot = lib.mkEnableOption "reboots after an upgrade";
  };

  config = lib.mkIf cfg.enable {
    systemd.services.nixos-upgrade = {
      description = "NixOS Upgrade";
      restartIfChanged = false;
      unitConfig.X-StopOnRemoval = false;
      serviceConfig.Type = "oneshot";
      after = [ "network-online.target" ];
      wants = [ "network-online.target" ];
      script = ''
        echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) ${cfg.operation} ${lib.optionalString (cfg.flake != null) cfg.flake}" \
          >>/var/log/nixos-upgrade.ran
      '';
    };
    systemd.timers.nixos-upgrade = {
      description = "NixOS Upgrade";
      wantedBy = [ "timers.target" ];
      timerConfig = {
        OnCalendar = cfg.dates;
        RandomizedDelaySec = cfg.randomizedDelaySec;
        Persistent = false;
      };
    };
  };
}
