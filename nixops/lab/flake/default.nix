# A stand-in for nixpkgs that needs no network: `lib`, `legacyPackages.<system>` and `lib.nixosSystem`, with the
# options and the behaviour that nixops and its lab rely on.
let
  lib = import ./lib;
  pkgsFor = system: import ./pkgs { inherit lib system; };

  nixosSystem =
    {
      system ? "x86_64-linux",
      modules,
      specialArgs ? { },
    }@given:
    let
      pkgs = pkgsFor system;
      evaluated = lib.evalModules {
        modules = import ./modules ++ modules;
        specialArgs = {
          inherit pkgs;
          utils = import ./lib/utils.nix { inherit lib; };
          modulesPath = toString ./modules;
        }
        // specialArgs;
      };
    in
    evaluated
    // {
      inherit pkgs;
      extendModules =
        {
          modules ? [ ],
          specialArgs ? { },
        }:
        nixosSystem {
          inherit system;
          modules = given.modules ++ modules;
          specialArgs = given.specialArgs or { } // specialArgs;
        };
    };
in
{
  lib = lib // {
    inherit nixosSystem;
  };
  legacyPackages = lib.genAttrs [
    "x86_64-linux"
    "aarch64-linux"
  ] pkgsFor;
}
