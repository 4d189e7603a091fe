"""timm's architecture classes, found in timm itself, and a small model of each."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import timm
import torch

PACKAGE = "timm.models."
SIDE = 64  # pixels; most models run on that


@dataclass(frozen=True)
class Family:
    """One architecture class, and the model that stands for it.

    Attributes:
        file: of timm.models.
        cls: name of the class that the model's entrypoint builds.
        model: timm name, the smallest of the class.
        size: side of the images in pixels, small where the model allows it.
        options: further arguments of timm.create_model, where even the smallest model is large.
    """

    file: str
    cls: str
    model: str
    size: int = SIDE
    options: dict[str, Any] = field(default_factory=dict)


SMALL_VIT = {"depth": 6, "embed_dim": 192, "num_heads": 3}
SMALL_DEEPSEEK = SMALL_VIT | {"embed_dim": 256, "num_heads": 4}
SMALL_GEMMA = SMALL_VIT | {"intermediate_size": 768}

FAMILIES = (
    Family("beit", "Beit", "beit_base_patch16_224", options=SMALL_VIT),
    Family("byoanet", "ByobNet", "halonet_h1", 256),
    Family("byobnet", "ByobNet", "test_byobnet"),
    Family("cait", "Cait", "cait_xxs24_224"),
    Family("coat", "CoaT", "coat_tiny"),
    Family("convit", "ConVit", "convit_tiny"),
    Family("convmixer", "ConvMixer", "convmixer_768_32"),
    Family("convnext", "ConvNeXt", "test_convnext"),
    Family("cpubone", "CPUBone", "cpubone_nano"),
    Family("crossvit", "CrossVit", "crossvit_tiny_240", 240),
    Family("csatv2", "CSATv2", "csatv2"),
    Family("cspnet", "CspNet", "cs3darknet_focus_s"),
    Family("cspnext", "CspNext", "cspnext_tiny"),
    Family("davit", "DaVit", "davit_tiny"),
    Family(
        "deepseek_vit",
        "DeepseekVitClassifier",
        "deepseek_vit_412m",
        126,
        options=SMALL_DEEPSEEK,
    ),
    Family(
        "deepseek_vit",
        "DeepseekVitEncoder",
        "deepseek_vit_412m_enc",
        126,
        options=SMALL_DEEPSEEK,
    ),
    Family("deit", "VisionTransformer", "deit_tiny_patch16_224"),
    Family("deit", "VisionTransformerDistilled", "deit_tiny_distilled_patch16_224"),
    Family("densenet", "DenseNet", "densenet121"),
    Family("dla", "DLA", "dla46x_c"),
    Family("dpn", "DPN", "dpn48b"),
    Family("edgenext", "EdgeNeXt", "edgenext_xx_small"),
    Family("efficientformer", "EfficientFormer", "efficientformer_l1", 224),
    Family("efficientformer_v2", "EfficientFormerV2", "efficientformerv2_s0"),
    Family("efficientnet", "EfficientNet", "test_efficientnet"),
    Family("efficientvim", "EfficientViM", "efficientvim_m1"),
    Family("efficientvim", "EfficientViMDistilled", "efficientvim_m1_dist"),
    Family("efficientvit_mit", "EfficientVit", "efficientvit_b0"),
    Family("efficientvit_mit", "EfficientVitLarge", "efficientvit_l1"),
    Family("efficientvit_msra", "EfficientVitMsra", "efficientvit_m0"),
    Family("eva", "Eva", "vit_tiny_patch16_dinov3_qkvb"),
    Family("fasternet", "FasterNet", "fasternet_t0"),
    Family("fastvit", "FastVit", "fastvit_t8"),
    Family("focalnet", "FocalNet", "focalnet_tiny_srf"),
    Family("gcvit", "GlobalContextVit", "gcvit_xxtiny"),
    Family("gemma4_vit", "Gemma4VitClassifier", "gemma4_vit_167m", options=SMALL_GEMMA),
    Family("gemma4_vit", "Gemma4VitEncoder", "gemma4_vit_167m_enc", options=SMALL_GEMMA),
    Family("ghostnet", "GhostNet", "ghostnet_050"),
    Family("hardcorenas", "MobileNetV3", "hardcorenas_b"),
    Family("hgnet", "HighPerfGpuNet", "hgnetv2_b0"),
    Family("hiera", "Hiera", "hiera_tiny_224"),
    Family("hieradet_sam2", "HieraDet", "sam2_hiera_tiny"),
    Family("hrnet", "HighResolutionNet", "hrnet_w18_small"),
    Family("iformer", "IFormer", "iformer_t"),
    Family("inception_next", "MetaNeXt", "inception_next_atto"),
    Family("inception_resnet_v2", "InceptionResnetV2", "inception_resnet_v2", 96),
    Family("inception_v3", "InceptionV3", "inception_v3", 96),
    Family("inception_v4", "InceptionV4", "inception_v4", 96),
    Family("lcnetv2", "LCNetV2", "lcnetv2_small"),
    Family("levit", "Levit", "levit_256d"),
    Family("levit", "LevitDistilled", "levit_128s"),
    Family("lowformer", "LowFormer", "lowformer_b0"),
    Family("mambaout", "MambaOut", "test_mambaout"),
    Family("maxxvit", "MaxxVit", "test_coatnet"),
    Family("metaformer", "MetaFormer", "poolformerv2_s12"),
    Family("mlp_mixer", "MlpMixer", "gmlp_ti16_224"),
    Family("mobilenetv3", "MobileNetV3", "mobilenetv3_small_050"),
    Family("mobilenetv5", "MobileNetV5", "mobilenetv5_base"),
    Family("mobilenetv5", "MobileNetV5Encoder", "mobilenetv5_300m_enc"),
    Family("mobilevit", "ByobNet", "mobilevit_xxs"),
    Family("mvitv2", "MultiScaleVit", "mvitv2_tiny"),
    Family("naflexvit", "NaFlexVit", "naflexvit_base_patch16_parfac_gap", options=SMALL_VIT),
    Family("nasnet", "NASNetALarge", "nasnetalarge"),
    Family("nest", "Nest", "nest_tiny"),
    Family("nextvit", "NextViT", "nextvit_small"),
    Family("nfnet", "NormFreeNet", "test_nfnet"),
    Family("pit", "PoolingVisionTransformer", "pit_ti_224"),
    Family("pnasnet", "PNASNet5Large", "pnasnet5large"),
    Family("pvt_v2", "PyramidVisionTransformerV2", "pvt_v2_b0"),
    Family("qwen3_vit", "Qwen3VitClassifier", "qwen3_vit_88m", options=SMALL_VIT),
    Family("qwen3_vit", "Qwen3VitEncoder", "qwen3_vit_88m_enc", options=SMALL_VIT),
    Family("rdnet", "RDNet", "rdnet_tiny"),
    Family("regnet", "RegNet", "regnetx_002"),
    Family("repghost", "RepGhostNet", "repghostnet_050"),
    Family("repvit", "RepVit", "repvit_m1"),
    Family("res2net", "ResNet", "res2next50"),
    Family("resnest", "ResNet", "resnest14d"),
    Family("resnet", "ResNet", "test_resnet"),
    Family("resnetv2", "ResNetV2", "resnetv2_18"),
    Family("rexnet", "RexNet", "rexnet_100"),
    Family("selecsls", "SelecSls", "selecsls42"),
    Family("senet", "SENet", "legacy_seresnet18"),
    Family("sequencer", "Sequencer2d", "sequencer2d_s"),
    Family("shvit", "SHViT", "shvit_s1"),
    Family("sknet", "ResNet", "skresnet18"),
    Family("starnet", "StarNet", "starnet_s050"),
    Family("swiftformer", "SwiftFormer", "swiftformer_xs"),
    Family("swin_transformer", "SwinTransformer", "swin_tiny_patch4_window7_224"),
    Family("swin_transformer_v2", "SwinTransformerV2", "swinv2_tiny_window16_256"),
    Family("swin_transformer_v2_cr", "SwinTransformerV2Cr", "swinv2_cr_tiny_224"),
    Family("tiny_vit", "TinyVit", "tiny_vit_5m_224"),
    Family("tnt", "TNT", "tnt_s_legacy_patch16_224"),
    Family("tresnet", "TResNet", "tresnet_m"),
    Family("twins", "Twins", "twins_svt_small"),
    Family("vgg", "VGG", "vgg11", options={"mlp_ratio": 0.1}),
    Family("visformer", "Visformer", "visformer_tiny"),
    Family("vision_transformer", "VisionTransformer", "test_vit"),
    Family("vision_transformer_hybrid", "VisionTransformer", "vit_tiny_r_s16_p8_224"),
    Family("vision_transformer_relpos", "VisionTransformerRelPos", "test_vit_relpos"),
    Family("vision_transformer_sam", "VisionTransformerSAM", "samvit_base_patch16_224", options=SMALL_VIT),
    Family("vitamin", "VisionTransformer", "vitamin_small_224"),
    Family("volo", "VOLO", "volo_d1_224"),
    Family("vovnet", "VovNet", "ese_vovnet19b_slim_dw"),
    Family("xception", "Xception", "legacy_xception"),
    Family("xception_aligned", "XceptionAligned", "xception41p"),
    Family("xcit", "Xcit", "xcit_nano_12_p8_224"),
)


def timm_classes() -> dict[tuple[str, str], list[str]]:
    """Return every (file, class) of the installed timm with the names of its models; no weight is made.

    Every entrypoint ends in ``build_model_with_cfg(Class, ...)``, which here only notes the class. The last call
    counts: a hybrid's entrypoint first builds the CNN in front of its transformer.
    """
    noted: list[type] = []
    stand_in = mock.MagicMock()

    def note(cls: type, *_: Any, **__: Any) -> mock.MagicMock:
        noted.append(cls)
        return stand_in

    classes: dict[tuple[str, str], list[str]] = {}
    entrypoints = {model: timm.model_entrypoint(model) for model in timm.list_models()}
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))  # for what a hybrid builds directly
        for name, module in list(sys.modules.items()):
            if name.startswith(PACKAGE) and hasattr(module, "build_model_with_cfg"):
                stack.enter_context(mock.patch.object(module, "build_model_with_cfg", note))
        for model, entrypoint in entrypoints.items():
            if entrypoint.__module__.startswith(PACKAGE):  # others register models with timm too
                entrypoint()
                file = entrypoint.__module__.removeprefix(PACKAGE)
                classes.setdefault((file, noted[-1].__name__), []).append(model)
    return classes
