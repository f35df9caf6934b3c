"""Settings of S3 as the AWS tools find them: profile, keys, endpoint and region, from the environment and `~/.aws`.

obstore reads environment variables and knows the roles of machines and containers. This module adds the two files that
`aws configure` writes. Profiles that need a request for their keys (an assumed role, SSO, a process) go through
botocore, if it is installed.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cache_tools.errors import StorageError

Keys = dict[str, Any]
"""What a credential provider of obstore returns."""

_KEYS = ("aws_access_key_id", "aws_secret_access_key")
_TOKENS = ("aws_session_token", "aws_security_token")
_INDIRECT = ("role_arn", "sso_session", "sso_start_url", "web_identity_token_file", "credential_process")
_OWN_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # the last one is obstore's own
_DEFAULT_REGION = "us-east-1"
# botocore renews keys when less than ten minutes are left.
_ASK_AGAIN_AFTER = timedelta(minutes=5)


@dataclass(frozen=True)
class S3Settings:
    """How to reach S3.

    Attributes:
        endpoint: a URL that the user has configured; None for Amazon's.
        region: of the bucket.
        provider: gives the keys of a profile; None if obstore finds keys or a role itself.
        keys_from: where the keys come from, for messages.
        has_endpoint_variable: whether a variable of the environment, which obstore reads, names an endpoint.
    """

    endpoint: str | None
    region: str
    provider: Callable[[], Keys] | None
    keys_from: str
    has_endpoint_variable: bool = False

    def store_arguments(self) -> dict[str, Any]:
        """Keywords for `obstore.store.from_url`."""
        config: dict[str, Any] = {"region": self.region}
        if self.endpoint or self.has_endpoint_variable:  # what we pass wins over what obstore reads
            config["endpoint"] = self.endpoint or f"https://s3.{self.region}.amazonaws.com"
        return {"config": config, **({"credential_provider": self.provider} if self.provider else {})}


@contextmanager
def own_endpoint(settings: S3Settings | None) -> Iterator[None]:
    """Hide AWS_ENDPOINT_URL_S3, which obstore would prefer to what it is passed, unless it is the endpoint."""
    name = _ENDPOINTS[0]
    variable = os.environ.get(name)
    if settings is None or variable is None or variable == settings.endpoint:
        yield
        return
    del os.environ[name]
    try:
        yield
    finally:
        os.environ[name] = variable


def s3_settings(environment: Mapping[str, str] = os.environ) -> S3Settings:
    """Find the settings of S3.

    Raises:
        StorageError: a profile that does not exist, a file that cannot be read, or keys that cannot be had.
    """
    variables = {name: value for name, value in environment.items() if value}
    profile = _profile(variables)
    region = variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or profile.values.get("region")
    provider, keys_from = _keys(variables, profile)
    return S3Settings(
        endpoint=_endpoint(variables, profile),
        region=region or _DEFAULT_REGION,
        provider=provider,
        keys_from=keys_from,
        has_endpoint_variable=any(name in environment for name in _ENDPOINTS),
    )


@dataclass(frozen=True)
class _Profile:
    """A profile of the files.

    Attributes:
        values: its keys, those of the credentials file before those of the config file.
        services: the settings of S3 in its `services` section.
    """

    name: str
    values: Mapping[str, str]
    services: Mapping[str, str]
    files: tuple[Path, Path]


def _profile(variables: Mapping[str, str]) -> _Profile:
    files = (
        Path(os.path.expanduser(variables.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))),
        Path(os.path.expanduser(variables.get("AWS_CONFIG_FILE", "~/.aws/config"))),
    )
    credentials, config = (_read(file) for file in files)
    named = variables.get("AWS_PROFILE") or variables.get("AWS_DEFAULT_PROFILE")
    name = named or "default"
    in_config = _section(config, f"profile {name}") or (_section(config, "default") if name == "default" else {})
    values = {**in_config, **_section(credentials, name)}
    if named and name not in {*credentials.sections(), *_profiles(config)}:
        known = sorted({*credentials.sections(), *_profiles(config)})
        raise StorageError(
            "no such AWS profile",
            where=f"AWS_PROFILE={name}",
            found=f"{', '.join(known) or 'no profiles'} in {files[0]} and {files[1]}",
            next_step="correct AWS_PROFILE, or unset it",
        )
    services = _section(config, f"services {values['services']}") if "services" in values else {}
    return _Profile(name, values, _nested(services.get("s3", "")), files)


def _keys(variables: Mapping[str, str], profile: _Profile) -> tuple[Callable[[], Keys] | None, str]:
    """A provider of keys, None where obstore finds them itself; and where they come from."""
    if variables.get("AWS_SKIP_SIGNATURE", "").lower() in {"1", "true", "yes", "on"}:
        return None, "AWS_SKIP_SIGNATURE (requests are not signed)"
    if {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= variables.keys():
        return None, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    where = f"profile '{profile.name}' of {profile.files[0]} or {profile.files[1]}"
    nothing = f"none in the environment, none in {where}"
    if any(key in profile.values for key in _INDIRECT):
        return _requested_keys(profile), where
    if profile.values.keys() >= set(_KEYS):
        token = next((profile.values[key] for key in _TOKENS if key in profile.values), None)
        key, secret = (profile.values[name] for name in _KEYS)
        return _LastingKeys(key, secret, token), where
    if named := [name for name in _OWN_ROLES if name in variables]:
        return None, named[0]
    if variables.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise no_keys("s3://", f"{nothing}, and AWS_EC2_METADATA_DISABLED=true")
    return None, nothing


@dataclass(frozen=True)
class _LastingKeys:
    """A provider of keys that do not expire. Equal keys are equal providers, so that stores can be shared."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    token: str | None = field(repr=False)

    def __call__(self) -> Keys:
        return {
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "token": self.token,
            "expires_at": None,
        }


def no_keys(bucket: str, found: str) -> StorageError:
    """The error for requests without credentials."""
    return StorageError(
        "no credentials for this object store",
        where=bucket,
        expected="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile with keys, or a machine with a role",
        found=found,
        next_step="run `aws configure`, or set the variables or AWS_PROFILE; for a public bucket set "
        "AWS_SKIP_SIGNATURE=true",
    )


def _requested_keys(profile: _Profile) -> Callable[[], Keys]:
    """Keys that botocore requests and renews."""
    where = f"AWS profile '{profile.name}'"
    try:
        from botocore.session import Session
    except ImportError as error:
        raise StorageError(
            "this AWS profile needs a package that is not installed",
            where=where,
            expected="keys in the profile, or botocore for a role, SSO or a process",
            found=", ".join(key for key in _INDIRECT if key in profile.values),
            next_step="install it: pip install boto3",
        ) from error

    def request() -> Keys:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _ASK_AGAIN_AFTER,
        }

    try:
        credentials = Session(profile=profile.name).get_credentials()
        request()  # now, while an error can name the profile
    except Exception as error:  # botocore has no common base: a refused role, an expired login, an incomplete profile
        raise StorageError(
            "cannot get credentials for this AWS profile",
            where=where,
            found=f"{type(error).__name__}: {error}".rstrip("."),
            next_step="run `aws sso login`, or correct the profile",
        ) from error
    return request


def _endpoint(variables: Mapping[str, str], profile: _Profile) -> str | None:
    ignored = variables.get(
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", profile.values.get("ignore_configured_endpoint_urls", "")
    )
    if ignored.lower() == "true":
        return None
    named = next((variables[name] for name in _ENDPOINTS if name in variables), None)
    return named or profile.services.get("endpoint_url") or profile.values.get("endpoint_url")


def _read(file: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, default_section="\0")  # [default] is a profile like any other
    try:
        parser.read_string(file.read_text(encoding="utf-8"), str(file))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, configparser.Error) as error:
        raise StorageError(
            "cannot read a file of AWS settings",
            where=file,
            found=" ".join(str(error).split()),
            next_step="correct it, or name another one in AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE",
        ) from error
    return parser


def _section(parser: configparser.RawConfigParser, name: str) -> dict[str, str]:
    return dict(parser[name]) if parser.has_section(name) else {}


def _profiles(config: configparser.RawConfigParser) -> list[str]:
    """The profiles of a config file: `[default]` and `[profile NAME]`."""
    sections = config.sections()
    return [name.removeprefix("profile ") for name in sections if name == "default" or name.startswith("profile ")]


def _nested(text: str) -> dict[str, str]:
    """The lines `key = value` of a nested section, such as that of a service."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}
