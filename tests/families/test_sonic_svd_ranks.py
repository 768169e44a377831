"""Several ranks that divide the windows of a clip make the MP4 of one rank, from the command line."""

from __future__ import annotations

import json

import pytest
from infer_command_ranks import infer_on
from test_sonic_svd_video import command, folder, options  # noqa: F401


@pytest.fixture(scope="module")
def alone(folder) -> bytes:  # noqa: F811
    assert command(folder, f"output={folder / 'alone.mp4'}", "name=alone") == 0
    return (folder / "alone.mp4").read_bytes()


@pytest.mark.parametrize("plan", ["windows", "fsdp"])
def test_two_ranks_make_the_videos_of_one(plan, folder, alone, tmp_path):  # noqa: F811
    line = {"image": str(folder / "me.png"), "audio": str(folder / "me.wav")}
    lines = [line | {"output": str(tmp_path / name)} for name in ("first.mp4", "second.mp4")]
    lines.insert(1, line | {"audio": str(tmp_path / "missing.wav"), "output": str(tmp_path / "none.mp4")})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    requests = f"requests={tmp_path / 'requests.jsonl'}"
    codes, output = infer_on(2, [*options(folder), f"parallel={plan}", requests, "run.name=two"], tmp_path)
    assert max(codes) == 1, output  # one video of three failed
    for name in ("first.mp4", "second.mp4"):
        assert (tmp_path / name).read_bytes() == alone
