"""A transformer over patches of images: the network of vit.pt."""

from timm.models.vision_transformer import VisionTransformer


class FashionTransformer(VisionTransformer):
    """timm's vision transformer, [N, 1, 28, 28] -> [N, 10] logits; 0.15 M parameters.

    16 patches of 7×7, three blocks of attention and linear layers, the mean over all.
    """

    def __init__(self) -> None:
        super().__init__(
            img_size=28,
            patch_size=7,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=3,
            num_heads=4,
            class_token=False,
            global_pool="avg",
        )
