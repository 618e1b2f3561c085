"""The peers of whole_job.py: torch with scikit-learn, and fastai.

Each prints its CPU seconds when there is a classifier that can be used, and its accuracy on the
test images after that.
"""

from __future__ import annotations

import json
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch_peer import import_torchvision

torchvision, _library = import_torchvision()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

MEAN, STD = (123 / 255, 117 / 255, 104 / 255), (1 / 255, 1 / 255, 1 / 255)
SIZE, RESIZE, BATCH = 224, 256, 64


def thin_resnet50(weights: str) -> nn.Module:
    """The network of the weights, from torchvision's blocks: half as wide after the stem, the
    stride in the first 1x1 convolution, and a pool that takes a last column that is not whole.
    """
    parts = torchvision.models.resnet
    network = parts.ResNet(parts.Bottleneck, [3, 4, 6, 3], num_classes=2)
    network.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    network.inplanes = 64
    for number, blocks in enumerate([3, 4, 6, 3]):
        stride = 1 if number == 0 else 2
        stage = network._make_layer(parts.Bottleneck, 32 * 2**number, blocks, stride=stride)
        stage[0].conv1.stride, stage[0].conv2.stride = (stride, stride), (1, 1)
        setattr(network, f"layer{number + 1}", stage)
    network.fc = nn.Linear(1024, 2)
    network.load_state_dict(load_file(weights))
    return network


def ready() -> None:
    """Says that there is a classifier, and the CPU seconds that it took."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"cpu": sum(one.ru_utime + one.ru_stime for one in used)}), flush=True)


def torch_and_scikit_learn(job: dict[str, Any], *, standardized: bool) -> float:
    """Features of the network as it is, and logistic regression, its strength by 5 folds."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    network = thin_resnet50(job["weights"]).eval().to(memory_format=torch.channels_last)
    network.fc = nn.Identity()
    parts = torchvision.transforms
    transform = parts.Compose(
        [parts.Resize(RESIZE), parts.CenterCrop(SIZE), parts.ToTensor(), parts.Normalize(MEAN, STD)]
    )

    def features(part: str) -> tuple[Any, Any]:
        images = torchvision.datasets.ImageFolder(Path(job["images"], part), transform)
        loader = torch.utils.data.DataLoader(images, batch_size=BATCH)
        with torch.inference_mode():
            found = [
                (network(batch.to(memory_format=torch.channels_last)), labels)
                for batch, labels in loader
            ]
        outputs, labels = zip(*found, strict=True)
        return torch.cat(outputs).numpy(), torch.cat(labels).numpy()

    logistic = LogisticRegressionCV(scoring="neg_log_loss", max_iter=1000)
    head = make_pipeline(StandardScaler(), logistic) if standardized else logistic
    seen = features("train")
    with threadpool_limits(1):  # With more, its products of small matrices wait for each other.
        head.fit(*seen)
    ready()
    images, labels = features("test")
    return float((head.predict(images) == labels).mean())


def fastai(job: dict[str, Any]) -> float:
    """The frozen body under the default head, with the augmentation of its tutorials."""
    import fastai.callback.progress
    import fastai.callback.schedule  # noqa: F401  # Both add methods to the learner.
    from fastai.callback.core import Callback, CancelValidException
    from fastai.metrics import accuracy
    from fastai.vision.augment import Resize, aug_transforms
    from fastai.vision.data import ImageDataLoaders, Normalize
    from fastai.vision.learner import vision_learner

    def body(pretrained: bool = True, weights: Any = None) -> nn.Module:
        return thin_resnet50(job["weights"])

    def no_validation(callback: Callback) -> None:
        raise CancelValidException  # After every epoch, it would look at the test images.

    images = ImageDataLoaders.from_folder(
        job["images"],
        valid="test",
        item_tfms=Resize(RESIZE),
        batch_tfms=[*aug_transforms(size=SIZE), Normalize.from_stats(MEAN, STD)],
    )
    learner = vision_learner(images, body, normalize=False, metrics=accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(job["epochs"], cbs=Callback(before_validate=no_validation))
        ready()
        return float(learner.validate()[1])


CONTESTANTS = {
    "torch": partial(torch_and_scikit_learn, standardized=True),
    "torch-plain": partial(torch_and_scikit_learn, standardized=False),
    "fastai": fastai,
}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({"accuracy": CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]))}))
