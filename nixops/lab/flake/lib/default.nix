# The functions of nixpkgs' `lib` that configurations commonly use, under the same names.
let
  lib =
    import ./functions.nix
    // import ./modules.nix { inherit lib; }
    // {
      types = import ./types.nix { inherit lib; };

      # As in nixpkgs, the same functions are also found by subject.
      strings = lib;
      lists = lib;
      attrsets = lib;
      trivial = lib;
      modules = lib;
      options = lib;
    };
in
lib
