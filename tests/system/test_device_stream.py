"""The calls to torch.cuda of a stream beside others, without a GPU; what late streams would show is in the tests that use them."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import MagicMock, call, patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sonic.system.device_stream import HIGH, STREAMS, CudaStream, DeviceStream, stream_for, stream_on

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("priority", [HIGH, None])
def test_work_runs_on_the_stream_after_the_delay_of_a_check(priority):
    made, calls = MagicMock(), MagicMock()
    calls.entered.return_value = nullcontext()
    cuda = {"Stream": made, "current_stream": made, "stream": calls.entered}
    with patch.multiple(torch.cuda, **cuda, _sleep=calls.sleep), patch.object(CudaStream, "delay_cycles", 5):
        stream = CudaStream(CUDA, priority)
        assert stream.run(calls.function, 1, 2) is calls.function.return_value
    assert made.mock_calls[0] == (call(CUDA) if priority is None else call(CUDA, HIGH))
    assert calls.mock_calls == [call.entered(made.return_value), call.sleep(5), call.function(1, 2)]


def test_a_copy_does_not_block_and_its_memory_is_kept():
    pair = [MagicMock(spec=Tensor, is_cuda=True), MagicMock(spec=Tensor, is_cuda=False)]
    with patch.multiple(torch.cuda, Stream=MagicMock(), stream=lambda stream: nullcontext()):
        stream = CudaStream(CUDA, HIGH)
        stream.copy(*pair)
    pair[0].copy_.assert_called_once_with(pair[1], non_blocking=True)
    pair[0].record_stream.assert_called_once_with(stream.stream)
    assert not pair[1].record_stream.called


def test_pinned_memory_is_unpinned_with_its_owner():
    class Owner:
        """An object that holds memory."""

    memory, owner, runtime = torch.empty(4, 3), Owner(), MagicMock()
    with patch.multiple(torch.cuda, Stream=lambda *_: runtime.stream, cudart=lambda: runtime, check_error=MagicMock()):
        CudaStream(CUDA, HIGH).pin(memory[:, 1:], owner)
        assert runtime.mock_calls == [call.cudaHostRegister(memory.data_ptr(), 48, 0)]
        runtime.reset_mock()
        del owner
    assert runtime.mock_calls == [call.stream.synchronize(), call.cudaHostUnregister(memory.data_ptr())]


def test_a_device_without_an_index_has_the_streams_of_the_device_that_its_tensors_are_on():
    with patch.dict(STREAMS, {"cuda": DeviceStream}), FakeTensorMode():
        streams = {stream_for("decoding", torch.device(name), HIGH) for name in ("cuda", "cuda:0")}
        assert len(streams) == 1 and stream_for("weights", CUDA) not in streams
    stream_on.cache_clear()
