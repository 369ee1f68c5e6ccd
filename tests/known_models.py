"""The models of tests/test_models.py, and which of their blocks and linears ``fuse`` must find.

``*`` stands for a part of a module's name, so ``layers.*.mlp`` is one site for each layer. ``mlp`` is fc2(act(fc1(x)))
and ``gated_mlp`` down(act(gate(x)) * up(x)) of a block whose code is known; ``act_linear`` and ``gated_act_linear`` a
linear that reads f(z) or f(g) * u, and ``linear of`` a node of autograd's what is made again by that.
"""

import importlib
from dataclasses import replace

from known_transformers import DROPPED, IMAGES, KEPT, T5_SITES, TRANSFORMERS, bert
from model_kinds import Known, floats, made
from torch import nn

SEQUENCES = floats(tgt=(2, 7, 16), memory=(2, 5, 16))
X, X32 = floats(x=(2, 3, 16, 16)), floats(x=(2, 3, 32, 32))

TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
MIXER = {"img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": 16, "num_classes": 5}
CONVNEXT = {"depths": (1, 1, 1, 2), "dims": (8, 12, 16, 20), "num_classes": 5}

LAYER = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "batch_first": True, "drop": "dropout"}


def gmlp(dropout: bool) -> nn.Module:
    mixer = importlib.import_module("timm.models.mlp_mixer")
    return mixer.MlpMixer(block_layer=mixer.SpatialGatingBlock, mlp_layer=mixer.GatedMlp, mlp_ratio=2, **MIXER)


OTHERS = {
    "ViT, timm": made("timm.models.VisionTransformer", X, {"blocks.*.mlp": "mlp, gelu"}, depth=2, **TIMM),
    "EVA-02": made(
        "timm.models.Eva", X, {"blocks.*.mlp.fc2": "gated_act_linear, silu"}, depth=2, swiglu_mlp=True, **TIMM
    ),
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
        "timm.models.ConvNeXt",
        X32,
        {"stages.*.blocks.*.mlp": "linear_act, gelu"},
        use_grn=True,
        left={"stages.*.blocks.*.mlp.fc2": "between linear_act and this linear there is add"},
        **CONVNEXT,
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
        {"linear2": DROPPED},
        **LAYER,
    ),
    "nn.TransformerEncoderLayer, gelu, norm first": made(
        "torch.nn.TransformerEncoderLayer",
        floats(src=(2, 7, 16)),
        {"linear2": DROPPED},
        activation="gelu",
        norm_first=True,
        **LAYER,
    ),
    "nn.TransformerDecoderLayer": made(
        "torch.nn.TransformerDecoderLayer",
        SEQUENCES,
        {"linear2": DROPPED},
        **LAYER,
    ),
    "nn.TransformerDecoderLayer, gelu, norm first": made(
        "torch.nn.TransformerDecoderLayer",
        SEQUENCES,
        {"linear2": DROPPED},
        activation="gelu",
        norm_first=True,
        **LAYER,
    ),
    "nn.Transformer": made(
        "torch.nn.Transformer",
        floats(src=(2, 7, 16), tgt=(2, 5, 16)),
        {"encoder.layers.*.linear2": DROPPED, "decoder.layers.*.linear2": DROPPED},
        num_encoder_layers=2,
        num_decoder_layers=1,
        **LAYER,
    ),
}

KNOWN = TRANSFORMERS | OTHERS
for _name, _changes in {
    "RoBERTa, classifier": {"fused": bert("roberta"), "left": {"classifier.out_proj": KEPT}},
    "T5": {"fused": {}, "left": dict.fromkeys(T5_SITES, KEPT)},
    "T5 v1.1": {"fused": dict.fromkeys(T5_SITES, "gated_act_linear, gelu_tanh")},
    "nn.TransformerEncoderLayer": {"fused": {}, "left": {"linear2": KEPT}},
    "nn.TransformerDecoderLayer, gelu, norm first": {"fused": {"linear2": "act_linear, gelu"}},
}.items():
    KNOWN[f"{_name}, no dropout"] = replace(KNOWN[_name], dropout=False, **_changes)
