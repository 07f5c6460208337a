"""A stage that is launched ahead of its results: tokens stay on the device, the host follows."""
