"""The models of transformers in the table of known_models.py."""

import torch
from model_kinds import floats, hf, tokens

IDS = tokens("input_ids")
CAUSAL = tokens("input_ids", use_cache=False)
SEQ2SEQ = tokens("input_ids", "decoder_input_ids", use_cache=False)
PIXELS = floats(pixel_values=(2, 3, 16, 16))

# By the names that most configurations have.
TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = TINY | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
EXPERTS = {
    "experts_implementation": "eager",
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 28}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}

GATED_SILU = {"model.layers.*.mlp": "gated_mlp, silu"}
T5_SITES = ("encoder.block.*.layer.1.DenseReluDense.wo", "decoder.block.*.layer.2.DenseReluDense.wo")
BART_SITES = {"model.encoder.layers.*.fc2": "act_linear, gelu", "model.decoder.layers.*.fc2": "act_linear, gelu"}
THREE_D = "weights of three dimensions"
KEPT = "keeps its output"  # which is what the linear keeps
DROPPED = "linear of dropout"  # by a mask and what came before


def bert(name: str) -> dict[str, str]:
    """A layer whose two linears stand in modules of their own: known whole, and read."""
    layer = f"{name}.encoder.layer.*"
    return {f"{layer}.intermediate": "linear_act, gelu", f"{layer}.output.dense": "linear of linear_act"}


TRANSFORMERS = {
    "BERT": hf(
        "BertForPreTraining",
        IDS,
        bert("bert") | {"cls.predictions.transform": "linear_act, gelu"},
        TINY,
        left={"cls.seq_relationship": KEPT},
    ),
    "RoBERTa": hf(
        "RobertaForMaskedLM",
        IDS,
        bert("roberta"),
        TINY,
    ),
    "RoBERTa, classifier": hf(
        "RobertaForSequenceClassification",
        IDS,
        bert("roberta") | {"classifier.out_proj": DROPPED},
        TINY,
    ),
    "DeBERTa-v2": hf(
        "DebertaV2ForMaskedLM",
        IDS,
        bert("deberta") | {"cls.predictions.transform": "linear_act, gelu"},
        TINY | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "DistilBERT": hf(
        "DistilBertForMaskedLM",
        IDS,
        {"distilbert.transformer.layer.*.ffn.lin2": "act_linear, gelu"},
        {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    ),
    "ALBERT": hf(  # one layer, run twice
        "AlbertForMaskedLM",
        IDS,
        {
            "albert.encoder.albert_layer_groups.*.albert_layers.*.ffn_output": "act_linear, gelu_tanh",
            "predictions": "linear_act, gelu_tanh",
        },
        TINY | {"embedding_size": 12},
    ),
    "ESM": hf(  # its GELU is a function of its own, known by its source
        "EsmForMaskedLM",
        IDS,
        bert("esm"),
        TINY | {"pad_token_id": 0, "position_embedding_type": "rotary"},
    ),
    "XLNet": hf(
        "XLNetModel",
        IDS,
        {"layer.*.ff.layer_2": DROPPED},
        {"vocab_size": 64, "d_model": 16, "d_inner": 24, "n_layer": 2, "n_head": 2},
        left={"layer.*.rel_attn": THREE_D},
    ),
    "ModernBERT": hf(
        "ModernBertForMaskedLM",
        IDS,
        {"model.layers.*.mlp.Wo": "gated_act_linear, gelu", "head": "linear_act, gelu"},
        TINY | {"pad_token_id": 0},
    ),
    "GPT-2": hf(
        "GPT2LMHeadModel",
        CAUSAL,
        {"transformer.h.*.mlp": "mlp, gelu_tanh"},
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "CTRL": hf(
        "CTRLModel",
        CAUSAL,
        {"h.*.ffn": "mlp, relu"},
        {"vocab_size": 64, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "n_positions": 16},
    ),
    "GPT-NeoX": hf("GPTNeoXForCausalLM", CAUSAL, {"gpt_neox.layers.*.mlp": "mlp, gelu"}, TINY),
    "OPT": hf(
        "OPTForCausalLM",
        CAUSAL,
        {},
        TINY | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        left={"model.decoder.layers.*.fc2": KEPT},
    ),
    "Bloom": hf(  # its GELU is a Function of its own
        "BloomForCausalLM",
        CAUSAL,
        {"transformer.h.*.mlp.dense_4h_to_h": "act_linear, gelu_tanh"},
        {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        dtype=torch.float32,  # to which the constants of its activation are rounded
        bound=1e-5,
    ),
    "Falcon": hf(
        "FalconForCausalLM",
        CAUSAL,
        {"transformer.h.*.mlp.dense_4h_to_h": "act_linear, gelu"},
        TINY | {"ffn_hidden_size": 24},
    ),
    "MPT": hf(
        "MptForCausalLM",
        CAUSAL,
        {"transformer.blocks.*.ffn.down_proj": "act_linear, gelu"},
        {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16},
    ),
    "Phi": hf("PhiForCausalLM", CAUSAL, {"model.layers.*.mlp": "mlp, gelu_tanh"}, TINY),
    "Phi-3": hf(
        "Phi3ForCausalLM",
        CAUSAL,
        {"model.layers.*.mlp.down_proj": "gated_act_linear, silu"},
        TINY | {"pad_token_id": 0},
    ),
    "Nemotron": hf("NemotronForCausalLM", CAUSAL, {"model.layers.*.mlp": "mlp, relu2"}, GROUPED),
    "Apertus": hf("ApertusForCausalLM", CAUSAL, {}, GROUPED | {"hidden_act": "xielu"}),  # it learns two parameters
    "Llama": hf("LlamaForCausalLM", CAUSAL, GATED_SILU, TINY),
    "Mistral": hf("MistralForCausalLM", CAUSAL, GATED_SILU, GROUPED),
    "Qwen3": hf("Qwen3ForCausalLM", CAUSAL, GATED_SILU, GROUPED),
    "Gemma": hf("GemmaForCausalLM", CAUSAL, {"model.layers.*.mlp": "gated_mlp, gelu_tanh"}, GROUPED),
    "Mixtral": hf(
        "MixtralForCausalLM",
        CAUSAL,
        {},
        GROUPED | EXPERTS | {"num_local_experts": 3},
        left={"model.layers.*.mlp.experts": THREE_D},
    ),
    "Qwen2-MoE": hf(
        "Qwen2MoeForCausalLM",
        CAUSAL,
        {"model.layers.*.mlp.shared_expert": "gated_mlp, silu"},
        GROUPED | EXPERTS | {"num_experts": 3},
        left={"model.layers.*.mlp.experts": THREE_D},
    ),
    "GPT-OSS": hf(
        "GptOssForCausalLM",
        CAUSAL,
        {},
        GROUPED | EXPERTS | {"num_local_experts": 3},
        left={"model.layers.*.mlp.experts": THREE_D},
    ),
    "Switch": hf(
        "SwitchTransformersForConditionalGeneration",
        SEQ2SEQ,
        {
            "encoder.block.0.layer.1.mlp.wo": DROPPED,
            "decoder.block.0.layer.2.mlp.wo": DROPPED,
            "encoder.block.1.layer.1.mlp.experts.*.wo": DROPPED,
            "decoder.block.1.layer.2.mlp.experts.*.wo": DROPPED,
        },
        T5
        | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2},
    ),
    "T5": hf("T5ForConditionalGeneration", SEQ2SEQ, dict.fromkeys(T5_SITES, DROPPED), T5),
    "T5 v1.1": hf(
        "T5ForConditionalGeneration",
        SEQ2SEQ,
        dict.fromkeys(T5_SITES, DROPPED),
        T5 | {"feed_forward_proj": "gated-gelu"},
    ),
    "BART": hf("BartForConditionalGeneration", SEQ2SEQ, BART_SITES, BART | SPECIAL),
    "BART, dropout in the block": hf(
        "BartForConditionalGeneration",
        SEQ2SEQ,
        dict.fromkeys(BART_SITES, "linear of mul"),
        BART | SPECIAL | {"activation_dropout": 0.1},
    ),
    "BART, classifier": hf(
        "BartForSequenceClassification",
        lambda: {"input_ids": torch.cat([IDS()["input_ids"], torch.full((2, 1), 2)], 1), "use_cache": False},
        BART_SITES | {"classification_head": "mlp, tanh"},
        BART | SPECIAL,
    ),
    "Whisper": hf(
        "WhisperForConditionalGeneration",
        lambda: tokens("decoder_input_ids", use_cache=False)() | floats(input_features=(2, 8, 12))(),
        BART_SITES,
        BART | SPECIAL | {"num_mel_bins": 8, "max_source_positions": 6},
    ),
    "ViT": hf("ViTModel", PIXELS, {"layers.*.mlp": "mlp, gelu"}, TINY | IMAGES),
    "DINOv2": hf(
        "Dinov2Model", PIXELS, {"encoder.layer.*.mlp": "gated_mlp, silu"}, TINY | IMAGES | {"use_swiglu_ffn": True}
    ),
    "CLIP": hf(
        "CLIPModel",
        lambda: IDS() | PIXELS(),
        {f"{part}_model.encoder.layers.*.mlp": "mlp, quick_gelu" for part in ("text", "vision")},
        {
            "text_config": CLIP | {"vocab_size": 64, "projection_dim": 8, "eos_token_id": 2},
            "vision_config": CLIP | IMAGES | {"projection_dim": 8},
            "projection_dim": 8,
        },
    ),
}
