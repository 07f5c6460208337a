"""How one rank runs its stage: tokens stay on the device, the host follows."""
