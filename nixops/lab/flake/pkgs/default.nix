# The package set: small derivations that need no network and no other package to build. The builder is /bin/sh
# with the lab's programs on its PATH, so they build on a lab host and on the operator's machine alike.
{ lib, system }:

let
  tools = import ./tools.nix;

  builderPath = "/opt/lab/tools:/usr/bin:/bin:/usr/sbin:/sbin";

  # `script` makes $out; every other attribute is in its environment.
  mk =
    name: attrs: script:
    derivation (
      {
        inherit name system;
        builder = "/bin/sh";
        args = [
          "-euc"
          script
        ];
        PATH = builderPath;
        preferLocalBuild = true;
      }
      // attrs
    );

  withMeta =
    pname: drv:
    drv
    // {
      inherit pname;
      meta.mainProgram = pname;
    };

  # Links resolve on the host that runs them; where the closure is built they may dangle.
  linked =
    pname: programs:
    withMeta pname (
      mk pname { inherit programs; } ''
        mkdir -p "$out/bin"
        for program in $programs; do set -- "$@" "/opt/lab/tools/$program"; done
        ln -s "$@" "$out/bin/"
      ''
    );

  perhaps =
    pname: programs:
    withMeta pname (
      mk pname
        {
          inherit programs;
          # $0 keeps the name it was called by.
          wrapper = ''
            #!/bin/sh
            name=''${0##*/}
            [ -x "/opt/lab/tools/$name" ] && exec "/opt/lab/tools/$name" "$@"
            echo "$name: the lab's hosts have no such program" >&2
            exit 127
          '';
        }
        ''
          mkdir -p "$out/bin"
          for program in $programs; do
            printf '%s' "$wrapper" >"$out/bin/$program"
            chmod 755 "$out/bin/$program"
          done
        ''
    );

  # A value as YAML. JSON is YAML.
  jsonType =
    let
      inherit (lib.types)
        attrsOf
        bool
        float
        int
        listOf
        nullOr
        oneOf
        path
        str
        ;
      value =
        nullOr (oneOf [
          bool
          int
          float
          str
          path
          (attrsOf value)
          (listOf value)
        ])
        // {
          description = "YAML value";
        };
    in
    value;
  jsonFormat = _: {
    type = jsonType;
    generate = name: value: pkgs.writeText name (builtins.toJSON value + "\n");
  };

  runner =
    pname: names:
    withMeta (lib.head names) (
      mk pname
        {
          inherit names;
          source = ./runner.py;
        }
        ''
          mkdir -p "$out/bin" "$out/libexec"
          cp "$source" "$out/libexec/runner.py"
          for name in $names; do
            printf '#!/bin/sh\nexec /opt/lab/tools/python3 %s/libexec/runner.py "$@"\n' "$out" >"$out/bin/$name"
            chmod 755 "$out/bin/$name"
          done
        ''
    );

  pkgs =
    builtins.mapAttrs linked tools.links
    // builtins.mapAttrs perhaps tools.optional
    // {
      inherit lib;
      inherit (pkgs.stdenv) hostPlatform;
      stdenv.hostPlatform = {
        inherit system;
        isLinux = true;
        isx86_64 = system == "x86_64-linux";
        isAarch64 = system == "aarch64-linux";
      };

      coreutils = withMeta "coreutils" (
        mk "coreutils"
          {
            programs = tools.coreutils;
            wrapper = ''
              #!/bin/sh
              name=''${0##*/}
              case ''${1-} in
              --coreutils-prog=*) name=''${1#*=}; shift ;;
              esac
              [ "$name" = coreutils ] && { echo "coreutils: call it by a program's name" >&2; exit 1; }
              exec "/opt/lab/tools/$name" "$@"
            '';
          }
          ''
            mkdir -p "$out/bin"
            printf '%s' "$wrapper" >"$out/bin/coreutils"
            chmod 755 "$out/bin/coreutils"
            for program in $programs; do ln -s coreutils "$out/bin/$program"; done
          ''
      );

      forgejo-runner = runner "forgejo-runner" [
        "forgejo-runner"
        "act_runner"
      ];
      gitea-actions-runner = runner "gitea-actions-runner" [
        "act_runner"
        "gitea-actions-runner"
      ];

      runtimeShell = "${pkgs.bash}/bin/bash";

      writeTextFile =
        {
          name,
          text,
          executable ? false,
          destination ? "",
        }:
        mk name
          {
            inherit text destination;
            mode = if executable then "555" else "444";
            passAsFile = [ "text" ];
          }
          ''
            file=$out$destination
            mkdir -p "''${file%/*}"
            cp "$textPath" "$file"
            chmod "$mode" "$file"
          '';
      writeText = name: text: pkgs.writeTextFile { inherit name text; };
      writeShellScript =
        name: text:
        pkgs.writeTextFile {
          inherit name;
          executable = true;
          text = "#!${pkgs.runtimeShell}\n${text}";
        };
      writeScript =
        name: text:
        pkgs.writeTextFile {
          inherit name text;
          executable = true;
        };
      writeScriptBin =
        name: text:
        withMeta name (
          pkgs.writeTextFile {
            inherit name text;
            executable = true;
            destination = "/bin/${name}";
          }
        );
      writeShellScriptBin = name: text: pkgs.writeScriptBin name "#!${pkgs.runtimeShell}\n${text}";
      writeShellApplication =
        {
          name,
          text,
          runtimeInputs ? [ ],
          ...
        }:
        pkgs.writeShellScriptBin name ''
          set -o errexit
          set -o nounset
          set -o pipefail
          export PATH="${lib.makeBinPath runtimeInputs}:$PATH"
          ${text}
        '';

      runCommand = name: env: script: mk name env script;
      runCommandLocal = pkgs.runCommand;

      # The programs of several packages in one directory; of two with one name the first package's stays.
      buildEnv =
        {
          name,
          paths,
          ...
        }:
        mk name { inherit paths; } ''
          mkdir -p "$out"
          for path in $paths; do
            for dir in bin share etc; do
              [ -d "$path/$dir" ] || continue
              mkdir -p "$out/$dir"
              set --
              for file in "$path/$dir"/*; do
                target=$out/$dir/''${file##*/}
                [ -e "$target" ] || [ -L "$target" ] || set -- "$@" "$file"
              done
              [ $# = 0 ] || ln -s "$@" "$out/$dir/"
            done
          done
        '';
      symlinkJoin = pkgs.buildEnv;
      linkFarm =
        name: entries:
        let
          list = if lib.isAttrs entries then lib.mapAttrsToList (name: path: { inherit name path; }) entries else entries;
        in
        mk name
          {
            entries = lib.concatMapStrings (e: "${e.path} ${e.name}\n") list;
            passAsFile = [ "entries" ];
          }
          ''
            mkdir -p "$out"
            while read -r path entry; do
              case $entry in */*) mkdir -p "$out/''${entry%/*}" ;; esac
              ln -s "$path" "$out/$entry"
            done <"$entriesPath"
          '';

      formats = {
        yaml = jsonFormat;
        json = jsonFormat;
      };
    };
in
pkgs
