"""`from nixops.build import …`: every name is there, and naming the package loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nixops.build


@pytest.mark.parametrize("name", nixops.build.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(nixops.build, name)
    assert value.__doc__ and value.__name__ == name


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nixops.build.nothing


def test_what_builds_without_a_push_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom nixops.build import BuildSession, ImageRequest, build_image, image_spec\n"
        "print(sorted({'boto3', 'botocore', 'hvac', 'paramiko', 'fabric', 'requests', 'cryptography', 'rich'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
