# What all hosts have.
{ pkgs, ... }:
{
  imports = [
    ./secrets.nix
    ./vault-secrets.nix
  ];

  vault.address = @bao_address@;

  environment.systemPackages = with pkgs; [ openbao ];
}
