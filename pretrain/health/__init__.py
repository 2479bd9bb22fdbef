"""What has to be right on every host before a run begins, read in a moment and without torch."""
