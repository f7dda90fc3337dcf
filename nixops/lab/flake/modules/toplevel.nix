# `system.build.toplevel`: what a generation is.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;
  inherit (config.system) build;
  yesNo = b: if b then "yes" else "no";

  failed = map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);
  checked =
    drv:
    if failed != [ ] then
      throw "\nFailed assertions:\n${lib.concatMapStringsSep "\n" (m: "- ${m}") failed}"
    else
      lib.foldr lib.warn drv config.warnings;

  nixosVersion = pkgs.writeShellScriptBin "nixos-version" ''
    case ''${1-} in
    --json) echo ${
      lib.escapeShellArg (
        builtins.toJSON {
          inherit (config.system) configurationRevision;
          nixosVersion = config.system.nixos.label;
        }
      )
    } ;;
    --configuration-revision) echo ${
      lib.escapeShellArg (if config.system.configurationRevision == null then "" else config.system.configurationRevision)
    } ;;
    *) echo ${lib.escapeShellArg "${config.system.nixos.label} (Lab)"} ;;
    esac
  '';
in
{
  options.system = {
    configurationRevision = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "The revision of the configuration's repository.";
    };
    stateVersion = mkOption {
      type = types.str;
      default = lib.version;
    };
    nixos.label = mkOption {
      type = types.str;
      default = "${lib.version}.lab";
    };
    activationScripts = mkOption {
      type = types.attrsOf types.lines;
      default = { };
      description = "Shell fragments that run at each activation and boot, by name.";
    };
  };

  config = {
    environment.systemPackages = [ nixosVersion ];

    system.build.toplevel = checked (
      pkgs.runCommand "nixos-system-${config.networking.hostName}-${config.system.nixos.label}"
        {
          inherit (build) etc systemPath sysusers;
          inherit (config.system.nixos) label;
          inherit (config.networking) hostName;
          hostSystem = pkgs.hostPlatform.system;
          activate = ../scripts/activate.sh;
          switch = ../scripts/switch-to-configuration.sh;
          loader = ../scripts/install-loader.sh;
          init = ../scripts/init.sh;
          fragments = lib.concatStrings (
            lib.mapAttrsToList (name: text: "# ${name}\n(\n${text}\n) || status=1\n") config.system.activationScripts
          );
          passAsFile = [ "fragments" ];
          dropsNetwork = yesNo config.lab.activationDropsNetwork;
          hangs = yesNo config.lab.activationHangs;
          failsWith = if config.lab.activationFails == null then 0 else config.lab.activationFails;
          silentLoader = yesNo config.lab.bootloaderSilentlyFails;
        }
        ''
          mkdir -p "$out/bin"
          install() {
            while IFS= read -r line; do
              case $line in
              @fragments@) cat "$fragmentsPath" ;;
              @settings@)
                printf 'toplevel=%s\nhost_name=%s\nsysusers=%s\ndrops_network=%s\nhangs=%s\nfails_with=%s\nsilent_loader=%s\n' \
                  "$out" "$hostName" "$sysusers" "$dropsNetwork" "$hangs" "$failsWith" "$silentLoader"
                ;;
              *) printf '%s\n' "$line" ;;
              esac
            done <"$1" >"$2"
            chmod 555 "$2"
          }
          install "$activate" "$out/activate"
          install "$switch" "$out/bin/switch-to-configuration"
          install "$loader" "$out/install-loader"
          install "$init" "$out/init"
          ln -s "$etc/etc" "$out/etc"
          ln -s "$systemPath" "$out/sw"
          printf '%s' "$label" >"$out/nixos-version"
          printf '%s' "$hostSystem" >"$out/system"
          (cd "$out/etc" && find -L . ! -type d) | sed 's|^\./||' | sort >"$out/etc-files"
        ''
    );
  };
}
