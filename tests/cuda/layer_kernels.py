"""Counts the kernels of one layer of Live Avatar 14B on a fake CUDA device, as they are and compiled: `python tests/cuda/layer_kernels.py`.

A compiled region is lowered by torch's inductor for the properties of an H100 up to its scheduler, which decides what becomes one kernel
and knows the bytes that it reads and writes; only the code of these kernels, for which Triton would be needed, is not generated.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fake_cuda import CUDA, Record, compiled_guard, fake_cuda_mode, load_guard, on_cuda

from sonic.cli import compose
from sonic.commands.infer_command import ENTRY as INFER
from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL
from sonic.types import Conditions

H100 = SimpleNamespace(
    multi_processor_count=132,
    major=9,
    minor=0,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
)
PRODUCTS = ("mm", "addmm", "_addmm_activation", "_scaled_dot_product_efficient_attention")  # and attention: no elementwise kernels
FUSED = "fused by the compiler"
LATENTS = (48, 88)  # of a video of 704x384


@contextmanager
def fused_kernels_counted(record: Record) -> Iterator[None]:
    """Context in which compiled regions count in `record` as the kernels that inductor would make of them on an H100."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._dynamo.utils import detect_fake_mode
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor import compile_fx, scheduler
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    def lowered(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        mode = detect_fake_mode(inputs)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            compile_fx._recursive_post_grad_passes(graph, is_inference=True)
            lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                lowering.run(*inputs)
                lowering._update_scheduler()
                kernels = [node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes]

        def run(*arguments: object) -> object:
            before = [Counter(counter) for counter in (record.launches, record.traffic)]
            made = graph.forward(*arguments)
            record.launches, record.traffic = before
            record.launches[FUSED] += len(kernels)
            record.traffic[FUSED] += sum(kernels)
            return made

        return run

    settings = {"decompositions": select_decomp_table(), "keep_inference_input_mutations": True}
    backend = partial(aot_module_simplified, fw_compiler=lowered, inference_compiler=lowered, **settings)
    with (
        patch.object(torch, "compile", partial(torch.compile, backend=lambda graph, inputs: backend(graph, inputs))),
        patch.multiple(CudaInterface, get_device_properties=lambda *_: H100, get_compute_capability=lambda *_: 90),
        patch.object(CudaInterface.Worker, "get_device_properties", lambda *_: H100),
        patch.object(scheduler, "has_triton", lambda: True),
    ):
        yield


def kernels_of_a_layer(compiled: bool) -> tuple[Counter, Counter]:
    """Launches and bytes by kernel of the second block of a rollout in one layer at its true width, without audio injection."""
    config = compose(INFER, ["model=live_avatar_14b"]).model
    config = replace(config, trunk=replace(config.trunk, num_layers=1), audio=replace(config.audio, inject_layers=[]))
    with torch.device("meta"):
        model = AvatarDiT(config)
    with fake_cuda_mode() as record, fused_kernels_counted(record), torch.no_grad():
        on_cuda(model, torch.bfloat16).eval().compiled = compiled
        empty = partial(torch.empty, device=CUDA, dtype=torch.bfloat16)
        text = empty(1, config.text.text_len, config.text.text_dim)
        given = Conditions(ref=empty(1, 16, 1, *LATENTS), text=text, motion=empty(1, 16, 19, *LATENTS))
        cache = model.prefill(given, model.new_cache(given, steps=1))
        for index in range(2):
            span = BlockSpan(index, 3 * index, 3)
            latents, timestep = empty(1, 16, 3, *LATENTS), torch.empty(1, device=CUDA)
            inputs = model.embed_block(latents, timestep, model.prepare_block(given, span), sequence=LOCAL.sequence)
            context = model.block_context(span, cache, cache.rings[0])
            record.clear()
            model.run_blocks([inputs], [context])
        return record.launches, record.traffic


def elementwise(kernels: Counter) -> int:
    """The sum over kernels that are neither products nor attention."""
    return sum(number for name, number in kernels.items() if name not in PRODUCTS)


def table() -> str:
    """Launches and elementwise traffic, plain and compiled, and the kernels of which they consist."""
    lines = []
    for compiled in (False, True):
        launches, traffic = kernels_of_a_layer(compiled)
        lines.append(
            f"{'compiled' if compiled else 'plain'}: {launches.total()} launches, {elementwise(launches)} of them elementwise, "
            f"{elementwise(traffic) / 1e6:.0f} MB of elementwise traffic"
        )
        lines += [f"  {number:3d} {name:42s} {traffic[name] / 1e6:8.1f} MB" for name, number in launches.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    load_guard(compiled_guard(Path(tempfile.gettempdir())), sys.path)
    print(table())
