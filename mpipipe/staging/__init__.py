"""A model's way onto shared storage: copied or converted, checked, and able to go on."""
