"""A small encoder of every kind."""

from ringmo.config import Model

VIT = Model(
    backbone="vit", image_size=32, patch_size=8, embed_dim=32, depths=[2], num_heads=[2]
)  # fmt: skip
DEEP = Model(
    image_size=64,
    patch_size=8,
    embed_dim=16,
    depths=[1, 1, 1, 1],
    num_heads=[2, 2, 4, 4],
    window_size=2,
)
BACKBONES = {
    **{
        f"swin of {count}": DEEP.model_copy(
            update={"depths": DEEP.depths[:count], "num_heads": DEEP.num_heads[:count]}
        )
        for count in (1, 2, 3, 4)
    },
    "vit": VIT,
    "sincos": VIT.model_copy(update={"position": "sincos"}),
}
