import socket

import pytest
from huggingface_hub import constants

from pipeline.networks.references import hub_or_local_copies
from tests.support.s3_server import has_loopback


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.skipif(not has_loopback(), reason="needs the loopback interface")
def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub_or_local_copies():
            assert not constants.is_offline_mode()


def test_without_a_connection_libraries_are_told_so_for_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    offline = []

    def fail() -> None:
        with hub_or_local_copies():
            offline.append(constants.is_offline_mode())
            raise OSError("download")

    with pytest.raises(OSError, match="download"):
        fail()
    assert offline == [True]
    assert not constants.is_offline_mode()


def test_a_proxy_is_left_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://nowhere.invalid")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with hub_or_local_copies():
        assert not constants.is_offline_mode()


def test_offline_mode_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_or_local_copies():
        assert constants.is_offline_mode()
    assert constants.is_offline_mode()
