"""Does mask piloting help on this set? A small Mask2Former of transformers, trained without it and with it.

Both start from the same weights and see the same batches in the same order, each for the same time, and are then
measured on the validation images: the model's own loss, and the layer analysis. The annotation files are in COCO's
instance format.

    python examples/huggingface_piloting.py train/_annotations.coco.json val/_annotations.coco.json --minutes 2
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from analysis.huggingface import from_transformers
from analysis.recorder import LayerRecorder
from mpformer.data.own.annotations import classes_of, read_split
from mpformer.data.own.painting import mask_of
from mpformer.data.own.registration import Sources
from mpformer.piloting import MaskPiloting

Batch = dict[str, Any]


class CocoInstances(Dataset[dict[str, Tensor]]):
    """One split, each image resized to a square, with one mask per annotation that is no crowd."""

    def __init__(self, sources: Sources, split: str, side: int) -> None:
        self.folder, self.side = sources.folder(split), side
        self.names = classes_of([read_split(sources, each) for each in ("train", "val")]).names
        self.split = read_split(sources, split)

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Pixel values (3, side, side), mask labels (n, side, side) float, class labels (n,)."""
        image = self.split.images[index]
        pixels = Image.open(self.folder / image.file).convert("RGB").resize((self.side, self.side))
        marks = [mark for mark in image.marks if not mark.get("iscrowd")]
        size, out = (image.height, image.width), (self.side, self.side)
        masks = np.array([mask_of(mark["segmentation"], size, out) for mark in marks]).reshape(-1, *out)
        labels = [self.names.index(self.split.names[mark["category_id"]]) for mark in marks]
        return {
            "pixel_values": torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1) / 127.5 - 1,
            "mask_labels": torch.from_numpy(masks).float(),
            "class_labels": torch.tensor(labels, dtype=torch.int64),
        }


def collate(items: list[dict[str, Tensor]]) -> Batch:
    named = {name: [item[name] for item in items] for name in items[0]}
    return {**named, "pixel_values": torch.stack(named["pixel_values"])}


def small_model(classes: int, queries: int) -> Any:
    """A narrow Mask2Former with random weights; take ``from_pretrained`` for a real one."""
    backbone = SwinConfig(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=64, hidden_dim=64, num_attention_heads=4,
        encoder_feedforward_dim=128, encoder_layers=2, decoder_layers=7, dim_feedforward=128, num_queries=queries,
        num_labels=classes, train_num_points=1024,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def train(model: torch.nn.Module, data: CocoInstances, options: argparse.Namespace) -> int:
    """Train for the minutes that are asked for, reading images included; returns the number of steps."""
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True, collate_fn=collate, generator=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    end, steps = time.monotonic() + 60 * options.minutes, 0
    torch.manual_seed(options.seed)
    model.train()
    while True:
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            if time.monotonic() > end:
                return steps


@torch.no_grad()
def measure(model: torch.nn.Module, data: CocoInstances, seed: int) -> dict[str, float | None]:
    """The model's own loss, the last masks' IoU with their objects, and the decoder layers' consistency.

    None is what does not exist, such as the consistency of masks that are all empty.
    """
    recorder, losses = LayerRecorder(), []
    torch.manual_seed(seed)
    model.eval()
    for index in range(len(data)):
        batch = collate([data[index]])
        outputs = model(**batch, output_auxiliary_logits=True)
        layers = from_transformers(outputs)
        losses.append(outputs.loss.item())
        masks, labels = batch["mask_labels"][0] > 0.5, batch["class_labels"][0]
        recorder.add(index, layers[0][0], layers[1][0], masks, labels)
    summary = recorder.summary()
    shown = {name: summary["metrics"][name] for name in ("mIoU-L", "Util", "jump-rate")}
    return {"loss": sum(losses) / len(losses), "IoU-gt": summary["layers"]["IoU-gt"][-1], **shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="annotations of the training images")
    parser.add_argument("val", type=Path, help="annotations of the validation images")
    parser.add_argument("--images", type=Path, help="folder of the training images; default: beside their annotations")
    parser.add_argument("--val-images", type=Path, help="folder of the validation images; default: likewise")
    parser.add_argument("--minutes", type=float, default=2, help="training time of each of the two")
    parser.add_argument("--side", type=int, default=128, help="images are resized to this side, a multiple of 32")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = options.images or options.train.parent, options.val_images or options.val.parent
    sources = Sources(*map(str, (options.train, options.val, *images)))
    training, validation = (CocoInstances(sources, split, options.side) for split in ("train", "val"))
    for name in ("without", "with"):
        torch.manual_seed(options.seed)
        model = small_model(len(training.names), options.queries)
        pilot = MaskPiloting.for_huggingface(model) if name == "with" else None
        steps = train(pilot or model, training, options)
        found = measure(pilot.remove() if pilot else model, validation, options.seed)
        numbers = (f"{key} {'none' if value is None else f'{value:.2f}'}" for key, value in found.items())
        print(f"{name:>7} piloting: {steps} steps, {', '.join(numbers)}", flush=True)


if __name__ == "__main__":
    main()
