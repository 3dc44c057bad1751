"""A farm: its images, its private classifier, local alignment and scoring."""
