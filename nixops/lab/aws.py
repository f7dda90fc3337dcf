"""AWS for the lab, the demo and the tests: moto's server, asked by real boto3 over HTTP.

    with AwsServer() as aws:
        aws.put_secret("nix-runner-ssh-key", key)
        run(environ={**os.environ, **aws.environ()})

It keeps everything in its own memory, with nothing of the real AWS in reach: credentials are made up, and every service
has the one endpoint. It needs the package ``moto[server]``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nixops.errors import UsageError
from nixops.lab.process import ServerProgram
from nixops.secret import Secret

REGION = "eu-central-1"
# The account that moto's server says everybody belongs to.
ACCOUNT = "123456789012"
_INSTANCES_AT_ONCE = 500
# The images that instances are made from, by architecture. moto's own are thousands, read anew for each region.
_IMAGES = {"x86_64": "ami-0123456789abcdef0", "arm64": "ami-0123456789abcdef1"}


class AwsServer(ServerProgram):
    """A server with no secrets, instances and repositories at first; a context manager.

    :param bind: the IPv4 address it listens on.
    :param port: 0 takes a free one.
    :param region: what is asked by default.
    """

    called = "moto's server"
    listens = b"Running on "
    patience = 60.0

    def __init__(self, *, bind: str = "127.0.0.1", port: int = 0, region: str = REGION) -> None:
        super().__init__(bind, port)
        self._clients: dict[tuple[str, str], Any] = {}
        self.region = region

    @property
    def url(self) -> str:
        """The endpoint of every service."""
        return f"http://{self._bind}:{self.port}"

    @property
    def registry(self) -> str:
        """The host name of ECR in this account and region."""
        return f"{ACCOUNT}.dkr.ecr.{self.region}.amazonaws.com"

    def environ(self) -> dict[str, str]:
        """What a program needs in its environment so that boto3 talks to this server, and to nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIALABLABLABLABLAB0",
            "AWS_SECRET_ACCESS_KEY": "made-up-for-the-lab-and-good-for-nothing",
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def stop(self) -> None:
        self._clients.clear()
        super().stop()

    # -- filling it -------------------------------------------------------------------------------------------

    def session(self, region: str | None = None, *, key: tuple[str, Secret] | None = None) -> Any:
        """A boto3 session of the lab's own credentials, whatever this process's environment says.

        :param key: another access key, with its secret.
        """
        import boto3

        make: Callable[..., Any] = boto3.session.Session  # boto3 has no types
        known = self.environ()
        return make(
            aws_access_key_id=key[0] if key else known["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=key[1].reveal() if key else known["AWS_SECRET_ACCESS_KEY"],
            region_name=region or self.region,
        )

    def client(self, service: str, region: str | None = None) -> Any:
        """A boto3 client of this server; one for each service and region, since making one takes a while."""
        known = (service, region or self.region)
        if known not in self._clients:
            self._clients[known] = self.session(region).client(service, endpoint_url=self.url)
        return self._clients[known]

    def put_secret(self, name: str, value: Secret | bytes) -> str:
        """Keep a secret in Secrets Manager (bytes as a binary one); its ARN."""
        given = {"SecretBinary": value} if isinstance(value, bytes) else {"SecretString": value.reveal()}
        return str(self.client("secretsmanager").create_secret(Name=name, **given)["ARN"])

    def run_instances(
        self,
        *names: str,
        tags: Mapping[str, str],
        region: str | None = None,
        architecture: str = "x86_64",
    ) -> list[str]:
        """Start an instance in EC2 for each name, with the tags and its name as ``Name``; their ids.

        :param architecture: ``x86_64`` or ``arm64``.
        """
        client = self.client("ec2", region)
        made: list[str] = []
        for begin in range(0, len(names), _INSTANCES_AT_ONCE):
            some: Sequence[str] = names[begin : begin + _INSTANCES_AT_ONCE]
            answer = client.run_instances(ImageId=_IMAGES[architecture], MinCount=len(some), MaxCount=len(some))
            ids = [str(instance["InstanceId"]) for instance in answer["Instances"]]
            client.create_tags(Resources=ids, Tags=[{"Key": key, "Value": value} for key, value in tags.items()])
            for number, name in zip(ids, some, strict=True):
                client.create_tags(Resources=[number], Tags=[{"Key": "Name", "Value": name}])
            made += ids
        return made

    def create_repository(self, name: str) -> str:
        """A repository in ECR; what image references call it, without a tag."""
        answer = self.client("ecr").create_repository(repositoryName=name)
        return str(answer["repository"]["repositoryUri"])

    def ask_permission(self) -> tuple[str, Secret]:
        """From now on IAM decides: a new user's access key, which may do nothing, and its secret."""
        import requests

        iam = self.client("iam")
        iam.create_user(UserName="nobody")
        key = iam.create_access_key(UserName="nobody")["AccessKey"]
        # moto's own switch: how many requests more are answered unasked.
        requests.post(f"{self.url}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()
        return str(key["AccessKeyId"]), Secret(str(key["SecretAccessKey"]))

    # -- starting ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
            raise UsageError("there is no moto server here", hint="pip install 'moto[server]'")
        images = [
            {"ami_id": image, "name": f"nixos-{architecture}", "architecture": architecture, "owner_id": ACCOUNT}
            for architecture, image in _IMAGES.items()
        ]
        (self.directory / "images.json").write_text(json.dumps(images), encoding="ascii")

    def _command(self) -> Sequence[str]:
        return (sys.executable, "-m", "moto.server", "-H", self._bind, "-p", str(self.port))

    def _environment(self) -> Mapping[str, str]:
        return {"MOTO_AMIS_PATH": str(self.directory / "images.json"), "MOTO_EC2_LOAD_DEFAULT_AMIS": "false"}
