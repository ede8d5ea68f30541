"""torchvision's second name for the same."""

from torchvision import transforms

Compose, InterpolationMode, Normalize = transforms.Compose, transforms.InterpolationMode, transforms.Normalize
RandomCrop, Resize, ToTensor = transforms.RandomCrop, transforms.Resize, transforms.ToTensor
