"""Checks of recorded text features."""

from __future__ import annotations

from golden_case import Case, tensors_of

from sonic.encoders.text import TextEncoder


def prompts(case: Case) -> None:
    given = case.manifest["config"]
    encoder = TextEncoder(
        {
            "vocab_size": given["vocab"],
            "d_model": given["dim"],
            "d_kv": given["dim_attn"] // given["num_heads"],
            "d_ff": given["dim_ffn"],
            "num_layers": given["num_layers"],
            "num_heads": given["num_heads"],
            "relative_attention_num_buckets": given["num_buckets"],
            "feed_forward_proj": "gated-gelu",
        }  # fmt: skip
    )
    encoder.load_tensors(tensors_of(case.weights(0)), "golden")
    for index, rows in enumerate(encoder(case.inputs["ids"], case.inputs["mask"])):
        case.close(rows, case.outputs[f"trimmed_{index}"])
