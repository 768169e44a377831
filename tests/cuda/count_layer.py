"""Counts what one layer of a published model launches on CUDA, and the bytes that its elementwise kernels move. `python tests/cuda/count_layer.py`"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from fake_cuda import CUDA, Record, fake_cuda_mode, on_cuda

from sonic.cli import compose
from sonic.commands.infer_command import ENTRY as INFER
from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.types import Conditions


def layer_record(layers: int) -> Record:
    config = compose(INFER, ["model=live_avatar_14b"]).model
    config = replace(config, trunk=replace(config.trunk, num_layers=layers), audio=replace(config.audio, inject_layers=[]))
    with torch.device("meta"):
        model = AvatarDiT(config)
    with fake_cuda_mode() as record, torch.no_grad():
        model = on_cuda(model, torch.bfloat16).eval()
        e = lambda *s: torch.empty(*s, device=CUDA, dtype=torch.bfloat16)
        cond = Conditions(ref=e(1, 16, 1, 48, 88), text=e(1, 512, 4096), motion=e(1, 16, 19, 48, 88))
        cache = model.new_cache(cond, steps=1)
        model.prefill(cond, cache)
        for b in range(2):
            span = BlockSpan(b, 3 * b, 3)
            inputs = model.prepare_block(cond, span)
            ctx = model.block_context(span, cache, cache.rings[0])
            trunk = model.embed_block(e(1, 16, 3, 48, 88), torch.empty(1, device=CUDA), inputs, sequence=__import__("sonic.model.execution", fromlist=["LOCAL"]).LOCAL.sequence)
            record.clear()
            model.run_blocks([trunk], [ctx])
    return record
