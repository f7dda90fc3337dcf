# `environment.*`: files in /etc and the programs of the system.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  files = lib.filter (f: f.enable) (lib.attrValues config.environment.etc);
in
{
  options = {
    environment.etc = lib.mkOption {
      default = { };
      description = "Files below /etc.";
      type = lib.types.attrsOf (
        lib.types.submodule (
          { name, config, ... }:
          {
            options = {
              enable = lib.mkOption {
                type = lib.types.bool;
                default = true;
              };
              target = lib.mkOption {
                type = lib.types.str;
                default = name;
              };
              text = lib.mkOption {
                type = lib.types.nullOr lib.types.lines;
                default = null;
              };
              source = lib.mkOption {
                type = lib.types.path;
              };
            };
            config.source = lib.mkIf (config.text != null) (
              lib.mkDefault (pkgs.writeText "etc-${lib.replaceStrings [ "/" "\\" ] [ "-" "-" ] name}" config.text)
            );
          }
        )
      );
    };
    environment.systemPackages = lib.mkOption {
      type = lib.types.listOf lib.types.package;
      default = [ ];
      description = "Packages whose programs are in /run/current-system/sw/bin.";
    };
    networking.hostName = lib.mkOption {
      type = lib.types.strMatching "[[:alnum:]]([[:alnum:]-]{0,61}[[:alnum:]])?";
      default = "nixos";
    };
    networking.domain = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
    };
    time.timeZone = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
    };
    system.build = lib.mkOption {
      type = lib.types.lazyAttrsOf lib.types.raw;
      default = { };
      description = "Derivations that make up the system.";
    };
  };

  config = {
    environment.systemPackages = with pkgs; [
      bashInteractive
      coreutils
      curl
      dash
      diffutils
      findutils
      gawk
      getent
      gitMinimal
      gnugrep
      gnused
      gnutar
      gzip
      iproute2
      iputils
      kmod
      config.nix.package
      openssh
      procps
      python3
      shadow
      systemd
      util-linux
      which
    ];

    system.build.systemPath = pkgs.buildEnv {
      name = "system-path";
      paths = config.environment.systemPackages;
    };

    system.build.etc = pkgs.linkFarm "etc" (
      map (f: {
        name = "etc/${f.target}";
        path = f.source;
      }) files
      ++ [
        {
          name = "etc/systemd/system";
          path = config.system.build.units;
        }
      ]
    );
  };
}
