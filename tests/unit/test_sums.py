"""The sums of a checkpoint's files."""

import json

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest
from typer.testing import CliRunner

from treepo_mcore.actor.sums import MANIFEST, differences, read_sums, settle, write_sums, written_by
from treepo_mcore.cli.checkpoint import app
from treepo_mcore.config import ConfigError


@pytest.fixture
def checkpoint(tmp_path):
    """Written by two ranks, the second of which has number 12."""
    for name in ("__0_0.distcp", "__12_0.distcp", "__12_1.distcp", ".metadata", "common.pt"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    write_sums(tmp_path, {file.name: settle(file) for rank in range(13) for file in written_by(tmp_path, rank)})
    return tmp_path


def flip(file, place=100):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_each_rank_sums_what_it_has_written(checkpoint):
    assert [file.name for file in written_by(checkpoint, 12)] == ["__12_0.distcp", "__12_1.distcp"]
    assert [file.name for file in written_by(checkpoint, 0)] == [".metadata", "__0_0.distcp", "common.pt"]
    assert set(read_sums(checkpoint)) == {file.name for file in checkpoint.iterdir()} - {MANIFEST}


def test_megatron_reads_them(checkpoint):
    verify_integrity_manifest(str(checkpoint))
    flip(checkpoint / "__12_1.distcp")
    with pytest.raises(CheckpointingException, match="__12_1"):
        verify_integrity_manifest(str(checkpoint))


def test_a_flipped_bit_and_a_lost_file_are_named(checkpoint):
    sums = read_sums(checkpoint)
    assert differences(checkpoint, sums, sums) == []
    flip(checkpoint / "__12_0.distcp")
    (checkpoint / "common.pt").unlink()
    lines = differences(checkpoint, sums, sorted(sums))
    assert len(lines) == 2
    assert f"{checkpoint / '__12_0.distcp'}: not as it was written, expected sha256" in lines[0]
    assert lines[1] == f"{checkpoint / 'common.pt'}: cannot be read (No such file or directory)"


def test_the_command(checkpoint):
    done = CliRunner().invoke(app, ["verify", str(checkpoint)])
    assert (done.exit_code, done.stdout.strip()) == (
        0,
        f"{checkpoint}: 5 files, 56,000 bytes, all as they were written",
    )
    flip(checkpoint / ".metadata")
    done = CliRunner().invoke(app, ["verify", str(checkpoint)])
    assert done.exit_code == 1
    assert done.stdout.startswith(f"{checkpoint / '.metadata'}: not as it was written")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing, so nothing tells"),
        ("{", "not valid JSON"),
        ("[]", "expected .*algorithm"),
        ('{"algorithm": "md5", "files": {}}', "expected .*sha256"),
        ('{"algorithm": "sha256", "files": {"a": 1}}', "expected .*algorithm"),
        (json.dumps({"algorithm": "sha256", "files": {"../a": "0"}}), "'../a': expected the name of a file"),
    ],
)
def test_what_is_no_manifest(tmp_path, content, words):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_sums(tmp_path)
