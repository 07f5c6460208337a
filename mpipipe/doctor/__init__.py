"""What would keep a job from running: read, judged, told."""
