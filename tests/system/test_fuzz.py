"""Reading a tampered cache gives one clear error or the original targets: no crash, no hang, no code execution.

The cases are the same in every run. To draw twenty times as many new ones:

    TEACHER_CACHE_LONG_TESTS=1 TEACHER_CACHE_FUZZ=20 pytest tests/system/test_fuzz.py
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Zstd
from numcodecs.pcodec import PCodec
from typer.testing import CliRunner

from cache_tools.cli import app, describe
from cache_tools.errors import CacheError
from cache_tools.format.stored import MANIFEST_KEY
from cache_tools.home import housekeeping, registry
from cache_tools.integrity.local import repair, verify
from cache_tools.places import LocalPlace
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from cache_tools.store.group import read_manifest
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.hostile import (
    DEEP,
    JUNK,
    Victim,
    changed_json,
    limited_resources,
    to_json,
    with_doubled_key,
    with_right_digests,
)
from tests.support.turns import slow, turns

TIMES = int(os.environ.get("TEACHER_CACHE_FUZZ", "1"))
pytestmark = pytest.mark.turns
CASES = {"json": 600, "digested": 600, "text": 600, "metadata": 110, "chunks": 90, "files": 50, "commands": 40}
IMAGES = tiny_images(12, 3)
MANIFESTS = {
    "fused": tiny_manifest(IMAGES, num_views=2, block_rows=5, canaries=False),
    "dense": tiny_manifest(IMAGES, num_views=2, block_rows=5, canaries=False, codec="dense"),
    "top-k": tiny_manifest(IMAGES, num_views=2, block_rows=5, canaries=False, codec="top-k"),
    "components": tiny_manifest(IMAGES, num_views=2, block_rows=5, codec="compact", store="components"),
}
KINDS = st.sampled_from(["fused", "dense", "components", "top-k"])


def fuzz(name: str) -> Callable[..., Any]:
    """Settings: how many cases, and the same ones in every run."""
    return settings(
        max_examples=turns(CASES[name] // 20, CASES[name] * TIMES),
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache home. All caches and copies are made in it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def victims(home: Path) -> dict[str, Victim]:
    for name, manifest in MANIFESTS.items():
        build(home / f"{name}.zarr", manifest, IMAGES)
    return {name: Victim(home / f"{name}.zarr") for name in MANIFESTS}


@pytest.fixture(scope="module")
def targets(victims: dict[str, Victim]) -> dict[str, str]:
    return {name: everything(victim.path) for name, victim in victims.items()}


def everything(path: Path) -> str:
    """A digest of everything that training reads, by views and by arrays."""
    cache = TeacherCache.open(path)
    cache.require_complete()
    digest = hashlib.sha256(cache.labels.tobytes() + cache.sample_keys.tobytes())
    for view in range(cache.num_views):
        resident = cache.load_view(view)
        digest.update(resident.logits(slice(None)).numpy().tobytes())
        digest.update(resident.features(slice(None)).numpy().tobytes())
    digest.update(cache.read_array(next(iter(cache.targets)), 0).tobytes())
    return digest.hexdigest()


def look(path: Path) -> None:
    read_manifest(path)
    with contextlib.redirect_stdout(io.StringIO()):
        describe.print_details(describe.describe(path))


def check(path: Path) -> None:
    found = verify(path)
    assert found.sound or found.problems
    if not found.sound:
        repair(path, found)
        verify(path)


def resume(path: Path) -> None:
    CacheWriter.resume(path, read_manifest(path).fingerprint).missing_blocks()


def copy(path: Path) -> None:
    target = path.parent / "elsewhere"
    shutil.rmtree(target, ignore_errors=True)
    copy_cache(LocalPlace(path), LocalPlace(target))


def ask(path: Path, *questions: Callable[[Path], Any]) -> list[Any]:
    """Call functions on a path; gives their results, and None for a CacheError. Other exceptions pass through."""
    answers: list[Any] = []
    errors: list[str] = []
    with limited_resources():
        found = registry.read_record(path)
        json.dumps(found.to_json(), ensure_ascii=False).encode()
        housekeeping.find_candidates([found], housekeeping.PruneRules(incomplete=True))
        for question in questions:
            try:
                answers.append(question(path))
            except CacheError as error:
                answers.append(None)
                errors.append(str(error))
    assert all(len(error) < 5000 and error.isprintable() for error in errors)
    return answers


QUESTIONS = (check, resume, copy)
OLD_METADATA = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "|O", "fill_value": None, "order": "C",
                "filters": [{"id": "pickle"}], "compressor": None}  # fmt: skip


# Manifests


def with_manifest(document: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "zarr.json").write_bytes(document)

    return write


@fuzz("json")
@given(data=st.data(), kind=KINDS)
def test_a_changed_group(victims: dict[str, Victim], targets: dict[str, str], data: st.DataObject, kind: str) -> None:
    """Random changes of zarr.json: what can still be read is what was written."""
    sound = json.loads((victims[kind].path / "zarr.json").read_bytes())
    document = data.draw(changed_json(sound))
    deep = data.draw(st.sampled_from([50, 990, 5000, 200_000]))
    with victims[kind].changed(with_manifest(to_json(document, deep=deep))) as path:
        answers = ask(path, look, everything)
        assert answers[1] in (None, targets[kind])


@fuzz("digested")
@given(data=st.data(), kind=KINDS, question=st.sampled_from(QUESTIONS))
def test_a_changed_manifest_with_right_digests(
    victims: dict[str, Victim], data: st.DataObject, kind: str, question: Any
) -> None:
    """The digests match the changed content, so only validation can find what is wrong."""
    group = json.loads((victims[kind].path / "zarr.json").read_bytes())
    group["attributes"][MANIFEST_KEY] = with_right_digests(data.draw(changed_json(group["attributes"][MANIFEST_KEY])))
    with victims[kind].changed(with_manifest(to_json(group))) as path:
        ask(path, look, everything, question)


@fuzz("text")
@given(data=st.data())
def test_text_that_is_not_json(victims: dict[str, Victim], targets: dict[str, str], data: st.DataObject) -> None:
    """Truncated, overwritten, doubled keys, other encodings, random bytes."""
    sound = (victims["fused"].path / "zarr.json").read_bytes()
    kind = data.draw(st.sampled_from(["cut", "overwrite", "insert", "double", "encoding", "anything"]))
    place = data.draw(st.integers(0, len(sound) - 1))
    some = data.draw(st.binary(min_size=1, max_size=20))
    if kind == "cut":
        text = sound[:place]
    elif kind in {"overwrite", "insert"}:
        text = sound[:place] + some + sound[place + (len(some) if kind == "overwrite" else 0) :]
    elif kind == "double":
        keys = ["attributes", MANIFEST_KEY, "recipe", "num_views", "digest", "fingerprint", "node_type", "zarr_format"]
        value = data.draw(st.sampled_from([value for value in JUNK if value != DEEP]))
        text = with_doubled_key(sound.decode(), data.draw(st.sampled_from(keys)), value).encode()
    elif kind == "encoding":
        text = sound.decode().encode(data.draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-7"])))
    else:
        text = data.draw(st.binary(max_size=300))
    with victims["fused"].changed(with_manifest(text)) as path:
        answers = ask(path, look, everything)
        assert answers[1] in (None, targets["fused"])


# Arrays


@fuzz("metadata")
@given(data=st.data(), kind=KINDS, question=st.sampled_from(QUESTIONS))
def test_changed_metadata_of_an_array(
    victims: dict[str, Victim], targets: dict[str, str], data: st.DataObject, kind: str, question: Any
) -> None:
    """Shapes, chunks, types, codecs, fill values, sharding, zarr v2: read as it was written, or refused."""
    victim = victims[kind]
    names = sorted({name.partition("/")[0] for name in victim.names() if "/" in name})
    file = victim.path / data.draw(st.sampled_from(names)) / "zarr.json"
    sound = json.loads(file.read_bytes())
    if data.draw(st.integers(0, 9)) == 0:

        def change(path: Path) -> None:
            file.unlink()
            file.with_name(".zarray").write_text(json.dumps(OLD_METADATA | {"shape": sound["shape"]}))
    else:
        document = to_json(data.draw(changed_json(sound)), deep=data.draw(st.sampled_from([50, 5000])))

        def change(path: Path) -> None:
            file.write_bytes(document)

    with victim.changed(change) as path:
        answers = ask(path, everything, question)
        assert answers[0] in (None, targets[kind])


@fuzz("chunks")
@given(data=st.data(), kind=KINDS, question=st.sampled_from(QUESTIONS))
def test_changed_chunks(
    victims: dict[str, Victim], targets: dict[str, str], data: st.DataObject, kind: str, question: Any
) -> None:
    """Random, truncated, longer, swapped, decompression bombs, huge files: read as it was written, or refused."""
    victim = victims[kind]
    chunks = [name for name in victim.names() if not name.endswith("zarr.json")]
    file = victim.path / data.draw(st.sampled_from(chunks))
    sound = file.read_bytes()
    kind_of_change = data.draw(
        st.sampled_from(["random", "cut", "longer", "swapped", "bomb", "giant", "gone", "patched"])
    )
    some = data.draw(st.binary(min_size=1, max_size=64))
    other = data.draw(st.sampled_from(chunks))
    bomb = data.draw(st.sampled_from(BOMBS))

    def change(path: Path) -> None:
        if kind_of_change == "gone":
            file.unlink()
        elif kind_of_change == "giant":
            os.truncate(file, 1 << 40)
        else:
            patched = bytearray(sound[:-4])
            patched[len(some) % len(patched)] ^= some[0] or 1
            new = {
                "random": some,
                "cut": sound[: len(sound) // (1 + some[0] % 7)],
                "longer": sound + some,
                "swapped": (path / other).read_bytes(),
                "bomb": bomb,
                "patched": with_crc(bytes(patched)),  # damage under a matching checksum
            }
            file.write_bytes(new[kind_of_change])

    with victim.changed(change) as path:
        answers = ask(path, everything, question)
        assert answers[0] in (None, targets[kind])


def with_crc(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def zstd_frame(size: int | None, blocks: int) -> bytes:
    """RLE blocks of 128 KiB each (RFC 8878): four bytes that become 131 072."""
    descriptor = b"\x00\x70" if size is None else b"\xe0" + size.to_bytes(8, "little")
    body = b"".join(
        ((number == blocks - 1) | 1 << 1 | (1 << 17) << 3).to_bytes(3, "little") + b"\0" for number in range(blocks)
    )
    return b"\x28\xb5\x2f\xfd" + descriptor + body


def pcodec_bomb(times: int) -> bytes:
    """Repeated chunks of a million zeros: ten bytes that become 262 144 numbers."""
    from pcodec import ChunkConfig, standalone

    once = standalone.simple_compress(np.zeros(1 << 20, np.int16), ChunkConfig())
    return once[:12] + once[12:-1] * times + once[-1:]


class Planted:
    """Makes a folder when it is unpickled. No codec and no reader may do that."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self._path), 0o777, True)


BOMBS = [
    with_crc(zstd_frame(1 << 40, 1)),
    with_crc(zstd_frame(30 << 30, 245_760)),
    with_crc(zstd_frame(None, 245_760)),
    with_crc(zstd_frame(30, 0) + zstd_frame(30 << 30, 245_760)),
    with_crc(b"\x02\x01\x33\x02" + b"\xff\xff\xff\x7e" + b"\x00\x00\x10\x00" + (64).to_bytes(4, "little") + bytes(48)),
    with_crc(pcodec_bomb(20_000)),
]


def test_bombs_are_small_files_that_decode_to_many_bytes() -> None:
    """Shown on small ones of the same make."""
    assert max(map(len, BOMBS)) < 1 << 20
    assert bytes(Zstd().decode(zstd_frame(1 << 20, 8))) == bytes(1 << 20)
    if version("numcodecs") != "0.16.1":  # which refuses a frame that does not state its size
        assert bytes(Zstd().decode(zstd_frame(None, 8))) == bytes(1 << 20)
    assert len(PCodec().decode(pcodec_bomb(3))) == 3 << 20


@fuzz("files")
@given(data=st.data(), kind=KINDS, question=st.sampled_from(QUESTIONS))
def test_strange_files(
    victims: dict[str, Victim], targets: dict[str, str], data: st.DataObject, kind: str, question: Any
) -> None:
    """Pipes, devices, links, folders in place of files, files in place of folders, and additional files."""
    victim = victims[kind]
    name = data.draw(st.sampled_from([*victim.names(), "labels", "commits", "strange"]))
    kind_of_change = data.draw(st.sampled_from(["pipe", "link", "loop", "device", "folder", "file", "commit", "bytes"]))
    link = data.draw(st.sampled_from(["/etc/passwd", "/dev/zero", "/nowhere", "..", "zarr.json", "/proc/self/mem"]))
    names = ["c.99.0.0", "c.0.99.0", "c.0.0.1", "c.00.0.0", "c.-1.0.0", f"c.{'9' * 200}.0.0", "c.9.0.0.0"]
    commit = data.draw(st.sampled_from(names))

    def change(path: Path) -> None:
        place = path / name
        if kind_of_change == "commit":
            (path / "commits" / commit).write_bytes(b"x" * 20)
            return
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        if kind_of_change == "pipe":
            os.mkfifo(place)
        elif kind_of_change == "folder":
            (place / "inner").mkdir(parents=True)
        elif kind_of_change == "file":
            place.write_text("a file")
        elif kind_of_change == "bytes":
            Path(os.fsdecode(os.fsencode(place) + b"\xff\xfe")).write_bytes(b"x")
        else:
            place.symlink_to({"link": link, "loop": place.name, "device": "/dev/full"}[kind_of_change])

    with victim.changed(change) as path:
        answers = ask(path, look, everything, question)
        assert answers[1] in (None, targets[kind])


# Commands

COMMANDS = (
    ["ls"],
    ["ls", "--json"],
    ["info", "{}"],
    ["info", "{}", "--json"],
    ["path", "{}"],
    ["verify", "{}"],
    ["verify", "{}", "--json"],
    ["repair", "{}", "--yes"],
    ["stats", "{}", "--json"],
    ["tune-fusion", "{}"],
    ["copy", "{}", "{}-copy.zarr"],
    ["push", "{}", "{}-copy.zarr"],
    ["pull", "{}", "--out", "{}-copy.zarr"],
    ["recode", "{}", "--codec", "float32", "--out", "{}-recoded.zarr"],
    ["fidelity", "{}"],
    ["rm", "{}"],
    ["prune", "--incomplete"],
)


@fuzz("commands")
@given(data=st.data(), kind=KINDS, command=st.sampled_from(COMMANDS))
def test_commands(victims: dict[str, Victim], data: st.DataObject, kind: str, command: list[str]) -> None:
    """Exit code 2 with one line, or 1 for damage that was found; never a traceback."""
    victim = victims[kind]
    files = [name for name in victim.names() if name.endswith("zarr.json")] + ["commits/c.0.0.0"]
    file = victim.path / data.draw(st.sampled_from(files))
    if file.name != "zarr.json":
        document = data.draw(st.binary(max_size=40))
    elif file.parent == victim.path:
        group = json.loads(file.read_bytes())
        group["attributes"][MANIFEST_KEY] = with_right_digests(
            data.draw(changed_json(group["attributes"][MANIFEST_KEY]))
        )
        document = to_json(group)
    else:
        document = to_json(data.draw(changed_json(json.loads(file.read_bytes()))))

    def write(path: Path) -> None:
        file.write_bytes(document)

    with victim.changed(write) as path, limited_resources():
        for left in path.parent.glob(f"{path.name}-*"):
            shutil.rmtree(left)
        arguments = [part.replace("{}", str(path)) for part in command]
        done = CliRunner().invoke(app, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
        assert done.exit_code in (0, 1, 2)
        if done.exit_code == 2:
            assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_the_long_turn_has_two_thousand_cases() -> None:
    assert sum(CASES.values()) >= 2000


# No code is run


@pytest.mark.parametrize("kind", ["fused", slow("components")])
def test_nothing_is_unpickled(victims: dict[str, Victim], tmp_path: Path, kind: str) -> None:
    """A pickle in place of every file, with metadata that name pickle as the codec."""
    planted = tmp_path / "planted"
    payload = pickle.dumps(Planted(planted))
    pickle.loads(payload)
    planted.rmdir()
    codecs = [[{"name": name}] for name in ("numcodecs.pickle", "pickle", "numcodecs.json2")]
    victim = victims[kind]
    for number, name in enumerate(sorted({name for name in victim.names() if not re.search("[1-9]", name)})):

        def change(path: Path, name: str = name, number: int = number) -> None:
            (path / name).write_bytes(payload if name.endswith("zarr.json") else with_crc(payload))
            metadata = (path / name).with_name("zarr.json")
            if number % 4 == 3:
                metadata.unlink()
                metadata.with_name(".zarray").write_text(json.dumps(OLD_METADATA))
            elif not name.endswith("zarr.json"):
                fields = json.loads(metadata.read_bytes())
                metadata.write_text(json.dumps(fields | {"codecs": codecs[number % 4]}))

        with victim.changed(change) as path:
            ask(path, everything, (check, copy)[number % 2])
        assert not planted.exists(), name


UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}


PACKAGES = ("cache_tools", "train", "pipeline", "teacher_cache")
# Their unpicklers create nothing that a file names: tests/train/weights, tests/cache_tools/exchange.
INERT = ("train/weights/outline.py", "cache_tools/exchange/plain_pickle.py")
# Messages between a command and the processes that it has started, through pipes that nobody else can open.
PRIVATE = ("cache_tools/decoding/service.py", "cache_tools/decoding/worker.py")


def product_files() -> list[Path]:
    root = Path(__file__).parents[2]
    return [file for folder in PACKAGES for file in sorted((root / folder).rglob("*.py"))]


def test_no_module_unpickles() -> None:
    """No pickle but its exception class, no `allow_pickle`, `torch.load` with `weights_only` alone."""
    assert len(product_files()) > 100
    for file in product_files():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE:
                pytest.fail(f"{file}:{node.lineno} imports {node.module}")
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & (UNSAFE - {"pickle"}), f"{file}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
                allowed = {"UnpicklingError"} | ({"Unpickler"} if file.as_posix().endswith(INERT) else set())
                if file.as_posix().endswith(PRIVATE):
                    allowed |= {"dump", "dumps", "load", "loads"}
                assert node.attr in allowed, f"{file}:{node.lineno}"
            if isinstance(node, ast.Call):
                arguments = {word.arg: word.value for word in node.keywords}
                called = ast.unparse(node.func)
                for name, wanted in (("allow_pickle", False), ("weights_only", True)):
                    value = arguments.get(name)
                    assert value is None or (isinstance(value, ast.Constant) and value.value is wanted), (
                        f"{file}:{node.lineno}: {name}"
                    )
                if called in {"torch.load", "open_clip.create_model"}:
                    assert "weights_only" in arguments, f"{file}:{node.lineno}"
                assert called not in {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"}, (
                    f"{file}:{node.lineno}: {called}"
                )
