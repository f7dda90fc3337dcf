{ pkgs, ... }:
{
  services.gitea-actions-runner.instances.actions1 = {
    enable = @actions1@;
    name = "@host@";
    url = @forge_url@;
    tokenFile = "/run/secrets/forgejo-runner-token";
    labels = [
      "ubuntu-latest:docker://node:18-bullseye"
    ];
    settings = {
      runner.capacity = 2;
    };
  };

  systemd.services.gitea-runner-actions1 = {
    after = [ "lab-secrets.service" ];
    wants = [ "lab-secrets.service" ];
  };
}
