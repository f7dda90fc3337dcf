{
  description = "Hosts of the lab";

  outputs =
    { self }:
    let
      nixpkgs = import ./nixpkgs;
      host =
        name:
        nixpkgs.lib.nixosSystem {
          system = "@system@";
          modules = [
            ./system
            (./hosts + "/${name}")
            {
              networking.hostName = nixpkgs.lib.mkDefault name;
              # A dirty tree has no revision.
              system.configurationRevision = self.rev or null;
            }
          ];
        };
    in
    {
      nixosConfigurations = nixpkgs.lib.genAttrs (builtins.attrNames (builtins.readDir ./hosts)) host;
      inherit (nixpkgs) legacyPackages;
    };
}
