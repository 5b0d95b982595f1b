"""Recipe fields of detection and instance segmentation."""

import dataclasses
from typing import Annotated, Any

from fcvit.data.transforms.detection import SCALE, DetectionAugmentation
from fcvit.models.spec import MaskRCNNOptions
from fcvit.tasks.dense import Channels, DenseRecipe, Size
from fcvit.tasks.detection.losses import Sampling
from fcvit.tasks.recipe import DATA, IMAGES, LOSS, NETWORK, Count, Positive, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """A recipe for Mask R-CNN. The defaults of its own fields are the authors'."""

    task: Annotated[str, DATA("Task of the network.")] = "detection"

    masks: Annotated[bool, NETWORK("Add the mask head. Without it, the network is a Faster R-CNN.")] = True
    rpn_channels: Annotated[Channels, NETWORK("Channels of the region proposal network (RPN).")] = 256
    box_channels: Annotated[Channels, NETWORK("Channels of the fully connected layers of the box head.")] = 1024
    mask_channels: Annotated[Channels, NETWORK("Channels of the mask head.")] = 256
    anchor_scale: Annotated[Positive, NETWORK("Side of the anchors in strides; the smallest has 4 times this.")] = 8.0
    finest_scale: Annotated[Positive, NETWORK("Boxes of under twice this size use the finest features, in pixels.")] = (
        56.0
    )
    proposals_before_nms: Annotated[Count, NETWORK("Boxes per feature map before NMS.")] = 1000
    max_proposals: Annotated[Count, NETWORK("Largest number of proposals per image.")] = 1000
    max_detections: Annotated[Count, NETWORK("Largest number of detections per image.")] = 100

    scale: Annotated[Size, IMAGES("Largest longer and shorter side after the resize, in pixels.")] = SCALE
    one_orientation: Annotated[bool, IMAGES("Do not mix images that are wider than high with others in a batch.")] = (
        True
    )
    vertical_flip: Annotated[Share, IMAGES("Probability of a vertical flip.")] = 0.0

    training_before_nms: Annotated[Count, LOSS("Boxes per feature map before NMS, in training.")] = 2000
    rpn_samples: Annotated[Count, LOSS("Anchors of an image in the losses, at most half of them positive.")] = 256
    roi_samples: Annotated[Count, LOSS("Proposals of an image in the losses, at most a quarter positive.")] = 512

    def augmentation(self) -> DetectionAugmentation:
        """Return the augmentation of training images."""
        return DetectionAugmentation(self.scale, self.flip, self.vertical_flip, self.masks)

    def sampling(self) -> Sampling:
        """Return the numbers of samples of an image in the losses."""
        return Sampling(self.rpn_samples, self.roi_samples, self.training_before_nms)

    def head_options(self) -> MaskRCNNOptions:
        """Return the widths and limits of the network, and the size of its input in evaluation: that of `scale`."""
        return MaskRCNNOptions(
            neck=self.neck_channels,
            rpn=self.rpn_channels,
            box_channels=self.box_channels,
            mask_channels=self.mask_channels,
            masks=self.masks,
            anchor_scale=self.anchor_scale,
            finest_scale=self.finest_scale,
            proposals_before_nms=self.proposals_before_nms,
            max_proposals=self.max_proposals,
            max_detections=self.max_detections,
            long_side=max(self.scale),
            short_side=min(self.scale),
        )


def head_fields(options: MaskRCNNOptions) -> dict[str, Any]:
    """Return the recipe fields that give these options, the inverse of `DetectionRecipe.head_options`."""
    same = (
        *("box_channels", "mask_channels", "masks", "anchor_scale", "finest_scale"),
        *("proposals_before_nms", "max_proposals", "max_detections"),
    )
    scale = (options.long_side, options.short_side)
    fields = {"neck_channels": options.neck, "rpn_channels": options.rpn, "scale": scale}
    return fields | {name: getattr(options, name) for name in same}
