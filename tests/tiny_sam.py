"""The official SAM classes at a width that runs in milliseconds."""

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

IMAGE_PX, PATCH_PX, EMBEDDING = 128, 16, 32


def tiny_sam() -> Sam:
    """A Sam for 128-px input: two blocks, one of them with windows, heads of 8 channels, masks of 32 × 32.

    Its random weights are changed so that masks are blocks of 4 × 4 cells, not noise, and that they differ by point.
    """
    torch.manual_seed(3)
    grid = IMAGE_PX // PATCH_PX
    model = Sam(
        image_encoder=ImageEncoderViT(
            img_size=IMAGE_PX,
            patch_size=PATCH_PX,
            embed_dim=24,
            depth=2,
            num_heads=3,
            out_chans=EMBEDDING,
            use_rel_pos=True,
            rel_pos_zero_init=False,
            window_size=3,
            global_attn_indexes=(1,),
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        ),
        prompt_encoder=PromptEncoder(EMBEDDING, (grid, grid), (IMAGE_PX, IMAGE_PX), 16),
        mask_decoder=MaskDecoder(
            transformer_dim=EMBEDDING, transformer=TwoWayTransformer(2, EMBEDDING, 8, 2048), num_multimask_outputs=3
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    decoder = model.mask_decoder
    with torch.no_grad():
        for layer in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
            layer.weight.copy_(4 * layer.weight.mean((2, 3), keepdim=True))
        for head in (*decoder.output_hypernetworks_mlps, decoder.iou_prediction_head):
            for layer in head.layers:
                layer.weight.mul_(5)
    return model.eval()
