"""Names, shapes and arithmetic of the backbone, and its Hugging Face form."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lodeset.pipeline.errors import LodesetError
from lodeset.training.config import ModelConfig
from lodeset.training.export import export, load_backbone
from lodeset.training.vit import Attention, Block, DinoVisionTransformer

BLOCK = {
    "norm1.weight": (384,),
    "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384),
    "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "ls1.gamma": (384,),
    "norm2.weight": (384,),
    "norm2.bias": (384,),
    "mlp.fc1.weight": (1536, 384),
    "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536),
    "mlp.fc2.bias": (384,),
    "ls2.gamma": (384,),
}


def model(registers: int = 0, ffn: str = "mlp", drop_path: float = 0.0) -> DinoVisionTransformer:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"dim": 24, "depth": 2, "heads": 3, "ffn": ffn, "registers": registers, "drop_path": drop_path}
    )
    made = DinoVisionTransformer(config, 32)
    with torch.no_grad():  # away from initial zeros, so that every parameter matters
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def test_state_dict_is_that_of_the_released_small_model() -> None:
    config = ModelConfig(patch_size=14, dim=384, depth=12, heads=6, registers=4)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in DinoVisionTransformer(config, 518).state_dict().items()}
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 1370, 384),
        "mask_token": (1, 384),
        "register_tokens": (1, 4, 384),
        "patch_embed.proj.weight": (384, 3, 14, 14),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    assert shapes == expected | {f"blocks.{n}.{name}": shape for n in range(12) for name, shape in BLOCK.items()}


def test_swiglu_of_the_giant_has_its_published_width() -> None:
    with torch.device("meta"):
        giant = DinoVisionTransformer(ModelConfig(patch_size=14, dim=1536, depth=1, heads=24, ffn="swiglu"), 518)
    state = giant.state_dict()
    assert state["blocks.0.mlp.w12.weight"].shape == (8192, 1536)
    assert state["blocks.0.mlp.w3.weight"].shape == (1536, 4096)
    assert "register_tokens" not in state


@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_of_any_size_and_only_hidden_patches_are_replaced(registers: int) -> None:
    net = model(registers)
    images = torch.randn(2, 3, 16, 24)
    seen = net(images)
    assert seen.cls.shape == (2, 24) and seen.patches.shape == (2, 6, 24) and seen.registers.shape == (2, registers, 24)
    masks = torch.zeros(2, 6, dtype=torch.bool)
    masks[0, 3] = True
    changed = images.clone()
    changed[0, :, 8:, :8] += 5  # the pixels of patch 3, the first of the second row
    torch.testing.assert_close(net(images, masks).cls, net(changed, masks).cls)
    assert not torch.allclose(seen.cls[0], net(changed).cls[0])
    torch.testing.assert_close(net(images, masks).cls[1], seen.cls[1])


def test_stochastic_depth_keeps_the_mean_and_skips_samples() -> None:
    net = model(drop_path=0.5).train()
    block = net.blocks[0]
    assert isinstance(block, Block)
    torch.manual_seed(0)
    shapes = [(4, 5), (6, 3)]  # two groups, of which 2 and 3 crops stay
    x = torch.randn(4 * 5 + 6 * 3, 24)
    with torch.no_grad():
        dense = block.attention_branch(x, shapes)
        drawn = torch.stack([block._add(x.clone(), shapes, block.attention_branch) - x for _ in range(400)])
    skipped = (drawn == 0).all(dim=2)  # [400, n]
    for part, (batch, tokens) in zip(skipped.split([20, 18], dim=1), shapes, strict=True):
        whole = part.view(400, batch, tokens)
        assert bool((whole.all(dim=2) == whole.any(dim=2)).all())  # crops are skipped as a whole
        assert bool((whole.all(dim=2).sum(dim=1) == batch // 2).all())
    torch.testing.assert_close(drawn[~skipped].std(), 2 * dense.std(), rtol=0.1, atol=0)
    torch.testing.assert_close(drawn.mean(0), dense, rtol=0, atol=0.25 * float(dense.abs().max()))


def test_the_packed_residual_has_the_gradients_of_the_plain_one() -> None:
    """In place and gathered, against: every crop computed, and those that are skipped multiplied by nought."""
    net = model(drop_path=0.5).train()
    shapes = [(4, 5), (6, 3)]
    block = net.blocks[0]
    assert isinstance(block, Block)
    start = torch.randn(38, 24)

    def gradients(step: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        net.zero_grad()
        x = start.clone().requires_grad_()
        torch.autograd.backward((step(x * 1.0) ** 2).sum())
        return [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]  # type: ignore[list-item]

    def plain(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        for branch in (block.attention_branch, block.mlp_branch):
            kept = []
            for batch, tokens in shapes:
                rows = torch.randperm(batch)[: batch // 2]
                weight = torch.zeros(batch, tokens, 1)
                weight[rows] = 2.0
                kept.append(weight.flatten(0, 1))
            x = x + torch.cat(kept) * branch(x, shapes)
        return x

    def packed(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return block(x, shapes)

    for ours, theirs in zip(gradients(packed), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_explicit_attention_in_bf16_is_the_fused_one() -> None:
    attention = Attention(24, 3)
    for batch, tokens in ((3, 7), (2, 65)):
        found = []
        for explicit in (512, 0):  # tokens up to which products are explicit
            with pytest.MonkeyPatch.context() as patched, torch.autocast("cpu", torch.bfloat16):
                patched.setattr("lodeset.training.vit.EXPLICIT_TOKENS", explicit)
                torch.manual_seed(0)
                x = torch.randn(batch * tokens, 24, requires_grad=True)
                out = attention(x, [(batch, tokens)])
                torch.autograd.backward(out.float().square().sum())
                found.append((out.detach().float(), x.grad))
        for ours, theirs in zip(*found, strict=True):
            assert ours is not None and theirs is not None
            assert float((ours - theirs).abs().max()) < 0.02 * float(theirs.abs().max())


def test_groups_of_crops_are_told_as_each_alone() -> None:
    net = model(registers=2)
    large, small = torch.randn(3, 3, 32, 32), torch.randn(5, 3, 16, 16)
    masks = torch.rand(3, 16) < 0.3
    together = net.forward_groups([(large, masks), (small, None)])
    for one, alone in zip(together, (net(large, masks), net(small)), strict=True):
        for name in ("cls", "patches", "registers"):
            torch.testing.assert_close(getattr(one, name), getattr(alone, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("registers", "ffn"), [(0, "mlp"), (0, "swiglu"), (2, "mlp")])
def test_export_is_read_back_by_us_and_by_transformers(tmp_path: Path, registers: int, ffn: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    net = model(registers, ffn)
    images = torch.randn(2, 3, 32, 32)
    export(net, tmp_path)
    seen, ours = net(images), load_backbone(tmp_path)(images)
    assert torch.equal(ours.cls, seen.cls) and torch.equal(ours.patches, seen.patches)

    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        tokens = theirs.eval()(images).last_hidden_state
    torch.testing.assert_close(tokens[:, 0], seen.cls, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens[:, 1 + registers :], seen.patches, rtol=0, atol=1e-4)


def test_a_damaged_or_missing_export_is_told_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match=r"config\.json does not exist"):
        load_backbone(tmp_path)
    export(model(), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LodesetError, match="no readable"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": -16},
        {"image_size": "16"},
        {"num_hidden_layers": 10**6},
        {"hidden_size": 24},
        {"hidden_size": None},
        {"patch_size": 5},
        {"use_swiglu_ffn": True},
    ],
)
def test_descriptions_that_do_not_fit_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    export(DinoVisionTransformer(ModelConfig(patch_size=4, dim=16, depth=1, heads=2), 16), tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | change))
    with pytest.raises(LodesetError, match="do not match the configuration"):
        load_backbone(tmp_path)
    for text in ("[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(LodesetError):
            load_backbone(tmp_path)
