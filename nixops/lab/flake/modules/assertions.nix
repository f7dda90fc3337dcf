{ lib, ... }:

{
  options = {
    assertions = lib.mkOption {
      type = lib.types.listOf lib.types.unspecified;
      default = [ ];
      description = "What must hold: `{ assertion; message; }`. A failed one stops the evaluation of the toplevel.";
    };
    warnings = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      default = [ ];
      description = "What evaluating the toplevel warns of.";
    };
  };
}
