"""Write the checkpoint and the held-out images for `fcvit quickstart`.

The script trains the PyTorch reference of `fcvit_digits` on scikit-learn's handwritten digits (UCI, CC BY 4.0). It
saves the checkpoint in the format of the authors' training script: epoch, arch, state_dict, optimizer, args, metric.
It also saves the held-out images and the logits that PyTorch computes for them in float64 and float32.

Run:   .venv/bin/python scripts/make_digits_checkpoint.py
Needs: the extras torch and dev (scikit-learn). Takes about two minutes on two cores.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fcvit.data.transforms.preprocess import normalize, preprocess
from fcvit.models.variants import VARIANTS
from fcvit.reference.classifier import FCViT

ASSETS = Path(__file__).resolve().parents[1] / "src" / "fcvit" / "assets"
VARIANT = VARIANTS["fcvit_digits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60, help="epochs (default 60)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="weight decay (default 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    pixels = (digits.images * 255 / 16).astype(np.uint8)  # (1797, 8, 8), 0 to 255
    train, held_out, train_labels, labels = train_test_split(
        pixels, digits.target, test_size=360, stratify=digits.target, random_state=args.seed
    )
    inputs, targets = prepare(train), torch.from_numpy(train_labels)

    model = FCViT(VARIANT, num_classes=10, drop_path_rate=0.05).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps = math.ceil(len(inputs) / args.batch_size) * args.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(args.epochs):
        total = 0.0
        for batch in torch.randperm(len(inputs)).split(args.batch_size):
            loss = F.cross_entropy(model(shift(inputs[batch])), targets[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {total / len(inputs):.4f}")

    model.eval()
    with torch.inference_mode():
        logits_32 = model(prepare(held_out)).numpy()
        top1 = float((logits_32.argmax(1) == labels).mean() * 100)
        checkpoint = {
            "epoch": args.epochs,
            "arch": VARIANT.name,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "version": 2,
            "args": args,
            "metric": top1,
        }
        torch.save(checkpoint, ASSETS / "digits.pth.tar")
        logits_64 = model.double()(prepare(held_out).double()).numpy()
    np.savez_compressed(
        ASSETS / "digits_held_out.npz",
        images=held_out,
        labels=labels.astype(np.uint8),
        logits_float64=logits_64,
        logits_float32=logits_32,
    )
    print(f"held-out top-1 {top1:.2f}% of {len(labels)} images; wrote {ASSETS}")


def prepare(images: np.ndarray) -> torch.Tensor:
    """Preprocess uint8 images (N, 8, 8) as the package does: normalized float32 (N, 3, 32, 32)."""
    batch = np.stack([preprocess(Image.fromarray(image), VARIANT.preprocessing) for image in images])
    return torch.from_numpy(normalize(batch, VARIANT.preprocessing))


def shift(batch: torch.Tensor) -> torch.Tensor:
    """Shift the batch randomly by up to three pixels. The border gets the darkest value."""
    padded = F.pad(batch - batch.min(), (3, 3, 3, 3)) + batch.min()
    x, y = (int(n) for n in torch.randint(0, 7, (2,)))
    return padded[:, :, y : y + batch.shape[2], x : x + batch.shape[3]]


if __name__ == "__main__":
    main()
