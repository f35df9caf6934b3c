"""Credentials, endpoints and regions of S3, found as the AWS tools find them; and the errors of a store, in full."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cache_tools.errors import StorageError
from cache_tools.storage import RemotePlace, aws, open_place, store_errors
from tests.support.s3_server import has_loopback, new_bucket

KEYS = {"AWS_ACCESS_KEY_ID": "of-environment", "AWS_SECRET_ACCESS_KEY": "b"}
Settings = Callable[..., aws.S3Settings]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with `.aws`, and no variables of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def write(folder: Path, credentials: str = "", config: str = "") -> None:
    (folder / "credentials").write_text(credentials)
    (folder / "config").write_text(config)


def key_of(settings: aws.S3Settings) -> str | None:
    return None if settings.provider is None else settings.provider()["access_key_id"]


CREDENTIALS = """
[default]
aws_access_key_id = of-default
aws_secret_access_key = b%c
[lab]
AWS_ACCESS_KEY_ID=of-lab
aws_secret_access_key=b
aws_session_token = t
"""
CONFIG = """
[default]
region = eu-north-1
endpoint_url = http://default
[profile lab]
region=ap-south-1
services = on-premises
[profile only]
aws_access_key_id = of-config
aws_secret_access_key = b
endpoint_url = https://only
[services on-premises]
s3 =
  endpoint_url = http://lab:9000
  max_attempts = 3
dynamodb =
  endpoint_url = http://other
"""


@pytest.mark.parametrize(
    ("variables", "key", "endpoint", "region"),
    [
        ({}, "of-default", "http://default", "eu-north-1"),
        ({"AWS_PROFILE": "lab"}, "of-lab", "http://lab:9000", "ap-south-1"),
        ({"AWS_PROFILE": "only"}, "of-config", "https://only", "us-east-1"),
        ({"AWS_DEFAULT_PROFILE": "lab"}, "of-lab", "http://lab:9000", "ap-south-1"),
        ({"AWS_PROFILE": ""}, "of-default", "http://default", "eu-north-1"),
        ({"AWS_PROFILE": "lab", **KEYS}, None, "http://lab:9000", "ap-south-1"),  # obstore reads them itself
        ({"AWS_PROFILE": "lab", "AWS_SESSION_TOKEN": "stale"}, "of-lab", "http://lab:9000", "ap-south-1"),
        ({"AWS_ENDPOINT_URL": "http://e"}, "of-default", "http://e", "eu-north-1"),
        ({"AWS_ENDPOINT_URL": "http://e", "AWS_ENDPOINT_URL_S3": "http://s"}, "of-default", "http://s", "eu-north-1"),
        ({"AWS_ENDPOINT_URL": "", "AWS_PROFILE": "lab"}, "of-lab", "http://lab:9000", "ap-south-1"),
        ({"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "of-default", None, "eu-north-1"),
        (
            {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "True", "AWS_ENDPOINT_URL_S3": "http://s"},
            "of-default",
            None,
            "eu-north-1",
        ),
        ({"AWS_DEFAULT_REGION": "sa-east-1"}, "of-default", "http://default", "sa-east-1"),
        ({"AWS_DEFAULT_REGION": "x", "AWS_REGION": "y"}, "of-default", "http://default", "y"),
        ({"AWS_SKIP_SIGNATURE": "true"}, None, "http://default", "eu-north-1"),
    ],
)
def test_settings_are_those_of_the_aws_tools(
    files: Path, variables: dict[str, str], key: str | None, endpoint: str | None, region: str
) -> None:
    write(files, CREDENTIALS, CONFIG)
    found = aws.s3_settings(variables)
    assert (key_of(found), found.endpoint, found.region) == (key, endpoint, region)


def test_botocore_agrees(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = pytest.importorskip("botocore.session")
    write(files, CREDENTIALS, CONFIG)
    for profile in ("default", "lab", "only"):
        monkeypatch.setenv("AWS_PROFILE", profile)
        theirs, ours = session.Session(), aws.s3_settings()
        assert ours.provider is not None
        keys, wanted = ours.provider(), theirs.get_credentials()
        assert (keys["access_key_id"], keys["secret_access_key"]) == (wanted.access_key, wanted.secret_key)
        assert keys["token"] == wanted.token
        monkeypatch.setenv("AWS_DEFAULT_REGION", ours.region)
        assert theirs.create_client("s3").meta.endpoint_url == ours.endpoint
        monkeypatch.delenv("AWS_DEFAULT_REGION")


def test_other_files_may_be_named(files: Path, tmp_path: Path) -> None:
    write(tmp_path, CREDENTIALS, CONFIG)
    variables = {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
    }
    assert key_of(aws.s3_settings(variables)) == "of-default"
    assert aws.s3_settings(variables).region == "eu-north-1"
    assert aws.s3_settings({}).provider is None, "nothing in the home folder"


def test_roles_of_machines_and_containers_are_left_to_obstore(files: Path) -> None:
    write(files, "[other]\naws_access_key_id = a\n")
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        found = aws.s3_settings({name: "x", "AWS_EC2_METADATA_DISABLED": "true"})
        assert (found.provider, found.keys_from) == (None, name)
    with pytest.raises(
        StorageError, match=r"no credentials .*none in profile 'default' of .*AWS_EC2_METADATA_DISABLED"
    ):
        aws.s3_settings({"AWS_EC2_METADATA_DISABLED": "true"})


@pytest.mark.parametrize(
    ("credentials", "config", "variables", "message"),
    [
        (
            CREDENTIALS,
            CONFIG,
            {"AWS_PROFILE": "labb"},
            r"no such AWS profile \(AWS_PROFILE=labb\); found default, lab, only",
        ),
        ("", "", {"AWS_PROFILE": "lab"}, r"found no profiles in .*/\.aws/credentials and .*/\.aws/config"),
        ("aws_access_key_id = a\n", "", {}, r"cannot read a file of AWS settings .*credentials.*no section headers"),
        ("[default\n", "", {}, r"cannot read a file of AWS settings .*credentials"),
    ],
)
def test_files_that_help_nobody_are_refused(
    files: Path, credentials: str, config: str, variables: dict[str, str], message: str
) -> None:
    write(files, credentials, config)
    with pytest.raises(StorageError, match=message):
        aws.s3_settings(variables)


def test_a_process_gives_the_keys(files: Path) -> None:
    pytest.importorskip("botocore")
    answer = '{"Version": 1, "AccessKeyId": "of-process", "SecretAccessKey": "b", "SessionToken": "t"}'
    (files / "answer.json").write_text(answer)
    write(files, config=f"[default]\ncredential_process = cat {files / 'answer.json'}\n")
    found = aws.s3_settings({})
    assert found.provider is not None
    keys = found.provider()
    assert (keys["access_key_id"], keys["token"]) == ("of-process", "t")
    assert 0 < keys["expires_at"].timestamp() - time.time() <= 300


def test_keys_that_cannot_be_had_are_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("botocore")
    sso = "sso_session = x\nsso_account_id = 1\nsso_role_name = r\n[sso-session x]\nsso_region = us-east-1\n"
    write(files, config=f"[default]\n{sso}sso_start_url = https://x.awsapps.com/start\n")
    with pytest.raises(
        StorageError, match=r"cannot get credentials for this AWS profile \(AWS profile 'default'\).*SSO"
    ):
        aws.s3_settings({})
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(StorageError, match=r"found sso_session\. Install it: pip install boto3"):
        aws.s3_settings({})


@pytest.mark.parametrize("way", ["file", "services", "variable", "role"])
def test_a_store_is_reached_with_the_files_alone(
    server: str, files: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    url = f"s3://{new_bucket()}/caches"
    keys = "aws_access_key_id = a\naws_secret_access_key = b\n"
    if way != "variable":
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    if way == "role":
        pytest.importorskip("botocore")
        reached = f"region = us-east-1\nendpoint_url = {server}\n"
        role = f"role_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = base\n{reached}"
        write(files, f"[base]\n{keys}", f"[profile base]\n{reached}[default]\n{role}")
    elif way == "services":
        write(files, f"[default]\n{keys}", f"[default]\nservices = s\n[services s]\ns3 =\n  endpoint_url = {server}\n")
    else:
        write(files, f"[default]\n{keys}", "" if way == "variable" else f"[default]\nendpoint_url = {server}\n")
    place = open_place(url).child("one")
    place.put("a", b"1")
    assert list(open_place(url).keys()) == ["one/a"]
    assert place.sibling("two").folders() == []
    assert open_place(f"{url}/one").read("a") == b"1"


def test_a_missing_bucket_is_not_a_missing_file(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place("s3://nobody-made-this/caches")
    requests: list[Callable[[], object]] = [
        lambda: place.read("zarr.json"),
        lambda: place.put("a", b"1"),
        lambda: place.put("a", b"1", only_new=True),
        lambda: list(place.entries()),
        place.folders,
    ]
    for request in requests:
        with pytest.raises(
            StorageError, match=r"no such bucket \(s3://nobody-made-this\); found 404 NoSuchBucket: The"
        ):
            request()
    with pytest.raises(FileNotFoundError):
        open_place(f"s3://{new_bucket()}/caches").read("zarr.json")


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with the status in the name of the bucket, and an error document."""

    ERRORS = {  # noqa: RUF012
        "301": ("PermanentRedirect", "The bucket must be addressed using the specified endpoint."),
        "400": (
            "AuthorizationHeaderMalformed",
            "the region 'us-east-1' is wrong</Message><Region>eu-west-1</Region><x>",
        ),
        "401": ("Unauthorized", "Who are you?"),
        "403": ("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
        "4030": ("AccessDenied", "User: arn:aws:iam::1:user/me is not authorized to perform: s3:GetObject"),
    }

    def do_GET(self) -> None:
        bucket = self.path.split("/")[1].partition("?")[0]
        code, message = self.ERRORS[bucket]
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(int(bucket[:3]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def refusing(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not has_loopback():
        pytest.skip("needs the loopback interface")
    pytest.importorskip("obstore")
    write(files, "[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.server_port}")
        yield f"http://127.0.0.1:{store.server_port}"
        store.shutdown()


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("301", r"in another region \(s3://301\); found us-east-1 in the settings .*Set AWS_REGION to the region"),
        ("400", r"in another region \(s3://400\); expected eu-west-1; found us-east-1 in .*Set AWS_REGION=eu-west-1"),
        ("401", r"no permission \(s3://401/p.*401 Unauthorized: Who are you\?, with keys from profile 'default'"),
        (
            "403",
            r"\(s3://403/p.*403 InvalidAccessKeyId: .*records\., with keys from profile 'default'.*renew these keys",
        ),
        ("4030", r"403 AccessDenied: User: .*s3:GetObject, with keys from .*Use other keys, or get them access to s3:"),
    ],
)
def test_refusals_are_explained_at_once(refusing: str, bucket: str, message: str) -> None:
    start, place = time.monotonic(), open_place(f"s3://{bucket}/p")
    for request in (lambda: place.read("zarr.json"), lambda: list(place.entries()), lambda: place.put("a", b"1")):
        with pytest.raises(StorageError, match=message):
            request()
    assert time.monotonic() - start < 3


@pytest.mark.medium
@pytest.mark.parametrize(
    ("endpoint", "cause"), [("http://127.0.0.1:1", "connection refused"), ("http://store.invalid", "dns error")]
)
def test_an_endpoint_out_of_reach_is_named_within_seconds(
    files: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, cause: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write(
        files,
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n",
        f"[default]\nendpoint_url = {endpoint}\n",
    )
    start = time.monotonic()
    with pytest.raises(StorageError, match=f"found {cause}: {endpoint}/bucket/p/zarr.json. Check the URL"):
        open_place("s3://bucket/p").read("zarr.json")
    assert time.monotonic() - start < 10


@pytest.mark.medium
def test_missing_credentials_are_named_within_seconds(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore would ask the metadata service of a cloud for a minute."""
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("cache_tools.storage.store_errors._METADATA_HOSTS", ("127.0.0.1:1/",))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"no credentials .*\(s3://bucket\).*none in the environment.*aws configure"):
        open_place("s3://bucket/p").read("zarr.json")
    assert time.monotonic() - start < 10


def test_an_ignored_endpoint_is_not_used(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    settings = aws.s3_settings()
    assert settings.store_arguments()["config"]["endpoint"] == "https://s3.us-east-1.amazonaws.com"
    with aws.own_endpoint(settings):
        assert "AWS_ENDPOINT_URL_S3" not in os.environ
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:1"
    place = open_place("s3://bucket/p")
    assert isinstance(place, RemotePlace)
    assert "127.0.0.1" not in repr(place._store.config.get("endpoint"))


@pytest.mark.parametrize("text", ["The bucket is gone", "<![CDATA[The bucket is gone]]>"])
def test_the_stores_own_reason_is_found_in_its_answer(text: str) -> None:
    error = ValueError(f"404: <Error><Message>{text}</Message></Error>")
    assert store_errors._tag(error, "Message") == "The bucket is gone"
