"""What networks can be trained to do without labels. A new objective is a file here and a line in `OBJECTIVES`."""

OBJECTIVES = {
    "dinov2": "lodeset.training.objectives.dinov2:DINOV2",
}
DEFAULT = "dinov2"
