"""The networks that can be trained. A new backbone is a file here and a line in `BACKBONES`."""

BACKBONES = {
    "vit": "lodeset.training.backbones.vit:VIT",
}
DEFAULT = "vit"
