"""Compare measured average precisions with the published figures."""

from pathlib import PurePosixPath

from fcvit.data.coco import CocoImages
from fcvit.evaluation.published import PublishedComparison, Validation, compare_all
from fcvit.models.variants import COCO_CLASSES, COCO_VALIDATION_IMAGES, Variant, published


def validation_of(images: CocoImages) -> Validation:
    """Return "all" or "part" if these are images of COCO's val2017, judged by the name of the JSON file, or "other"."""
    if PurePosixPath(images.file).name != "instances_val2017.json":
        return "other"
    return "all" if len(images) == COCO_VALIDATION_IMAGES else "part"


def compare_with_published(
    variant: Variant, classes: int, validation: Validation, images: int, box_ap: float, mask_ap: float
) -> tuple[PublishedComparison | None, PublishedComparison | None]:
    """Compare box AP and mask AP with the published figures. Return None if none was published for this network.

    Args:
        variant: Variant of the backbone.
        classes: Number of classes of the network.
        validation: Kind of the images (see `validation_of`).
        images: Number of evaluated images, without the unreadable ones.
        box_ap, mask_ap: Measured AP in percent. NaN is not compared.
    """
    figures = published(variant)
    if figures is None or figures.coco_ap is None:
        return None, None
    reason = ""
    if classes != COCO_CLASSES:
        reason = f"{classes} classes, not {COCO_CLASSES}"
    elif validation == "other":
        reason = "the annotations are not instances_val2017.json"
    elif validation == "part" or images < COCO_VALIDATION_IMAGES:
        reason = f"{images:,} of the {COCO_VALIDATION_IMAGES:,} images"
    box, mask = (
        None
        if measured != measured
        else PublishedComparison(whose, figure, "not comparable", reason)
        if reason
        else compare_all(whose, figure, measured)
        for whose, figure, measured in (
            ("the authors (box AP)", figures.coco_ap[0], box_ap),
            ("the authors (mask AP)", figures.coco_ap[1], mask_ap),
        )
    )
    return box, mask
