# What no NixOS has: options that make a generation misbehave, so that a deploy that goes wrong can be tried.
#
# Beside them, where the file /run/nixos/lab-activation-exit exists on a host, every `switch-to-configuration` there
# ends with the code that the file holds, whatever its generation: that is how a roll-back is made to fail.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkEnableOption mkOption types;
  cfg = config.lab;
in
{
  options.lab = {
    activationFails = mkOption {
      type = types.nullOr (types.ints.between 1 125);
      default = null;
      description = "`switch-to-configuration` activates and then ends with this code, before it starts units.";
    };
    activationHangs = mkEnableOption "an activation that never ends";
    failingUnit = mkEnableOption "a unit that fails to start";
    activationDropsNetwork = mkEnableOption ''
      an activation that takes every network link down. The next activation, or boot, of a generation without this
      option brings them up again with the routes they had'';
    breakSshd = mkEnableOption "a unit that stops the SSH server; connections that stand go on";
    bootloaderSilentlyFails = mkEnableOption "a boot loader update that changes nothing and ends with 0 (nixpkgs#189966)";
  };

  config.systemd.services = {
    lab-failing = lib.mkIf cfg.failingUnit {
      description = "A unit that fails";
      wantedBy = [ "multi-user.target" ];
      serviceConfig.Type = "oneshot";
      script = ''
        echo "this unit fails on purpose" >&2
        exit 1
      '';
    };
    lab-break-sshd = lib.mkIf cfg.breakSshd {
      description = "No SSH server";
      wantedBy = [ "multi-user.target" ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        # Only the listener goes: whoever is logged in stays, as with a server that no longer starts.
        ExecStart = "${pkgs.systemd}/bin/systemctl stop ssh.socket ssh.service";
        ExecStop = "${pkgs.systemd}/bin/systemctl start ssh.service";
      };
    };
  };
}
