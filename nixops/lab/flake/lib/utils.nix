# What NixOS modules get as `utils`.
{ lib }:

{
  # As systemd-escape writes a name: `-` becomes `\x2d`, and `/` becomes `-`.
  escapeSystemdPath =
    text:
    lib.replaceStrings
      [
        "-"
        "/"
        " "
      ]
      [
        "\\x2d"
        "-"
        "\\x20"
      ]
      (lib.removePrefix "/" (toString text));
}
