"""The table of attention kernels: each equals the softmax by hand where it can run, and says why where it cannot."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.testing import assert_close

from sonic.cli import run_command
from sonic.commands import infer_command
from sonic.config import RunConfig, help_of
from sonic.model import attention
from sonic.model.attention import ATTENTION, attention_for, sdpa

CUDA, HEADS = torch.device("cuda", 0), 64
HOPPER, AMPERE, ADA, TURING, BLACKWELL = (9, 0), (8, 0), (8, 9), (7, 5), (10, 0)


def by_hand(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", queries, keys) * queries.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), values)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """The signature of xformers 0.0.35."""
    return by_hand(query, key, value)


def flash_attn_func(  # noqa: PLR0913
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """The signature of FlashAttention 3 of 2026."""
    return by_hand(q, k, v)


def flash_attn_func_of_2024(q, k, v, softmax_scale=None, causal=False):
    """The first releases always give the sums of the softmax as well."""
    return by_hand(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    """The signature of SageAttention 1.0.6, which subtracts the mean of the keys in place."""
    assert tensor_layout == "NHD"
    k -= k.mean(dim=1, keepdim=True)
    return by_hand(q, k, v)


def sageattn_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """The signature of SageAttention 2."""
    assert tensor_layout == "NHD"
    return by_hand(q, k, v)


PACKAGES = [
    ("xformers", "xformers.ops", memory_efficient_attention),
    ("flash3", "flash_attn_interface", flash_attn_func),
    ("flash3", "flash_attn_interface", flash_attn_func_of_2024),
    ("sage", "sageattention", sageattn),
    ("sage", "sageattention", sageattn_2),
]


@pytest.fixture
def install(monkeypatch):
    """Puts a module with one function in the place of a package."""

    def installed(name: str, function) -> None:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            module.__spec__ = ModuleSpec(module.__name__, None)
            setattr(module, function.__name__.removesuffix("_of_2024").removesuffix("_2"), function)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return installed


@pytest.fixture
def gpu(monkeypatch):
    """Simulates a CUDA device of a compute capability, of which torch chooses the kernel flash."""

    def has(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "_log_kernel", lambda *arguments: None)

    return has


def rows(*, needs_grad: bool = False) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, length, 3, HEADS, requires_grad=needs_grad) for length in (5, 7, 7))


@pytest.mark.parametrize("name", [name for name, backend in ATTENTION.items() if backend.anywhere])
def test_an_attention_that_runs_anywhere_equals_the_softmax_by_hand_in_values_and_gradients(name, rng):
    given = rows(needs_grad=True)
    attend = attention_for(name, torch.device("cpu"), torch.float32, head_dim=HEADS)
    assert_close(attend(*(each.detach() for each in given)), by_hand(*given), atol=1e-5, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad(each(*given).square().sum(), given) for each in (attend, by_hand)), strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "package", "function"), PACKAGES)
def test_a_package_is_called_as_its_signature_says_and_its_inputs_stay(name, package, function, install, rng):
    install(package, function)
    given = rows()
    before = [each.clone() for each in given]
    assert_close(ATTENTION[name].attend(*given), by_hand(*before), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.parametrize("name", ATTENTION)
def test_a_rank_without_heads_gets_nothing(name):
    empty = torch.empty(1, 4, 0, HEADS)
    assert ATTENTION[name].attend(empty, empty, empty).shape == empty.shape


def test_flex_is_torchs_flex_attention(monkeypatch, rng):
    calls = []
    monkeypatch.setattr(attention, "flex_attention", lambda *rows: calls.append(len(rows)) or rows[0])
    ATTENTION["flex"].attend(*rows())
    assert calls == [3]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("device", [None, TURING, AMPERE, ADA, HOPPER, BLACKWELL])
def test_every_device_gets_the_attention_that_was_asked_for_or_the_same_values_or_a_refusal(name, device, install, gpu, caplog):
    for _, package, function in PACKAGES:
        install(package, function)
    gpu(device)
    fits = {"xformers": {AMPERE, ADA, HOPPER, BLACKWELL}, "flash3": {HOPPER}, "sage": {AMPERE, ADA, HOPPER, BLACKWELL}}
    ask = lambda: attention_for(name, CUDA if device else torch.device("cpu"), torch.bfloat16, head_dim=HEADS)  # noqa: E731
    if name not in fits or device in fits[name]:
        assert ask() is ATTENTION[name].attend
        assert not caplog.text
    elif name == "sage":  # 8 bits are not what sdpa gives
        with pytest.raises(ValueError, match=r"run.attention=sage (has kernels for CUDA only|needs a GPU of .* has \(7, 5\)).*sdpa"):
            ask()
    else:
        assert ask() is sdpa
        assert f"run.attention={name} {'needs a GPU of compute capability' if device else 'has kernels for CUDA only'}" in caplog.text


@pytest.mark.parametrize("name", ["xformers", "flash3", "sage"])
def test_attention_without_its_package_names_what_to_install(name, monkeypatch, gpu):
    gpu(HOPPER)
    monkeypatch.setattr(attention, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"run.attention={name} needs the package .*install.*sdpa"):
        attention_for(name, CUDA, torch.bfloat16, head_dim=HEADS)


@pytest.mark.parametrize(("name", "takes"), [("sdpa", True), ("xformers", True), ("flash3", False), ("sage", False), ("flex", True)])
def test_float32_goes_only_to_kernels_that_take_it(name, takes, install, gpu):
    for _, package, function in PACKAGES:
        install(package, function)
    gpu(HOPPER)
    if takes:
        assert attention_for(name, CUDA, torch.float32, head_dim=HEADS) is ATTENTION[name].attend
        return
    with pytest.raises(ValueError, match=rf"run.attention={name} has no kernels for torch.float32: run.dtype=bfloat16 has them"):
        attention_for(name, CUDA, torch.float32, head_dim=HEADS)


def test_heads_that_a_kernel_does_not_have_are_refused_before_anything_is_loaded(install, gpu):
    install("sageattention", sageattn)
    gpu(AMPERE)
    with pytest.raises(ValueError, match=r"run.attention=sage has no kernels for heads of 24 channels"):
        attention_for("sage", CUDA, torch.bfloat16, head_dim=24)


def test_sage_refuses_to_learn(install):
    install("sageattention", sageattn)
    with pytest.raises(ValueError, match="run.attention=sage has no gradients"):
        ATTENTION["sage"].attend(*rows(needs_grad=True))


@pytest.mark.parametrize("kernel", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_the_log_names_the_kernel_that_torch_chooses_once(kernel, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = []

    def chosen(*rows: Tensor) -> int:
        asked.append(rows[0].shape[-1])
        return int(kernel)

    monkeypatch.setattr(torch, "_fused_sdp_choice", chosen)
    attention._log_kernel.cache_clear()
    for _ in range(3):
        attention._log_kernel(torch.device("cpu"), torch.float32, HEADS)
    assert asked == [HEADS]
    assert caplog.messages == [f"attention: sdpa takes torch's kernel {kernel.name}"]  # which runs here, so there is no reason against it


def test_the_log_gives_torchs_reason_for_a_slow_kernel(caplog):
    caplog.set_level("INFO")
    attention._log_kernel.cache_clear()
    attention._log_kernel(torch.device("cpu"), torch.int8, HEADS)  # a dtype for which torch itself has no fast kernel here
    (message,) = caplog.messages
    assert message.startswith("attention: sdpa takes torch's kernel MATH because: Expected query, key and value to all be of dtype")
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()  # as before
    assert F.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 8) for _ in range(3))).sum() == 16


def test_the_kernel_is_named_when_a_cuda_device_gets_sdpa(monkeypatch):
    named = []
    monkeypatch.setattr(attention, "_log_kernel", lambda *arguments: named.append(arguments))
    attention_for("sdpa", CUDA, torch.bfloat16, head_dim=128)
    attention_for("sdpa", torch.device("cpu"), torch.bfloat16, head_dim=128)
    assert named == [(CUDA, torch.bfloat16, 128)]


def test_the_command_refuses_before_it_works(tmp_path, capsys):
    argv = ["run.attention=sage", "device=cpu", f"run.folder={tmp_path / 'runs'}"]
    assert run_command(infer_command.ENTRY, infer_command.infer, argv) == 2
    assert "run.attention=sage has kernels for CUDA only, not for cpu; or use run.attention=sdpa" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*"))


def test_the_help_of_the_option_names_every_kernel():
    text = help_of(RunConfig.__dataclass_fields__["attention"])
    assert all(name in text.partition(": sdpa,")[0] for name in ATTENTION)
