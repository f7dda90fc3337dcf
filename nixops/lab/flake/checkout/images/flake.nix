{
  description = "Images of the lab: shell derivations, one for each system, pushed as nix2container and dockerTools do";

  outputs =
    { self }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      each = make: builtins.listToAttrs (map (system: { name = system; value = make system; }) systems);
      images = import ./images.nix;
    in
    {
      packages = each (system: images.packages { inherit system; salt = "@salt@"; });
      # Found only after `packages`, as in a flake that has no `packages` for it.
      legacyPackages = each (system: images.legacy { inherit system; salt = "@salt@"; });
      # An attribute of another kind than packages.<system>.<name>.
      containers.app = each (system: (images.packages { inherit system; salt = "@salt@"; }).docker);
    };
}
