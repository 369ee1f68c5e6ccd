"""The models of tests/test_models.py, and which of their blocks ``fuse`` must find.

The sites are read off the models' sources, not off what ``fuse`` finds. ``*`` stands for a part of a module's name, so
``layers.*.mlp`` is one site for each layer. ``mlp`` is fc2(act(fc1(x))), ``gated_mlp`` is down(act(gate(x)) * up(x)),
the weights of gate and up apart or packed; ``linear_act`` and ``gated_linear_act`` are what comes before fc2 and down,
where a norm stands between, or there is no such layer in the block.
"""

import importlib

from known_transformers import IMAGES, TRANSFORMERS
from model_kinds import Known, floats, made, without_dropout
from torch import nn

SEQUENCES = floats(tgt=(2, 7, 16), memory=(2, 5, 16))
X, X32 = floats(x=(2, 3, 16, 16)), floats(x=(2, 3, 32, 32))

TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
MIXER = {"img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": 16, "num_classes": 5}
CONVNEXT = {"depths": (1, 1, 1, 2), "dims": (8, 12, 16, 20), "num_classes": 5}

LAYER = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "batch_first": True, "drop": "dropout", "dropping": True}


def gmlp(dropout: bool) -> nn.Module:
    mixer = importlib.import_module("timm.models.mlp_mixer")
    return mixer.MlpMixer(block_layer=mixer.SpatialGatingBlock, mlp_layer=mixer.GatedMlp, mlp_ratio=2, **MIXER)


OTHERS = {
    "ViT, timm": made("timm.models.VisionTransformer", X, {"blocks.*.mlp": "mlp, gelu"}, depth=2, **TIMM),
    "EVA-02": made("timm.models.Eva", X, {"blocks.*.mlp": "gated_mlp, silu"}, depth=2, swiglu_mlp=True, **TIMM),
    "EVA-02, norm in the block": made(
        "timm.models.Eva",
        X,
        {"blocks.*.mlp": "gated_linear_act, silu"},
        depth=2,
        swiglu_mlp=True,
        scale_mlp=True,
        **TIMM,
    ),
    "MLP-Mixer": made(
        "timm.models.MlpMixer", X, {"blocks.*.mlp_tokens": "mlp, gelu", "blocks.*.mlp_channels": "mlp, gelu"}, **MIXER
    ),
    "gMLP": Known("timm", "MlpMixer", gmlp, X, {"blocks.*.mlp_channels": "linear_act, gelu"}),
    "Swin": made(
        "timm.models.SwinTransformer",
        X,
        {"layers.*.blocks.*.mlp": "mlp, gelu"},
        img_size=16,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 2),
        num_heads=(1, 2),
        num_classes=5,
    ),
    "ConvNeXt": made("timm.models.ConvNeXt", X32, {"stages.*.blocks.*.mlp": "mlp, gelu"}, **CONVNEXT),
    "ConvNeXt V2": made(
        "timm.models.ConvNeXt", X32, {"stages.*.blocks.*.mlp": "linear_act, gelu"}, use_grn=True, **CONVNEXT
    ),
    "MLP, torchvision": made(
        "torchvision.ops.MLP", lambda: tuple(floats(x=(5, 16))().values()), {"": "mlp, relu"}, 16, [24, 20, 8]
    ),
    "ViT, torchvision": made(
        "torchvision.models.VisionTransformer",
        X,
        {"encoder.layers.*.mlp": "mlp, gelu"},
        num_layers=2,
        hidden_dim=16,
        mlp_dim=24,
        num_heads=2,
        num_classes=5,
        **IMAGES,
    ),
    "nn.TransformerEncoderLayer": made(
        "torch.nn.TransformerEncoderLayer",
        floats(src=(2, 7, 16)),
        {"": "mlp, relu"},
        **LAYER,
    ),
    "nn.TransformerEncoderLayer, gelu, norm first": made(
        "torch.nn.TransformerEncoderLayer",
        floats(src=(2, 7, 16)),
        {"": "mlp, gelu"},
        activation="gelu",
        norm_first=True,
        **LAYER,
    ),
    "nn.TransformerDecoderLayer": made(
        "torch.nn.TransformerDecoderLayer",
        SEQUENCES,
        {"": "mlp, relu"},
        **LAYER,
    ),
    "nn.TransformerDecoderLayer, gelu, norm first": made(
        "torch.nn.TransformerDecoderLayer",
        SEQUENCES,
        {"": "mlp, gelu"},
        activation="gelu",
        norm_first=True,
        **LAYER,
    ),
    "nn.Transformer": made(
        "torch.nn.Transformer",
        floats(src=(2, 7, 16), tgt=(2, 5, 16)),
        {"encoder.layers.*": "mlp, relu", "decoder.layers.*": "mlp, relu"},
        num_encoder_layers=2,
        num_decoder_layers=1,
        **LAYER,
    ),
}

KNOWN = TRANSFORMERS | OTHERS
for _name in (
    "RoBERTa, classifier",
    "T5",
    "T5 v1.1",
    "nn.TransformerEncoderLayer",
    "nn.TransformerDecoderLayer, gelu, norm first",
):
    KNOWN[f"{_name}, no dropout"] = without_dropout(KNOWN[_name])

# What fuse does not do yet: what it says of these sites today, None where it does not see them, and why.
WRITTEN = "its activation is written in a forward that is more than a chain"
NOT_FUSED = {
    "RoBERTa, classifier": ({"classifier": None}, f"`RobertaClassificationHead`: {WRITTEN} (it takes the first token)"),
    "ESM": ({"lm_head": None}, f"`EsmLMHead`: {WRITTEN} (it adds a bias of its own)"),
}
NOT_FUSED["RoBERTa, classifier, no dropout"] = NOT_FUSED["RoBERTa, classifier"]
