"""LoRA by PEFT on a small Llama, stock and fused, in both orders: LoRA and then fuse, fuse and then LoRA.

The adapters sit in the attention of every layer and in the MLP of the first. There the down projection and its adapter
take the same input, silu(gate) · up. Where ``fuse`` comes last, both read what that was made of, and it is not kept.
Where PEFT comes last, its adapters are plain linears and keep it, until ``fuse`` is called again. The other MLPs run
whole in both orders, and so does the first once the adapters are merged into its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from common import LLAMA, Record, compare, english, packages, parse, require, run
from torch import Tensor, nn

import fastbp

with packages("peft", "transformers"):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; ``merged``, the bytes that merged models keep, comes with what ``common.compare`` gives."""
    options = parse(argv, __doc__, steps=60, quick=16)
    llama = LlamaConfig(**LLAMA)
    lora = LoraConfig(
        r=8,
        target_modules=r".*\.(q_proj|v_proj)|.*\.layers\.0\.mlp\.(gate|up|down)_proj",
        modules_to_save=["lm_head"],
        init_lora_weights="gaussian",
    )
    text = english(options.device)
    window = torch.arange(64, device=options.device)

    def draw() -> dict[str, Tensor]:
        piece = text[torch.randint(len(text) - 64, (8, 1)).to(options.device) + window]
        return {"input_ids": piece, "labels": piece}

    torch.manual_seed(options.seed)
    sample = draw()

    def base() -> nn.Module:
        return LlamaForCausalLM(llama).to(options.device)

    def stock() -> nn.Module:
        return get_peft_model(base(), lora)

    def fuse(model: nn.Module) -> fastbp.FusionReport:
        # Without a named policy the adapted block's inputs of half a MiB are left to PyTorch, which is faster there.
        return fastbp.fuse(model, sample_inputs=sample, save="preact")

    def lora_then_fuse() -> tuple[nn.Module, fastbp.FusionReport]:
        model = get_peft_model(base(), lora)
        return model, fuse(model)

    def fuse_then_lora() -> tuple[nn.Module, fastbp.FusionReport]:
        model = base()
        report = fuse(model)
        return get_peft_model(model, lora), report

    def forward(model: nn.Module) -> Tensor:
        return model(**sample).loss

    def train(model: nn.Module, record: Record) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        for _ in range(options.steps):
            loss = model(**draw()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record(loss.item())

    variants = {"LoRA, then fuse": lora_then_fuse, "fuse, then LoRA": fuse_then_lora}
    result = compare(options, stock=stock, variants=variants, train=train, forward=forward)
    kept_by = {name: run.kept for name, run in result["runs"].items()}
    falls = kept_by["LoRA, then fuse"] < kept_by["fuse, then LoRA"] < kept_by["stock"]
    require(result, falls, "both orders keep less than stock, and least where fuse comes last")

    result["merged"] = {}
    merged = {name: result["runs"][name].model.merge_and_unload() for name in ("stock", *variants)}
    again = fuse(merged["LoRA, then fuse"])  # the other order needs no second call
    print(f"\nLoRA, then fuse; merged, and fuse again:\n{again}\n")
    with torch.no_grad():
        logits = {name: model.eval()(**sample).logits for name, model in merged.items()}
    for name, model in merged.items():
        for parameter in model.parameters():
            parameter.requires_grad_()
        with fastbp.SavedBytes(exclude=[model]) as kept:
            forward(model)
        result["merged"][name] = kept.total
    for name in variants:
        same = torch.allclose(logits[name], logits["stock"], rtol=1e-3, atol=1e-3)
        require(result, same, f"{name}: the merged model gives the logits of the stock one")
        kept, stocks = result["merged"][name], result["merged"]["stock"]
        require(result, kept < stocks, f"{name}: merged it keeps {kept / stocks:.2f} of the bytes stock keeps")
    return result


if __name__ == "__main__":
    run(main)
