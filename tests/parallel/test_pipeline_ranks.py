"""The Python face on two ranks: the first leads, the second serves it, and the video is that of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from infer_command import pipeline_options, write_files

from sonic import AvatarPipeline

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from sonic import AvatarPipeline

torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), eval(sys.argv[2])

def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)

with AvatarPipeline.from_pretrained("preview", parallel="fsdp", **options) as pipe:
    files = folder / "me.png", folder / "me.wav"
    if pipe.leads:
        np.save(folder / "frames.npy", pipe(*files, seed=3).frames)
        calls = [lambda: pipe.stream(files[0], iter(())), lambda: pipe.to("cpu")]
    else:
        calls = [lambda: pipe(*files)]
    (folder / f"{pipe.ranks.rank}.txt").write_text("\\n".join(refused(call) for call in calls))
"""


def test_two_ranks_make_the_video_of_one_and_say_what_they_cannot(tmp_path):
    folder = write_files(tmp_path, 0.6)
    options = {name: str(value) for name, value in pipeline_options(folder).items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "script.py").write_text(SCRIPT)
    command = ["env", f"PYTHONPATH={ROOT}", *launcher, str(folder / "script.py"), str(folder), repr(options)]
    subprocess.run(command, check=True, timeout=240, cwd=folder)
    alone = AvatarPipeline.from_pretrained("preview", **options)(folder / "me.png", folder / "me.wav", seed=3)
    assert np.array_equal(np.load(folder / "frames.npy"), alone.frames)
    first, second = ((folder / f"{rank}.txt").read_text() for rank in range(2))
    assert "cannot be sent to other ranks" in first and "shares them with other ranks" in first
    assert second.startswith("rank 1 serves the leading rank")
