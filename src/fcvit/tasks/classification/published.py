"""Compare a measured accuracy with the published figure."""

from fcvit.evaluation.protocols import CUSTOM, RESIZE256, Protocol
from fcvit.evaluation.published import PublishedComparison, Validation, compare_all, compare_part
from fcvit.models.variants import IMAGENET_CLASSES, VALIDATION_IMAGES, Variant, published


def compare_with_published(
    variant: Variant,
    num_classes: int,
    protocol: Protocol,
    validation: Validation,
    top1: float,
    interval: tuple[float, float],
    images: int,
    unreadable: int = 0,
) -> PublishedComparison | None:
    """Compare a top-1 accuracy with the published figure. Return None if none was published for this protocol.

    Args:
        variant: Variant of the network.
        num_classes: Number of candidate classes.
        protocol: Protocol of the measurement.
        validation: "all" or "part" of ImageNet-1K's validation images, or "other" images.
        top1, interval: Measured top-1 accuracy and its 95% confidence interval, in percent.
        images, unreadable: Number of evaluated and of unreadable images.
    """
    figures = published(variant)
    if figures is None or protocol.name == CUSTOM or protocol.preprocessing.mean != variant.preprocessing.mean:
        return None
    earlier = protocol.name == RESIZE256
    named = ("the earlier port", figures.earlier_port_top1) if earlier else ("the authors", figures.top1)
    if num_classes != IMAGENET_CLASSES:
        return PublishedComparison(*named, "not comparable", f"{num_classes} candidate classes, not 1,000")
    if validation == "other":
        reason = "the file names are not those of ImageNet's validation images"
        return PublishedComparison(*named, "not comparable", reason)
    if validation == "part":
        return compare_part(*named, top1, interval, images, VALIDATION_IMAGES)
    return compare_all(*named, top1, VALIDATION_IMAGES, unreadable)
