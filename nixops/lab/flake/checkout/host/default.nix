{
  config,
  lib,
  pkgs,
  ...
}:
{
  imports = [
    ./actions-runner.nix
    ./local.nix
@plain_imports@
  ]@guarded_imports@;

  networking.hostName = "@host@";

  virtualisation.podman.enable = true;

  system.stateVersion = "24.11";
}
