# What images are made of: shell derivations with nothing of nixpkgs; the tools are those of the builder. `salt` makes
# all paths new to every store.
{ system, salt }:
let
  run =
    name: script: more:
    derivation (
      {
        inherit name system salt;
        builder = "/bin/sh";
        args = [
          "-e"
          script
        ];
        PATH = "/opt/lab/tools:/usr/bin:/bin";
      }
      // more
    );

  architecture =
    {
      x86_64-linux = "amd64";
      aarch64-linux = "arm64";
    }
    .${system};

  layer =
    name: seconds: mib:
    run "${name}-layer.tar" ./layer.sh {
      inherit seconds mib;
      title = name;
    };

  layout =
    name: more:
    run "${name}-layout" ./layout.sh (
      {
        inherit architecture;
        layer = layer name (more.seconds or 0) (more.mib or 0);
      }
      // removeAttrs more [
        "seconds"
        "mib"
      ]
    );

  # As nix2container has it: the image, and beside it `copyTo`, whose bin/copy-to pushes it. `pause` seconds pass
  # before it begins to.
  withCopyTo =
    name: pause: image:
    image
    // {
      copyTo = run "copy-to" ./copy-to.sh { inherit image pause; };
    };

  program = name: withCopyTo name 0 (layout name { });
in
{
  inherit
    run
    layout
    layer
    withCopyTo
    program
    architecture
    ;
}
