"""What would keep a job from running: probed, checked, told."""
