"""What every model of the inventory is made of: the strict base, the checked texts, references to secrets."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from nixops.values import VaultPath


class Model(BaseModel):
    """Frozen, strict about keys, not coercing (``"4"`` is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


PlainText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.\[\]:_-]+(/[A-Za-z0-9._~/-]*)?$")]
Seconds = Annotated[float, Field(gt=0, le=86400)]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]

ByteSize = Annotated[str, StringConstraints(pattern=r"^([1-9][0-9]*[KMGT]?|[1-9][0-9]?%|100%|infinity)$")]


# -- secrets by reference -------------------------------------------------------------------------------------


class OpenBaoRef(Model):
    """A key of a KV v2 entry."""

    path: VaultPath
    key: Identifier


class SecretRef(Model):
    """Where a secret is read from: exactly one of the fields.

    ``file`` must be a regular file of the operator's with no permission for others (0600 or stricter);
    ``command`` is run without a shell and its stdout, less one newline, is the secret.
    """

    env: EnvName | None = None
    file: PlainText | None = None
    openbao: OpenBaoRef | None = None
    aws: PlainText | None = None
    command: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [k for k in ("env", "file", "openbao", "aws", "command") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("a secret reference names exactly one of env, file, openbao, aws, command")
        return self

    def describe(self) -> str:
        """How an error names it: ``environment variable FORGEJO_TOKEN``. Never the value."""
        if self.env:
            return f"environment variable {self.env}"
        if self.file:
            return f"file {self.file}"
        if self.openbao:
            return f"OpenBao entry {self.openbao.path} (key {self.openbao.key})"
        if self.aws:
            return f"AWS secret {self.aws}"
        return f"command {(self.command or ('',))[0]}"
