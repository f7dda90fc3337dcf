# One image, built natively for each system by a builder of that system. There is no cross-building here, no
# `buildSystem` and no second set of packages: `packages.aarch64-linux` is made of packages for aarch64-linux, and
# `invoke build-image --flake examples/flake --attr docker --systems x86_64-linux,aarch64-linux` sees to it that each is
# built where it belongs, and puts both under one tag.
{
  description = "An image for two architectures";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    nix2container = {
      url = "github:nlewo/nix2container";
      inputs.nixpkgs.follows = "nixpkgs";
    };
  };

  outputs =
    {
      self,
      nixpkgs,
      nix2container,
    }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
    in
    {
      packages = nixpkgs.lib.genAttrs systems (
        system:
        let
          pkgs = nixpkgs.legacyPackages.${system};
          inherit (nix2container.packages.${system}.nix2container) buildImage buildLayer;
          app = pkgs.writeShellScriptBin "app" ''
            echo "built for ${system} from ${self.shortRev or "a tree with changes"}"
          '';
        in
        {
          inherit app;
          default = app;

          # `docker.copyTo` is the program that nixops runs on the builder, with REGISTRY_AUTH_FILE set.
          docker = buildImage {
            name = "app";
            config = {
              Entrypoint = [ "${app}/bin/app" ];
              Env = [ "SSL_CERT_FILE=${pkgs.cacert}/etc/ssl/certs/ca-bundle.crt" ];
            };
            # What changes seldom in a layer of its own: it is uploaded once.
            layers = [ (buildLayer { deps = [ pkgs.cacert ]; }) ];
          };
        }
      );
    };
}
