# `systemd.*`: real units, written as NixOS writes them. What a unit is wanted by becomes a link in
# `<target>.wants`, not an [Install] section.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkIf mkOption types;

  atom =
    with types;
    nullOr (oneOf [
      bool
      int
      float
      str
      path
      package
    ]);
  # One setting of a unit file: a value, or a list that becomes one line for each.
  unitOption = types.mkType {
    name = "systemd option";
    check = v: atom.check v || (lib.isList v && lib.all atom.check v);
    merge =
      path: defs:
      if lib.any (d: lib.isList d.value) defs then
        lib.concatMap (d: lib.toList d.value) defs
      else
        atom.merge path defs;
  };
  section = mkOption {
    type = types.attrsOf unitOption;
    default = { };
  };
  list = mkOption {
    type = types.listOf types.str;
    default = [ ];
  };
  nullable =
    type:
    mkOption {
      type = types.nullOr type;
      default = null;
    };
  text = mkOption {
    type = types.lines;
    default = "";
  };

  anyUnit =
    { config, ... }:
    {
      options = {
        enable = mkOption {
          type = types.bool;
          default = true;
          description = "Where false, the unit is masked.";
        };
        description = mkOption {
          type = types.str;
          default = "";
        };
        documentation = list;
        after = list;
        before = list;
        wants = list;
        requires = list;
        requisite = list;
        bindsTo = list;
        partOf = list;
        conflicts = list;
        onFailure = list;
        wantedBy = list;
        requiredBy = list;
        restartTriggers = mkOption {
          type = types.listOf types.unspecified;
          default = [ ];
        };
        startLimitIntervalSec = nullable types.int;
        startLimitBurst = nullable types.int;
        unitConfig = section;
      };
      config.unitConfig = lib.mkMerge [
        (mkIf (config.description != "") { Description = config.description; })
        (mkIf (config.documentation != [ ]) { Documentation = toString config.documentation; })
        (mkIf (config.after != [ ]) { After = toString config.after; })
        (mkIf (config.before != [ ]) { Before = toString config.before; })
        (mkIf (config.wants != [ ]) { Wants = toString config.wants; })
        (mkIf (config.requires != [ ]) { Requires = toString config.requires; })
        (mkIf (config.requisite != [ ]) { Requisite = toString config.requisite; })
        (mkIf (config.bindsTo != [ ]) { BindsTo = toString config.bindsTo; })
        (mkIf (config.partOf != [ ]) { PartOf = toString config.partOf; })
        (mkIf (config.conflicts != [ ]) { Conflicts = toString config.conflicts; })
        (mkIf (config.onFailure != [ ]) { OnFailure = toString config.onFailure; })
        (mkIf (config.restartTriggers != [ ]) { X-Restart-Triggers = toString config.restartTriggers; })
        (mkIf (config.startLimitIntervalSec != null) { StartLimitIntervalSec = config.startLimitIntervalSec; })
        (mkIf (config.startLimitBurst != null) { StartLimitBurst = config.startLimitBurst; })
      ];
    };

  serviceUnit =
    { name, config, ... }:
    let
      storeName = lib.replaceStrings [ "\\" "@" ] [ "-" "_" ] name;
      script = phase: body: pkgs.writeShellScript "unit-script-${storeName}-${phase}" "set -e\n${body}";
    in
    {
      imports = [ anyUnit ];
      options = {
        environment = mkOption {
          type =
            with types;
            attrsOf (
              nullOr (oneOf [
                str
                path
                package
              ])
            );
          default = { };
        };
        path = mkOption {
          type =
            with types;
            listOf (oneOf [
              package
              str
            ]);
          default = [ ];
        };
        enableDefaultPath = mkOption {
          type = types.bool;
          default = true;
        };
        serviceConfig = section;
        script = text;
        preStart = text;
        postStart = text;
        preStop = text;
        postStop = text;
        reload = text;
        startAt = mkOption {
          type = types.either types.str (types.listOf types.str);
          default = [ ];
        };
        restartIfChanged = mkOption {
          type = types.bool;
          default = true;
        };
        reloadIfChanged = mkOption {
          type = types.bool;
          default = false;
        };
        stopIfChanged = mkOption {
          type = types.bool;
          default = true;
        };
      };
      config = {
        path = mkIf config.enableDefaultPath (
          lib.mkAfter [
            pkgs.coreutils
            pkgs.findutils
            pkgs.gnugrep
            pkgs.gnused
            pkgs.systemd
          ]
        );
        environment.PATH = mkIf (config.path != [ ]) (
          lib.mkDefault "${lib.makeBinPath config.path}:${lib.makeSearchPath "sbin" config.path}"
        );
        unitConfig = lib.mkMerge [
          (mkIf (!config.restartIfChanged) { X-RestartIfChanged = false; })
          (mkIf config.reloadIfChanged { X-ReloadIfChanged = true; })
          (mkIf (!config.stopIfChanged) { X-StopIfChanged = false; })
        ];
        serviceConfig = lib.mkMerge [
          (mkIf (config.script != "") { ExecStart = "${script "start" config.script}"; })
          (mkIf (config.preStart != "") { ExecStartPre = [ "${script "pre-start" config.preStart}" ]; })
          (mkIf (config.postStart != "") { ExecStartPost = [ "${script "post-start" config.postStart}" ]; })
          (mkIf (config.preStop != "") { ExecStop = "${script "pre-stop" config.preStop}"; })
          (mkIf (config.postStop != "") { ExecStopPost = "${script "post-stop" config.postStop}"; })
          (mkIf (config.reload != "") { ExecReload = "${script "reload" config.reload}"; })
        ];
      };
    };

  timerUnit = {
    imports = [ anyUnit ];
    options.timerConfig = section;
  };
  pathUnit = {
    imports = [ anyUnit ];
    options.pathConfig = section;
  };
  socketUnit = {
    imports = [ anyUnit ];
    options = {
      listenStreams = list;
      socketConfig = section;
    };
  };
  targetUnit = {
    imports = [ anyUnit ];
  };

  unitsOf =
    module:
    mkOption {
      type = types.attrsOf (types.submodule module);
      default = { };
    };

  # -- unit files
  show = value: if lib.isBool value then lib.boolToString value else toString value;
  setting = name: value: lib.concatMapStrings (v: "${name}=${show v}\n") (lib.filter (v: v != null) (lib.toList value));
  settings = set: lib.concatStrings (lib.mapAttrsToList setting set);
  variable = name: value: lib.optionalString (value != null) "Environment=${builtins.toJSON "${name}=${toString value}"}\n";

  cfg = config.systemd;
  files =
    lib.mapAttrsToList (name: u: {
      name = "${name}.service";
      unit = u;
      body = "[Service]\n${lib.concatStrings (lib.mapAttrsToList variable u.environment)}${settings u.serviceConfig}";
    }) cfg.services
    ++ lib.mapAttrsToList (name: u: {
      name = "${name}.timer";
      unit = u;
      body = "[Timer]\n${settings u.timerConfig}";
    }) cfg.timers
    ++ lib.mapAttrsToList (name: u: {
      name = "${name}.path";
      unit = u;
      body = "[Path]\n${settings u.pathConfig}";
    }) cfg.paths
    ++ lib.mapAttrsToList (name: u: {
      name = "${name}.socket";
      unit = u;
      body = "[Socket]\n${lib.concatMapStrings (setting "ListenStream") u.listenStreams}${settings u.socketConfig}";
    }) cfg.sockets
    ++ lib.mapAttrsToList (name: u: {
      name = "${name}.target";
      unit = u;
      body = "";
    }) cfg.targets;

  textOf = f: "[Unit]\n${settings f.unit.unitConfig}\n${f.body}";
  fileOf =
    f:
    if f.unit.enable then
      pkgs.writeText "unit-${lib.replaceStrings [ "\\" "@" ] [ "-" "_" ] f.name}" (textOf f)
    else
      "/dev/null";
in
{
  options.systemd = {
    services = unitsOf serviceUnit;
    timers = unitsOf timerUnit;
    paths = unitsOf pathUnit;
    sockets = unitsOf socketUnit;
    targets = unitsOf targetUnit;
    tmpfiles.rules = list;
    units = mkOption {
      type = types.lazyAttrsOf types.raw;
      readOnly = true;
      description = "Each unit file that comes of the configuration: `{ enable; text; }` by its name.";
    };
  };

  config = {
    systemd.timers =
      lib.mapAttrs
        (_: s: {
          wantedBy = [ "timers.target" ];
          timerConfig.OnCalendar = s.startAt;
        })
        (lib.filterAttrs (_: s: s.enable && s.startAt != [ ]) config.systemd.services);

    systemd.units = lib.listToAttrs (
      map (
        f:
        lib.nameValuePair f.name {
          inherit (f.unit) enable;
          text = textOf f;
        }
      ) files
    );

    environment.etc."tmpfiles.d/00-nixos.conf".text = lib.concatLines cfg.tmpfiles.rules;

    system.build.units =
      pkgs.runCommand "system-units"
        {
          files = lib.concatMapStrings (f: "${fileOf f} ${f.name}\n") files;
          links = lib.concatMapStrings (
            f:
            lib.concatMapStrings (target: "${target}.wants ${f.name}\n") f.unit.wantedBy
            + lib.concatMapStrings (target: "${target}.requires ${f.name}\n") f.unit.requiredBy
          ) (lib.filter (f: f.unit.enable) files);
          passAsFile = [
            "files"
            "links"
          ];
        }
        ''
          mkdir -p "$out"
          while read -r source name; do
            if [ "$source" = /dev/null ]; then ln -s /dev/null "$out/$name"; else cp "$source" "$out/$name"; fi
          done <"$filesPath"
          while read -r dir name; do
            mkdir -p "$out/$dir"
            ln -s "../$name" "$out/$dir/$name"
          done <"$linksPath"
        '';
  };
}
