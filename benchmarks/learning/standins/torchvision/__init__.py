"""Stands in for torchvision, of which diffusers' training script uses six functions on pictures; nothing else imports it."""
