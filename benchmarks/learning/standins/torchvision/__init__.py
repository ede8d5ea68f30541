"""Stands in for torchvision, of which diffusers' training script and the peers use a few functions on pictures."""
