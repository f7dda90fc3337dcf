# The lab's images, for one system each: see imagerepo.py for what each is there for.
let
  make = import ./library.nix;
in
{
  packages =
    args:
    let
      lab = make args;
    in
    {
      default = lab.program "app";
      docker = lab.program "app";
      # dockerTools.buildImage gives such a file.
      archive = lab.run "app.tar" ./archive.sh {
        layout = lab.layout "archived" { };
      };
      layout = lab.layout "plain" { };
      # Ten seconds of building, in one derivation below the image.
      slow = lab.withCopyTo "slow" 0 (lab.layout "slow" { seconds = 10; });
      endless = lab.withCopyTo "endless" 0 (lab.layout "endless" { seconds = 77102; });
      slow-push = lab.withCopyTo "slow-push" 8 (lab.layout "slow-push" { });
      endless-push = lab.withCopyTo "endless-push" 77103 (lab.layout "endless-push" { });
      failing = lab.withCopyTo "failing" 0 (lab.layout "failing" { fail = 1; });
      # Only a builder with this feature may build it.
      featured = lab.withCopyTo "featured" 0 (lab.layout "featured" { requiredSystemFeatures = [ "big-parallel" ]; });
      # Fails on one system and not on the other.
      half = lab.withCopyTo "half" 0 (lab.layout "half" (if args.system == "aarch64-linux" then { fail = 1; } else { }));
      # Says of itself that it is for another architecture than it was built on.
      foreign = lab.withCopyTo "foreign" 0 (lab.layout "foreign" { architecture = "riscv64"; });
      # Built on one system, whatever it is asked for.
      crossed = (make (args // { system = "x86_64-linux"; })).program "crossed";
      # Does not fit on a small disk.
      large = lab.withCopyTo "large" 0 (lab.layout "large" { mib = 300; });
      # Neither an image nor a program that pushes one.
      odd = lab.run "odd" ./odd.sh { };
      # A program of another name, which `meta` tells, beside a second one.
      named =
        let
          image = lab.layout "named" { };
        in
        image
        // {
          copyTo = lab.run "named" ./copy-to.sh { inherit image; pause = 0; program = "upload"; second = 1; } // {
            meta.mainProgram = "upload";
          };
        };
      refused = lab.withCopyTo "refused" 0 (lab.layout "refused" { }) // {
        copyTo = lab.run "refused" ./refused.sh { };
      };
      misplaced = throw "this image does not evaluate";
    };

  legacy = args: { old = (make args).program "old"; };
}
