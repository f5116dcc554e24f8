"""Models of timm and torchvision."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import ModelError, create_model, describe, is_batch_norm
from model_zoo.external import Enlarge
from tests.support.cases import each_case

SMALL = [  # name, channels, size, width of the features, enlarged to
    ("torchvision:mobilenet_v2", 1, 28, 1280, None),
    ("torchvision:shufflenet_v2_x0_5", 1, 28, 1024, None),
    ("torchvision:squeezenet1_1", 1, 28, 512, None),
    ("torchvision:densenet121", 1, 28, 1024, (32, 32)),
    ("torchvision:googlenet", 2, 28, 1024, None),
    ("torchvision:efficientnet_b0", 1, 28, 1280, None),
    ("torchvision:resnet18", 5, (28, 40), 512, None),
    ("torchvision:convnext_tiny", 1, (28, 56), 768, (32, 64)),
    ("timm:resnet10t", 1, 28, 512, None),
    ("timm:mobilenetv3_small_050", 4, 28, 1024, None),
    ("timm:vit_tiny_patch16_224", 1, 32, 192, None),
    ("timm:vit_tiny_patch16_224", 3, 28, 192, (32, 32)),
]


@pytest.mark.slow
@each_case(("name", "channels", "size", "width", "enlarged"), SMALL)
def test_external_models_accept_small_images(
    name: str,
    channels: int,
    size: Any,
    width: int,
    enlarged: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = create_model(name, 6, channels, size)
    torch.manual_seed(0)
    again = create_model(name, 6, channels, size).state_dict()
    assert all(torch.equal(tensor, again[n]) for n, tensor in model.state_dict().items())
    x = torch.randn(2, channels, *((size, size) if isinstance(size, int) else size))
    before = x.clone()

    features = model.eval().forward_features(x)

    assert features.shape == (2, width) == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(x)) and model(x).shape == (2, 6)
    sizes = [module.size for module in model.modules() if isinstance(module, Enlarge)]
    assert sizes == ([enlarged] if enlarged else [])
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}
    # Only dropout draws random numbers.
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x)
    state = torch.get_rng_state()
    F.cross_entropy(model.train()(x), torch.tensor([0, 1])).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(x, before)


def test_feature_dim_and_options_reach_the_library() -> None:
    model = create_model("torchvision:mobilenet_v2", 4, feature_dim=16, dropout=0.7)
    assert model.forward_features(torch.randn(2, 1, 28, 28)).shape == (2, 16)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.7}
    assert create_model("timm:resnet10t", 4, drop_rate=0.3).backbone.drop_rate == 0.3
    assert describe("timm:resnet10t").summary == "resnet10t from timm"
    enlarged = "densenet121 from torchvision, images enlarged to 32x32"
    assert describe("torchvision:densenet121").summary == enlarged


def test_model_for_five_channels_is_fresh_and_uses_all_of_them() -> None:
    model = create_model("torchvision:resnet18", 4, in_channels=5)
    weight = model.backbone.conv1.weight
    assert weight.shape == (64, 5, 7, 7)
    # He et al., by fan-out.
    assert weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    layers = [module for module in model.modules() if is_batch_norm(module)]
    assert not any(layer.num_batches_tracked or layer.running_mean.any() for layer in layers)

    x = torch.randn(2, 5, 28, 28, requires_grad=True)
    model.eval()(x).sum().backward()

    assert x.grad is not None and (x.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_unusable_output_of_a_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError(f"kernel larger than {tuple(x.shape[2:])}\nand a second line")

    too_small = r"cannot process an image of 29x29 .* \(29, 29\) and a second line$"
    no_vector = r"shape \(2, D\) for a batch of 2 examples, got \(2, 1, 29, 29\)$"
    for forward, message in ((refuse, too_small), (lambda self, x: x, no_vector)):
        monkeypatch.setattr("torchvision.models.ResNet.forward", forward)
        with pytest.raises(ModelError, match=f"^model torchvision:resnet18: .*{message}"):
            # The sizes that a model accepts are remembered, and no other test uses this one.
            create_model("torchvision:resnet18", 10, input_size=29)


TORCHVISION = "torchvision.models._api.load_state_dict_from_url"
TIMM = "timm.models._builder.load_state_dict_from_hf"


def publish(monkeypatch: pytest.MonkeyPatch, place: str, reference: nn.Module) -> None:
    """Let a library find the weights of a module in place of published ones."""
    monkeypatch.setattr(place, lambda *_, **__: reference.state_dict())


def test_torchvision_weights_are_loaded_and_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    published = torchvision.models.resnet18()
    publish(monkeypatch, TORCHVISION, published)
    models = {
        channels: create_model("resnet18", 10, channels, 32, pretrained=True).eval()
        for channels in (1, 3, 5)
    }
    first = published.conv1.weight[:, [0, 1, 2, 0, 1]] * 0.6
    published.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    gray = x[:, :1]

    assert torch.equal(models[3].forward_features(x), published.eval()(x))
    assert torch.equal(models[5].backbone.conv1.weight, first)
    # Summed weights on gray images equal gray repeated in three colors.
    expected = published(gray.expand(2, 3, 32, 32))
    torch.testing.assert_close(models[1].forward_features(gray), expected, rtol=1e-4, atol=1e-5)
    transformer = torchvision.models.vit_b_32(image_size=224, num_classes=1000)
    publish(monkeypatch, TORCHVISION, transformer)
    model = create_model("torchvision:vit_b_32", 3, 3, 64, pretrained=True)
    assert model.backbone.encoder.pos_embedding.shape == (1, 1 + 4, 768)
    assert torch.equal(model.backbone.conv_proj.weight, transformer.conv_proj.weight)


def test_timm_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    reference = timm.create_model("resnet10t")
    publish(monkeypatch, TIMM, reference)

    gray = create_model("timm:resnet10t", 3, 1, 32, pretrained=True)

    first = reference.conv1[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(gray.backbone.conv1[0].weight, first)
    assert torch.equal(gray.backbone.layer1[0].conv1.weight, reference.layer1[0].conv1.weight)


@each_case(
    ("name", "place"),
    [
        ("resnet18", TORCHVISION),
        ("torchvision:squeezenet1_1", TORCHVISION),
        ("timm:resnet10t", TIMM),
    ],
)
def test_failed_download_of_weights_raises_one_line(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        print("Downloading: resnet18.pth")
        print("0%", file=sys.stderr)
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise URLError("Name or service not known")

    monkeypatch.setattr(place, offline)
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "handlers", [logging.StreamHandler(logged := io.StringIO())])
    with pytest.raises(ModelError) as caught:
        create_model(name, 10, pretrained=True)
    message = str(caught.value)
    assert message.startswith(f"model {name}: pretrained: cannot load the pretrained weights: ")
    assert "Name or service not known" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")
    # Muted for the download only.
    hub.warning("heard")
    assert logged.getvalue() == "heard\n"
