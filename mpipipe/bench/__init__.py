"""Measuring parts of the system: throughput, control plane, transformers as the baseline."""
