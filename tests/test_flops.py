"""Counted operations agree with PyTorch's own counter, exactly: it sees the same products."""

from itertools import pairwise

import open_clip
import pytest
import torch
from tiny_architecture import TINY_CLIP
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from goal_ray.flops import PEAKS, image_products, peak_flops, peak_of, step_flops, text_products
from goal_ray.model import encode_image, encode_text, image_tower
from goal_ray.settings import StepConfig
from goal_ray.step import prepare_step

LENGTH = 9
CUSTOM_BLOCKS = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | {"scale_attn": True, "scale_fc": True}}
BIDIRECTIONAL = TINY_CLIP | {
    "text_cfg": TINY_CLIP["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"},
    "custom_text": True,
}
VIT_B_16, VIT_L_14 = (open_clip.get_model_config(name) for name in ("ViT-B-16", "ViT-L-14"))


def build(architecture):
    """A model without memory: shapes are all that is counted."""
    settings = {key: value for key, value in architecture.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if architecture.get("custom_text") else open_clip.CLIP
    with torch.device("meta"):
        return kind(**settings).train()


def seen_by_pytorch(clip, images: int, texts: int, length: int) -> tuple[int, int, int]:
    """What PyTorch counts for the image tower's forward, the text tower's, and all with the backward pass.

    Attention in plain products: the fused kernels compute some of them twice in the backward pass.
    """
    size = image_tower(clip).image_size[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.device("meta"):
        marks = [0]
        pictures = encode_image(clip, torch.zeros(images, 3, size, size)).pooled_BE
        marks.append(counter.get_total_flops())
        captions = encode_text(clip, torch.ones(texts, length, dtype=torch.long)).pooled_BE
        marks.append(counter.get_total_flops())
        (pictures.sum() + captions.sum()).backward()
        image, text = (after - before for before, after in pairwise(marks))
        return image, text, counter.get_total_flops()


def forward_flops(products):
    return sum(product.flops for product in products)


@pytest.mark.parametrize(
    "architecture",
    [TINY_CLIP, CUSTOM_BLOCKS, BIDIRECTIONAL, VIT_B_16, VIT_L_14],
    ids=["tiny", "custom blocks", "bidirectional", "ViT-B-16", "ViT-L-14"],
)
def test_a_forward_and_a_step_count_what_pytorch_counts(architecture):
    clip = build(architecture)
    image, text, step = seen_by_pytorch(clip, images=3, texts=2, length=LENGTH)
    assert 3 * forward_flops(image_products(clip)) == image
    assert 2 * forward_flops(text_products(clip, LENGTH)) == text
    assert step_flops(clip, 3, [LENGTH] * 2) == step


def lock_text(clip):
    clip.transformer.requires_grad_(False)
    for parameter in (*clip.token_embedding.parameters(), *clip.ln_final.parameters()):
        parameter.requires_grad = False
    clip.positional_embedding.requires_grad = clip.text_projection.requires_grad = False


@pytest.mark.parametrize("unlocked_groups", [0, 1, 2, 3])
def test_a_frozen_part_costs_its_forward_and_what_passes_through_it(unlocked_groups):
    clip = build(TINY_CLIP)
    clip.visual.lock(unlocked_groups)
    assert step_flops(clip, 3, [LENGTH]) == seen_by_pytorch(clip, images=3, texts=1, length=LENGTH)[2]


def test_a_frozen_tower_costs_its_forward_alone():
    clip = build(TINY_CLIP)
    whole = step_flops(clip, 1, [LENGTH])
    lock_text(clip)
    assert step_flops(clip, 1, [LENGTH]) == whole - 2 * forward_flops(text_products(clip, LENGTH))
    assert step_flops(clip, 0, [LENGTH]) == forward_flops(text_products(clip, LENGTH))


def test_a_step_of_a_trained_model_costs_three_forwards_but_for_the_pixels_gradient():
    clip = build(TINY_CLIP)
    kernel = clip.visual.conv1.weight
    convolution = 2 * 16 * kernel.numel()
    assert step_flops(clip, 2, [5, 7]) == 2 * (3 * forward_flops(image_products(clip)) - convolution) + 3 * (
        forward_flops(text_products(clip, 5)) + forward_flops(text_products(clip, 7))
    )


@pytest.mark.parametrize("switch", ["sdpa", "checkpoint_activations"])
def test_switches_of_the_step_do_not_change_the_useful_work(switch):
    clip = open_clip.CLIP(**TINY_CLIP)
    before = step_flops(clip, 2, [LENGTH])
    prepare_step(clip, StepConfig(**{"sdpa": False, switch: True}))
    assert step_flops(clip, 2, [LENGTH]) == before


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name, tera):
    assert peak_of(name).bf16 == tera * 1e12


def test_a_gpu_without_bfloat16_has_no_peak_for_it():
    assert peak_of("Tesla V100-SXM2-16GB").bf16 is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GTX 1080",
        "NVIDIA A1000",
        "AMD Instinct MI300X",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_an_unknown_gpu_and_a_slice_of_one_have_no_peak(name):
    assert peak_of(name) is None


def test_lower_precision_is_never_slower_on_a_gpu():
    for peak in PEAKS.values():
        known = [rate for rate in (peak.fp32, peak.tf32, peak.bf16) if rate is not None]
        assert known == sorted(known)


def test_a_cpus_peak_is_measured_once():
    cpu = torch.device("cpu")
    peak = peak_flops(cpu, torch.float32)
    assert peak > 1e8
    assert peak_flops(cpu, torch.float32) == peak
